"""scikit-learn estimators as the models of a problem: trained, retrained without a class, unlearned and written to a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler

from expunge.data.rows import table
from expunge.pipeline.row_runs import RowsConfig, execute, plan
from expunge.pipeline.supervised import Supervised, member, target_of

X, Y = load_digits(return_X_y=True)
PROBLEM = Supervised(
    data=table(X[:500], Y[:500]),
    holdout=table(X[500:900], Y[500:900]),
    build=lambda: make_pipeline(MinMaxScaler(), LogisticRegression(max_iter=200)),
    fit=lambda model, data, seed: model.fit(data.inputs, data.targets),
)


def accuracy(model: torch.nn.Module, chosen: np.ndarray) -> float:
    with torch.no_grad():
        return float((model(torch.from_numpy(X[chosen])).argmax(1).numpy() == Y[chosen]).mean())


def test_an_estimator_is_trained_retrained_and_unlearned(tmp_path: Path) -> None:
    threes = np.flatnonzero(Y[:500] == 3)
    others = np.setdiff1d(np.arange(500), threes)
    target = target_of(PROBLEM)
    assert accuracy(target, threes) > 0.95
    twin = member(PROBLEM, PROBLEM.trained(threes, [1]), 0)
    assert accuracy(twin, threes) == 0
    assert accuracy(twin, others) > 0.95
    target.load_state_dict(twin.state_dict())  # one shape, though the twin has never seen the class
    config = RowsConfig(model="here.py:problem", classes=("3",), method="graddiff")
    execute(plan(config, PROBLEM), tmp_path / "run")
    unlearned = target_of(PROBLEM)
    unlearned.load_state_dict(load_file(tmp_path / "run" / "model" / "model.safetensors"))
    assert accuracy(unlearned, threes) < 0.6
    assert accuracy(unlearned, others) > 0.9
