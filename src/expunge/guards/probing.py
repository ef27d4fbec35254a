"""What probe texts leave behind inside a model: states at named modules, and their moments."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from expunge.adapters.head import bare, base
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.passes import evaluating
from expunge.adapters.storage import forward_parameters
from expunge.core.errors import InputError, unknown
from expunge.data.records import Record
from expunge.engine.feedforward import FeedForward
from expunge.guards.conversation import Conversation
from expunge.guards.parts import Material
from expunge.guards.prompts import put
from expunge.guards.target import Target

Form = Literal["requests", "texts"]
Side = Literal["input", "output"]
_BATCH = 16  #: probe texts in one pass
_EXAMPLES = "examples of "  #: before the id of a target whose own examples are probes
#: Records from which on they are probes of a skill. Of new questions one in ``n + 1`` is more unusual than all of ``n``, and more
#: lie outside a box that owes its place and its sides to those ``n``: with fewer than these a box says nothing of the skill.
LEAST = 20


@dataclass(frozen=True)
class Units:
    """The feed-forward units of a block.

    Attributes:
        gate: dotted name of the module whose first ``count`` outputs are their pre-activations.
        output: dotted name of the module that reads them (the down projection).
        count: how many there are.
    """

    gate: str
    output: str
    count: int


def units_of(adapter: LanguageAdapter, blocks: Sequence[str]) -> list[Units]:
    """Where the units of blocks are found.

    Raises:
        InputError: a block that the model does not have, or one without a dense feed-forward layer.
    """
    known, inner, out = adapter.layers(), base(adapter.model), []
    for block in blocks:
        if block not in known:
            raise unknown("layer", block, known)
        part = FeedForward.of(inner.get_submodule(block), block)
        out.append(Units(f"{block}.{part.gate_name}", f"{block}.{part.output_name}", part.units))
    return out


def probes_of(material: Material) -> dict[str, Sequence[str | Record]]:
    """Probe texts by skill: those that stand under its name, and the examples of a target that names no skill."""
    named = {skill: texts for skill, texts in material.probes.items() if skill}
    return {**{_own(t): _records(t) for t in material.targets if not t.skills and len(t.examples) >= LEAST}, **named}


def skills_of(target: Target, known: Collection[str]) -> tuple[str, ...]:
    """The skills that a target hides: those that it names, or the one that its examples are probes of; none if it hides others.

    Args:
        target: what is to be hidden.
        known: skills of which probes were read.

    Raises:
        InputError: it names one of which there were none.
    """
    if missing := next((s for s in target.skills if s not in known), None):
        named = ", ".join(k for k in known if not k.startswith(_EXAMPLES)) or "none"
        raise InputError(
            f"There are no probe texts of the skill {missing!r}.",
            f"Give them under probes when the guard is made; there are those of: {named}.",
        )
    return target.skills or ((_own(target),) if _own(target) in known else ())


def _own(target: Target) -> str:
    return f"{_EXAMPLES}{target.id}"


def _records(target: Target) -> list[Record]:
    return [Record(id=f"{target.id}-{n}", prompt=e.prompt, answer=e.answer or " ") for n, e in enumerate(target.examples)]


def probe_ids(
    adapter: LanguageAdapter, texts: Sequence[str | Record], form: Form, what: str, skill: str = ""
) -> list[NDArray[np.int64]]:
    """Token ids of probe texts, no longer than the context.

    Args:
        adapter: the model.
        texts: texts, or records: these are read as the model reads them, up to the answer or with it.
        form: as a user's question, put into the template, or as whole texts.
        what: who asks, for the error.
        skill: of which they are, for the error; empty: of what is to stay.

    Raises:
        InputError: there are fewer than two texts.
    """
    held = [t for t in texts if not isinstance(t, str) or t.strip()]
    if len(held) < 2:
        named = f"of the skill {skill!r}" if skill else "of what is to stay"
        raise InputError(f"{what} needs probe texts {named}, and there are {len(held)}.", "Give some hundred under probes.")
    return [_ids(adapter, t, form)[: adapter.context] for t in held]


def _ids(adapter: LanguageAdapter, text: str | Record, form: Form) -> NDArray[np.int64]:
    if isinstance(text, str):
        return put(adapter, Conversation.of(text) if form == "requests" else Conversation.text_to_continue(text)).ids
    if text.is_text:
        return put(adapter, Conversation.text_to_continue(text.answer)).ids
    example = adapter.encode(text)
    return np.asarray(example.data.ids[: example.data.start] if form == "requests" else example.data.ids, dtype=np.int64)


@torch.no_grad()
def probe_states(
    adapter: LanguageAdapter, ids: Sequence[NDArray[np.int64]], places: Sequence[tuple[str, Side]]
) -> Iterator[dict[str, Tensor]]:
    """States that texts leave at modules, one text after the other: float64 ``[T, D]`` by name of the module.

    Args:
        adapter: the model; in evaluation mode while it reads.
        ids: of each text.
        places: modules, and whether their input or output is meant.

    Raises:
        InputError: a module does not see states as ``[B, T, D]``.
    """
    inner, model = base(adapter.model), bare(adapter.model)
    held: dict[str, Tensor] = {}
    device = next(inner.parameters()).device
    accepted = forward_parameters(inner)
    with ExitStack() as stack, evaluating(adapter.model):
        for name, side in places:
            stack.callback(_watched(inner.get_submodule(name), name, side, held).remove)
        for at in range(0, len(ids), _BATCH):
            part = ids[at : at + _BATCH]
            padded = np.full((len(part), max(map(len, part))), adapter.pad_id(), dtype=np.int64)
            mask = np.zeros_like(padded)
            for line, real, text in zip(padded, mask, part, strict=True):
                line[: len(text)], real[: len(text)] = text, 1
            given: dict[str, Any] = {"input_ids": padded, "attention_mask": mask}
            more = {k: v for k, v in {"use_cache": False, "logits_to_keep": 1}.items() if k in accepted}
            model(**{k: torch.from_numpy(v).to(device) for k, v in given.items()}, **more)
            for name, states in held.items():
                if states.ndim != len(padded.shape) + 1 or states.shape[:2] != padded.shape:
                    raise InputError(
                        f"The module {name!r} sees states of the shape {list(states.shape)}, not one row a token.",
                        "Guards on hidden states cannot be used with this architecture.",
                    )
            for row, text in enumerate(part):
                yield {name: states[row, : len(text)].double() for name, states in held.items()}


def _watched(module: nn.Module, name: str, side: Side, held: dict[str, Tensor]) -> Any:
    if side == "input":

        def before(_: nn.Module, given: tuple[Any, ...]) -> None:
            held[name] = given[0].detach()

        return module.register_forward_pre_hook(before)

    def after(_: nn.Module, __: Any, out: Any) -> None:
        held[name] = (out[0] if isinstance(out, tuple) else out).detach()

    return module.register_forward_hook(after)


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of states by dimension, float64 ``[D]`` each, and of how many they are."""

    mean: Tensor
    std: Tensor
    count: int


def moments(
    adapter: LanguageAdapter, ids: Sequence[NDArray[np.int64]], places: Sequence[tuple[str, Side]]
) -> Mapping[str, Moments]:
    """Moments over all tokens of texts, by name of the module, in one pass (Chan et al.'s update; ``ddof = 1``)."""
    held: dict[str, tuple[int, Tensor, Tensor]] = {}
    for states in probe_states(adapter, ids, places):
        for name, rows in states.items():
            n, mean, squares = len(rows), rows.mean(0), ((rows - rows.mean(0)) ** 2).sum(0)
            before = held.get(name)
            if before is None:
                held[name] = (n, mean, squares)
                continue
            count, was, sum_ = before
            gap, total = mean - was, count + n
            held[name] = (total, was + gap * n / total, sum_ + squares + gap**2 * count * n / total)
    return {k: Moments(mean, (squares / max(count - 1, 1)).sqrt(), count) for k, (count, mean, squares) in held.items()}
