"""What is done to the gradient: nothing, projection off the retain gradient, surgery on conflict, large entries only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from expunge.core.registry import Registry
from expunge.engine.parts import Gradient

GRADIENTS: Registry[type[Gradient]] = Registry("gradient rule", None, "expunge.gradients")


class Plain(Gradient):
    """The sum of both gradients, from one backward pass."""

    name: ClassVar[str] = "plain"
    by_term: ClassVar[bool] = False

    def combine(self, forget: list[Tensor], retain: list[Tensor], state: dict[str, Any]) -> list[Tensor]:
        """The sum; the engine never calls this, it lets one backward pass add them."""
        return [f + r for f, r in zip(forget, retain, strict=True)]


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


class Project(Gradient):
    """Geometric-disentanglement update of rank one: remove from the forget gradient its part along the retain gradient.

    ``g = g_f - (<g_f, g_r> / (|g_r|^2 + eps)) g_r + g_r`` over all trainable tensors together, always (not only on
    conflict), as in Geometric-Disentanglement Unlearning (arXiv 2511.17100), in the plain (unwhitened) geometry. After
    projection the forget step changes the retain loss of the batch only to second order under plain SGD; Adam's
    preconditioner weakens that, which the paper's whitened form addresses and this one does not.
    """

    name: ClassVar[str] = "project"

    def combine(self, forget: list[Tensor], retain: list[Tensor], state: dict[str, Any]) -> list[Tensor]:
        """Project the forget gradient off the retain gradient and add the latter."""
        share = (_dot(forget, retain) / (_dot(retain, retain) + 1e-20)).item()
        return [f - share * r + r for f, r in zip(forget, retain, strict=True)]


class ConflictProject(Project):
    """PCGrad on the forget side: as ``project``, but only where the two gradients conflict (``<g_f, g_r> < 0``).

    Yu et al. 2020, arXiv 2001.06782; the retain gradient is left as it is because keeping has priority here.
    """

    name: ClassVar[str] = "pcgrad"

    def combine(self, forget: list[Tensor], retain: list[Tensor], state: dict[str, Any]) -> list[Tensor]:
        """Project only on conflict."""
        if _dot(forget, retain).item() >= 0:
            return [f + r for f, r in zip(forget, retain, strict=True)]
        return super().combine(forget, retain, state)


class Salient(Plain):
    """In every step only the entries with a large gradient move: ``|g| >= mean(|g|) + n_std * std(|g|)``.

    Mean and standard deviation are over all trainable entries together, ``g`` is the gradient of the whole loss in this step
    (weight saliency of Stable Sequential Unlearning, arXiv 2406.10952). All others keep their value in this step bit for bit:
    neither momentum nor weight decay moves them. The log says which share moved (``moved``).
    """

    name: ClassVar[str] = "salient"

    n_std: float = Field(0.0, ge=-4, le=16, description="standard deviations above the mean at which a gradient counts as large")

    def moving(self, gradient: Sequence[Tensor]) -> list[Tensor]:
        """The entries at or above the threshold."""
        count = sum(g.numel() for g in gradient)
        mean = sum(g.abs().sum(dtype=torch.float64) for g in gradient) / count
        square = sum((g.abs().double() - mean).square().sum() for g in gradient) / max(1, count - 1)
        threshold = mean + self.n_std * torch.as_tensor(square).sqrt()
        return [g.abs() >= threshold for g in gradient]


for rule in (Plain, Project, ConflictProject, Salient):
    GRADIENTS.add(rule.name, rule)
