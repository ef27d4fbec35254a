"""Likelihood attacks on language models that read more than one model: IAM, and LiRA with retrained models as shadows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from expunge.audit.attacks.inside import target_of
from expunge.audit.attacks.registry import Access, Attack, Criterion, attack
from expunge.audit.evidence import Evidence, Values
from expunge.audit.kernel.iam import iam_language
from expunge.audit.kernel.likelihood import lira
from expunge.audit.metrics.papers import IAM, LIRA
from expunge.audit.metrics.registry import Range
from expunge.core.access import Offer
from expunge.engine.parts import Paper

_SHADOWS = 2  # models behind a Gaussian, at least


def _distinct(evidence: Evidence) -> int:
    """How many retrained models there are, those of the same weights counted once."""
    return len({evidence.subject(label).fingerprint for label in evidence.labels("retrained")})


class LikelihoodAttack(Attack):
    """A value per forget record from the mean losses of its answer under several models; no further pass of any of them."""

    access: ClassVar[Access] = Access.SCORES
    criterion: ClassVar[Criterion] = Criterion.LIKELIHOOD
    asks: ClassVar[bool] = False
    passes: ClassVar[str] = "none: the answers are scored anyway"
    range: ClassVar[Range] = (0.0, 1.0)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.LOSSES})


@attack
class Iam(LikelihoodAttack):
    """IAM: where the loss lies between that of the target and that of a model which never saw the text (Wang et al. 2025).

    1 is fitted as by the target, 0 as little as by the reference. The reference is a retrained model (of a retrained model
    another one), the same for all others. Its own score is not 0, which is why retrained models are compared.
    """

    name: ClassVar[str] = "iam"
    title: ClassVar[str] = "IAM"
    formula: ClassVar[str] = "1 - sum_a a G_a(s) / sum_a a, G_a Gumbel around s_target + a (s_retrained - s_target)"
    paper: ClassVar[Paper] = IAM

    steps: int = Field(1000, ge=2, description="interpolations between the target and the retrained model")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """A target and two retrained models, so that each has another one as its reference."""
        if not target_of(evidence):
            return "it needs the target model"
        return "" if _distinct(evidence) > 1 else "it needs two retrained models, one of which is the reference"

    def depends(self, evidence: Evidence, label: str) -> Mapping[str, Any]:
        """Target and reference."""
        others = (target_of(evidence), evidence.labels("retrained", but=label)[0])
        return {"others": [evidence.subject(o).fingerprint for o in others]}

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """Membership of each answer."""
        reference = evidence.labels("retrained", but=label)[0]
        losses = [evidence.scores(n, name).nll() for n in (label, target_of(evidence), reference)]
        here = np.all(np.isfinite(losses), axis=0)
        values = np.full(len(here), np.nan)
        if here.sum() > 1:
            # Rounding may leave a certain answer a loss just below 0.
            values[here] = iam_language(*(np.maximum(v[here], 0.0) for v in losses), steps=self.steps)
        return Values(values, np.ones(len(here), dtype=np.bool_))


@attack
class RetrainedLira(LikelihoodAttack):
    """LiRA, offline, with the retrained models as shadows: is the loss lower than models which never saw the text would have it?

    A Gaussian per answer over the losses of the (other) retrained models, with one variance for all answers. With few of them it
    is rough; the retrained models' own scores against each other are the control.
    """

    name: ClassVar[str] = "lira-retrained"
    title: ClassVar[str] = "LiRA with retrained models"
    formula: ClassVar[str] = "Pr[Z > NLL], Z ~ N(mean, deviation of the retrained models' NLL of the same answer)"
    paper: ClassVar[Paper] = LIRA

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Three retrained models: of a retrained model two others."""
        few = _distinct(evidence) <= _SHADOWS
        return f"it needs {_SHADOWS + 1} retrained models" if few else ""

    def depends(self, evidence: Evidence, label: str) -> Mapping[str, Any]:
        """The shadows."""
        return {"shadows": [evidence.subject(o).fingerprint for o in evidence.labels("retrained", but=label)]}

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """Offline LiRA score of each answer."""
        shadows = -np.stack([evidence.scores(o, name).nll() for o in evidence.labels("retrained", but=label)])
        own = -evidence.scores(label, name).nll()
        found = lira(own, shadows, np.zeros_like(shadows, dtype=np.int64), mode="offline")
        return Values(found, np.ones(len(found), dtype=np.bool_))
