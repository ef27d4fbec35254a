"""When was a target to be hidden? Answered from the registry's ledger, which is checked first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from expunge.core.errors import InputError
from expunge.ledger.canonical import GENESIS, moment
from expunge.ledger.chain import Chain, Problem, Problems


@dataclass(frozen=True)
class Entries:
    """The ledger of a registry, checked.

    Attributes:
        entries: in order, each with its digest under ``hash``.
        problems: what is wrong with it.
    """

    entries: tuple[dict[str, Any], ...]
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def head(self, seq: int) -> str | None:
        """Digest of an entry; none if it is not there."""
        if seq == 0:
            return GENESIS
        return next((e["hash"] for e in self.entries if e["seq"] == seq), None)


@dataclass(frozen=True)
class Protection:
    """Whether a target was to be hidden at a moment.

    Attributes:
        target: id.
        at: the moment.
        protected: whether it was.
        since: when it was asked for; none: never.
        end: when it ended or is to end; none: it does not.
        why: one sentence.
        entries: numbers of the entries that say so.
    """

    target: str
    at: datetime
    protected: bool
    since: datetime | None
    end: datetime | None
    why: str
    entries: tuple[int, ...]


def read_entries(lines: Iterable[bytes], name: str = "ledger") -> Entries:
    """Check a registry's ledger, from :meth:`expunge.ledger.registry.Registry.entries`."""
    problems = Problems()
    chain = Chain("seq", problems)
    read = [chain.take(line, f"{name}:{at}") for at, line in enumerate(lines, 1)]
    found = tuple(entry for entry in read if entry is not None)
    if len({e.get("registry") for e in found}) > 1:
        problems.add("foreign", name, "entries are of different registries")
    return Entries(found, tuple(problems.listed))


def read_entries_of(path: Path) -> Entries:
    """Check a file made by :meth:`expunge.ledger.registry.Registry.export`.

    Raises:
        InputError: it is not there.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}.", "Name the exported ledger.") from None
    return read_entries(lines, path.name)


def protection(ledger: Entries, target: str, at: datetime) -> Protection:
    """Whether a target was to be hidden at a moment. The ledger must hold (:attr:`Entries.ok`) for the answer to mean anything.

    A target counts as hidden from the moment of its request until, and without, the moment that it was withdrawn or was to end.
    """
    mine = [e for e in ledger.entries if e.get("target") == target]
    asked = next((e for e in mine if e["kind"] == "requested"), None)
    if asked is None:
        return Protection(target, at, False, None, None, "It was never asked for.", ())
    ended = next((e for e in mine if e["kind"] != "requested"), None)
    since, numbers = moment(asked["at"]), tuple(e["seq"] for e in mine)
    ends = [moment(text) for text in (asked["until"], ended["at"] if ended else None) if text]
    end = min(ends, default=None)
    if at < since:
        return Protection(target, at, False, since, end, "It was asked for only later.", numbers)
    if end is not None and at >= end:
        how = ended["kind"] if ended and moment(ended["at"]) == end else "expired"
        return Protection(
            target, at, False, since, end, f"It was {how} before." if how != "expired" else "It had expired.", numbers
        )
    return Protection(target, at, True, since, end, "It was asked for before, and had not ended.", numbers)
