"""Rows of the tables of results: values of several seeds, and Markdown cells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from expunge.core.statistics import Interval, seed_interval
from expunge.report.text import DASH, MINUS


@dataclass(frozen=True, eq=False)
class Line:
    """One row of the tables: a method, the target or the retrained models.

    Attributes:
        label: its name.
        values: by key, one value for each seed.
        pooled: by key, one value for all seeds.
    """

    label: str
    values: Mapping[str, Sequence[float]]
    pooled: Mapping[str, float]

    def interval(self, key: str) -> Interval | None:
        """The mean over seeds with its interval; None where a seed has no value."""
        held = self.values.get(key)
        return seed_interval(held) if held else None

    def mean(self, key: str) -> float:
        """The mean over seeds, or the value of all; NaN where there is none."""
        found = self.interval(key)
        return found.value if found else self.pooled.get(key, math.nan)

    def half(self, key: str) -> float:
        """Half of the interval over seeds; 0 where there is none."""
        found = self.interval(key)
        return 0.0 if found is None or found.high is None else found.high - found.value


def nan_last(value: float) -> float:
    """A key to sort by: what is not known comes last."""
    return math.inf if math.isnan(value) else value


def row(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def cell(line: Line, key: str, places: int) -> str:
    """The mean over seeds and half of its interval."""
    value = line.mean(key)
    if math.isnan(value):
        return DASH
    text = number(value, places)
    found = line.interval(key)
    return text if found is None or found.high is None else f"{text} ± {line.half(key):.{places}f}"


def spread(values: Sequence[float], places: int) -> str:
    """The mean of all seeds, with the smallest and the largest in brackets; a dash where a seed has no value."""
    if not values or any(math.isnan(v) for v in values):
        return DASH
    mean = number(sum(values) / len(values), places)
    ends = [number(v, places) for v in (min(values), max(values))]
    return mean if ends[0] == ends[1] else f"{mean} [{ends[0]}, {ends[1]}]"


def number(value: float, places: int) -> str:
    """A number with so many decimals and a true minus; a dash where it is not known."""
    return DASH if math.isnan(value) else f"{value:.{places}f}".replace("-", MINUS)


def listed(words: Iterable[str], nothing: str = "no method") -> str:
    """Names in a sentence."""
    return ", ".join(f"`{w}`" for w in words) or nothing
