"""From columns to a table: numbers, pictures and texts become inputs, the rest ids, targets, subjects and conditions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from expunge.core.errors import InputError
from expunge.data.rows import Table, table
from expunge.data.tables.buffers import Filling, Tokens
from expunge.data.tables.frames import Block, Frame
from expunge.data.tables.pictures import Pictures, locate
from expunge.data.tables.settings import Reading
from expunge.data.tables.values import condition, labels, missing, numbers, shown, text_of

Tokenizer = Callable[..., Any]  #: a transformers tokenizer

_UNLIMITED = 1_000_000  #: transformers writes a huge number where a tokenizer has no limit


class Inputs(Protocol):
    """Makes the inputs of a table from some columns."""

    def add(self, block: Block) -> None:
        """Read the rows of a block."""

    def done(self) -> npt.NDArray[Any]:
        """All of them, ``[n, ...]``."""


def read_columns(frame: Frame, reading: Reading, tokenizer: Tokenizer | None) -> Table:
    """One pass over the rows of a frame.

    Raises:
        InputError: a column is missing, or a value is not what its column should hold; the message names column and row.
    """
    if reading.target is None:
        raise InputError(f"Nothing says which column of {frame.label} is to be predicted.", f"Name it: {_some_of(frame.names)}.")
    target = frame.need(reading.target, "the target")
    features, kept = _parts(frame, reading)
    inputs = _inputs(frame, reading, features, tokenizer)
    ids = _Ids(frame.label, reading) if reading.id or reading.image else None
    targets, owners = _Values(target), _Values(reading.subject or "")
    others = {name: _Values(name) for name in kept}
    wanted = [*features, target, *([reading.id] if reading.id else []), *([reading.subject] if reading.subject else []), *kept]
    for block in frame.blocks(tuple(dict.fromkeys(wanted))):
        inputs.add(block)
        targets.add(block)
        if ids is not None:
            ids.add(block)
        if reading.subject is not None:
            owners.add(block)
        for column in others.values():
            column.add(block)
    if not targets.held:
        raise InputError(f"{frame.label} holds no rows.", "Give at least two.")
    labels, classes = _targets(frame, reading, targets.held)
    x = inputs.done()
    plain = reading.image is None and reading.text is None
    extra: dict[str, Any] = {name: c for name, held in others.items() if (c := condition(held.held)) is not None}
    if plain and x.ndim == 2 and x.shape[1] == len(features):
        extra |= {name: x[:, i] for i, name in enumerate(features)}
    if reading.subject is not None:
        extra[reading.subject] = np.array([text_of(v) for v in owners.held])
    made = table(
        x, labels, task=reading.task, classes=classes, ids=ids.done(len(x)) if ids is not None else None,
        subjects=[text_of(v) for v in owners.held] if reading.subject is not None else None,
        columns=extra, names=features if plain else None, precision=reading.precision, source=frame.label,
    )  # fmt: skip
    own = np.array(made.classes, dtype=object)[made.targets] if made.classes else made.targets
    return dataclasses.replace(made, columns={target: own, **made.columns})


def _parts(frame: Frame, reading: Reading) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which columns the model reads, and which are kept for conditions."""
    named = [(reading.id, "the id"), (reading.subject, "the subject"), (reading.image, "the image"), (reading.text, "the text")]
    taken = {reading.target} | {frame.need(name, part) for name, part in named if name is not None}
    for name in (*(reading.features or ()), *(reading.columns or ())):
        frame.need(name, "a feature" if name in (reading.features or ()) else "a column to keep")
    size = frame.lengths.get(str(reading.target))
    free = tuple(name for name in frame.names if name not in taken and frame.lengths.get(name) == size)
    if reading.image is None and reading.text is None and reading.features is None:
        features = tuple(name for name in free if name not in (reading.columns or ()) and name not in frame.pictures)
        if not features:
            raise InputError(f"{frame.label} has no column left for the model to read.", "Name features, image or text.")
        return features, reading.columns or ()
    single = reading.image or reading.text
    features = (single,) if single is not None else reading.features or ()
    kept = reading.columns if reading.columns is not None else tuple(n for n in free if n not in features)
    return features, tuple(n for n in kept if n not in frame.pictures and n not in features)


def _inputs(frame: Frame, reading: Reading, features: Sequence[str], tokenizer: Tokenizer | None) -> Inputs:
    if reading.text is not None:
        if tokenizer is None:
            raise InputError("Texts need the tokenizer of the model.", "Give tokenizer=AutoTokenizer.from_pretrained(...).")
        return _Texts(frame, reading.text, tokenizer, reading.max_length)
    if reading.image is not None:
        return _Images(frame, reading)
    return _Numbers(frame, reading, features)


class _Numbers:
    """Columns of numbers, or one column of arrays of one shape."""

    def __init__(self, frame: Frame, reading: Reading, features: Sequence[str]) -> None:
        self.frame, self.features = frame, features
        self.held = Filling(reading.precision, frame.rows)

    def add(self, block: Block) -> None:
        columns = [self._column(block, name) for name in self.features]
        if len(columns) > 1:
            odd = next((n for n, c in zip(self.features, columns, strict=True) if c.ndim > 1), None)
            if odd is not None:
                raise InputError(
                    f"The column {odd!r} of {self.frame.label} holds arrays, and is not the only feature.",
                    f"Name it alone: features={odd!r}.",
                )
            rows: npt.NDArray[Any] = np.column_stack(columns)
        else:
            rows = columns[0] if columns[0].ndim > 1 else columns[0][:, None]
        if self.held.shape is not None and rows.shape[1:] != self.held.shape:
            raise InputError(
                f"{self.frame.label} holds rows of the shapes {list(self.held.shape)} and {list(rows.shape[1:])}.",
                "Give all one shape.",
            )
        self.held.add(rows)

    def done(self) -> npt.NDArray[Any]:
        return self.held.done()

    def _column(self, block: Block, name: str) -> npt.NDArray[Any]:
        values = block.columns[name]
        try:
            found = np.asarray(values, dtype=np.float64 if not isinstance(values, np.ndarray) else None)
        except (ValueError, TypeError, OverflowError):
            raise self._no_number(block, name, values) from None
        with np.errstate(over="ignore"):  # what overflows is named below
            cast = found.astype(self.held.dtype, copy=False)
        finite = np.isfinite(cast)
        if not finite.all():
            row = int(np.flatnonzero(~finite.reshape(len(cast), -1).all(axis=1))[0])
            raise self._not_finite(block, name, row, values[row])
        return cast

    def _no_number(self, block: Block, name: str, values: Sequence[Any]) -> InputError:
        shapes = {}
        for row, value in enumerate(values):
            try:
                shapes[np.asarray(value, dtype=np.float64).shape] = row
            except (ValueError, TypeError, OverflowError):
                if missing(value):
                    return self._not_finite(block, name, row, value)
                return InputError(
                    f"The column {name!r} of {self.frame.label} holds {shown(value)} in {block.place(row)}, which is no number.",
                    f"Encode it as numbers; or keep it for conditions only: columns={name!r}; or name the features.",
                )
        first, second = list(shapes)[:2]
        return InputError(
            f"The column {name!r} of {self.frame.label} holds arrays of the shapes {list(first)} and {list(second)}.",
            "Give all one shape.",
        )

    def _not_finite(self, block: Block, name: str, row: int, value: Any) -> InputError:
        where = f"The column {name!r} of {self.frame.label}"
        if missing(value):
            return InputError(f"{where} has no value in {block.place(row)}.", "Fill it in, or leave the row out.")
        if np.isfinite(np.asarray(value, dtype=np.float64)).all():
            return InputError(f"{where} holds {shown(value)} in {block.place(row)}, too large for float32.", "Ask for float64.")
        return InputError(f"{where} holds {shown(value)} in {block.place(row)}.", "Fill in or leave out what is missing.")


class _Images:
    """A column of paths below a folder, of encoded pictures, or of opened ones."""

    def __init__(self, frame: Frame, reading: Reading) -> None:
        self.frame, self.column = frame, str(reading.image)
        self.folder = reading.folder if reading.folder is not None else frame.folder
        if self.folder is not None and not self.folder.is_dir():
            raise InputError(f"There is no folder {self.folder}.", "Give the one that holds the images.")
        self.pictures = Pictures(reading, frame.rows)

    def add(self, block: Block) -> None:
        for row, value in enumerate(block.columns[self.column]):
            held = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
            if missing(held):
                raise InputError(
                    f"The column {self.column!r} of {self.frame.label} has no image in {block.place(row)}.", "Leave the row out."
                )
            if isinstance(held, str):
                self.pictures.add(locate(self.folder, held, f"{self.frame.label} {block.place(row)}"), held)
            else:
                self.pictures.add(held, f"{self.frame.label} {block.place(row)}")

    def done(self) -> npt.NDArray[Any]:
        return self.pictures.done()


class _Texts:
    """A column of texts as token ids."""

    def __init__(self, frame: Frame, column: str, tokenizer: Tokenizer, limit: int | None) -> None:
        self.frame, self.column, self.tokenizer, self.held = frame, column, tokenizer, Tokens()
        own = getattr(tokenizer, "model_max_length", None)
        self.limit = limit if limit is not None else own if own is not None and own < _UNLIMITED else None

    def add(self, block: Block) -> None:
        texts = list(block.columns[self.column])
        for row, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                what = "no text" if missing(text) or isinstance(text, str) else f"{shown(text)}, which is no text,"
                raise InputError(
                    f"The column {self.column!r} of {self.frame.label} has {what} in {block.place(row)}.",
                    "Fill it in, or leave the row out.",
                )
        for row, ids in enumerate(self.tokenizer(texts, truncation=self.limit is not None, max_length=self.limit)["input_ids"]):
            if not ids:
                raise InputError(f"The text in {block.place(row)} of {self.frame.label} has no tokens.", "Leave the row out.")
            self.held.add(ids)

    def done(self) -> npt.NDArray[Any]:
        return self.held.done()


class _Ids:
    """Names of the rows: a column of them, or the paths of a column of pictures, if all of these are paths."""

    def __init__(self, label: str, reading: Reading) -> None:
        self.label, self.column, self.paths = label, str(reading.id or reading.image), reading.id is None
        self._held: list[str] = []
        self._seen: set[str] = set()

    def add(self, block: Block) -> None:
        for row, value in enumerate(block.columns[self.column]):
            if self.paths and not isinstance(value, str):
                continue
            if missing(value) or not isinstance(value, (str, int, float, np.integer)):
                what = "no id" if missing(value) else f"{shown(value)}, which is no id,"
                raise InputError(f"The column {self.column!r} of {self.label} has {what} in {block.place(row)}.", "Correct it.")
            name = str(value)
            if name in self._seen:
                raise InputError(
                    f"The column {self.column!r} of {self.label} holds {name!r} a second time in {block.place(row)}.",
                    "Make the ids unique, or name another column.",
                )
            self._seen.add(name)
            self._held.append(name)

    def done(self, rows: int) -> list[str] | None:
        """The names; None if rows are to be numbered."""
        return self._held if len(self._held) == rows else None


class _Values:
    """A column as it is."""

    def __init__(self, name: str) -> None:
        self.name, self.held = name, list[Any]()

    def add(self, block: Block) -> None:
        values = block.columns[self.name]
        self.held.extend(values.tolist() if isinstance(values, np.ndarray) else values)


def _targets(frame: Frame, reading: Reading, values: list[Any]) -> tuple[npt.NDArray[Any], Sequence[str] | None]:
    """Targets, and the names of the classes if they are known."""
    name = str(reading.target)
    for row, value in enumerate(values):
        if missing(value):
            raise InputError(f"The column {name!r} of {frame.label} has no target in row {row + 1}.", "Leave the row out.")
    if reading.task == "regression":
        return numbers(values, f"The column {name!r} of {frame.label}"), None
    known = frame.classes.get(name)
    classes = reading.classes or known
    return labels(values, classes, f"The column {name!r} of {frame.label}", indices=known is not None), classes


def _some_of(names: Sequence[str]) -> str:
    return ", ".join(f"target={name!r}" for name in names[-3:])
