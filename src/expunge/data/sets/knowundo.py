"""KnowUnDo: what the law asks to forget beside what it lets keep, by Tian, Liang, Cheng et al. (2024, arXiv 2407.01920).

Two domains, *privacy* and *copyright*, each with an *unlearn* and a *retention* split about the same people and books. A split is
one row with two lists: ``{"train": [{"text": ..., "labels": ...}], "val": [...]}``. The hub layout is read
(``privacy/unlearn.json``, or ``privacy/unlearn-00000-of-00001.parquet``) and the flat one (``privacy_unlearn.json``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from expunge.core.errors import InputError
from expunge.data.named import DATASETS, NamedSet
from expunge.data.records import Record, RecordSet
from expunge.data.schema import Column, checked, find, published_rows

HUB = "zjunlp/KnowUnDo"
_SPLIT = (Column("train", "objects"), Column("val", "objects"))
_QUESTION = (Column("text"), Column("labels"))
_HOMES = ("knowundo", "KnowUnDo")
_SPLITS = {"unlearn": "to forget", "retention": "to keep, of the same people or books"}


@DATASETS.register("knowundo")
class KnowUnDo(NamedSet):
    """KnowUnDo's questions of two domains, to forget and to keep (arXiv 2407.01920)."""

    name: ClassVar[str] = "knowundo"
    folder: str = Field("", description="folder that holds privacy/unlearn.json and its like")
    domain: Literal["privacy", "copyright"] = Field("privacy", description="what is protected")

    def configurations(self) -> dict[str, str]:
        """Both splits, for unlearning and for measuring."""
        return {
            f"{split}{'' if part == 'train' else '-val'}": f"{text}; {'used by' if part == 'train' else 'kept from'} unlearning"
            for split, text in _SPLITS.items()
            for part in ("train", "val")
        }

    def load(self, configuration: str) -> RecordSet:
        """The records of one part.

        Raises:
            InputError: the file is not there or does not fit the schema.
        """
        split, _, part = configuration.partition("-")
        label, rows = self._rows(split)
        held = list(checked(rows, _SPLIT, label))
        if len(held) != 1:
            raise InputError(f"{label} has {len(held)} rows, not one with 'train' and 'val'.", "Fetch the file again.")
        where, row = held[0]
        questions = ((f"{where} {part or 'train'} {i}", q) for i, q in enumerate(row[part or "train"]))
        found = [
            Record(id=f"knowundo-{self.domain}-{configuration}-{i:04d}", prompt=q["text"].strip(), answer=q["labels"].strip())
            for i, (_, q) in enumerate(checked(questions, _QUESTION, label))
        ]
        return RecordSet(f"knowundo:{configuration}", tuple(found), f"knowundo:{configuration}")

    def _rows(self, split: str) -> tuple[str, Iterator[tuple[str, Mapping[str, Any]]]]:
        names = tuple(
            n for base in (f"{self.domain}/{split}", f"{self.domain}_{split}") for n in (base, f"{base}-00000-of-00001")
        )
        path = find(self.folder, _HOMES, names)
        if path is None or path.suffix.lower() != ".json":
            return published_rows(self.folder, _HOMES, names, (HUB, self.domain, split), f"knowundo {self.domain} {split}")
        try:  # one object over many lines, or a list with it
            held = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{path.name} is no JSON: {error}.", "Fetch the file again.") from None
        rows = held if isinstance(held, list) else [held]
        return path.name, ((f"row {i}", r if isinstance(r, Mapping) else {}) for i, r in enumerate(rows, start=1))
