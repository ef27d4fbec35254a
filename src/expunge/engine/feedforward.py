"""The feed-forward part of a transformer block, whatever its library calls the matrices."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import InputError

OUTPUT = r"down_proj|mlp\.c_proj|dense_4h_to_h|mlp\.fc_out|\bfc2\b|DenseReluDense\.wo"  #: how output matrices are called


@dataclass(frozen=True)
class FeedForward:
    """Its matrices.

    Attributes:
        inner: modules whose outputs are the units (two with gates; one that holds both, of twice as many outputs).
        output: the module that reads the units.
        units: how many there are.
        names: dotted names of ``inner`` within the block.
        output_name: that of ``output``.
    """

    inner: tuple[nn.Module, ...]
    output: nn.Module
    units: int
    names: tuple[str, ...] = ()
    output_name: str = ""

    @property
    def gate_name(self) -> str:
        """Name within the block of the module whose first :attr:`units` outputs go through the activation.

        It is the gate, or the only inner module that there is.
        """
        # Named after gates nearly everywhere; elsewhere it is the first to be declared (w1 of w1, w3, w2).
        return next((n for n in self.names if "gate" in n.rpartition(".")[2]), self.names[0])

    @classmethod
    def of(cls, block: nn.Module, name: str) -> FeedForward:
        """Find it.

        Raises:
            InputError: the block has no module that is called like an output matrix, or none that feeds it.
        """
        linear = {n: m for n, m in block.named_modules() if _is_matrix(m)}
        outputs = [n for n in linear if re.search(OUTPUT, n)]
        if len(outputs) != 1:
            raise InputError(
                f"The block {name!r} has {len(outputs)} modules that look like the output of a feed-forward layer.",
                f"It has {', '.join(linear) or 'no matrices'}; only dense transformer blocks are understood.",
            )
        parent = outputs[0].rpartition(".")[0]
        output = linear[outputs[0]]
        units = _matrix(output).shape[1]
        beside = [n for n in linear if n.rpartition(".")[0] == parent and n != outputs[0]]
        names = tuple(n for n in beside if _matrix(linear[n]).shape[0] in (units, 2 * units))
        if not names:
            raise InputError(f"Nothing in the block {name!r} feeds {outputs[0]!r}.", "Choose other layers.")
        return cls(tuple(linear[n] for n in names), output, units, names, outputs[0])

    @torch.no_grad()
    def reset(self, chosen: Tensor, std: float, generator: torch.Generator) -> None:
        """Draw the weights of the units ``chosen`` (indices) anew from N(0, std), in place; their biases become 0."""
        for module in self.inner:
            rows = torch.cat([chosen + at for at in range(0, _matrix(module).shape[0], self.units)])
            _fill(_matrix(module), rows, std, generator)
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                bias[rows.to(bias.device)] = 0.0
        _fill(_matrix(self.output).T, chosen, std, generator)


def output_matrix(part: FeedForward) -> Tensor:
    """The matrix that reads the units, ``[D, units]``, a view of the weight without gradient; its columns are value vectors."""
    return _matrix(part.output)


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and isinstance(module.weight, Tensor))


def _matrix(module: nn.Module) -> Tensor:
    """The weight of a linear module as ``[outputs, inputs]`` (a view: GPT-2's modules hold it the other way round)."""
    weight: Any = module.weight
    matrix: Tensor = weight.detach() if isinstance(module, nn.Linear) else weight.detach().T
    return matrix


def _fill(matrix: Tensor, rows: Tensor, std: float, generator: torch.Generator) -> None:
    drawn = torch.randn(len(rows), matrix.shape[1], generator=generator) * std
    matrix[rows.to(matrix.device)] = drawn.to(matrix.device, matrix.dtype)
