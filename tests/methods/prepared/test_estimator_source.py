"""Shards of scikit-learn's estimators."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import Ridge, RidgeClassifier, SGDClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeRegressor
from tests.methods.prepared.small import accuracy, blobs, slope, without

from expunge.adapters.supervised import ClassifierAdapter, RegressionAdapter
from expunge.core.errors import InputError
from expunge.engine.record import Record
from expunge.methods.prepared.amnesiac import Amnesiac
from expunge.methods.prepared.deltagrad import DeltaGrad
from expunge.methods.prepared.estimator_source import EstimatorSource
from expunge.methods.prepared.s3t import S3T
from expunge.methods.prepared.sisa import SISA


def forest() -> BaseEstimator:
    return make_pipeline(StandardScaler(), RandomForestClassifier(20))


def descent() -> BaseEstimator:
    return SGDClassifier(loss="log_loss")


def tree() -> BaseEstimator:
    return DecisionTreeRegressor(max_depth=4)


def answers(method: SISA, given: EstimatorSource, folder: Path) -> torch.Tensor:
    return method.load(given, folder)(torch.from_numpy(given.table.inputs))


@pytest.mark.parametrize(("build", "slices"), [(forest, 1), (descent, 1), (descent, 3)])
def test_a_deletion_equals_training_without_the_rows(build, slices: int, tmp_path: Path) -> None:
    given, method = EstimatorSource(blobs(), build), SISA(shards=3, slices=slices)
    full = method.train(given, tmp_path / "run")
    assert accuracy(method.load(given, tmp_path / "run"), blobs(300, 9)) > 0.7
    before = answers(method, given, tmp_path / "run")
    gone = ["row4", "row5"]
    less = dataclasses.replace(given, table=without(blobs(), gone))
    report = method.delete(less, tmp_path / "run", gone)
    assert full.row_visits == {1: 60, 3: 3 * (7 + 14 + 20)}[slices]
    assert 0 < report.row_visits < 0.75 * report.full_row_visits
    method.train(given, tmp_path / "never", without=gone)
    after = answers(method, given, tmp_path / "run")
    assert torch.equal(after, answers(method, given, tmp_path / "never"))
    assert not torch.equal(after, before)


def test_numbers_and_an_adapter(tmp_path: Path) -> None:
    held = slope(200)
    given, method = EstimatorSource(held, tree), SISA(shards=2, slices=1)
    method.train(given, tmp_path / "run")
    adapter = RegressionAdapter(method.load(given, tmp_path / "run"), "mse")
    batch = adapter.collate([adapter.encode(r) for r in held.rows()])
    losses = adapter.forward(adapter.model, batch, frozenset({"losses"})).losses
    assert float(losses.mean()) < 0.5 * float(np.var(held.targets))

    given, method = EstimatorSource(blobs(), forest), SISA(shards=2, slices=1, aggregate="vote")
    method.train(given, tmp_path / "forest")
    adapter = ClassifierAdapter(method.load(given, tmp_path / "forest"), given.table.classes)
    batch = adapter.collate([adapter.encode(r) for r in given.table.rows()])
    assert bool(torch.isfinite(adapter.forward(adapter.model, batch, frozenset({"losses"})).losses).all())


def test_a_class_that_a_shard_has_not_seen_is_unlikely_there(tmp_path: Path) -> None:
    given, method = EstimatorSource(blobs(), forest), SISA(shards=2, slices=1)
    method.train(given, tmp_path / "run")
    plan = Record.open(tmp_path / "run").plan
    rare = [n for n, s, _ in plan["rows"] if s == 0 and given.table.targets[given.positions[n]] == 2]
    method.delete(given, tmp_path / "run", rare)
    model = method.load(given, tmp_path / "run")
    scores = model.member_scores(torch.from_numpy(given.table.inputs))
    assert scores.shape == (2, 60, 3)
    assert bool((scores[0, :, 2] < -20).all())
    assert bool((scores[1, :, 2] > -20).any())


def test_an_interrupted_training_goes_on(tmp_path: Path) -> None:
    given, method = EstimatorSource(blobs(), forest), SISA(shards=3, slices=1)

    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.train(given, tmp_path / "run", progress=stop)
    kept = (tmp_path / "run" / "shards" / "001" / "slice-001.safetensors").stat().st_mtime_ns
    method.train(given, tmp_path / "run")
    assert (tmp_path / "run" / "shards" / "001" / "slice-001.safetensors").stat().st_mtime_ns == kept
    method.train(given, tmp_path / "whole")
    assert torch.equal(answers(method, given, tmp_path / "run"), answers(method, given, tmp_path / "whole"))


def test_bad_input(tmp_path: Path) -> None:
    for build, method, said in (
        (forest, SISA(shards=2, slices=2), "no partial_fit"),
        (forest, S3T(shards=2, slices=2), "Choose sisa"),
        (forest, DeltaGrad(), "Choose sisa"),
        (forest, Amnesiac(), "Choose sisa"),
    ):
        with pytest.raises(InputError, match=said):
            method.train(EstimatorSource(blobs(), build), tmp_path / "bad")
    given, method = EstimatorSource(blobs(), RidgeClassifier), SISA(shards=2, slices=1)
    method.train(given, tmp_path / "run")
    with pytest.raises(InputError, match="gives no probabilities"):
        method.load(given, tmp_path / "run")
    with pytest.raises(InputError, match="another model"):
        method.load(EstimatorSource(blobs(), Ridge), shutil.copytree(tmp_path / "run", tmp_path / "copy"))
