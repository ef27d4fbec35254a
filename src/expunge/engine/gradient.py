"""What is done to the gradient: nothing, projection away from the retain gradient, surgery on conflict."""

from __future__ import annotations

from typing import Any, ClassVar

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


for rule in (Plain, Project, ConflictProject):
    GRADIENTS.add(rule.name, rule)
