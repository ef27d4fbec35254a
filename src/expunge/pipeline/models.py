"""From a name to a model: hub ids, local folders, run folders; and whether it fits into memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.core.errors import InputError
from expunge.core.files import size
from expunge.data.records import Record, RecordSet
from expunge.pipeline.config import TextConfig

if TYPE_CHECKING:
    from expunge.adapters.language import LanguageAdapter


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


def open_adapter(source: str, text: TextConfig) -> LanguageAdapter:
    """Load a causal language model with its tokenizer; the way text is formed is the run's own if ``source`` is a run."""
    from expunge.adapters.loading import load

    held = text
    manifest = Path(source) / "manifest.json"
    if manifest.is_file() and text.template is None:
        config = json.loads(manifest.read_text(encoding="utf-8"))["config"]
        held = text.model_copy(update={"template": config.get("text", {}).get("template")})
    return load(
        resolve(source), dtype=held.dtype, template=held.template, max_length=held.max_length, truncate=held.truncate
    )  # fmt: skip


def all_texts(sets: Sequence[RecordSet]) -> list[str]:
    """Every text of the records, for a tokenizer made from the data."""
    return [t for s in sets for r in s for t in _texts(r) if t]


def _texts(record: Record) -> tuple[str, ...]:
    turns = tuple(content for _, content in record.messages)
    more = (record.paraphrase, record.question_paraphrase, *record.perturbed, *record.alternatives)
    return (record.prompt, record.answer, *turns, *more)


def check_memory(needed: int, what: str) -> None:
    """Check an estimate of memory against what is free now.

    Raises:
        InputError: it does not fit.
    """
    import psutil
    import torch

    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"{what} needs about {size(needed)} of memory, and {size(free)} are free.",
            "Use parameters=lora, a smaller engine.max_tokens, engine.gradient_checkpointing=true or text.dtype=bfloat16.",
        )


def describe_data(records: RecordSet) -> dict[str, Any]:
    """What the manifest and the report say of a set."""
    return {"records": len(records), "clusters": len(set(records.clusters())), "digest": records.digest, "source": records.source}
