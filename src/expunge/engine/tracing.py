"""Causal tracing: where, and in which block's MLP, a model looks up what it answers (Meng et al. 2022, arXiv 2202.05262)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expunge.adapters.base import Adapter, Batch, Example
from expunge.adapters.head import base
from expunge.adapters.passes import evaluating
from expunge.core.errors import InputError
from expunge.engine.covariance import cells, flat_rows, linear_weights
from expunge.engine.feedforward import OUTPUT
from expunge.engine.gradients import Tell

Where = Literal["subject", "last"]


@dataclass(frozen=True)
class Subject:
    """What of an example is made unreadable.

    Attributes:
        example: its loss is that of the true answer.
        tokens: positions in its input, all before the first target.
    """

    example: Example
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """What came out, as means over the examples; probabilities are those of the true answer, per target: ``exp(-mean loss)``.

    Attributes:
        clean: probability as the model is.
        corrupted: with noise on the embeddings of the subjects.
        restored: with noise, and the output of one block's MLP as without: at the subjects' tokens, or at the last token before
            the answer; ``[L]`` each.
    """

    clean: float
    corrupted: float
    restored: dict[Where, Tensor]

    def effects(self, where: Where = "subject") -> Tensor:
        """Indirect effect of each block: the probability that restoring it brings back, ``[L]``."""
        return self.restored[where] - self.corrupted

    def window(self, width: int, where: Where = "subject") -> tuple[int, int]:
        """First and last of the ``width`` blocks in a row with the largest sum of effects."""
        effects = self.effects(where)
        width = min(width, len(effects))
        sums = effects.unfold(0, width, 1).sum(1)
        first = int(sums.argmax())
        return first, first + width - 1


def trace(
    adapter: Adapter,
    subjects: Sequence[Subject],
    *,
    noise: float = 3.0,
    repeats: int = 1,
    seed: int = 0,
    max_units: int = 4096,
    module: str = OUTPUT,
    tell: Tell | None = None,
) -> Trace:
    """Run each example as it is, with noise on its subject, and with noise and one block's MLP restored, for every block.

    ``2 + repeats (1 + 2 L)`` forward passes for each batch, none with a graph; the model is left as it is.

    Args:
        adapter: a language model.
        subjects: examples and the tokens to corrupt; all must have some.
        noise: its deviation, in standard deviations of the subjects' embeddings.
        repeats: draws of the noise.
        seed: of the noise; it does not depend on how examples are batched.
        max_units: tokens per forward pass.
        module: regular expression for the weight that ends the MLP of a block.
        tell: called after every batch.

    Raises:
        InputError: no subjects, a block without such a module, or embeddings that cannot be reached.
    """
    if not subjects or any(not s.tokens for s in subjects):
        raise InputError(
            "Causal tracing needs tokens to corrupt in every example.", "Name the subjects as the records have them."
        )
    model = adapter.model
    sites = _sites(adapter, module)
    embeddings = _embeddings(model)
    ids = torch.cat([torch.as_tensor(s.example.data.ids)[list(s.tokens)].long() for s in subjects])
    size = noise * float(embeddings.weight.detach()[ids.to(embeddings.weight.device)].std())
    run = _Run(adapter, embeddings, sites, size, seed)
    totals = {"clean": 0.0, "corrupted": 0.0}
    restored: dict[Where, Tensor] = {"subject": torch.zeros(len(sites)), "last": torch.zeros(len(sites))}
    parts = list(_parts(subjects, max_units))
    with evaluating(model), torch.no_grad():
        for done, part in enumerate(parts, start=1):
            batch = adapter.collate([s.example for _, s in part]).to(next(model.parameters()).device)
            clean, states = run.clean(batch)
            totals["clean"] += clean
            for repeat in range(repeats):
                hidden = run.hidden(batch, part, repeat)
                totals["corrupted"] += run.probability(batch, hidden) / repeats
                for where, rows in run.rows(batch, part).items():
                    for at, site in enumerate(sites):
                        restored[where][at] += run.probability(batch, hidden, (site, rows, states[site][rows])) / repeats
            if tell is not None:
                tell(done, len(parts))
    count = len(subjects)
    return Trace(totals["clean"] / count, totals["corrupted"] / count, {w: v / count for w, v in restored.items()})


Numbered = list[tuple[int, Subject]]


@dataclass(frozen=True)
class _Run:
    adapter: Adapter
    embeddings: nn.Embedding
    sites: list[str]
    size: float
    seed: int

    def clean(self, batch: Batch) -> tuple[float, dict[str, Tensor]]:
        """Sum of the probabilities, and the output of each site at all tokens, ``[M, D]``."""
        seen: dict[str, Tensor] = {}
        modules = dict(self.adapter.model.named_modules())

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                seen[name] = output

            return hook

        handles = [modules[name].register_forward_hook(keep(name)) for name in self.sites]
        try:
            found = self.probability(batch, None)
        finally:
            for handle in handles:
                handle.remove()
        return found, {name: flat_rows(batch, states) for name, states in seen.items()}

    def hidden(self, batch: Batch, part: Numbered, repeat: int) -> tuple[Tensor, Tensor]:
        """Rows of the subjects' tokens, and the noise on them."""
        width = self.embeddings.weight.shape[1]
        drawn = []
        for number, subject in part:
            own = torch.Generator().manual_seed(1_000_003 * self.seed + 1009 * number + repeat)
            drawn.append(torch.randn(len(subject.tokens), width, generator=own) * self.size)
        return self.rows(batch, part)["subject"], torch.cat(drawn).to(self.embeddings.weight)

    def rows(self, batch: Batch, part: Numbered) -> dict[Where, Tensor]:
        """Places among the real tokens of the batch."""
        device = batch.owner.device
        starts = torch.tensor([0, *batch.token_counts[:-1]]).cumsum(0).tolist()
        chosen = [start + t for start, (_, s) in zip(starts, part, strict=True) for t in s.tokens]
        last = [start + s.example.size - s.example.n_targets - 1 for start, (_, s) in zip(starts, part, strict=True)]
        return {"subject": torch.tensor(chosen, device=device), "last": torch.tensor(last, device=device)}

    def probability(
        self, batch: Batch, hidden: tuple[Tensor, Tensor] | None, kept: tuple[str, Tensor, Tensor] | None = None
    ) -> float:
        """Sum over examples of the probability of the true answer."""
        model = self.adapter.model
        with changed(self.embeddings, batch, hidden, add=True):
            module = dict(model.named_modules())[kept[0]] if kept is not None else model
            with changed(module, batch, kept[1:] if kept is not None else None, add=False):
                out = self.adapter.forward(model, batch, frozenset({"losses", f"features:{self.adapter.layers()[-1]}"}))
        means = out.per_example(out.losses) / out.lengths().to(out.losses)
        return float((-means).exp().sum())


@contextmanager
def changed(module: nn.Module, batch: Batch, at: tuple[Tensor, Tensor] | None, *, add: bool) -> Iterator[None]:
    """While open, some rows of a module's output are others, or have something added; differentiable.

    Args:
        module: whose forward pass runs over all tokens of the batch.
        batch: which.
        at: rows among its real tokens, and their values ``[rows, D]``; none: nothing is changed.
        add: whether the values are added.
    """
    if at is None:
        yield
        return
    rows, values = at

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        states = output if isinstance(output, Tensor) else output[0]
        flat = states.reshape(-1, states.shape[-1]).clone()
        where = cells(batch, states)
        places = rows if where is None else where[rows]
        flat[places] = flat[places] + values.to(flat) if add else values.to(flat)
        made = flat.view(states.shape)
        return made if isinstance(output, Tensor) else (made, *output[1:])

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _sites(adapter: Adapter, pattern: str) -> list[str]:
    known = linear_weights(adapter.model)
    found = []
    for block in adapter.layers():
        hits = [w.module for n, w in known.items() if n.startswith(block + ".") and re.search(pattern, n)]
        if len(hits) != 1:
            raise InputError(
                f"{len(hits)} linear weights of {block!r} match {pattern!r}; it must be the one that ends its MLP.",
                "Give another module pattern.",
            )
        found.append(hits[0])
    return found


def _embeddings(model: nn.Module) -> nn.Embedding:
    get = getattr(base(model), "get_input_embeddings", None)
    found = get() if callable(get) else None
    if not isinstance(found, nn.Embedding):
        raise InputError("Causal tracing needs a model with an embedding of tokens.", "Give the layer instead: layer=NUMBER.")
    return found


def _parts(subjects: Sequence[Subject], max_units: int) -> Iterator[Numbered]:
    """Numbered examples of like length, in batches that fit."""
    order = sorted(enumerate(subjects), key=lambda item: item[1].example.units)
    at = 0
    while at < len(order):
        stop = at + 1
        while stop < len(order) and order[stop][1].example.units * (stop + 1 - at) <= max_units:
            stop += 1
        yield order[at:stop]
        at = stop
