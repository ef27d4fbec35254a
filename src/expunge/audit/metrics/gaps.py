"""Measures of classifiers against retrained ones from hits, confidences and probabilities: the metrics of the field's tables."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch

from expunge.audit.evidence import Evidence
from expunge.audit.kernel import gaps as kernel
from expunge.audit.kernel.membership import entropy_attack, sorted_softmax_attack, svc_efficacy
from expunge.audit.kernel.quantities import probabilities
from expunge.audit.metrics.papers import BAD_TEACHER, DUCK, LAF, RUM, SPARSE
from expunge.audit.metrics.registry import Metric, Need, Range, metric
from expunge.audit.outputs import RowOutputs
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.core.results import Direction, Number
from expunge.core.statistics import wilson
from expunge.engine.parts import Paper
from expunge.engine.reference import IncompetentReference

TESTED = ("test", "holdout")  #: where accuracy on unseen rows is taken from, the first that there is


def tested(evidence: Evidence) -> str:
    """Name of the set of unseen rows of what is kept; nothing if there is none."""
    return next((n for n in TESTED if n in evidence.sets), "")


def accuracies(evidence: Evidence, label: str) -> tuple[float, float, float]:
    """Accuracy on forget set, retain set and unseen rows."""
    hits = [evidence.outputs(label, n).kernel.hit for n in ("forget", "retain", tested(evidence))]
    forget, retain, test = (float(h.mean()) for h in hits)
    return forget, retain, test


class OfSets(Metric):
    """One number per model from its outputs on forget, retain and unseen rows."""

    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ROWS, Offer.LOGITS})
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER, Need.RETAIN, Need.HOLDOUT)
    range: ClassVar[Range] = (0.0, 1.0)

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The number under the metric's own name."""
        if "retain" not in evidence.sets or not tested(evidence):
            evidence.miss(f"{self.title} was not measured: it needs a retain set and rows that were never trained on.")
            return {}
        found = self.measure(evidence, label)
        return {self.name: found} if found is not None else {}

    @abc.abstractmethod
    def measure(self, evidence: Evidence, label: str) -> Number | None:
        """The number, or None where it cannot be measured (said by :meth:`Evidence.miss`)."""


class _Trained(OfSets):
    """An attacker trained on the audited model's own outputs, retain against unseen rows; a share of the forget set."""

    direction: ClassVar[Direction] = Direction.REFERENCE
    attack: ClassVar[Callable[..., float]]

    @abc.abstractmethod
    def score(self, found: RowOutputs) -> Any:
        """What the attacker reads of each row."""

    def measure(self, evidence: Evidence, label: str) -> Number | None:
        """The share with Wilson's interval: the attacker is taken as given, the forget rows as drawn."""
        scores = [self.score(evidence.outputs(label, n)) for n in ("retain", tested(evidence), "forget")]
        value = type(self).attack(*scores)
        if math.isnan(value):
            evidence.miss(f"{self.title} of {label!r} is undefined: all its scores are equal, or one is not finite.")
            return None
        n = len(scores[2])
        return wilson(round(value * n), n, evidence.protocol.level).number(
            self.direction, self.range, "compare with the retrained models; the interval takes the attacker as given"
        )


@metric
class MiaEfficacy(_Trained):
    """Share of the forget set that an attacker on the confidence calls non-member (an SVM, as in the five metrics).

    Higher is more forgotten, and a retrained model is below 1. It compares populations: single rows that are remembered pass
    unseen (see LiRA).
    """

    name: ClassVar[str] = "mia-efficacy"
    title: ClassVar[str] = "MIA-efficacy (SVM on the confidence)"
    formula: ClassVar[str] = "TN / |F| of an RBF-SVM on p_y, trained with retain = member, unseen rows = non-member"
    paper: ClassVar[Paper] = SPARSE
    evaluate = staticmethod(svc_efficacy)
    attack = staticmethod(svc_efficacy)

    def score(self, found: RowOutputs) -> Any:
        """Probability of the label."""
        return found.kernel.confidence


@metric
class MiaEntropy(_Trained):
    """Share of the forget set that a logistic regression on the prediction entropy calls member (Bad Teacher, SSD)."""

    name: ClassVar[str] = "mia-entropy"
    title: ClassVar[str] = "Members by entropy (logistic regression)"
    formula: ClassVar[str] = "share of F called member by a balanced logistic regression on -sum p log p"
    paper: ClassVar[Paper] = BAD_TEACHER
    evaluate = staticmethod(entropy_attack)
    attack = staticmethod(entropy_attack)

    def score(self, found: RowOutputs) -> Any:
        """Entropy of the prediction."""
        return found.kernel.entropy


@metric
class SoftmaxAttack(OfSets):
    """Balanced accuracy of boosted trees on sorted probabilities (the ASR of LAF's tables)."""

    name: ClassVar[str] = "asr"
    title: ClassVar[str] = "Attack success on sorted probabilities"
    formula: ClassVar[str] = "balanced accuracy, F = member against half of the unseen rows"
    direction: ClassVar[Direction] = Direction.REFERENCE
    paper: ClassVar[Paper] = LAF
    evaluate = staticmethod(sorted_softmax_attack)

    def measure(self, evidence: Evidence, label: str) -> Number | None:
        """The balanced accuracy."""
        sets = ("retain", tested(evidence), "forget")
        value = sorted_softmax_attack(
            *(probabilities(evidence.outputs(label, n).scores) for n in sets), seed=evidence.protocol.seed
        )
        return self.plain(evidence, "forget", value, "compare with the retrained models")


class Against(OfSets):
    """A comparison with the mean of the other retrained models."""

    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER, Need.RETAIN, Need.HOLDOUT, Need.RETRAINED)


def five(evidence: Evidence, label: str) -> kernel.FiveMetrics:
    """UA, MIA-efficacy, RA and TA of a model, once."""

    def make() -> kernel.FiveMetrics:
        forget, retain, test = (evidence.outputs(label, n).kernel for n in ("forget", "retain", tested(evidence)))
        efficacy = svc_efficacy(retain.confidence, test.confidence, forget.confidence)
        return kernel.five_metrics(forget.hit, retain.hit, test.hit, efficacy)

    return evidence.memo(("five", evidence.subject(label).fingerprint), make)


@metric
class AverageGap(Against):
    """Mean absolute gap of UA, MIA-efficacy, RA and TA to the means of the retrained models.

    A further retrained model is not at 0: read its own value, in its column, as the floor.
    """

    name: ClassVar[str] = "average-gap"
    title: ClassVar[str] = "Average gap to retraining"
    formula: ClassVar[str] = "mean of |UA_u - UA_r|, |MIA_u - MIA_r|, |RA_u - RA_r|, |TA_u - TA_r|"
    direction: ClassVar[Direction] = Direction.ZERO
    paper: ClassVar[Paper] = SPARSE
    evaluate = staticmethod(kernel.average_gap)

    def measure(self, evidence: Evidence, label: str) -> Number | None:
        """The mean of four gaps."""
        others = self.others(evidence, label)
        if not others:
            return None
        found = {n: five(evidence, n) for n in [label, *others]}
        if any(math.isnan(v.mia_efficacy) for v in found.values()):
            evidence.miss(f"{self.title} of {label!r} is undefined: its MIA-efficacy is.")
            return None
        value = kernel.average_gap(found[label], [found[o] for o in others])
        return self.plain(evidence, "forget", value, f"to the means of {len(others)} retrained models")


@metric
class TugOfWar(Against):
    """ToW: closeness to retraining of the accuracies on forget set, retain set and unseen rows, as one product."""

    name: ClassVar[str] = "tug-of-war"
    title: ClassVar[str] = "Tug of war (ToW)"
    formula: ClassVar[str] = "(1 - |dA_F|)(1 - |dA_R|)(1 - |dA_T|), differences to the retrained models' means"
    direction: ClassVar[Direction] = Direction.UTILITY_UP
    paper: ClassVar[Paper] = RUM
    evaluate = staticmethod(kernel.tug_of_war)

    def measure(self, evidence: Evidence, label: str) -> Number | None:
        """The product."""
        others = self.others(evidence, label)
        if not others:
            return None
        forget, retain, test = np.mean([accuracies(evidence, o) for o in others], axis=0).tolist()
        value = kernel.tug_of_war(accuracies(evidence, label), (forget, retain, test))
        return self.plain(evidence, "forget", value, f"against the means of {len(others)} retrained models")


@metric
class AdaptiveScore(OfSets):
    """AUS: accuracy kept on unseen rows over what is left on the forget set; it needs no retrained model.

    The setting "class" is taken where the retain set has no row of the forgotten rows' classes, "random" elsewhere.
    """

    name: ClassVar[str] = "adaptive-score"
    title: ClassVar[str] = "Adaptive unlearning score (AUS)"
    formula: ClassVar[str] = "(1 - (A_test(target) - A_test)) / (1 + Delta), Delta = A_F (class) or |A_F - A_test| (random)"
    direction: ClassVar[Direction] = Direction.REFERENCE
    range: ClassVar[Range] = (0.0, 2.0)
    paper: ClassVar[Paper] = DUCK
    evaluate = staticmethod(kernel.adaptive_unlearning_score)

    def measure(self, evidence: Evidence, label: str) -> Number | None:
        """The score."""
        target = next(iter(evidence.labels("target")), None)
        if target is None:
            evidence.miss(f"{self.title} was not measured: it needs the target model.")
            return None
        forget, _, test = accuracies(evidence, label)
        kept = {r.target for r in evidence.records("retain")}
        whole = not kept & {r.target for r in evidence.records("forget")}
        value = kernel.adaptive_unlearning_score(accuracies(evidence, target)[2], test, forget, "class" if whole else "random")
        return self.plain(evidence, "forget", value, "setting: class" if whole else "setting: random")


@metric
class ZeroRetrain(OfSets):
    """ZRF: how near the predictions on the forget set are to those of a network of the same shape that has learnt nothing.

    The divergence is summed over the classes; the published code takes their mean, and so is always near 1.
    """

    name: ClassVar[str] = "zero-retrain-forgetting"
    title: ClassVar[str] = "Zero retrain forgetting (ZRF)"
    formula: ClassVar[str] = "1 - mean_x JS(p(x) || p_random(x)), in bits, over the forget set"
    direction: ClassVar[Direction] = Direction.REFERENCE
    paper: ClassVar[Paper] = BAD_TEACHER
    evaluate = staticmethod(kernel.zero_retrain_forgetting)

    def visit(self, evidence: Evidence, label: str) -> None:
        """The random network's predictions, once for all models: they are of one shape."""
        evidence.memo(("random network", "forget"), lambda: self._random(evidence, label))

    def measure(self, evidence: Evidence, label: str) -> Number | None:
        """The score."""
        other = evidence.memo(("random network", "forget"), lambda: self._random(evidence, label))
        if other is None:
            evidence.miss(f"{self.title} was not measured: a part of the model cannot be set back to random weights.")
            return None
        own = probabilities(evidence.outputs(label, "forget").scores)
        return self.plain(evidence, "forget", kernel.zero_retrain_forgetting(own, other), "compare with the retrained models")

    @torch.no_grad()
    def _random(self, evidence: Evidence, label: str) -> Any:
        adapter = evidence.adapter(label)
        device = next(adapter.model.parameters()).device
        try:
            teacher = IncompetentReference(adapter, device, evidence.protocol.seed)
        except InputError:
            return None
        batch = adapter.collate([adapter.encode(r) for r in evidence.records("forget")]).to(device)
        return probabilities(teacher.outputs(adapter.model, batch, frozenset({"logits"})).logits)
