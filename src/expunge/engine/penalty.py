"""Penalties on the weights, beside the loss on the data."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from expunge.core.registry import Registry
from expunge.core.search import Search
from expunge.engine.parts import Penalty

PENALTIES: Registry[type[Penalty]] = Registry("penalty", None, "expunge.penalties")


class L1(Penalty):
    """``gamma_t * ||theta||_1`` with ``gamma_t`` falling linearly to 0 (l1-sparse, Jia et al. 2023, arXiv 2304.04934).

    ``gamma_t = gamma * (1 - t / (T - T0))`` for the share ``t / T`` of training that is over, and 0 in its last share
    ``free``: the weights that matter then recover. A gamma that grows with t, or stays, costs accuracy. The norm sums over all
    weights, so useful values of gamma are small: 1e-5 to 1e-3.
    """

    name: ClassVar[str] = "l1"

    gamma: Annotated[float, Search(1e-5, 1e-2, log=True)] = Field(5e-4, ge=0, description="weight of the norm at the start")
    free: float = Field(0.0, ge=0, lt=1, description="share of training at its end without the penalty")

    def weight(self, done: float) -> float:
        """``gamma_t``."""
        return self.gamma * max(0.0, 1 - done / (1 - self.free))

    def gradient(self, parameter: Tensor, done: float) -> Tensor:
        """``gamma_t * sign(theta)``."""
        return parameter.sign() * self.weight(done)


PENALTIES.add(L1.name, L1)
