"""Files that are never half written, and content hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from expunge.core.errors import InputError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path`` in one step, on failure nothing changes.

    Works for a file or a folder; a folder that exists is moved aside first and removed after.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary = scratch / path.name
        yield temporary
        if temporary.is_file():
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
        if path.is_dir():
            os.replace(path, scratch / "replaced")
        os.replace(temporary, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, with sorted keys left as given; NaN is refused (it is no JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def digest_bytes(*parts: bytes) -> str:
    """SHA-256 over length-prefixed parts, as 64 hex digits."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return digest_bytes(json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str).encode())


def digest_file(path: Path) -> str:
    """SHA-256 of a file's content, read in blocks."""
    state = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def digest_folder(path: Path) -> str:
    """SHA-256 over the sorted relative names and contents of a folder's files."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return digest_bytes(*(f"{p.relative_to(path).as_posix()}\0{digest_file(p)}".encode() for p in files))


def check_room(folder: Path, needed: int, what: str) -> None:
    """Check that ``needed`` bytes fit on the disk of ``folder`` (which need not exist yet).

    Raises:
        InputError: less is free.
    """
    at = folder.absolute()
    while not at.exists():
        at = at.parent
    free = shutil.disk_usage(at).free
    if free < needed:
        raise InputError(
            f"{what} needs about {size(needed)} on the disk of {str(folder)!r}, where {size(free)} are free.",
            "Free some room or choose another --out.",
        )


def size(n: float) -> str:
    """A number of bytes for people: ``1536`` is ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
