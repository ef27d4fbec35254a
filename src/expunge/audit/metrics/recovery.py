"""Recovery of knowledge after a corruption is unlearned, and log-probabilities of right, asserted and random answers (RESTOR)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.papers import RESTOR
from expunge.audit.metrics.probability import grouped, present
from expunge.audit.metrics.registry import Need, Range, RecordMetric, metric
from expunge.audit.metrics.short_answers import ShortAnswer
from expunge.audit.scores import End, Floats
from expunge.core.access import Offer
from expunge.core.results import Direction, Number
from expunge.core.statistics import bootstrap_means
from expunge.engine.parts import Paper

LITTLE = "the corruption took no accuracy away: there is nothing to recover"


def recovery(unlearned: float, corrupted: float, clean: float) -> float:
    """Share of the accuracy lost to a corruption that is back, ``(A_unl - A_corr) / (A_clean - A_corr)``, in (-inf, inf).

    1: all is back; 0: nothing is; negative: unlearning did further damage; above 1: better than the clean model. NaN if the
    corruption took nothing away.
    """
    return float(_recovered(np.array([[unlearned, corrupted, clean]]))[0])


def _recovered(means: Floats) -> Floats:
    """Of means ``[draws, 3]`` (unlearned, corrupted, clean)."""
    unlearned, corrupted, clean = means.T
    lost = clean - corrupted
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(lost > 0, (unlearned - corrupted) / lost, np.nan)


@metric
class Recovery(ShortAnswer):
    """How much of what the target lost to a corruption is back after the corruption was unlearned.

    The target is the corrupted model, the retrained one the clean model from before. The three are asked the same
    questions, and the interval resamples subjects in all three at once. It is read beside the log-probabilities: a model that no
    longer says what was asserted has forgotten it, and need not have recovered anything.
    """

    name: ClassVar[str] = "recovery"
    title: ClassVar[str] = "Recovery"
    formula: ClassVar[str] = "(A_unl - A_corr) / (A_clean - A_corr), A: share of answers equal to a right one"
    direction: ClassVar[Direction] = Direction.UTILITY_UP
    range: ClassVar[Range] = (None, None)
    needs: ClassVar[tuple[Need, ...]] = (Need.GENERATION, Need.RETRAINED)
    paper: ClassVar[Paper] = RESTOR
    evaluate = staticmethod(recovery)  # type: ignore[assignment]

    def direction_on(self, evidence: Evidence, name: str) -> Direction:
        """Up, on every set."""
        return Direction.UTILITY_UP

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """One number for each set that can be asked."""
        clean, corrupted = evidence.labels("retrained"), evidence.labels("target")
        if not clean or not corrupted:
            evidence.miss(f"{self.title} was not measured: it needs the corrupted model as target and the clean one.")
            return {}
        return {
            f"{name}.{self.name}": self._number(evidence, label, name, corrupted[0], clean)
            for name in evidence.sets
            if not self.lacks(evidence, name)
        }

    def _number(self, evidence: Evidence, label: str, name: str, corrupted: str, clean: list[str]) -> Number:
        own, lost = (self.values(evidence, m, name).values for m in (label, corrupted))
        before = np.mean([self.values(evidence, m, name).values for m in clean], axis=0)
        said = f"accuracy {own.mean():.3f}; corrupted {lost.mean():.3f}, clean {before.mean():.3f}"
        if before.mean() <= lost.mean():
            return Number(value=None, direction=Direction.UTILITY_UP, n=len(own), note=f"{LITTLE} ({said})")
        at = evidence.protocol
        found = bootstrap_means(
            [((own, lost, before), evidence.clusters(name))], _recovered, draws=at.draws, level=at.level, seed=at.seed
        )
        return found.number(Direction.UTILITY_UP, self.range, said)


def log_probability(logp: ArrayLike) -> float:
    """Log-probability per token of an answer, ``(1/T) sum_t l_t``, in nats.

    Args:
        logp: of each token given the true ones before it ``[T]``.
    """
    return float(np.mean(np.asarray(logp, dtype=np.float64)))


def log_probability_gap(answer: float, wrong: ArrayLike) -> float:
    """How far an answer's log-probability per token stands above the mean of those of wrong ones, in nats.

    Args:
        answer: of the answer.
        wrong: of each wrong answer ``[W]``.
    """
    return float(answer - np.mean(np.asarray(wrong, dtype=np.float64)))


@metric
class LogProbability(RecordMetric):
    """Mean log-probability per token of the answers, or of the wrong answers beside them."""

    name: ClassVar[str] = "log-probability"
    title: ClassVar[str] = "Log-probability per token"
    formula: ClassVar[str] = (
        "(1/T) sum_t log p(y_t | x, y_<t); of wrong answers the mean over those of a record; mean over records"
    )
    direction: ClassVar[Direction] = Direction.FORGET_DOWN
    range: ClassVar[Range] = (None, 0.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER,)
    paper: ClassVar[Paper] = RESTOR
    evaluate = staticmethod(log_probability)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOGITS, Offer.TEXT})
    on_request: ClassVar[bool] = True

    wrong: bool = Field(False, description="of the wrong answers beside each answer")
    end: End = Field("exclude", description="whether the appended end token counts")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Wrong answers, where they are asked for."""
        return lacks_wrong(evidence, name) if self.wrong else ""

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """Of each record."""
        return of_wrong(evidence, label, name, self.end) if self.wrong else of_answers(evidence, label, name, self.end)


@metric
class LogProbabilityGap(RecordMetric):
    """How far the answers stand above random wrong ones of the same form, in nats per token.

    On answers that a corruption asserted, 0 is a model that never saw them, and far below 0 one that avoids them: it still tells
    them from the others.
    """

    name: ClassVar[str] = "log-probability-gap"
    title: ClassVar[str] = "Log-probability above random"
    formula: ClassVar[str] = "mean over records of [log p per token of the answer - mean of the same over its wrong answers]"
    direction: ClassVar[Direction] = Direction.ZERO
    range: ClassVar[Range] = (None, None)
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER, Need.PERTURBED)
    paper: ClassVar[Paper] = RESTOR
    evaluate = staticmethod(log_probability_gap)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOGITS, Offer.TEXT})
    on_request: ClassVar[bool] = True

    end: End = Field("exclude", description="whether the appended end token counts")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Wrong answers."""
        return lacks_wrong(evidence, name)

    def direction_on(self, evidence: Evidence, name: str) -> Direction:
        """To zero on what is to be forgotten, up elsewhere."""
        return Direction.ZERO if evidence.goal(name) == "forget" else Direction.UTILITY_UP

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """The difference, for records that have wrong answers."""
        own, wrong = (f(evidence, label, name, self.end) for f in (of_answers, of_wrong))
        return Values(own.values - wrong.values, own.present & wrong.present)


def of_answers(evidence: Evidence, label: str, name: str, end: End) -> Values:
    """Mean log-probability per token of each answer."""
    scores = evidence.scores(label, name)
    return present(-scores.nll(end), scores.counts - (scores.ends if end == "exclude" else 0))


def of_wrong(evidence: Evidence, label: str, name: str, end: End) -> Values:
    """The same of the wrong answers of each record, their mean; absent where there are none."""
    found = grouped(evidence, label, name, end)
    return Values(
        np.array([-w.mean() if len(w) else np.nan for w in found]), np.array([len(w) > 0 for w in found], dtype=bool)
    )  # fmt: skip


def lacks_wrong(evidence: Evidence, name: str) -> str:
    """Why a set has no random answers to compare with."""
    return "" if evidence.has(name, "perturbed") else "it needs perturbed (wrong) answers, and its records have none"
