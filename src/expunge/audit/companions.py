"""Files that a user gives beside the records: translations, passages, aliases; JSON lines, one object with an ``id`` each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from expunge.core.errors import InputError
from expunge.core.files import digest_bytes
from expunge.core.settings import Settings

Table = Mapping[str, Mapping[str, Any]]


def companions(path: str, needed: str) -> Table:
    """The objects of a file by their ``id``.

    Args:
        path: of a file of JSON lines; read again when it has changed.
        needed: a field that every object must have, and that must hold a text or a list.

    Raises:
        InputError: there is no such file, a line is no object, or one lacks its id or the field.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"There is no file {path!r}.", f"Give JSON lines with 'id' and {needed!r}.")
    return _read(str(file), needed, file.stat().st_mtime_ns, file.stat().st_size)


@lru_cache(maxsize=16)
def _read(path: str, needed: str, _changed: int, _size: int) -> Table:
    out: dict[str, Mapping[str, Any]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise InputError(f"Line {number} of {path!r} is no JSON.", "Write one object per line.") from None
        if not isinstance(row, dict) or not isinstance(row.get("id"), str) or not isinstance(row.get(needed), (str, list)):
            raise InputError(f"Line {number} of {path!r} has not both 'id' and {needed!r}.", "Give both to every line.")
        out[row["id"]] = row
    return out


def content(path: str) -> str:
    """Hash of a file's content, for keys of caches; nothing for no file."""
    return digest_bytes(Path(path).expanduser().read_bytes()) if path else ""


class AliasFile(Settings):
    """Setting of attacks that read other names of subjects from a file; one that cannot be read is refused at once."""

    file: str = Field("", description="JSON lines with id (a subject) and aliases (a list of names)")

    @field_validator("file")
    @classmethod
    def _readable(cls, value: str) -> str:
        if value:
            companions(value, "aliases")
        return value
