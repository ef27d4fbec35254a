"""Small untrained models of known architectures: for the demo, for trials, for tests."""

from __future__ import annotations

from typing import Any

import torch

from expunge.adapters.extra import need
from expunge.core.errors import unknown

# name: (architecture, width, blocks, heads); the inner width of a block is four times its width (8/3 where it is gated).
PRESETS: dict[str, tuple[str, int, int, int]] = {
    "llama-tiny": ("llama", 64, 2, 4),
    "llama-small": ("llama", 128, 4, 4),
    "llama-medium": ("llama", 256, 6, 8),
    "llama-base": ("llama", 384, 6, 6),
    "gpt2-tiny": ("gpt2", 64, 2, 4),
    "gpt2-small": ("gpt2", 128, 4, 4),
    "gpt2-medium": ("gpt2", 256, 6, 8),
    "qwen3-tiny": ("qwen3", 64, 2, 4),
    "neox-tiny": ("gpt_neox", 64, 2, 4),
    "opt-tiny": ("opt", 64, 2, 4),
    "t5-tiny": ("t5", 64, 2, 4),
}


def build(preset: str, tokenizer: Any, seed: int = 0, *, context: int = 512, **changes: Any) -> Any:
    """A randomly initialised language model: a decoder, or an encoder-decoder (T5).

    Args:
        preset: a name of :data:`PRESETS`.
        tokenizer: gives the size of the vocabulary and the special tokens.
        seed: of the initial weights; the global random state is left as it was.
        context: longest sequence in tokens (of a T5 nothing: it has no longest).
        changes: further settings of the architecture's configuration (``num_hidden_layers=3``).

    Raises:
        InputError: no such preset.
        MissingExtra: transformers is not installed.
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    transformers = need("transformers", "A language model")
    architecture, width, blocks, heads = PRESETS[preset]
    common = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    settings = {**common, **_shape(architecture, width, blocks, heads, context), **changes}
    config = transformers.AutoConfig.for_model(architecture, **settings)
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind.from_config(config, dtype=torch.float32).eval()


def _shape(architecture: str, width: int, blocks: int, heads: int, context: int) -> dict[str, Any]:
    if architecture == "gpt2":
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return {"n_embd": width, "n_layer": blocks, "n_head": heads, "n_positions": context, **off}
    if architecture == "t5":
        off = {"dropout_rate": 0.0, "decoder_start_token_id": 0}
        return {"d_model": width, "num_layers": blocks, "num_heads": heads, "d_kv": width // heads, "d_ff": 4 * width, **off}
    shape: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "max_position_embeddings": context,
    }
    if architecture == "opt":
        return {**shape, "ffn_dim": 4 * width, "word_embed_proj_dim": width, "dropout": 0.0}
    if architecture == "gpt_neox":
        return {**shape, "intermediate_size": 4 * width}
    shape |= {"num_key_value_heads": max(heads // 2, 1), "intermediate_size": -(-8 * width // 3 // 32) * 32, "rms_norm_eps": 1e-5}
    return {**shape, "head_dim": width // heads} if architecture == "qwen3" else shape
