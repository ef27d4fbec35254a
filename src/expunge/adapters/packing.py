"""No work on padding: a batch runs through the model as one row of real tokens, and is padded only inside attention.

Linear layers, norms and embeddings treat every token alone, so a batch of ragged sequences needs no padding there; only attention
must know which tokens belong together. transformers lets a model's attention function be replaced; ours spreads queries, keys
and values to grids ``[B, T]``, calls the original function, and takes the real tokens back. Padding stands to the right of what
is real and attention is causal, so what the padded cells hold never matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.adapters.extra import need
from expunge.adapters.head import bare, base, take
from expunge.adapters.storage import text_config

_NAME = "expunge_packed"
_ORIGINAL = "sdpa"


GROUPS = 4  #: sequences of like length share one call of attention; of a ragged batch this spares a third of its work


@dataclass
class Layout:
    """Where each packed token stands in the padded grids that attention is computed on: one grid for each group of lengths.

    Attributes:
        places: cell of each packed token, counted through all grids, int64 ``[M]``.
        rows: packed token at each cell (any where there is none), int64 ``[sum of B * T]``.
        grids: (B, T) of each grid.
        calls: how often attention was computed under it.
    """

    places: Tensor
    rows: Tensor
    grids: tuple[tuple[int, int], ...]
    calls: int = 0

    @classmethod
    def of(cls, counts: Sequence[int], owner: Tensor, column: Tensor) -> Layout:
        """The layout of sequences of ``counts`` tokens, packed one after the other.

        Args:
            counts: tokens of each sequence.
            owner: sequence of each packed token, int64 ``[M]``.
            column: its position in the sequence, int64 ``[M]``.
        """
        sizes = np.asarray(counts)
        groups = np.array_split(np.argsort(sizes, kind="stable"), max(1, min(GROUPS, len(sizes) // 2)))
        grids = tuple((len(g), max(1, int(sizes[g].max()))) for g in groups)
        begin = np.zeros(len(sizes), dtype=np.int64)
        first = 0
        for group, (rows, width) in zip(groups, grids, strict=True):
            begin[group] = first + np.arange(rows) * width
            first += rows * width
        places = torch.from_numpy(begin).to(owner.device)[owner] + column
        cells = places.new_zeros(first)
        cells[places] = torch.arange(len(places), device=places.device)
        return cls(places, cells, grids)


_active: list[Layout] = []


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **options: Any) -> tuple[Tensor, None]:
    """Attention of a packed row ``[1, H, M, d]``, by the original function on ``[B, H, T, d]`` for each grid."""
    layout = _active[-1]
    layout.calls += 1
    original = need("transformers", "A language model").AttentionInterface()[_ORIGINAL]

    def spread(x: Tensor) -> list[Tensor]:
        flat = take(x[0].transpose(0, 1), layout.rows, layout.places)
        parts = torch.split(flat, [rows * width for rows, width in layout.grids])
        return [p.view(*grid, *p.shape[1:]).transpose(1, 2) for p, grid in zip(parts, layout.grids, strict=True)]

    options["is_causal"] = True
    grids = zip(spread(query), spread(key), spread(value), strict=True)
    parts = [original(module, q, k, v, None, **options)[0].flatten(0, 1) for q, k, v in grids]
    return take(torch.cat(parts), layout.places)[None], None


@cache
def _register() -> None:
    need("transformers", "A language model").AttentionInterface.register(_NAME, _attention)


def packable(model: nn.Module, width: int) -> bool:
    """Whether a model's settings allow packing: full causal attention by torch's fused function, and nothing put before the text.

    What the settings do not tell (attention that is no such function, layers with a memory of their own) a trial must show.
    """
    inner: Any = base(model)
    config = text_config(inner)
    # A composite runs several models, whose settings are not its own.
    if not getattr(inner, "packs", True) or getattr(inner.config, "_attn_implementation", None) != _ORIGINAL:
        return False
    if any(getattr(c, "is_prompt_learning", False) for c in getattr(bare(model), "peft_config", {}).values()):
        return False
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    if getattr(config, "use_sliding_window", True) is False:
        windows = windows[1:]
    if any(isinstance(w, int) and w < width for w in windows):
        return False
    # Recomputed blocks run after this pass, without its layout.
    return not any(getattr(m, "gradient_checkpointing", False) and m.training for m in inner.modules())


@contextmanager
def packed(model: nn.Module, layout: Layout) -> Iterator[None]:
    """While open, the model's attention reads its one row of tokens by ``layout``."""
    _register()
    config: Any = base(model).config
    held = config._attn_implementation
    _active.append(layout)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = held
        _active.pop()
