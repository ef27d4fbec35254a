"""Parts of a text that are treated otherwise than the rest: given by the data, or found by terms, patterns or a secret scanner.

A span is a pair ``(start, end)`` of character positions in a record's answer (in its text, if it has no prompt), the end not
included. Methods read them as *marked* targets: the tokens that lie in a span, if only in part.
"""

from __future__ import annotations

import dataclasses
import importlib
import ipaddress
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from expunge.core.errors import InputError, MissingExtra
from expunge.core.settings import Settings
from expunge.data.records import Record, RecordSet

Span = tuple[int, int]


def check_spans(spans: Sequence[Span], text: str, label: str) -> None:
    """Refuse spans that are not within a text.

    Raises:
        InputError: one is empty, reversed or outside; ``label`` says where it stands.
    """
    for start, end in spans:
        if not 0 <= start < end <= len(text):
            raise InputError(
                f"{label} has the span [{start}, {end}], but the answer has {len(text)} characters.",
                "Count characters of the answer (of the text, if there is no prompt) from 0, with the end left out.",
            )


def joined(spans: Sequence[Span]) -> tuple[Span, ...]:
    """The same characters as spans in order, apart from each other."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return tuple(out)


def moved(spans: Sequence[Span], answer: str, text: str) -> list[Span]:
    """Spans of an answer as spans of a text that holds it, or holds it without the white space around it."""
    at = text.find(answer)
    if at < 0:
        at = text.find(answer.strip()) - (len(answer) - len(answer.lstrip()))
    return [(start + at, end + at) for start, end in spans]


def _email(found: str) -> bool:
    return "example" not in found.lower()


def _public(found: str) -> bool:
    try:
        return ipaddress.ip_address(found).is_global
    except ValueError:
        return False


NAMED: dict[str, tuple[str, Callable[[str], bool]]] = {
    "email": (r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}", _email),
    "ip": (r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])", _public),
}
"""Patterns that have a name: e-mail addresses without ``example`` in them and public IPv4 addresses, as in CodeEraser."""


class Spans(Settings):
    """Which parts of the answers are marked, beside those that the data themselves name."""

    name: ClassVar[str] = "spans"

    terms: tuple[str, ...] = Field((), description="words or phrases that are marked wherever they stand as whole words")
    file: str | None = Field(None, description="text file with further terms, one a line")
    ignore_case: bool = Field(False, description="find terms in any spelling of upper and lower case")
    patterns: tuple[str, ...] = Field(
        (), description="regular expressions, or email or ip; of an expression with a group the first group alone is marked"
    )
    secrets: bool = Field(False, description="passwords, keys and tokens as the library detect-secrets finds them")

    @property
    def asked(self) -> bool:
        """Whether anything is to be found."""
        return bool(self.terms or self.file or self.patterns or self.secrets)

    def mark(self, records: RecordSet) -> RecordSet:
        """The records with what is found added to their own spans.

        Raises:
            InputError: a pattern is no regular expression, the file of terms cannot be read.
            MissingExtra: ``secrets`` without the library.
        """
        if not self.asked:
            return records
        find = self.finder()
        held = [dataclasses.replace(r, spans=joined([*r.spans, *find(r.answer)])) for r in records]
        return dataclasses.replace(records, records=tuple(held))

    def finder(self) -> Callable[[str], list[Span]]:
        """A function from a text to the spans found in it; see :meth:`mark` for what it raises."""
        terms = [*self.terms, *(_terms(Path(self.file)) if self.file else ())]
        finders: list[Callable[[str], Iterator[Span]]] = []
        if any(t.strip() for t in terms):
            finders.append(_whole_words([t.strip() for t in terms if t.strip()], self.ignore_case))
        finders += [_by_pattern(pattern) for pattern in self.patterns]
        if self.secrets:
            finders.append(_scanner())
        return lambda text: [span for find in finders for span in find(text)]


def _terms(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The terms in {str(path)!r} cannot be read: {error}.", "Give a UTF-8 text file with one term a line."
        ) from None


def _whole_words(terms: Sequence[str], ignore_case: bool) -> Callable[[str], Iterator[Span]]:
    # Longer terms first: of "Ada Lovelace" and "Ada" the whole name is to be found.
    choices = "|".join(re.escape(t) for t in sorted(set(terms), key=len, reverse=True))
    search = re.compile(rf"(?<!\w)(?:{choices})(?!\w)", re.IGNORECASE if ignore_case else 0)
    return lambda text: (m.span() for m in search.finditer(text))


def _by_pattern(pattern: str) -> Callable[[str], Iterator[Span]]:
    expression, wanted = NAMED.get(pattern, (pattern, None))
    try:
        search = re.compile(expression)
    except re.error as error:
        raise InputError(
            f"The pattern {pattern!r} is no regular expression: {error}.", f"Known by name: {', '.join(NAMED)}."
        ) from None
    group = 1 if search.groups else 0

    def find(text: str) -> Iterator[Span]:
        for match in search.finditer(text):
            start, end = match.span(group)
            if start < end and (wanted is None or wanted(match.group(group))):
                yield start, end

    return find


def _scanner() -> Callable[[str], Iterator[Span]]:
    try:
        scan, settings = (importlib.import_module(f"detect_secrets.{m}") for m in ("core.scan", "settings"))
    except ImportError:
        raise MissingExtra("Finding secrets (spans.secrets)", "secrets") from None

    def find(text: str) -> Iterator[Span]:
        # As a file: of a single line the library takes every word for a secret. Its checks that ask a service are off by default.
        with tempfile.TemporaryDirectory() as folder, settings.default_settings():
            path = Path(folder) / "text"
            path.write_bytes(text.encode("utf-8", "replace"))
            held = {s.secret_value for s in scan.scan_file(str(path)) if s.secret_value}
        for secret in sorted(held):
            yield from (m.span() for m in re.finditer(re.escape(secret), text))

    return find


def swapped(records: Sequence[Record], seed: int, limit: int = 128) -> list[Record]:
    """The records with what stands in their spans exchanged: each gets that of a record of another cluster, with its own spans.

    What such a text says in its spans is wrong in this place, so its loss is an upper estimate of that of unseen spans.
    """
    import numpy as np

    held = [r for r in records if r.spans]
    order = [held[int(i)] for i in np.random.default_rng([seed, 12]).permutation(len(held))[:limit]]
    out: list[Record] = []
    for at, record in enumerate(order):
        own = {record.answer[a:b] for a, b in record.spans}
        rest = (*order[at + 1 :], *order[:at])
        others = (o.answer[a:b] for o in rest if o.cluster != record.cluster for a, b in o.spans)
        other = next((text for text in others if text not in own), None)
        if other is not None:
            out.append(_filled(record, other))
    return out


def _filled(record: Record, text: str) -> Record:
    parts, spans, at, size = [], [], 0, 0
    for start, end in record.spans:
        parts += [record.answer[at:start], text]
        size += start - at
        spans.append((size, size + len(text)))
        size, at = size + len(text), end
    return dataclasses.replace(
        record, id=record.id + "#swapped", answer="".join([*parts, record.answer[at:]]), spans=joined(spans)
    )
