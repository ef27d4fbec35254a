"""Which names stand for the subjects of records: what guards match, and what a tag holds that a model is taught to obey."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from expunge.data.records import Record

_LONGEST = 5  #: words of a name


def subject_names(records: Sequence[Record], others: Sequence[Record] = (), share: float = 0.5) -> dict[str, tuple[str, ...]]:
    """Names by subject (the records' cluster), in the order of the subjects; a subject may have none.

    A name is a run of two to five capitalised words (or, if there is none, one) that at least ``share`` of the subject's records
    hold in question or answer, and no other record does; the longest ones count.

    Args:
        records: whose subjects are named.
        others: records whose words are no names.
        share: of a subject's records.
    """
    kept = {run for record in others for run in _runs(record)}
    subjects: dict[str, list[Record]] = {}
    for record in records:
        subjects.setdefault(record.cluster, []).append(record)
    out = {}
    for subject, held in subjects.items():
        counts = Counter(run for record in held for run in _runs(record) - kept)
        frequent = {run for run, count in counts.items() if count >= share * len(held)}
        longer = {run for run in frequent if len(run) > 1} or {run for run in frequent if len(run[0]) > 3}
        out[subject] = tuple(" ".join(run) for run in sorted(longer) if not any(run != o and _within(run, o) for o in longer))
    return out


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
