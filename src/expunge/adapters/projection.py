"""Directions taken out of the states after blocks of a model, for good: ``h' = h (1 - Q^T Q)``.

A projection is part of the model that has it. Its directions are a buffer of the block, so they are copied, fingerprinted,
moved and counted with the model, and no training touches them; a forward hook of the block applies them in every pass, also to
the single tokens of a generation with a cache. They cannot be folded into weights: what a block reads passes it by on the
residual stream, where no weight stands. So they are files of their own,

.. code-block:: text

    composite.json            kind "projected"
    projections.safetensors   orthonormal rows [r, D], float32, under the name of the block after which they act
    target/                   the model without them, in the layout of transformers

which is written by the model's own ``save_pretrained``, whoever calls it. No part of the layout is read as a model by accident:
transformers finds no configuration beside ``composite.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from expunge.adapters import identity, storage
from expunge.adapters.composite import FILE, FORMAT, Open
from expunge.core.errors import InputError
from expunge.core.files import write_json

KIND = "projected"
WEIGHTS = "projections.safetensors"

_CHILD = "expunge_projection"  #: name of the module in its block


def orthonormal(rows: Tensor) -> Tensor:
    """An orthonormal basis ``[r, D]`` of the span of rows ``[r, D]``, in float32 or wider; differentiable.

    The first of them span what the first rows span: rows that are orthonormal already stay, but for their sign.
    """
    with torch.autocast(rows.device.type, enabled=False):
        found: Tensor = torch.linalg.qr(rows.to(torch.promote_types(rows.dtype, torch.float32)).T)[0].T
    return found


def without(states: Tensor, basis: Tensor) -> Tensor:
    """``h (1 - Q^T Q)`` of states ``[..., D]``, computed in float32 or wider and returned in their type.

    Args:
        states: h.
        basis: Q, orthonormal rows ``[r, D]``.
    """
    with torch.autocast(states.device.type, enabled=False):
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        held = basis.to(wide.dtype)
        return (wide - (wide @ held.T) @ held).to(states.dtype)


class Projection(nn.Module):
    """What is taken out after one block.

    Attributes:
        basis: directions that are settled, orthonormal rows ``[r, D]``, float32 whatever the type of the model; a buffer.
        rows: directions that are being learnt ``[k, D]``, of any length, a parameter; none once :meth:`settle` was called.
    """

    basis: Tensor

    def __init__(self, basis: Tensor, rows: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("basis", basis.detach().to(torch.float32, copy=True))
        self.rows = None if rows is None else nn.Parameter(rows.detach().to(torch.float32, copy=True))

    def forward(self, states: Tensor) -> Tensor:
        """States ``[..., D]`` without all of the directions."""
        if self.rows is None:
            return without(states, self.basis) if len(self.basis) else states
        return without(states, orthonormal(torch.cat([self.basis, self.rows])))

    @torch.no_grad()
    def settle(self) -> None:
        """Take what was learnt for good: it is no parameter any more."""
        if self.rows is not None:
            self.basis = orthonormal(torch.cat([self.basis, self.rows]).double()).float()
            self.rows = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Projection:
        held = self.basis
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.basis.dtype != torch.float32:  # a model in half precision keeps its directions as exact as they are
            self.basis = held.to(self.basis.device)
        return self


def install(model: Any, name: str, projection: Projection) -> None:
    """Put a projection after a block of a transformers model, in place of the one that it may have.

    From now on the model's ``save_pretrained`` writes the layout above, and its name is none: the files that have it hold no
    projection. So an adapter that is trained on the model cannot name them as its base, and is saved with the weights.

    Args:
        model: not wrapped.
        name: of the block.
        projection: for states of its width.

    Raises:
        InputError: there is no such block.
    """
    try:
        block = model.get_submodule(name)
    except AttributeError:
        raise InputError(f"The model has no block {name!r}, after which directions are taken out.") from None
    if not hasattr(block, _CHILD):
        block.register_forward_hook(_project)
    device = next(block.parameters()).device
    block.add_module(_CHILD, projection.to(device))
    model.save_pretrained = partial(_save, model)
    model.name_or_path = model.config._name_or_path = ""
    storage.mark_unsaved(model)


def _project(block: nn.Module, _inputs: Any, output: Any) -> Any:
    """The forward hook: the projection is looked up in the block, so that a copy of the model uses its own."""
    projection: Any = getattr(block, _CHILD)
    if isinstance(output, Tensor):
        return projection(output)
    return (projection(output[0]), *output[1:])


def installed(model: nn.Module) -> dict[str, Projection]:
    """The projections of a model, by the name of their block."""
    return {n.rpartition(".")[0]: m for n, m in model.named_modules() if isinstance(m, Projection)}


def uninstall(model: Any) -> None:
    """Take all projections out of a model again: it says what it said without them, and is named as little as with them."""
    for name in installed(model):
        block = model.get_submodule(name)
        for key, hook in list(block._forward_hooks.items()):
            if hook is _project:
                del block._forward_hooks[key]
        delattr(block, _CHILD)
    vars(model).pop("save_pretrained", None)


def block_of(key: str) -> str | None:
    """The block after which an entry of a model's state takes directions out; none if it is no such entry."""
    block, found, _ = key.partition(f".{_CHILD}.")
    return block if found else None


def settle(model: nn.Module) -> None:
    """Settle what was learnt in all projections of a model."""
    for projection in installed(model).values():
        projection.settle()


def _save(model: Any, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None, **options: Any) -> None:
    """What stands for ``save_pretrained``: the layout above, in a folder that is made if it is not there."""
    folder = Path(folder)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    held: dict[str, Tensor] = {}
    for name in installed(model):
        basis, rows = state.pop(f"{name}.{_CHILD}.basis"), state.pop(f"{name}.{_CHILD}.rows", None)
        settled = Projection(basis, rows)
        settled.settle()
        held[name] = settled.basis.cpu().contiguous()
    (folder / "target").mkdir(parents=True, exist_ok=True)
    target = {"name": None, "digest": identity.state_hash(state).hexdigest(), "dtype": str(model.dtype)}
    type(model).save_pretrained(model, folder / "target", state_dict=state, **options)
    save_file(held, folder / WEIGHTS)
    ranks = {name: len(basis) for name, basis in held.items()}
    write_json(folder / FILE, {"format": FORMAT, "kind": KIND, "target": target, "projections": ranks})


def load_parts(folder: Path, held: Mapping[str, Any], target: Any, _: Open) -> Any:
    """The kind's own part of :func:`expunge.adapters.composite.load`: the target with its projections.

    Raises:
        InputError: the file of projections is missing or damaged, or does not fit the target.
    """
    ranks, path = held.get("projections"), folder / WEIGHTS
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        found = {}
    if not found or not isinstance(ranks, Mapping) or {n: len(b) for n, b in found.items()} != dict(ranks):
        raise InputError(
            f"{str(path)!r} is missing or does not hold the projections that {FILE} names.",
            "Restore the folder from a copy: without them the model knows again what was forgotten.",
        )
    width = int(storage.text_config(target).hidden_size)
    for name, basis in found.items():
        if basis.ndim != 2 or basis.shape[1] != width or not _is_orthonormal(basis):
            raise InputError(
                f"The projection after {name!r} in {str(path)!r} is damaged: it must hold orthonormal rows of {width} numbers.",
                "Restore the folder from a copy.",
            )
        install(target, name, Projection(basis))
    target.name_or_path = target.config._name_or_path = str(folder)
    storage.mark_saved(target)
    return target


def _is_orthonormal(basis: Tensor) -> bool:
    wide = basis.double()
    return bool(((wide @ wide.T - torch.eye(len(wide), dtype=wide.dtype)).abs() < 1e-4).all())
