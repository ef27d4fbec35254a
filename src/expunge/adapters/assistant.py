"""Assistants: smaller models cut from a target, which share its weights."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from expunge.adapters.head import base
from expunge.adapters.storage import block_names, text_config
from expunge.core.errors import InputError

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def first_blocks(model: Any, count: int) -> Any:
    """The first ``count`` blocks of a model with its embeddings, final norm and head, as a model of its own.

    It has the weights of ``model`` themselves, not copies: it takes no memory, and what changes them changes both.

    Args:
        model: a transformers model with a language-modelling head, not wrapped.
        count: blocks, 1 to all of them.

    Raises:
        InputError: the model is wrapped, has no list of blocks, or has fewer.
    """
    if base(model) is not model:
        raise InputError(f"An assistant cannot be cut from a {type(model).__name__}.", "Merge its adapter first.")
    names = block_names(model)
    if not 1 <= count <= len(names):
        raise InputError(f"An assistant of {count} blocks was asked for; the model has {len(names)}.", f"Use 1 to {len(names)}.")
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    small = copy.deepcopy(model, shared)
    parent, _, last = names[0].rpartition(".")[0].rpartition(".")
    owner = small.get_submodule(parent)
    setattr(owner, last, nn.ModuleList(list(getattr(owner, last))[:count]))
    config = text_config(small)
    for name in _DEPTHS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, count)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        config.layer_types = list(kinds)[:count]
    return small.eval()


def adapted(model: Any) -> dict[str, Any]:
    """The settings of a peft model's adapters that decide what it says and no weight tells; empty for a plain model."""
    found = {}
    for name, held in getattr(model, "peft_config", {}).items():
        found[name] = {key: getattr(held, key, None) for key in ("r", "lora_alpha", "use_rslora")}
    return found
