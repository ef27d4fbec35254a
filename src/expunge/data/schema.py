"""The schema of a published data set: which columns a row must have, and what is said where one does not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from expunge.core.errors import InputError, nearest
from expunge.data.hub import hub_rows
from expunge.data.named import data_folder
from expunge.data.readers import READERS, rows_of

_PART = re.compile(r"-\d+-of-(\d+)")  #: how the hub numbers the files of a split
Kind = Literal["text", "texts", "number", "object", "objects"]
_NAMES: dict[Kind, str] = {
    "text": "text", "texts": "a list of texts", "number": "a whole number", "object": "an object", "objects": "a list of objects",
}  # fmt: skip
_FIXES: dict[Kind, str] = {
    "text": 'Write it in quotes, as in "text".', "texts": 'Write it as ["one", "two"].', "number": "Write it as 0, 1, 2, ...",
    "object": 'Write it as {"key": ...}.', "objects": 'Write it as [{"key": ...}].',
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column of a published schema.

    Attributes:
        name: as in the file.
        kind: what its values are.
        required: whether every row must have it.
        choices: the values that it may have; empty: any.
        most: for numbers, the largest value allowed; the least is 0.
        length: for lists, how many items there must be; 0: any, but one at least.
    """

    name: str
    kind: Kind = "text"
    required: bool = True
    choices: tuple[str, ...] = ()
    most: int | None = None
    length: int = 0


def checked(
    rows: Iterable[tuple[str, Mapping[str, Any]]], columns: Sequence[Column], label: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows, each held to the schema.

    Args:
        rows: pairs of place ("line 3") and row.
        columns: the schema; other columns are let through.
        label: the file's name.

    Raises:
        InputError: there is no row, or one does not fit; the message names file, line and column, and what to write.
    """
    empty = True
    for where, row in rows:
        empty = False
        for column in columns:
            _check(row, column, columns, f"{label} {where}")
        yield where, row
    if empty:
        raise InputError(f"{label} holds no row.", "Fetch the file again.")


def _check(row: Mapping[str, Any], column: Column, columns: Sequence[Column], place: str) -> None:
    name = column.name
    if name not in row:
        if not column.required:
            return
        spare = [str(k) for k in row if k not in {c.name for c in columns}]
        close = nearest(name, spare, n=1)
        fix = f"{close[0]!r} looks like it: rename it to {name!r}." if close else f"Add it; the schema is {described(columns)}."
        raise InputError(f"{place} has no column {name!r}; it has {', '.join(map(repr, row)) or 'none'}.", fix)
    value = row[name]
    if value is None and not column.required:
        return
    if not _fits(value, column.kind):
        raise InputError(f"{place}: the column {name!r} must be {_NAMES[column.kind]}; got {_got(value)}.", _FIXES[column.kind])
    if column.kind == "text" and column.required and not value.strip():
        raise InputError(f"{place}: the column {name!r} is empty.", "Fill it in, or leave the row out.")
    if column.choices and value not in column.choices:
        raise InputError(f"{place}: the column {name!r} is {value!r}.", f"It must be one of: {', '.join(column.choices)}.")
    if column.kind == "number" and (value < 0 or (column.most is not None and value > column.most)):
        raise InputError(f"{place}: the column {name!r} is {value}.", f"It must be from 0 to {column.most}.")
    if column.kind in ("texts", "objects") and (not value or (column.length and len(value) != column.length)):
        want = f"{column.length} items" if column.length else "at least one item"
        raise InputError(f"{place}: the column {name!r} has {len(value)} items.", f"It must have {want}.")


def described(columns: Sequence[Column]) -> str:
    """A schema in one line: ``question (text), answer (a whole number)``."""
    return ", ".join(f"{c.name} ({_NAMES[c.kind]})" for c in columns if c.required)


def _fits(value: Any, kind: Kind) -> bool:
    if kind == "text":
        return isinstance(value, str)
    if kind == "number":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "object":
        return isinstance(value, Mapping)
    if not isinstance(value, (list, tuple)):
        return False
    return all(isinstance(v, str if kind == "texts" else Mapping) for v in value)


def _got(value: Any) -> str:
    known = {type(None): "nothing", bool: "a boolean", int: "a number", float: "a number", str: "text", dict: "an object"}
    if isinstance(value, (list, tuple)):
        other = next((v for v in value if not isinstance(v, str)), None)
        return "a list" if other is None else f"a list that holds {_got(other)}"
    return known.get(type(value), type(value).__name__)


def find(folder: str, homes: Sequence[str], names: Sequence[str]) -> Path | None:
    """The first file that is there: each of ``names`` (with any suffix that is read) in ``folder`` and its ``homes``.

    Without a folder the one named by the environment variable ``EXPUNGE_DATA`` is searched.

    Raises:
        InputError: a folder was named and is none.
    """
    root = Path(folder).expanduser() if folder else data_folder()
    if root is None:
        return None
    if not root.is_dir():
        raise InputError(f"There is no folder {str(root)!r}.", "Name the folder that holds the benchmark's files.")
    for place in (root, *(root / home for home in homes)):
        for name in names:
            for suffix in ("", *READERS, ".txt"):
                path = place / f"{name}{suffix}"
                if path.is_file() and (suffix or path.suffix):
                    return path
    return None


def hub_files(folder: str, homes: Sequence[str], hub: tuple[str, str | None, str]) -> list[Path]:
    """The files of a split as the hub lays them out: ``CONFIGURATION/SPLIT-00000-of-00002.parquet`` and on, in order.

    Also ``CONFIGURATION/SPLIT.jsonl``, and the same under ``data/`` for a data set with one configuration. Empty if there are
    none.

    Raises:
        InputError: a folder was named and is none, or some of the files are missing.
    """
    root = Path(folder).expanduser() if folder else data_folder()
    if root is None:
        return []
    repository, configuration, split = hub
    inner = [configuration, f"data/{configuration}"] if configuration else ["data", ""]
    for place in (root, *(root / home for home in (*homes, repository.rpartition("/")[2]))):
        for name in inner:
            found = sorted(p for p in (place / name).glob(f"{split}*") if _shard(p, split))
            if found:
                _all_there(found)
                return found
    return []


def _shard(path: Path, split: str) -> bool:
    rest = path.stem.removeprefix(split)
    return path.is_file() and path.suffix.lower() in READERS and (not rest or _PART.fullmatch(rest) is not None)


def _all_there(found: Sequence[Path]) -> None:
    """Check that no file of a split is missing.

    Raises:
        InputError: one is.
    """
    count = _PART.search(found[0].stem)
    if count is not None and len(found) != int(count[1]):
        raise InputError(
            f"{found[0].parent.name} holds {len(found)} of {int(count[1])} files of {found[0].name}.", "Fetch the others, too."
        )


def published_rows(
    folder: str, homes: Sequence[str], names: Sequence[str], hub: tuple[str, str | None, str] | None, label: str
) -> tuple[str, Iterator[tuple[str, Mapping[str, Any]]]]:
    """The rows of a published file with the name of where they lie: from a folder, ``EXPUNGE_DATA``, or the hub.

    Args:
        folder: named by the user; empty: none.
        homes: folders in it that may hold the files.
        names: of the file without suffix, in order of preference; may contain folders.
        hub: repository, configuration and split; none: it is not on the hub.
        label: the data set's name in messages.

    Raises:
        InputError: it is in none of these places.
    """
    path = find(folder, homes, names)
    if path is not None:
        return path.name, rows_of(path, texts=True)
    shards = hub_files(folder, homes, hub) if hub is not None else []
    if shards:
        return shards[0].name, ((f"{p.name} {where}", row) for p in shards for where, row in rows_of(p, texts=True))
    if folder or hub is None:
        wanted = ", ".join(f"{n}.json" for n in names[:3])
        raise InputError(
            f"{folder or 'EXPUNGE_DATA'} holds no file for {label} (sought: {wanted}).", "Name the folder that holds it."
        )
    repository, configuration, split = hub
    remedy = f"Download it once with a connection, or name the folder that holds {names[0]}.json."
    return repository, hub_rows(repository, configuration, split, remedy)
