"""Does a forgotten class come back when inner activations are steered towards the target's: removed or suppressed, by layer?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.adapters.base import Adapter
from expunge.adapters.passes import evaluating
from expunge.audit.evidence import Evidence
from expunge.audit.kernel.restoration import expert_latents, restoration
from expunge.audit.metrics.papers import RESTORED
from expunge.audit.metrics.registry import Metric, Need, Range, metric
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.core.results import Direction, Number
from expunge.engine.autoencoder import SparseAutoencoder, fit_autoencoder
from expunge.engine.parts import Paper


@dataclass(frozen=True)
class _Layer:
    """One layer of a model: read its activations, or go on from others.

    Activations are ``[rows, ..., d]``: the channels of pictures come last.
    """

    adapter: Adapter
    name: str
    inputs: dict[str, Tensor]

    def read(self) -> Tensor:
        """The layer's output (of the last layer its input) on all rows."""
        held: list[Tensor] = []
        self._run(lambda value: held.append(_last(value)))
        return held[0]

    def go_on(self, activations: Tensor) -> Tensor:
        """The model's scores when the layer gives these activations."""
        return self._run(lambda value: _back(activations, value))

    @torch.no_grad()
    def _run(self, change: Callable[[Tensor], Tensor | None]) -> Tensor:
        model: nn.Module = self.adapter.model
        module = model.get_submodule(self.name)

        def at_output(_: Any, __: Any, out: Any) -> Any:
            value = out if isinstance(out, Tensor) else out[0]
            new = change(value)
            return out if new is None else (new if isinstance(out, Tensor) else (new, *out[1:]))

        def at_input(_: Any, given: Any) -> Any:
            new = change(given[0])
            return None if new is None else (new, *given[1:])

        final = self.name == self.adapter.layers()[-1]
        hook = module.register_forward_pre_hook(at_input) if final else module.register_forward_hook(at_output)
        try:
            with evaluating(model):
                return self.adapter.scores(model, self.inputs)
        finally:
            hook.remove()


@dataclass(frozen=True)
class _Class:
    """What the target knows of a forgotten class at a layer."""

    autoencoder: SparseAutoencoder
    experts: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
    activations: Tensor
    scores: Tensor


@metric
class Restoration(Metric):
    """A forgotten class is put back at an inner layer, along sparse directions of the target, and the rest of the model goes on.

    ``restoration.<layer>``: accuracy on the class after steering, over the target's accuracy. Near 1: what comes before the layer
    had been suppressed and the model's later layers still read it. Near a retrained model's value: removed. The control, as many
    random directions, is stated in the note: where it is as high, the number means nothing. A model that differs from the target
    only after a layer has nothing to restore at it. Only where whole classes are forgotten.
    """

    name: ClassVar[str] = "restoration"
    title: ClassVar[str] = "Restoration of the class"
    formula: ClassVar[str] = "accuracy(x_u + dec(z') - dec(z_u)) / accuracy(target), z'_j = z_u,j + a (z_t,j - z_u,j), j expert"
    direction: ClassVar[Direction] = Direction.REFERENCE
    range: ClassVar[Range] = (0.0, None)
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER, Need.RETAIN)
    paper: ClassVar[Paper] = RESTORED
    evaluate = staticmethod(restoration)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ROWS, Offer.LOGITS, Offer.FEATURES})

    strength: float = Field(5.0, gt=0, description="how far activations are moved; 1: to the target's own")
    experts: int = Field(8, ge=1, description="latents per class that are steered, at most")
    steps: int = Field(500, ge=1, description="optimiser steps of the autoencoder of each layer")
    layers: int = Field(3, ge=1, description="layers that are looked at, the last ones")
    rows: int = Field(2000, ge=10, description="retain rows that the autoencoder is fitted on, at most")

    def visit(self, evidence: Evidence, label: str) -> None:
        """Steer while the model is in memory."""
        self._measured(evidence, label)

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """See the class."""
        return self._measured(evidence, label)

    def _measured(self, evidence: Evidence, label: str) -> dict[str, Number]:
        key = ("restoration", self.model_dump_json(), evidence.subject(label).fingerprint)
        return evidence.memo(key, lambda: self._measure(evidence, label))

    def _measure(self, evidence: Evidence, label: str) -> dict[str, Number]:
        target = next(iter(evidence.labels("target")), None)
        if "retain" not in evidence.sets or target is None:
            return {}
        kept = {r.target for r in evidence.records("retain")}
        gone = sorted({int(r.target) for r in evidence.records("forget")} - kept)
        if not gone:
            return {}
        adapter = evidence.adapter(label)
        out = {}
        for layer in adapter.layers()[-self.layers :]:
            found = [self._one(evidence, label, layer, c) for c in gone]
            usable = [f for f in found if f is not None]
            if not usable:
                evidence.miss(f"{self.title} was not measured at {layer!r}: no sparse direction of it prefers the class.")
                continue
            rate, random = (float(np.mean(v)) for v in zip(*usable, strict=True))
            out[f"{self.name}.{layer or 'model'}"] = Number(
                value=rate, over="none", n=len(evidence.records("forget")), direction=self.direction, range=self.range,
                note=f"of the target's accuracy; along as many random directions {random:.2f}; strength {self.strength:g}",
            ).checked()  # fmt: skip
        return out

    def _one(self, evidence: Evidence, label: str, layer: str, which: int) -> tuple[float, float] | None:
        known = self._class(evidence, layer, which)
        if known is None:
            return None
        adapter = evidence.adapter(label)
        rows = [r for r in evidence.records("forget") if int(r.target) == which]
        at = _Layer(adapter, layer, _inputs(adapter, rows))
        found = restoration(
            known.autoencoder, at.read(), known.activations, np.full(len(rows), which), known.experts,
            finish=at.go_on, finish_original=lambda _: known.scores, strengths=(self.strength,), seed=evidence.protocol.seed,
        )[0]  # fmt: skip
        if not found.original or math.isnan(found.experts):
            return None
        return found.rate, found.random / found.original

    def _class(self, evidence: Evidence, layer: str, which: int) -> _Class | None:
        """Of the target, once for all models."""

        def make() -> _Class | None:
            adapter = evidence.adapter(evidence.labels("target")[0])
            rng = np.random.default_rng(evidence.protocol.seed)
            retain, forget = evidence.records("retain"), evidence.records("forget")
            some = np.sort(rng.permutation(len(retain))[: self.rows])
            every = [*forget, *(retain[int(i)] for i in some)]
            activations = _Layer(adapter, layer, _inputs(adapter, every)).read().float()
            width = activations.shape[-1]
            if width < 2:
                return None
            model = fit_autoencoder(activations, k=max(1, min(16, width // 4)), steps=self.steps, seed=evidence.protocol.seed)
            try:
                labels = np.array([int(r.target) for r in every])
                count = max(1, min(self.experts, width // 2))
                experts = expert_latents(model, activations, labels, which, count=count)
            except InputError:
                return None
            own = _Layer(adapter, layer, _inputs(adapter, [r for r in forget if int(r.target) == which]))
            held = own.read()
            return _Class(model, experts, held, own.go_on(held))

        return evidence.memo(("restoration class", self.model_dump_json(), layer, which), make)


def _inputs(adapter: Adapter, rows: Any) -> dict[str, Tensor]:
    device = next(adapter.model.parameters()).device
    return dict(adapter.collate([adapter.encode(r) for r in rows]).to(device).tensors)


def _last(value: Tensor) -> Tensor:
    """Channels of pictures ``[rows, channels, height, width]`` come last."""
    return value.detach().movedim(1, -1) if value.ndim == 4 else value.detach()


def _back(value: Tensor, like: Tensor) -> Tensor:
    moved = value.movedim(-1, 1) if like.ndim == 4 else value
    return moved.to(like.dtype)
