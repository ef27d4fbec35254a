"""Refused: how often something that stands before a model answers in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.registry import Need, Range, RecordMetric, metric
from expunge.audit.metrics.rouge import lacks_questions
from expunge.core.access import Offer
from expunge.core.results import Direction, Number
from expunge.engine.parts import Paper

_PAPER = Paper("Guardrail Baselines for Unlearning in LLMs", "Thaker et al.", 2024, "https://arxiv.org/abs/2403.03329")


@metric
class Refused(RecordMetric):
    """Share of prompts of a set that are answered with something else than the model's answer, because a guard says so.

    On what is to stay, and on what the model never saw, these are false refusals; on what is to be forgotten they are what the
    guard is for, and tell who asks that something is hidden.

    A request that is refused when it is read counts, and so does an answer that is stopped on its way; an answer that a guard
    only changes does not. Thresholds were set on one half of the retain prompts: false refusals on that set are a little too low.
    """

    name: ClassVar[str] = "refused"
    title: ClassVar[str] = "Refused"
    formula: ClassVar[str] = "mean[a guard answers the prompt, at once or on the way]"
    paper: ClassVar[Paper] = _PAPER
    asks: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = (Need.GENERATION,)
    direction: ClassVar[Direction] = Direction.REFERENCE
    range: ClassVar[Range] = (0.0, 1.0)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.GENERATE})

    @staticmethod
    def evaluate(refused: Sequence[bool]) -> float:
        """Share of prompts that were answered in place of the model; NaN without any."""
        return float(np.mean(refused)) if len(refused) else float("nan")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Guards, and prompts."""
        return lacks_questions(evidence, name) if evidence.asked else _NONE

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """Nothing, and nothing is said of it, where no model is guarded."""
        return super().compute(evidence, label) if evidence.asked else {}

    def direction_on(self, evidence: Evidence, name: str) -> Direction:
        """Few on all sets but the forget set, where it depends on what is wanted."""
        return self.direction if evidence.goal(name) == "forget" else Direction.ZERO

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """1 where a guard has answered."""
        count = len(evidence.records(name))
        found = np.zeros(count)  # of a model that nothing stands before
        if evidence.adapter(label).fronted:
            found = np.array([g.refused for g in evidence.generations(label, name)], dtype=np.float64)
        return Values(found, np.ones(count, dtype=np.bool_))


_NONE = "no model is guarded"
