"""Relearning in other ways than an audit's own: on data that holds nothing of the forgotten, and through a LoRA alone.

An audit relearns one half of the forget set and measures the other (:mod:`~expunge.audit.attacks.relearn`). The attacks here
train on retain data (benign fine-tuning), on another set that is given (related public text), or on the half again, but only
a LoRA. The step sizes are the same for all models, from the target, at three rates. What counts is the loss of the forget
answers at the attacker's best point, the step and rate with the lowest mean; retrained models have the same choice.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from expunge.adapters.base import Adapter, Example
from expunge.audit.attacks.inside import kept, target_of
from expunge.audit.attacks.quantise import merged
from expunge.audit.attacks.registry import Access, Attack, Criterion, attack
from expunge.audit.attacks.relearn import RelearnPoint, RelearnSettings, packed, recovered, relearn, unpacked
from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.papers import JOG
from expunge.audit.metrics.registry import Range
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.core.results import Direction, Number
from expunge.engine.parameters import Lora
from expunge.engine.parts import Paper, Parameters

_LORA_FASTER = 10.0  # a LoRA is usually trained at about ten times the rate of all weights


class RelearnAttack(Attack):
    """A little training of a copy, and the loss of forget answers that were not trained on.

    A subclass says what is trained on (:meth:`material`) and what moves (:meth:`parameters`).
    """

    criterion: ClassVar[Criterion] = Criterion.RELEARNING
    access: ClassVar[Access] = Access.WEIGHTS
    copies: ClassVar[bool] = True
    toward: ClassVar[Literal[1, -1]] = -1
    range: ClassVar[Range] = (0.0, None)
    formula: ClassVar[str] = "NLL of forget answers that were not trained on, at the step and rate with the lowest mean"
    paper: ClassVar[Paper] = JOG
    passes: ClassVar[str] = "3 rates x (20 training steps, 6 measurements)"
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.LOSSES})

    steps: tuple[int, ...] = Field((1, 2, 5, 10, 20), description="optimiser steps at which the loss is measured, ascending")
    batch: int = Field(16, ge=1, description="examples per step")
    relative: tuple[float, ...] = Field(
        (0.1, 0.2, 0.4), description="changes of a layer's output by one step, relative to its size, from which the rates follow"
    )
    examples: int = Field(256, ge=2, description="examples to train on at most, the first ones")

    @abc.abstractmethod
    def material(self, evidence: Evidence) -> str:
        """The set that is trained on; ``forget``: one half of it, and the other is measured."""

    def parameters(self) -> Parameters | None:
        """What moves; none: everything."""
        return None

    def lacks(self, evidence: Evidence, name: str) -> str:
        """A target, from which the rates follow; the set to train on; two forget records."""
        if not target_of(evidence):
            return "it needs the target model, from which the step sizes follow"
        if self.material(evidence) not in evidence.sets:
            return f"it trains on the set {self.material(evidence)!r}, which this audit does not have"
        return "" if len(evidence.records(name)) > 1 else "it needs two forget records"

    def depends(self, evidence: Evidence, label: str) -> Mapping[str, Any]:
        """The target, which gives the rates."""
        return {"target": evidence.subject(target_of(evidence)).fingerprint}

    def budget(self, evidence: Evidence) -> RelearnSettings:
        """Steps and rates, the same for all models of an audit."""
        held = RelearnSettings(
            steps=self.steps, batch=self.batch, relative=self.relative, max_tokens=max(64, evidence.protocol.batch_tokens),
            material="forget-half" if self.material(evidence) == "forget" else "retain",
        )  # fmt: skip
        target = target_of(evidence)
        key = ("relearning rates", evidence.subject(target).fingerprint, self.relative)
        rates = evidence.memo(key, lambda: held.resolved(evidence.adapter(target)).rates)
        faster = 1.0 if self.parameters() is None else _LORA_FASTER
        return held.model_copy(update={"rates": tuple(r * faster for r in rates)})

    def curve(self, evidence: Evidence, label: str, name: str) -> list[RelearnPoint]:
        """The losses along the way; none where the model cannot be trained in this way."""

        def make() -> Mapping[str, Any]:
            budget = self.budget(evidence)
            adapter = evidence.adapter(label)
            adapter = adapter if self.parameters() is None else merged(adapter)
            records = list(evidence.records(self.material(evidence)))[: self.examples]
            forget = _encoded(adapter, evidence.records(name))
            retain = None if budget.material == "forget-half" else _encoded(adapter, records)
            try:
                return packed(relearn(adapter, forget, retain, budget, evidence.protocol.seed, parameters=self.parameters()))
            except InputError as error:
                evidence.miss(f"{self.title} was not tried on {label!r}: {error.message}")
                return {"step": np.zeros(0)}

        held = kept(self, evidence, label, name, part="curve", make=make)
        return unpacked(held) if len(held["step"]) else []

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """Loss of each forget answer that was not trained on, at the attacker's best point."""
        points = self.curve(evidence, label, name)
        values = np.full(len(evidence.records(name)), np.nan)
        if points:
            best = best_point(points)
            place = {record.id: i for i, record in enumerate(evidence.records(name))}
            values[[place[i] for i in best.ids_heldout]] = best.losses_heldout
        return Values(values, ~np.isnan(values))

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The loss, the area under the recovered share, and the steps after which 50 % and 90 % are back."""
        out = super().compute(evidence, label)
        target, name = target_of(evidence), "forget"
        others = [c for o in evidence.labels("retrained", but=label) if (c := self.curve(evidence, o, name))]
        own = self.curve(evidence, label, name) if f"{name}.{self.name}" in out else []
        full = self.curve(evidence, target, name) if own else []
        if not (own and full and others):
            return out
        known = dict(zip(full[0].ids_heldout, full[0].losses_heldout.tolist(), strict=True))
        at = evidence.protocol
        shares = [r.share.value for r in recovered(own, others, known, draws=100, level=at.level, seed=at.seed)]
        note = "mean over the steps of the share recovered beyond retrained models, at the best rate"
        out[f"{name}.{self.name}.area"] = self.plain(evidence, name, area(own, shares), note).model_copy(
            update={"range": (None, None), "direction": Direction.ZERO}
        )
        for percent in (50, 90):
            level = self._level(full, others, percent / 100)
            needed = [steps_to(c, level) for c in (own, *others)]
            told = ", ".join("never" if n is None else str(n) for n in needed[1:])
            note = f"steps until {percent} % of what the target knows is back (of {self.steps[-1]}); retrained models: {told}"
            out[f"{name}.{self.name}.steps-{percent}"] = Number(
                value=needed[0],
                over="none",
                n=len(own[0].ids_heldout),
                direction=Direction.REFERENCE,
                range=(0.0, None),
                note=note,
            ).checked()
        return out

    @staticmethod
    def _level(full: Sequence[RelearnPoint], others: Sequence[Sequence[RelearnPoint]], share: float) -> float:
        """The loss at which ``share`` of the way from retrained models to the target is gone."""
        start = float(np.mean([c[0].losses_heldout for c in others]))
        return start - share * (start - float(full[0].losses_heldout.mean()))


def best_point(points: Sequence[RelearnPoint]) -> RelearnPoint:
    """The point with the lowest finite mean loss of what was not trained on; the first if none is finite."""
    means = [float(p.losses_heldout.mean()) for p in points]
    usable = [(m, i) for i, m in enumerate(means) if np.isfinite(m)]
    return points[min(usable)[1]] if usable else points[0]


def steps_to(points: Sequence[RelearnPoint], level: float) -> int | None:
    """The fewest recorded steps, at any rate, after which the mean loss is at most ``level``; none if it never is."""
    found = [p.step for p in points if float(p.losses_heldout.mean()) <= level]
    return min(found, default=None)


def area(points: Sequence[RelearnPoint], shares: Sequence[float]) -> float:
    """The mean of a share over the steps (trapezoids), at the rate where it is largest.

    Args:
        points: one per share, by rate and step.
        shares: recovered at each point.
    """
    out = []
    for lr in dict.fromkeys(p.lr for p in points):
        chosen = [(p.step, s) for p, s in zip(points, shares, strict=True) if p.lr == lr]
        x, y = np.array(chosen).T
        out.append(float(np.trapezoid(y, x) / (x[-1] - x[0])))
    return max(out)


def _encoded(adapter: Adapter, records: Sequence[Any]) -> list[Example]:
    return [adapter.encode(r) for r in records]


@attack
class BenignRelearning(RelearnAttack):
    """Fine-tuning a copy on retain data, which says nothing of the forgotten: does it come back all the same?

    What was only hidden can return when a model is trained on anything (Lucki et al. 2024; Hu et al. 2024). Nothing about the
    forget set is in the training data, so nothing can be learnt of it.
    """

    name: ClassVar[str] = "relearn-retain"
    title: ClassVar[str] = "Relearning on retain data"

    def material(self, evidence: Evidence) -> str:
        """The retain set."""
        return "retain"


@attack
class RelatedRelearning(RelearnAttack):
    """Fine-tuning a copy on another set of this audit: related text that is public, or facts about other subjects.

    By default the holdout set, which has the form of the forget set and is about others (Hu et al. 2024 use public text about
    the topic: give it as a set of its own and name it).
    """

    name: ClassVar[str] = "relearn-related"
    title: ClassVar[str] = "Relearning on related data"

    data: str = Field("holdout", min_length=1, description="the set to train on, as the audit calls it; never the forget set")

    def material(self, evidence: Evidence) -> str:
        """The named set."""
        return self.data

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Another set than the one that is measured."""
        return "it cannot train on the set that it measures" if self.data == name else super().lacks(evidence, name)


@attack
class LoraRelearning(RelearnAttack):
    """Relearning one half of the forget set by a LoRA alone, measured on the other half.

    What the cheapest attacker can do. The rates are ten times those of all weights, as is usual for a LoRA.
    """

    name: ClassVar[str] = "relearn-lora"
    title: ClassVar[str] = "Relearning by LoRA"

    rank: int = Field(8, ge=1, le=1024, description="rank of the LoRA")

    def material(self, evidence: Evidence) -> str:
        """One half of the forget set."""
        return "forget"

    def parameters(self) -> Parameters | None:
        """A LoRA on all linear modules."""
        return Lora(rank=self.rank, alpha=2.0 * self.rank)
