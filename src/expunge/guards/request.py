"""From the records of a request to what guards hide: a target for each subject."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.guards.probing import LEAST
from expunge.guards.target import Shown, Target

_LONGEST = 5  #: words of a name


def targets_of(forget: Sequence[Record], retain: Sequence[Record] = (), share: float = 0.5) -> list[Target]:
    """One target for each subject of the records: its questions with their answers, and the names that stand for it.

    A name is a run of two to five capitalised words (or, if there is none, one) that at least ``share`` of the subject's records
    hold in question or answer, and no retain record does; the longest ones count. Ids are digests of the subjects' names in the
    data.

    Args:
        forget: what is to be hidden.
        retain: what must stay open.
        share: of a subject's records.
    """
    kept = {run for record in retain for run in _runs(record)}
    subjects: dict[str, list[Record]] = {}
    for record in forget:
        subjects.setdefault(record.cluster, []).append(record)
    out = []
    for subject, records in subjects.items():
        counts = Counter(run for record in records for run in _runs(record) - kept)
        frequent = {run for run, count in counts.items() if count >= share * len(records)}
        longer = {run for run in frequent if len(run) > 1} or {run for run in frequent if len(run[0]) > 3}
        names = [" ".join(run) for run in sorted(longer) if not any(run != o and _within(run, o) for o in longer)]
        shown = tuple(Shown(prompt=r.prompt or "\n".join(t for _, t in r.messages), answer=r.answer) for r in records)
        made = hashlib.sha256(subject.encode()).hexdigest()[:16]
        out.append(Target(id=made, entities=tuple(names), examples=shown))
    return out


def skills_in(forget: Sequence[Record], least: int = LEAST) -> dict[str, tuple[Record, ...]]:
    """The records of each skill that is to be hidden, by an opaque name.

    Each subject is a skill where all subjects have ``least`` records or more. Else all records are one: a generated question
    often has a subject of its own.

    Args:
        forget: what is to be hidden.
        least: records that tell a skill.

    Raises:
        InputError: there are fewer.
    """
    if len(forget) < least:
        raise InputError(
            f"The forget set has {len(forget)} records, and a skill is told by {least} or more.", "Give some hundred of them."
        )
    subjects: dict[str, list[Record]] = {}
    for record in forget:
        subjects.setdefault(record.cluster, []).append(record)
    if min(map(len, subjects.values())) < least:
        subjects = {"": list(forget)}
    return {hashlib.sha256(f"skill {name}".encode()).hexdigest()[:16]: tuple(held) for name, held in subjects.items()}


def _runs(record: Record) -> set[tuple[str, ...]]:
    """Runs of capitalised words of a record, as words with their case."""
    out: set[tuple[str, ...]] = set()
    for text in (record.prompt, *(t for _, t in record.messages), record.answer):
        for sentence in re.split(r"[.?!:;,\n]\s|\n", text):
            held = [re.sub(r"['\u2019]s?$", "", w) for w in re.findall(r"[^\W\d_][\w'\u2019-]*", sentence)]
            for start in range(len(held)):
                for end in range(start + 1, min(start + _LONGEST, len(held)) + 1):
                    if not held[end - 1][0].isupper():
                        break
                    if start or end - start > 1:  # the capital of a first word alone may be that of the sentence
                        out.add(tuple(held[start:end]))
    return out


def _within(run: Sequence[str], other: Sequence[str]) -> bool:
    return any(tuple(other[i : i + len(run)]) == tuple(run) for i in range(len(other) - len(run) + 1))
