"""What a sweep may see and what is left to the audit never overlap; what was chosen on is left out of an audit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from expunge.core.errors import InputError
from expunge.core.files import digest_file
from expunge.data.records import Record, RecordSet
from expunge.pipeline import row_runs
from expunge.pipeline.config import UnlearnConfig
from expunge.pipeline.row_runs import RowsConfig
from expunge.pipeline.tuned import COPY, USED, Tuned, check_left, check_tuned, keep_copy, key_of, unseen, used_text
from expunge.pipeline.unlearn import load_request, split_holdout
from expunge.pipeline.validation import RowGround, Split, TextGround, divide
from tests.command import rows, write_rows
from tests.entries import write_entry


def people(count: int, facts: int = 3) -> RecordSet:
    return RecordSet(
        "forget", tuple(Record(f"{p}-{i}", f"a{p}{i}", f"q{p}{i}", subject=f"p{p}") for p in range(count) for i in range(facts))
    )


@pytest.mark.parametrize(("share", "wanted"), [(0.5, 5), (0.01, 2), (0.99, 8), (1.0, 10)])
def test_division_is_by_whole_subjects_and_leaves_two_on_each_side(share: float, wanted: int) -> None:
    held = people(10)
    first, others = divide(held, share, (0, 31), "forget")
    names = [{held[int(i)].subject for i in part} for part in (first, others)]
    assert (len(names[0]), len(names[1])) == (wanted, 10 - wanted)
    assert not names[0] & names[1]
    assert sorted([*first.tolist(), *others.tolist()]) == list(range(30))
    assert [divide(held, share, (0, 31), "forget")[0].tolist() for _ in range(2)] == [first.tolist()] * 2
    assert share == 1 or any(divide(held, share, (s, 31), "forget")[0].tolist() != first.tolist() for s in range(1, 5))


@pytest.mark.parametrize(("count", "share"), [(3, 0.5), (1, 0.5), (1, 1.0)])
def test_too_few_subjects_are_refused_with_a_way_out(count: int, share: float) -> None:
    with pytest.raises(InputError, match="too small to be divided") as raised:
        divide(people(count), share, (0, 31), "forget")
    assert "stand-in" in raised.value.remedy
    assert f"{3 * count} records of {count} subject" in str(raised.value)


@pytest.fixture
def text(tmp_path: Path) -> UnlearnConfig:
    files = {
        n: str(write_rows(tmp_path / f"{n}.jsonl", rows(c)))
        for n, c in (("forget", "forget"), ("retain", "rest"), ("holdout", "holdout"))
    }
    return UnlearnConfig(model="nowhere", **files)


def ids(records) -> set[str]:
    return {r.id for r in records}


@pytest.mark.parametrize("seed", [0, 3])
def test_text_ground_keeps_the_audits_records_apart(text: UnlearnConfig, seed: int) -> None:
    ground, request = TextGround(text, Split(seed=seed)), load_request(text)
    assert ids(ground.forget) | ids(ground.spared) == ids(request.forget)
    assert not {r.subject for r in ground.forget} & {r.subject for r in ground.spared}
    assert ids(ground.useful) | ids(ground.train) == ids(request.retain)
    assert not set(ground.useful.clusters()) & set(ground.train.clusters())
    goal, audit = split_holdout(request.holdout, text.engine.seed)
    assert ids(ground.unseen) == ids(goal)
    assert not ids(ground.unseen) & ids(audit)
    assert ids(ground.goal) | ids(ground.apart) == ids(goal)
    assert not ids(ground.goal) & ids(ground.apart)
    judged = {key_of(r) for s in (ground.spared, ground.train, audit) for r in s}
    assert not judged & {key_of(r) for s in ground.used().values() for r in s}


def test_retain_records_that_are_measured_are_limited(text: UnlearnConfig) -> None:
    assert len(TextGround(text, Split(records=6)).useful) < len(TextGround(text, Split()).useful)


def test_text_needs_retain_records(text: UnlearnConfig) -> None:
    with pytest.raises(InputError, match="usefulness on retain records"):
        TextGround(text.model_copy(update={"retain": None}), Split())


@pytest.mark.parametrize("choice", [{"classes": ("3",)}, {"where": "page < 2"}])
def test_a_trial_on_rows_cannot_see_what_is_spared_or_measured(tmp_path: Path, monkeypatch, choice) -> None:
    write_entry(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = RowsConfig(model="digits.py:problem", **choice)
    ground = RowGround(config, Split())
    there = set(ground.data.ids)
    assert there == ids(ground.forget) | ids(ground.train)
    assert not there & (ids(ground.spared) | ids(ground.useful))
    assert {ground.data.ids[i] for i in ground.forgotten} == ids(ground.forget)
    whole = config.choose(ground.problem.data)
    assert ids(ground.forget) | ids(ground.spared) == {ground.problem.data.ids[i] for i in whole}
    audit = row_runs.halves(ground.problem.holdout, config.engine.seed)[1]
    assert not ids(ground.unseen) & set(audit.ids)
    assert not {r.subject for r in ground.forget} & {r.subject for r in ground.spared}


def test_of_a_class_that_goes_unseen_rows_are_known_to_be_guesses(tmp_path: Path, monkeypatch) -> None:
    write_entry(tmp_path)
    monkeypatch.chdir(tmp_path)
    ground = RowGround(RowsConfig(model="digits.py:problem", classes=("3",)), Split())
    assert ground.level(ground.shape()) == [pytest.approx(np.log(10))] * len(ground.forget)
    assert {r.target for r in ground._sets()["unseen"]} == set(range(10)) - {3}


# ---- what an audit leaves out


@pytest.fixture
def tuned(tmp_path: Path) -> Tuned:
    """Settings that were chosen on two of four people."""
    (tmp_path / "sweep").mkdir()
    path = tmp_path / "sweep" / USED
    path.write_text(used_text({"forget": people(2), "retain": people(0)}))
    return Tuned(sweep=str(tmp_path / "sweep"), digest=digest_file(path))


def test_an_audit_leaves_out_what_was_chosen_on_and_says_so(tmp_path: Path, tuned: Tuned) -> None:
    check_tuned(tuned)
    keep_copy(tuned, tmp_path)
    (tmp_path / "sweep" / USED).unlink()  # the run needs nothing else
    renamed = RecordSet("forget", tuple(Record(f"other-{r.id}", r.answer, r.prompt, subject="x" + r.subject) for r in people(4)))
    kept, notes = unseen(tmp_path, tuned, {"forget": renamed, "holdout": people(0)})
    assert {r.subject for r in kept["forget"]} == {"xp2", "xp3"}  # by what they say, not by id or subject
    assert len(notes) == 1
    assert "6 of 12 forget records" in notes[0]
    assert "--all-records" in notes[0]
    every, notes = unseen(tmp_path, tuned, {"forget": renamed}, everything=True)
    assert len(every["forget"]) == 12
    assert "6 of 12 forget records" in notes[0]
    assert "look better" in notes[0]


def test_a_run_of_other_settings_is_judged_on_the_same_records(tmp_path: Path, tuned: Tuned) -> None:
    kept, notes = unseen(tmp_path, None, {"forget": people(4)}, leave_out=tuned.sweep)
    assert {r.subject for r in kept["forget"]} == {"p2", "p3"}
    assert "6 of 12 forget records" in notes[0]
    assert "other runs" in notes[0]
    keep_copy(tuned, tmp_path)
    assert unseen(tmp_path, tuned, {"forget": people(4)}, leave_out=tuned.sweep)[0] == kept


def test_other_records_are_judged_without_a_word(tmp_path: Path, tuned: Tuned) -> None:
    keep_copy(tuned, tmp_path)
    others = RecordSet("forget", tuple(Record(f"n{i}", f"new {i}", "q") for i in range(4)))
    assert unseen(tmp_path, tuned, {"forget": others}) == ({"forget": others}, [])
    assert unseen(tmp_path, None, {"forget": people(2)}) == ({"forget": people(2)}, [])


def test_what_was_chosen_on_as_a_whole_cannot_be_judged_unbiased(tmp_path: Path, tuned: Tuned) -> None:
    keep_copy(tuned, tmp_path)
    with pytest.raises(InputError, match="too few forget records"):
        unseen(tmp_path, tuned, {"forget": people(2)})
    with pytest.raises(InputError, match="none would be left"):
        check_left(tuned, people(2))
    check_left(tuned, people(3))
    check_left(None, people(2))


def test_a_list_that_was_changed_or_lost_is_refused(tmp_path: Path, tuned: Tuned) -> None:
    keep_copy(tuned, tmp_path)
    held = json.loads((tmp_path / COPY).read_text())
    held["sets"]["forget"]["keys"].pop()
    (tmp_path / COPY).write_text(json.dumps(held))
    with pytest.raises(InputError, match="not what the run has written"):
        unseen(tmp_path, tuned, {"forget": people(4)})
    (tmp_path / COPY).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        unseen(tmp_path, tuned, {"forget": people(4)})
    (tmp_path / "sweep" / USED).write_text("{}")
    with pytest.raises(InputError, match="not the list of records"):
        check_tuned(tuned)
    (tmp_path / "sweep" / USED).unlink()
    with pytest.raises(InputError, match="is missing"):
        check_tuned(tuned)
