"""What models of rows get right: accuracy of classifiers; error and skill of regressors."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from expunge.audit.evidence import Evidence, Values
from expunge.audit.kernel.gaps import accuracy
from expunge.audit.metrics.papers import BLINDSPOT, SPARSE
from expunge.audit.metrics.registry import Need, Range, RecordMetric, metric
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.core.results import Direction
from expunge.engine.parts import Paper

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class _OfRows(RecordMetric):
    """A value of each row, from the model's outputs alone."""

    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER,)

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Nothing: every row has a target."""
        return ""


@metric
class Accuracy(_OfRows):
    """Share of rows whose most probable class is the right one.

    On the forget set one minus it is "unlearning accuracy" (UA), on the retain set "remaining accuracy" (RA), on unseen rows
    of what is kept "test accuracy" (TA). Neither 0 nor 1 is the goal on the forget set: a retrained model has about its test
    accuracy on rows drawn at random, and 0 on a class that it has never seen.
    """

    name: ClassVar[str] = "accuracy"
    title: ClassVar[str] = "Accuracy"
    formula: ClassVar[str] = "(1/n) sum_i [argmax_c p(c | x_i) = y_i]"
    direction: ClassVar[Direction] = Direction.FORGET_DOWN
    range: ClassVar[Range] = (0.0, 1.0)
    paper: ClassVar[Paper] = SPARSE
    evaluate = staticmethod(accuracy)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ROWS, Offer.LOGITS})

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """1 where the class is right."""
        hits = evidence.outputs(label, name).kernel.hit.astype(np.float64)
        return Values(hits, np.ones(len(hits), dtype=np.bool_))


def absolute_error(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Mean absolute error, in the unit of the target.

    Raises:
        InputError: the shapes differ, or there is no row.
    """
    predicted, wanted = np.asarray(predictions, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if predicted.shape != wanted.shape or not predicted.size:
        raise InputError(f"Predictions {predicted.shape} do not match targets {wanted.shape}.", "Flatten both.")
    return float(np.abs(predicted - wanted).mean())


def skill(predictions: ArrayLike, targets: ArrayLike, constant: float) -> float:
    """One minus the mean absolute error over that of a constant answer, in (-inf, 1]; 0 is no better than the constant.

    Raises:
        InputError: the shapes differ, there is no row, or the constant is right everywhere.
    """
    wanted = np.asarray(targets, dtype=np.float64)
    base = absolute_error(np.full_like(wanted, constant), wanted)
    if base == 0:
        raise InputError("All targets are equal: no answer can be better than the constant.")
    return 1 - absolute_error(predictions, targets) / base


@metric
class AbsoluteError(_OfRows):
    """Mean absolute error of a regressor, in the unit of the target; compare it with that of retrained models."""

    name: ClassVar[str] = "absolute-error"
    title: ClassVar[str] = "Mean absolute error"
    formula: ClassVar[str] = "(1/n) sum_i |f(x_i) - y_i|"
    direction: ClassVar[Direction] = Direction.REFERENCE
    range: ClassVar[Range] = (0.0, None)
    paper: ClassVar[Paper] = BLINDSPOT
    evaluate = staticmethod(absolute_error)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ROWS, Offer.NUMBERS})

    def direction_on(self, evidence: Evidence, name: str) -> Direction:
        """An error is low where the model is useful, and like the retrained model's where it has forgotten."""
        return Direction.REFERENCE if evidence.goal(name) in ("forget", "holdout") else Direction.UTILITY_DOWN

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """Absolute error of each row."""
        found = evidence.outputs(label, name)
        return Values(np.abs(found.scores[:, 0] - found.targets), np.ones(len(found.targets), dtype=np.bool_))


@metric
class Skill(_OfRows):
    """How much of the error of always answering the median a regressor avoids; utility is judged by it.

    The median is that of the retain targets (of the set's own, where there is no retain set).
    """

    name: ClassVar[str] = "skill"
    title: ClassVar[str] = "Skill"
    formula: ClassVar[str] = "1 - (sum_i |f(x_i) - y_i|) / (sum_i |median - y_i|)"
    direction: ClassVar[Direction] = Direction.REFERENCE
    range: ClassVar[Range] = (None, 1.0)
    paper: ClassVar[Paper] = BLINDSPOT
    evaluate = staticmethod(skill)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ROWS, Offer.NUMBERS})

    def direction_on(self, evidence: Evidence, name: str) -> Direction:
        """Higher is more useful, except where rows are to be forgotten."""
        return Direction.REFERENCE if evidence.goal(name) in ("forget", "holdout") else Direction.UTILITY_UP

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Targets that differ."""
        return "" if self._base(evidence, name) > 0 else "all its targets equal the median"

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """One minus each row's error over the mean error of the median: the mean over rows is the skill."""
        found = evidence.outputs(label, name)
        values = 1 - np.abs(found.scores[:, 0] - found.targets) / self._base(evidence, name)
        return Values(values, np.ones(len(values), dtype=np.bool_))

    def _base(self, evidence: Evidence, name: str) -> float:
        kept = evidence.records("retain" if "retain" in evidence.sets else name)
        middle = float(np.median([r.target for r in kept]))
        return float(np.mean([abs(r.target - middle) for r in evidence.records(name)]))
