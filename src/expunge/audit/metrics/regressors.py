"""What an attacker sees in the errors of a regressor."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from expunge.audit.evidence import Evidence
from expunge.audit.kernel.regression import l1_attack
from expunge.audit.metrics.gaps import tested
from expunge.audit.metrics.papers import BLINDSPOT
from expunge.audit.metrics.registry import Metric, Need, Range, metric
from expunge.core.access import Offer
from expunge.core.results import Direction, Number
from expunge.core.statistics import wilson
from expunge.engine.parts import Paper


@metric
class MembersByError(Metric):
    """Share of the forget set that an SVM on the absolute error calls member, trained on retain against unseen rows.

    The value that is wanted is the retrained models'. Where the forget rows are a band of targets a low share may only mean that
    errors are large there.
    """

    name: ClassVar[str] = "members-by-error"
    title: ClassVar[str] = "Members by error (SVM)"
    formula: ClassVar[str] = "share of F called member by an RBF-SVM on |f(x) - y|, retain = member, unseen rows = non-member"
    direction: ClassVar[Direction] = Direction.REFERENCE
    range: ClassVar[Range] = (0.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER, Need.RETAIN, Need.HOLDOUT)
    paper: ClassVar[Paper] = BLINDSPOT
    evaluate = staticmethod(l1_attack)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ROWS, Offer.NUMBERS})

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The share with Wilson's interval: the attacker is taken as given, the forget rows as drawn."""
        unseen = tested(evidence)
        if "retain" not in evidence.sets or not unseen:
            evidence.miss(f"{self.title} was not measured: it needs a retain set and rows that were never trained on.")
            return {}
        held = [evidence.outputs(label, n) for n in ("retain", unseen, "forget")]
        train, test, forget = (np.abs(o.scores[:, 0] - o.targets) for o in held)
        value = l1_attack(train, test, forget)
        if math.isnan(value):
            evidence.miss(f"{self.title} of {label!r} is undefined: all its errors are equal, or one is not finite.")
            return {}
        found = wilson(round(value * len(forget)), len(forget), evidence.protocol.level)
        note = "compare with the retrained models; the interval takes the attacker as given"
        return {self.name: found.number(self.direction, self.range, note)}
