"""Texts in the place of rows: a language model and its records, for prepared methods that serve them.

A record becomes one row of token ids, padded to the longest (:func:`text_table`), so a method can draw, leave out and digest
records as it does rows, and a record has a gradient of its own. The model is trained as ``expunge train`` does it, by the one
training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge.adapters.base import Example
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.tokenise import Tokens
from expunge.core.access import Stream
from expunge.core.errors import Destroyed, InputError
from expunge.data.order import BatchPlan
from expunge.data.records import Record
from expunge.data.rows import Table
from expunge.engine.functional import Forward, RowLoss, Tensors
from expunge.engine.loop import train
from expunge.engine.members import Training
from expunge.engine.options import Engine
from expunge.engine.parts import Recipe
from expunge.engine.schedule import Fixed
from expunge.engine.source import Source, state_of

_NOTHING = -1  #: in the place of a token
_UNLEARNT = -100  #: in the place of a target: a token of the prompt, or none


def text_table(adapter: LanguageAdapter, records: Sequence[Record], source: str = "python") -> Table:
    """Records as a table: inputs ``[n, T]`` token ids padded with -1; targets ``[n, T]``, the ids to be learnt, -100 elsewhere.

    Raises:
        InputError: a record does not fit into the model's context, or an id occurs twice.
    """
    if not records:
        raise InputError("There is no record.", "Give at least one.")
    ids = tuple(r.id for r in records)
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise InputError(f"The record id {twice!r} occurs twice.", "Make the ids unique.")
    inputs, targets = _padded([adapter.encode(r).data for r in records])
    words = {
        "prompt": [r.prompt for r in records],
        "answer": [r.answer for r in records],
        "subject": [r.subject for r in records],
    }
    columns = {name: np.array(values, dtype=object) for name, values in words.items()}
    return Table(
        ids, inputs.numpy(), targets.numpy(), "text",
        subjects=tuple(r.cluster for r in records), columns=columns, source=source,
    )  # fmt: skip


def token_scores(model: nn.Module, inputs: Any) -> Tensor:
    """Scores ``[B, T, V]``. Padding is on the right, where causal attention does not look; positions are those of the tokens."""
    ids: Tensor = torch.where(inputs == _NOTHING, inputs[:, :1], inputs)  # any token will do
    out: Tensor = model(input_ids=ids, use_cache=False).logits
    return out


def text_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of the targets of each record in nats, ``[B]``; scores ``[B, T, V]``, targets ``[B, T]``."""
    wanted, counted = targets[:, 1:].clamp_min(0), targets[:, 1:] != _UNLEARNT
    losses = functional.cross_entropy(scores[:, :-1].float().flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
    return (losses * counted).sum(1) / counted.sum(1).clamp_min(1)


@dataclass(frozen=True)
class TextPart:
    """A part of a training.

    Attributes:
        schedule: how long and how fast.
    """

    schedule: Fixed


@dataclass(frozen=True, kw_only=True)
class TextSource(Source):
    """A language model and records.

    Args:
        opens: makes the adapter of the untrained model from a seed (of initial weights, where they are random).
        held: the records of the table, in its order.
        recipe: how it is trained: a retain term and a fixed schedule, all weights.
        engine: how the machine is used; its seed is not read.
    """

    opens: Callable[[int], LanguageAdapter]
    held: Sequence[Record]
    recipe: Recipe
    engine: Engine = field(default_factory=Engine)
    forward: Forward = token_scores
    loss: RowLoss | None = text_loss

    def __post_init__(self) -> None:
        if self.recipe.parameters.name != "all":
            raise InputError(
                f"parameters={self.recipe.parameters.name} keeps the model apart from what it learns; a prepared method trains "
                "the whole.", "Leave parameters out.",
            )  # fmt: skip
        if not isinstance(self.recipe.schedule, Fixed):
            raise InputError(
                f"schedule={self.recipe.schedule.name} stops by what it sees; a prepared method needs a fixed length.",
                "Choose schedule=fixed.",
            )

    @property
    def plan(self) -> Training:
        """Texts are trained by the recipe.

        Raises:
            InputError: always.
        """
        raise InputError("This method trains networks of rows, and texts were given.", "Choose dp2u.")

    @property
    def model(self) -> Callable[[], nn.Module]:
        """Use :meth:`made`: a language model comes with its tokenizer.

        Raises:
            InputError: always.
        """
        raise InputError("This method trains networks of rows, and texts were given.", "Choose dp2u.")

    @property
    def schedule(self) -> Fixed:
        """Of the whole training."""
        held = self.recipe.schedule
        assert isinstance(held, Fixed)  # checked when it was made
        return held

    @property
    def rate(self) -> float:
        """Step size of the training.

        Raises:
            InputError: it is left to the range test.
        """
        if self.schedule.lr is None:
            raise InputError("The step size of the base is open.", "Give base_lr=..., or schedule.lr=...")
        return self.schedule.lr

    def described(self) -> dict[str, Any] | None:
        """Recipe and what else of the engine decides the result."""
        kept = self.engine.model_dump(mode="json", exclude={"seed", "checkpoint_every", "trackers"})
        return {"recipe": self.recipe.spec(), "engine": kept}

    def shortened(self, share: float) -> TextPart:
        """A share of the passes (or steps), and of the warm-up."""
        whole = self.schedule
        if whole.steps is not None:
            return TextPart(whole.model_copy(update={"steps": max(1, round(share * whole.steps))}))
        epochs, warmup = (whole.epochs or 1) * share, whole.warmup * share
        return TextPart(whole.model_copy(update={"epochs": epochs, "warmup": warmup}))

    def part(self, stages: int, stage: int, seed: int, *, growing: bool) -> Any:
        """Stages of rows only.

        Raises:
            InputError: always.
        """
        raise InputError("This method trains networks of rows, and texts were given.", "Choose dp2u.")

    def visits(self, part: Any, rows: int) -> int:
        """Records read, each as often as it is."""
        if not rows:
            return 0
        schedule: Fixed = part.schedule
        per_pass = -(-rows // schedule.batch)
        plan = BatchPlan({"text": rows}, {"text": schedule.batch}, seed=0, steps=schedule.total_steps(per_pass))
        return plan.visits()["text"]

    def learn(self, inputs: Tensor, targets: Tensor, part: Any, seed: int, start: Tensors) -> Tensors:
        """State after a part of the training; the seed is that of the initial weights and of the order of the records.

        Raises:
            Destroyed: the loss became NaN or infinite.
        """
        adapter = self.opens(seed)
        if start:
            _fill(adapter.model, start)
        recipe = self.recipe.model_copy(update={"schedule": part.schedule})
        engine = self.engine.model_copy(update={"seed": seed, "checkpoint_every": 0})
        with torch.random.fork_rng(devices=[]):
            outcome = train(adapter, recipe, {Stream.RETAIN: _examples(inputs, targets)}, engine)
        if outcome.reason == "diverged":
            raise Destroyed(outcome.sentence)
        return {name: value.detach().cpu().clone() for name, value in state_of(outcome.model).items()}

    def trimmed(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As long as the longest of these records."""
        longest = int((inputs != _NOTHING).sum(1).max())
        return inputs[:, :longest], targets[:, :longest]

    def records(self, ids: Sequence[str]) -> list[Record]:
        """Some records."""
        return [self.held[i] for i in self.at(ids).tolist()]

    def encoded(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        """Token ids and targets, padded; one that has become too long for the context is cut."""
        held = self.opens(0)
        cutting = LanguageAdapter(held.model, held.tokenizer, template=held.template, max_length=held.context, truncate=True)
        return _padded([cutting.encode(r).data for r in records])

    def made(self, seed: int) -> nn.Module:
        """An untrained model."""
        made: nn.Module = self.opens(seed).model
        return made

    def module(self, state: Tensors) -> nn.Module:
        """A model with the weights of ``state``, in evaluation mode.

        Raises:
            InputError: names or shapes are others.
        """
        model = self.made(0)
        _fill(model, state)
        return model.to(self.device).eval()

    def adapter(self, model: nn.Module) -> LanguageAdapter:
        """The adapter around a model that a method has left: what saves it, and what an audit asks."""
        held = self.opens(0)
        held.model = model
        return held

    def signature(self) -> str:
        """Weights of the untrained model, configuration, tokenizer and template."""
        return self.opens(0).fingerprint()


def _padded(tokens: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    longest = max(len(t.ids) for t in tokens)
    inputs = torch.full((len(tokens), longest), _NOTHING, dtype=torch.int64)
    targets = torch.full((len(tokens), longest), _UNLEARNT, dtype=torch.int64)
    for i, t in enumerate(tokens):
        ids = torch.from_numpy(t.ids.astype(np.int64))
        inputs[i, : len(ids)] = ids
        targets[i, t.start : len(ids)] = ids[t.start :]
    return inputs, targets


def _examples(inputs: Tensor, targets: Tensor) -> list[Example]:
    """Examples for the training loop, named by their place."""
    sizes = (inputs != _NOTHING).sum(1).tolist()
    starts = (targets != _UNLEARNT).int().argmax(1).tolist()
    found = []
    for i, (size, start) in enumerate(zip(sizes, starts, strict=True)):
        tokens = Tokens(inputs[i, :size].numpy().astype(np.int32), start, ends=False)
        found.append(Example(str(i), str(i), size - start, size, tokens))
    return found


def _fill(model: nn.Module, state: Tensors) -> None:
    held = state_of(model)
    if {n: v.shape for n, v in held.items()} != {n: v.shape for n, v in state.items()}:
        raise InputError("The weights are of another model.", "Give the one of the training.")
    with torch.no_grad():
        for name, value in held.items():
            value.copy_(state[name])
