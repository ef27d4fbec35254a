"""What is scored for a set of records: the answer, its paraphrase, its perturbed (wrong) answers; each once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

from expunge.adapters.base import Adapter, Example
from expunge.data.records import Item, Record

Kind = Literal["answer", "paraphrase", "perturbed"]


@dataclass(frozen=True)
class Probe:
    """One answer to score: the record's own (None) or another text; ``suffix`` marks its example id."""

    record: int
    answer: str | None = None
    suffix: str = ""


@dataclass(frozen=True)
class Probes(Sequence[Example]):
    """Examples of one kind for a list of records, encoded when they are read and not kept.

    Attributes:
        adapter: encodes.
        records: the records.
        items: what is scored, grouped by record, in order.
    """

    adapter: Adapter
    records: Sequence[Item]
    items: tuple[Probe, ...]

    @property
    def record(self) -> npt.NDArray[np.int64]:
        """Index of the record of each example, ascending."""
        return np.array([p.record for p in self.items], dtype=np.int64)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        item = self.items[index]
        return self.adapter.encode(self.records[item.record], answer=item.answer, suffix=item.suffix)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


def items(records: Sequence[Item], kind: Kind) -> tuple[Probe, ...]:
    """The answers of one kind: one per record (answer); of texts at most one (paraphrase), any number (perturbed)."""
    if kind == "answer":
        return tuple(Probe(i) for i in range(len(records)))
    texts = [(i, r) for i, r in enumerate(records) if isinstance(r, Record)]
    if kind == "paraphrase":
        return tuple(Probe(i, _unlike(r, r.paraphrase), "#para") for i, r in texts if r.paraphrase)
    return tuple(Probe(i, _unlike(r, wrong), f"#wrong{k}") for i, r in texts for k, wrong in enumerate(r.perturbed))


def _unlike(record: Record, text: str) -> str | None:
    """The text, or None where it is the record's own answer."""
    return None if text == record.answer else text


def probes(adapter: Adapter, records: Sequence[Item], kind: Kind) -> Probes:
    """The examples of one kind for ``records``, lazily encoded."""
    return Probes(adapter, records, items(records, kind))


def take_clusters(clusters: Sequence[str], budget: int, seed: int) -> npt.NDArray[np.int64]:
    """Indices of at most ``budget`` items made of whole clusters, drawn with ``seed`` (at least one cluster, in order).

    Questions about one person depend on each other, so a budget drops persons, not questions. A single cluster that is
    larger than the budget is cut to it.
    """
    if len(clusters) <= budget:
        return np.arange(len(clusters))
    members: dict[str, list[int]] = {}
    for i, c in enumerate(clusters):
        members.setdefault(c, []).append(i)
    names = sorted(members)
    chosen: list[int] = []
    for at in np.random.default_rng(seed).permutation(len(names)):
        group = members[names[int(at)]]
        if len(chosen) + len(group) > budget:
            if chosen:
                continue
            group = group[:budget]
        chosen += group
    return np.array(sorted(chosen), dtype=np.int64)
