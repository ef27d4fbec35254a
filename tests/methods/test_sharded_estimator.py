"""SISA around any estimator: exact after any deletions, cheap, and nothing half done."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_diabetes, load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from expunge.core.errors import InputError
from expunge.data.rows import table
from expunge.methods.prepared.dealing import deal
from expunge.methods.prepared.estimators import ShardedEstimator

X, Y = load_digits(return_X_y=True)
DATA = table(X[:400], Y[:400], ids=[f"r{i}" for i in range(400)])
SUGAR, LEVEL = load_diabetes(return_X_y=True)
NUMBERS = table(SUGAR, LEVEL, task="regression", precision="float64")


def without(data, ids):
    return data.subset(np.flatnonzero(~np.isin(data.ids, list(ids))))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sets(st.integers(0, 399), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 3))
def test_after_any_deletions_each_shard_is_one_that_never_saw_the_rows(requests, seed) -> None:
    tree = DecisionTreeClassifier(max_depth=6, max_features=8)
    held = ShardedEstimator(tree, DATA, shards=4, seed=seed)
    gone: set[str] = set()
    for request in requests:
        new = {f"r{i}" for i in request} - gone
        if new:
            held.forget(without(DATA, gone | new), sorted(new))  # the deleted rows need not be there any more
            gone |= new
    again = ShardedEstimator(tree, DATA, shards=4, seed=seed)
    if gone:
        again.forget(DATA, sorted(gone))
    assert len(held) == 400 - len(gone)
    assert np.array_equal(held.predict_proba(X), again.predict_proba(X))


def test_a_shard_is_the_estimator_fitted_on_its_rows() -> None:
    held = ShardedEstimator(DecisionTreeClassifier(random_state=0), DATA, shards=3, seed=5)
    held.forget(DATA, ["r7", "r8"])
    place = deal(400, 3, 1, 5)[:, 0]
    each = []
    for shard in range(3):
        rows = np.flatnonzero((place == shard) & ~np.isin(np.arange(400), (7, 8)))
        each.append(DecisionTreeClassifier(random_state=0).fit(DATA.inputs[rows], DATA.targets[rows]).predict_proba(X))
    assert np.array_equal(held.predict_proba(X), np.mean(each, axis=0))


@pytest.mark.parametrize(
    "estimator",
    [
        RandomForestClassifier(20), SVC(), KNeighborsClassifier(), LogisticRegression(max_iter=100),
        make_pipeline(StandardScaler(), RandomForestClassifier(20)),
    ],
)  # fmt: skip
def test_any_classifier_learns_and_forgets(estimator) -> None:
    held = ShardedEstimator(estimator, DATA, shards=3)
    assert (held.predict(X[400:]) == Y[400:]).mean() > 0.75
    before = held.predict_proba(X)
    np.testing.assert_allclose(before.sum(axis=1), 1)
    threes = DATA.select(classes=["3"])
    cost = held.forget(DATA, [DATA.ids[i] for i in threes])
    assert cost.shards == (0, 1, 2)
    assert cost.rows == cost.total == 400 - len(threes)
    assert held.predict_proba(X)[:, 3].max() == 0
    assert (held.predict(X[400:])[Y[400:] != 3] == Y[400:][Y[400:] != 3]).mean() > 0.7


def test_only_the_shard_of_a_row_is_fitted_again() -> None:
    held = ShardedEstimator(DecisionTreeClassifier(), DATA, shards=8)
    models = list(held._models)
    cost = held.forget(DATA, ["r11"])
    assert len(cost.shards) == 1
    assert (cost.rows, cost.total) == (49, 399)
    assert [a is b for a, b in zip(models, held._models, strict=True)].count(False) == 1
    assert "r11" not in {name for shard in pickle.loads(pickle.dumps(held))._held for name in shard}


@pytest.mark.parametrize("estimator", [Ridge(), DecisionTreeRegressor(max_depth=3)])
def test_regressions_answer_with_the_mean(estimator) -> None:
    held = ShardedEstimator(estimator, NUMBERS, shards=2)
    place = deal(len(NUMBERS), 2, 1, 0)[:, 0]
    if isinstance(estimator, Ridge):
        each = [Ridge().fit(SUGAR[place == s], LEVEL[place == s]).predict(SUGAR) for s in range(2)]
        np.testing.assert_allclose(held.predict(SUGAR), np.mean(each, axis=0))
    before = held.predict(SUGAR)
    held.forget(NUMBERS, NUMBERS.ids[:100])
    assert np.abs(held.predict(SUGAR) - before).max() > 1e-3
    with pytest.raises(InputError, match="no probabilities"):
        held.predict_proba(SUGAR)


def test_what_cannot_be_deleted_changes_nothing() -> None:
    held = ShardedEstimator(DecisionTreeClassifier(), DATA, shards=2)
    before, rows = held.predict_proba(X), len(held)
    inputs = DATA.inputs.copy()
    inputs[50] += 1
    changed = table(inputs, DATA.targets, ids=DATA.ids, classes=DATA.classes)
    ones = {DATA.ids[i] for i in np.flatnonzero(DATA.targets != 1)}
    some = [f"r{i}" for i in range(20)]
    for data, ids, said in (
        (DATA, ["r400"], "No shard holds the row 'r400'"), (DATA, [], "Nothing says"), (changed, some, "'r50' of shard"),
        (without(DATA, ["r50"]), some, "'r50' of shard"), (DATA, sorted(ones), "rows of one class only"),
        (DATA, list(DATA.ids), "no row"), (NUMBERS, ["r1"], "another task"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            held.forget(data, ids)
    assert len(held) == rows
    assert np.array_equal(held.predict_proba(X), before)
    held.forget(DATA, ["r1"])
    with pytest.raises(InputError, match="No shard holds the row 'r1'"):
        held.forget(DATA, ["r1"])


@pytest.mark.parametrize(
    ("estimator", "data", "shards", "said"),
    [
        (Ridge(), DATA, 2, "Ridge is no estimator for classification"),
        (DecisionTreeClassifier(), NUMBERS, 2, "no estimator for regression"),
        (StandardScaler(), DATA, 2, "StandardScaler is no estimator"),
        (object(), DATA, 2, "object is no estimator"),
        (DecisionTreeClassifier(), DATA, 0, "at least one shard"),
        (DecisionTreeClassifier(), DATA, 401, "cannot be dealt"),
        (DecisionTreeClassifier(), DATA, 400, "one class only"),
    ],
)
def test_what_cannot_be_sharded_is_refused(estimator, data, shards, said) -> None:
    with pytest.raises(InputError, match=said):
        ShardedEstimator(estimator, data, shards=shards)
