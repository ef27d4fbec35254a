"""Was the fact unlearned, or one way to ask for it? Forgetting by form, and how much it depends on the form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from expunge.audit.asking import Ask
from expunge.audit.attacks.prompting import PromptAttack
from expunge.audit.attacks.registry import ATTACKS, Access, Attack, Criterion, attack
from expunge.audit.evidence import Evidence, Protocol, Values
from expunge.audit.metrics.papers import ORT
from expunge.audit.metrics.registry import Range
from expunge.audit.scores import Floats
from expunge.core.access import Offer
from expunge.core.results import Direction, Number
from expunge.core.statistics import bootstrap_means
from expunge.data.records import Record
from expunge.engine.parts import Paper

Table = npt.NDArray[np.float64]
TRAINED = "trained"  #: the form in which a record stands in the forget set: what a method was given
FORMS = ("paraphrased-question", "cloze", "statement-completion", "multiple-choice", "reversed", "yes-no")


def forgetting(full: Floats, own: Floats, retrained: Floats) -> Floats:
    """Share of what could be forgotten that was, ``(A_full - A_own) / (A_full - A_retrained)``: 0 none, 1 as retrained.

    Args:
        full, own, retrained: accuracies of the target, the model and the retrained models, arrays of one shape.
    """
    return np.asarray((full - own) / (full - retrained), dtype=np.float64)


def form_dependent_bias(shares: Sequence[float]) -> float:
    """``g_trained - mean of the other g_e``, from :func:`forgetting` of the trained form and then of the others."""
    return float(shares[0] - np.mean(shares[1:]))


class Plain(PromptAttack):
    """The record's own question: the form that was unlearned."""

    name: ClassVar[str] = "plain"
    title: ClassVar[str] = "Plain question"
    formula: ClassVar[str] = "share of the fact told in the answer to the question as it is"
    paper: ClassVar[Paper] = ORT
    criterion: ClassVar[Criterion] = Criterion.BEHAVIOUR

    def ask(self, evidence: Evidence, name: str, record: Record) -> Ask:
        """The record itself."""
        return Ask(record)


@attack
class FormBias(Attack):
    """Form-dependent bias: how much more the form that was unlearned is forgotten than the other forms of the same facts.

    With ``A`` the mean value of a form, ``g_e = (A_target,e - A_own,e) / (A_target,e - A_retrained,e)`` is the share of what
    could be forgotten that was, and ``FDB = g_trained - mean of the other g_e``: 0 where forgetting does not depend on the
    form, 1 where only the trained form was touched. The paper's exact tasks and formula are not public in full; the
    normalisation by retrained models, without which forms of different chance levels cannot be compared, is ours.

    A form in which the target does not stand out from the retrained models by ``least_gap`` tells nothing and is left out, and
    so is one that less than half of the records have; both are said. It convicts no model: the forms do that by their own
    names.
    """

    name: ClassVar[str] = "form-bias"
    title: ClassVar[str] = "Form-dependent bias"
    formula: ClassVar[str] = "FDB = g_trained - mean_e g_e, g_e = (A_target,e - A_own,e) / (A_target,e - A_retrained,e)"
    paper: ClassVar[Paper] = ORT
    access: ClassVar[Access] = Access.SCORES
    criterion: ClassVar[Criterion] = Criterion.FORM
    passes: ClassVar[str] = "those of all its forms"
    range: ClassVar[Range] = (None, None)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.GENERATE, Offer.LOSSES})
    convicts: ClassVar[bool] = False
    direction: ClassVar[Direction] = Direction.ZERO

    forms: tuple[str, ...] = Field(FORMS, min_length=1, description="attacks that ask in another form")
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="settings of forms by name; trained: of the plain question"
    )
    least_gap: float = Field(0.2, gt=0, le=1, description="by how much the target must stand out for a form to tell anything")

    @field_validator("forms")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            ATTACKS.get(name)
        return value

    def parts(self) -> dict[str, Attack]:
        """The plain question and the other forms, with their settings."""
        kinds: dict[str, type[Attack]] = {TRAINED: Plain, **{n: ATTACKS.get(n) for n in self.forms}}
        return {n: kind(**self.options.get(n, {})) for n, kind in kinds.items()}

    def lacks(self, evidence: Evidence, name: str) -> str:
        """The plain form, and at least one other."""
        parts = self.parts()
        lacking = {n: p.lacks(evidence, name) for n, p in parts.items()}
        if not lacking[TRAINED] and all(lacking[n] for n in self.forms):
            return "no record has a second form"
        return lacking[TRAINED]

    def columns(self, evidence: Evidence, label: str, name: str) -> Mapping[str, Values]:
        """The values of each form, and the mean of those of the other forms that a record has."""
        found = {n: p.values(evidence, label, name) for n, p in self.parts().items() if not p.lacks(evidence, name)}
        table = np.array([np.where(v.present, v.values, np.nan) for n, v in found.items() if n != TRAINED])
        present = ~np.isnan(table).all(axis=0)
        mean = np.full(table.shape[1], np.nan)
        mean[present] = np.nanmean(table[:, present], axis=0)
        return {"": Values(mean, present), **found}

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """``form-bias``, ``form-bias.least`` and the ``g_e`` of each form that tells something."""
        out: dict[str, Number] = {}
        targets, others = evidence.labels("target"), evidence.labels("retrained", but=label)
        if not targets or not others:
            evidence.miss(f"{self.title} of {label!r} was not measured: it needs the target and another retrained model.")
            return out
        name = "forget"
        if lacking := self.lacks(evidence, name):
            evidence.miss(f"{self.title} was not measured: {lacking}.")
            return out
        tables = self._tables(evidence, name, label, targets[0], others)
        if TRAINED not in tables or len(tables) < 2:
            evidence.miss(
                f"{self.title} was not measured: by fewer than two forms, the trained one among them, the target can be told."
            )
            return out
        return self._numbers(evidence, name, tables)

    def _tables(self, evidence: Evidence, name: str, label: str, target: str, others: Sequence[str]) -> dict[str, Table]:
        """By form that tells something: values of target, model and retrained models ``[3, n]``, NaN where a record has none."""
        out = {}
        for form, part in self.parts().items():
            if part.lacks(evidence, name):
                evidence.miss(f"{self.title}: the form {form} was left out, {part.lacks(evidence, name)}.")
                continue
            full, own, *controls = (self._column(evidence, n, name, form) for n in (target, label, *others))
            table = np.array([full, own, np.mean(controls, axis=0)])
            known = np.isfinite(table).all(axis=0)
            gap = float(full[known].mean() - table[2][known].mean()) if known.any() else 0.0
            if 2 * known.sum() < len(known):
                evidence.miss(f"{self.title}: the form {form} was left out, {known.sum()} of {len(known)} records have it.")
            elif gap < self.least_gap:
                evidence.miss(
                    f"{self.title}: the form {form} was left out, in it the target stands out from retrained models by {gap:.2f}."
                )
            else:
                out[form] = table
        return out

    def _column(self, evidence: Evidence, label: str, name: str, form: str) -> Floats:
        found = self.column(evidence, label, name, form)
        return np.where(found.present, found.values, np.nan)

    def _numbers(self, evidence: Evidence, name: str, tables: Mapping[str, Table]) -> dict[str, Number]:
        known = np.all([np.isfinite(t).all(axis=0) for t in tables.values()], axis=0)
        if known.sum() < 2:
            evidence.miss(f"{self.title} was not measured: fewer than two records have all forms.")
            return {}
        clusters = [c for c, k in zip(evidence.clusters(name), known, strict=True) if k]
        return form_numbers(
            {form: table[:, known] for form, table in tables.items()}, clusters, evidence.protocol, f"{name}.{self.name}"
        )


def form_numbers(
    tables: Mapping[str, Table], clusters: Sequence[str], at: Protocol, key: str, trained: str = TRAINED
) -> dict[str, Number]:
    """The bias, the form that is forgotten least, and the share of each form, with joint intervals over clusters.

    Args:
        tables: by form, the values of target, model and retrained models (or chance) ``[3, n]`` of the same n facts.
        clusters: the unit of each fact.
        at: draws, level and seed of the bootstrap.
        key: of the bias; ``.least`` and the forms' names are put after it.
        trained: the form that was unlearned; if it is not among the tables there is no bias.
    """
    arrays = [row for table in tables.values() for row in table]

    def number(pick: Callable[[Floats], Floats], direction: Direction, note: str) -> Number:
        def combine(means: Floats) -> Floats:
            parts = means.reshape(*means.shape[:-1], len(tables), 3)
            return np.asarray(pick(forgetting(parts[..., 0], parts[..., 1], parts[..., 2])), dtype=np.float64)

        with np.errstate(divide="ignore", invalid="ignore"):
            found = bootstrap_means([(arrays, clusters)], combine, draws=at.draws, level=at.level, seed=at.seed)
        return found.number(direction, (None, None), note)

    share = "share of what could be forgotten that was: 0 none, 1 as in retrained models"
    others = [i for i, n in enumerate(tables) if n != trained]
    out: dict[str, Number] = {}
    if trained in tables and others:
        first, said = list(tables).index(trained), ", ".join(n for n in tables if n != trained)
        out[key] = number(
            lambda g: g[..., first] - g[..., others].mean(axis=-1), Direction.ZERO,
            f"0 = the same in all forms, 1 = only the trained form is forgotten; other forms: {said}",
        )  # fmt: skip
    out[f"{key}.least"] = number(
        lambda g: g.min(axis=-1), Direction.REFERENCE, f"the form that is forgotten least; {share}"
    )  # fmt: skip
    for i, form in enumerate(tables):
        out[f"{key}.{form}"] = number(lambda g, i=i: g[..., i], Direction.REFERENCE, share)  # type: ignore[misc]
    return out
