"""Distances of a model of rows to retrained ones: margins row by row, predictions, representations."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from pydantic import Field
from scipy import special

from expunge.audit.attacks.shadows import references_of
from expunge.audit.evidence import Evidence, Values
from expunge.audit.kernel.gaps import activation_distance
from expunge.audit.kernel.iam import iam_online
from expunge.audit.kernel.klom import klom
from expunge.audit.kernel.likelihood import lira
from expunge.audit.kernel.quantities import probabilities
from expunge.audit.kernel.regression import wasserstein
from expunge.audit.kernel.representation import (
    knn_transfer,
    linear_cka,
    logit_agreement,
    representation_agreement,
    unified_score,
)
from expunge.audit.metrics.gaps import accuracies, tested
from expunge.audit.metrics.papers import BAD_TEACHER, BLINDSPOT, IAM, KLOM, LIRA, REALLY
from expunge.audit.metrics.registry import Metric, Need, Range, RecordMetric, metric
from expunge.core.access import Offer
from expunge.core.results import Direction, Number
from expunge.engine.parts import Paper

_CKA_ROWS = 4  # rows below which linear CKA is not defined
_FEW = 3  # reference models below which a scatter says nothing


class _Referenced(RecordMetric):
    """A value of each row that reads reference models."""

    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ROWS})
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER, Need.RETRAINED)

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Reference models, three at least."""
        if evidence.references is None or min(evidence.references.count) < _FEW:
            return f"it needs {_FEW} reference models or more (expunge audit RUN --references 16)"
        return ""


@metric
class LooksSeen(_Referenced):
    """LiRA, online: is the model's margin on a forget row that of models which saw the row, or of models which did not?

    The likelihood ratio of the two as a probability at even odds, mean over the forget rows: 1, they look trained on; 0, never
    seen. It is the strongest evidence there is on single rows, and the verdict reads it. Retrained models give the value that is
    wanted, which is 0.5 where seeing a row makes no difference.
    """

    name: ClassVar[str] = "looks-seen"
    title: ClassVar[str] = "Rows that look trained on (LiRA)"
    formula: ClassVar[str] = "N(phi; with the row) / (N(phi; with) + N(phi; without)), phi the logit margin; mean over rows"
    direction: ClassVar[Direction] = Direction.REFERENCE
    range: ClassVar[Range] = (0.0, 1.0)
    paper: ClassVar[Paper] = LIRA
    evaluate = staticmethod(lira)
    sets: ClassVar[tuple[str, ...] | None] = ("forget",)

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """The probability of each row."""
        held = references_of(evidence)
        shadows = np.concatenate([held.originals[name], held.retrained[name]])
        inside = np.zeros(shadows.shape, dtype=np.int64)
        inside[: len(held.originals[name])] = 1
        found = special.expit(lira(evidence.outputs(label, name).margins, shadows, inside))
        return Values(found, np.isfinite(found))


@metric
class Klom(_Referenced):
    """KLoM: divergence of the margin of each row from its distribution under retrained models.

    Of one model it is the surprise of its margin, ``-log Q(its bin)``; the value that a retrained model gets, the floor, is
    stated beside it, and it falls with the number of reference models. A good method is at the floor on every set.
    """

    name: ClassVar[str] = "klom"
    title: ClassVar[str] = "KLoM"
    formula: ClassVar[str] = "sum_b P_b log(P_b / Q_b): P of the model's margin, Q of the retrained reference models'"
    direction: ClassVar[Direction] = Direction.REFERENCE
    range: ClassVar[Range] = (None, None)
    paper: ClassVar[Paper] = KLOM
    evaluate = staticmethod(klom)

    bins: int | None = Field(
        None, ge=2, description="bins over the joint range of the margins; none: a fourth of the reference models, 2 to 20"
    )

    def direction_on(self, evidence: Evidence, name: str) -> Direction:
        """Best at the floor, on every set."""
        return Direction.REFERENCE

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """The divergence of each row."""
        held = references_of(evidence).retrained[name]
        found = klom(evidence.outputs(label, name).margins[None], held, bins=self._bins(len(held)))
        return Values(found, np.isfinite(found))

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """With the floor in the note."""
        out = super().compute(evidence, label)
        for key, number in out.items():
            name = key.partition(".")[0]
            floor = evidence.memo(("klom floor", name, self.bins), lambda name=name: self._floor(evidence, name))  # type: ignore[misc]
            count = references_of(evidence).count[0]
            note = f"floor {floor:.2f}: what one of {count} retrained models gets against the others; {self._bins(count)} bins"
            out[key] = number.model_copy(update={"note": note})
        return out

    def _floor(self, evidence: Evidence, name: str) -> float:
        margins = references_of(evidence).retrained[name]
        bins = self._bins(len(margins))
        each = [klom(margins[i : i + 1], np.delete(margins, i, axis=0), bins=bins).mean() for i in range(len(margins))]
        return float(np.mean(each))

    def _bins(self, models: int) -> int:
        """With 20 bins a dozen models leave most empty, and the floor would hide everything."""
        return self.bins or min(20, max(2, models // 4))


@metric
class Iam(_Referenced):
    """IAM: how completely each forget row looks unlearnt, between the model before (0) and models that never saw it (1)."""

    name: ClassVar[str] = "unlearning-completeness"
    title: ClassVar[str] = "Unlearning completeness (IAM)"
    formula: ClassVar[str] = "1 - sum_k a_{k+1} F_k(r) / sum_k a_{k+1}, F_k Gumbel at interpolations of the signals"
    direction: ClassVar[Direction] = Direction.REFERENCE
    range: ClassVar[Range] = (0.0, 1.0)
    paper: ClassVar[Paper] = IAM
    evaluate = staticmethod(iam_online)
    sets: ClassVar[tuple[str, ...] | None] = ("forget",)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ROWS, Offer.LOGITS})

    def lacks(self, evidence: Evidence, name: str) -> str:
        """The target model too."""
        return super().lacks(evidence, name) or ("" if evidence.labels("target") else "it needs the target model")

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """The score of each row."""
        shadows = special.expit(references_of(evidence).retrained[name])
        target = evidence.outputs(evidence.labels("target")[0], name).kernel.confidence
        found = iam_online(evidence.outputs(label, name).kernel.confidence, shadows, target)
        return Values(found, np.isfinite(found))


class _Between(Metric):
    """A distance of each set's outputs to those of the other retrained models."""

    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER, Need.RETRAINED)


@metric
class ActivationDistance(_Between):
    """Mean distance of the predicted probabilities to those of the retrained models, row by row.

    The floor is the value of the retrained models against each other, in their columns.
    """

    name: ClassVar[str] = "activation-distance"
    title: ClassVar[str] = "Activation distance"
    formula: ClassVar[str] = "mean_x ||p(x) - p_retrained(x)||_2, mean over the retrained models"
    direction: ClassVar[Direction] = Direction.REFERENCE
    range: ClassVar[Range] = (0.0, math.sqrt(2))
    paper: ClassVar[Paper] = BAD_TEACHER
    evaluate = staticmethod(activation_distance)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ROWS, Offer.LOGITS})

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """``<set>.activation-distance``."""
        out = {}
        for name in evidence.sets:
            others = self.others(evidence, label)
            if others:
                own = probabilities(evidence.outputs(label, name).scores)
                found = [activation_distance(own, probabilities(evidence.outputs(o, name).scores)) for o in others]
                out[f"{name}.{self.name}"] = self.plain(evidence, name, float(np.mean(found)), f"{len(others)} retrained models")
        return out


@metric
class Wasserstein(_Between):
    """Distance between the distributions of predicted numbers and those of the retrained models."""

    name: ClassVar[str] = "wasserstein"
    title: ClassVar[str] = "Wasserstein distance of predictions"
    formula: ClassVar[str] = "W_1(predictions, retrained predictions), in the unit of the target"
    direction: ClassVar[Direction] = Direction.REFERENCE
    range: ClassVar[Range] = (0.0, None)
    paper: ClassVar[Paper] = BLINDSPOT
    evaluate = staticmethod(wasserstein)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ROWS, Offer.NUMBERS})

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """``<set>.wasserstein``."""
        out = {}
        for name in evidence.sets:
            others = self.others(evidence, label)
            if others:
                own = evidence.outputs(label, name).scores[:, 0]
                found = [wasserstein(own, evidence.outputs(o, name).scores[:, 0]) for o in others]
                out[f"{name}.{self.name}"] = self.plain(evidence, name, float(np.mean(found)), f"{len(others)} retrained models")
        return out


@metric
class Representation(_Between):
    """Whether the features have forgotten too: similarity to the retrained models' and to the target's, and what they are worth.

    ``<set>.cka``: linear CKA of the last features with those of the retrained models, ``<set>.cka-target``: with the target's.
    ``knn``: accuracy of five nearest neighbours, fitted on the features of training rows with their true classes (the forgotten
    too), on unseen rows of the forgotten kind. ``unified``: H-LR, the harmonic mean of the agreement of outputs and of
    representations with the retrained models. A method that moves the last layer alone has good outputs, ``cka-target`` 1, and
    the target's ``knn``.
    """

    name: ClassVar[str] = "representation"
    title: ClassVar[str] = "Representation"
    formula: ClassVar[str] = "linear CKA; 5-NN accuracy; H-LR = 2 AGL AGR / (AGL + AGR)"
    direction: ClassVar[Direction] = Direction.REFERENCE
    range: ClassVar[Range] = (None, 1.0)
    paper: ClassVar[Paper] = REALLY
    evaluate = staticmethod(linear_cka)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ROWS, Offer.LOGITS, Offer.FEATURES})

    rows: int = Field(2000, ge=50, description="rows per set at most, drawn with the protocol's seed")

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """See the class."""
        others, target = self.others(evidence, label), evidence.labels("target")
        out: dict[str, Number] = {}
        for name in evidence.sets:
            if len(evidence.records(name)) < _CKA_ROWS:
                evidence.miss(f"CKA was not measured on {name}: it needs {_CKA_ROWS} rows.")
                continue
            if others:
                similar = float(np.mean([self._cka(evidence, label, o, name) for o in others]))
                out[f"{name}.cka"] = self.plain(evidence, name, similar, f"with {len(others)} retrained models")
            if target and target[0] != label:
                similar = self._cka(evidence, label, target[0], name)
                out[f"{name}.cka-target"] = self.plain(evidence, name, similar, "1 = the features have not moved")
        if "holdout" in evidence.sets and len(evidence.records("holdout")) < _CKA_ROWS:
            evidence.miss(f"{self.title} on unseen rows was not measured: it needs {_CKA_ROWS} of them.")
        elif "retain" in evidence.sets and "holdout" in evidence.sets:
            own = self._knn(evidence, label)
            out["knn"] = self.plain(evidence, "holdout", own, "5 nearest neighbours in the features, on unseen rows")
            if others:
                value = float(np.mean([self._unified(evidence, label, o, own) for o in others]))
                out["unified"] = self.plain(evidence, "forget", value, f"H-LR against {len(others)} retrained models")
        return out

    def _chosen(self, n: int, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """Indices of the rows that are read."""
        return np.arange(n) if n <= self.rows else np.random.default_rng(seed).choice(n, self.rows, replace=False)

    def _cka(self, evidence: Evidence, label: str, other: str, name: str) -> float:
        prints = sorted((evidence.subject(label).fingerprint, evidence.subject(other).fingerprint))

        def make() -> float:
            rows = self._chosen(len(evidence.records(name)), evidence.protocol.seed)
            x, y = (evidence.outputs(m, name).features[rows] for m in (label, other))
            return linear_cka(x, y, unbiased=len(x) < 4 * max(x.shape[1], y.shape[1]))

        return evidence.memo(("cka", *prints, name), make)

    def _knn(self, evidence: Evidence, label: str) -> float:
        def make() -> float:
            chosen = {n: self._chosen(len(evidence.records(n)), evidence.protocol.seed) for n in ("forget", "retain")}
            held = {n: evidence.outputs(label, n) for n in chosen}
            train = np.concatenate([held[n].features[rows] for n, rows in chosen.items()])
            labels = np.concatenate([held[n].targets[rows] for n, rows in chosen.items()])
            test = evidence.outputs(label, "holdout")
            return knn_transfer(train, labels, test.features, test.targets)

        return evidence.memo(("knn", evidence.subject(label).fingerprint), make)

    def _unified(self, evidence: Evidence, label: str, other: str, own: float) -> float:
        names = ("forget", "retain", tested(evidence))
        agl = logit_agreement(
            dict(zip(names, accuracies(evidence, label), strict=True)), dict(zip(names, accuracies(evidence, other), strict=True))
        )
        agr = representation_agreement([own], [self._knn(evidence, other)], [self._cka(evidence, label, other, "holdout")])
        return unified_score(agl, agr)
