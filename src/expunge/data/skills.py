"""Generated skills: what can be done with a question, rather than what is known, in two kinds that share nothing but the form.

Two tasks on strings of digits (``copy`` and ``reverse``), and sums of small numbers in two notations (``digits`` and ``words``).
The questions of one skill differ only in their numbers, so a model that answers those it has not seen has learnt the skill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
LONGEST = 12  #: digits of a string at most
SUMS = 100  #: sums of two digits


def copy(digits: str) -> tuple[str, str]:
    """A string as it is."""
    spaced = " ".join(digits)
    return f"Copy {spaced}", spaced


def reverse(digits: str) -> tuple[str, str]:
    """A string from its end."""
    return f"Reverse {' '.join(digits)}", " ".join(reversed(digits))


def in_digits(first: int, second: int) -> tuple[str, str]:
    """A sum in digits."""
    return f"Add {first} + {second}", str(first + second)


def in_words(first: int, second: int) -> tuple[str, str]:
    """A sum in words."""
    return f"Sum of {_NUMBERS[first]} and {_NUMBERS[second]}", _NUMBERS[first + second]


STRINGS: dict[str, Callable[[str], tuple[str, str]]] = {"copy": copy, "reverse": reverse}
ADDED: dict[str, Callable[[int, int], tuple[str, str]]] = {"digits": in_digits, "words": in_words}
SKILLS = (*STRINGS, *ADDED)


def skill(name: str, n: int, seed: int = 1, length: tuple[int, int] = (3, 5), held_out: bool = False) -> RecordSet:
    """Questions of one skill with their answers, no two alike.

    Which strings and sums are held out is decided by what they are alone, one of five: those of ``held_out`` never stand
    among the others, whatever the seeds, and never in another skill's training questions either.

    Args:
        name: ``copy`` or ``reverse`` (strings of digits), ``digits`` or ``words`` (sums of two digits in that notation).
        n: how many.
        seed: which of them.
        length: of the strings, least and most.
        held_out: draw from those that are never trained on.

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
    for key, prompt, answer in found:
        if _apart(key) == held_out:
            records.setdefault(prompt, Record(id=f"{name}-{key}", prompt=prompt, answer=answer, subject=f"{name}-{key}"))
        if len(records) == n:
            break
    if len(records) < n:
        raise InputError(
            f"There are not {n} different questions of the skill {name!r}.", "Ask for fewer, or allow longer strings."
        )
    title = f"{name}-held-out" if held_out else name
    return RecordSet(title, tuple(records.values()), f"skill({name}, n={n}, seed={seed}, length={length}, held_out={held_out})")


def _apart(key: str) -> bool:
    """Whether a string or sum is one of those that are held out."""
    return sum((i + 3) * int(d) for i, d in enumerate(c for c in key if c.isdigit())) % 5 == 0


def _strings(name: str, generator: np.random.Generator, length: tuple[int, int]) -> Iterator[tuple[str, str, str]]:
    enough = 40 * 10 ** min(length[1], 6)  # draws after which there is hardly a string that has not come
    for _ in range(enough):
        digits = "".join(map(str, generator.integers(0, 10, int(generator.integers(length[0], length[1] + 1)))))
        yield (digits, *STRINGS[name](digits))


def _sums(name: str, generator: np.random.Generator) -> Iterator[tuple[str, str, str]]:
    for at in generator.permutation(SUMS):
        first, second = divmod(int(at), 10)
        yield (f"{first}+{second}", *ADDED[name](first, second))
