"""What attention does with the tokens of a batch: the value vectors that it makes of them, and how much of it each receives.

transformers computes attention through functions that can be registered under a name. Ours notes what it is handed and calls the
one that the model would have used, so it works whatever layout a block has (one matrix for queries, keys and values, or three).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from expunge.adapters.extra import need
from expunge.adapters.head import base
from expunge.adapters.storage import block_names
from expunge.core.errors import InputError

VALUES, RECEIVED = "values", "received"
KINDS = (VALUES, RECEIVED)  #: what can be noted, as it stands before the name of a block

_NAME = "expunge_attending"
_ORIGINAL = "sdpa"


@dataclass
class _Notes:
    """What is to be noted of attention, in the order in which the blocks compute it.

    Attributes:
        names: of the blocks.
        wanted: kinds, by name of the block.
        real: which tokens are no padding, bool ``[B, T]``.
        found: what was noted, by kind and name, ``[B, T, D]`` each.
        calls: how often attention was computed.
    """

    names: list[str]
    wanted: Mapping[str, frozenset[str]]
    real: Tensor
    found: dict[str, Tensor]
    calls: int = 0

    def take(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Mapping[str, Any]) -> None:
        """Note one call."""
        name = self.names[self.calls] if self.calls < len(self.names) else ""
        self.calls += 1
        kinds = self.wanted.get(name, frozenset())
        if VALUES in kinds:
            self.found[f"{VALUES}:{name}"] = value.transpose(1, 2).flatten(2)
        if RECEIVED in kinds:
            self.found[f"{RECEIVED}:{name}"] = self._received(query, key, mask, options)[..., None]

    def _received(self, query: Tensor, key: Tensor, mask: Tensor | None, options: Mapping[str, Any]) -> Tensor:
        exact = torch.promote_types(query.dtype, torch.float32)
        scaling, bias = options.get("scaling"), options.get("position_bias")
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).to(exact)
        scores = query.to(exact) @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = scores if bias is None else scores + bias.to(exact)
        size = scores.shape[-1]
        square = torch.ones(size, size, dtype=torch.bool, device=query.device)
        seen = square.tril()
        if mask is not None and mask.dtype == torch.bool:
            seen = seen & mask
        elif mask is not None:
            scores = scores + mask.to(exact)
        shares = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0).mean(1)
        # What was put before the text (a soft prompt) has no place in the batch, but looks back like any other token.
        real = torch.nn.functional.pad(self.real, (size - self.real.shape[1], 0), value=True)
        later = square.tril(-1) & real[:, :, None]
        received: Tensor = (shares * later).sum(1) / later.sum(1).clamp(min=1)
        return received


_active: list[_Notes] = []


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """Attention by the original function; queries ``[B, H, T, d]``, keys and values ``[B, K, T, d]`` with H a multiple of K."""
    _active[-1].take(query, key, value, mask, options)
    original = need("transformers", "A language model").AttentionInterface()[_ORIGINAL]
    return original(module, query, key, value, mask, **options)


@cache
def _register() -> None:
    transformers = need("transformers", "A language model")
    masks = transformers.AttentionMaskInterface
    transformers.AttentionInterface.register(_NAME, _attention)
    masks.register(_NAME, masks()[_ORIGINAL])


@contextmanager
def attending(model: nn.Module, wanted: Sequence[str], real: Tensor, found: dict[str, Tensor]) -> Iterator[None]:
    """While open, a forward pass of a padded batch puts what is ``wanted`` into ``found``.

    Args:
        model: a causal model, which may be wrapped.
        wanted: ``values:<block>``, the value vectors of all heads side by side, ``[B, T, D]``, with gradients;
            ``received:<block>``, the mean attention over heads and the real tokens *after* it that a token gets, ``[B, T, 1]``.
        real: which tokens are no padding, bool ``[B, T]``.
        found: is filled.

    Raises:
        InputError: the model does not compute attention once in each block by torch's fused function.
    """
    if not wanted:
        yield
        return
    _register()
    inner: Any = base(model)
    held = getattr(inner.config, "_attn_implementation", None)
    by_name: dict[str, frozenset[str]] = {}
    for kind, _, name in (w.partition(":") for w in wanted):
        by_name[name] = by_name.get(name, frozenset()) | {kind}
    notes = _Notes(block_names(inner), by_name, real.bool(), found)
    what = f"What the attention of {type(inner).__name__} makes of tokens cannot be read"
    if held != _ORIGINAL:
        raise InputError(f"{what}: it is computed by {held!r}.", "Load it with attn_implementation='sdpa'.")
    _active.append(notes)
    inner.config._attn_implementation = _NAME
    try:
        yield
    finally:
        inner.config._attn_implementation = held
        _active.pop()
    if notes.calls != len(notes.names):
        raise InputError(
            f"{what}: it was computed {notes.calls} times in {len(notes.names)} blocks.", "Use a part that reads no values."
        )
