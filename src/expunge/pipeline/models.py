"""From a name to a model: hub ids, local folders, run folders; and whether it fits into memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.core.errors import InputError, NoRoom
from expunge.core.files import size
from expunge.data.named import is_named
from expunge.data.records import Record, RecordSet
from expunge.data.sources import load as load_records
from expunge.pipeline.config import TextConfig, UnlearnConfig
from expunge.pipeline.guarding import is_guarded, open_guarded

if TYPE_CHECKING:
    from expunge.adapters.language import LanguageAdapter
    from expunge.engine.parts import Parameters


def resolve(source: str) -> str:
    """The folder or hub id that holds a model's weights: a run folder stands for its ``model/``.

    Raises:
        InputError: the run has not finished training.
    """
    folder = Path(source)
    if not (folder / "manifest.json").is_file():
        return source
    if not (folder / "model").is_dir():
        raise InputError(f"The run {source!r} holds no model yet.", f"Finish it first: expunge ... --out {source} --resume.")
    return str(folder / "model")


def open_adapter(source: str, text: TextConfig, *, dropout: bool = False) -> LanguageAdapter:
    """Load a causal language model with its tokenizer; the way text is formed is the run's own if ``source`` is a run.

    ``dropout`` leaves the model's own dropout to the training loop.
    """
    from expunge.adapters.loading import load

    held = text_of(source, text)
    manifest = Path(source) / "manifest.json"
    place = Path(resolve(source))
    if is_guarded(place):
        return _guarded(place, json.loads(manifest.read_text(encoding="utf-8"))["config"], held, dropout)
    check_memory(sum(p.stat().st_size for p in place.rglob("*.safetensors")) if place.is_dir() else 0, f"Loading {source!r}")
    return load(
        resolve(source), dtype=held.dtype, template=held.template, max_length=held.max_length, truncate=held.truncate,
        dropout=dropout,
    )  # fmt: skip


def text_of(source: str, text: TextConfig) -> TextConfig:
    """How text is formed for a model: with the template that its run was made with, unless another one is given."""
    manifest = Path(source) / "manifest.json"
    if not manifest.is_file() or text.template is not None:
        return text
    config = json.loads(manifest.read_text(encoding="utf-8"))["config"]
    own = config.get("text") or (config.get("texts") or {}).get("text") or {}  # texts: of a prepared run
    return text.model_copy(update={"template": own.get("template")})


def _guarded(place: Path, config: dict[str, Any], text: TextConfig, dropout: bool) -> LanguageAdapter:
    """What stands before a model, and the model, as a run of a guard has left them."""
    from expunge.pipeline.unlearn import load_request  # it loads models, too

    asked = UnlearnConfig(**config)
    request = load_request(asked)
    sets = {k: v for k, v in (("forget", request.forget), ("retain", request.retain)) if v is not None}
    return open_guarded(place, open_adapter(asked.model, text, dropout=dropout), sets)


def is_preset(name: str) -> bool:
    """Whether a name is that of a small untrained model, and of nothing in the file system."""
    from expunge.adapters.presets import PRESETS

    return name in PRESETS and not Path(name).exists()


def load_sets(sources: Mapping[str, str | None], columns: Mapping[str, str]) -> dict[str, RecordSet]:
    """Load the sets of a request by name; a source that is None is left out.

    Named data sets know their own columns. Files may differ: a file that lacks the named columns is read by the usual ones,
    as long as the named ones fit another file.

    Raises:
        InputError: a source cannot be read, or no file has the named columns.
    """
    found: dict[str, RecordSet] = {}
    misfits: dict[str, InputError] = {}
    fitted = False
    for name, source in sources.items():
        if source is None:
            continue
        own = not columns or (is_named(source) and not Path(source).is_file())
        try:
            found[name] = load_records(source, name=name, columns=None if own else columns)
            fitted = fitted or not own
        except InputError as error:
            if own:
                raise
            misfits[name] = error
    for name, misfit in misfits.items():
        if not fitted:
            raise misfit
        try:
            found[name] = load_records(str(sources[name]), name=name)
        except InputError:
            raise misfit from None
    if columns and not fitted:
        raise InputError("Columns were named, and there is no file to read them from.", "Leave the column names out.")
    return {name: found[name] for name in sources if name in found}


def load_set(source: str, name: str, columns: Mapping[str, str]) -> RecordSet:
    """Load one further set, by the named columns if it is a file that has them, else by the usual ones.

    Raises:
        InputError: it cannot be read either way.
    """
    if columns and not is_named(source):
        try:
            return load_records(source, name=name, columns=columns)
        except InputError as error:
            try:
                return load_records(source, name=name)
            except InputError:
                raise error from None
    return load_records(source, name=name)


def check_source(source: str) -> None:
    """Check that a local model is there before anything is trained for it; of a hub id only the form is checked.

    Raises:
        InputError: there is no such folder, it holds no weights, or its run has not finished.
    """
    from expunge.adapters.loading import check_weights, locate

    place = Path(locate(resolve(source)))
    if not (place / "adapter_config.json").is_file():
        check_weights(place)


def all_texts(sets: Sequence[RecordSet]) -> list[str]:
    """Every text of the records, for a tokenizer made from the data."""
    return [t for s in sets for r in s for t in _texts(r) if t]


def _texts(record: Record) -> tuple[str, ...]:
    turns = tuple(content for _, content in record.messages)
    more = (record.paraphrase, record.question_paraphrase, *record.perturbed, *record.alternatives)
    return (record.prompt, record.lead + record.answer, *turns, *more)


def refuse_composite(adapter: LanguageAdapter, parts: Parameters | None = None) -> None:
    """Refuse to train what is more than one network: a target with what an earlier request put beside it.

    Args:
        adapter: holds the model.
        parts: which parameters are going to move; some add to what stands beside the target.

    Raises:
        InputError: the adapter holds such a model.
    """
    from expunge.adapters.composite import Composite

    if isinstance(adapter.model, Composite):
        if parts is not None and adapter.model.kind in parts.extends:
            return
        raise InputError(
            f"This model is a target with something beside it ({adapter.model.kind}), and only one network can be trained.",
            "Start from the target again, with the forget sets of all requests; it is in the folder target/ of the model.",
        )


def check_memory(needed: int, what: str) -> None:
    """Check an estimate of memory against what is free now.

    Raises:
        NoRoom: it does not fit.
    """
    import psutil
    import torch

    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if needed > free:
        raise NoRoom(
            f"{what} needs about {size(needed)} of memory, and {size(free)} are free.",
            "Use parameters=lora, a smaller engine.max_tokens, engine.gradient_checkpointing=true or text.dtype=bfloat16.",
        )


def describe_data(records: RecordSet) -> dict[str, Any]:
    """What the manifest and the report say of a set."""
    return {"records": len(records), "clusters": len(set(records.clusters())), "digest": records.digest, "source": records.source}
