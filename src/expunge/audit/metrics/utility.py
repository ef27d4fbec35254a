"""TOFU's model utility: the harmonic mean of three metrics on every set that the model should still serve."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.papers import TOFU
from expunge.audit.metrics.probability import OptionProbability, Probability
from expunge.audit.metrics.registry import Metric, Need, Range, RecordMetric, metric
from expunge.audit.metrics.rouge import RougeRecall
from expunge.audit.metrics.truth_ratio import Mean, TruthRatio
from expunge.audit.metrics.words import Tokeniser
from expunge.audit.scores import End, Floats
from expunge.core.results import Direction, Number
from expunge.core.statistics import bootstrap_means, harmonic_mean
from expunge.engine.parts import Paper

TOFU_COMPONENTS = 9


def model_utility(components: ArrayLike) -> float:
    """Harmonic mean of utilities in [0, 1]; 0 if any is 0 (TOFU, section 2.2.1).

    Args:
        components: in TOFU {probability, ROUGE-L recall, truth-ratio score} x {retain, real authors, world facts}.

    Raises:
        InputError: there is none, or one is negative.
    """
    return harmonic_mean(components)


@metric
class ModelUtility(Metric):
    """TOFU's model utility over the sets that are there: retain, and every set besides forget and holdout.

    With retain, real authors and world facts these are TOFU's nine numbers (options stand in for the plain probability on all
    but retain). Where sets or perturbed answers are missing, it is the harmonic mean of the components that are there: its
    note says how many and which, and such a number is not comparable with published ones. Forget numbers are never in it.
    """

    name: ClassVar[str] = "model-utility"
    title: ClassVar[str] = "Model utility"
    formula: ClassVar[str] = "harmonic mean of {probability, ROUGE-L recall, max(0, 1 - R)} x {retain, real authors, world facts}"
    direction: ClassVar[Direction] = Direction.UTILITY_UP
    range: ClassVar[Range] = (0.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER, Need.PARAPHRASE, Need.PERTURBED, Need.GENERATION, Need.RETAIN)
    paper: ClassVar[Paper] = TOFU
    evaluate = staticmethod(model_utility)

    mean: Mean = Field("geometric", description="mean of the truth ratio")
    end: End = Field("include", description="whether the appended end token counts")
    max_new_tokens: int = Field(200, ge=1, description="longest answer in tokens")
    tokeniser: Tokeniser = Field("rouge", description="rouge: ASCII words only, as published; unicode: all scripts")

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The harmonic mean with a joint bootstrap: records of a set are resampled together, sets apart."""
        names = [n for n in evidence.sets if evidence.goal(n) in ("retain", "utility")]
        found = {n: self._components(evidence, label, n) for n in names}
        parts = [f"{n}.{m}" for n, values in found.items() for m in values]
        if not parts:
            evidence.miss("Model utility was not measured: there is no retain set and no utility set.")
            return {}
        if len(parts) < TOFU_COMPONENTS:
            evidence.miss(f"Model utility rests on {len(parts)} of TOFU's {TOFU_COMPONENTS} components ({', '.join(parts)}).")
        at = evidence.protocol
        groups = [g for n, values in found.items() for g in _groups(evidence, n, list(values.values()))]
        interval = bootstrap_means(groups, _harmonic, draws=at.draws, level=at.level, seed=at.seed)
        note = f"harmonic mean of {len(parts)} components: {', '.join(parts)}"
        return {self.name: interval.number(self.direction, self.range, note)}

    def _components(self, evidence: Evidence, label: str, name: str) -> dict[str, Values]:
        options = OptionProbability(end=self.end)
        first: RecordMetric = Probability(end=self.end)
        if evidence.goal(name) == "utility" and not options.lacks(evidence, name):
            first = options
        ratio = TruthRatio(mean=self.mean, end=self.end)
        rouge = RougeRecall(max_new_tokens=self.max_new_tokens, tokeniser=self.tokeniser)
        measured = [m for m in (first, rouge, ratio) if not m.lacks(evidence, name)]
        return {m.name: v for m in measured if (v := m.values(evidence, label, name)).present.any()}


def _groups(evidence: Evidence, name: str, components: list[Values]) -> list[tuple[list[Floats], list[str]]]:
    """Components of a set are resampled together if all records have all of them, else each over the records it has."""
    clusters = evidence.clusters(name)
    if all(c.present.all() for c in components):
        return [([c.values for c in components], clusters)] if components else []
    return [([c.values[c.present]], [k for k, p in zip(clusters, c.present, strict=True) if p]) for c in components]


def _harmonic(means: Floats) -> Floats:
    """Harmonic mean of each row ``[draws, k] -> [draws]``; 0 where a component is 0."""
    with np.errstate(divide="ignore"):
        return np.asarray(means.shape[1] / np.sum(1.0 / means, axis=1))
