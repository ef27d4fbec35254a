"""Checkpoints of a training loop: written whole or not at all, and enough to go on bit for bit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from expunge.core.files import atomic_path

Tensors = dict[str, Tensor]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that move, by name; of a sharded model the shards, which a forward pass alone leaves gathered."""
    for module in model.modules():
        reshard: Any = getattr(module, "reshard", None)
        if callable(reshard):
            reshard()
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that training moves, by name: the statistics of batch normalisation where it follows its batches."""
    followed = {n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training}
    return {n: b for n, b in model.named_buffers() if n.rpartition(".")[0] in followed}


def snapshot(model: nn.Module, into: Tensors | None = None) -> Tensors:
    """A copy in main memory of the parameters and statistics that move (of a sharded model: of this process's shards).

    ``into`` is an earlier snapshot that is no longer needed: its memory is used again.
    """
    now = {n: _local(p.detach()) for n, p in {**trainable(model), **statistics(model)}.items()}
    if not into:
        return {n: p.to("cpu", copy=True) for n, p in now.items()}
    for name, parameter in now.items():
        into[name].copy_(parameter)
    return into


def save_start(folder: Path, model: nn.Module, rank: int) -> None:
    """Write the parameters that move (of a sharded model: this process's shards) to a file, to go back to if training fails."""
    with atomic_path(folder / f"start-{rank}.safetensors") as temporary:
        now = {**trainable(model), **statistics(model)}
        save_file({n: _local(p.detach()).cpu().contiguous() for n, p in now.items()}, temporary)


def restore_start(folder: Path, model: nn.Module, rank: int) -> None:
    """Put back what :func:`save_start` wrote."""
    restore(model, load_file(folder / f"start-{rank}.safetensors"))


def restore(model: nn.Module, saved: Tensors) -> None:
    """Put a :func:`snapshot` back."""
    with torch.no_grad():
        for name, moving in {**trainable(model), **statistics(model)}.items():
            local = _local(moving.detach())
            local.copy_(saved[name].to(local.device))


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State dict of an optimiser; of a sharded model with this process's shards as plain tensors."""
    held = optimizer.state_dict()
    return {**held, "state": {k: {n: _plain(v) for n, v in entry.items()} for k, entry in held["state"].items()}}


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Put an :func:`optimizer_state` back; shards become sharded tensors again."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {k: {n: _sharded(v, parameters[k]) for n, v in entry.items()} for k, entry in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": state})


def _plain(value: Any) -> Any:
    return _local(value) if isinstance(value, Tensor) else value


def _sharded(value: Any, parameter: nn.Parameter) -> Any:
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or not isinstance(value, Tensor) or value.ndim == 0:
        return value
    from torch.distributed.tensor import DTensor

    placements: Any = parameter.placements  # type: ignore[attr-defined]
    return DTensor.from_local(
        value.to(parameter.device), mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


@dataclass
class Held:
    """What a checkpoint holds."""

    weights: Tensors
    good: Tensors
    optimizer: dict[str, Any]
    gradient: dict[str, Any]
    state: dict[str, Any]

    def gradient_on(self, device: torch.device) -> dict[str, Any]:
        """The memory of the gradient rule, on a device."""
        moved: dict[str, Any] = _moved(self.gradient, device)
        return moved


def _moved(held: Any, device: torch.device) -> Any:
    if isinstance(held, Tensor):
        return held.to(device)
    if isinstance(held, dict):
        return {k: _moved(v, device) for k, v in held.items()}
    return [_moved(v, device) for v in held] if isinstance(held, list) else held


def save(
    folder: Path,
    writer: str,
    *,
    weights: Tensors,
    good: Tensors,
    optimizer: dict[str, Any],
    state: dict[str, Any],
    gradient: dict[str, Any] | None = None,
) -> None:
    """Write one checkpoint in place of the last one.

    Args:
        folder: gets a folder per writing process with ``weights``, ``good``, the optimiser's state and ``state.json``.
        writer: name of the checkpoint; the first process alone writes one, unless the model is sharded.
        weights: parameters that move, now.
        good: the same at the last check that was within all bounds.
        optimizer: its state dict (tensors and numbers).
        state: JSON: step, controller, balance, learning rate.
        gradient: memory of the gradient rule (tensors, numbers, lists of these).
    """
    with atomic_path(folder / writer) as temporary:
        temporary.mkdir()
        save_file({k: v.contiguous() for k, v in weights.items()}, temporary / "weights.safetensors")
        save_file({k: v.contiguous() for k, v in good.items()}, temporary / "good.safetensors")
        torch.save({"optimizer": optimizer, "gradient": gradient or {}, "rng": torch.get_rng_state()}, temporary / "optimizer.pt")
        (temporary / "state.json").write_text(json.dumps(state))


def step_of(folder: Path, writer: str) -> int:
    """Steps done at a checkpoint; -1 if there is none."""
    path = folder / writer / "state.json"
    return int(json.loads(path.read_text())["step"]) if path.is_file() else -1


def load(folder: Path, writer: str) -> Held | None:
    """Read a checkpoint written by :func:`save` and set torch's random state; None if there is none."""
    at = folder / writer
    if not (at / "state.json").is_file():
        return None
    held = torch.load(at / "optimizer.pt", weights_only=True, map_location="cpu")
    torch.set_rng_state(held["rng"])
    state = json.loads((at / "state.json").read_text())
    weights, good = (load_file(at / f"{name}.safetensors") for name in ("weights", "good"))
    return Held(weights, good, held["optimizer"], held["gradient"], state)
