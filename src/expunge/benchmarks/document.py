"""What a benchmark run leaves: every axis of every model, with what is needed to read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from expunge.audit.document import Curve, ModelEntry
from expunge.core.errors import InputError
from expunge.core.results import Number

DOCUMENT = "benchmark.json"


class AxisEntry(BaseModel):
    """An axis as it was measured: which metric, with which settings, on which sets."""

    model_config = ConfigDict(extra="forbid")

    name: str
    title: str
    group: str
    metric: str
    formula: str
    settings: dict[str, Any]
    sets: dict[str, str]  #: role to set
    number: str
    scale: float
    direction: str
    note: str


class GridRow(BaseModel):
    """One model in a table: the number of each column that could be measured."""

    model_config = ConfigDict(extra="forbid")

    label: str
    numbers: dict[str, Number]


class Grid(BaseModel):
    """A table of axes over models that differ in what they were made to forget."""

    model_config = ConfigDict(extra="forbid")

    name: str
    title: str
    columns: list[str]  #: names of axes
    titles: list[str]
    rows: list[GridRow]


class BenchmarkDocument(BaseModel):
    """``benchmark.json``: one benchmark on some models. The numbers of a model are keyed by axis."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal["1"] = "1"
    created: str
    benchmark: str
    title: str
    paper: str
    licence: str
    options: dict[str, Any]
    reference: str
    checkpoint: str  #: rule by which a checkpoint was chosen: last, or oracle
    data: dict[str, dict[str, Any]]  #: by set: records, clusters, digest; of a hazardous set nothing that could be read
    axes: list[AxisEntry]
    models: list[ModelEntry]
    curves: list[Curve] = Field(default_factory=list)  #: of the courses: an axis over several forget sets
    grids: list[Grid] = Field(default_factory=list)  #: of the courses whose forget sets have no order
    not_measured: list[str] = Field(default_factory=list)
    caveats: list[str] = Field(default_factory=list)
    protocol: dict[str, Any] = Field(default_factory=dict)
    signature: dict[str, str] = Field(default_factory=dict)

    def entry(self, label: str) -> ModelEntry:
        """The model called ``label``; KeyError if there is none."""
        for model in self.models:
            if model.label == label:
                return model
        raise KeyError(label)


def read(folder: Path) -> BenchmarkDocument:
    """The result of a benchmark run.

    Raises:
        InputError: it has none.
    """
    path = folder / DOCUMENT
    if not path.is_file():
        raise InputError(
            f"{str(folder)!r} holds no finished benchmark.", "Give the folder that --out of `expunge benchmark` named."
        )
    return BenchmarkDocument.model_validate_json(path.read_text(encoding="utf-8"))
