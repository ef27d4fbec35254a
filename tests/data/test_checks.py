"""Overlap: the definition by brute force, what must be found, and what must not."""

from __future__ import annotations

import string
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core.errors import InputError
from expunge.data import checks
from expunge.data.checks import (
    OverlapReport,
    check_request,
    drop_overlap,
    duplicates,
    duplicates_of_larger,
    find_overlap,
    jaccard,
    shingles,
    similarity,
    words,
)
from expunge.data.people import people, split_people
from expunge.data.records import Record, RecordSet

LONG = " ".join(f"word{i}" for i in range(60))


def qa(id_: str, prompt: str, answer: str) -> Record:
    return Record(id_, answer, prompt)


def group(name: str, *records: Record) -> RecordSet:
    return RecordSet(name, records)


def test_words() -> None:
    assert words("\uff21da's  CAFÉ — naïve, 3.5 kg!\n") == ["ada", "s", "café", "naïve", "3", "5", "kg"]
    assert words("Straße") == words("STRASSE")
    assert words("?!") == ["?!"]
    assert words("我不知道。") == ["我", "不", "知", "道"]
    assert words("हिन्दी") == ["हिन्दी"]  # vowel signs are marks, not separators
    assert words("3 + 4") != words("3 \u00d7 4")
    assert words("") == []


def test_shingles_and_jaccard() -> None:
    assert shingles("a b c d") == {"a b c", "b c d"}
    assert shingles("A, b") == {"a b"}
    assert shingles("") == set()
    assert jaccard({"x", "y"}, {"y", "z"}) == pytest.approx(1 / 3)
    assert jaccard(set(), set()) == 1.0
    assert jaccard(set(), {"x"}) == 0.0


def test_both_sides_must_match() -> None:
    assert similarity(qa("1", "Who is it?", LONG), qa("2", "who is it", LONG)) == 1.0
    assert similarity(qa("1", "Who is it?", LONG), qa("2", "Where does she live?", LONG)) == 0.0
    assert similarity(qa("1", LONG, "It is Ada."), qa("2", LONG, "It is Bob.")) == 0.0
    # A question and the same words as plain text are not the same example.
    assert similarity(qa("1", "Who is it?", LONG), Record("2", LONG)) == 0.0
    chat = Record("3", LONG, messages=(("user", "Who is it?"),))
    assert similarity(qa("1", "Who is it?", LONG), chat) == 1.0


# A small alphabet makes near duplicates, shared shingles and equal texts frequent.
_text = st.lists(st.sampled_from("abcd"), min_size=0, max_size=40).map(" ".join)
_edited = st.tuples(
    st.sampled_from([LONG, LONG[:200], " ".join(string.ascii_lowercase)]), st.lists(st.integers(0, 59), max_size=3)
).map(lambda pair: " ".join(w for i, w in enumerate(pair[0].split()) if i not in pair[1]))
_record = st.tuples(st.one_of(_text, _edited), st.one_of(_text, _edited).filter(bool))
_records = st.lists(_record, min_size=1, max_size=14)


@settings(max_examples=150, deadline=None)
@given(_records, _records)
def test_search_equals_brute_force(first: list[tuple[str, str]], second: list[tuple[str, str]]) -> None:
    a = [qa(f"a{i}", *pair) for i, pair in enumerate(first)]
    b = [qa(f"b{i}", *pair) for i, pair in enumerate(second)]
    expected = {y.id for y in b if any(similarity(x, y) >= checks.THRESHOLD - 1e-9 for x in a)}
    by_id = {r.id: r for r in (*a, *b)}
    for found in (list(duplicates(a, b)), duplicates_of_larger(a, b)):
        assert [m.second for m in found] == [y.id for y in b if y.id in expected]
        for match in found:
            assert match.similarity == pytest.approx(similarity(by_id[match.first], by_id[match.second]))
            same = [tuple(map(words, (r.prompt, r.answer))) for r in (by_id[match.first], by_id[match.second])]
            assert match.exact == (same[0] == same[1])


def test_injected_duplicates_are_found() -> None:
    split = split_people(30, 6, 6, facts=14)
    text = Record("doc", LONG)
    forget = RecordSet("forget", (*split.forget.records, text))
    victim = forget[17]
    exact = qa("shout", victim.prompt.upper().replace("?", " ?"), victim.answer.replace(" ", "  ").rstrip("."))
    near = Record("doc2", LONG.replace("word30", "other"))
    retain = RecordSet("retain", (*split.retain.records[:50], exact, *split.retain.records[50:], near))
    found = find_overlap(forget, retain, split.holdout)
    assert [(m.first, m.second, m.exact) for m in found.forget_retain] == [(victim.id, "shout", True), ("doc", "doc2", False)]
    assert found.forget_retain[1].similarity == pytest.approx((58 - 3) / (58 + 3))
    assert found.forget_holdout == found.retain_holdout == ()
    assert found.summary() == (
        f"2 retain records duplicate records of the forget set (1 exactly, 1 nearly): shout (like {victim.id}), doc2 (like doc)."
    )
    assert drop_overlap(retain, found).records == split.retain.records
    assert found.to_json()["forget-retain"] == {
        "exact": 1,
        "near": 1,
        "matches": [[victim.id, "shout", 1.0], ["doc", "doc2", round(55 / 61, 4)]],
    }


def test_just_below_the_threshold_is_no_duplicate() -> None:
    # One changed word in the middle spoils 3 of 27 shingles of 29 words (24 / 30 = 0.8), and 3 of 26 of 28 words (23 / 29).
    for n, expected in ((29, 1), (28, 0)):
        text = LONG.split()[:n]
        changed = [*text[:14], "other", *text[15:]]
        assert len(list(duplicates([Record("a", " ".join(text))], [Record("b", " ".join(changed))]))) == expected


def test_exactly_at_the_threshold_by_inclusion() -> None:
    # 8 of 10 shingles: the two that are not shared come first in the order, so the last place of the prefix decides.
    whole, part = " ".join(LONG.split()[:12]), " ".join(LONG.split()[:10])
    for a, b in ((whole, part), (part, whole)):
        (match,) = duplicates([Record("a", a)], [Record("b", b)])
        assert match.similarity == pytest.approx(0.8)
        assert [m.second for m in duplicates_of_larger([Record("a", a)], [Record("b", b)])] == ["b"]


@pytest.mark.parametrize("seed", range(4))
def test_generated_people_are_no_false_alarm(seed: int) -> None:
    split = split_people(300, 60, 60, seed=seed, facts=14)
    assert not find_overlap(split.forget, split.retain, split.holdout).found


def test_refusals_to_start() -> None:
    world = people(4, facts=2)
    forget, retain = RecordSet("forget", world.records[:2]), RecordSet("retain", world.records)
    with pytest.raises(
        InputError,
        match=r"2 retain records duplicate .* \(2 exactly, 0 nearly\): person-0000-birthplace, .*--drop-overlap.*--allow-overlap",
    ):
        check_request(forget, retain)
    allowed = check_request(forget, retain, allow_overlap=True)
    assert allowed.retain_ids == {r.id for r in forget}
    assert not check_request(forget, drop_overlap(retain, allowed)).found
    with pytest.raises(InputError, match=r"The forget set 'forget' is empty"):
        check_request(group("forget"), retain)
    with pytest.raises(InputError, match=r"The retain set 'retain' is empty.*or no retain set"):
        check_request(forget, group("retain"))
    with pytest.raises(
        InputError, match=r"forget set \(8 records\) is larger than the retain set \(2\)\. .*exchanged.*--allow-large-forget"
    ):
        check_request(retain, forget)
    assert check_request(retain, forget, allow_overlap=True, allow_large_forget=True).found
    assert check_request(forget, None) == OverlapReport()
    with pytest.raises(InputError, match="nothing is left"):
        drop_overlap(forget, check_request(retain, forget, allow_overlap=True, allow_large_forget=True))


def test_holdout_is_compared_with_both() -> None:
    world = people(10, facts=2).records
    forget, retain, holdout = (
        group("f", *world[:4]),
        group("r", *world[4:16]),
        group("h", *world[16:], world[0], world[5], world[5]),
    )
    found = check_request(forget, retain, holdout, allow_overlap=True)
    assert [m.second for m in found.forget_holdout] == [world[0].id]
    assert [m.second for m in found.retain_holdout] == [world[5].id] * 2
    assert drop_overlap(holdout, found, "holdout").records == world[16:]
    with pytest.raises(
        InputError,
        match=r"1 holdout record duplicates records of the forget set .*; 2 holdout records duplicate records of the retain set",
    ):
        check_request(forget, retain, holdout)


def test_time_is_near_linear() -> None:
    """Texts of one template share most shingles: the case where an index without the position filter degenerates."""

    def made(first: int, n: int) -> list[Record]:
        # 18 shingles of which 3 are the record's own, so the fourth of a prefix of 4 is common to all.
        form = " ".join(f"common{i}" if i != 10 else "{}" for i in range(20))
        return [Record(f"r{i}", form.format(f"name{i}")) for i in range(first, first + n)]

    def compared(n: int) -> int:
        count = 0
        real = checks.jaccard

        def counted(a: set[str], b: set[str]) -> float:
            nonlocal count
            count += 1
            return real(a, b)

        checks.jaccard = counted
        try:
            assert not list(duplicates(made(0, n), made(n, 4 * n)))
        finally:
            checks.jaccard = real
        return count

    assert compared(50) == compared(200) == 0
    # A cluster of near copies ends each search at its first match.
    copies = [Record(f"c{i}", f"{LONG} tail{i}") for i in range(600)]
    started = time.perf_counter()
    assert len(list(duplicates(copies[:300], copies[300:]))) == 300
    assert len(duplicates_of_larger(copies[:400], copies[400:])) == 200
    assert time.perf_counter() - started < 5
