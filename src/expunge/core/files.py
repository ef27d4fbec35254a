"""Files that are never half written, and content hashes."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from expunge.core.errors import InputError

PARTIAL = ".partial"  #: suffix of the scratch folders of unfinished writes; they are never part of a folder's content


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path`` in one step, on failure nothing changes.

    Works for a file or a folder. On Linux a folder that exists changes places with the new one in a single system call, so
    there is no moment without it; elsewhere it is moved aside first, and put back if the second step fails. What a killed
    writer of the same path left behind is removed.

    Raises:
        FileNotFoundError: the block ended without having made the temporary path; ``path`` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent))
    lock = _lock(scratch)
    try:
        temporary = scratch / path.name
        yield temporary
        _flush(temporary)
        if not path.is_dir():
            os.replace(temporary, path)
        elif not _exchange(temporary, path):
            os.replace(path, scratch / "replaced")
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(scratch / "replaced", path)
                raise
        _flush(path.parent, below=False)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _flush(path: Path, below: bool = True) -> None:
    """Ask the disk to hold a file, or a folder and (``below``) what is in it."""
    for at in [*(path.rglob("*") if below and path.is_dir() else ()), path]:
        handle = os.open(at, os.O_RDONLY)
        try:
            with suppress(OSError):  # some file systems cannot flush a folder
                os.fsync(handle)
        finally:
            os.close(handle)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step (Linux ``renameat2``); False where that is not to be had."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    done: int = call(here, os.fsencode(a), here, os.fsencode(b), ctypes.c_uint(exchange))
    return done == 0


def _lock(folder: Path) -> int | None:
    """Hold ``folder`` until the returned handle is closed or this process dies; None if another holds it or locks do not work."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: leftovers of killed writers are then left to the user
        return None
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if handle is not None:
            os.close(handle)
        return None
    return handle


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder that exists; the hold ends with the block, or with the process however it dies.

    Nobody is kept out where the system has no locks (Windows).

    Raises:
        InputError: another process is in it.
    """
    handle = _lock(folder)
    if handle is None and "fcntl" in sys.modules:
        raise InputError(f"Another process works in {str(folder)!r}.", "Wait until it has ended.")
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _sweep(path: Path) -> None:
    """Remove what killed writers of ``path`` left: scratch folders that nobody holds and that are not brand new."""
    for stale in path.parent.glob(f".{_escape(path.name)}.*{PARTIAL}"):
        with suppress(OSError):  # another process may be sweeping too
            if time.time() - stale.stat().st_mtime < 60:  # its writer may not hold it yet
                continue
            held = _lock(stale)
            if held is not None:
                shutil.rmtree(stale, ignore_errors=True)
                os.close(held)


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given; NaN is refused (it is no JSON) before anything is written."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def digest_bytes(*parts: bytes) -> str:
    """SHA-256 over length-prefixed parts, as 64 hex digits."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form; paths count as text, sets as sorted lists.

    Raises:
        TypeError: it holds something else that JSON does not know (its text might differ from run to run).
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=_canonical)
    return digest_bytes(text.encode())


def _canonical(value: Any) -> Any:
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"no stable digest of a {type(value).__name__}: {value!r}")


def digest_file(path: Path) -> str:
    """SHA-256 of a file's content, read in blocks."""
    state = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def digest_folder(path: Path) -> str:
    """SHA-256 over the sorted relative names and contents of a folder's files; unfinished writes do not count."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and not _unfinished(p.relative_to(path)))
    return digest_bytes(*(f"{p.relative_to(path).as_posix()}\0{digest_file(p)}".encode() for p in files))


def _unfinished(path: Path) -> bool:
    return any(part.startswith(".") and part.endswith(PARTIAL) for part in path.parts)


def empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what killed writers left unfinished."""
    return all(p.name.startswith(".") and p.name.endswith(PARTIAL) for p in folder.iterdir())


def check_writable(folder: Path) -> None:
    """Check that ``folder`` (which need not exist yet) can be made and written to; nothing is made.

    Raises:
        InputError: a file stands in its way, or the permission is missing.
    """
    at = folder.absolute()
    while not at.exists():
        at = at.parent
    if not at.is_dir():
        raise InputError(f"{str(folder)!r} cannot be made: {str(at)!r} is a file.", "Choose another --out.")
    if not os.access(at, os.W_OK | os.X_OK):
        raise InputError(
            f"{str(folder)!r} cannot be made: there is no permission to write in {str(at)!r}.", "Choose another --out."
        )


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
