"""Commitments to what was said: digests under keys that live for a day or an hour and are destroyed.

A plain digest of a prompt is no protection: names and questions can be guessed and tried. A commitment here is
``HMAC-SHA256(k_period, record id, kind, normalised text)``. Who has the key of the period and a disputed text can show in which
record it stands; who has only the log can do nothing, and since the record's id goes in, cannot even see that two people said
the same. When a key is destroyed, nobody can any more.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Literal

from expunge.core.errors import InputError
from expunge.guards.conversation import Conversation
from expunge.ledger.canonical import canonical, now
from expunge.ledger.keys import KeyStore, mac

Every = Literal["day", "hour"]

_FORMATS: dict[Every, tuple[str, timedelta]] = {
    "day": ("%Y-%m-%d", timedelta(days=1)),
    "hour": ("%Y-%m-%dT%H", timedelta(hours=1)),
}


def normal(text: str) -> str:
    """A text as it is committed to: compatibility forms and case undone, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def commitment(key: bytes, record: str, kind: str, text: str) -> str:
    """64 hexadecimal digits that bind a record to a text.

    Args:
        key: of the period.
        record: id of the record.
        kind: what the text is: ``asked``, ``conversation``, ``answer``, ``seed``.
        text: any; compared as :func:`normal` has it.
    """
    return mac(key, f"expunge {kind}", record.encode(), normal(text).encode("utf-8", "surrogatepass")).hex()


def turns(conversation: Conversation) -> str:
    """All turns of a conversation as one text."""
    return canonical([[m.role, normal(m.content)] for m in conversation.messages]).decode()


def period_of(at: datetime, every: Every) -> str:
    """Name of the period that a moment lies in, in UTC: ``2026-11-28`` or ``2026-11-28T16``."""
    return at.astimezone(UTC).strftime(_FORMATS[every][0])


def end_of(period: str) -> datetime:
    """When a period is over.

    Raises:
        InputError: it is none.
    """
    for form, size in _FORMATS.values():
        try:
            begin = datetime.strptime(period, form)
        except ValueError:
            continue
        return begin.replace(tzinfo=UTC) + size
    raise InputError(f"{period!r} is no period.", "Write 2026-11-28 or 2026-11-28T16.")


class Periods:
    """The keys of periods of one log.

    Args:
        keys: where they are kept.
        log: id of the log.
        every: how long a key is used.
        keep: how long after that it can still be asked for.
        clock: what time it is.
    """

    def __init__(self, keys: KeyStore, log: str, every: Every, keep: timedelta, clock: Callable[[], datetime] = now) -> None:
        self._keys, self._prefix, self.every, self.keep, self._clock = keys, f"period-{log}-", every, keep, clock
        self._now: tuple[str, bytes] = ("", b"")

    def current(self) -> tuple[str, bytes]:
        """Name and key of the period that is now; its key is made when it is first asked for."""
        name = period_of(self._clock(), self.every)
        held = self._now
        if held[0] != name:
            held = self._now = (name, self._keys.make(self._prefix + name))
        return held

    def names(self) -> list[str]:
        """Periods whose keys are still there."""
        return [n.removeprefix(self._prefix) for n in self._keys.names(self._prefix)]

    def over(self) -> list[str]:
        """Periods whose keys have been kept for long enough."""
        return [n for n in self.names() if end_of(n) + self.keep <= self._clock()]

    def destroy(self, period: str) -> bool:
        """Destroy the key of a period: no text can be found by it any more."""
        return self._keys.drop(self._prefix + period)

    def export(self, period: str) -> str:
        """The key of a period as text, for an auditor: it lets them try any text against the records of that period.

        Raises:
            Shredded: it has been destroyed, or was never there.
        """
        return self._keys.get(self._prefix + period).hex()
