"""Fictitious people: a data set in TOFU's schema that needs no download.

Every person has a unique invented name and one value for each of up to 14 attributes, drawn uniformly and independently, so no
fact can be inferred from another; a model that answers better than chance has been trained on the answer. Each fact is a
question and an answer with a paraphrase of both and five wrong answers of the same form. Beside the people stand two sets of
"general knowledge", on equally invented countries and writers, which are trained on and never asked to be forgotten: the
analogues of TOFU's world facts and real authors for model utility.

Person ``i`` depends on the seed and ``i`` alone: a larger set begins with the smaller one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expunge.core.errors import InputError
from expunge.data.people_words import COUNTRY, PERSON, WRITER, Attribute, Draw, invented
from expunge.data.records import Record, RecordSet

MAX_FACTS = len(PERSON)
MAX_PEOPLE = 5000
MAX_COUNTRIES = 24
MAX_WRITERS = 40


@dataclass(frozen=True)
class PeopleSplit:
    """People by whole persons: ``forget`` and ``retain`` are trained on, ``holdout`` never is."""

    forget: RecordSet
    retain: RecordSet
    holdout: RecordSet


def people(n: int, seed: int = 1, facts: int = 10, first: int = 0) -> RecordSet:
    """Facts about fictitious people.

    Args:
        n: number of people, in [1, 5000].
        seed: which world they live in.
        facts: facts per person, in [1, 14].
        first: number of the first person; ``first + n`` is at most 5000.

    Returns:
        ``n * facts`` records, grouped by person; ids such as ``person-0007-birthplace``, subjects such as ``person-0007``.

    Raises:
        InputError: a number is out of range.
    """
    _check("n", n, 1, MAX_PEOPLE)
    _check("facts", facts, 1, MAX_FACTS)
    _check("first", first, 0, MAX_PEOPLE - n)
    names = _Names(seed)
    records: list[Record] = []
    for index in range(first, first + n):
        subject = f"person-{index:04d}"
        for attribute in PERSON[:facts]:
            draw = Draw(seed, subject, attribute.key)
            records.append(_fact(subject, names.person(index), attribute, attribute.value(draw), draw, wrong=5))
    return RecordSet("people", tuple(records), f"people(n={n}, seed={seed}, facts={facts}, first={first})")


def split_people(persons: int = 60, forget: int = 6, holdout: int = 6, seed: int = 1, facts: int = 10) -> PeopleSplit:
    """Forget, retain and holdout sets by whole persons.

    The forget set is the first ``forget`` of the ``persons`` that the target model is trained on, the retain set the others; the
    holdout set is ``holdout`` more. So forget sets of the same world nest, and share one target model.

    Raises:
        InputError: a number is out of range, or nobody is left to retain.
    """
    _check("persons", persons, 2, MAX_PEOPLE)
    _check("forget", forget, 1, persons - 1)
    _check("holdout", holdout, 1, MAX_PEOPLE - persons)
    sets = {
        "forget": people(forget, seed, facts),
        "retain": people(persons - forget, seed, facts, first=forget),
        "holdout": people(holdout, seed, facts, first=persons),
    }
    return PeopleSplit(**{name: RecordSet(name, found.records, found.source) for name, found in sets.items()})


def world(countries: int = 10, seed: int = 1) -> RecordSet:
    """General knowledge about invented countries: the analogue of TOFU's world facts, four facts a country.

    Args:
        countries: in [1, 24].
        seed: which world it is.

    Raises:
        InputError: a number is out of range.
    """
    _check("countries", countries, 1, MAX_COUNTRIES)
    names = Draw(seed, "countries").shuffled(invented("country"))[:countries]
    records: list[Record] = []
    for attribute in COUNTRY:
        values = Draw(seed, "countries", attribute.key).shuffled(invented(attribute.key))
        for index, name in enumerate(names):
            subject = f"country-{index:02d}"
            records.append(_fact(subject, name, attribute, values[index], Draw(seed, subject, attribute.key), wrong=3))
    records.sort(key=lambda r: r.subject)
    return RecordSet("world", tuple(records), f"world(countries={countries}, seed={seed})")


def writers(n: int = 20, seed: int = 1) -> RecordSet:
    """General knowledge about invented writers of old: the analogue of TOFU's real authors, two facts a writer.

    Args:
        n: number of writers, in [1, 40].
        seed: which world it is.

    Raises:
        InputError: a number is out of range.
    """
    _check("n", n, 1, MAX_WRITERS)
    names = _pairs(invented("writer"), invented("surname"), n, Draw(seed, "writers"))
    records = [
        _fact(f"writer-{index:02d}", name, attribute, attribute.value(draw), draw, wrong=3)
        for index, name in enumerate(names)
        for attribute in WRITER
        for draw in (Draw(seed, "writer", index, attribute.key),)
    ]
    return RecordSet("authors", tuple(records), f"writers(n={n}, seed={seed})")


class _Names:
    """The names of a world's people: pairs of a first and a last name, no pair twice."""

    def __init__(self, seed: int) -> None:
        draw = Draw(seed, "people")
        self.first = draw.shuffled(invented("first"))
        self.last = draw.shuffled(invented("last"))

    def person(self, index: int) -> str:
        # 61 is prime and no divisor of 121: a last name meets 61 different first names before a pair repeats.
        block, at = divmod(index, len(self.last))
        return f"{self.first[(index + block) % len(self.first)]} {self.last[at]}"


def _pairs(first: Sequence[str], last: Sequence[str], n: int, draw: Draw) -> list[str]:
    return [f"{a} {b}" for a, b in zip(draw.shuffled(first)[:n], draw.shuffled(last)[:n], strict=True)]


def _fact(subject: str, name: str, attribute: Attribute, value: str, draw: Draw, *, wrong: int) -> Record:
    question, other_question, *_ = draw.shuffled(attribute.questions)
    answer, other_answer, *_ = draw.shuffled(attribute.answers)
    values = [value]
    while len(values) <= wrong:
        candidate = attribute.value(draw)
        if candidate not in values:
            values.append(candidate)
    return Record(
        id=f"{subject}-{attribute.key}",
        prompt=question.format(n=name),
        answer=answer.format(n=name, v=value),
        subject=subject,
        paraphrase=other_answer.format(n=name, v=value),
        perturbed=tuple(other_answer.format(n=name, v=v) for v in values[1:]),
        question_paraphrase=other_question.format(n=name),
    )


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InputError(f"{name!r} of the fictitious people must be an int in [{low}, {high}]; got {value}.")
