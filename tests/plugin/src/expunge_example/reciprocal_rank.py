"""Mean reciprocal rank of the answer's tokens: a metric in one file."""

from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.registry import Need, Range, RecordMetric, metric
from expunge.core.results import Direction
from expunge.engine.parts import Paper

TREC = Paper(
    "The TREC-8 Question Answering Track Report",
    "Ellen M. Voorhees",
    1999,
    "https://trec.nist.gov/pubs/trec8/t8_proceedings.html",
)


def reciprocal_rank(ranks: ArrayLike) -> float:
    """``(1/T) sum_t 1 / (1 + rank_t)``, in (0, 1], with rank 0 for the model's first choice."""
    return float(np.mean(1.0 / (1.0 + np.asarray(ranks, dtype=np.float64))))


@metric
class ReciprocalRank(RecordMetric):
    """How near the top of the model's list the true tokens stand, given the true tokens before them."""

    name: ClassVar[str] = "reciprocal-rank"
    title: ClassVar[str] = "Reciprocal rank"
    formula: ClassVar[str] = "(1/T) sum_t 1 / (1 + rank(y_t)); mean over records"
    direction: ClassVar[Direction] = Direction.FORGET_DOWN
    range: ClassVar[Range] = (0.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER,)
    paper: ClassVar[Paper] = TREC
    evaluate = staticmethod(reciprocal_rank)

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Nothing: every record has an answer."""
        return ""

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """One value per record of the set."""
        scores = evidence.scores(label, name)
        return Values(scores.reduce(reciprocal_rank, "rank"), scores.counts > 0)
