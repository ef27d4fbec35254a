"""What a measurement is: a value never travels without its direction, range and interval."""

from __future__ import annotations

import enum
import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Direction(enum.StrEnum):
    """Which way is better, and better for whom."""

    FORGET_DOWN = "forget-down"  #: lower means more forgotten; pushed below the retrained model's value it is over-unlearning
    UTILITY_UP = "utility-up"  #: higher means more useful
    UTILITY_DOWN = "utility-down"  #: lower means more useful (a loss, a share of broken text)
    REFERENCE = "reference"  #: best where it equals the retrained model's value
    ZERO = "zero"  #: best at zero, worse on either side


class Number(BaseModel):
    """One measured number.

    ``value`` is None where it could not be measured, and ``note`` says why. ``low``/``high`` bound the ``level`` confidence
    interval over ``over`` (examples: the finite probe set, resampled by cluster; seeds: training randomness; they are never
    mixed). ``flags`` hold warnings such as "outside its range" or "too few": a flagged number is never printed bare.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float | None
    low: float | None = None
    high: float | None = None
    level: float = 0.95
    over: Literal["examples", "seeds", "none"] = "examples"
    n: int = 0  #: examples measured
    clusters: int = 0  #: independent groups among them (persons, authors, books)
    direction: Direction
    range: tuple[float | None, float | None] = (None, None)  #: values that are possible; None is unbounded
    note: str = ""
    flags: tuple[str, ...] = ()

    def checked(self) -> Number:
        """A copy in which what cannot be is flagged: a value outside ``range``; what is not finite or rests on a single record is
        also removed."""
        if self.value is None:
            return self
        if self.over != "seeds" and self.n == 1 and self.low is None:
            return self._flagged("too few: a single record, and nothing is reported from fewer than two", value=None, high=None)
        low, high = self.range
        slack = 1e-9
        if not math.isfinite(self.value):
            return self._flagged(f"not a finite number ({self.value})", value=None, low=None, high=None)
        if (low is not None and self.value < low - slack) or (high is not None and self.value > high + slack):
            return self._flagged(f"impossible value {self.value:g}: outside [{low}, {high}]")
        if any(bound is not None and not math.isfinite(bound) for bound in (self.low, self.high)):
            return self._flagged("its interval is not finite", low=None, high=None)
        return self

    def _flagged(self, flag: str, **update: None) -> Number:
        return self.model_copy(update={**update, "flags": self.flags if flag in self.flags else (*self.flags, flag)})

    def text(self, digits: int = 3) -> str:
        """``0.812 [0.790, 0.834]``; flagged values end in ``!``, missing ones are a dash."""
        if self.value is None:
            return "-"
        shown = _shown(self.value, digits)
        if self.low is not None and self.high is not None:
            shown += f" [{_shown(self.low, digits)}, {_shown(self.high, digits)}]"
        return shown + ("!" if self.flags else "")


def _shown(value: float, digits: int) -> str:
    """Fixed point, except where that would hide a tiny number as zero or bury a huge one in digits."""
    if value == 0 or 10.0**-digits <= abs(value) < 1e4:
        return f"{value:.{digits}f}"
    return f"{value:.3g}"


class Verdict(enum.StrEnum):
    """What an audit concludes about a model and a forget set."""

    FORGOTTEN = "forgotten"  #: indistinguishable from retrained models at the stated margins, and it stays so under attack
    SUPPRESSED = "suppressed"  #: behaves as forgotten, but an attack brings back what it does not bring back in a retrained model
    NOT_FORGOTTEN = "not forgotten"  #: still distinguishable from retrained models on the side of knowing
    DAMAGED = "damaged"  #: utility lost beyond the margin, or pushed beyond the retrained model on the far side
    NO_GOLD = "no gold standard"  #: no retrained model to compare with: nothing can be said
    UNDECIDED = "undecided"  #: the evidence is too thin to tell at the stated margins (too few examples or seeds)


class Check(BaseModel):
    """One comparison that a verdict rests on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    outcome: Literal["equivalent", "knows more", "knows less", "hides", "worse", "undecided", "shown", "not run"]
    difference: float | None = None  #: unlearned minus retrained, in the metric's own unit
    low: float | None = None
    high: float | None = None
    margin: float | None = None  #: the two-sided equivalence margin in the same unit
    criterion: str = ""  #: what kind of test it is, by which a protocol groups checks
    told: bool = True  #: False where it was run and even the target cannot be told from retrained models by it
    falls: bool = False  #: whether the quantity falls with knowledge
    text: str = ""  #: one sentence for people


class Finding(BaseModel):
    """How one criterion of a protocol came out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    title: str
    needs: Literal["equivalence", "no conviction", "report"]
    outcome: Literal["held", "failed", "undecided", "tells nothing", "reported", "not run"]
    claim: str = ""  #: what holds if it holds
    checks: tuple[str, ...] = ()  #: names of the checks it rests on
    text: str = ""  #: the sentence of the check that carries it


class Judgement(BaseModel):
    """A verdict with the checks that led to it, weakest link named."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verdict: Verdict
    reason: str
    checks: tuple[Check, ...] = ()
    protocol: str = ""  #: name and version of the declared protocol; empty: none
    criteria: tuple[Finding, ...] = ()  #: of the protocol
    thresholds: dict[str, float] = Field(default_factory=dict)
