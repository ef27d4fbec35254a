"""How well membership attacks do: AUC, true positives at 1 % false ones, and MUSE's PrivLeak."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, field_validator

from expunge.audit.attacks.membership import MEMBERSHIP, GradientAttack, MembershipAttack
from expunge.audit.evidence import Evidence
from expunge.audit.metrics.papers import LOSS, MUSE
from expunge.audit.metrics.registry import Metric, Need, Range, metric
from expunge.audit.scores import Floats
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.core.intervals import Interval
from expunge.core.ranking import tpr_at_fpr
from expunge.core.results import Direction, Number
from expunge.core.statistics import auc, auc_delong, cluster_standard_error, wilson
from expunge.engine.parts import Paper

ALL = ("loss", "zlib", "min-k", "min-k-plus-plus", "reference", "gradient-norm", "lira", "rmia")
STRANGE = 0.25  #: an AUC below this, where the retrained model's is not, means over-unlearning
PRIVLEAK_MOST = 100.0  #: the largest PrivLeak where retrained models cannot tell forget from holdout (AUC 0.5)
FEW_OUTSIDE = 1000  #: non-members needed before a rate of 1 % false positives means anything


def privleak(auc_model: float, auc_retrained: float) -> float:
    """MUSE's privacy leakage, ``100 (A - A_ret) / A_ret`` with ``A = 1 - AUC`` in MUSE's orientation.

    MUSE's code scores forget as label 0 with minus the Min-K% loss, so its A is 0 when the forget set is memorised, about
    0.5 for a retrained model and 1 when over-unlearned. Hence NEGATIVE = under-unlearned (down to -100), POSITIVE =
    over-unlearned (up to ``100 (1/A_ret - 1)``). Both AUCs are given here in this project's orientation
    (1 = memorised) and converted. The ceiling depends on the data set: never average over data sets.

    Args:
        auc_model: AUC of the model, in [0, 1].
        auc_retrained: AUC of the retrained model on the same records, in [0, 1).

    Raises:
        InputError: an AUC is out of range, or the retrained model's is 1 (it separates the sets as if it knew them).
    """
    for value in (auc_model, auc_retrained):
        if value < 0 or value > 1:
            raise InputError(f"An AUC must be in [0, 1]; got {value}.")
    if auc_retrained == 1:
        raise InputError("PrivLeak is undefined: the attack tells forget from holdout perfectly on the retrained model already.")
    return 100.0 * (auc_retrained - auc_model) / (1.0 - auc_retrained)


def _attacks(names: tuple[str, ...], k: float, examples: int) -> list[MembershipAttack]:
    """The chosen attacks with the settings that they have."""
    options = {"k": k, "examples": examples}
    chosen = [MEMBERSHIP.get(n) for n in names]
    return [c(**{o: v for o, v in options.items() if o in c.model_fields}) for c in chosen]


class _Pair:
    """The scores of one attack on one model: holdout and forget, with their clusters."""

    def __init__(self, evidence: Evidence, attack: MembershipAttack, label: str) -> None:
        sides = []
        for name in ("holdout", "forget"):
            found = attack.values(evidence, label, name)
            clusters = [c for c, p in zip(evidence.clusters(name), found.present, strict=True) if p]
            sides.append((found.values[found.present], clusters))
        (self.holdout, self.holdout_clusters), (self.forget, self.forget_clusters) = sides

    @property
    def alone(self) -> str:
        """Why nothing can be compared, where a set has a single record; else empty."""
        sizes = {"forget": len(self.forget), "holdout": len(self.holdout)}
        few = next((name for name, size in sizes.items() if size < 2), "")
        return f"too few: the {few} set has a single scored record" if few else ""

    @property
    def clusters(self) -> tuple[list[str], list[str]]:
        """Of holdout and of forget."""
        return self.holdout_clusters, self.forget_clusters


class _Attacked(Metric):
    """Settings and checks that both membership metrics share."""

    attacks: tuple[str, ...] = Field(ALL, description="membership attacks")
    k: float = Field(0.4, gt=0, le=1, description="share of tokens of Min-K% and Min-K%++")
    gradient_examples: int = Field(40, ge=2, description="records per set whose gradient is taken")

    @field_validator("attacks")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            MEMBERSHIP.get(name)
        return value

    def chosen(self, evidence: Evidence) -> list[MembershipAttack]:
        """The attacks that fit the modality of the audit."""
        if evidence.asked:  # who only asks gets log-probabilities of what the model says, not of texts of his own
            return []
        return [a for a in _attacks(self.attacks, self.k, self.gradient_examples) if a.offers <= evidence.offers]

    def visit(self, evidence: Evidence, label: str) -> None:
        """Gradients are taken while the model is in memory."""
        if "holdout" in evidence.sets:
            for attack in self.chosen(evidence):
                if attack.name == GradientAttack.name and not attack.lacks(evidence, label):
                    for name in ("holdout", "forget"):
                        attack.values(evidence, label, name)

    def runnable(self, evidence: Evidence, label: str) -> list[MembershipAttack]:
        """The attacks that this audit's data allow on a model; the others are noted as missing."""
        if "holdout" not in evidence.sets:
            evidence.miss(f"{self.title} was not measured: it needs a holdout set that the models were never trained on.")
            return []
        if evidence.asked:
            evidence.miss(f"{self.title} was not measured: who only asks gets no log-probabilities of texts of their own.")
        out = []
        for attack in self.chosen(evidence):
            lack = attack.lacks(evidence, label)
            if lack:
                where = "" if attack.lack_is_common else f" on {label!r}"
                evidence.miss(f"The membership attack {attack.title} was not run{where}: {lack}.")
            else:
                out.append(attack)
        return out

    def pair(self, evidence: Evidence, attack: MembershipAttack, label: str) -> tuple[Floats, Floats]:
        """Scores of holdout and forget records, higher = less member-like (for ROC curves)."""
        found = _Pair(evidence, attack, label)
        return found.holdout, found.forget

    def retrained_auc(self, evidence: Evidence, attack: MembershipAttack, label: str) -> float | None:
        """Mean AUC of the other retrained models under an attack; None if there is none."""
        others = [o for o in evidence.labels("retrained", but=label) if not attack.lacks(evidence, o)]
        pairs = [_Pair(evidence, attack, o) for o in others]
        return float(np.mean([auc(p.holdout, p.forget) for p in pairs])) if pairs else None


@metric
class Membership(_Attacked):
    """AUC of each membership attack between holdout and forget, and the true-positive rate at 1 % false positives.

    1 = the forget set is fully recognised, 0.5 = not at all, below 0.5 = over-unlearned. It is best where it equals the
    retrained model's value, which need not be 0.5: the two sets may differ for other reasons. Intervals are DeLong's, by
    cluster. The rate at 1 % needs 1,000 non-members; with fewer it is said to be "too few".
    """

    name: ClassVar[str] = "membership"
    title: ClassVar[str] = "Membership attack AUC"
    formula: ClassVar[str] = "P(score(holdout) > score(forget)) + P(equal)/2, score higher = less member-like"
    direction: ClassVar[Direction] = Direction.REFERENCE
    range: ClassVar[Range] = (0.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER, Need.HOLDOUT, Need.GRADIENT)
    paper: ClassVar[Paper] = LOSS
    evaluate = staticmethod(auc)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOSSES})

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """``membership.<attack>`` and ``membership.<attack>.tpr-at-1``."""
        out = {}
        for attack in self.runnable(evidence, label):
            found = _Pair(evidence, attack, label)
            if not len(found.holdout) or not len(found.forget):
                evidence.miss(f"The membership attack {attack.title} was not run on {label!r}: a set has no scored records.")
                continue
            if found.alone:
                out[f"{self.name}.{attack.name}"] = self._alone(found)
                continue
            interval = auc_delong(found.holdout, found.forget, evidence.protocol.level, clusters=found.clusters)
            note = f"{len(found.forget)} forget and {len(found.holdout)} holdout records"
            flags = self._strange(evidence, attack, label, interval.value)
            out[f"{self.name}.{attack.name}"] = interval.number(self.direction, self.range, note, flags)
            out[f"{self.name}.{attack.name}.tpr-at-1"] = self._rate(found, evidence.protocol.level)
        return out

    def _alone(self, found: _Pair) -> Number:
        n, clusters = len(found.forget) + len(found.holdout), sum(len(set(c)) for c in found.clusters)
        return Number(
            value=None, n=n, clusters=clusters, direction=self.direction, range=self.range, note=found.alone, flags=(found.alone,)
        )

    def _strange(self, evidence: Evidence, attack: MembershipAttack, label: str, value: float) -> tuple[str, ...]:
        said = strange(value, self.retrained_auc(evidence, attack, label))
        return (said,) if said else ()

    def _rate(self, found: _Pair, level: float) -> Number:
        n, clusters = len(found.forget), len(set(found.forget_clusters))
        if len(found.holdout) < FEW_OUTSIDE or not np.isfinite([*found.holdout, *found.forget]).all():
            few = f"too few: a rate of 1 % false positives needs {FEW_OUTSIDE} non-members, there are {len(found.holdout)}"
            flag = few if len(found.holdout) < FEW_OUTSIDE else "not a finite number"
            return Number(
                value=None, over="none", n=n, clusters=clusters, direction=self.direction, range=self.range, note=flag,
                flags=(flag,),
            )  # fmt: skip
        caught, members = tpr_at_fpr(found.holdout, found.forget)
        note = "Wilson's interval of a proportion, clusters not regarded"
        return wilson(caught, members, level).number(self.direction, self.range, note)


@metric
class PrivLeak(_Attacked):
    """MUSE's PrivLeak: the membership AUC relative to that of retrained models, in percent.

    Negative = under-unlearned, positive = over-unlearned. MUSE reports it for Min-K% with k = 0.4; the other attacks are
    treated alike. With several retrained models their mean AUC is the reference; nothing stands in for it where there is none.
    The interval is the delta method on the clustered placement values of both AUCs, which are correlated: both models score
    the same records.
    """

    name: ClassVar[str] = "privleak"
    title: ClassVar[str] = "Privacy leakage (PrivLeak)"
    formula: ClassVar[str] = "100 (A - A_ret) / A_ret, A = 1 - AUC (MUSE's orientation)"
    direction: ClassVar[Direction] = Direction.ZERO
    range: ClassVar[Range] = (-100.0, None)
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER, Need.HOLDOUT, Need.RETRAINED)
    paper: ClassVar[Paper] = MUSE
    evaluate = staticmethod(privleak)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOSSES})

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """``privleak.<attack>`` for every attack."""
        out = {}
        for attack in self.runnable(evidence, label):
            others = [o for o in evidence.labels("retrained", but=label) if not attack.lacks(evidence, o)]
            if not others:
                evidence.miss(f"PrivLeak by {attack.title} was not measured for {label!r}: it needs another retrained model.")
                continue
            own, references = _Pair(evidence, attack, label), [_Pair(evidence, attack, o) for o in others]
            if len(own.holdout) and len(own.forget):
                out[f"{self.name}.{attack.name}"] = self._number(own, references, evidence.protocol.level)
        return out

    def _number(self, own: _Pair, references: list[_Pair], level: float) -> Number:
        own_auc = auc(own.holdout, own.forget)
        expected = float(np.mean([auc(r.holdout, r.forget) for r in references]))
        n = len(own.holdout) + len(own.forget)
        clusters = len(set(own.holdout_clusters)) + len(set(own.forget_clusters))
        note = f"AUC {own_auc:.3f}, of {len(references)} retrained {expected:.3f}"
        base = Number(value=None, level=level, n=n, clusters=clusters, direction=self.direction, range=self.range, note=note)
        if not (math.isfinite(own_auc) and math.isfinite(expected)) or expected == 1:
            why = "not a finite number" if expected != 1 else "undefined: the retrained model tells the sets apart perfectly"
            return base.model_copy(update={"flags": (why,)})
        if own.alone:
            return base.model_copy(update={"flags": (own.alone,)})
        value = privleak(own_auc, expected)
        error = privleak_error(own, references, own_auc, expected)
        ceiling = privleak(0.0, expected)
        bounds = {} if error is None else _bounds(value, error, ceiling, level)
        if bounds and own_auc in (0.0, 1.0):
            # Complete separation leaves no variance to estimate from; the exact bound of agreeing pairs stays (as for the AUC).
            groups = min(len(set(c)) for c in own.clusters)
            near = privleak(abs(own_auc - (1 - ((1 - level) / 2) ** (1 / groups))), expected)
            bounds = {"low": min(bounds["low"], near), "high": max(bounds["high"], near)}
        fewest = min(len(set(c)) for c in own.clusters)
        kept = Interval(value, bounds.get("low"), bounds.get("high"), level, n, clusters, fewest=fewest)
        said = (strange(own_auc, expected), exploded(value, expected), kept.too_few())
        return base.model_copy(update={"value": value, **bounds, "flags": tuple(s for s in said if s)}).checked()


def strange(found: float, expected: float | None) -> str:
    """What an AUC far below 0.5 means where that of retrained models is not; else empty.

    Args:
        found: AUC of the model, 1 = memorised.
        expected: mean AUC of retrained models; None if there are none.
    """
    if found >= STRANGE or (expected is not None and expected < STRANGE):
        return ""
    return (
        "over-unlearned, not private: forget texts look stranger to the model than texts it never saw, and whoever turns the "
        f"attack round tells them apart (AUC {1 - found:.3f})"
    )


def exploded(value: float, expected: float) -> str:
    """Why a PrivLeak lies above 100, which is all that there can be where the retrained models' AUC is 0.5; else empty.

    Args:
        value: PrivLeak, in percent.
        expected: mean AUC of retrained models, 1 = memorised.
    """
    if value <= PRIVLEAK_MOST:
        return ""
    return (
        f"above {PRIVLEAK_MOST:.0f}, which is the most where forget and holdout texts are alike: the AUC of retrained models is "
        f"{expected:.3f} already, so the sets differ, and the number is divided by the {1 - expected:.3f} that are left. It says "
        "that the model is over-unlearned, not that it is so much more private"
    )


def privleak_error(own: _Pair, references: list[_Pair], own_auc: float, expected: float) -> float | None:
    """Standard error of :func:`privleak` by the delta method; None with fewer than two clusters in a set.

    With a = AUC of the model and r of the reference, dP/da = -100/(1-r) and dP/dr = 100 (1-a)/(1-r)^2; the gradient is applied to
    the placement values of each record, whose clustered variance (Obuchowski 1997) is that of the combination.
    """
    slope, slope_reference = -100 / (1 - expected), 100 * (1 - own_auc) / (1 - expected) ** 2
    mine = placements(own.holdout, own.forget)
    theirs = [placements(r.holdout, r.forget) for r in references]
    total = 0.0
    for side, clusters in enumerate(own.clusters):
        reference = np.mean([t[side] for t in theirs], axis=0)
        error = cluster_standard_error(slope * mine[side] + slope_reference * reference, clusters)
        if error is None:
            return None
        total += error**2
    return math.sqrt(total)


def placements(holdout: ArrayLike, forget: ArrayLike) -> tuple[Floats, Floats]:
    """For each holdout score the share of forget scores below it, for each forget score the share of holdout scores above it.

    Ties count half. Both have the AUC as their mean.
    """
    outside, inside = np.asarray(holdout, dtype=np.float64), np.asarray(forget, dtype=np.float64)
    return _share_below(outside, inside), 1.0 - _share_below(inside, outside)


def _share_below(values: Floats, others: Floats) -> NDArray[np.float64]:
    ordered = np.sort(others)
    both = np.searchsorted(ordered, values, side="left") + np.searchsorted(ordered, values, side="right")
    return np.asarray(both / (2 * len(others)), dtype=np.float64)


def _bounds(value: float, error: float, ceiling: float, level: float) -> dict[str, float]:
    from scipy import special

    half = float(special.ndtri((1 + level) / 2)) * error
    return {"low": max(-100.0, value - half), "high": min(ceiling, value + half)}
