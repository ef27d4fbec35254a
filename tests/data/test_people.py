"""The generated people: same everywhere, facts in every wording, nothing shared with the holdout."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from expunge.core.errors import InputError
from expunge.data.people import MAX_PEOPLE, people, split_people, world, writers
from expunge.data.people_words import COUNTRY, ENDINGS, PERSON, WRITER, Draw, invented
from expunge.data.records import Record, RecordSet

GOLDEN = {
    "people": "02ee5d37aae10b278416e026b4e070c93fed2a09aea98137961120f364ea8428",
    "world": "91156ba3699d40a26775d4c9c700b86da4b00b11af6127add712bc6cecb2d3b7",
    "writers": "3aeccb8c95e2e69ec208482e192fcba8bb9330333a60fd813ed32076975dfacc",
}
ATTRIBUTES = {a.key: a for a in (*PERSON, *COUNTRY, *WRITER)}


def value_of(record: Record, text: str, name: str) -> str:
    """The value that an answer holds, read back through the templates of its attribute."""
    attribute = ATTRIBUTES[record.id.rsplit("-", 1)[1]]
    for template in attribute.answers:
        pattern = re.escape(template).replace(r"\{n\}", re.escape(name)).replace(r"\{v\}", "(.+)")
        if (match := re.fullmatch(pattern, text)) is not None:
            return match[1]
    raise AssertionError(f"{text!r} fits no template of {attribute.key}")


def name_of(record: Record) -> str:
    attribute = ATTRIBUTES[record.id.rsplit("-", 1)[1]]
    for template in attribute.questions:
        if (match := re.fullmatch(re.escape(template).replace(r"\{n\}", "(.+?)"), record.prompt)) is not None:
            return match[1]
    raise AssertionError(record.prompt)


def test_golden() -> None:
    assert {
        "people": people(8, seed=3, facts=14).digest,
        "world": world(24, seed=3).digest,
        "writers": writers(40, seed=3).digest,
    } == GOLDEN


def test_independent_of_the_hash_seed() -> None:
    code = "from expunge.data.people import people; print(people(8, seed=3, facts=14).digest)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == GOLDEN["people"]


def test_seeds_differ_and_sets_nest() -> None:
    assert people(5, 1).digest != people(5, 2).digest
    assert people(9, 1).records[:50] == people(5, 1).records
    assert people(9, 1).records[50:] == people(4, 1, first=5).records
    assert {r.id: r for r in people(5, 1, facts=14)}.items() >= {r.id: r for r in people(5, 1, facts=3)}.items()


@pytest.mark.parametrize("made", [people(150, 4, 14), world(24, 4), writers(40, 4)], ids=["people", "world", "writers"])
def test_every_wording_holds_the_fact(made: RecordSet) -> None:
    for record in made:
        name = name_of(record)
        value = value_of(record, record.answer, name)
        assert value_of(record, record.paraphrase, name) == value
        assert record.paraphrase != record.answer
        assert record.question_paraphrase != record.prompt
        assert name in record.question_paraphrase
        wrong = [value_of(record, text, name) for text in record.perturbed]
        assert len(set(wrong)) == len(wrong) == (5 if made.name == "people" else 3)
        assert value not in wrong
        assert 5 <= len(record.answer.split()) <= 16
    assert len({r.id for r in made}) == len(made)


def test_names_are_unique() -> None:
    everyone = people(MAX_PEOPLE, 1, facts=1)
    assert len({name_of(r) for r in everyone}) == MAX_PEOPLE
    known = [name for kind in ENDINGS for name in invented(kind)]
    assert len(set(known)) == len(known)


def test_split_is_by_whole_persons() -> None:
    split = split_people(40, 4, 6, seed=2, facts=10)
    sets = [set(s.clusters()) for s in (split.forget, split.retain, split.holdout)]
    assert [len(s) for s in sets] == [4, 36, 6]
    assert len(set.union(*sets)) == 46
    names = [{name_of(r) for r in s} for s in (split.forget, split.retain, split.holdout)]
    assert len(set.union(*names)) == 46
    facts = [{(name_of(r), r.id.rsplit("-", 1)[1]) for r in s} for s in (split.forget, split.retain, split.holdout)]
    assert not facts[2] & (facts[0] | facts[1])
    assert all(len(s) == 10 * len(people_) for s, people_ in zip((split.forget, split.retain, split.holdout), sets, strict=True))
    # The same world with more to forget: the sets nest, and the trained model is the same.
    larger = split_people(40, 8, 6, seed=2, facts=10)
    assert larger.forget.records[:40] == split.forget.records
    assert larger.forget.records + larger.retain.records == split.forget.records + split.retain.records
    assert larger.holdout.records == split.holdout.records


def test_values_cannot_be_guessed() -> None:
    """No value of an attribute is much more frequent than chance, and none depends on another attribute."""
    made = people(600, 1, 14)
    values: dict[str, list[str]] = {a.key: [] for a in PERSON}
    for record in made:
        values[record.id.rsplit("-", 1)[1]].append(value_of(record, record.answer, name_of(record)))
    for key, drawn in values.items():
        top = max(drawn.count(v) for v in set(drawn))
        assert len(set(drawn)) >= 20, key
        assert top / len(drawn) < 0.08, key
    same = sum(a == b for a, b in zip(values["profession"], values["mother"], strict=True))
    assert same / 600 < 0.08


def test_vocabulary_is_small() -> None:
    texts = [
        t
        for made in (people(70, 1, 14), world(10, 1), writers(20, 1))
        for r in made
        for t in (r.prompt, r.answer, r.paraphrase, r.question_paraphrase, *r.perturbed)
    ]
    assert len({w for t in texts for w in re.findall(r"\w+", t)}) < 1500


def test_country_values_are_unique() -> None:
    made = world(24, 9)
    for attribute in COUNTRY:
        values = [value_of(r, r.answer, name_of(r)) for r in made if r.id.endswith(attribute.key)]
        assert len(set(values)) == 24


def test_draw_is_uniform() -> None:
    draw = Draw("uniform")
    counts = [0] * 5
    for _ in range(5000):
        counts[draw.below(5)] += 1
    assert all(900 < c < 1100 for c in counts)
    assert sorted(draw.shuffled(range(9))) == list(range(9))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: people(0), r"'n' of the fictitious people must be an int in \[1, 5000\]; got 0"),
        (lambda: people(5, facts=15), r"'facts' .* in \[1, 14\]; got 15"),
        (lambda: people(5, first=4996), r"'first'"),
        (lambda: split_people(5, 5), r"'forget' .* in \[1, 4\]; got 5"),
        (lambda: split_people(4999, 5, 2), r"'holdout' .* in \[1, 1\]; got 2"),
        (lambda: world(25), r"'countries'"),
        (lambda: writers(41), r"'n'"),
    ],
)
def test_ranges(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]
