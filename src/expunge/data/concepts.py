"""Concepts: things that a model knows, and the place in its weights that is said to hold one."""

from __future__ import annotations

from dataclasses import dataclass

from expunge.data.records import Record


@dataclass(frozen=True, slots=True)
class Concept(Record):
    """A concept with its value vector; the answer is its name.

    Attributes:
        layer: number of the block, from 0.
        unit: number of the unit of its feed-forward layer, whose column of the output matrix is the value vector.
        article: a text about the concept, for the words that belong to it; may be empty.
    """

    layer: int = 0
    unit: int = 0
    article: str = ""

    def content(self) -> dict[str, object]:
        """What the record says, and the place."""
        return {**Record.content(self), "layer": self.layer, "unit": self.unit, "article": self.article}
