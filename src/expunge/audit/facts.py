"""Which words of an answer carry the fact, and whether a text says them; who a record is about.

A fluent sentence about the wrong thing shares most of its words with the right one. A model that has never seen a fact so
reaches a high overlap by form alone, and one that refuses half of the time and tells the truth the other half stays below it.
What is asked here is therefore narrower than ROUGE: are the words there that only somebody who knows the fact would say?
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from expunge.audit.metrics.words import words
from expunge.data.records import Record

BLANK = "___"
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
#: words of pure grammar
COMMON = (
    "a an and are as at be been but by did do does for from had has have he her hers him his how i in into is it its of on or "
    "she so such than that the their them then there these they this those to was were what when where which who whom whose "
    "why will with would you your"
)


@dataclass(frozen=True)
class Fact:
    """The words of an answer that carry its fact.

    Attributes:
        keys: in the form in which :func:`spoken` gives them, each once, in the order of the answer.
        spans: places of these words in the answer, runs of neighbours as one, from first character to the one after the last.
    """

    keys: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]


@lru_cache(maxsize=1 << 14)
def spoken(text: str) -> tuple[str, ...]:
    """The words of a text for comparison: lower case, stemmed, letters and digits of all scripts."""
    return tuple(words(text, True, "unicode"))


@lru_cache(maxsize=4096)
def fact(record: Record) -> Fact:
    """The words of a record's answer that carry its fact.

    Those that the question does not give away, that its paraphrase has too (if there is one), and that fewer than half of its
    wrong answers have (if there are any). Words of pure grammar never count, unless nothing else is left.
    """
    answer = spoken(record.answer)
    asked = set(spoken(" ".join([record.prompt, *(text for _, text in record.messages)])))
    wrong = Counter(w for text in record.perturbed for w in set(spoken(text)))
    shared = {w for w, count in wrong.items() if 2 * count >= len(record.perturbed)}
    said = set(spoken(record.paraphrase)) if record.paraphrase else set(answer)
    plain = set(spoken(COMMON))
    tries: list[Sequence[str]] = [
        [w for w in answer if w in said and w not in shared | asked | plain],
        [w for w in answer if w not in shared | asked | plain],
        [w for w in answer if w not in asked | plain],
        [w for w in answer if w not in plain],
        answer,
    ]
    keys = tuple(dict.fromkeys(next((t for t in tries if t), [])))
    return Fact(keys, _spans(record.answer, frozenset(keys)))


def tells(record: Record, text: str) -> float:
    """Share of the words that carry a record's fact which a text says, in any order, in [0, 1]."""
    keys = fact(record).keys
    found = set(spoken(text))
    return sum(k in found for k in keys) / len(keys) if keys else 0.0


def blanked(record: Record) -> tuple[str, str]:
    """The answer with the words of its fact left out, and these words."""
    return without(record.answer, fact(record).spans), " ".join(record.answer[a:b] for a, b in fact(record).spans)


def stem_of(record: Record) -> tuple[str, str]:
    """The answer up to the first word of its fact (without the space before it), and the rest; the stem may be empty."""
    spans = fact(record).spans
    at = spans[0][0] if spans else 0
    return record.answer[:at].rstrip(), record.answer[at:]


def without(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """A text with a blank in the place of each span."""
    out, done = [], 0
    for start, stop in spans:
        out += [text[done:start], BLANK]
        done = stop
    return "".join([*out, text[done:]])


def statements(record: Record) -> tuple[str, tuple[str, ...]]:
    """A right answer and the wrong ones, in the same form as far as the data has them: the paraphrase, if there is one."""
    return record.paraphrase or record.answer, record.perturbed


def subject_names(records: Iterable[Record]) -> dict[str, str]:
    """How each record's question calls whom it is about, by the record's id; empty where that cannot be told.

    The subject itself where the question has it; else the longest run of words that begin with a capital, are in every question
    about the subject, and in no question about another one. So a subject with a single question has no name.
    """
    every = list(records)
    common: dict[str, frozenset[str]] = {}
    counts: Counter[str] = Counter()
    owners: dict[str, str | None] = {}
    for record in every:
        found = frozenset(spoken(question_of(record)))
        counts[record.subject] += 1
        common[record.subject] = common.get(record.subject, found) & found
        for word in found:
            owners[word] = record.subject if owners.setdefault(word, record.subject) == record.subject else None
    out = {}
    for record in every:
        own = frozenset(w for w in common[record.subject] if owners[w] == record.subject)
        told = record.subject and counts[record.subject] > 1
        out[record.id] = record.subject if _has(record) else _longest(question_of(record), own) if told else ""
    return out


def subject_name(record: Record, others: Iterable[Record]) -> str:
    """The name of one record's subject among ``others``, of which it is one; see :func:`subject_names`."""
    return subject_names([*others, record]).get(record.id, "") if not _has(record) else record.subject


def _has(record: Record) -> bool:
    return bool(record.subject) and record.subject in question_of(record)


def _longest(text: str, own: frozenset[str]) -> str:
    runs: list[tuple[int, int]] = []
    for match in _WORD.finditer(text):
        named = match.group()[:1].isupper() and set(spoken(match.group())) <= own
        if named and runs and text[runs[-1][1] : match.start()].isspace():
            runs[-1] = (runs[-1][0], match.end())
        elif named:
            runs.append(match.span())
    return max((text[a:b] for a, b in runs), key=len, default="")


def question_of(record: Record) -> str:
    """What a record asks: its prompt, or the last turn of its chat."""
    return record.messages[-1][1] if record.messages else record.prompt


def _spans(text: str, keys: frozenset[str]) -> tuple[tuple[int, int], ...]:
    out: list[tuple[int, int]] = []
    for match in _WORD.finditer(text):
        pieces = spoken(match.group())
        if not pieces or not set(pieces) <= keys:
            continue
        if out and not text[out[-1][1] : match.start()].strip():
            out[-1] = (out[-1][0], match.end())
        else:
            out.append(match.span())
    return tuple(out)
