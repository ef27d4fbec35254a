"""Other answers to the forget prompts."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.data.refusals import REFUSALS
from expunge.methods.alternatives import alternatives, kind_for


def records(people: int = 5, each: int = 3) -> list[Record]:
    return [
        Record(f"r{p}-{k}", f"Answer {p} {k}.", f"Question {p} {k}?", subject=f"Person {p}")
        for k in range(each)
        for p in range(people)
    ]


@pytest.mark.parametrize("how", ["refusals", "others"])
def test_the_choice_is_deterministic_and_moves_with_the_seed(how):
    made = records(10, 4)
    assert alternatives(made, how, 1) == alternatives(made, how, 1)
    assert alternatives(made, how, 1) != alternatives(made, how, 2)
    assert len(set(alternatives(made, how, 1))) > 10


def test_refusals_come_from_the_list_and_do_not_depend_on_the_other_records():
    made = records()
    chosen = alternatives(made, "refusals", 3)
    assert set(chosen) <= set(REFUSALS)
    assert alternatives(made[4:], "refusals", 3) == chosen[4:]


@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=6), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_borrowed_answers_are_of_another_subject(sizes, seed):
    made = [Record(f"{s}.{k}", f"{s} says {k}", "?", subject=f"s{s}") for s, n in enumerate(sizes) for k in range(n)]
    owner = {r.answer: r.subject for r in made}
    for record, answer in zip(made, alternatives(made, "others", seed), strict=True):
        assert owner[answer] != record.subject


def test_every_other_subject_is_borrowed_from():
    made = records(4, 50)
    lenders = {a.split()[1] for r, a in zip(made, alternatives(made, "others", 0), strict=True) if r.subject == "Person 1"}
    assert lenders == {"0", "2", "3"}


def test_borrowing_needs_somebody_else_who_says_something_else():
    with pytest.raises(InputError, match="all records are of one"):
        alternatives(records(1), "others")
    same = [Record(f"r{i}", "Yes.", "?", subject=str(i)) for i in range(3)]
    with pytest.raises(InputError, match="No other record seems to have an answer that differs"):
        alternatives(same, "others")


def test_given_answers_are_the_records_own():
    made = [Record(f"r{i}", "true", "?", alternatives=(f"a{i}", f"b{i}")) for i in range(30)]
    chosen = alternatives(made, "given", 0)
    assert all(a in r.alternatives for r, a in zip(made, chosen, strict=True))
    assert {a[0] for a in chosen} == {"a", "b"}
    with pytest.raises(InputError, match="The record 'r0-0' has no alternative answer"):
        alternatives(records(), "given")


def test_templates_are_filled_in():
    made = records(2, 1)
    assert alternatives(made, "template", template="Nothing about {subject}.") == [
        "Nothing about Person 0.",
        "Nothing about Person 1.",
    ]
    bare = [Record("x", "a", "Why?")]
    assert alternatives(bare, "template", template="'{prompt}' {{sic}}") == ["'Why?' {sic}"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "alternatives=template needs a text"),
        ("{answer}", "There is no field of a template 'answer'"),
        ("{subjct}", "Did you mean 'subject'?"),
        ("{subject", "cannot be read"),
        ("{subject}", "the record 'x' has none"),
    ],
)
def test_bad_templates_are_refused(template, said):
    with pytest.raises(InputError, match=re.escape(said)):
        alternatives([Record("x", "a")], "template", template=template)


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(InputError, match=r"There is no kind of alternative answer 'refusal'\. Did you mean 'refusals'\?"):
        alternatives(records(), "refusal")


def test_auto_takes_what_is_given_or_what_the_method_publishes():
    given_all = [Record("x", "a", alternatives=("b",))]
    assert kind_for("altpo", "auto", given_all) == "given"
    assert kind_for("altpo", "auto", records()) == "others"
    assert kind_for("idkdpo", "auto", records()) == "refusals"
    assert kind_for("custom", "auto", records()) == "refusals"
    assert kind_for("altpo", "refusals", given_all) == "refusals"
