"""From the records of a request to what guards hide: a target for each subject."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from expunge.data.records import Record
from expunge.data.subject_names import subject_names
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
