"""Scores of published benchmarks: NoMUS of MUFAC, the tug of war with an attack, and a distance that needs no retrained model."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from expunge.audit.evidence import Evidence
from expunge.audit.kernel import gaps as kernel
from expunge.audit.kernel.membership import logistic_attack
from expunge.audit.kernel.quantities import probabilities
from expunge.audit.metrics.gaps import Against, OfSets, five, tested
from expunge.audit.metrics.papers import LOTUS, MUFAC, RUM
from expunge.audit.metrics.registry import Need, Range, metric
from expunge.core.results import Direction, Number
from expunge.engine.parts import Paper

_FEWEST = 10  #: rows of each side of the attack


@metric
class Nomus(OfSets):
    """NoMUS: half the accuracy on unseen rows, half how little an attack on the loss tells forget from unseen rows.

    The attack is a logistic regression on the loss, in ten random splits. The retrained model is not the best that there is:
    whatever puts the attack at chance is rewarded. Made for forgotten persons whose classes stay.
    """

    name: ClassVar[str] = "nomus"
    title: ClassVar[str] = "NoMUS"
    formula: ClassVar[str] = "A_test / 2 + (1 - 2 |MIA - 1/2|) / 2, MIA: accuracy of a logistic regression on the loss"
    direction: ClassVar[Direction] = Direction.REFERENCE
    paper: ClassVar[Paper] = MUFAC
    evaluate = staticmethod(kernel.nomus)

    def measure(self, evidence: Evidence, label: str) -> Number | None:
        """With the attack's accuracy in the note."""
        if "holdout" not in evidence.sets or min(len(evidence.records(n)) for n in ("forget", "holdout")) < _FEWEST:
            evidence.miss(
                f"{self.title} was not measured: its attack needs {_FEWEST} forget rows, and as many unseen ones alike."
            )
            return None
        unseen, forget = (evidence.outputs(label, n).kernel.loss for n in ("holdout", "forget"))
        attack = logistic_attack(unseen, forget, seed=evidence.protocol.seed)
        if math.isnan(attack):
            evidence.miss(f"{self.title} of {label!r} is undefined: all its losses are equal, or one is not finite.")
            return None
        right = float(evidence.outputs(label, tested(evidence)).kernel.hit.mean())
        return self.plain(evidence, "forget", kernel.nomus(right, attack), f"the attack is right in {attack:.3f} of the cases")


@metric
class TugOfWarMia(Against):
    """ToW-MIA: the tug of war with the MIA-efficacy in the place of the accuracy on the forget set."""

    name: ClassVar[str] = "tug-of-war-mia"
    title: ClassVar[str] = "Tug of war with an attack (ToW-MIA)"
    formula: ClassVar[str] = "(1 - |dMIA|)(1 - |dA_R|)(1 - |dA_T|), differences to the retrained models' means"
    direction: ClassVar[Direction] = Direction.UTILITY_UP
    paper: ClassVar[Paper] = RUM
    evaluate = staticmethod(kernel.tug_of_war_mia)

    def measure(self, evidence: Evidence, label: str) -> Number | None:
        """The product."""
        others = self.others(evidence, label)
        if not others:
            return None
        found = {n: five(evidence, n) for n in [label, *others]}
        parts = {n: (v.mia_efficacy, v.retain_accuracy, v.test_accuracy) for n, v in found.items()}
        if any(math.isnan(v) for held in parts.values() for v in held):
            evidence.miss(f"{self.title} of {label!r} is undefined: its MIA-efficacy is.")
            return None
        mia, retain, test = np.mean([parts[o] for o in others], axis=0).tolist()
        value = kernel.tug_of_war_mia(parts[label], (mia, retain, test))
        return self.plain(evidence, "forget", value, f"against the means of {len(others)} retrained models")


@metric
class RetrainFree(OfSets):
    """RF-JSD: do the forget rows of a class get the answers that the target gave to unseen rows of the class?

    It needs no retrained model, only unseen rows of the classes that the forget rows have; whole forgotten classes have none that
    would do.
    """

    name: ClassVar[str] = "retrain-free-divergence"
    title: ClassVar[str] = "Retrain-free divergence (RF-JSD)"
    formula: ClassVar[str] = "mean over classes of JS(mean p(forget rows of c) || mean p_target(unseen rows of c)), in bits"
    direction: ClassVar[Direction] = Direction.REFERENCE
    range: ClassVar[Range] = (0.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER, Need.HOLDOUT)
    paper: ClassVar[Paper] = LOTUS
    evaluate = staticmethod(kernel.retrain_free_divergence)

    def measure(self, evidence: Evidence, label: str) -> Number | None:
        """The divergence."""
        target = next(iter(evidence.labels("target")), None)
        unseen = evidence.outputs(target, tested(evidence)) if target is not None else None
        own = evidence.outputs(label, "forget")
        if target is None or unseen is None or np.setdiff1d(own.targets, unseen.targets).size:
            evidence.miss(f"{self.title} was not measured: it needs the target, and unseen rows of every class that is kept.")
            return None
        value = kernel.retrain_free_divergence(
            probabilities(own.scores), own.targets, probabilities(unseen.scores), unseen.targets
        )
        return self.plain(evidence, "forget", value, "to the target's answers to unseen rows of the same classes")
