"""Checks of a request before anything is trained: empty sets, sizes, and records that stand in two sets at once.

A record that is both to be forgotten and to be retained is pulled both ways, and an audit of it means nothing. Two kinds of
overlap are found:

* **exact**: prompt and answer are equal as words, that is after Unicode compatibility composition (NFKC), case folding, and with
  punctuation and white space only as separators;
* **near**: the Jaccard index of the sets of word 3-shingles is at least 0.8 for the prompts *and* for the answers. A text of
  fewer than three words is one shingle; earlier chat turns are the prompt of a chat; plain text has no prompt and is compared by
  its text alone. Asking it of both sides is what keeps apart the records of templated data, which share a question's form
  or an answer's form but not the name or the fact.

Near duplicates are found exactly, without comparing all pairs, by prefix and position filtering (Xiao, Wang, Lin and Yu,
"Efficient similarity joins for near duplicate detection", WWW 2008): sort the shingles of every text from rare to frequent. Two
sets of sizes a and b with Jaccard >= t share at least t / (1 + t) * (a + b) shingles, so their first common shingle stands in the
first floor((1 - t) * size) + 1 of both and leaves enough room behind it. The smaller set is indexed, the larger one streams past;
memory grows with the smaller set only.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from expunge.core.errors import InputError
from expunge.data.records import Record, RecordSet

THRESHOLD = 0.8
"""Jaccard index from which two texts are near duplicates."""

SHINGLE = 3
"""Words in a shingle."""

_UNSPACED = (
    ("\u0e00", "\u0eff"),
    ("\u1000", "\u109f"),
    ("\u1780", "\u17ff"),
    ("\u3040", "\u30ff"),
    ("\u3400", "\u9fff"),
    ("\uf900", "\ufaff"),
)


# --- What is compared ---------------------------------------------------------------------------------------------------------


class _Separators(dict[int, str]):
    """Translation table, filled as characters turn up: separators become blanks; scripts without blanks are split up."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if unicodedata.category(character)[0] in "PZC":
            self[code] = " "
        elif any(low <= character <= high for low, high in _UNSPACED) and unicodedata.category(character)[0] == "L":
            self[code] = f" {character}"
        else:
            self[code] = character
        return self[code]


_SEPARATORS = _Separators()


def words(text: str) -> list[str]:
    """The words of a text as they are compared; a text of nothing but punctuation is one word."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return folded.translate(_SEPARATORS).split() or folded.split()


def shingles(text: str) -> set[str]:
    """The word 3-shingles of a text; one shingle if it has fewer words, and none if it is empty."""
    found = words(text)
    if not found:
        return set()
    return {" ".join(found[i : i + SHINGLE]) for i in range(max(1, len(found) - SHINGLE + 1))}


def jaccard(a: set[str], b: set[str]) -> float:
    """Size of the intersection over size of the union, in [0, 1]; 1 for two empty sets."""
    if not a and not b:
        return 1.0
    common = len(a & b)
    return common / (len(a) + len(b) - common)


def context(record: Record) -> str:
    """What stands before the answer, as one text."""
    return "\n".join(content for _, content in record.messages) if record.messages else record.prompt


def similarity(a: Record, b: Record) -> float:
    """The smaller of the Jaccard indices of contexts and of answers, in [0, 1]."""
    return min(jaccard(shingles(context(a)), shingles(context(b))), jaccard(shingles(a.answer), shingles(b.answer)))


# --- The search ---------------------------------------------------------------------------------------------------------------


class _Side:
    """An index over one side (contexts or answers) of the indexed records.

    Postings are grouped by the size of the set and the position of the shingle in it, so that the filters skip whole groups.
    """

    def __init__(self, sets: Sequence[set[str]]) -> None:
        self.sets = sets
        self.counts = Counter(shingle for found in sets for shingle in found)
        self.postings: dict[str, dict[tuple[int, int], list[int]]] = defaultdict(lambda: defaultdict(list))
        self.empty = [number for number, found in enumerate(sets) if not found]
        for number, found in enumerate(sets):
            for position, shingle in enumerate(self._prefix(found)):
                self.postings[shingle][len(found), position].append(number)

    def _prefix(self, found: set[str]) -> list[str]:
        # Any fixed order is right; rare first makes the groups small. Shingles that are not indexed count 0 and come first.
        ordered = sorted(found, key=lambda s: (self.counts.get(s, 0), s))
        return ordered[: _slack(len(found)) + 1]

    def groups(self, found: set[str]) -> list[list[int]]:
        """Groups of indexed records among which are all whose Jaccard index with ``found`` reaches the threshold."""
        if not found:
            return [self.empty]
        size = len(found)
        result = []
        for at, shingle in enumerate(self._prefix(found)):
            for (other, position), numbers in self.postings.get(shingle, {}).items():
                room = 1 + min(size - at - 1, other - position - 1)
                if room >= _needed(size, other) and other >= THRESHOLD * size - 1e-9 and size >= THRESHOLD * other - 1e-9:
                    result.append(numbers)
        return result


def _slack(size: int) -> int:
    """How many shingles of a set of ``size`` may be missing from the intersection at most."""
    return size - math.ceil(THRESHOLD * size - 1e-9)


def _needed(a: int, b: int) -> int:
    """The least size of the intersection of sets of ``a`` and ``b`` shingles that reach the threshold."""
    return math.ceil(THRESHOLD / (1 + THRESHOLD) * (a + b) - 1e-9)


class _Index:
    """The records of one set, searchable for duplicates of another record."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records: list[Record] = []
        self.exact: dict[tuple[str, str], str] = {}
        for record in records:
            # Repeats within the set would only be found again and again.
            if self.exact.setdefault(_key(record), record.id) == record.id:
                self.records.append(record)
        self.sides = (_Side([shingles(context(r)) for r in self.records]), _Side([shingles(r.answer) for r in self.records]))

    def near(self, record: Record, passed: Collection[int] = ()) -> Iterator[tuple[int, float]]:
        """Numbers of the near duplicates that are not in ``passed``, with their similarities."""
        probe = (shingles(context(record)), shingles(record.answer))
        groups = min((side.groups(found) for side, found in zip(self.sides, probe, strict=True)), key=_total)
        seen: set[int] = set()
        for group in groups:
            if any(number in passed for number in group):
                group[:] = [number for number in group if number not in passed]  # never asked for again
            for number in group:
                if number in seen:
                    continue
                seen.add(number)
                value = min(jaccard(side.sets[number], found) for side, found in zip(self.sides, probe, strict=True))
                if value >= THRESHOLD - 1e-9:
                    yield number, value


def _total(groups: list[list[int]]) -> int:
    return sum(map(len, groups))


def _key(record: Record) -> tuple[str, str]:
    return " ".join(words(context(record))), " ".join(words(record.answer))


@dataclass(frozen=True)
class Match:
    """A record that stands in two sets.

    Attributes:
        first: id in the first set of the pair ("forget" of forget and retain).
        second: id in the second set.
        similarity: 1.0 for an exact duplicate; else the smaller Jaccard index, in [0.8, 1].
        exact: whether the words are equal.
    """

    first: str
    second: str
    similarity: float
    exact: bool


def duplicates(first: Iterable[Record], second: Iterable[Record]) -> Iterator[Match]:
    """For each record of ``second`` that is an exact or near duplicate of one in ``first``, one match, in order.

    ``first`` is indexed, ``second`` is streamed. An exact duplicate is preferred to a near one.
    """
    index = _Index(first)
    for record in second:
        twin = index.exact.get(_key(record))
        if twin is not None:
            yield Match(twin, record.id, 1.0, True)
            continue
        found = next(index.near(record), None)
        if found is not None:
            yield Match(index.records[found[0]].id, record.id, found[1], False)


def duplicates_of_larger(first: Iterable[Record], second: Sequence[Record]) -> list[Match]:
    """What :func:`duplicates` finds, with ``second`` indexed and ``first`` streamed: for a small ``second``."""
    index = _Index(second)
    exact: dict[str, Match] = {}
    near: dict[int, Match] = {}
    for record in first:
        twin = index.exact.get(_key(record))
        if twin is not None:
            exact.setdefault(twin, Match(record.id, twin, 1.0, True))
        # A list, because the search must not see the numbers that are added meanwhile.
        for number, value in list(index.near(record, near)):
            near[number] = Match(record.id, index.records[number].id, value, False)
    matches = {m.second: m for m in near.values()} | exact
    found = ((record.id, matches.get(index.exact[_key(record)])) for record in second)
    return [Match(m.first, name, m.similarity, m.exact) for name, m in found if m is not None]


# --- The checks ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OverlapReport:
    """Which records stand in two sets of a request.

    Attributes:
        forget_retain: retain records that duplicate a forget record.
        forget_holdout: holdout records that duplicate a forget record.
        retain_holdout: holdout records that duplicate a retain record.
    """

    forget_retain: tuple[Match, ...] = ()
    forget_holdout: tuple[Match, ...] = ()
    retain_holdout: tuple[Match, ...] = ()

    @cached_property
    def retain_ids(self) -> frozenset[str]:
        """Ids of the retain records to drop."""
        return frozenset(m.second for m in self.forget_retain)

    @cached_property
    def holdout_ids(self) -> frozenset[str]:
        """Ids of the holdout records to drop."""
        return frozenset(m.second for m in (*self.forget_holdout, *self.retain_holdout))

    @property
    def found(self) -> bool:
        """Whether there is any overlap."""
        return bool(self.forget_retain or self.forget_holdout or self.retain_holdout)

    def summary(self) -> str:
        """One sentence: how many records of which set, and up to three ids of each."""
        parts = [
            _describe(self.forget_retain, "retain", "the forget set"),
            _describe(self.forget_holdout, "holdout", "the forget set"),
            _describe(self.retain_holdout, "holdout", "the retain set"),
        ]
        text = "; ".join(part for part in parts if part)
        return f"{text[0].upper()}{text[1:]}." if text else "No record stands in two sets."

    def to_json(self) -> dict[str, object]:
        """Counts and ids, for the manifest of a run."""
        return {
            pair: {
                "exact": sum(m.exact for m in matches),
                "near": sum(not m.exact for m in matches),
                "matches": [[m.first, m.second, round(m.similarity, 4)] for m in matches],
            }
            for pair, matches in (
                ("forget-retain", self.forget_retain),
                ("forget-holdout", self.forget_holdout),
                ("retain-holdout", self.retain_holdout),
            )
        }


def _describe(matches: tuple[Match, ...], kind: str, other: str) -> str:
    if not matches:
        return ""
    exact = sum(m.exact for m in matches)
    shown = ", ".join(m.second if m.first == m.second else f"{m.second} (like {m.first})" for m in matches[:3])
    more = ", ..." if len(matches) > 3 else ""
    plural = "records duplicate" if len(matches) > 1 else "record duplicates"
    return f"{len(matches)} {kind} {plural} records of {other} ({exact} exactly, {len(matches) - exact} nearly): {shown}{more}"


def find_overlap(forget: RecordSet, retain: RecordSet | None = None, holdout: RecordSet | None = None) -> OverlapReport:
    """Exact and near duplicates between the sets of a request; see the module for what they are."""
    return OverlapReport(
        forget_retain=_smaller_indexed(forget, retain) if retain is not None else (),
        forget_holdout=_smaller_indexed(forget, holdout) if holdout is not None else (),
        retain_holdout=_smaller_indexed(retain, holdout) if retain is not None and holdout is not None else (),
    )


def _smaller_indexed(first: RecordSet, second: RecordSet) -> tuple[Match, ...]:
    return tuple(duplicates(first, second) if len(first) <= len(second) else duplicates_of_larger(first, second))


def check_request(
    forget: RecordSet,
    retain: RecordSet | None,
    holdout: RecordSet | None = None,
    *,
    allow_overlap: bool = False,
    allow_large_forget: bool = False,
) -> OverlapReport:
    """Check the sets of a request against each other; linear in their size.

    Args:
        forget: what is to be forgotten.
        retain: what is to be kept; ``None`` if the method uses none.
        holdout: what no model was trained on, if there is such a set.
        allow_overlap: report records that stand in two sets instead of refusing.
        allow_large_forget: allow a forget set with more records than the retain set.

    Returns:
        What overlaps; see :func:`drop_overlap`.

    Raises:
        InputError: a set is empty, the forget set is larger than the retain set, or sets overlap.
    """
    for kind, records in (("forget", forget), ("retain", retain), ("holdout", holdout)):
        if records is not None and not len(records):
            raise InputError(
                f"The {kind} set {records.name!r} is empty.",
                "Give at least one record." if kind == "forget" else f"Give records, or no {kind} set.",
            )
    if retain is not None and len(forget) > len(retain) and not allow_large_forget:
        raise InputError(
            f"The forget set ({len(forget)} records) is larger than the retain set ({len(retain)}).",
            "Check that they are not exchanged and give more to retain, or insist with --allow-large-forget.",
        )
    report = find_overlap(forget, retain, holdout)
    if report.found and not allow_overlap:
        raise InputError(
            report.summary(), "Remove them with --drop-overlap (from retain and holdout), or insist with --allow-overlap."
        )
    return report


def drop_overlap(records: RecordSet, report: OverlapReport, part: Literal["retain", "holdout"] = "retain") -> RecordSet:
    """A retain or holdout set without the records that the report names.

    Raises:
        InputError: nothing is left.
    """
    dropped = report.retain_ids if part == "retain" else report.holdout_ids
    kept = tuple(r for r in records if r.id not in dropped)
    if not kept:
        raise InputError(f"Every record of the {part} set duplicates another set; nothing is left.", f"Give other {part} data.")
    return RecordSet(records.name, kept, records.source)
