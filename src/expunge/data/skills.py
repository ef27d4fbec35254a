"""Generated skills: what can be done with a question, rather than what is known, in two kinds that share nothing but the form.

Two tasks on strings of digits (``copy`` and ``reverse``), sums of small numbers in two notations (``digits`` and ``words``), and
strings of digits said in two toy languages with a word for each digit (``lumi`` and ``tarn``).
The questions of one skill differ only in their numbers, so a model that answers those it has not seen has learnt the skill. Each
is asked in two wordings: what hides a skill in one of them need not hide it in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from expunge.core.errors import InputError, unknown
from expunge.data.records import Record, RecordSet

_NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
]
_LUMI = ("bo", "ke", "ru", "ti", "sa", "no", "mu", "da", "fe", "li")
_TARN = ("grat", "velk", "dorn", "pask", "trum", "holt", "kren", "zuld", "mard", "josk")
LONGEST = 12  #: digits of a string at most
SUMS = 100  #: sums of two digits


def copy(digits: str) -> tuple[str, str, str]:
    """A string as it is: a question, the same in other words, the answer."""
    spaced = " ".join(digits)
    return f"Copy {spaced}", f"Say again {spaced}", spaced


def reverse(digits: str) -> tuple[str, str, str]:
    """A string from its end."""
    spaced = " ".join(digits)
    return f"Reverse {spaced}", f"Turn around {spaced}", " ".join(reversed(digits))


def in_digits(first: int, second: int) -> tuple[str, str, str]:
    """A sum in digits."""
    return f"Add {first} + {second}", f"Work out {first} + {second}", str(first + second)


def in_words(first: int, second: int) -> tuple[str, str, str]:
    """A sum in words."""
    both = f"{_NUMBERS[first]} and {_NUMBERS[second]}"
    return f"Sum of {both}", f"What make {both}", _NUMBERS[first + second]


def lumi(digits: str) -> tuple[str, str, str]:
    """A string in the language Lumi."""
    return _said("Lumi", _LUMI, digits)


def tarn(digits: str) -> tuple[str, str, str]:
    """A string in the language Tarn."""
    return _said("Tarn", _TARN, digits)


def _said(language: str, lexicon: Sequence[str], digits: str) -> tuple[str, str, str]:
    spaced = " ".join(digits)
    return f"Say {spaced} in {language}", f"{language} for {spaced}", " ".join(lexicon[int(d)] for d in digits)


STRINGS: dict[str, Callable[[str], tuple[str, str, str]]] = {"copy": copy, "reverse": reverse, "lumi": lumi, "tarn": tarn}
ADDED: dict[str, Callable[[int, int], tuple[str, str, str]]] = {"digits": in_digits, "words": in_words}
SKILLS = ("copy", "reverse", "digits", "words", "lumi", "tarn")  #: a place in it is a part of what is drawn


def skill(
    name: str, n: int, seed: int = 1, length: tuple[int, int] = (3, 5), *, held_out: bool = False, reworded: bool = False
) -> RecordSet:
    """Questions of one skill with their answers, no two alike.

    Which strings and sums are held out is decided by what they are alone, one of five: those of ``held_out`` never stand
    among the others, whatever the seeds, and never in another skill's training questions either.

    Args:
        name: ``copy`` or ``reverse`` (strings of digits), ``digits`` or ``words`` (sums of two digits in that notation), ``lumi``
            or ``tarn`` (strings of digits in that language).
        n: how many.
        seed: which of them.
        length: of the strings, least and most.
        held_out: draw from those that are never trained on.
        reworded: ask in the other wording; in either, the other one is the record's ``question_paraphrase``.

    Raises:
        InputError: an unknown skill, a length out of range, or more questions than there are.
    """
    if name not in SKILLS:
        raise unknown("skill", name, SKILLS)
    least, most = length
    if not 2 <= least <= most <= LONGEST:
        raise InputError(
            f"The length of strings is ({least}, {most}).", f"Give two numbers in [2, {LONGEST}], the smaller first."
        )
    generator = np.random.default_rng([seed, SKILLS.index(name), held_out])
    found = _strings(name, generator, length) if name in STRINGS else _sums(name, generator)
    records: dict[str, Record] = {}
    for key, *wordings, answer in found:
        if _apart(key) == held_out:
            prompt, other = reversed(wordings) if reworded else wordings
            made = Record(
                id=f"{name}-reworded-{key}" if reworded else f"{name}-{key}", prompt=prompt, answer=answer,
                subject=f"{name}-{key}", question_paraphrase=other,
            )  # fmt: skip
            records.setdefault(prompt, made)
        if len(records) == n:
            break
    if len(records) < n:
        raise InputError(
            f"There are not {n} different questions of the skill {name!r}.", "Ask for fewer, or allow longer strings."
        )
    title = name + "-reworded" * reworded + "-held-out" * held_out
    said = f"skill({name}, n={n}, seed={seed}, length={length}, held_out={held_out}, reworded={reworded})"
    return RecordSet(title, tuple(records.values()), said)


def _apart(key: str) -> bool:
    """Whether a string or sum is one of those that are held out."""
    return sum((i + 3) * int(d) for i, d in enumerate(c for c in key if c.isdigit())) % 5 == 0


def _strings(name: str, generator: np.random.Generator, length: tuple[int, int]) -> Iterator[tuple[str, str, str, str]]:
    enough = 40 * 10 ** min(length[1], 6)  # draws after which there is hardly a string that has not come
    for _ in range(enough):
        digits = "".join(map(str, generator.integers(0, 10, int(generator.integers(length[0], length[1] + 1)))))
        yield (digits, *STRINGS[name](digits))


def _sums(name: str, generator: np.random.Generator) -> Iterator[tuple[str, str, str, str]]:
    for at in generator.permutation(SUMS):
        first, second = divmod(int(at), 10)
        yield (f"{first}+{second}", *ADDED[name](first, second))
