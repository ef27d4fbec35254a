"""Membership attacks with many reference models: likelihood ratios per row instead of one threshold for all."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field
from scipy import special

from expunge.audit.attacks.membership import MembershipAttack, membership_attack
from expunge.audit.evidence import Evidence, Values
from expunge.audit.kernel.likelihood import lira, rmia
from expunge.audit.metrics.papers import LIRA, RMIA
from expunge.audit.outputs import References
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.engine.parts import Paper

_LACK = "it needs reference models (expunge audit RUN --references 16)"
_FEW = 2


def references_of(evidence: Evidence) -> References:
    """The reference models of an audit.

    Raises:
        InputError: there are none.
    """
    if evidence.references is None:
        raise InputError("This audit has no reference models.", "Give them: expunge audit RUN --references 16.")
    return evidence.references


class _Shadowed(MembershipAttack):
    """An attack that reads margins under models that never saw the forget rows."""

    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ROWS})
    lack_is_common: ClassVar[bool] = True

    def lacks(self, evidence: Evidence, label: str) -> str:
        """Reference models."""
        enough = evidence.references is not None and evidence.references.count[0] >= _FEW
        return "" if enough else _LACK


@membership_attack
class OfflineLira(_Shadowed):
    """LiRA, offline: how unusual is the model's margin among those of models that never saw the row?

    Forget rows and unseen rows are both scored against the retrained reference models, which saw neither.
    """

    name: ClassVar[str] = "lira"
    title: ClassVar[str] = "LiRA (offline)"
    formula: ClassVar[str] = "Pr[Z > phi], Z ~ N(mean, deviation of the margins of models without the row)"
    paper: ClassVar[Paper] = LIRA
    evaluate = staticmethod(lira)

    def score(self, evidence: Evidence, label: str, name: str) -> Values:
        """One minus the offline LiRA score, so that higher is less member-like."""
        shadows = references_of(evidence).retrained[name]
        own = evidence.outputs(label, name).margins
        found = 1 - lira(own, shadows, np.zeros_like(shadows, dtype=np.int64), mode="offline")
        return Values(found, np.ones(len(found), dtype=np.bool_))


@membership_attack
class Rmia(_Shadowed):
    """RMIA: how much likelier is the row under this model than under others, compared with unseen rows?"""

    name: ClassVar[str] = "rmia"
    title: ClassVar[str] = "RMIA"
    formula: ClassVar[str] = "1 - Pr_z[ratio(x) / ratio(z) > gamma], ratio(x) = p(x) / ((1+a) mean_OUT p(x) + 1-a) * 2"
    paper: ClassVar[Paper] = RMIA
    evaluate = staticmethod(rmia)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ROWS, Offer.LOGITS})

    a: float = Field(0.3, ge=0, le=1, description="share of the models that saw the row in the mean, as the paper sets it")
    gamma: float = Field(2.0, ge=1, description="how much likelier it must be than an unseen row")

    def score(self, evidence: Evidence, label: str, name: str) -> Values:
        """One minus the RMIA score, so that higher is less member-like; unseen rows are the population."""
        held = references_of(evidence)
        p = [special.expit(evidence.outputs(label, s).margins) for s in (name, "holdout")]
        others = [special.expit(held.retrained[s]) for s in (name, "holdout")]
        found = 1 - rmia(p[0], others[0], p[1], others[1], a=self.a, gamma=self.gamma)
        return Values(found, np.ones(len(found), dtype=np.bool_))
