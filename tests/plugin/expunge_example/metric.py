"""A metric."""

from typing import ClassVar

import numpy as np
from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.registry import Need, Range, RecordMetric, metric
from numpy.typing import ArrayLike

from expunge.core.results import Direction
from expunge.engine.parts import Paper


def top_token(logp: ArrayLike) -> float:
    """Probability of the answer's most probable token, in [0, 1]."""
    return float(np.exp(np.max(logp)))


@metric
class TopToken(RecordMetric):
    """How sure the model is of the token of the answer that it knows best."""

    name: ClassVar[str] = "top-token"
    title: ClassVar[str] = "Probability of the best-known token"
    formula: ClassVar[str] = "max_t p(y_t | x, y_<t); mean over records"
    direction: ClassVar[Direction] = Direction.FORGET_DOWN
    range: ClassVar[Range] = (0.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER,)
    paper: ClassVar[Paper] = Paper("An example", "The Expunge developers", 2026, "https://expunge.readthedocs.io")
    evaluate = staticmethod(top_token)

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Nothing: every record has an answer."""
        return ""

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """Its value for each record's answer."""
        scores = evidence.scores(label, name)
        return Values(scores.reduce(top_token, "logp"), scores.counts > 0)
