"""What must hold of a model, what its configuration says, and how it is written."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from expunge.adapters.extra import quiet
from expunge.core.errors import InputError
from expunge.core.files import atomic_path, check_room

OWN_BASE = "base"  #: name of the base of an adapter whose base is not the target: saved with it, in the folder of this name

_UNSAVED = "_expunge_unsaved"  #: attribute of a model that no file holds: an adapter was added to its weights, for instance
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")


def check_model(model: Any, tokenizer: Any, *, pairs: bool = False) -> None:
    """Refuse what is no causal language model (with ``pairs``: no encoder-decoder), and a tokenizer that does not fit it.

    Raises:
        InputError: no head, the other kind of model, or more tokens than embeddings.
    """
    name = type(model).__name__
    kind = "encoder-decoder" if pairs else "causal language model"
    remedy = f"Load it with transformers.{'AutoModelForSeq2SeqLM' if pairs else 'AutoModelForCausalLM'}."
    head = getattr(model, "get_output_embeddings", None)
    if not callable(head) or not hasattr(model, "config"):
        raise InputError(f"{name} is no {kind} of transformers.", remedy)
    if not isinstance(head(), nn.Module) or not callable(getattr(model, "generate", None)):
        raise InputError(f"{name} has no language-modelling head, so it is no {kind}.", remedy)
    if getattr(model.config, "is_encoder_decoder", False) and not pairs:
        raise InputError(f"{name} is an encoder-decoder, no causal language model.", "Use expunge.adapters.pairs.PairAdapter.")
    if pairs and not getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"{name} is no encoder-decoder.", "Use expunge.adapters.language.LanguageAdapter.")
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise InputError(
            f"The tokenizer has token ids up to {largest}, but the model has only {rows} embeddings.",
            "Use the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)).",
        )


def context_of(model: Any) -> int | None:
    """The longest sequence that the model holds, as its configuration says it; none if it says nothing."""
    config = text_config(model)
    found = [getattr(config, name, None) for name in _LENGTHS]
    known = [int(n) for n in found if isinstance(n, int) and n > 0]
    return min(known) if known else None


def text_config(model: Any) -> Any:
    """The configuration of the language part of a model (the whole one, unless it has several parts)."""
    get = getattr(model.config, "get_text_config", None)
    return get(decoder=True) if callable(get) else model.config


def generation_ends(model: Any) -> list[int]:
    """End tokens of the model's own generation settings (a chat model may have several)."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        return []
    return [int(e) for e in ends] if isinstance(ends, (list, tuple)) else [int(ends)]


def block_names(model: nn.Module) -> list[str]:
    """The names of the transformer blocks: the outermost list of modules as long as the configuration says.

    Raises:
        InputError: there is none.
    """
    config = text_config(model)
    depth = next((d for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if (d := getattr(config, n, None))), None)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == (depth or len(m)) > 0]
    if not lists:
        raise InputError(
            f"No list of {depth or 'any'} blocks was found in {type(model).__name__}.",
            "Methods that read features cannot be used with it.",
        )
    name, blocks = min(lists, key=lambda item: item[0].count("."))
    return [f"{name}.{i}" for i in range(len(blocks))]


def decoder_blocks(model: nn.Module) -> list[str]:
    """The names of the decoder's blocks of an encoder-decoder: the outermost list of modules in its decoder.

    Raises:
        InputError: there is none.
    """
    get: Any = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    place = next((n for n, m in model.named_modules() if m is decoder), None)
    lists = [(n, m) for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m)] if decoder is not None else []
    if not lists or place is None:
        raise InputError(
            f"No list of blocks was found in the decoder of {type(model).__name__}.",
            "Methods that read features cannot be used with it.",
        )
    name, blocks = min(lists, key=lambda item: item[0].count("."))
    return [f"{place}.{name}.{i}" for i in range(len(blocks))]


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the arguments that a model's forward pass takes."""
    kind: Any = type(model)
    return _parameters_of(kind)


@lru_cache(maxsize=32)
def _parameters_of(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def silence_dropout(model: nn.Module) -> None:
    """Set every dropout probability of the modules to 0, in place; the configuration keeps its own."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def joined(model: Any) -> Any:
    """A peft model as a plain one, which remembers that no file holds its weights: an adapter on it must be saved with them."""
    plain = model.merge_and_unload()
    mark_unsaved(plain)
    return plain


def mark_unsaved(model: Any) -> None:
    """Note that no file holds a model as it is: an adapter on it is saved with its weights."""
    setattr(model, _UNSAVED, True)


def mark_saved(model: Any) -> None:
    """Note that the files after which a model is named hold it as it is."""
    vars(model).pop(_UNSAVED, None)


def save(folder: Path, model: Any, tokenizer: Any, merge: bool, state: dict[str, Tensor] | None) -> None:
    """Write model and tokenizer into ``folder``, which appears complete or not at all.

    Raises:
        InputError: the folder holds something, or the disk has no room.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{str(folder)!r} exists and is not empty.", "Choose another folder, or remove it.")
    peft = hasattr(model, "peft_config")
    merge = merge or (peft and hasattr(model.get_base_model(), _UNSAVED))  # its base is in no file that an adapter could name
    if peft and merge:
        # Merged in a copy: taking an adapter out again leaves rounding errors in the weights.
        model = copy.deepcopy(model).merge_and_unload()
    whole = merge or not peft or has_own_base(model)
    tensors = model.parameters() if whole else (p for n, p in model.named_parameters() if "lora_" in n)
    check_room(folder.parent, sum(p.numel() * p.element_size() for p in tensors), "Saving the model")
    with atomic_path(folder) as temporary, savable(model), quiet():
        temporary.mkdir()
        with _base_beside(model, temporary, state) if peft and not merge else contextlib.nullcontext():
            model.save_pretrained(temporary, **({} if state is None else {"state_dict": state}))
        tokenizer.save_pretrained(temporary)


def has_own_base(model: Any) -> bool:
    """Whether the base of a peft model is none that can be had elsewhere, and has to be saved with its adapter."""
    return any(c.base_model_name_or_path == OWN_BASE for c in getattr(model, "peft_config", {}).values())


@contextlib.contextmanager
def _base_beside(model: Any, folder: Path, state: dict[str, Tensor] | None) -> Iterator[None]:
    """Write the base of a peft model that has one of its own into ``folder``; the adapter, saved meanwhile, names it.

    While the adapter is saved the whole path stands for the name: peft looks whether there is such a model.
    """
    if not has_own_base(model):
        yield
        return
    inner = model.get_base_model()
    held = inner.state_dict() if state is None else {n.removeprefix("base_model.model."): v for n, v in state.items()}
    plain = {n.replace(".base_layer.", "."): v for n, v in held.items() if ".lora_" not in n}
    inner.save_pretrained(folder / OWN_BASE, state_dict=plain)
    configs = [c for c in model.peft_config.values() if c.base_model_name_or_path == OWN_BASE]
    for config in configs:
        config.base_model_name_or_path = str(folder / OWN_BASE)
    try:
        yield
    finally:
        for config in configs:
            config.base_model_name_or_path = OWN_BASE
    for path in folder.rglob("adapter_config.json"):
        said = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**said, "base_model_name_or_path": OWN_BASE}, indent=2, sort_keys=True), encoding="utf-8")


@contextlib.contextmanager
def savable(model: Any) -> Iterator[None]:
    """Generation settings with sampling parameters but no sampling are refused by transformers; write them as sampling."""
    config = getattr(model, "generation_config", None)
    held = None if config is None else config.do_sample
    if config is not None:
        try:
            config.validate(strict=True)
        except ValueError:
            config.do_sample = True
    try:
        yield
    finally:
        if config is not None:
            config.do_sample = held
