"""Ranges in which a parameter is searched: declared beside the field, or given on the command line.

A field says where published work looks for its value::

    beta: Annotated[float, Search(0.05, 1.0, log=True)] = Field(0.1, gt=0, description="...")
    lr: Annotated[float, Search(around=10)] = Field(1e-5, gt=0, description="...")

The second range goes from a tenth to ten times the value that the part has in the method at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from expunge.core.errors import InputError
from expunge.core.settings import describe_value, load_yaml

_EXAMPLE = "Write KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=A|B|C, for example beta=0.05..0.5:log."


@dataclass(frozen=True)
class Search:
    """Where a parameter is looked for; put on the field by ``Annotated``.

    Attributes:
        low, high: ends of the range.
        log: whether values are spread evenly over the logarithm.
        around: instead of ends: from the value at hand divided by this to the value times this, on the logarithm.
        choices: instead of ends: the values to try.
        unless: another field of the same part; where that has a value, this one decides nothing and is not searched.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    around: float | None = None
    choices: tuple[Any, ...] = ()
    unless: str = ""

    def range(self, value: Any, *, whole: bool = False) -> Range | None:
        """The range for a part whose value is ``value``; None where it is relative to a value that is missing or 0."""
        if self.choices:
            return Range(choices=self.choices)
        if self.around is None:
            assert self.low is not None
            assert self.high is not None
            return Range(self.low, self.high, log=self.log, whole=whole)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            return None
        low, high = value / self.around, value * self.around
        made = Range(max(1, round(low)) if whole else _short(low), round(high) if whole else _short(high), log=True, whole=whole)
        return made if made.low < made.high else None


def searched(info: FieldInfo) -> Search | None:
    """What a field declares."""
    return next((m for m in info.metadata if isinstance(m, Search)), None)


@dataclass(frozen=True)
class Range:
    """The values that a search may give a parameter.

    Attributes:
        low, high: ends, both included.
        log: whether values are spread evenly over the logarithm.
        whole: whether only whole numbers are given.
        choices: instead of ends: the values.
    """

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    choices: tuple[Any, ...] = ()

    def at(self, share: float) -> Any:
        """The value at ``share`` in [0, 1) of the range; numbers have six digits, so that a file shows what was run."""
        if self.choices:
            return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]
        if self.whole and not self.log:
            return int(min(self.high, self.low + math.floor(share * (self.high - self.low + 1))))
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return round(value) if self.whole else min(self.high, max(self.low, _short(value)))

    def ends(self) -> tuple[Any, ...]:
        """The values that must be allowed if all are: both ends, or every choice."""
        if self.choices:
            return self.choices
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is one that the range may give."""
        if self.choices:
            return value in self.choices
        return isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high

    def text(self) -> str:
        """As it is written on the command line."""
        if self.choices:
            return "|".join(describe_value(c) for c in self.choices)
        return f"{self.low:g}..{self.high:g}{':log' if self.log else ''}"

    @classmethod
    def parse(cls, key: str, text: str, *, whole: bool = False) -> Range:
        """Read ``0.05..0.5``, ``0.05..0.5:log`` or ``a|b|c``.

        Args:
            key: the parameter, for messages.
            text: the range.
            whole: whether the parameter is a whole number.

        Raises:
            InputError: it is neither, the range is empty, or a logarithm is asked for where there is none.
        """
        if ".." not in text:
            return cls(choices=_choices(key, text))
        body, colon, scale = text.partition(":")
        if colon and scale not in ("log", "linear"):
            raise InputError(f"The scale {scale!r} of {key!r} is neither log nor linear.", _EXAMPLE)
        low, high = (_number(key, text, end) for end in body.split("..", 1))
        if not low < high:
            raise InputError(f"The range {text!r} of {key!r} is empty.", "Write the smaller end first; both ends must differ.")
        if scale == "log" and low <= 0:
            raise InputError(f"The range {text!r} of {key!r} has no logarithm.", "Begin above 0, or leave out :log.")
        if whole and (low != round(low) or high != round(high)):
            raise InputError(f"The parameter {key!r} is a whole number; got the range {text!r}.", "Give whole ends.")
        return cls(low, high, log=scale == "log", whole=whole)


def _choices(key: str, text: str) -> tuple[Any, ...]:
    words = [w.strip() for w in text.split("|")]
    if len(words) < 2 or not all(words):
        raise InputError(f"{text!r} is no range for {key!r}.", _EXAMPLE)
    try:
        values = tuple(load_yaml(w) for w in words)
    except yaml.YAMLError:
        raise InputError(f"{text!r} is no range for {key!r}.", _EXAMPLE) from None
    if len({repr(v) for v in values}) < len(values):
        raise InputError(f"The range {text!r} of {key!r} names a value twice.", "Name each once.")
    return values


def _number(key: str, text: str, end: str) -> float:
    try:
        value = float(end)
    except ValueError:
        raise InputError(f"{text!r} is no range for {key!r}: {end!r} is no number.", _EXAMPLE) from None
    if not math.isfinite(value):
        raise InputError(f"The range {text!r} of {key!r} is not finite.", _EXAMPLE)
    return value


def _short(value: float) -> float:
    return float(f"{value:.6g}")
