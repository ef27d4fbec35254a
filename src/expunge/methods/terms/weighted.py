"""Gradient ascent with a weight per token: WGA and SatImp, one implementation."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from expunge.core.access import Of, Stream
from expunge.core.search import Search
from expunge.engine.parts import Need, Term, Views
from expunge.methods.registry import term
from expunge.methods.terms.functions import power_weight


class WeightedAscent(Term):
    """``-w(p) * NLL`` of every forget token, with no gradient through the weight."""

    @property
    def stream(self) -> Stream:
        """Forget examples."""
        return Stream.FORGET

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Losses under the current model."""
        return frozenset({(Stream.FORGET, Of.CURRENT, "losses")})

    @abc.abstractmethod
    def token_weights(self, losses: Tensor) -> Tensor:
        """Weights ``[N]`` from the losses ``[N]``, detached."""

    def values(self, views: Views) -> Tensor:
        """Weighted ascent, ``[N]``."""
        losses = views.current(Stream.FORGET).losses
        return -self.token_weights(losses) * losses


@term
class WGA(WeightedAscent):
    """Weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301): ``w = p^beta``.

    What is forgotten already is left alone; beta 0 is plain ascent with the token mean. The default 1 is that of the paper
    and of common implementations; the authors' code has 5.
    """

    name: ClassVar[str] = "wga"

    beta: Annotated[float, Search(0.1, 5.0, log=True)] = Field(
        1.0, ge=0, description="exponent of the token's probability; 0 is gradient ascent"
    )

    def token_weights(self, losses: Tensor) -> Tensor:
        """``p^beta``."""
        return power_weight(losses, self.beta)


@term
class SatImp(WeightedAscent):
    """Saturation and importance reweighting (Yang et al. 2025, arXiv 2505.11953): ``w = p^beta1 (1 - p)^beta2``.

    The weight is 0 at p = 0 and p = 1 and largest at ``p = beta1 / (beta1 + beta2)``; beta2 0 is WGA with beta1.
    """

    name: ClassVar[str] = "satimp"

    beta1: Annotated[float, Search(0.5, 10.0, log=True)] = Field(5.0, ge=0, description="exponent of p (saturation)")
    beta2: Annotated[float, Search(0.1, 5.0, log=True)] = Field(1.0, ge=0, description="exponent of 1 - p (importance)")

    def token_weights(self, losses: Tensor) -> Tensor:
        """``p^beta1 (1 - p)^beta2``."""
        return power_weight(losses, self.beta1, self.beta2)
