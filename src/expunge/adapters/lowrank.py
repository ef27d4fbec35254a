"""Low-rank updates that stand beside a model and are added by row, each as far as a weight says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge.adapters.head import base
from expunge.core.errors import InputError


class LowRank(nn.Module):
    """Updates ``scale B A`` of some linear modules of a model (LoRA, Hu et al. 2021), which are no part of that model.

    Args:
        factors: A ``[r, inputs]`` and B ``[outputs, r]`` by the module's name; parameters are used as they are, not copied.
        scales: by which the products are multiplied, by name.
    """

    def __init__(self, factors: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[str, float]) -> None:
        super().__init__()
        self.names = tuple(sorted(factors))
        self.scales = tuple(float(scales[n]) for n in self.names)
        self.a = nn.ParameterList([_parameter(factors[n][0]) for n in self.names])
        self.b = nn.ParameterList([_parameter(factors[n][1]) for n in self.names])

    @classmethod
    def of(cls, model: Any) -> LowRank:
        """The updates of a peft model's active LoRA; they stay those of that model.

        Raises:
            InputError: it has none, or one that is more than a product of two factors.
        """
        factors, scales = {}, {}
        for name, module in base(model).named_modules():
            if not (hasattr(module, "lora_A") and hasattr(module, "base_layer")):
                continue
            held: Any = module
            (which,) = held.active_adapters
            if which not in held.lora_A or getattr(held, "use_dora", {}).get(which) or held.lora_B[which].bias is not None:
                raise InputError(f"The LoRA of {name!r} is no plain product of two factors.", "Use linear modules, without DoRA.")
            factors[name] = (held.lora_A[which].weight, held.lora_B[which].weight)
            scales[name] = held.scaling[which]
        if not factors:
            raise InputError(f"{type(model).__name__} has no LoRA.", "Use parameters=lora-beside.")
        return cls(factors, scales)

    @classmethod
    def fresh(cls, model: nn.Module, names: Sequence[str], rank: int, scale: float) -> LowRank:
        """Updates of zero (A as in peft, B = 0) of some linear modules; A is drawn by torch's random state."""
        factors = {}
        for name in names:
            module: Any = model.get_submodule(name)
            outputs, inputs = module.weight.shape
            a = nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=5**0.5)
            factors[name] = (a, torch.zeros(outputs, rank))
        return cls(factors, dict.fromkeys(names, scale))

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        """Name, A, B and scale of each update."""
        yield from zip(self.names, self.a, self.b, self.scales, strict=True)

    def tensors(self) -> dict[str, Tensor]:
        """All factors, by names for a file."""
        return {
            f"{name}.{side}": t.detach().cpu().contiguous() for name, a, b, _ in self.pairs() for side, t in (("a", a), ("b", b))
        }

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], scales: Mapping[str, float]) -> LowRank:
        """Undo :meth:`tensors`.

        Raises:
            KeyError: a factor is missing.
        """
        return cls({n: (tensors[f"{n}.a"], tensors[f"{n}.b"]) for n in scales}, scales)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


@contextmanager
def loaded(model: nn.Module, updates: Sequence[tuple[LowRank, Tensor]], dropout: float = 0.0) -> Iterator[None]:
    """While open, every adapted module of ``model`` returns ``base(x) + sum_s w_s scale_s B_s A_s x``, by row.

    An update whose weights are all 0 is not computed, and a row of weight 0 gets what the module alone returns, bit by bit.

    Args:
        model: whose modules.
        updates: each with its weights ``[B]``, one for each row of a batch; generation may have several rows for each (beams).
        dropout: on the input of the updates.

    Raises:
        InputError: (in the forward pass) a module is called with tokens that no longer stand in rows.
    """
    wanted: dict[str, list[tuple[Tensor, Tensor, float, Tensor]]] = {}
    for update, weights in updates:
        if bool((weights != 0).any()):
            for name, a, b, scale in update.pairs():
                wanted.setdefault(name, []).append((a, b, scale, weights))
    handles = []
    try:
        for name, held in wanted.items():
            handles.append(model.get_submodule(name).register_forward_hook(_adding(name, held, dropout)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(name: str, held: Sequence[tuple[Tensor, Tensor, float, Tensor]], dropout: float) -> Callable[..., Tensor]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        for a, b, scale, weights in held:
            x: Tensor = inputs[0].to(a.dtype)
            update = functional.linear(functional.linear(functional.dropout(x, dropout, dropout > 0), a), b) * scale
            output = output + (update * _by_row(weights, update, name)).to(output.dtype)
        return output

    return hook


def _by_row(weights: Tensor, update: Tensor, name: str) -> Tensor:
    """Weights ``[B]`` in a shape that multiplies ``[k B, ..., D]``: rows of one weight stand together."""
    each, rest = divmod(len(update), len(weights))
    if rest or not each:
        raise InputError(
            f"The module {name!r} is called with {len(update)} rows for {len(weights)} sequences, so their weights are lost.",
            "Leave it out of parameters.modules.",
        )
    return weights.to(update.dtype).repeat_interleave(each).view(-1, *[1] * (update.ndim - 1))
