"""Measures on many models that were unlearned in the same way, against as many retrained ones: U-LiRA, forgetting quality, KLoM.

They are about the method, not about one model: can a model that has forgotten a row be told from one that never saw it?
"""

from __future__ import annotations

import abc
from typing import ClassVar

import numpy as np
from pydantic import Field

from expunge.audit.attacks.shadows import references_of
from expunge.audit.evidence import Evidence, Values
from expunge.audit.kernel import forgetting as kernel
from expunge.audit.kernel.klom import klom
from expunge.audit.kernel.likelihood import u_lira
from expunge.audit.metrics.gaps import accuracies, tested
from expunge.audit.metrics.papers import COMPETITION, KLOM, U_LIRA
from expunge.audit.metrics.registry import Need, Range, RecordMetric, metric
from expunge.audit.scores import Floats
from expunge.core.access import Offer
from expunge.core.results import Direction, Number
from expunge.engine.parts import Paper

_FEW = 3  #: models of each kind below which nothing can be said


class Population(RecordMetric):
    """A value of each row from the margins of many unlearned and of many retrained models.

    The floor is what retrained models get against other retrained models, from two halves of them: with fewer models than the
    measure itself has.
    """

    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ROWS})
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER,)
    direction: ClassVar[Direction] = Direction.REFERENCE

    @abc.abstractmethod
    def of(self, unlearned: Floats, retrained: Floats) -> Floats:
        """One value per row from margins ``[models, n]``."""

    def direction_on(self, evidence: Evidence, name: str) -> Direction:
        """Best at the floor, on every set."""
        return self.direction

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Retrained reference models."""
        enough = evidence.references is not None and evidence.references.count[0] >= _FEW
        return "" if enough else "it needs reference models (expunge audit RUN --references 16 --repeats 16)"

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """The value of each row."""
        held = references_of(evidence)
        found = self.of(held.unlearned[label][name], held.retrained[name])
        return Values(found, ~np.isnan(found))

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """With the floor in the note."""
        held = evidence.references
        many = None if held is None else held.unlearned.get(label)
        if held is None or many is None or len(next(iter(many.values()))) < _FEW:
            if evidence.subject(label).role == "unlearned":
                evidence.miss(
                    f"{self.title} of {label!r} was not measured: it needs {_FEW} models or more that were unlearned in the same "
                    "way (expunge audit RUN --references 16 --repeats 16)."
                )
            return {}
        out = super().compute(evidence, label)
        for key, number in out.items():
            models = len(next(iter(many.values())))
            said = f"of {models} models, against {held.count[0]} retrained"
            note = "; ".join(part for part in (said, self._floor(evidence, key.partition(".")[0]), number.note) if part)
            out[key] = number.model_copy(update={"note": note})
        return out

    def _floor(self, evidence: Evidence, name: str) -> str:
        margins = references_of(evidence).retrained[name]
        if len(margins) < 2 * _FEW:
            return ""
        found = evidence.memo(
            ("population floor", self.name, self.model_dump_json(), name),
            lambda: float(np.nanmean(self.of(margins[::2], margins[1::2]))),
        )
        return f"retrained against retrained (halves of them): {found:.2f}"


@metric
class ULira(Population):
    """U-LiRA: how often is a held-out model rightly told to have unlearned a forget row, or never to have had it?

    0.5: it cannot be told; towards 1 the row is remembered, or treated so that it shows.
    """

    name: ClassVar[str] = "u-lira"
    title: ClassVar[str] = "U-LiRA"
    formula: ClassVar[str] = "share of held-out models given to the likelier Gaussian of logit margins, unlearned or retrained"
    range: ClassVar[Range] = (0.0, 1.0)
    paper: ClassVar[Paper] = U_LIRA
    evaluate = staticmethod(u_lira)
    sets: ClassVar[tuple[str, ...] | None] = ("forget",)

    def of(self, unlearned: Floats, retrained: Floats) -> Floats:
        """Accuracy over models of each row."""
        return u_lira(unlearned, retrained).per_example


@metric
class ForgettingQuality(Population):
    """Forgetting quality of the NeurIPS 2023 competition: an empirical epsilon of each row, in bins that halve the score.

    In (0, 1], higher is better, and retrained models are below 1 too: see the floor. ``competition-score`` multiplies it with
    the unlearned model's retain and test accuracies as shares of the retrained models'.
    """

    name: ClassVar[str] = "forgetting-quality"
    title: ClassVar[str] = "Forgetting quality (NeurIPS 2023)"
    formula: ClassVar[str] = (
        "mean_s 2 / 2^n(s), n: bin of eps_s = max over rules of log((1 - delta - FPR) / FNR), or with both exchanged"
    )
    range: ClassVar[Range] = (0.0, 1.0)
    paper: ClassVar[Paper] = COMPETITION
    evaluate = staticmethod(kernel.forgetting_quality)
    sets: ClassVar[tuple[str, ...] | None] = ("forget",)

    delta: float = Field(1e-5, ge=0, lt=1, description="of the (epsilon, delta) definition")

    def of(self, unlearned: Floats, retrained: Floats) -> Floats:
        """The score of each row."""
        return kernel.forgetting_scores(kernel.forgetting_epsilon(unlearned, retrained, delta=self.delta))

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """And the competition's final score."""
        out = super().compute(evidence, label)
        quality = out.get(f"forget.{self.name}")
        others = evidence.labels("retrained", but=label)
        if quality is None or quality.value is None or not others or Offer.LOGITS not in evidence.offers or not tested(evidence):
            return out
        mine = accuracies(evidence, label)
        theirs = np.mean([accuracies(evidence, o) for o in others], axis=0).tolist()
        if min(theirs[1:]) > 0:
            value = kernel.competition_score(quality.value, (mine[1], theirs[1]), (mine[2], theirs[2]))
            note = f"times retain and test accuracy over those of {len(others)} retrained models"
            out["competition-score"] = Number(
                value=value, over="none", n=quality.n, direction=self.direction, range=(0.0, None), note=note
            ).checked()
        return out


@metric
class KlomOfModels(Population):
    """KLoM as published: the margins of many unlearned models against those of retrained ones, row by row, on every set."""

    name: ClassVar[str] = "klom-models"
    title: ClassVar[str] = "KLoM of many models"
    formula: ClassVar[str] = "sum_b P_b log(P_b / Q_b): P of the unlearned models' margins, Q of the retrained ones'"
    range: ClassVar[Range] = (None, None)
    paper: ClassVar[Paper] = KLOM
    evaluate = staticmethod(klom)

    bins: int = Field(20, ge=2, description="bins over the joint range of the margins; the floor falls with fewer")

    def of(self, unlearned: Floats, retrained: Floats) -> Floats:
        """The divergence of each row."""
        return klom(unlearned, retrained, bins=self.bins)
