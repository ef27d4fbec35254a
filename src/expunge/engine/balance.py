"""The coefficients of forgetting and keeping: fixed, by count, or a dual variable that holds a constraint."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from expunge.core.registry import Registry
from expunge.core.search import Search
from expunge.engine.parts import Balance

BALANCES: Registry[type[Balance]] = Registry("balance", None, "expunge.balances")


class FixedBalance(Balance):
    """Both coefficients are one: the weights of the terms say everything."""

    name: ClassVar[str] = "fixed"

    def coefficients(self, state: dict[str, float], share: float = 0.5) -> tuple[float, float]:
        """(1, 1)."""
        return 1.0, 1.0

    def update(self, state: dict[str, float], epoch: float, forget: float, retain: float) -> None:
        """Nothing to note."""


class ByCount(Balance):
    """Each side weighs as its share of the step's examples, so that every example weighs the same, as in a mixed batch."""

    name: ClassVar[str] = "by-count"

    def coefficients(self, state: dict[str, float], share: float = 0.5) -> tuple[float, float]:
        """(share, 1 - share)."""
        return share, 1.0 - share

    def update(self, state: dict[str, float], epoch: float, forget: float, retain: float) -> None:
        """Nothing to note."""


class PrimalDual(Balance):
    """Minimise the forget side subject to ``retain <= eps`` by dual ascent (PDU, arXiv 2506.05314).

    The Lagrangian is ``F + lambda (R - eps)``; after each optimiser step past the warm-up
    ``lambda <- max(0, lambda + step (R - eps))``.
    The dual step is taken once per *optimiser* step as in the paper, so it does not scale with gradient accumulation (the
    widely used implementation steps at every micro-batch).
    """

    name: ClassVar[str] = "primal-dual"

    initial: float = Field(100.0, ge=0, description="lambda at the start")
    step: Annotated[float, Search(around=10)] = Field(5.0, gt=0, description="step size of the dual ascent")
    eps: Annotated[float, Search(0.05, 1.0, log=True)] = Field(
        0.3, gt=0, description="largest allowed value of the retain term, in its own unit (nats for nll)"
    )
    warmup: float = Field(5.0, ge=0, description="epochs over the forget set before the dual variable moves")

    def coefficients(self, state: dict[str, float], share: float = 0.5) -> tuple[float, float]:
        """(1, lambda)."""
        return 1.0, state.setdefault("lambda", self.initial)

    def update(self, state: dict[str, float], epoch: float, forget: float, retain: float) -> None:
        """Dual ascent on the constraint."""
        if epoch >= self.warmup:
            state["lambda"] = max(0.0, state.get("lambda", self.initial) + self.step * (retain - self.eps))


for kind in (FixedBalance, ByCount, PrimalDual):
    BALANCES.add(kind.name, kind)
