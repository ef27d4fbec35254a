"""The audit of a model of rows that the caller holds."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import expunge
from expunge.core.errors import InputError
from expunge.core.results import Verdict
from expunge.pipeline.supervised import member, target_of

QUICK = {"draws": 200, "metrics": ("accuracy",), "quantise": (), "relearn": None}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


@pytest.fixture(scope="module")
def problem() -> expunge.Supervised:
    held = load_digits()
    order = np.random.default_rng(3).permutation(len(held.target))
    x, y = (held.data / 16).astype(np.float32)[order], held.target[order]
    return expunge.Supervised(
        expunge.table(x[:500], y[:500]), network, expunge.Training(steps=300, batch=100, lr=1e-2),
        holdout=expunge.table(x[500:1100], y[500:1100]),
    )  # fmt: skip


def test_what_does_nothing_is_not_forgotten_and_what_never_saw_the_class_is_not_called_so(problem) -> None:
    target = target_of(problem)
    same = expunge.audit_rows(problem, copy.deepcopy(target), classes=["3"], retrain=3, **QUICK)
    assert same.models[-1].judgement.verdict == Verdict.NOT_FORGOTTEN
    assert [m.role for m in same.models] == ["target", *["retrained"] * 3, "unlearned"]
    assert same.not_shown[0].startswith("Of the class '3' no row is left")
    assert same.data["holdout"]["records"] + same.data["test"]["records"] == 600, "unseen rows are not halved again"
    fresh = member(problem, problem.trained(problem.data.select(classes=["3"]), [77]), 0)
    document = expunge.audit_rows(problem, fresh, classes=["3"], retrain=3, **QUICK)
    assert document.models[-1].numbers["forget.accuracy"].value == 0
    assert document.models[-1].judgement.verdict != Verdict.NOT_FORGOTTEN


def test_neither_model_is_changed(problem) -> None:
    target = target_of(problem)
    before = copy.deepcopy(target.state_dict())
    expunge.audit_rows(problem, target, ids=["1", "2", "3"], retrain=1, **{**QUICK, "relearn": {"steps": (1, 2)}})
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in before.items())


def test_bad_input(problem) -> None:
    target = target_of(problem)
    for more, says in (({"classes": ["12"]}, "no class '12'"), ({"ids": ["1"], "metric": ()}, "metric"), ({}, "which rows")):
        with pytest.raises(InputError, match=says):
            expunge.audit_rows(problem, target, **more)
    with pytest.raises(InputError, match="returns"):
        expunge.audit_rows(problem, nn.Linear(64, 9), classes=["3"])
