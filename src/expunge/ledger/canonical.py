"""The one way in which a record is written down, so that equal records are equal bytes, and chains of digests over them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from expunge.core.errors import InputError

#: Where every chain begins.
GENESIS = "0" * 64


def canonical(value: Any) -> bytes:
    """A JSON value as its only spelling: sorted keys, no spaces, ASCII.

    Raises:
        TypeError, ValueError: it holds something that JSON does not know, or a number that is not finite.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode()


def link(before: str, record: Mapping[str, Any]) -> str:
    """``h_n = SHA-256(h_{n-1} || record_n)``: 64 hexadecimal digits of a record in its chain."""
    return hashlib.sha256(bytes.fromhex(before) + canonical(record)).hexdigest()


def sealed_line(before: str, record: Mapping[str, Any]) -> tuple[bytes, str]:
    """A record as a line of a chain, and its digest, which stands in it as ``hash``."""
    digest = link(before, record)
    return canonical({**record, "hash": digest}) + b"\n", digest


def read_line(line: bytes) -> tuple[dict[str, Any], str]:
    """The record of a line and the digest that stands in it.

    Raises:
        ValueError: it is no record in its canonical spelling, so at least one byte of it has been changed.
    """
    if not line.endswith(b"\n"):
        raise ValueError("the line does not end")
    record = json.loads(line)
    if not isinstance(record, dict) or canonical(record) + b"\n" != line:
        raise ValueError("not the canonical spelling of a record")
    digest = record.pop("hash", None)
    if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ValueError("no digest")
    return record, digest


def stamp(at: datetime) -> str:
    """A moment as text that sorts as time does: ``2026-11-28T16:18:14.123456Z``.

    Raises:
        InputError: it has no time zone.
    """
    if at.tzinfo is None:
        raise InputError(f"The time {at.isoformat()} has no zone.", "Give one, such as 2026-11-28T16:00:00+01:00.")
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def moment(text: str) -> datetime:
    """The moment of :func:`stamp`, or of any ISO 8601 text with a zone.

    Raises:
        InputError: it is none.
    """
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"{text!r} is no time.", "Write it as 2026-11-28T16:00:00+01:00.") from None
    if at.tzinfo is None:
        raise InputError(f"The time {text} has no zone.", "Give one, such as 2026-11-28T16:00:00+01:00.")
    return at.astimezone(UTC)


def now() -> datetime:
    """This moment."""
    return datetime.now(UTC)
