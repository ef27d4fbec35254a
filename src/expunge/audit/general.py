"""General questions that belong to no data set: by them every audit of a guard says how often it refuses what it should not.

Eighty questions of every day about arithmetic, geography, cooking, programs, nature, daily life and words, written for this
purpose. No guard is fitted on them, and no model has to know the answers: only whether something answers in its place is
counted.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

from expunge.data.records import Record, RecordSet

NAME = "general"


@cache
def general_questions() -> RecordSet:
    """The questions, each a unit of its own."""
    text = (resources.files("expunge.audit") / "general.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return RecordSet(NAME, tuple(Record(**row) for row in rows), "expunge")
