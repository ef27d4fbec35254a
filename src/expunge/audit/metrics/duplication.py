"""How much better passages are known that were in the training corpus, than passages alike that never were."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from expunge.audit.evidence import Evidence
from expunge.audit.metrics.papers import HUBBLE
from expunge.audit.metrics.registry import Metric, Need, Range, metric
from expunge.audit.scores import End
from expunge.core.access import Offer
from expunge.core.results import Direction, Number
from expunge.core.statistics import bootstrap_means
from expunge.engine.parts import Paper


def loss_gap(unseen: float, seen: float) -> float:
    """Mean loss of passages that were never inserted minus that of inserted ones, in nats per token; 0: known no better."""
    return unseen - seen


@metric
class LossGap(Metric):
    """Mean loss of the holdout set minus that of the forget set, of one model.

    Both sets must be of one distribution (passages with drawn copy counts): then the gap is memorisation and nothing else. It is
    0 for a model that was never trained on the forget set, and negative for one that finds it stranger than unseen text.
    """

    name: ClassVar[str] = "loss-gap"
    title: ClassVar[str] = "Loss gap to unseen passages"
    formula: ClassVar[str] = "mean NLL(holdout) - mean NLL(forget), per token"
    direction: ClassVar[Direction] = Direction.ZERO
    range: ClassVar[Range] = (None, None)
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER, Need.HOLDOUT)
    paper: ClassVar[Paper] = HUBBLE
    evaluate = staticmethod(loss_gap)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOSSES, Offer.TEXT})
    on_request: ClassVar[bool] = True

    end: End = Field("exclude", description="whether the appended end token counts")

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """One number; the two sets are resampled apart."""
        if not {"forget", "holdout"} <= set(evidence.sets):
            evidence.miss(f"{self.title} was not measured: it needs a holdout set.")
            return {}
        groups = [((evidence.scores(label, n).nll(self.end),), evidence.clusters(n)) for n in ("holdout", "forget")]
        at = evidence.protocol
        found = bootstrap_means(groups, lambda m: m[:, 0] - m[:, 1], draws=at.draws, level=at.level, seed=at.seed)
        unseen, seen = (float(np.mean(g[0][0])) for g in groups)
        return {self.name: found.number(self.direction, self.range, f"unseen {unseen:.3f}, inserted {seen:.3f}")}
