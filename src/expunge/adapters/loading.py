"""Models from the hub or from a local folder of the same layout, checked before any weight is read."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from expunge.adapters import composite, storage
from expunge.adapters.extra import need, quiet
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.pairs import PairAdapter
from expunge.adapters.projection import block_of
from expunge.core.errors import InputError, MissingExtra, nearest

Precision = Literal["float32", "bfloat16", "auto"]

_DESCRIPTIONS = ("config.json", "adapter_config.json", composite.FILE)  #: a model folder has one of them
_PLAIN: dict[str, Any] = {"revision": None, "trust_remote_code": False}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load(
    source: str | Path,
    *,
    dtype: Precision = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    merge: bool = True,
    device: str | torch.device | None = None,
    **settings: Any,
) -> LanguageAdapter:
    """Load a language model (a decoder, or an encoder-decoder) and its tokenizer.

    What is already on the machine (a folder, or the hub's cache) is used without asking the network.

    Args:
        source: a local folder (of a model, of a peft adapter, which brings its base, or of a composite) or a hub id.
        dtype: number type of the weights; ``auto`` is the one they were saved in.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run model code that comes with the weights.
        merge: add a peft adapter to the weights of its base, so that the result is a plain model; else keep it apart.
        device: where to put it; none: left on the CPU.
        settings: of :class:`~expunge.adapters.language.LanguageAdapter` (``template``, ``max_length``, ``truncate``...).

    Raises:
        InputError: not found, unreachable, pickled weights, no language model that generates.
        MissingExtra: transformers (or peft, for an adapter) is not installed.
    """
    transformers = need("transformers", "A language model")
    if dtype not in ("float32", "bfloat16", "auto"):
        raise InputError(f"dtype must be one of float32, bfloat16, auto; got {dtype!r}.")
    name = locate(str(source))
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    adapter_of: str | None = None
    if not composite.is_composite(Path(name)):
        adapter_of = _peft_base(name, options)
    place = adapter_of or name
    model = _open(transformers, place, kind, options if adapter_of is None else {**options, "revision": None})
    with quiet():
        if adapter_of is not None:
            model = _add_adapter(model, name, revision, merge)
        tokenizer = _tokenizer(transformers, [name, place] if adapter_of else [place], options)
    model.requires_grad_(True)
    return wrap(model.to(device) if device is not None else model, tokenizer, **settings)


def open_part(folder: Path) -> Any:
    """The model in a folder, without a tokenizer, in float32: what stands beside another one, whose tokenizer serves both.

    Raises:
        InputError: not found, or no language model.
    """
    return _open(need("transformers", "A language model"), locate(str(folder)), torch.float32, _PLAIN)


def tokenizer_of(source: str | Path) -> Any:
    """The tokenizer of a model, without its weights.

    Args:
        source: as in :func:`load`.

    Raises:
        InputError: not found, or without a tokenizer.
    """
    transformers = need("transformers", "A language model")
    name = locate(str(source))
    options: dict[str, Any] = {"revision": None, "trust_remote_code": False}
    with quiet():
        beneath = None if composite.is_composite(Path(name)) else _peft_base(name, options)
        return _tokenizer(transformers, [name, beneath] if beneath else [name], options)


def load_masked(source: str) -> tuple[Any, Any]:
    """A masked language model (BERT, RoBERTa) and its tokenizer, in evaluation mode.

    Args:
        source: a local folder or a hub id; pickled weights are refused.

    Raises:
        InputError: not found, no masked language model, or a tokenizer without a mask.
        MissingExtra: transformers is not installed.
    """
    transformers = need("transformers", "A masked language model")
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as known

    name, options = locate(source), {"revision": None, "trust_remote_code": False}
    config = _get(transformers.AutoConfig, name, options)
    classes = {c for value in known.values() for c in ([value] if isinstance(value, str) else value)}
    if not classes & set(getattr(config, "architectures", None) or ()):
        what = ", ".join(getattr(config, "architectures", None) or ()) or f"model type {config.model_type!r}"
        raise InputError(
            f"{source!r} is no masked language model: its architecture is {what}.",
            "Give an encoder that fills in masked words, such as roberta-base or bert-base-cased.",
        )
    check_weights(Path(name))
    with quiet():
        weights = {"dtype": torch.float32, "use_safetensors": True}
        model = _get(transformers.AutoModelForMaskedLM, name, {**options, **weights})
        tokenizer = _tokenizer(transformers, [name], options)
    if tokenizer.mask_token_id is None:
        raise InputError(
            f"The tokenizer of {source!r} has no mask.", "Set one: tokenizer.mask_token = '<a token of its vocabulary>'."
        )
    return model.eval(), tokenizer


def load_auto(kind: str, source: str, **options: Any) -> tuple[Any, Any]:
    """A model of transformers that is no language model (an encoder, a classifier of texts) and its tokenizer, in float32.

    Args:
        kind: name of the auto class, such as ``AutoModel``.
        source: a local folder, from which alone is read then, or a hub id; pickled weights are refused.
        options: of ``from_pretrained``.

    Raises:
        InputError: not found, unreachable, or pickled weights.
        MissingExtra: transformers is not installed.
    """
    transformers = need("transformers", "An encoder of texts")
    name = locate(source)
    check_weights(Path(name))
    with quiet():
        weights = {"dtype": torch.float32, "use_safetensors": True, **options}
        return _get(getattr(transformers, kind), name, {**_PLAIN, **weights}), _tokenizer(transformers, [name], _PLAIN)


def load_config(source: str) -> Any:
    """The configuration of a model of transformers, from a local folder or by a hub id.

    Raises:
        InputError: not found, or unreachable.
    """
    return _get(need("transformers", "An encoder of texts").AutoConfig, locate(source), _PLAIN)


def wrap(model: Any, tokenizer: Any, **settings: Any) -> LanguageAdapter:
    """The adapter of a language model that is there: of a decoder, or of an encoder-decoder.

    Args:
        model, tokenizer, settings: see :class:`~expunge.adapters.language.LanguageAdapter`.

    Raises:
        InputError: neither of both, or a tokenizer that does not fit.
    """
    pairs = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return (PairAdapter if pairs else LanguageAdapter)(model, tokenizer, **settings)


def is_pairs(config: Any) -> bool:
    """Whether a configuration is that of an encoder-decoder language model (T5, BART)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as known

    architectures = list(getattr(config, "architectures", None) or [])
    classes = {c for value in known.values() for c in ([value] if isinstance(value, str) else value)}
    right = any(a in classes for a in architectures) if architectures else config.model_type in known
    return bool(getattr(config, "is_encoder_decoder", False)) and right


def _open(transformers: Any, place: str, kind: Any, options: dict[str, Any]) -> Any:
    """A language model, or what is made of several parts that are such models."""
    if composite.is_composite(Path(place)):
        return composite.load(Path(place), lambda part: _open(transformers, locate(str(part)), kind, options))
    return _model(transformers, place, kind, options)


def _model(transformers: Any, place: str, kind: Any, options: dict[str, Any]) -> Any:
    """A whole language model, checked before any weight is read."""
    config = _get(transformers.AutoConfig, place, options)
    kind_of = transformers.AutoModelForSeq2SeqLM if is_pairs(config) else transformers.AutoModelForCausalLM
    if not is_pairs(config):
        check_causal(config, place)
    check_weights(Path(place))
    with quiet():
        weights = {"dtype": kind, "use_safetensors": True, "output_loading_info": True}
        model, info = _get(kind_of, place, {**options, **weights})
    _check_complete(info, place)
    return model


def locate(source: str) -> str:
    """The absolute path of a local folder, or ``source`` itself if it can be a hub id.

    Raises:
        InputError: it is a file, or neither a folder nor a possible hub id; the nearest folders are named.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not any((path / n).is_file() for n in _DESCRIPTIONS):
            raise InputError(f"The folder {source!r} holds no model (there is no config.json).", _near(path, inside=True))
        return str(path.absolute())
    if path.exists():
        raise InputError(f"{source!r} is a file, not a model folder.", f"Give the folder that holds it: {str(path.parent)!r}.")
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1 or (path.parent != Path() and path.parent.is_dir())
    if looks_local or not _HUB_ID.fullmatch(source):
        raise InputError(f"There is no model folder {source!r}.", _near(path, inside=False))
    return source


def _near(path: Path, inside: bool) -> str:
    at = path if inside else path.parent
    while not at.exists() and at != at.parent:
        at = at.parent
    near = sorted(at.glob("*")) + sorted(at.glob("*/*"))
    folders = [p for p in near if any((p / n).is_file() for n in _DESCRIPTIONS)]
    close = nearest(path.name, [p.name for p in folders]) or [p.name for p in folders[:3]]
    found = [str(p) for p in folders if p.name in close][:3]
    if found:
        return "Models near it: " + ", ".join(found) + "."
    return f"No model was found in {str(at)!r}; give a folder with a config.json, or a hub id such as 'organisation/name'."


def check_causal(config: Any, source: str) -> None:
    """Refuse what is no causal language model.

    Raises:
        InputError: naming the architecture.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    architectures = list(getattr(config, "architectures", None) or [])
    classes = {c for value in known.values() for c in ([value] if isinstance(value, str) else value)}
    right = any(a in classes for a in architectures) if architectures else config.model_type in known
    if not right and not custom:
        what = ", ".join(architectures) or f"model type {config.model_type!r}"
        raise InputError(
            f"{source!r} is no causal language model: its architecture is {what}.",
            "Give a decoder with a language-modelling head (such as LlamaForCausalLM or GPT2LMHeadModel), or an encoder-decoder "
            "(such as T5ForConditionalGeneration).",
        )


def check_weights(folder: Path) -> None:
    """Refuse a local folder with pickled weights only: loading them can run code. Of a composite its parts are looked at.

    Raises:
        InputError: there are no safetensors files.
    """
    if composite.is_composite(folder):
        for part in [p for p in sorted(folder.iterdir()) if p.is_dir()]:
            check_weights(part)
        return
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickled:
        raise InputError(
            f"{str(folder)!r} holds pickled weights only ({pickled[0]}), which can run code when they are read.",
            "If you trust them, convert them once: "
            "AutoModelForCausalLM.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW).",
        )
    raise InputError(f"{str(folder)!r} holds no weights (*.safetensors).", "Give the folder that save_pretrained wrote.")


def _check_complete(info: dict[str, Any], source: str) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"The weights of {source!r} lack {len(missing)} of the model's tensors (such as {missing[0]!r}).",
            "They would be random: check that configuration and weights belong together.",
        )
    lost = sorted(k for k in info["unexpected_keys"] if block_of(k) is not None)
    if lost:
        raise InputError(
            f"The weights of {source!r} hold directions that are taken out of the model's states (after {block_of(lost[0])!r}), "
            "which would be lost.",
            "Save the model by its own save_pretrained, which writes them into a file of their own.",
        )


def _get(kind: Any, source: str, options: dict[str, Any]) -> Any:
    """``from_pretrained`` without the network if it can be, with it otherwise; errors in one sentence."""
    if Path(source).is_dir():
        try:
            return kind.from_pretrained(source, local_files_only=True, **options)
        except Exception as error:  # whatever a broken file makes the libraries raise
            raise InputError(f"{source!r} could not be loaded: {_first_line(error)}.", "Check the folder's files.") from error
    with suppress(OSError, ValueError):  # not (wholly) in the cache: it is fetched below, and its errors are told there
        return kind.from_pretrained(source, local_files_only=True, **options)
    reach(source, options["revision"])
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        text = _first_line(error)
        if "trust_remote_code" in str(error):
            raise InputError(f"{source!r} brings its own code.", "If you trust it, allow it: trust_remote_code=True.") from error
        if "safetensors" in str(error):
            raise InputError(
                f"{source!r} has no safetensors weights on the hub.", "Choose a revision that has, or convert them."
            ) from error
        raise _unavailable(source, text) from error


def reach(source: str, revision: str | None = None) -> None:
    """One quick question to the hub, so that a wrong name or a missing network is known at once and not after many retries.

    Raises:
        InputError: there is no such model, or no way to the hub.
    """
    try:
        need("huggingface_hub", "The hub").HfApi().model_info(source, revision=revision, timeout=10)
    except MissingExtra:
        raise
    except Exception as error:  # of several libraries: name resolution, HTTP, permissions, offline mode
        raise _unavailable(source, _first_line(error)) from error


def _unavailable(source: str, reason: str) -> InputError:
    return InputError(
        f"{source!r} is neither a local folder nor to be had from the hub: {reason}.",
        "Check the name and the network, or download it elsewhere and give the folder.",
    )


def _tokenizer(transformers: Any, places: list[str], options: dict[str, Any]) -> Any:
    problems: list[InputError] = []
    for place in places:
        try:
            return _get(transformers.AutoTokenizer, place, options)
        except InputError as error:
            problems.append(error)
    raise InputError(f"No tokenizer could be loaded: {problems[-1].message}", "Save the model's tokenizer beside it.")


def _peft_base(source: str, options: dict[str, Any]) -> str | None:
    """The base model of a folder or hub id that holds a peft adapter; none for a plain model."""
    folder = Path(source)
    if not folder.is_dir():
        try:
            config = need("peft", "A peft adapter").PeftConfig.from_pretrained(
                source, revision=options["revision"], local_files_only=True
            )
        except (MissingExtra, ValueError, OSError):
            return None
        return locate(str(config.base_model_name_or_path))
    settings = folder / "adapter_config.json"
    if not settings.is_file():
        return None
    try:
        found = json.loads(settings.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        raise InputError(f"{str(settings)!r} is no JSON object.", "Check the folder's files.") from None
    if not found:
        raise InputError(f"{str(settings)!r} does not name its base model.", "Write it there as base_model_name_or_path.")
    near = folder / found
    return locate(str(near) if near.is_dir() else found)


def _add_adapter(model: Any, source: str, revision: str | None, merge: bool) -> Any:
    peft = need("peft", "A peft adapter")
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        check_weights(folder)
    try:
        wrapped = peft.PeftModel.from_pretrained(model, source, revision=revision, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"The adapter {source!r} could not be loaded: {_first_line(error)}.", "Check that it belongs to its base."
        ) from error
    return storage.joined(wrapped) if merge else wrapped


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
