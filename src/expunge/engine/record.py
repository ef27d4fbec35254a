"""The folder of a prepared method: what was planned, and what was asked for and done since.

``plan.json`` is written once. ``state.json`` is rewritten whole at each change: whether the training is finished, and every
request with its rows, cost and whether it is done. Deleted rows stay in both by their ids alone.

A *stamp* is a line in the header of a weights file: the key of everything that made it, and a digest of its tensors. So a file
that is stale, of other data, or damaged is told from a good one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from expunge.core.errors import InputError
from expunge.core.files import PARTIAL, atomic_path, check_writable, digest_json, empty, write_json
from expunge.engine.functional import digest_tensors

_PLAN, _STATE, _STAMP = "plan.json", "state.json", "expunge"


@dataclass
class Request:
    """One training or deletion in the log.

    Attributes:
        ids: rows left out from the start, or deleted.
        done: whether it is finished.
        row_visits: what it took.
        seconds: of all calls together.
        redone: what was trained again or undone, in words.
    """

    ids: tuple[str, ...]
    done: bool = False
    row_visits: int = 0
    seconds: float = 0.0
    redone: tuple[str, ...] = ()


class Record:
    """Plan and log of a folder; the first request is the training itself.

    Args:
        folder: where they are.
        plan: what is fixed.
        requests: the log.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], requests: list[Request]) -> None:
        self.folder, self.plan, self.requests = folder, plan, requests

    @staticmethod
    def found(folder: Path) -> bool:
        """Whether a folder holds a record.

        Raises:
            InputError: it holds something else.
        """
        if (folder / _PLAN).is_file():
            return True
        if folder.is_dir() and {p.name for p in folder.iterdir()} <= {_STATE}:  # killed before the plan was written
            return False
        if not folder.is_dir() or not empty(folder):
            raise InputError(f"{str(folder)!r} exists and is not empty.", "Choose another folder, or remove it.")
        return False

    @classmethod
    def new(cls, folder: Path, plan: dict[str, Any], without: Sequence[str]) -> Record:
        """A record of a training that begins.

        Raises:
            InputError: the folder cannot be made.
        """
        check_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
        made = cls(folder, plan, [Request(tuple(without))])
        made._write()
        write_json(folder / _PLAN, plan)  # last: a folder with a plan is whole
        return made

    @classmethod
    def open(cls, folder: Path) -> Record:
        """Read the record of a folder.

        Raises:
            InputError: there is none, or it is damaged.
        """
        if not (folder / _PLAN).is_file():
            raise InputError(f"{str(folder)!r} is no folder of a prepared method.", "Train into it first.")
        made = cls(folder, _json(folder / _PLAN), [])
        made.read()
        return made

    def read(self) -> None:
        """Read the log again, as it is now.

        Raises:
            InputError: it is damaged.
        """
        try:
            held = _json(self.folder / _STATE)["requests"]
            self.requests = [Request(**{**r, "ids": tuple(r["ids"]), "redone": tuple(r["redone"])}) for r in held]
        except (KeyError, TypeError):
            raise _damaged(self.folder / _STATE) from None

    def sweep(self) -> None:
        """Remove unfinished files of killed writers, which may hold what a deleted row has taught; nobody else may be writing."""
        for left in self.folder.rglob(f".*{PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)

    # ---- what is left --------------------------------------------------------------------------------------------------

    @property
    def trained(self) -> bool:
        """Whether the training is finished."""
        return self.requests[0].done

    @property
    def without(self) -> list[str]:
        """Rows left out from the start."""
        return list(self.requests[0].ids)

    @property
    def pending(self) -> Request | None:
        """The deletion that was begun and not finished."""
        last = self.requests[-1]
        return last if len(self.requests) > 1 and not last.done else None

    @property
    def before(self) -> list[str]:
        """Rows that were gone before the deletion that is open."""
        return [name for r in self.requests if r is not self.pending for name in r.ids]

    @property
    def deleted(self) -> list[str]:
        """All rows that are gone, those of an open deletion included."""
        return [name for r in self.requests for name in r.ids]

    @property
    def remaining(self) -> list[str]:
        """Ids of the rows that are left, in the order of the plan."""
        gone = set(self.deleted)
        return [row[0] for row in self.plan["rows"] if row[0] not in gone]

    @property
    def training_seconds(self) -> float:
        """Seconds that the training took."""
        return self.requests[0].seconds

    # ---- changes -------------------------------------------------------------------------------------------------------

    def begin(self, ids: Sequence[str]) -> None:
        """Write down a deletion that is going to be done."""
        self.requests.append(Request(tuple(ids)))
        self._write()

    def spend(self, seconds: float) -> None:
        """Add to the cost of the open request."""
        self.requests[-1].seconds += seconds
        self._write()

    def end(self, row_visits: int, redone: Sequence[str]) -> Request:
        """Write down that the open request is done."""
        last = self.requests[-1]
        last.done, last.row_visits, last.redone = True, row_visits, tuple(redone)
        self._write()
        return last

    def _write(self) -> None:
        write_json(self.folder / _STATE, {"requests": [asdict(r) for r in self.requests]})

    # ---- stamped weights -----------------------------------------------------------------------------------------------

    def key(self, *parts: Any) -> str:
        """A key of JSON values and of what is fixed at the start, the rows apart."""
        return digest_json([{k: v for k, v in self.plan.items() if k != "rows"}, *parts])

    def save(self, name: str, key: str, tensors: Mapping[str, Tensor], *, data: str = "") -> None:
        """Write a weights file with its stamp; ``data`` is a digest of the rows that made it."""
        held = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
        stamp = {"content": _content(held), "data": data, "key": key}
        with atomic_path(self.folder / name) as temporary:
            save_file(held, temporary, metadata={_STAMP: json.dumps(stamp, sort_keys=True)})

    def stamp(self, name: str) -> tuple[str, str] | None:
        """Key and digest of the data of a weights file; None if there is no such file.

        Raises:
            InputError: it cannot be read.
        """
        found = self._stamp(name)
        return (found["key"], found["data"]) if found else None

    def load(self, name: str, key: str) -> dict[str, Tensor]:
        """Tensors of a weights file.

        Raises:
            InputError: it is missing, damaged, or was made by something else.
        """
        stamp, path = self._stamp(name), self.folder / name
        if stamp.get("key") != key:
            raise stale(path) if stamp else missing(path)
        try:
            with safe_open(path, "pt") as file:
                held = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118  (no mapping)
        except (SafetensorError, OSError):
            raise _damaged(path) from None
        if _content(held) != stamp.get("content"):
            raise _damaged(path)
        return held

    def _stamp(self, name: str) -> dict[str, str]:
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            with safe_open(path, "pt") as file:
                found = json.loads((file.metadata() or {})[_STAMP])
                return {part: str(found[part]) for part in ("content", "data", "key")}
        except (SafetensorError, OSError, ValueError, KeyError):
            raise _damaged(path) from None


_ANEW = "Restore it from a copy, or train into a new folder."


def stale(path: Path) -> InputError:
    """The error for a weights file that is whole and was not made by what the plan and the data say."""
    return InputError(
        f"{str(path)!r} was not trained on these rows.", "Give the data of the training, unchanged; or train into a new folder."
    )


def missing(path: Path) -> InputError:
    """The error for a weights file that is not there."""
    return InputError(f"{str(path)!r} is missing.", _ANEW)


def _damaged(path: Path) -> InputError:
    return InputError(f"{str(path)!r} is damaged.", _ANEW)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise _damaged(path) from None
    if not isinstance(found, dict):
        raise _damaged(path)
    return found


def _content(tensors: Mapping[str, Tensor]) -> str:
    return digest_tensors(tensors[name] for name in sorted(tensors))
