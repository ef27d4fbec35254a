"""What the retain set says of the forget records: against counting by brute force, and in cases that can be read."""

from __future__ import annotations

import random

from expunge.data.checks import context, shingles, words
from expunge.data.records import Record
from expunge.data.repeats import MOST, repeats


def said(answer: str, text: str) -> bool:
    """The whole answer stands in the text, or more than half of its shingles: the slow way."""
    own, there = words(answer), words(text)
    whole = any(there[i : i + len(own)] == own for i in range(len(there)))
    size = min(3, len(own))
    grams = {" ".join(there[i : i + size]) for i in range(len(there) - size + 1)}
    return whole or len(shingles(answer) & grams) / len(shingles(answer)) > MOST


def test_counts_are_those_of_brute_force() -> None:
    draw = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice("abcd") for _ in range(draw.randint(low, high)))

    forget = [Record(f"f{i}", text(1, 6), prompt=text(2, 5)) for i in range(40)]
    retain = [Record(f"r{i}", text(1, 9), prompt=text(2, 5)) for i in range(60)]
    found = repeats(forget, iter(retain))
    assert [r.id for r in found] == [r.id for r in forget]
    for record, one in zip(forget, found, strict=True):
        texts = [f"{context(r)} {r.answer}" for r in retain]
        own = f" {' '.join(words(record.answer))} "
        assert one.mostly == sum(said(record.answer, t) for t in texts)
        assert one.whole == sum(own in f" {' '.join(words(t))} " for t in texts)
        assert one.told <= one.mostly
        assert one.named is None
    assert 0 < sum(r.whole for r in found) < sum(r.mostly for r in found)


def test_a_fact_that_is_told_again_is_told_from_the_same_words_of_another() -> None:
    forget = [
        Record("born", "She was born in Graz.", prompt="Where was Ida Moss born?", subject="Ida Moss"),
        Record("job", "Her trade is glass blowing.", prompt="What does Ida Moss do?", subject="Ida Moss"),
        Record("pet", "A grey parrot.", prompt="What animal lives with Jon?", subject="person-7"),
    ]
    retain = [
        Record("other", "He was born in Graz, and she was born in Graz too.", prompt="Where was Leo Hart born?"),
        Record("again", "Ida Moss: she was born in Graz!", prompt="Tell me about the town."),
        Record("moss", "Ida Moss lives by the sea.", prompt="Who lives by the sea?"),
        Record("near", "A moss garden for Ida.", prompt="What is this?"),
        Record("parrot", "It is a grey parrot, I think.", prompt="What animal lives with Jon, again?"),
    ]
    born, job, pet = repeats(forget, retain)
    assert (born.whole, born.mostly, born.told, born.ids) == (2, 2, 1, ("again",))
    assert (job.whole, job.mostly, job.told, job.ids) == (0, 0, 0, ())
    assert born.named == job.named == 2  # not "moss ... Ida"
    assert (pet.whole, pet.told, pet.named) == (1, 1, None)  # its subject is a number, its prompt is asked again


def test_short_answers_are_found_as_words_only() -> None:
    forget = [Record("a", "Graz", prompt="Where?"), Record("b", "New York", prompt="Where to?")]
    retain = [Record("1", "Grazing is done in York, not New Yorkshire."), Record("2", "From Graz to New York.")]
    assert [r.whole for r in repeats(forget, retain)] == [1, 1]
