"""The loss of one optimiser step: which examples go through which model together, and what the terms make of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from expunge.adapters.base import Adapter, Example, Outputs, Targets
from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.engine.parts import Recipe, Views
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
class _Item:
    """Examples that must not be torn apart: a retain example, or a forget example with its alternatives."""

    examples: dict[Stream, list[Example]]

    @property
    def widest(self) -> int:
        """Units of the longest."""
        return max(e.units for held in self.examples.values() for e in held)

    @property
    def size(self) -> int:
        """How many there are."""
        return sum(map(len, self.examples.values()))


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
        examples: by stream; ``alternative`` is aligned with ``forget`` (same index, same record), or has several for each, one
            after the other.
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
        check_marks(recipe, examples)
        self.each = self._alternatives_of_each()

    def _alternatives_of_each(self) -> int:
        """How many alternatives every forget example has."""
        alternative, forget = (len(self.examples.get(s, ())) for s in (Stream.ALTERNATIVE, Stream.FORGET))
        if not alternative:
            return 1
        if not forget or alternative % forget:
            raise InputError("There must be one alternative answer per forget example, or equally many of each.")
        each = alternative // forget
        paired = [t.name for t in self.recipe.terms() if t.paired]
        if each > 1 and paired:
            raise InputError(
                f"The term {paired[0]!r} compares each forget example with one alternative, but there are {each} of each.",
                "Give one.",
            )
        return each

    def counts(self, indices: Indices) -> list[int]:
        """By how much each term's sum is divided in the step whose (global) ``indices`` are given; at least 1."""
        chosen = {s: [self.examples[s][i] for i in ix] for s, ix in self._with_alternatives(indices).items()}
        return [t.divisor(chosen.get(t.stream, [])) for t in self.recipe.terms()]

    def micro_batches(self, indices: Indices, max_tokens: int) -> list[Micro]:
        """Split one process's share of a step into forward passes of at most ``max_tokens`` padded input tokens.

        An alternative stays with its forget example. Examples of like length go together, so little is padded; the split
        never changes the result because terms are normalised over the whole step.
        """
        full = self._with_alternatives(indices)
        items = [_Item({Stream.RETAIN: [self.examples[Stream.RETAIN][i]]}) for i in full.get(Stream.RETAIN, ())]
        for i in full.get(Stream.FORGET, ()):
            item = _Item({Stream.FORGET: [self.examples[Stream.FORGET][i]]})
            if Stream.ALTERNATIVE in full:
                item.examples[Stream.ALTERNATIVE] = [self.examples[Stream.ALTERNATIVE][j] for j in self._of(i)]
            items.append(item)
        items.sort(key=lambda item: item.widest)
        groups: list[list[_Item]] = []
        widest = held = 0
        for item in items:
            width = max(widest, item.widest)
            if groups and width * (held + item.size) <= max_tokens:
                groups[-1].append(item)
                widest, held = width, held + item.size
            else:
                groups.append([item])
                widest, held = item.widest, item.size
        if len(groups) > 1 and any(t.joint() for t in self.recipe.terms()):
            units = max(i.widest for i in items) * sum(i.size for i in items)
            raise InputError(
                f"The method {self.recipe.name!r} needs all examples of a step in one forward pass, which takes {units} units.",
                f"Set engine.max_tokens={units}, or choose a smaller schedule.batch.",
            )
        return [
            Micro({s: tuple(e for i in g for e in i.examples.get(s, ())) for s in _ORDER if any(s in i.examples for i in g)})
            for g in groups
        ]

    def filler(self) -> Micro:
        """The smallest micro-batch there is, with weight 0: for a process that has run out of work before the others."""
        streams = {t.stream for t in self.recipe.terms()} | {s for s, _, _ in self.needs}
        if Stream.ALTERNATIVE in streams:
            streams.add(Stream.FORGET)
        shortest = {s: min(range(len(self.examples[s])), key=lambda i, s=s: self.examples[s][i].units) for s in streams}  # type: ignore[misc]
        held: dict[Stream, tuple[Example, ...]] = {s: (self.examples[s][i],) for s, i in shortest.items()}
        if Stream.ALTERNATIVE in streams:
            held[Stream.ALTERNATIVE] = tuple(self.examples[Stream.ALTERNATIVE][j] for j in self._of(shortest[Stream.FORGET]))
        return Micro({s: held[s] for s in _ORDER if s in streams}, weight=0.0)

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
            total = term.total(views)
            if micro.weight:
                sums.add(index, float(total.detach()) / counts[index])
            part = total * (term.weight * coefficients[side] * micro.weight / counts[index])
            held = sides[side]
            sides[side] = part if held is None else held + part
        return sides[0], sides[1]

    def _with_alternatives(self, indices: Indices) -> dict[Stream, Sequence[int]]:
        full = dict(indices)
        reads = {s for s, _, _ in self.needs} | {t.stream for t in self.recipe.terms()}
        if Stream.ALTERNATIVE in reads and Stream.FORGET in full:
            full[Stream.ALTERNATIVE] = [j for i in full[Stream.FORGET] for j in self._of(i)]
        return full

    def _of(self, forget: int) -> range:
        """Places of the alternatives of a forget example."""
        return range(forget * self.each, (forget + 1) * self.each)


def check_marks(recipe: Recipe, examples: Examples, made: Collection[str] = ()) -> None:
    """Refuse terms on some of the targets where there are no spans: one would do nothing, the other what it must not.

    Args:
        recipe: whose terms.
        examples: by stream.
        made: streams that a preparation is still going to make.

    Raises:
        InputError: no example has a marked target, or a stream has none of the targets that a term reads.
    """
    part = recipe.preparation
    answered = part.makes if part is not None and part.marks else frozenset()
    choosy = [t for t in recipe.terms() if t.targets != "all" and t.stream not in answered]
    for term in choosy:
        favoured = any(e.n_favoured for e in examples.get(term.stream, ()))
        if term.targets == "favoured" and term.stream not in made and not favoured:
            raise InputError(
                f"The term {term.name!r} reads favoured {term.stream} targets, which no preparation marks.",
                "Add one that does: preparation=discovery.",
            )
    wanted = {t.stream for t in choosy if t.targets == "marked" and t.stream not in made}
    marked = {s for s, held in examples.items() if any(e.n_marked for e in held)}
    if choosy and (not marked or wanted - marked):
        where = f"{min(wanted - marked)} example" if wanted - marked else "example"
        raise InputError(f"The method {recipe.name!r} tells marked spans from the rest, but no {where} has any.", _SPANS)
    for term in choosy:
        held = examples.get(term.stream, ())
        if term.targets == "unmarked" and term.stream not in made and not any(e.n_targets > e.n_marked for e in held):
            raise InputError(
                f"The term {term.name!r} reads {term.stream} targets outside of marked spans, but all are marked.",
                "Mark less of them.",
            )


_REMEDY = {
    Stream.FORGET: "Give a forget set.",
    Stream.RETAIN: "Give --retain DATA, or drop the retain term: retain=none.",
    Stream.ALTERNATIVE: "Give answers to put in their place: --alternatives refusals, or a column 'alternatives' in the data.",
}
_SPANS = (
    "Give spans: a column 'spans' with [[start, end]] in characters of the answer, spans.terms=[...], spans.patterns=[...] or "
    "spans.secrets=true."
)
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
    adapter: Adapter,
    model: nn.Module,
    examples: Sequence[Example],
    max_tokens: int,
    device: torch.device | None = None,
    *,
    targets: Targets = "all",
) -> list[float]:
    """Mean loss of each example over the chosen targets, in order, without gradients (an example without any gets 0)."""
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
            result = adapter.forward(model, batch, frozenset({"losses"})).only(targets)
            means = result.per_example(result.losses) / result.lengths()
            for i, value in zip(chosen, means.tolist(), strict=True):
                out[i] = value
            at = stop
    return out
