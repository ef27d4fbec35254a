"""Generated skills: right answers, no question twice, and none of those held out among the others."""

import pytest

from expunge.core.errors import InputError
from expunge.data.named import load_named
from expunge.data.skills import SKILLS, skill

NUMBERS = {w: i for i, w in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])}


def test_answers_are_right():
    for record in skill("copy", 50):
        assert record.prompt.removeprefix("Copy ") == record.answer
    for record in skill("reverse", 50):
        assert record.prompt.removeprefix("Reverse ").split() == record.answer.split()[::-1]
    for record in skill("digits", 60):
        assert eval(record.prompt.removeprefix("Add ")) == int(record.answer)
    for name in ("lumi", "tarn"):
        spoken = [(r.cluster.partition("-")[2], r.answer.split()) for r in skill(name, 50)]
        said = {(d, w) for digits, answer in spoken for d, w in zip(digits, answer, strict=True)}
        assert len(said) == len({d for d, _ in said}) == len({w for _, w in said}) == 10  # a word for each digit
        assert len(spoken) == 50
    words = {r.id.partition("-")[2]: r for r in skill("words", 60)}
    sums = {r.id.partition("-")[2]: r for r in skill("digits", 60)}
    for key in words.keys() & sums.keys():
        first, _, second = words[key].prompt.removeprefix("Sum of ").partition(" and ")
        assert NUMBERS[first] + NUMBERS[second] == int(sums[key].answer)
    assert len({words[k].answer for k in words}) == len({sums[k].answer for k in words.keys() & sums.keys()})


@pytest.mark.parametrize("name", SKILLS)
def test_what_is_held_out_is_never_trained_on(name):
    n = 70 if name in ("digits", "words") else 300
    trained = [r for seed in (1, 2) for r in skill(name, n, seed)]
    apart = list(skill(name, 15, held_out=True))
    assert not {r.prompt for r in trained} & {r.prompt for r in apart}
    assert len({r.prompt for r in trained[:n]}) == n
    assert len({r.prompt for r in apart}) == 15


def test_a_string_that_is_held_out_of_one_skill_is_held_out_of_its_sister():
    copied = {r.answer for r in skill("copy", 400, length=(3, 3))}
    reversed_ = {r.prompt.removeprefix("Reverse ") for r in skill("reverse", 50, length=(3, 3), held_out=True)}
    assert not copied & reversed_


@pytest.mark.parametrize("name", SKILLS)
def test_the_other_wording_asks_the_same(name):
    usual, other = skill(name, 30), skill(name, 30, reworded=True)
    for a, b in zip(usual, other, strict=True):
        assert (a.prompt, a.question_paraphrase) == (b.question_paraphrase, b.prompt)
        assert a.prompt != b.prompt
        assert (a.answer, a.cluster) == (b.answer, b.cluster)
        assert a.id != b.id
    assert [r.prompt for r in load_named(f"skills:{name}?n=30&reworded=true")][:3] == [
        r.prompt for r in skill(name, 30, reworded=True)
    ][:3]


def test_as_a_named_set():
    assert [r.prompt for r in load_named("skills:copy?n=20&shortest=3&longest=3")] == [
        r.prompt for r in skill("copy", 20, length=(3, 3))
    ]
    assert len(load_named("skills:words-held-out?n=20")) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cpoy", "n": 3}, "copy"),
        ({"name": "digits", "n": 101}, "101"),
        ({"name": "copy", "n": 3, "length": (5, 3)}, "length"),
    ],
)
def test_what_cannot_be_made_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        skill(**options)
