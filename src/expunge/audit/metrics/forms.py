"""Facts in several forms: what a model tells in each, and how much more is forgotten in the form that was unlearned."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from expunge.audit.attacks.form_bias import Table, form_dependent_bias, form_numbers
from expunge.audit.evidence import Evidence, Values
from expunge.audit.facts import tells
from expunge.audit.metrics.choices import OptionAccuracy
from expunge.audit.metrics.papers import ORT
from expunge.audit.metrics.registry import Metric, Need, Range, RecordMetric, metric
from expunge.audit.metrics.rouge import answers, lacks_questions
from expunge.core.access import Offer
from expunge.core.results import Direction, Number
from expunge.engine.parts import Paper

Answered = Literal["words", "choice"]


@metric
class FactTold(RecordMetric):
    """Share of the words that carry a fact which the greedy answer tells.

    Words of the answer that the question gives away, that pure grammar needs, or that most wrong answers have too do not count:
    a fluent sentence about something else is 0 (ROUGE would reward it). Right words in any order are 1.
    """

    name: ClassVar[str] = "fact-told"
    title: ClassVar[str] = "Fact told"
    formula: ClassVar[str] = "words of the fact that the answer says / words of the fact; mean over records"
    direction: ClassVar[Direction] = Direction.FORGET_DOWN
    range: ClassVar[Range] = (0.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.GENERATION,)
    paper: ClassVar[Paper] = ORT
    evaluate = staticmethod(tells)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.GENERATE})
    on_request: ClassVar[bool] = True

    max_new_tokens: int = Field(64, ge=1, description="longest answer in tokens")
    stops: tuple[str, ...] = Field(("\n",), description="texts at which an answer is cut")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """A prompt; the holdout set is not asked."""
        return "answers are generated for other sets only" if name == "holdout" else lacks_questions(evidence, name)

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """Of each record's answer."""
        made = answers(evidence, label, name, self.max_new_tokens, stops=self.stops)
        values = np.array([tells(r, text) for r, text in zip(evidence.records(name), made, strict=True)])
        return Values(values, np.ones(len(values), dtype=bool))


@metric
class FormForgetting(Metric):
    """How much of the same facts is forgotten in each form, and how much that depends on the form that was unlearned.

    Every set is one form; records of one fact have ids that are equal before their last ``@``. With ``A`` the accuracy in a form,
    ``g_e = (A_target - A_own) / (A_target - A_reference)``, where the reference is the mean of the retrained models, or chance
    where there is none: 0 in words, 1/k among k options. ``FDB = g_trained - mean of the other g_e`` is 0 where forgetting does
    not depend on the form and 1 where only the trained form was touched; ``least`` is the smallest ``g_e``. A form in which the
    target does not stand out from the reference by ``least_gap`` tells nothing and is left out, which is said. After ORT (2025);
    its exact tasks and formula are not public in full, and the normalisation is ours. Damage forgets all forms alike: read it
    beside what is kept.
    """

    name: ClassVar[str] = "form-forgetting"
    title: ClassVar[str] = "Forgetting by form"
    formula: ClassVar[str] = "FDB = g_trained - mean_e g_e, g_e = (A_target,e - A_own,e) / (A_target,e - A_reference,e)"
    direction: ClassVar[Direction] = Direction.ZERO
    range: ClassVar[Range] = (None, None)
    needs: ClassVar[tuple[Need, ...]] = (Need.GENERATION, Need.PERTURBED)
    paper: ClassVar[Paper] = ORT
    evaluate = staticmethod(form_dependent_bias)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.GENERATE, Offer.LOSSES})
    on_request: ClassVar[bool] = True

    trained: str = Field("question", description="the form in which the facts were unlearned")
    choices: tuple[str, ...] = Field((), description="forms that are answered by a choice among the record's options")
    least_gap: float = Field(0.2, gt=0, le=1, description="by how much the target must stand out for a form to tell anything")
    max_new_tokens: int = Field(64, ge=1, description="longest answer in tokens")

    def accuracy(self, evidence: Evidence, label: str, form: str) -> Values:
        """What a model knows of each fact in a form, in [0, 1]."""
        if form in self.choices:
            return OptionAccuracy(over="mean").values(evidence, label, form)
        return FactTold(max_new_tokens=self.max_new_tokens).values(evidence, label, form)

    def visit(self, evidence: Evidence, label: str) -> None:
        """All forms, while the model is in memory."""
        for form in evidence.sets:
            self.accuracy(evidence, label, form)

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """``form-forgetting``, ``.least``, and one number for each form that tells something."""
        targets, others = evidence.labels("target"), evidence.labels("retrained", but=label)
        if not targets:
            evidence.miss(f"{self.title} was not measured: it needs the target model.")
            return {}
        if evidence.subject(label).role == "retrained" and not others:
            evidence.miss(f"{self.title} of {label!r} was not measured: it needs another retrained model.")
            return {}
        facts, out, tables = self._facts(evidence), {}, {}
        for form in evidence.sets:
            table = self._table(evidence, form, facts, (targets[0], label, *others))
            if reason := self._tells_nothing(table, "retrained models" if others else "chance"):
                evidence.miss(f"{self.title}: the form {form} was left out, {reason}.")
                out[f"{self.name}.{form}"] = self._none(f"the form was left out: {reason}")
            else:
                tables[form] = table
        known = np.all([np.isfinite(t).all(axis=0) for t in tables.values()], axis=0) if tables else np.zeros(0)
        if known.sum() < 2:
            why = "fewer than two facts have all forms in which the target stands out"
            out |= {k: self._none(why) for k in (self.name, f"{self.name}.least", *(f"{self.name}.{f}" for f in tables))}
            return out
        if self.trained not in tables or len(tables) < 2:
            out[self.name] = self._none("by fewer than two forms, the trained one among them, the target can be told")
        clusters = [c for c, k in zip(facts.values(), known, strict=True) if k]
        kept = {form: t[:, known] for form, t in tables.items()}
        return out | form_numbers(kept, clusters, evidence.protocol, self.name, self.trained)

    def _none(self, why: str) -> Number:
        return Number(value=None, direction=self.direction, range=self.range, note=why)

    def _tells_nothing(self, table: Table, what: str) -> str:
        """Why a form is left out; nothing if it is not."""
        known = np.all(np.isfinite(table), axis=0)
        count, every = int(np.sum(known)), table.shape[1]
        if 2 * count < every:
            return f"{count} of {every} facts have it"
        gap = float(table[0, known].mean() - table[2, known].mean())
        return "" if gap >= self.least_gap else f"in it the target stands out from {what} by {gap:.2f}"

    def _facts(self, evidence: Evidence) -> dict[str, str]:
        """The cluster of each fact that any form has, by the part of its id before the form."""
        return {_fact(r.id): r.cluster for form in evidence.sets for r in evidence.records(form)}

    def _table(self, evidence: Evidence, form: str, facts: dict[str, str], labels: tuple[str, ...]) -> Table:
        """Target, model and reference ``[3, facts]``, NaN where a fact has not this form."""
        place = {fact: i for i, fact in enumerate(facts)}
        at = [place[_fact(r.id)] for r in evidence.records(form)]
        rows = []
        for label in labels:
            found = self.accuracy(evidence, label, form)
            row = np.full(len(facts), np.nan)
            row[at] = np.where(found.present, found.values, np.nan)
            rows.append(row)
        if len(rows) > 2:
            return np.array([rows[0], rows[1], np.mean(rows[2:], axis=0)])
        chance = np.full(len(facts), np.nan)
        chance[at] = [1 / (1 + len(r.perturbed)) if form in self.choices else 0.0 for r in evidence.records(form)]
        return np.array([rows[0], rows[1], chance])


def _fact(name: str) -> str:
    return name.rpartition("@")[0] or name
