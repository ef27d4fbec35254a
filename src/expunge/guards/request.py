"""From the records of a request to what guards hide: a target for each subject."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.data.subject_names import subject_names
from expunge.guards.probing import LEAST
from expunge.guards.target import Shown, Target


def targets_of(forget: Sequence[Record], retain: Sequence[Record] = (), share: float = 0.5) -> list[Target]:
    """One target for each subject of the records: its questions with their answers, and the names that stand for it.

    Names are found by :func:`expunge.data.subject_names.subject_names`. Ids are digests of the subjects' names in the data.

    Args:
        forget: what is to be hidden.
        retain: what must stay open.
        share: of a subject's records that must hold a name.
    """
    subjects: dict[str, list[Record]] = {}
    for record in forget:
        subjects.setdefault(record.cluster, []).append(record)
    names = subject_names(forget, retain, share)
    out = []
    for subject, records in subjects.items():
        shown = tuple(Shown(prompt=r.prompt or "\n".join(t for _, t in r.messages), answer=r.answer) for r in records)
        made = hashlib.sha256(subject.encode()).hexdigest()[:16]
        out.append(Target(id=made, entities=names[subject], examples=shown))
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
