"""TOFU's probabilities: of the answer, and of the right answer among options; and the plain loss behind both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.papers import TOFU
from expunge.audit.metrics.registry import Need, Range, RecordMetric, metric
from expunge.audit.scores import End, Floats
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.core.results import Direction
from expunge.engine.parts import Paper


def loss(logp: ArrayLike) -> float:
    """Mean negative log-likelihood per token, in nats, in [0, inf): ``-(1/T) sum_t log p(y_t | x, y_<t)``.

    Args:
        logp: log-probabilities of the answer's tokens ``[T]``.

    Raises:
        InputError: there is no token.
    """
    values = np.asarray(logp, dtype=np.float64)
    if values.size == 0:
        raise InputError("An answer without tokens has no loss.")
    return -float(values.mean())


def probability(logp: ArrayLike) -> float:
    """Length-normalised probability of an answer, ``exp((1/T) sum_t log p(y_t | x, y_<t))``, in [0, 1].

    The geometric mean of the token probabilities (TOFU, section 2.2.1: ``P(a|q)^(1/|a|)``).

    Args:
        logp: log-probabilities of the answer's tokens ``[T]``.

    Raises:
        InputError: there is no token.
    """
    return float(np.exp(-loss(logp)))


def option_probability(nll: float, nll_perturbed: ArrayLike) -> float:
    """Probability of the right answer among options, ``P_1 / sum_i P_i`` with ``P_i = exp(-NLL_i)``, in [0, 1].

    TOFU, section 2.2.1, for its multiple-choice sets; every ``P_i`` is length-normalised. Computed from the differences of
    the losses, so that it does not become 0/0 where all options are very improbable.

    Args:
        nll: mean loss of the right answer.
        nll_perturbed: mean losses of the wrong ones ``[k]``.

    Raises:
        InputError: there is no wrong option: the share would always be 1.
    """
    wrong = np.asarray(nll_perturbed, dtype=np.float64)
    if wrong.size == 0:
        raise InputError("The probability among options needs at least one wrong option.")
    with np.errstate(over="ignore", invalid="ignore"):
        return float(1.0 / (1.0 + np.sum(np.exp(nll - wrong))))


def present(values: Floats, counts: Any) -> Values:
    """Per-record values of examples that are one per record; those without tokens are absent."""
    return Values(values, np.asarray(counts) > 0)


@metric
class Loss(RecordMetric):
    """Mean loss of the answers.

    The end token that was appended to an answer counts unless ``end=exclude``; the model has learnt it with the answer.
    """

    name: ClassVar[str] = "loss"
    title: ClassVar[str] = "Loss of the answer"
    formula: ClassVar[str] = "NLL = -(1/T) sum_t log p(y_t | x, y_<t)"
    direction: ClassVar[Direction] = Direction.REFERENCE
    range: ClassVar[Range] = (0.0, None)
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER,)
    paper: ClassVar[Paper] = TOFU
    evaluate = staticmethod(loss)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOSSES})

    end: End = Field("include", description="whether the appended end token counts")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Nothing: every record has an answer."""
        return ""

    def direction_on(self, evidence: Evidence, name: str) -> Direction:
        """A loss is low where the model is useful, and like the retrained model's where it has forgotten."""
        return Direction.REFERENCE if evidence.goal(name) in ("forget", "holdout") else Direction.UTILITY_DOWN

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """Mean loss of each record's answer."""
        scores = evidence.scores(label, name)
        return present(scores.nll(self.end), scores.counts - (scores.ends if self.end == "exclude" else 0))


@metric
class Probability(RecordMetric):
    """TOFU's probability of the answer; the geometric mean of its token probabilities.

    TOFU counts the end token (``end=include``), and so do the published numbers.
    """

    name: ClassVar[str] = "probability"
    title: ClassVar[str] = "Probability"
    formula: ClassVar[str] = "P(a|q)^(1/|a|) = exp((1/T) sum_t log p(y_t | x, y_<t)); mean over records"
    direction: ClassVar[Direction] = Direction.FORGET_DOWN
    range: ClassVar[Range] = (0.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER,)
    paper: ClassVar[Paper] = TOFU
    evaluate = staticmethod(probability)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOGITS})

    end: End = Field("include", description="whether the appended end token counts")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Nothing: every record has an answer."""
        return ""

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """Probability of each record's answer."""
        scores = evidence.scores(label, name)
        counts = scores.counts - (scores.ends if self.end == "exclude" else 0)
        return present(np.exp(-scores.nll(self.end)), counts)


@metric
class OptionProbability(RecordMetric):
    """Probability of the right answer among the right and the perturbed ones, each length-normalised.

    TOFU uses it in place of the plain probability for its multiple-choice sets (real authors, world facts); it is measured
    wherever there are perturbed answers.
    """

    name: ClassVar[str] = "option-probability"
    title: ClassVar[str] = "Probability with options"
    formula: ClassVar[str] = "P_1 / sum_i P_i, P_i = exp(-NLL(option i)); mean over records"
    direction: ClassVar[Direction] = Direction.FORGET_DOWN
    range: ClassVar[Range] = (0.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER, Need.PERTURBED)
    paper: ClassVar[Paper] = TOFU
    evaluate = staticmethod(option_probability)

    end: End = Field("include", description="whether the appended end token counts")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Perturbed answers."""
        return "" if evidence.has(name, "perturbed") else "it needs perturbed (wrong) answers, and its records have none"

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """Share of the right answer, for records that have perturbed ones."""
        nll = evidence.scores(label, name).nll(self.end)
        wrong = grouped(evidence, label, name, self.end)
        values = np.array([option_probability(n, w) if len(w) else np.nan for n, w in zip(nll, wrong, strict=True)])
        return Values(values, np.array([len(w) > 0 for w in wrong]))


def grouped(evidence: Evidence, label: str, name: str, end: End) -> Sequence[Floats]:
    """Mean losses of the perturbed answers of each record of a set, ``[k]`` each (k may be 0)."""
    owners = evidence.owners(name, "perturbed")
    nll = evidence.scores(label, name, "perturbed").nll(end)
    bounds = np.searchsorted(owners, np.arange(1, len(evidence.records(name))))
    return np.split(nll, bounds)
