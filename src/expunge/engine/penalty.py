"""Penalties on the weights, beside the loss on the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.adapters.base import Adapter
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

    def gradient(self, parameter: Tensor, done: float, made: Any = None) -> Tensor:
        """``gamma_t * sign(theta)``."""
        return parameter.sign() * self.weight(done)


class Orthogonal(Penalty):
    """The inputs that a LoRA reads stay apart from those that the LoRAs of earlier requests read (O3, Gao et al. 2024).

    ``lambda / layers * sum_modules sum_{s < t} ||A_s A_t'||_F^2`` over the updates that stand beside the target already; a first
    request has none, and the penalty is 0. The sum is over all earlier requests, as in the published code (its text is known to
    us only through a summary that has the last one alone). It makes the spaces orthogonal that the updates read from, not those
    that they write to.
    """

    name: ClassVar[str] = "orthogonal"

    weight: Annotated[float, Search(0.01, 10, log=True)] = Field(0.1, ge=0, description="lambda")

    def begin(self, adapter: Adapter, model: nn.Module) -> Mapping[str, Any]:
        """The factors A of all earlier requests ``[sum of r, inputs]`` and the number of blocks, by the name of each A."""
        from expunge.adapters.gated import Gated

        earlier = adapter.model.requests if isinstance(adapter.model, Gated) else []
        held: dict[str, list[Tensor]] = {}
        for request in earlier:
            for name, a, _, _ in request.update.pairs():
                held.setdefault(name, []).append(a.detach().clone())
        found = {}
        for name, _ in model.named_parameters():
            module, at, _ = name.partition(".lora_A.")
            for known, factors in held.items():
                if at and (module == known or module.endswith(f".{known}")):
                    found[name] = (torch.cat(factors), len(adapter.layers()))
        return found

    def gradient(self, parameter: Tensor, done: float, made: Any = None) -> Tensor:
        """``2 lambda / layers * A_t sum_s A_s' A_s``; 0 for what is no A."""
        if made is None:
            return torch.zeros_like(parameter)
        earlier, layers = made
        earlier = earlier.to(parameter)
        found: Tensor = (2 * self.weight / layers) * (parameter @ earlier.T) @ earlier
        return found


for penalty in (L1, Orthogonal):
    PENALTIES.add(penalty.name, penalty)
