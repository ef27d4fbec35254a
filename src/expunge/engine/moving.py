"""The tensors that move, as a gradient rule may know them: their names, and how the optimiser turns a gradient into a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moving:
    """What is trained, and by which optimiser.

    Attributes:
        names: of the tensors, in the order of gradients.
        optimizer: theirs; none: plain steps along the gradient.
        parameters: the tensors.
        clip: largest norm of the whole gradient, to which it is cut before the step; none: not cut.
        made: what the rule made before the first step.
    """

    names: tuple[str, ...] = ()
    optimizer: Any = None
    parameters: tuple[nn.Parameter, ...] = ()
    clip: float | None = None
    made: Mapping[str, Any] = field(default_factory=dict)

    @property
    def memory(self) -> float:
        """Share of the last direction that goes into a step: beta1 of Adam, the momentum of SGD; 0: the gradient alone."""
        groups = _inner(self.optimizer).param_groups if self.optimizer is not None else []
        return max((float(g["betas"][0] if "betas" in g else g.get("momentum", 0.0)) for g in groups), default=0.0)

    @property
    def scaling(self) -> bool:
        """Whether the optimiser scales each entry by a factor of its own."""
        return self.optimizer is not None and not isinstance(_inner(self.optimizer), torch.optim.SGD)

    @property
    def decay(self) -> float:
        """Weight decay."""
        groups = _inner(self.optimizer).param_groups if self.optimizer is not None else []
        return max((float(g.get("weight_decay", 0.0)) for g in groups), default=0.0)

    def scales(self, gradient: Sequence[Tensor]) -> list[Tensor] | None:
        """By what AdamW multiplies each entry if ``gradient`` is its next one, up to a factor common to all; none for SGD.

        ``1 / (sqrt(v) + eps)`` with the second moment ``v`` *after* it has taken in this gradient, clipped as it will be. Without
        momentum the step is that factor times the gradient, so this is the metric in which directions must be compared.
        """
        optimizer = _inner(self.optimizer) if self.optimizer is not None else None
        if not isinstance(optimizer, torch.optim.AdamW):
            return None
        share = 1.0
        if self.clip is not None:
            share = min(1.0, self.clip / max(float(torch.nn.utils.get_total_norm(list(gradient))), 1e-30))
        of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        out = []
        for parameter, g in zip(self.parameters, gradient, strict=True):
            group, held = of[id(parameter)], optimizer.state.get(parameter, {})
            beta2, eps = float(group["betas"][1]), float(group["eps"])
            step = float(held["step"]) + 1 if held else 1.0
            v = (g.float() * share).square_().mul_((1 - beta2) / (1 - beta2**step))
            if held:
                v.add_(held["exp_avg_sq"], alpha=beta2 / (1 - beta2**step))
            out.append(v.sqrt_().add_(eps).reciprocal_())
        return out


PLAIN = Moving()  #: steps along the gradient, of tensors without a name


def _inner(optimizer: Any) -> Any:
    """The optimiser inside the wrapping of distribution."""
    held = getattr(optimizer, "optimizer", None)
    return optimizer if held is None else held
