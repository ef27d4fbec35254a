"""One door for data: a file, a named data set, or what the user already holds in Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from expunge.core.errors import InputError
from expunge.data.named import is_named, load_named
from expunge.data.readers import check_file, rows_of
from expunge.data.records import Record, RecordSet
from expunge.data.shapes import SHAPES, records_of


@runtime_checkable
class Table(Protocol):
    """What is asked of a Hugging Face ``datasets.Dataset``: column names, and rows as mappings when iterated."""

    @property
    def column_names(self) -> Any:
        """Names of the columns; a mapping from split to names for a dictionary of data sets."""

    def __iter__(self) -> Iterator[Any]:
        """Rows, as mappings."""


Source = str | Path | Sequence[Mapping[str, Any]] | Sequence[Record] | Table
"""Whatever :func:`load` takes."""


def load(source: Source, *, name: str, columns: Mapping[str, str] | None = None) -> RecordSet:
    """Load records; see :mod:`expunge.data.shapes` for the columns.

    Args:
        source: a JSON Lines, JSON, CSV or Parquet file; a named data set such as ``"tofu:forget10"``; a list of mappings or
            of records; or a Hugging Face ``Dataset``. A text that names an existing file is that file.
        name: what the set is called ("forget").
        columns: role to column name where they differ from the usual ones: ``{"prompt": "q", "answer": "a"}``.

    Raises:
        InputError: the source does not exist, cannot be read, or does not hold records; nothing was started.
    """
    if isinstance(source, (str, Path)):
        return _load_text(source, name, columns)
    if isinstance(source, Table):
        return _load_table(source, name, columns)
    if not isinstance(source, Sequence):
        raise InputError(
            f"The {name} data are of type {type(source).__name__}.",
            "Give a file, a named data set, a list of dicts, or a datasets.Dataset.",
        )
    if source and all(isinstance(item, Record) for item in source):
        return _load_records(cast(Sequence[Record], source), name, columns)
    rows = cast(Sequence[Mapping[str, Any]], source)
    label = f"the {name} list"
    return RecordSet(name, tuple(records_of(_numbered(rows, "item", label), label, columns)), "python")


def _load_text(source: str | Path, name: str, columns: Mapping[str, str] | None) -> RecordSet:
    path = Path(source)
    if isinstance(source, str) and is_named(source) and not path.is_file():
        if columns:
            raise InputError(f"The data set {source} knows its own columns.", "Leave the column names out.")
        found = load_named(source)
        return RecordSet(name, found.records, found.source)
    check_file(path)
    records = records_of(rows_of(path), path.name, columns, cells=path.suffix.lower() == ".csv")
    return RecordSet(name, tuple(records), str(source))


def _load_table(source: Table, name: str, columns: Mapping[str, str] | None) -> RecordSet:
    label = f"the {name} dataset"
    if isinstance(source.column_names, Mapping):
        splits = list(source.column_names)
        raise InputError(
            f"{label.capitalize()} is a dictionary of splits: {', '.join(splits)}.", f"Choose one: dataset[{splits[0]!r}]."
        )
    return RecordSet(name, tuple(records_of(_numbered(source, "row", label), label, columns)), "datasets")


def _load_records(source: Sequence[Record], name: str, columns: Mapping[str, str] | None) -> RecordSet:
    if columns:
        raise InputError(f"The {name} data are records already.", "Leave the column names out.")
    seen: set[str] = set()
    for record in source:
        if record.id in seen:
            raise InputError(f"The id {record.id!r} occurs twice in the {name} records.", "Make the ids unique.")
        if not record.answer.strip():
            raise InputError(
                f"The record {record.id!r} of the {name} records has an empty answer.", "Fill it in, or leave it out."
            )
        seen.add(record.id)
    return RecordSet(name, tuple(source), source.source if isinstance(source, RecordSet) else "python")


def _numbered(rows: Iterable[Any], noun: str, label: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise InputError(
                f"{label} {noun} {number} is of type {type(row).__name__}, not a mapping.", f"Give dicts with {SHAPES}."
            )
        yield f"{noun} {number}", row
