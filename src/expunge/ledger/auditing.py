"""The questions of an auditor, answered together: what the command line calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from expunge.core.errors import InputError
from expunge.ledger.canaries import History, history
from expunge.ledger.canonical import stamp
from expunge.ledger.keys import Public
from expunge.ledger.protection import Entries, Protection, protection, read_entries_of
from expunge.ledger.verify import Found, Report, Service, activated, find, served, verify

_AROUND = timedelta(minutes=5)


@dataclass(frozen=True)
class Audited:
    """What was found.

    Attributes:
        report: of the log.
        ledger: the registry's, if one was given.
        found: records of the disputed text; none: no text was given.
        protection: whether the target was to be hidden then; none: it was not asked.
        service: requests of the five minutes before and after.
        canaries: how the guard held when it was tried.
        thresholds: that guards have had, in order; see :func:`expunge.ledger.verify.activated`.
    """

    report: Report
    ledger: Entries | None
    found: tuple[Found, ...] | None
    protection: Protection | None
    service: Service | None
    canaries: History
    thresholds: tuple[Mapping[str, Any], ...] = ()

    @property
    def exit_code(self) -> int:
        """0: log and ledger hold, and what was asked for was found or was so; 3: not."""
        asked = self.found is None or bool(self.found)
        hidden = self.protection is None or self.protection.protected
        return 0 if self.report.ok and (self.ledger is None or self.ledger.ok) and asked and hidden else 3

    def lines(self) -> list[str]:
        """For people."""
        said = self.report.lines()
        if self.ledger is not None:
            said += [f"PROBLEM {p}" for p in self.ledger.problems]
            said += [f"registry: {len(self.ledger.entries)} entries; {'they hold' if self.ledger.ok else 'THEY DO NOT HOLD'}"]
        if self.found is not None:
            said += [
                f"the text stands in {len(self.found)} records" if self.found else "the text stands in no record of these periods"
            ]
            said += [_found(f) for f in self.found]
        if self.protection is not None:
            held = "was" if self.protection.protected else "WAS NOT"
            said += [f"target {self.protection.target} {held} to be hidden at {stamp(self.protection.at)}. {self.protection.why}"]
        if self.service is not None:
            s = self.service
            done = f"{s.guarded} were decided with it hidden; in {s.fired} a guard acted for it"
            said.append(f"  of {s.requests} requests around then, {done}")
        said += [_threshold(t) for t in {t["row"]: t for t in self.thresholds}.values()]
        tried = self.canaries.every is not None or self.canaries.rounds or self.canaries.refused.n
        return said + (self.canaries.lines() if tried else [])

    def described(self) -> dict[str, Any]:
        """As JSON."""
        made = json.loads(json.dumps(asdict(self), default=_plain))
        return {**made, "ok": self.exit_code == 0}


def _plain(value: object) -> object:
    return stamp(value) if isinstance(value, datetime) else str(value)


def _threshold(said: Mapping[str, Any]) -> str:
    begun = f"row {said['row']} ({said['detector']}) notices what scores above {said['threshold']:g}, since {said['at']}"
    if said["promised"] is None:
        return f"{begun}: as given, nothing is promised of ordinary prompts"
    promise = f"at most {said['promised']:.3%} of further ones on average, and with 95 % confidence {said['upper']:.3%}"
    return f"{begun}: set by {said['ordinary']} ordinary prompts; {promise}"


def _found(found: Found) -> str:
    record = found.record
    return f"  {found.where}: {found.what} of request {record['id']}, {record['at']}, {record['outcome']}"


def audit(
    folder: Path,
    public: Path,
    checkpoints: Path,
    *,
    ledger: Path | None = None,
    text: str | None = None,
    keys: Mapping[str, str] | None = None,
    target: str | None = None,
    at: datetime | None = None,
    first: int = 1,
) -> Audited:
    """Check a log and answer what is asked about it.

    Args:
        folder: of the log.
        public: key of the signatures, a PEM file.
        checkpoints: file of checkpoints.
        ledger: the registry's, as it was exported.
        text: a disputed question or answer.
        keys: of periods, in hexadecimal digits, by name; needed for ``text``.
        target: id; was it to be hidden ...
        at: ... then? Needs ``ledger``.
        first: number of the first file that must be there.

    Raises:
        InputError: there is no log, no key, or something needed for a question is missing.
    """
    if text is not None and not keys:
        raise InputError("A text can be found only with keys of periods.", "Export them where the log is written.")
    if (target is None) != (at is None) or (target is not None and ledger is None):
        raise InputError("Whether a target was hidden needs its id, a time and the ledger.", "Give all three.")
    try:
        held = {name: bytes.fromhex(key) for name, key in (keys or {}).items()}
    except ValueError:
        raise InputError("A key of a period is not in hexadecimal digits.", "Give it as it was exported.") from None
    entries = read_entries_of(ledger) if ledger is not None else None
    report = verify(folder, Public.read(public), checkpoints, ledger=entries, first=first)
    told = service = None
    if entries is not None and target is not None and at is not None:
        told = protection(entries, target, at)
        service = served(folder, target, at - _AROUND, at + _AROUND)
    found = tuple(find(folder, text, held)) if text is not None else None
    return Audited(report, entries, found, told, service, history(folder), tuple(activated(folder)))
