"""One threshold for every detector that scores: from ordinary prompts, for a rate of false alarms that is promised.

Split conformal prediction (Papadopoulos et al. 2002; Vovk et al. 2005): of ``n`` ordinary prompts that nothing was learnt from,
the ``k``-th smallest score with ``k = ceil((n + 1)(1 - rate))`` is the threshold, and what scores above it is noticed. A
further ordinary prompt that is exchangeable with them is noticed with a probability of at most ``(n + 1 - k) / (n + 1) <= rate``,
whatever the scores are like, and exactly that where they have no ties. The probability is over the calibrating prompts too; for
those at hand the rate is a draw of the distribution ``Beta(n + 1 - k, k)``, whose upper end is told beside.

The promise is of single requests that are like the ordinary ones. A long conversation is read in more pieces, and can be noticed
more often. Prompts on subjects that nothing was learnt about can be noticed more often, too, unless the ordinary prompts come in
groups (:class:`~expunge.guards.parts.Material`): then those that set the threshold are of other subjects than those that are
learnt from. Prompts of one group are alike, so the promise is then an approximate one, the better the more groups there are.
"""

from __future__ import annotations

import abc
import hashlib
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from expunge.core.errors import InputError
from expunge.guards.folding import words
from expunge.guards.parts import Detector, Material, Watcher
from expunge.guards.target import Target

M = TypeVar("M")


@dataclass(frozen=True)
class Threshold:
    """From which score on something is noticed, and what that promises.

    Attributes:
        value: what scores above it is noticed.
        rate: largest share of ordinary prompts that is to be noticed, as it was asked for; NaN where nothing is promised.
        scores: of the prompts that calibrate, in rising order, ``[n]``; empty where the threshold was given.
    """

    value: float
    rate: float
    scores: NDArray[np.float64]

    @property
    def promised(self) -> float:
        """Probability at which a further ordinary prompt is noticed, at most; NaN without a promise."""
        n = len(self.scores)
        return (n + 1 - rank(n, self.rate)) / (n + 1) if n else math.nan

    def upper(self, confidence: float = 0.95) -> float:
        """Bound of the rate of these very thresholds: it holds for a share ``confidence`` of all draws of calibrating prompts."""
        from scipy.stats import beta

        n = len(self.scores)
        if not n:
            return math.nan
        k = rank(n, self.rate)
        return float(beta.ppf(confidence, n + 1 - k, k))

    def p_value(self, score: float) -> float:
        """Share of ordinary prompts, itself among them, that score as much: at most ``rate`` for what is noticed."""
        n = len(self.scores)
        return (1 + n - int(np.searchsorted(self.scores, score, side="left"))) / (n + 1)

    def passed(self, score: float) -> bool:
        """Whether a score is above the threshold."""
        return score > self.value

    def summary(self) -> str:
        """The promise, in a sentence."""
        if not len(self.scores):
            return f"Threshold {self.value:g}, as given: nothing is promised of ordinary prompts."
        return (
            f"Threshold {self.value:.4g} from {len(self.scores)} ordinary prompts: of further ones like them at most "
            f"{self.promised:.3%} are noticed on average, and with 95 % confidence at most {self.upper():.3%}."
        )


def rank(n: int, rate: float) -> int:
    """``ceil((n + 1)(1 - rate))``, exactly: which of ``n`` scores in rising order is the threshold."""
    return math.ceil((n + 1) * (1 - Fraction(repr(float(rate)))))


def needed(rate: float) -> int:
    """How many prompts a promised rate needs: ``ceil(1 / rate) - 1``."""
    return math.ceil(1 / Fraction(repr(float(rate)))) - 1


def threshold(scores: ArrayLike, rate: float) -> Threshold:
    """The threshold that a rate of false alarms asks for.

    Args:
        scores: of ordinary prompts that the detector has not learnt from, ``[n]``; higher means more like a target.
        rate: largest share of ordinary prompts that may be noticed, in (0, 1).

    Raises:
        InputError: there are too few for the rate, or a score is no number.
    """
    held = np.sort(np.asarray(scores, dtype=np.float64))
    if np.isnan(held).any():
        raise InputError("A score of an ordinary prompt is no number.", "Leave that prompt out, or mend the detector.")
    if len(held) < needed(rate):
        raise InputError(
            f"{len(held)} ordinary prompts cannot promise that at most {rate:g} of them are noticed.",
            f"Give at least {needed(rate)} that nothing is learnt from, or a rate of at least {1 / (len(held) + 1):.2g}.",
        )
    return Threshold(float(held[rank(len(held), rate) - 1]), rate, held)


def given(value: float) -> Threshold:
    """A threshold that somebody has chosen: it promises nothing."""
    return Threshold(value, math.nan, np.empty(0))


def same(text: str) -> str:
    """What two prompts have in common that only differ in spacing, case, accents or punctuation."""
    return " ".join(words(text)) or text.strip()


def apart(calibrating: Sequence[str], judged: Sequence[str], what: str = "to be judged") -> None:
    """Refuse to judge by prompts that thresholds were set on.

    Args:
        calibrating: ordinary prompts that guards were fitted on.
        judged: others.
        what: what the others are for.

    Raises:
        InputError: a prompt is among both, spacing, case and punctuation aside.
    """
    held = {same(t) for t in calibrating}
    if both := sum(same(t) in held for t in judged):
        raise InputError(
            f"{both} of {len(judged)} prompts {what} are among the ordinary prompts that guards are fitted on.",
            "Keep both apart: a threshold says nothing about prompts that it was set on.",
        )


class Bounded(Watcher, abc.ABC):
    """A watcher of questions and topics with a threshold."""

    @property
    @abc.abstractmethod
    def bound(self) -> Threshold | None:
        """The threshold as it is now; none without targets."""

    @property
    def promise(self) -> str:
        """What the threshold promises."""
        return self.bound.summary() if self.bound else ""

    def covers(self, target: Target) -> bool:
        """Whether it has questions or topics."""
        return bool(target.questions)


class Refitted(Bounded, Generic[M]):
    """One that learns anew when a target comes or goes; what it learnt and its threshold are exchanged together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: tuple[M, Threshold] | None = None

    @property
    def bound(self) -> Threshold | None:
        """The threshold as it is now; none without targets."""
        return self._held[1] if self._held else None

    def add(self, target: Target) -> None:
        """Learn its questions, too."""
        self.take([target])

    def take(self, targets: Sequence[Target]) -> None:
        """Learn the questions of targets, in place of what is held of them."""
        with self._lock:
            self._hold(targets)
            self._held = self._fitted()

    def drop(self, target: str) -> None:
        """Learn anew, without its questions."""
        with self._lock:
            self._forget(target)
            self._held = self._fitted()

    @abc.abstractmethod
    def _hold(self, targets: Sequence[Target]) -> None:
        """Take questions in."""

    @abc.abstractmethod
    def _forget(self, target: str) -> None:
        """Give questions up."""

    @abc.abstractmethod
    def _fitted(self) -> tuple[M, Threshold] | None:
        """A new fit; none without questions."""


class Scoring(Detector):
    """A detector that gives scores, and notices what scores above a threshold that is promised something."""

    rate: float = Field(0.01, gt=0, lt=1, description="largest share of ordinary prompts that may be noticed, promised")
    threshold: float | None = Field(None, description="score above which something is noticed; none: found for rate")
    calibrating: float = Field(
        0.5, gt=0, lt=1, description="share of the ordinary prompts that sets the threshold; from the others is learnt"
    )

    least: ClassVar[int] = 0  #: ordinary prompts that it must have to learn from

    def parted(self, material: Material) -> tuple[list[str], list[str]]:
        """Ordinary prompts to learn from, and those to set the threshold on: which is which depends on their words and the seed.

        Raises:
            InputError: there are too few, or one of them is a question of a target.
        """
        if material.groups and len(material.groups) != len(material.ordinary):
            raise InputError(
                f"There are {len(material.groups)} groups for {len(material.ordinary)} ordinary prompts.", "Give one for each."
            )
        about = dict(zip(map(same, material.ordinary), material.groups or map(same, material.ordinary), strict=True))
        unique = list({same(t): t for t in material.ordinary if t.strip()}.values())
        apart(unique, [q for t in material.targets for q in t.questions], "of targets")
        salt = material.seed.to_bytes(8, "big")

        def place(text: str) -> tuple[bytes, bytes]:
            words_of = (about[same(text)], same(text))
            first, second = (hashlib.blake2b(w.encode(), salt=salt, digest_size=16).digest() for w in words_of)
            return first, second

        unique.sort(key=place)
        held = 0 if self.threshold is not None else math.floor(len(unique) * Fraction(repr(self.calibrating)))
        if held:  # the whole of a group, on one side
            begun = {about[same(t)] for t in unique[:held]}
            held = sum(about[same(t)] in begun for t in unique)
        if self.threshold is None and held < needed(self.rate):
            total = math.ceil(needed(self.rate) / Fraction(repr(self.calibrating)))
            raise InputError(
                f"The detector {self.name!r} has {len(unique)} different ordinary prompts; a share of {self.calibrating:g} of "
                f"them cannot promise that at most {self.rate:g} are noticed.",
                f"Give at least {total}, set rate higher, or give a threshold of your own.",
            )
        if len(unique) - held < self.least:
            raise InputError(
                f"The detector {self.name!r} has {len(unique) - held} ordinary prompts to learn from; it needs {self.least}.",
                "Give more, or a smaller share that sets the threshold.",
            )
        return unique[held:], unique[:held]

    def bound(self, scores: ArrayLike) -> Threshold:
        """The threshold, from scores of the prompts that set it."""
        return given(self.threshold) if self.threshold is not None else threshold(scores, self.rate)
