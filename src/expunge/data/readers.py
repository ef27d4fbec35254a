"""Rows of the file formats that Expunge reads, streamed, each with the place where it stands.

A reader yields ``(where, row)``: ``where`` is ``"line 7"`` (JSON Lines, JSON, CSV; the line on which the row begins) or
``"row 7"`` (Parquet, counted from 1), for messages; ``row`` maps column names to values. All text files are UTF-8, with or
without a byte-order mark.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from expunge.core.errors import InputError, MissingExtra, nearest

Row = dict[str, Any]
_BLOCK = 1 << 16
_CELL_LIMIT = 1 << 30


def rows_of(path: Path, *, texts: bool = False) -> Iterator[tuple[str, Row]]:
    """The rows of a data file; the format follows from the file's suffix (``.json`` and ``.jsonl`` hold either kind of JSON).

    With ``texts`` a bare string in JSON is a row with the one column ``text``, and a ``.txt`` file is one such row.

    Raises:
        InputError: the file is missing, is a folder, has a suffix that is not read, is not UTF-8 or is malformed; the
            message names the line.
    """
    if texts and path.suffix.lower() == ".txt" and path.is_file():
        return iter([("line 1", {"text": _decode(path.read_bytes().removeprefix(codecs.BOM_UTF8), path.name, 1)})])
    check_file(path)
    if texts and path.suffix.lower() in (".json", ".jsonl"):
        return _read_json(path, texts=True)
    return READERS[path.suffix.lower()](path)


def check_file(path: Path) -> None:
    """Check that ``path`` is a file whose format is read.

    Raises:
        InputError: it is not; the message names the files nearby that look like it.
    """
    suffixes = ", ".join(READERS)
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if p.suffix.lower() in READERS)
        raise InputError(
            f"{path} is a folder.", f"Name a file in it: {', '.join(files[:8])}." if files else f"It holds no {suffixes}."
        )
    if not path.exists():
        raise InputError(f"There is no file {path}.", _nearby(path))
    if path.suffix.lower() not in READERS:
        raise InputError(f"{path.name} has the suffix {path.suffix!r}, which is not read.", f"Give one of: {suffixes}.")


def _nearby(path: Path) -> str:
    if not path.parent.is_dir():
        return f"There is no folder {path.parent} either."
    files = [p.name for p in path.parent.iterdir() if p.is_file() and p.suffix.lower() in READERS]
    close = nearest(path.name, files) or sorted(files)[:3]
    return f"In that folder there is: {', '.join(close)}." if close else f"The folder {path.parent} holds no data files."


def _lines(handle: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one so that a bad byte can be located."""
    for number, raw in enumerate(handle, start=1):
        data = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        yield number, _decode(data, name, number)


def _decode(data: bytes, name: str, line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{name} is not UTF-8 text (line {line}).", "Save it with the encoding UTF-8.") from None


# --- JSON -----------------------------------------------------------------------------------------------------------------


def _read_json(path: Path, texts: bool = False) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as handle:
        first = handle.read(_BLOCK).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        handle.seek(0)
        yield from _json_array(handle, path.name, texts) if first == b"[" else _json_lines(handle, path.name, texts)


def _json_lines(handle: BinaryIO, name: str, texts: bool = False) -> Iterator[tuple[str, Row]]:
    for number, text in _lines(handle, name):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _malformed(name, number, error) from None
        yield f"line {number}", _object(value, name, number, texts)


def _json_array(handle: BinaryIO, name: str, texts: bool = False) -> Iterator[tuple[str, Row]]:
    """The objects of one JSON array, parsed one by one from a window over the file."""
    window = _Window(handle, name)
    window.skip(" \t\r\n")
    window.take("[")
    window.skip(" \t\r\n")
    if window.peek() == "]":
        return
    while True:
        line = window.line
        yield f"line {line}", _object(window.value(), name, line, texts)
        window.skip(" \t\r\n")
        if window.peek() == "]":
            return
        window.take(",")
        window.skip(" \t\r\n")


class _Window:
    """A part of a JSON text that is long enough to hold the value being parsed."""

    def __init__(self, handle: BinaryIO, name: str) -> None:
        self.handle, self.name = handle, name
        self.text, self.at, self.line = "", 0, 1
        self.decoder = json.JSONDecoder()
        self.bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self.ended = False

    def peek(self) -> str:
        if self.at >= len(self.text) and not self.ended:
            self._more(_BLOCK)
        return self.text[self.at : self.at + 1]

    def skip(self, characters: str) -> None:
        while (next_ := self.peek()) and next_ in characters:
            self._advance(self.at + 1)

    def take(self, character: str) -> None:
        if self.peek() != character:
            found = repr(self.peek()) if self.peek() else "the end of the file"
            raise _malformed(self.name, self.line, ValueError(f"expected {character!r}, found {found}"))
        self._advance(self.at + 1)

    def value(self) -> Any:
        size = _BLOCK
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                # The value may merely be cut off by the window: doubling keeps the repeated parsing linear in total.
                if self.ended or not self._cut_off(error):
                    raise _malformed(self.name, self._line_of(error), error) from None
                self._more(size)
                size *= 2
                continue
            if end < len(self.text) or self.ended:
                self._advance(end)
                return value
            self._more(size)

    def _cut_off(self, error: Exception) -> bool:
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 16

    def _line_of(self, error: Exception) -> int:
        position = error.pos if isinstance(error, json.JSONDecodeError) else self.at
        return self.line + self.text.count("\n", self.at, position)

    def _advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def _more(self, size: int) -> None:
        block = self.handle.read(size)
        self.ended = not block
        try:
            text = self.bytes.decode(block, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n", self.at) + block.count(b"\n", 0, error.start)
            raise InputError(f"{self.name} is not UTF-8 text (line {line}).", "Save it with the encoding UTF-8.") from None
        self.text, self.at = self.text[self.at :] + text, 0


def _malformed(name: str, line: int, error: Exception) -> InputError:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    remedy = "Write one JSON object a line, or one JSON array of objects."
    return InputError(f"{name} line {line} is no valid JSON: {reason}.", remedy)


def _object(value: Any, name: str, line: int, texts: bool = False) -> Row:
    if texts and isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
        raise InputError(f"{name} line {line} is {kind}, not an object.", 'Write {"question": ..., "answer": ...}.')
    return value


# --- CSV and Parquet --------------------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    limit = csv.field_size_limit(_CELL_LIMIT)  # the module's limit of 128 KiB is less than a chapter of a book
    try:
        with path.open("rb") as handle:
            yield from _csv_rows(handle, path.name)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(handle: BinaryIO, name: str) -> Iterator[tuple[str, Row]]:
    reader = csv.reader((text for _, text in _lines(handle, name)), strict=True)
    header: list[str] | None = None
    begin = 1
    try:
        for cells in reader:
            begin, where = reader.line_num + 1, begin
            if not cells:
                continue
            if header is None:
                header = _header(cells, name)
                continue
            if len(cells) != len(header):
                raise InputError(
                    f"{name} line {where} has {len(cells)} cells, the header has {len(header)}.",
                    'Put cells that hold a comma or a line break in double quotes ("").',
                )
            yield f"line {where}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{name} line {begin} is no valid CSV: {error}.", "Check the double quotes of that row.") from None


def _header(cells: list[str], name: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    for mark, word in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and mark in header[0]:
            raise InputError(f"{name} is separated by {word}, not by commas.", "Save it with commas, or as JSON Lines.")
    twice = {cell for cell in header if header.count(cell) > 1}
    if twice:
        raise InputError(f"{name} has two columns called {sorted(twice)[0]!r}.", "Rename one.")
    return header


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow  # type: ignore[import-untyped, unused-ignore]
        import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise MissingExtra("Reading Parquet", "llm") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"{path.name} is no valid Parquet file: {reason}.", "Write it again, or give JSON Lines.") from None


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""The reader of each file suffix."""
