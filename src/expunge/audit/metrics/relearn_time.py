"""How soon a model is as good again on the forget set as before, when it is trained on all rows: relearn time, and AIN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import nn

from expunge.adapters.base import Adapter, Example
from expunge.adapters.passes import evaluating
from expunge.audit.attacks.relearn import rate, relearning
from expunge.audit.evidence import Evidence
from expunge.audit.kernel.gaps import regain_steps, relearn_ratio, relearn_steps
from expunge.audit.metrics.papers import BLINDSPOT
from expunge.audit.metrics.registry import Metric, Need, Range, metric
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError
from expunge.core.results import Direction, Number
from expunge.engine.gradients import fitting
from expunge.engine.loop import train
from expunge.engine.objective import mean_losses
from expunge.engine.options import Engine
from expunge.engine.parts import Paper
from expunge.engine.schedule import Fixed


class _Back(Exception):
    """The model is as good on the forget set as the target was."""


@metric
class RelearnTime(Metric):
    """Steps of training on all rows until a copy is as good on the forget set as the target, and their ratio to retraining's.

    A classifier is back at 95 % of the target's accuracy on the forget rows, a regressor at 105 % of its loss. ``relearn-time``
    is their number; ``relearn-time.ratio`` (the anamnesis index, AIN) divides them by the mean of retrained models under the same
    training: 1 is wanted, less says that what was forgotten is still inside, more that more than it was destroyed. Every model
    is copied first. On a forget set that retrained models get right anyway it says nothing: both need no step.
    """

    name: ClassVar[str] = "relearn-time"
    title: ClassVar[str] = "Relearn time"
    formula: ClassVar[str] = (
        "min t: A_F(theta_t) >= (1 - slack) A_F(target), or l_F(theta_t) <= (1 + slack) l_F(target); ratio: t / t_retrained"
    )
    direction: ClassVar[Direction] = Direction.REFERENCE
    range: ClassVar[Range] = (0.0, None)
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER, Need.RETAIN, Need.RETRAINED)
    paper: ClassVar[Paper] = BLINDSPOT
    evaluate = staticmethod(relearn_ratio)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ROWS, Offer.LOSSES})

    steps: int = Field(100, ge=1, description="steps after which it is given up")
    batch: int = Field(64, ge=1, description="rows per step, drawn from all rows")
    slack: float = Field(0.05, ge=0, lt=1, description="how near is back")
    relative: float = Field(0.4, gt=0, description="change of a layer's output by one step, from which the rate follows")
    rows: int = Field(256, ge=2, description="forget rows that are looked at after each step, at most")

    def visit(self, evidence: Evidence, label: str) -> None:
        """Train a copy while the model is in memory."""
        self._steps(evidence, label)

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The steps, and their ratio."""
        found = self._steps(evidence, label)
        if found is None:
            return {}
        n = len(evidence.records("forget"))
        base = Number(value=None, over="none", n=n, direction=self.direction, range=self.range, note="")
        if found < 0:
            why = f"not within {self.steps} steps"
            return {self.name: base.model_copy(update={"note": why, "flags": (why,)})}
        out = {self.name: base.model_copy(update={"value": float(found), "note": "steps on all rows"}).checked()}
        others = [t for o in evidence.labels("retrained", but=label) if (t := self._steps(evidence, o)) is not None and t >= 0]
        if others:
            mean = float(np.mean(others))
            value = math.nan if mean == 0 else found / mean
            if not math.isnan(value):
                note = f"to {mean:.1f} steps, the mean of {len(others)} retrained models"
                out[f"{self.name}.ratio"] = base.model_copy(update={"value": value, "note": note}).checked()
        return out

    def _steps(self, evidence: Evidence, label: str) -> int | None:
        """Steps, -1 if it did not come back; None where it cannot be measured."""
        target = next(iter(evidence.labels("target")), None)
        if target is None or "retain" not in evidence.sets:
            evidence.miss(f"{self.title} was not measured: it needs the target model and a retain set.")
            return None
        key = ("relearn time", self.model_dump_json(), evidence.subject(label).fingerprint)
        return evidence.memo(key, lambda: self._measure(evidence, label, target))

    def _measure(self, evidence: Evidence, label: str, target: str) -> int | None:
        adapter = evidence.adapter(label)
        draw = np.random.default_rng([evidence.protocol.seed, 17])
        forget = [adapter.encode(r) for r in evidence.records("forget")]
        every = [*forget, *(adapter.encode(r) for r in evidence.records("retain"))]
        asked = forget if len(forget) <= self.rows else [forget[i] for i in sorted(draw.permutation(len(forget))[: self.rows])]
        units = evidence.protocol.batch_tokens
        try:
            lr = evidence.memo(("relearn time rate", self.relative), lambda: rate(evidence.adapter(target).model, self.relative))
        except InputError:
            evidence.miss(f"{self.title} was not measured: no rate follows from a model without linear weights.")
            return None
        ids = {e.id for e in asked}
        at = [i for i, r in enumerate(evidence.records("forget")) if r.id in ids]
        original = self._original(evidence, target, at)
        curve: list[float] = []

        def observe(step: int, model: nn.Module) -> None:
            curve.append(_quality(copy, model, asked, units))
            if self._back([curve[-1]], original, adapter) is not None:
                raise _Back

        copy = adapter.copy()
        schedule = Fixed(
            lr=lr, steps=self.steps, epochs=None, batch=self.batch, warmup=0, decay="constant", weight_decay=0, clip=None
        )
        device = str(next(copy.model.parameters()).device)
        engine = Engine(
            seed=evidence.protocol.seed, max_tokens=units, checkpoint_every=0, device="cpu" if device == "cpu" else "auto"
        )
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                train(copy, relearning(schedule), {Stream.RETAIN: every}, engine, observe=observe)
        except _Back:
            pass
        found = self._back(curve, original, adapter)
        return -1 if found is None else found

    def _original(self, evidence: Evidence, target: str, at: Sequence[int]) -> float:
        held = evidence.outputs(target, "forget")
        if held.scores.shape[1] > 1:
            return float(held.kernel.hit[list(at)].mean())
        return float(evidence.scores(target, "forget").nll()[list(at)].mean())

    def _back(self, curve: Sequence[float], original: float, adapter: Adapter) -> int | None:
        steps = regain_steps if adapter.n_classes else relearn_steps
        return steps(np.array(curve), original, self.slack) if np.isfinite(curve).all() else None


def _quality(adapter: Adapter, model: nn.Module, examples: Sequence[Example], units: int) -> float:
    """Accuracy of a classifier; the mean loss of a regressor."""
    with evaluating(model), torch.no_grad():
        if not adapter.n_classes:
            return float(np.mean(mean_losses(adapter, model, examples, units)))
        right = 0
        device = next(model.parameters()).device
        for part in fitting(examples, units):
            batch = adapter.collate(part).to(device)
            logits = adapter.forward(model, batch, frozenset({"logits"})).logits
            right += int((logits.argmax(1) == batch.targets).sum())
    return right / len(examples)
