"""How much of what a record holds a model tells in words: what a verdict compares where no log-probability is to be had."""

from __future__ import annotations

from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.muse import VerbatimMemorisation
from expunge.audit.metrics.rouge import RougeRecall, lacks_questions


def told(evidence: Evidence, label: str, name: str) -> Values:
    """Share of each answer that a model's greedy answer tells, in [0, 1]; absent where an answer has no words.

    Of questions ROUGE-L recall; of plain texts ROUGE-L F1 between the continuation of their first half and the second. Words are
    those of all scripts.
    """
    if lacks_questions(evidence, name):
        found = VerbatimMemorisation(tokeniser="unicode").values(evidence, label, name)
        return Values(found.values / 100, found.present)
    return RougeRecall(tokeniser="unicode").values(evidence, label, name)
