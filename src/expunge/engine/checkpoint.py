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
    """Parameters that move, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def snapshot(model: nn.Module) -> Tensors:
    """A copy in main memory of the parameters that move (of a sharded model: of this process's shards)."""
    return {n: _local(p.detach()).to("cpu", copy=True) for n, p in trainable(model).items()}


def restore(model: nn.Module, saved: Tensors) -> None:
    """Put a :func:`snapshot` back."""
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            local = _local(parameter.detach())
            local.copy_(saved[name].to(local.device))


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


@dataclass
class Held:
    """What a checkpoint holds."""

    weights: Tensors
    good: Tensors
    optimizer: dict[str, Any]
    state: dict[str, Any]


def save(folder: Path, rank: int, *, weights: Tensors, good: Tensors, optimizer: dict[str, Any], state: dict[str, Any]) -> None:
    """Write one checkpoint in place of the last one.

    Args:
        folder: gets a folder per writing process with ``weights``, ``good``, the optimiser's state and ``state.json``.
        rank: of the writing process (0 alone writes, unless the model is sharded).
        weights: parameters that move, now.
        good: the same at the last check that was within all bounds.
        optimizer: its state dict (tensors and numbers).
        state: JSON: step, controller, balance, learning rate.
    """
    with atomic_path(folder / f"process-{rank}") as temporary:
        temporary.mkdir()
        save_file({k: v.contiguous() for k, v in weights.items()}, temporary / "weights.safetensors")
        save_file({k: v.contiguous() for k, v in good.items()}, temporary / "good.safetensors")
        torch.save({"optimizer": optimizer, "rng": torch.get_rng_state()}, temporary / "optimizer.pt")
        (temporary / "state.json").write_text(json.dumps(state))


def load(folder: Path, rank: int) -> Held | None:
    """Read a checkpoint written by :func:`save` and set torch's random state; None if there is none."""
    at = folder / f"process-{rank}"
    if not at.is_dir():
        at = folder / "process-0"
    if not (at / "state.json").is_file():
        return None
    held = torch.load(at / "optimizer.pt", weights_only=True, map_location="cpu")
    torch.set_rng_state(held["rng"])
    state = json.loads((at / "state.json").read_text())
    return Held(load_file(at / "weights.safetensors"), load_file(at / "good.safetensors"), held["optimizer"], state)
