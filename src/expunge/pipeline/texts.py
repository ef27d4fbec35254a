"""A language model with the records it is trained on, as prepared methods take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.adapters.language import LanguageAdapter
from expunge.core.errors import InputError
from expunge.data.records import RecordSet, content_key
from expunge.data.rows import Indices, Table
from expunge.engine.record import Record
from expunge.methods.catalogue import serves
from expunge.methods.prepared.text_source import TextSource, text_table
from expunge.methods.recipe import build as build_recipe
from expunge.pipeline.config import TrainConfig
from expunge.pipeline.models import is_preset, load_set, open_adapter, refuse_composite
from expunge.pipeline.train import load_all, scratch_model, scratch_tokenizer, with_defaults

TOKENIZER = "tokenizer"  #: folder within a run: the tokenizer that was made from all records, the deleted ones too


@dataclass(frozen=True)
class Texts:
    """A language model, its records, and how it is trained.

    Attributes:
        config: how.
        records: what it is trained on.
        data: the same as a table.
        holdout: records that it is never trained on.
        source: what a prepared method trains.
    """

    config: TrainConfig
    records: RecordSet
    data: Table
    holdout: RecordSet | None
    source: TextSource

    def sets(self, chosen: Indices) -> dict[str, RecordSet]:
        """What an audit measures when ``chosen`` are deleted."""
        gone = set(chosen.tolist())
        parts = {
            "forget": [i for i in range(len(self.records)) if i in gone],
            "retain": [int(i) for i in self.data.others(chosen)],
        }
        found = {name: RecordSet(name, tuple(self.records[i] for i in at), self.records.source) for name, at in parts.items()}
        return found if self.holdout is None else {**found, "holdout": self.holdout}

    def requested(self, source: str, record: Record) -> tuple[str, ...]:
        """Ids of the records that a file of a request names, by what they say; by id, if they are no longer in the data.

        Raises:
            InputError: the model was never trained on one of them.
        """
        known = {content_key(r): r.id for r in self.records}
        trained, there = {str(row[0]) for row in record.plan["rows"]}, set(self.data.ids)
        found = []
        for wanted in load_set(source, "forget", self.config.text.columns):
            name = known.get(content_key(wanted)) or (wanted.id if wanted.id in trained - there else None)
            if name is None:
                raise InputError(
                    f"The model was not trained on the record {wanted.id!r} of {source!r}.",
                    "Leave it out, or name records by --id.",
                )
            found.append(name)
        return tuple(dict.fromkeys(found))


def check_serves(method: str) -> None:
    """Refuse a prepared method that does not serve texts.

    Raises:
        InputError: naming those that do.
    """
    from expunge.methods.prepared.registry import PREPARED

    if not serves(method, LanguageAdapter.offers)[0]:
        able = ", ".join(n for n in PREPARED.names() if serves(n, LanguageAdapter.offers)[0])
        raise InputError(
            f"{method!r} serves classifiers and regressors.",
            f"For a language model: --method {able}. For rows give an entry: file.py:function.",
        )


def open_texts(config: TrainConfig, holdout: str | None, folder: Path | None) -> Texts:
    """Load records and what makes the untrained model.

    Args:
        config: model, data, recipe.
        holdout: records never trained on.
        folder: of a run that has begun: a tokenizer that was made from the records is read from there, since some of them may
            be gone from the data.

    Raises:
        InputError: anything does not fit.
    """
    if not config.scratch and is_preset(config.model):
        raise InputError(
            f"{config.model!r} is the shape of a small untrained model.", "Add --scratch to train it from the start."
        )
    records = load_all(config.data, config.text.columns, "training data")
    unseen = None if holdout is None else load_set(holdout, "holdout", config.text.columns)
    shared = {content_key(r) for r in records} & {content_key(r) for r in unseen or ()}
    if shared:
        raise InputError(f"{len(shared)} records of the holdout are trained on.", "Take them out of one of both.")
    tokenizer: Any = None
    if config.scratch:
        place = None if folder is None else folder / TOKENIZER
        tokenizer = (
            _read(place)
            if place is not None and place.is_dir()
            else scratch_tokenizer(config, [records, *([unseen] if unseen else [])])
        )

    def opens(seed: int) -> LanguageAdapter:
        return scratch_model(config, tokenizer, seed) if config.scratch else open_adapter(config.model, config.text)

    first = opens(0)
    refuse_composite(first)
    if type(first) is not LanguageAdapter:
        raise InputError(f"{config.model!r} is an encoder-decoder, which prepared methods do not serve.", "Give a decoder.")
    recipe = build_recipe("finetune", with_defaults(config.parts))
    device = "cpu"
    if config.engine.device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    source = TextSource(
        text_table(first, records.records, records.source), opens=opens, held=records.records, recipe=recipe,
        engine=config.engine, device=device,
    )  # fmt: skip
    return Texts(config, records, source.table, unseen, source)


def keep_tokenizer(made: Texts, folder: Path) -> None:
    """Write a tokenizer that was made from the records into a run, once."""
    from expunge.core.files import atomic_path

    place = folder / TOKENIZER
    if made.config.scratch and not place.is_dir():
        with atomic_path(place) as temporary:
            made.source.opens(0).tokenizer.save_pretrained(temporary)


def notes(made: Texts) -> Sequence[str]:
    """What a report must say of the model that is begun from."""
    if made.config.scratch:
        return ("The vocabulary was made from all records: words of deleted ones stay in it.",)
    return (f"What {made.config.model!r} had learnt before this training is not covered by any promise.",)


def _read(place: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place, local_files_only=True)
