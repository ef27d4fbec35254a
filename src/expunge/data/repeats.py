"""How often what is to be forgotten stands in the retain set too: a model that goes on learning it there cannot forget it.

Whole records that stand in two sets are found by :mod:`expunge.data.checks`. Here the question is wider: which retain records
*say* a forget answer, in whatever place and beside whatever else, and which name the person it is about. How well a model
remembers a text grows with the number of its copies in the training data (Lee et al. 2022, *Deduplicating training data makes
language models better*, arXiv 2107.06499; Carlini et al. 2023, *Quantifying memorization across neural language models*, arXiv
2202.07646).

The answers' word n-grams are indexed, and the retain set streams past once: the cost is linear in its words, whatever the number
of answers, plus the number of hits.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from expunge.data.checks import SHINGLE, context, words
from expunge.data.records import Record

MOST = 0.5
"""Share of an answer's shingles above which a retain record says most of it."""


@dataclass(frozen=True)
class Repeats:
    """What the retain set says of one forget record.

    Attributes:
        id: of the forget record.
        whole: retain records in which the whole answer stands, word by word.
        mostly: retain records that hold more than half of its word 3-shingles, those with the whole answer among them.
        told: of the records in ``mostly``, those that also name the record's subject or hold most of its prompt: there the fact
            itself is told, and not just the same words.
        named: retain records that name the subject; ``None`` if it stands in none of its own records (a number, no name).
        ids: up to five records in ``told``, or else in ``mostly``.
    """

    id: str
    whole: int
    mostly: int
    told: int
    named: int | None
    ids: tuple[str, ...] = ()


def grams(text: Sequence[str], size: int) -> set[str]:
    """The distinct runs of ``size`` words."""
    return {" ".join(text[i : i + size]) for i in range(len(text) - size + 1)}


class _Texts:
    """An index of texts by their word n-grams: 3-shingles, or the whole text where it has fewer words."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.words = [words(t) for t in texts]
        self.sizes = [0] * len(texts)
        self.holders: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, found in enumerate(self.words):
            length = min(SHINGLE, len(found))
            own = grams(found, length) if length else set()
            self.sizes[number] = len(own)
            for gram in own:
                self.holders[length][gram].append(number)

    def shares(self, text: Sequence[str]) -> dict[int, float]:
        """Share of each text's n-grams that ``text`` holds, in (0, 1], for those of which it holds any."""
        counts: Counter[int] = Counter()
        for length, holders in self.holders.items():
            for gram in grams(text, length):
                counts.update(holders.get(gram, ()))
        return {number: count / self.sizes[number] for number, count in counts.items()}

    def stands_in(self, number: int, text: str) -> bool:
        """Whether the whole of a text stands in ``text``, which is words joined and enclosed by blanks."""
        return f" {' '.join(self.words[number])} " in text


def repeats(forget: Sequence[Record], retain: Iterable[Record]) -> list[Repeats]:
    """What the retain set says of each forget record, in order.

    Args:
        forget: is indexed.
        retain: streams past once; prompt and answer count as one text.
    """
    answers, prompts = _Texts([r.answer for r in forget]), _Texts([context(r) for r in forget])
    names, of_name = _subjects(forget)
    subjects = _Texts(names)
    whole, mostly, told = ([0] * len(forget) for _ in range(3))
    named = [0] * len(names)
    shown: list[dict[bool, list[str]]] = [{True: [], False: []} for _ in forget]
    for record in retain:
        text = words(f"{context(record)}\n{record.lead} {record.answer}")
        joined = f" {' '.join(text)} "
        here = {n for n in subjects.shares(text) if subjects.stands_in(n, joined)}
        for n in here:
            named[n] += 1
        asked = prompts.shares(text)
        for number, share in answers.shares(text).items():
            full = share >= 1 and answers.stands_in(number, joined)
            if share <= MOST and not full:
                continue
            same = of_name[number] in here or asked.get(number, 0.0) > MOST
            whole[number] += full
            mostly[number] += 1
            told[number] += same
            if len(shown[number][same]) < 5:
                shown[number][same].append(record.id)
    often = [None if name is None else named[name] for name in of_name]
    ids = [tuple(held[True] or held[False]) for held in shown]
    columns = zip(forget, whole, mostly, told, often, ids, strict=True)
    return [Repeats(r.id, *values) for r, *values in columns]


def _subjects(forget: Sequence[Record]) -> tuple[list[str], list[int | None]]:
    """The subjects that are names, and which of them each record has: a name stands in one of its subject's own records."""
    said: dict[str, bool] = {}
    for r in forget:
        if r.subject and not said.get(r.subject):
            text = f" {' '.join(words(f'{context(r)} {r.answer}'))} "
            said[r.subject] = f" {' '.join(words(r.subject))} " in text
    names = [s for s, there in said.items() if there]
    numbers = {s: i for i, s in enumerate(names)}
    return names, [numbers.get(r.subject) for r in forget]
