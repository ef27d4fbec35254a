"""Passages put into a corpus a known number of times, after Hubble (2025, arXiv 2510.19811).

Without a folder the suite is generated: each passage says four things about one invented person, who is in no other text, and the
corpus is such passages about other people, once each. A folder holds ``passages.jsonl`` (``{"text": ..., "count": 16}``; count
0: held out) and ``corpus.jsonl`` (``{"text": ...}``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from expunge.core.errors import InputError
from expunge.data.named import DATASETS, NamedSet
from expunge.data.people import people
from expunge.data.people_words import Draw
from expunge.data.records import Record, RecordSet
from expunge.data.schema import Column, checked, published_rows

COUNTS = "0,1,4,16"
_FACTS = 4  #: sentences of a generated passage
_HOMES = ("hubble",)


@DATASETS.register("hubble")
class Hubble(NamedSet):
    """Passages inserted into a corpus 0, 1, 4, 16, ... times (after Hubble, arXiv 2510.19811)."""

    name: ClassVar[str] = "hubble"
    folder: str = Field("", description="folder with passages.jsonl and corpus.jsonl; none: generated")
    counts: str = Field(COUNTS, description="how often passages are inserted, with commas; 0 and at least one more")
    each: int = Field(8, ge=2, le=500, description="generated passages of each count")
    corpus: int = Field(60, ge=1, le=4000, description="generated texts of the corpus without insertions")
    words: int = Field(0, ge=0, description="words of a passage that are its prefix; 0: its first sentence")
    seed: int = Field(1, ge=0, description="of the generated people and of the draw of counts")

    def configurations(self) -> dict[str, str]:
        """The corpus, the copies, and the passages of each count."""
        out = {
            "corpus": "texts of the corpus, without insertions",
            "inserted": "every passage as often as it is inserted",
            "forget": "the first half of the passages of each count but 0, once each",
            "keep": "the other half, once each",
            "holdout": "passages that are never inserted",
        }
        for n in self.levels():
            if n:
                out[f"forget-{n}"] = f"to forget, inserted {n} times: prefix and suffix"
                out[f"keep-{n}"] = f"to keep, inserted {n} times: prefix and suffix"
        return {**out, "never": "never inserted: prefix and suffix"}

    def levels(self) -> list[int]:
        """The counts, ascending.

        Raises:
            InputError: they are no whole numbers, or 0 or anything else is missing.
        """
        parts = [p.strip() for p in self.counts.split(",")]
        found = sorted({int(p) for p in parts if p.isdecimal()})
        if not all(p.isdecimal() for p in parts) or len(found) < 2 or found[0] != 0:
            raise InputError(f"The counts {self.counts!r} are not 0 and other whole numbers.", f"Write them as counts={COUNTS}.")
        return found

    def load(self, configuration: str) -> RecordSet:
        """The records of one part.

        Raises:
            InputError: a file is not there or does not fit the schema, or there are fewer than two passages of a count.
        """
        if configuration == "corpus":
            texts = self._corpus()
            records = [Record(id=f"hubble-corpus-{i:04d}", answer=t) for i, t in enumerate(texts)]
        else:
            records = self._part(configuration, self._passages())
        return RecordSet(f"hubble:{configuration}", tuple(records), f"hubble:{configuration}")

    def _part(self, configuration: str, held: Mapping[int, Sequence[Record]]) -> list[Record]:
        inserted = [n for n in self.levels() if n]
        half = {n: (len(held[n]) + 1) // 2 for n in inserted}
        if configuration == "inserted":
            return [
                Record(id=f"{r.id}-c{i:03d}", answer=r.answer, subject=r.id) for n in inserted for r in held[n] for i in range(n)
            ]
        if configuration == "holdout":
            return list(held[0])
        if configuration == "never":
            return [self._cut(r) for r in held[0]]
        side, _, level = configuration.partition("-")
        chosen = [int(level)] if level else inserted
        records = [r for n in chosen for r in (held[n][: half[n]] if side == "forget" else held[n][half[n] :])]
        return [self._cut(r) for r in records] if level else records

    def _corpus(self) -> list[str]:
        if self.folder:
            label, rows = published_rows(self.folder, _HOMES, ("corpus",), None, "hubble:corpus")
            return [row["text"] for _, row in checked(rows, (Column("text"),), label)]
        first = self.each * len(self.levels())
        return [_said(i, self.seed) for i in range(first, first + self.corpus)]

    def _passages(self) -> dict[int, list[Record]]:
        """The passages of each count; generated ones get their counts at random."""
        levels = self.levels()
        if self.folder:
            label, rows = published_rows(self.folder, _HOMES, ("passages",), None, "hubble:passages")
            found = [(row["text"], row["count"]) for _, row in checked(rows, (Column("text"), Column("count", "number")), label)]
        else:
            drawn = Draw("hubble counts", self.seed).shuffled([n for n in levels for _ in range(self.each)])
            found = [(_said(i, self.seed), n) for i, n in enumerate(drawn)]
        held: dict[int, list[Record]] = {n: [] for n in levels}
        for i, (text, count) in enumerate(found):
            if count in held:
                held[count].append(Record(id=f"hubble-{i:04d}", answer=text))
        few = [n for n in levels if len(held[n]) < 2]
        if few:
            raise InputError(
                f"There are fewer than two passages that are inserted {few[0]} times.", "Give counts=... that are there."
            )
        return held

    def _cut(self, record: Record) -> Record:
        """A passage as prefix and suffix."""
        text = record.answer
        if self.words:
            parts = text.split(" ")
            at = len(" ".join(parts[: self.words]))
        else:
            at = text.find(". ") + 1
        if not 0 < at < len(text):
            raise InputError(
                f"The passage {record.id} has nothing after its prefix.", "Lower words=..., or give longer passages."
            )
        return Record(id=record.id, prompt=text[:at], answer=text[at:], verbatim=True, subject=record.id)


def _said(number: int, seed: int) -> str:
    """Four sentences about one person."""
    return " ".join(r.answer for r in people(1, seed, _FACTS, first=number))


def rows(dataset: Hubble) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The generated suite as the rows of its two files."""
    held = dataset._passages()
    passages = sorted(((r.id, r.answer, n) for n, found in held.items() for r in found))
    return [{"text": t, "count": n} for _, t, n in passages], [{"text": t} for t in dataset._corpus()]
