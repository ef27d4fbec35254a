"""What a model is, as a hash: the key under which everything computed from it is stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from expunge.adapters.tokenise import Encoder

# Where a model came from and which library wrote it do not change what it says.
_VOLATILE = frozenset(
    [
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "_attn_implementation",
        "architectures",
        "base_model_name_or_path",
    ]
)
_PEFT = frozenset(("inference_mode", "init_lora_weights", "peft_version", "revision", "target_modules", "auto_mapping"))
_BLOCK = 1 << 24


def fingerprint(model: nn.Module, tokenizer: Any, encoder: Encoder) -> str:
    """SHA-256 over the weights (name, type, shape, bytes), configuration, adapter settings, tokenizer and template."""
    state = weights_hash(model)
    config: Any = getattr(model, "config", None)
    described = {
        "config": _plain(config.to_dict()) if config is not None else {},
        "peft": {
            k: {n: v for n, v in _plain(c.to_dict()).items() if n not in _PEFT}
            for k, c in getattr(model, "peft_config", {}).items()
        },
        "tokenizer": describe_tokenizer(tokenizer),
        "template": [encoder.template, encoder.chat, encoder.max_length, encoder.truncate],
    }
    state.update(json.dumps(described, sort_keys=True, default=str).encode())
    return str(state.hexdigest())


def weights_hash(model: nn.Module) -> Any:
    """A running SHA-256 over the weights of a model and its buffers: name, type, shape, bytes."""
    return state_hash(model.state_dict())


def state_hash(held: Mapping[str, Tensor]) -> Any:
    """The same over weights by name."""
    state = hashlib.sha256()
    for name, tensor in sorted(held.items()):
        state.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        _update(state, tensor)
    return state


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """All of a tokenizer that decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        core = json.loads(backend.to_str())
        # Set by whoever called it last, and never used here.
        core = {k: v for k, v in core.items() if k not in ("padding", "truncation")}
    else:
        core = {"class": type(tokenizer).__name__, "vocabulary": sorted(tokenizer.get_vocab().items())}
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    return {"core": core, "special": special, "chat_template": getattr(tokenizer, "chat_template", None)}


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {k: sorted(v, key=str) if isinstance(v, set) else v for k, v in config.items() if k not in _VOLATILE}


def _update(state: Any, tensor: Tensor) -> None:
    """Hash a tensor's bytes block by block, without a second copy of it in memory."""
    flat = tensor.detach().contiguous().reshape(-1)
    step = max(1, _BLOCK // flat.element_size())
    for a in range(0, len(flat), step):
        state.update(flat[a : a + step].cpu().view(torch.uint8).numpy())
