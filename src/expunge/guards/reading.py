"""States of prompts, as a watcher sees them while a request is answered; and who may use the model now."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from expunge.adapters.head import base
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.passes import evaluating
from expunge.guards.parts import Reading
from expunge.guards.prompts import Prompt

_LOCKS: WeakKeyDictionary[LanguageAdapter, threading.RLock] = WeakKeyDictionary()
_MAKING = threading.Lock()


def alone(adapter: LanguageAdapter) -> threading.RLock:
    """The lock of who uses a model: hooks of one batch would otherwise act on what another thread reads."""
    with _MAKING:
        return _LOCKS.setdefault(adapter, threading.RLock())


@torch.no_grad()
def read_states(
    adapter: LanguageAdapter, prompts: Sequence[Prompt], readings: Sequence[Reading], batch: int = 16
) -> list[dict[Reading, Tensor]]:
    """States of prompts without any guard's edits.

    Args:
        adapter: the model.
        prompts: as the model reads them.
        readings: which states.
        batch: prompts at a time.

    Returns:
        For each prompt a float32 vector ``[D]`` for each reading, on the CPU.
    """
    inner = base(adapter.model)
    device = next(inner.parameters()).device
    out: list[dict[Reading, Tensor]] = []
    with alone(adapter), evaluating(adapter.model):
        for at in range(0, len(prompts), batch):
            some = prompts[at : at + batch]
            width = max(len(p.ids) for p in some)
            sizes = np.array([len(p.ids) for p in some])
            ids = np.full((len(some), width), adapter.pad_id(), dtype=np.int64)
            mask = np.arange(width) < sizes[:, None]
            ids[mask] = np.concatenate([p.ids for p in some])
            given = {
                "input_ids": torch.from_numpy(ids).to(device),
                "attention_mask": torch.from_numpy(mask.astype(np.int64)).to(device),
            }
            seen = _seen(inner, given, readings)
            out += [{r: _pooled(seen[r][row, : sizes[row]], r) for r in readings} for row in range(len(some))]
    return out


def _seen(inner: Any, given: Mapping[str, Tensor], readings: Sequence[Reading]) -> dict[Reading, Tensor]:
    found: dict[Reading, Tensor] = {}
    handles = []
    for reading in readings:
        module = inner.get_submodule(reading.module)

        def keep(_: Any, taken: Any, out: Any = None, reading: Reading = reading) -> None:
            value = taken if reading.side == "input" else out
            found[reading] = value[0] if isinstance(value, tuple) else value

        hook = module.register_forward_pre_hook if reading.side == "input" else module.register_forward_hook
        handles.append(hook(keep))
    try:
        inner(**given, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _pooled(states: Tensor, reading: Reading) -> Tensor:
    held = states.detach().float()
    return (held[-1] if reading.pool == "last" else held.mean(0)).cpu()
