"""A module as a function of its weights: what vectorised gradients, curvature products and ensembles have in common.

Inputs are a tensor, or tuples, lists and mappings of tensors, each with one entry per row on its first axis.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss

from expunge.core.errors import InputError

Tensors = dict[str, Tensor]  #: by the name of the parameter
Forward = Callable[[nn.Module, Any], Tensor]  #: (model, inputs) -> outputs, one row per row of the inputs
RowLoss = Callable[[Tensor, Tensor], Tensor]  #: (outputs, targets) -> one loss per row

_BLOCK = 1 << 24


def plain(model: nn.Module, inputs: Any) -> Tensor:
    """The forward pass of a module that takes its inputs as one argument and returns a tensor."""
    outputs: Tensor = model(inputs)
    return outputs


def class_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy per row in nats: logits ``[rows, classes]``, targets ``[rows]`` (int64)."""
    return cross_entropy(logits, targets, reduction="none")


def squared_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error per row, summed over the outputs of the row: both ``[rows, ...]``."""
    return mse_loss(outputs, targets.view_as(outputs), reduction="none").flatten(1).sum(1)


class Function(nn.Module):
    """A model and its forward pass as a function of the weights.

    Args:
        model: stays as it is; gradients go to the tensors given to :meth:`at`.
        forward: how the model is called.
    """

    def __init__(self, model: nn.Module, forward: Forward = plain) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, inputs: Any) -> Tensor:
        """Call the model as it is."""
        return self._forward(self.model, inputs)

    def at(self, weights: Mapping[str, Tensor], inputs: Any) -> Tensor:
        """Outputs with ``weights`` (parameters or buffers by the model's own names) in place of the model's."""
        outputs: Tensor = functional_call(self, {f"model.{name}": value for name, value in weights.items()}, (inputs,))
        return outputs


def moving(model: nn.Module) -> Tensors:
    """The parameters that may move, detached, by name; a shared parameter once.

    Raises:
        InputError: there are none.
    """
    found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise InputError("The model has no parameter that may move.", "Set requires_grad of those that should.")
    return found


def open_attention() -> AbstractContextManager[None]:
    """Attention as plain products while open: fused kernels have no forward-mode derivative and, on CPU, no rule for ``vmap``."""
    held: AbstractContextManager[None] = sdpa_kernel([SDPBackend.MATH])
    return held


def leaves(inputs: Any) -> Iterator[Tensor]:
    """All tensors of some inputs, in order."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Mapping):
        for key in inputs:
            yield from leaves(inputs[key])
    elif isinstance(inputs, (tuple, list)):
        for value in inputs:
            yield from leaves(value)
    else:
        raise InputError(
            f"Inputs of a model must be tensors, or tuples, lists or mappings of them; got {type(inputs).__name__}.",
            "Turn them into tensors first.",
        )


def each(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same inputs with every tensor changed; a mapping comes back as a dict."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {key: each(inputs[key], change) for key in inputs}
    if isinstance(inputs, (tuple, list)):
        return tuple(each(value, change) for value in inputs)
    return next(leaves(inputs))  # raises, with the sentence for what is no tensor


def count_rows(inputs: Any) -> int:
    """Number of rows, equal in all tensors.

    Raises:
        InputError: there is no tensor, one has no rows axis, or they differ.
    """
    sizes = {t.shape[0] if t.ndim else -1 for t in leaves(inputs)}
    if len(sizes) != 1 or -1 in sizes:
        raise InputError(
            f"All tensors of the inputs must have the same number of rows on their first axis; found {sorted(sizes)}.",
            "Give every tensor one entry per row.",
        )
    return sizes.pop()


def check_rows(inputs: Any, targets: Tensor) -> int:
    """Number of rows of inputs and targets.

    Raises:
        InputError: they differ, or there are none.
    """
    rows = count_rows(inputs)
    if targets.ndim == 0 or targets.shape[0] != rows or rows == 0:
        found = targets.shape[0] if targets.ndim else "no"
        raise InputError(
            f"There are {rows} rows of inputs and {found} targets.", "Give one target per row, and at least one row."
        )
    return rows


def digest_tensors(tensors: Iterator[Tensor]) -> str:
    """SHA-256 over types, shapes and contents, as 64 hex digits; read in blocks."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if not tensor.numel():
            continue
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, flat.numel(), _BLOCK):
            state.update(flat[start : start + _BLOCK].numpy().tobytes())
    return state.hexdigest()


def flatten(tensors: Mapping[str, Tensor], rows: bool = False) -> Tensor:
    """All tensors as one vector ``[p]``, in their order; with ``rows``, tensors ``[rows, ...]`` as ``[rows, p]``."""
    return torch.cat([t.reshape(t.shape[0], -1) if rows else t.reshape(-1) for t in tensors.values()], dim=-1)


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> Tensors:
    """Undo :func:`flatten`: views into ``vector`` with the names and shapes of ``like``.

    Raises:
        InputError: the sizes do not match.
    """
    sizes = [t.numel() for t in like.values()]
    if vector.shape != (sum(sizes),):
        raise InputError(
            f"The vector has the shape {list(vector.shape)}; the model has {sum(sizes)} weights that may move.",
            "Flatten the tensors of the same model.",
        )
    return {name: part.view_as(t) for (name, t), part in zip(like.items(), torch.split(vector, sizes), strict=True)}
