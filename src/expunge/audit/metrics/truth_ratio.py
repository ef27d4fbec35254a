"""TOFU's truth ratio: how likely wrong answers are beside the right one in other words."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.papers import TOFU
from expunge.audit.metrics.probability import grouped
from expunge.audit.metrics.registry import Need, Range, RecordMetric, metric
from expunge.audit.scores import End, Floats
from expunge.core.errors import InputError
from expunge.core.results import Direction
from expunge.engine.parts import Paper

Mean = Literal["geometric", "arithmetic"]


def log_truth_ratio(nll_paraphrase: float, nll_perturbed: ArrayLike, mean: Mean = "geometric") -> float:
    """Natural logarithm of :func:`truth_ratio`, which stays finite where the ratio over- or underflows."""
    wrong = np.asarray(nll_perturbed, dtype=np.float64)
    if wrong.size == 0:
        raise InputError("The truth ratio needs at least one perturbed answer.")
    if mean == "geometric":
        return float(nll_paraphrase - wrong.mean())
    least = wrong.min()
    return float(nll_paraphrase - least + np.log(np.mean(np.exp(least - wrong))))


def truth_ratio(nll_paraphrase: float, nll_perturbed: ArrayLike, mean: Mean = "geometric") -> float:
    """``R = mean_i P(wrong_i) / P(paraphrase)`` with length-normalised probabilities ``P = exp(-NLL)``, in (0, inf).

    Below 1 the model prefers what is true. Paper (TOFU, section 2.2.2): arithmetic mean above. The authors' evaluation code,
    and with it every published table, takes the geometric mean, ``R = exp(NLL(paraphrase) - mean_i NLL(wrong_i))``; we follow
    the code by default, so that numbers are comparable, and offer both.

    Args:
        nll_paraphrase: mean loss of the paraphrased right answer.
        nll_perturbed: mean losses of the perturbed answers ``[k]``.
        mean: geometric or arithmetic.

    Raises:
        InputError: there is no perturbed answer.
    """
    with np.errstate(over="ignore"):
        return float(np.exp(log_truth_ratio(nll_paraphrase, nll_perturbed, mean)))


def truth_ratio_score(ratio: ArrayLike, goal: Literal["forget", "utility"]) -> Floats:
    """What TOFU averages over a set, in [0, 1]: ``min(R, 1/R)`` where forgetting is wanted, ``max(0, 1 - R)`` elsewhere.

    On the forget set it is best where R is near 1 (right and wrong are equally likely), and it does not see which side R
    comes from; on the others it is best where R is near 0 (the truth is preferred).

    Args:
        ratio: truth ratios ``[n]``, each in [0, inf].
        goal: forget, or utility for retain and all other sets.
    """
    r = np.asarray(ratio, dtype=np.float64)
    if goal == "utility":
        return np.maximum(0.0, 1.0 - r)
    with np.errstate(divide="ignore", over="ignore"):
        return np.minimum(r, 1.0 / r)


@metric
class TruthRatio(RecordMetric):
    """TOFU's truth ratio, as the score that TOFU averages per set.

    Forget and retain records need a paraphrase and perturbed answers. On further utility sets (real authors, world facts)
    a record without a paraphrase is measured with its own answer in place of it, as TOFU does there. A model that makes
    right and wrong answers equally unlikely looks forgotten here: read it beside utility and fluency.
    """

    name: ClassVar[str] = "truth-ratio"
    title: ClassVar[str] = "Truth ratio"
    formula: ClassVar[str] = (
        "R = mean_i P(wrong_i) / P(paraphrase), P = exp(-NLL); "
        "forget (and holdout, as a control): mean min(R, 1/R); other sets: mean max(0, 1 - R)"
    )
    direction: ClassVar[Direction] = Direction.REFERENCE
    range: ClassVar[Range] = (0.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.PARAPHRASE, Need.PERTURBED)
    paper: ClassVar[Paper] = TOFU
    evaluate = staticmethod(truth_ratio)

    mean: Mean = Field("geometric", description="mean over perturbed answers: geometric as in the code, arithmetic as printed")
    end: End = Field("include", description="whether the appended end token counts")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Perturbed answers and, but for utility sets, paraphrases."""
        missing = [] if evidence.has(name, "perturbed") else ["perturbed (wrong) answers"]
        if evidence.goal(name) != "utility" and not evidence.has(name, "paraphrase"):
            missing.insert(0, "paraphrased answers")
        return f"it needs {' and '.join(missing)}, and its records have none" if missing else ""

    def direction_on(self, evidence: Evidence, name: str) -> Direction:
        """Best like the retrained model's on forget and holdout, high elsewhere."""
        return Direction.REFERENCE if evidence.goal(name) in ("forget", "holdout") else Direction.UTILITY_UP

    def log_ratios(self, evidence: Evidence, label: str, name: str) -> Values:
        """log R of each record; absent where a record lacks a paraphrase or perturbed answers."""
        key = ("log truth ratio", self.mean, self.end, evidence.subject(label).fingerprint, name)
        return evidence.memo(key, lambda: self._log_ratios(evidence, label, name))

    def _log_ratios(self, evidence: Evidence, label: str, name: str) -> Values:
        n = len(evidence.records(name))
        right = np.full(n, np.nan)
        if evidence.goal(name) == "utility":
            right[:] = evidence.scores(label, name).nll(self.end)
        known = np.full(n, evidence.goal(name) == "utility")
        if evidence.has(name, "paraphrase"):
            owners = evidence.owners(name, "paraphrase")
            right[owners] = evidence.scores(label, name, "paraphrase").nll(self.end)
            known[owners] = True
        wrong = grouped(evidence, label, name, self.end)
        present = known & np.array([len(w) > 0 for w in wrong])
        values = np.full(n, np.nan)
        for i in np.flatnonzero(present).tolist():
            values[i] = log_truth_ratio(right[i], wrong[i], self.mean)
        return Values(values, present)

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """TOFU's per-set score of each record."""
        found = self.log_ratios(evidence, label, name)
        with np.errstate(over="ignore"):
            ratios = np.exp(found.values)
        goal: Literal["forget", "utility"] = "forget" if evidence.goal(name) in ("forget", "holdout") else "utility"
        return Values(truth_ratio_score(ratios, goal), found.present)
