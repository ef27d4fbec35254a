"""Tables with wrong rows: which rows, what is known of them, and where the damage shows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expunge.core.errors import InputError
from expunge.data.rows import table
from expunge.data.spoiled import confuse, mislabel, poison

RNG = np.random.default_rng(0)
NAMES = ["ape", "bee", "cat", "dog"]
IMAGES = RNG.random((80, 1, 6, 5)).astype(np.float32) * 0.9
DATA = table(IMAGES, np.arange(80) % 4, classes=NAMES, columns={"age": np.arange(80)})
FLAT = table(IMAGES.reshape(80, 30), np.arange(80) % 4, classes=NAMES)


@given(st.integers(1, 80), st.integers(0, 5))
def test_exactly_the_chosen_rows_get_another_label(count: int, seed: int) -> None:
    made = mislabel(DATA, count, seed)
    wrong = made.table.targets != DATA.targets
    assert np.flatnonzero(wrong).tolist() == made.rows.tolist()
    assert len(made.rows) == count
    assert set(made.table.targets.tolist()) <= set(range(4))
    assert np.array_equal(made.truth, DATA.targets)
    assert np.array_equal(made.restored().targets, DATA.targets)
    assert np.array_equal(mislabel(DATA, count, seed).table.targets, made.table.targets)


def test_other_labels_are_drawn_evenly_and_by_seed() -> None:
    many = table(np.zeros((6000, 1)), np.zeros(6000, int), classes=NAMES)
    counts = np.bincount(mislabel(many, 6000).table.targets, minlength=4)
    assert counts[0] == 0
    assert np.abs(counts[1:] - 2000).max() < 200  # five standard deviations
    assert mislabel(DATA, 20, 1).rows.tolist() != mislabel(DATA, 20, 2).rows.tolist()
    assert mislabel(DATA, [7, 3]).rows.tolist() == [3, 7]


def test_wrong_rows_can_be_asked_for_like_any_others() -> None:
    made = mislabel(DATA, 9)
    assert made.table.select(where="spoiled").tolist() == made.rows.tolist()
    assert made.table.select(where="spoiled and age < 40").tolist() == [i for i in made.rows if i < 40]
    for share in (1 / 3, 2 / 3, 1.0):
        assert made.table.select(where=f"known <= {share}").tolist() == made.known(share).tolist()


@given(st.integers(0, 20))
def test_known_rows_of_a_larger_share_hold_those_of_a_smaller(seed: int) -> None:
    made = dataclasses.replace(mislabel(DATA, 40, 0), seed=seed)
    before: set[int] = set()
    for share in (0.1, 0.25, 0.5, 1.0):
        found = made.known(share)
        assert len(found) == round(40 * share)
        assert before <= set(found.tolist()) <= set(made.rows.tolist())
        assert found.tolist() == sorted(found)
        before = set(found.tolist())


@pytest.mark.parametrize(("data", "shape"), [(DATA, None), (FLAT, (6, 5))])
def test_a_trigger_is_a_patch_and_a_label(data, shape) -> None:
    made = poison(data, 10, label="bee", size=2, shape=shape)
    changed, before = made.table.inputs.reshape(80, 6, 5), IMAGES.reshape(80, 6, 5)
    top = IMAGES.max()
    for row in range(80):
        expected = before[row].copy()
        if row in made.rows:
            expected[4:, 3:] = top
        assert np.array_equal(changed[row], expected)
    assert (made.table.targets[made.rows] == 1).all()
    clean = np.setdiff1d(np.arange(80), made.rows)
    assert np.array_equal(made.table.targets[clean], data.targets[clean])
    assert np.array_equal(data.inputs.reshape(IMAGES.shape), IMAGES)
    concerned, all_ = made.domain.split(dataclasses.replace(data, inputs=data.inputs * 0.5))
    assert set(concerned.targets.tolist()) == {0, 2, 3}
    assert (concerned.inputs.reshape(-1, 6, 5)[:, 4:, 3:] == top).all()  # of the training rows, not of the test rows
    assert np.allclose(concerned.inputs.reshape(-1, 6, 5)[:, :4], 0.5 * before[data.targets != 1][:, :4])
    assert len(concerned) == 60
    assert len(all_) == 80
    assert float(all_.inputs.max()) == pytest.approx(top / 2)


def test_two_classes_are_mistaken_for_each_other() -> None:
    made = confuse(DATA, 12, first="cat", second="dog")
    was, now = DATA.targets[made.rows], made.table.targets[made.rows]
    assert sorted(zip(was.tolist(), now.tolist(), strict=True)) == [(2, 3)] * 6 + [(3, 2)] * 6
    assert (made.table.targets != DATA.targets).sum() == 12
    concerned, others = made.domain.split(DATA)
    assert set(concerned.targets.tolist()) == {2, 3}
    assert set(others.targets.tolist()) == {0, 1}
    assert concerned.columns["age"].tolist() == np.flatnonzero(DATA.targets >= 2).tolist()
    assert len(concerned) + len(others) == 80


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: mislabel(DATA, 0), "cannot be spoiled"),
        (lambda: mislabel(DATA, 81), "cannot be spoiled"),
        (lambda: mislabel(DATA, [80]), "not all among"),
        (lambda: mislabel(DATA, []), "not all among"),
        (lambda: mislabel(table(np.eye(3), [1.0, 2, 3], task="regression"), 1), "at least two classes"),
        (lambda: mislabel(mislabel(DATA, 3).table, 3), "has a column 'spoiled'"),
        (lambda: mislabel(DATA, 4).known(0.1), "holds no row"),
        (lambda: mislabel(DATA, 4).known(1.1), "holds no row"),
        (lambda: poison(DATA, 4, label="bea"), "no class 'bea'"),
        (lambda: poison(DATA, 4, label="bee", size=6), "does not fit"),
        (lambda: poison(FLAT, 4, label="bee"), "are no images"),
        (lambda: poison(FLAT, 4, label="bee", shape=(5, 5)), "are no images"),
        (lambda: confuse(DATA, 3, first="cat", second="dog"), "two equal halves"),
        (lambda: confuse(DATA, 42, first="cat", second="dog"), "has 20 rows"),
        (lambda: confuse(DATA, 2, first="cat", second="cat"), "itself"),
    ],
)
def test_what_cannot_be_spoiled_is_refused(act, said: str) -> None:
    with pytest.raises(InputError, match=said):
        act()
