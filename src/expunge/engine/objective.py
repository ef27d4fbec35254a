"""The loss of one optimiser step: which examples go through which model together, and what the terms make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from expunge.adapters.base import Adapter, Example, Outputs
from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.engine.parts import Recipe, Term, Views
from expunge.engine.preparation import Examples, ReferenceSource

Indices = Mapping[Stream, Sequence[int]]

_ORDER = (Stream.FORGET, Stream.ALTERNATIVE, Stream.RETAIN)


@dataclass(frozen=True)
class Micro:
    """Examples that share one forward pass, by stream; ``weight`` 0 marks a filler that only keeps processes in step."""

    examples: Mapping[Stream, tuple[Example, ...]]
    weight: float = 1.0

    def padded_tokens(self) -> int:
        """Input tokens after padding."""
        everything = [e.units for s in self.examples.values() for e in s]
        return max(everything) * len(everything)


@dataclass
class Sums:
    """Sums of term values over an optimiser step, for the log and the balance: by index of the term."""

    values: dict[int, float] = field(default_factory=dict)

    def add(self, index: int, value: float) -> None:
        """Add to one term's sum."""
        self.values[index] = self.values.get(index, 0.0) + value


class Objective:
    """Evaluates a recipe's terms on micro-batches.

    Args:
        adapter: the modality.
        recipe: whose terms.
        examples: by stream; ``alternative`` is aligned with ``forget``: as many for each forget example, one after the other.
        references: the frozen models that terms read, by which they are.
        made: what a preparation made for the terms, by name.

    Raises:
        InputError: a term reads a stream or a value that is not there.
    """

    def __init__(
        self,
        adapter: Adapter,
        recipe: Recipe,
        examples: Examples,
        references: Mapping[Of, ReferenceSource] | None = None,
        made: Mapping[str, Any] | None = None,
    ) -> None:
        self.adapter, self.recipe, self.examples, self.references = adapter, recipe, examples, dict(references or {})
        self.made = dict(made or {})
        self.needs = recipe.needs(adapter.layers())
        self._current_want = frozenset(value for _, of, value in self.needs if of is Of.CURRENT)
        self._frozen_want: dict[tuple[Stream, Of], frozenset[str]] = {
            (stream, of): frozenset(v for s, o, v in self.needs if o is of and s is stream)
            for stream in Stream
            for of in Of
            if of is not Of.CURRENT
        }
        for stream in {s for s, _, _ in self.needs} | {t.stream for t in recipe.terms()}:
            if not examples.get(stream):
                raise InputError(f"The method {recipe.name!r} reads {stream} examples, but there are none.", _REMEDY[stream])
        for of in sorted({of for _, of, _ in self.needs} - {Of.CURRENT}):
            if of not in self.references:
                raise InputError(
                    f"The method {recipe.name!r} compares with a frozen model ({of}), but none was given.",
                    _MODEL_REMEDY.get(of, ""),
                )
        self.each = self._answers()

    def _answers(self) -> int:
        """How many alternatives there are for each forget example."""
        given, forget = len(self.examples.get(Stream.ALTERNATIVE, ())), len(self.examples.get(Stream.FORGET, ()))
        if not given:
            return 1
        if not forget or given % forget:
            raise InputError(
                f"There are {given} alternative answers for {forget} forget examples.", "Give the same number for each of them."
            )
        paired = [
            t.name
            for t in self.recipe.terms()
            if t.stream is not Stream.ALTERNATIVE and _reads_alternatives(t, self.adapter.layers())
        ]
        if given > forget and paired:
            raise InputError(
                f"The term {paired[0]!r} compares each forget example with one other answer, but there are {given // forget}.",
                "Give one for each.",
            )
        return given // forget

    def counts(self, indices: Indices) -> list[int]:
        """By how much each term's sum is divided in the step whose (global) ``indices`` are given; at least 1."""
        chosen = {s: [self.examples[s][i] for i in ix] for s, ix in self._with_alternatives(indices).items()}
        return [max(1, t.count(chosen.get(t.stream, []))) for t in self.recipe.terms()]

    def micro_batches(self, indices: Indices, max_tokens: int) -> list[Micro]:
        """Split one process's share of a step into forward passes of at most ``max_tokens`` padded input tokens.

        An alternative stays with its forget example. Examples of like length go together, so little is padded; the split
        never changes the result because terms are normalised over the whole step.
        """
        full = self._with_alternatives(indices)
        items: list[dict[Stream, Sequence[Example]]] = [
            {Stream.RETAIN: [self.examples[Stream.RETAIN][i]]} for i in full.get(Stream.RETAIN, ())
        ]
        for i in full.get(Stream.FORGET, ()):
            item: dict[Stream, Sequence[Example]] = {Stream.FORGET: [self.examples[Stream.FORGET][i]]}
            if Stream.ALTERNATIVE in full:
                item[Stream.ALTERNATIVE] = [self.examples[Stream.ALTERNATIVE][k] for k in self._of(i)]
            items.append(item)
        items.sort(key=_width)
        groups: list[list[dict[Stream, Sequence[Example]]]] = []
        widest = held = 0
        for item in items:
            width, size = max(widest, _width(item)), sum(map(len, item.values()))
            if groups and width * (held + size) <= max_tokens:
                groups[-1].append(item)
                widest, held = width, held + size
            else:
                groups.append([item])
                widest, held = _width(item), size
        if len(groups) > 1 and any(t.whole for t in self.recipe.terms()):
            units = max(map(_width, items)) * sum(len(e) for i in items for e in i.values())
            raise InputError(
                f"The method {self.recipe.name!r} needs all examples of a step in one forward pass, which takes {units} units.",
                f"Set engine.max_tokens={units}, or choose a smaller schedule.batch.",
            )
        return [Micro({s: tuple(e for i in g for e in i.get(s, ())) for s in _ORDER if any(s in i for i in g)}) for g in groups]

    def filler(self) -> Micro:
        """The smallest micro-batch there is, with weight 0: for a process that has run out of work before the others."""
        streams = {t.stream for t in self.recipe.terms()} | {s for s, _, _ in self.needs}
        if Stream.ALTERNATIVE in streams:
            streams.add(Stream.FORGET)
        shortest = {s: min(range(len(self.examples[s])), key=lambda i, s=s: self.examples[s][i].units) for s in streams}  # type: ignore[misc]
        chosen: dict[Stream, Sequence[int]] = {s: [i] for s, i in shortest.items()}
        if Stream.ALTERNATIVE in shortest:
            chosen[Stream.ALTERNATIVE] = self._of(shortest[Stream.FORGET])
        return Micro({s: tuple(self.examples[s][i] for i in chosen[s]) for s in _ORDER if s in streams}, weight=0.0)

    def views(self, model: nn.Module, micro: Micro, device: torch.device) -> Views:
        """Run a micro-batch: one forward pass under the current model for all streams, at most one under each frozen model."""
        streams = [s for s in _ORDER if s in micro.examples]
        batch = self.adapter.collate([e for s in streams for e in micro.examples[s]]).to(device)
        outputs: dict[tuple[Stream, Of], Outputs] = {}
        if self._current_want:
            current = self.adapter.forward(model, batch, self._current_want)
            outputs |= _split(current, streams, micro, Of.CURRENT)
        for of, source in self.references.items():
            asked = [s for s in streams if self._frozen_want[s, of]]
            if not asked:
                continue
            want = frozenset().union(*(self._frozen_want[s, of] for s in asked))
            part = batch if asked == streams else self.adapter.collate([e for s in asked for e in micro.examples[s]]).to(device)
            outputs |= _split(source.outputs(model, part, want), asked, micro, of)
        return Views(outputs, self.adapter.layers(), self.made)

    def losses(
        self,
        views: Views,
        micro: Micro,
        counts: Sequence[int],
        coefficients: tuple[float, float],
        sums: Sums,
        *,
        only: frozenset[int] | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The forget and the retain part of the step's loss that this micro-batch contributes; notes the term sums.

        With ``only``, of the terms with these indices.
        """
        sides: list[Tensor | None] = [None, None]
        for index, term in enumerate(self.recipe.terms()):
            if term.stream not in micro.examples or (only is not None and index not in only):
                continue
            side = 0 if index < len(self.recipe.forget) else 1
            total = self._sum(term, views)
            if micro.weight:
                sums.add(index, float(total.detach()) / counts[index])
            part = total * (term.weight * coefficients[side] * micro.weight / counts[index])
            held = sides[side]
            sides[side] = part if held is None else held + part
        return sides[0], sides[1]

    def _sum(self, term: Term, views: Views) -> Tensor:
        return term.values(views).float().sum()

    def _with_alternatives(self, indices: Indices) -> dict[Stream, Sequence[int]]:
        full = dict(indices)
        reads = {s for s, _, _ in self.needs} | {t.stream for t in self.recipe.terms()}
        if Stream.ALTERNATIVE in reads and Stream.FORGET in full:
            full[Stream.ALTERNATIVE] = [k for i in full[Stream.FORGET] for k in self._of(i)]
        return full

    def _of(self, index: int) -> range:
        """Where the alternatives of a forget example stand."""
        return range(index * self.each, (index + 1) * self.each)


def _reads_alternatives(term: Term, layers: Sequence[str]) -> bool:
    return any(stream is Stream.ALTERNATIVE for stream, _, _ in term.needs(layers))


def _width(item: Mapping[Stream, Sequence[Example]]) -> int:
    """Units of the longest example."""
    return max(e.units for held in item.values() for e in held)


_REMEDY = {
    Stream.FORGET: "Give a forget set.",
    Stream.RETAIN: "Give --retain DATA, or drop the retain term: retain=none.",
    Stream.ALTERNATIVE: "Give answers to put in their place: --alternatives refusals, or a column 'alternatives' in the data.",
}
_MODEL_REMEDY = {
    Of.ORACLE: "Give a model trained without the forget set, or preparation=given-outputs with a file of what one says.",
}


def _split(outputs: Outputs, streams: Sequence[Stream], micro: Micro, of: Of) -> dict[tuple[Stream, Of], Outputs]:
    parts: dict[tuple[Stream, Of], Outputs] = {}
    start = 0
    for stream in streams:
        stop = start + len(micro.examples[stream])
        parts[stream, of] = outputs.narrow(start, stop)
        start = stop
    return parts


def mean_losses(
    adapter: Adapter, model: nn.Module, examples: Sequence[Example], max_tokens: int, device: torch.device | None = None
) -> list[float]:
    """Mean loss per target of each example, in order, without gradients (an example without targets gets 0)."""
    order = sorted(range(len(examples)), key=lambda i: examples[i].units)
    out = [0.0] * len(examples)
    where = device or next(model.parameters()).device
    at = 0
    guard: AbstractContextManager[object] = torch.no_grad() if torch.is_grad_enabled() else nullcontext()
    with guard:
        while at < len(order):
            stop = at + 1
            while stop < len(order) and examples[order[stop]].units * (stop + 1 - at) <= max_tokens:
                stop += 1
            chosen = order[at:stop]
            batch = adapter.collate([examples[i] for i in chosen]).to(where)
            result = adapter.forward(model, batch, frozenset({"losses"}))
            means = result.per_example(result.losses) / result.lengths()
            for i, value in zip(chosen, means.tolist(), strict=True):
                out[i] = value
            at = stop
    return out
