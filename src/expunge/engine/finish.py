"""Changes of the weights after training."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from expunge.core.registry import Registry
from expunge.engine.parts import Finish

FINISHES: Registry[type[Finish]] = Registry("finish", None, "expunge.finishes")


class Negate(Finish):
    """Task-vector negation: ``theta - scale * (theta_trained - theta)`` (Ilharco et al. 2022, arXiv 2212.04089).

    At scale 0 it is the identity, at scale -1 the trained weights.
    """

    name: ClassVar[str] = "negate"

    scale: float | None = Field(None, ge=-1, le=64, description="coefficient of the task vector; none: the schedule finds it")

    def weights(self, before: Tensor, after: Tensor, scale: float) -> Tensor:
        """``before - scale * (after - before)`` in float32."""
        return (before.float() - scale * (after.float() - before.float())).to(before.dtype)


FINISHES.add(Negate.name, Negate)
