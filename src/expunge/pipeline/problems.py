"""From a configuration to a model of rows with its data: the user's own function, or a transformers classifier and files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.adapters.extra import need, quiet
from expunge.core.entries import is_entry
from expunge.core.errors import InputError
from expunge.data.rows import Table
from expunge.data.tables import Reading, read
from expunge.engine.members import Training
from expunge.pipeline.models import resolve
from expunge.pipeline.supervised import Supervised, load_entry

_ATTENTION = "expunge"  #: attention whose mask is made without a look at its values: see :func:`_open_masks`


def load_problem(
    model: str, *, data: str | None = None, holdout: str | None = None, reading: Reading | None = None,
    training: Training | None = None, base: str | None = None,
) -> Supervised:  # fmt: skip
    """What ``model`` names, with its rows.

    Args:
        model: ``package.module:function`` or ``file.py:function``, which brings everything with it; or the folder or hub id of a
            transformers classifier of images or texts.
        data: for a transformers classifier: the rows that it was trained on, see :func:`expunge.data.tables.read_table`.
        holdout: rows that it was never trained on, read in the same way.
        reading: which column is what; the size, mean and deviation of images follow from the model where they are not given.
        training: how it was trained, so that it can be retrained.
        base: what its training began from; none: fresh weights.

    Raises:
        InputError: something is missing, cannot be read, or does not fit.
    """
    if is_entry(model):
        if data or holdout or training or base or (reading is not None and reading != Reading()):
            raise InputError(
                f"{model!r} brings its own data and training.", "Leave out --data, --holdout, --base, reading.* and training.*."
            )
        return load_entry(model)
    if data is None:
        raise InputError(
            f"{model!r} names no function, and no rows are given.",
            "Write package.module:function or file.py:function; or give a transformers classifier its rows: --data FILE.",
        )
    return _transformers(model, (data, holdout), reading or Reading(), training, base)


def _transformers(
    source: str, data: tuple[str, str | None], reading: Reading, training: Training | None, base: str | None
) -> Supervised:
    need("transformers", "A transformers classifier")
    from transformers import AutoConfig, AutoTokenizer

    place = resolve(source)
    config = AutoConfig.from_pretrained(place)
    names = [str(config.id2label[i]) for i in sorted(config.id2label)]
    regression = config.num_labels == 1
    tokenizer: Any = None
    if reading.text is not None:
        tokenizer = AutoTokenizer.from_pretrained(place)
    given: dict[str, Any] = {"task": "regression" if regression else "classification"}
    if reading.classes is None and not regression and set(names) != {f"LABEL_{i}" for i in range(len(names))}:
        given["classes"] = tuple(names)
    if reading.text is None:
        given |= {k: v for k, v in _pictures(Path(place)).items() if getattr(reading, k) is None}
    how = reading.model_copy(update=given)
    rows, unseen = _table(data[0], how, tokenizer), None if data[1] is None else _table(data[1], how, tokenizer)
    held = _load(place)
    build = partial(_fresh, place) if base is None else partial(_load, resolve(base), config.num_labels)
    return Supervised(rows, build, training, model=held, holdout=unseen, loss="mse" if regression else "l1")


def _table(source: str, reading: Reading, tokenizer: Any) -> Table:
    return read(Path(source), reading, tokenizer=tokenizer)


def _pictures(place: Path) -> dict[str, Any]:
    """Size, mean and deviation that a model's own preprocessing names."""
    path = place / "preprocessor_config.json"
    if not path.is_file():
        return {}
    held = json.loads(path.read_text(encoding="utf-8"))
    size = held.get("size")
    found: dict[str, Any] = {}
    if isinstance(size, dict) and "height" in size and "width" in size:
        found["size"] = (int(size["height"]), int(size["width"]))
    if held.get("do_normalize", True) and "image_mean" in held and "image_std" in held:
        found |= {"mean": tuple(held["image_mean"]), "std": tuple(held["image_std"])}
    return found


def _class(config: Any) -> Any:
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if name.endswith(("ForImageClassification", "ForSequenceClassification")):
            found = getattr(transformers, name, None)
            if found is not None:
                return found
    raise InputError(
        f"This is no classifier of images or texts: {', '.join(getattr(config, 'architectures', None) or ['unknown'])}.",
        "Give a model saved as ...ForImageClassification or ...ForSequenceClassification, or a function: file.py:function.",
    )


def _open_masks() -> None:
    """Register attention by torch's own kernels that always makes its mask.

    The library's own looks whether any token is padding, to leave the mask out; models that are trained together cannot be asked.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, **more: Any) -> Any:
        return sdpa_mask(*args, **{**more, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(_ATTENTION, mask)


def _load(place: str, labels: int | None = None) -> nn.Module:
    """A trained model, or with ``labels`` a base whose head is made anew where it does not fit."""
    from transformers import AutoConfig

    more: dict[str, Any] = {} if labels is None else {"num_labels": labels, "ignore_mismatched_sizes": True}
    _open_masks()
    with quiet():
        model: nn.Module = _class(AutoConfig.from_pretrained(place)).from_pretrained(
            place, dtype=torch.float32, attn_implementation=_ATTENTION, **more
        )
    return model.eval()


def _fresh(place: str) -> nn.Module:
    from transformers import AutoConfig

    _open_masks()
    config = AutoConfig.from_pretrained(place, attn_implementation=_ATTENTION)
    model: nn.Module = _class(config)(config)
    return model.eval()
