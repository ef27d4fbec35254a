"""Changes of the weights after training."""

from __future__ import annotations

from typing import ClassVar

import torch
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
        """``before - scale * (after - before)``, computed in float32 or wider and returned in the type of ``before``."""
        wide = torch.promote_types(before.dtype, torch.float32)
        start = before.to(wide)
        return (start - scale * (after.to(wide) - start)).to(before.dtype)


FINISHES.add(Negate.name, Negate)
