"""Forget gradients that act only on inputs that the retain set does not have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from expunge.adapters.base import Adapter, Example
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.engine.covariance import input_moments, linear_weights, null_space
from expunge.engine.moving import PLAIN, Moving
from expunge.engine.options import Engine
from expunge.engine.parts import Gradient


class NullSpaceGradient(Gradient):
    """The forget gradient of each matrix, multiplied from the right by a projector: ``g = g_f P + g_r`` (KUDA, arXiv 2602.19275).

    P keeps the directions in which the inputs of the retain set have next to no second moment, computed once, on the target, over
    all real tokens of up to ``examples`` retain examples. ``energy`` relaxes it: the weakest directions that together hold
    that share of the second moment are free; 0 is the strict null space, 1 no projection. ``threshold`` cuts at an
    eigenvalue instead. So outputs on retain inputs move by the relaxed share only, whatever the number of steps.

    A matrix whose inputs leave nothing free gets no forget gradient; if that holds for all of them, the run is refused.

    Moving tensors that are no weights of linear modules (biases, norms, embeddings) act on every input: they get no forget
    gradient. Sums of projected steps are projected steps, so SGD, with momentum too, keeps the guarantee; AdamW scales each
    entry and bends it, and a run with it says so. ``g_r`` is not projected. P is not computed again when the blocks before a
    matrix have moved: on retain inputs they move by the relaxed share only.

    Memory: ``8 D^2`` bytes for each matrix with D inputs while its second moment is taken, then up to ``4 D^2``; it does not grow
    with the retain set.
    """

    name: ClassVar[str] = "null-space"

    energy: float = Field(0.02, ge=0, le=1, description="share of the retain inputs' second moment that may be touched")
    threshold: float | None = Field(None, ge=0, description="eigenvalue up to which a direction is free; none: by energy")
    examples: int = Field(1000, ge=1, description="retain examples from which the second moments are computed, at most")

    def begin(
        self, moving: Moving, adapter: Adapter, model: nn.Module, examples: Mapping[Stream, Sequence[Example]], engine: Engine
    ) -> dict[str, Any]:
        """The projector of each moving matrix, by name.

        Raises:
            InputError: no moving tensor is the weight of a linear module, there is no room, or nothing is free.
        """
        known = linear_weights(model)
        chosen = {n: known[n] for n in moving.names if n in known}
        if not chosen:
            raise InputError(
                f"gradient={self.name} projects weights of linear modules, and none of them moves.",
                f"Choose parameters=layer-window; what moves is {', '.join(moving.names[:3])}.",
            )
        modules = sorted({w.module for w in chosen.values()})
        moments = input_moments(
            adapter, model, modules, examples[Stream.RETAIN], max_units=engine.max_tokens, limit=self.examples, seed=engine.seed,
            what=f"gradient={self.name}",
        )  # fmt: skip
        limits = {"energy": self.energy} if self.threshold is None else {"threshold": self.threshold}
        spaces = {
            m: null_space(moments.pop(m).mean(), **limits, what=f"The retain set at {m!r}", may_be_empty=True).narrowed()
            for m in modules
        }
        if not any(s.rank for s in spaces.values()):
            raise InputError(
                f"The retain set leaves no direction free in any of the {len(spaces)} moving matrices.",
                "Raise gradient.energy (or gradient.threshold), or let more matrices move.",
            )
        return {"spaces": {n: (w, spaces[w.module]) for n, w in chosen.items()}}

    def notes(self, moving: Moving) -> list[str]:
        """What bends the projection."""
        if moving.scaling:
            return [f"gradient={self.name} is exact under schedule.optimizer=sgd; AdamW scales entries and bends its steps."]
        if moving.decay:
            return [f"gradient={self.name} is exact without weight decay, which also moves what the retain set uses."]
        return []

    def combine(self, forget: list[Tensor], retain: list[Tensor], state: dict[str, Any], moving: Moving = PLAIN) -> list[Tensor]:
        """Project the forget gradient and add the retain gradient."""
        spaces = moving.made["spaces"]
        out = []
        for name, f, r in zip(moving.names, forget, retain, strict=True):
            if name not in spaces:
                out.append(r)
                continue
            weight, space = spaces[name]
            out.append(weight.right(space.project(weight.right(f))) + r)
        return out
