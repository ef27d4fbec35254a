"""Columns of whatever holds rows, in blocks: files, data frames, ``datasets`` objects and arrays by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from expunge.core.errors import InputError, MissingExtra, unknown
from expunge.data.readers import check_file, rows_of

_BLOCK = 2048  #: rows that are held as Python objects at a time
_PICTURES = 32  #: where they are pictures


@dataclass(frozen=True)
class Block:
    """Some rows.

    Attributes:
        columns: values by column, of equal lengths.
        place: where a row of the block stands, for messages.
    """

    columns: Mapping[str, Any]
    place: Callable[[int], str]


@dataclass(frozen=True)
class Frame:
    """Rows in named columns.

    Attributes:
        label: what they are called in messages.
        names: of the columns.
        blocks: reads the named columns, block by block.
        rows: how many there are, if that is known before they are read.
        cells: all values are texts, as in CSV.
        classes: names of the classes of columns that know them.
        folder: where paths begin.
        pictures: the columns of pictures.
        lengths: how long the columns are, where they may differ.
    """

    label: str
    names: tuple[str, ...]
    blocks: Callable[[Sequence[str]], Iterator[Block]]
    rows: int | None = None
    cells: bool = False
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    folder: Path | None = None
    pictures: frozenset[str] = frozenset()
    lengths: Mapping[str, int] = field(default_factory=dict)

    def need(self, name: str, part: str) -> str:
        """Check that a column exists.

        Raises:
            InputError: it does not; the message names the nearest.
        """
        if name not in self.names:
            error = unknown("column", name, self.names)
            raise InputError(f"{self.label} has no column {name!r}, which is named as {part}.", error.remedy)
        return name


def frame_of(source: Any) -> Frame:
    """The columns of a source.

    Args:
        source: a CSV, JSON, JSON Lines or Parquet file, an ``.npz`` archive, a ``datasets.Dataset``, a ``pandas.DataFrame``, a
            mapping from names to arrays, or a list of mappings.

    Raises:
        InputError: it is none of these, cannot be read, or holds no rows.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        suffix = path.suffix.lower()
        if suffix == ".npz" and path.is_file():
            return _archive(path)
        check_file(path)
        return _parquet(path) if suffix == ".parquet" else _rows(path)
    if hasattr(source, "column_names") and hasattr(source, "features"):
        return _dataset(source)
    if hasattr(source, "columns") and hasattr(source, "iloc"):
        return _pandas(source)
    if isinstance(source, Mapping):
        if not source:
            raise InputError("The table has no columns.", "Give arrays by name.")
        return _arrays({str(k): v for k, v in source.items()}, "the table")
    if isinstance(source, Sequence) and source and all(isinstance(row, Mapping) for row in source):
        return _listed(source)
    raise InputError(
        f"Rows cannot be read from {type(source).__name__}.",
        "Give a file, a folder of images, a datasets.Dataset, a DataFrame, a scikit-learn Bunch, or arrays by name.",
    )


def _rows(path: Path) -> Frame:
    first = next(rows_of(path), None)
    if first is None:
        raise InputError(f"{path.name} holds no rows.", "Give at least two.")
    frame = Frame(path.name, tuple(first[1]), lambda _: iter(()), cells=path.suffix.lower() == ".csv", folder=path.parent)
    return _with_blocks(frame, lambda: rows_of(path))


def _listed(rows: Sequence[Mapping[str, Any]]) -> Frame:
    frame = Frame("the list", tuple(map(str, rows[0])), lambda _: iter(()), rows=len(rows), folder=Path())
    return _with_blocks(frame, lambda: ((f"item {i}", row) for i, row in enumerate(rows, start=1)))


def _with_blocks(frame: Frame, read: Callable[[], Iterator[tuple[str, Mapping[str, Any]]]]) -> Frame:
    def blocks(names: Sequence[str]) -> Iterator[Block]:
        rows = read()
        while held := list(itertools.islice(rows, _BLOCK)):
            yield Block({name: _column(frame.label, held, name) for name in names}, _at(held))

    return Frame(frame.label, frame.names, blocks, frame.rows, frame.cells, folder=frame.folder)


def _at(held: Sequence[tuple[str, Any]]) -> Callable[[int], str]:
    return lambda i: held[i][0]


def _column(label: str, held: Sequence[tuple[str, Mapping[str, Any]]], name: str) -> list[Any]:
    try:
        return [row[name] for _, row in held]
    except KeyError:
        where = next(where for where, row in held if name not in row)
        raise InputError(f"{label} {where} has no column {name!r}.", "Give every row the same columns.") from None


def _numbered(columns: Mapping[str, Any], start: int) -> Block:
    return Block(columns, lambda i: f"row {start + i + 1}")


def _parquet(path: Path) -> Frame:
    try:
        import pyarrow  # type: ignore[import-untyped, unused-ignore]
        import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise MissingExtra("Reading Parquet", "llm") from None

    @contextmanager
    def opened() -> Iterator[Any]:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                yield file
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise InputError(f"{path.name} is no valid Parquet file: {reason}.", "Write it again, or give CSV.") from None

    with opened() as file:
        names, rows = tuple(file.schema_arrow.names), int(file.metadata.num_rows)
    if not rows:
        raise InputError(f"{path.name} holds no rows.", "Give at least two.")

    def blocks(wanted: Sequence[str]) -> Iterator[Block]:
        start = 0
        with opened() as file:
            for batch in file.iter_batches(batch_size=_BLOCK, columns=list(wanted)):
                yield _numbered({name: _arrow(batch.column(name)) for name in wanted}, start)
                start += batch.num_rows

    return Frame(path.name, names, blocks, rows, folder=path.parent)


def _arrow(column: Any) -> Any:
    kind = str(column.type)
    if not column.null_count and (kind.startswith(("int", "uint", "float", "double", "halffloat")) or kind == "bool"):
        return column.to_numpy(zero_copy_only=False)
    return column.to_pylist()


def _dataset(source: Any) -> Frame:
    if isinstance(source.column_names, Mapping):
        splits = list(source.column_names)
        raise InputError(f"The data set is a dictionary of splits: {', '.join(splits)}.", f"Choose one: dataset[{splits[0]!r}].")
    if not hasattr(source, "__len__"):
        raise InputError("The data set is a stream, whose rows have no stable order.", "Load it without streaming=True.")
    features = source.features
    kinds = {name: type(features[name]).__name__ for name in source.column_names}
    pictures = frozenset(name for name, kind in kinds.items() if kind == "Image")
    classes = {name: tuple(features[name].names) for name, kind in kinds.items() if kind == "ClassLabel"}

    def blocks(wanted: Sequence[str]) -> Iterator[Block]:
        chosen = source.select_columns(list(wanted)).with_format(None)
        step = _PICTURES if pictures & set(wanted) else _BLOCK
        for start in range(0, len(source), step):
            yield _numbered(chosen[start : start + step], start)

    return _some(
        Frame("the data set", tuple(source.column_names), blocks, len(source), classes=classes, folder=Path(), pictures=pictures)
    )


def _pandas(source: Any) -> Frame:
    by_name = {str(name): name for name in source.columns}
    if len(by_name) < len(source.columns):
        raise InputError("The data frame has two columns of one name.", "Rename one.")

    def blocks(wanted: Sequence[str]) -> Iterator[Block]:
        for start in range(0, len(source), _BLOCK):
            part = source.iloc[start : start + _BLOCK]
            yield _numbered({name: _plain(part[by_name[name]].to_numpy()) for name in wanted}, start)

    return _some(Frame("the data frame", tuple(by_name), blocks, len(source), folder=Path()))


def _archive(path: Path) -> Frame:
    try:
        with np.load(path, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
    except (ValueError, OSError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise InputError(f"{path.name} is no archive of arrays: {reason}.", "Write it with numpy.savez.") from None
    return _arrays(arrays, path.name)


def _arrays(columns: Mapping[str, Any], label: str) -> Frame:
    arrays = {name: np.asarray(v) for name, v in columns.items()}
    names = tuple(name for name, v in arrays.items() if v.ndim)

    def blocks(wanted: Sequence[str]) -> Iterator[Block]:
        lengths = {name: len(arrays[name]) for name in wanted}
        longest = max(lengths.values())
        odd = next((name for name in wanted if lengths[name] != longest), None)
        if odd is not None:
            raise InputError(
                f"{label}: {odd!r} has {lengths[odd]} rows and another column {longest}.",
                "Name columns of one length: target=..., features=....",
            )
        for start in range(0, longest, _BLOCK):
            yield _numbered({name: _plain(arrays[name][start : start + _BLOCK]) for name in wanted}, start)

    return Frame(label, names, blocks, folder=Path(), lengths={name: len(arrays[name]) for name in names})


def _plain(values: Any) -> Any:
    """Arrays of numbers as they are, all else as a list of Python objects; a column of one number per row has one dimension."""
    held = np.asarray(values)
    if held.ndim == 2 and held.shape[1] == 1:
        held = held[:, 0]
    return held if held.dtype.kind in "fiub" else held.tolist()


def _some(frame: Frame) -> Frame:
    if not frame.rows:
        raise InputError(f"{frame.label.capitalize()} holds no rows.", "Give at least two.")
    return frame
