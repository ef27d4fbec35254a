"""Runs of prepared methods: trained once, then asked for rows again and again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.tree import DecisionTreeClassifier

from expunge.core.errors import InputError
from expunge.pipeline import prepared_runs as runs

NETWORK = """
import expunge
from sklearn.datasets import load_digits
from sklearn.tree import DecisionTreeClassifier
from torch import nn

X, Y = load_digits(return_X_y=True)
DATA = expunge.table(X[:300] / 16, Y[:300], subjects=[f"p{i % 30}" for i in range(300)])
HOLDOUT = expunge.table(X[300:600] / 16, Y[300:600])


def network():
    return expunge.Supervised(
        data=DATA, holdout=HOLDOUT, build=lambda: nn.Linear(64, 10), training=expunge.Training(steps=60, batch=32, lr=0.01)
    )


def tree():
    return expunge.Supervised(
        data=DATA, holdout=HOLDOUT, build=lambda: DecisionTreeClassifier(max_depth=8),
        fit=lambda model, data, seed: model.fit(data.inputs, data.targets),
    )
"""


@pytest.fixture
def entry(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(NETWORK, encoding="utf-8")
    return str(tmp_path / "mine.py")


@pytest.mark.parametrize(
    ("problem", "method", "parts"),
    [
        ("network", "sisa", {"shards": 3, "slices": 2}),
        ("tree", "sisa", {"shards": 3, "slices": 1}),
        ("network", "certified-removal", {}),
        ("network", "amnesiac", {}),
    ],
)
def test_rows_go_person_by_person(entry: str, tmp_path: Path, problem: str, method: str, parts: dict[str, int]) -> None:
    made = runs.plan(runs.PreparedConfig(model=f"{entry}:{problem}", method=method, parts=parts))
    out = tmp_path / "run"
    run = runs.train(made, out)
    assert runs.is_prepared(out)
    assert run.manifest["stages"]["train"]["result"]["rows"] == 300
    x = torch.tensor(load_digits().data[:300] / 16, dtype=torch.float32)
    before = made.method.load(made.source, out / runs.STORE)(x)
    first = runs.delete(runs.plan_deletion(out, {"subjects": ("p3",)}))
    assert (len(first.ids), first.remaining) == (10, 290)
    second = runs.plan_deletion(out, {"subjects": ("p3", "p4"), "ids": None})
    assert len(second.ids) == 10, "those of the first request are gone"
    runs.delete(second)
    log = json.loads((out / runs.DELETIONS).read_text())
    assert [d["remaining"] for d in log] == [290, 280]
    assert not torch.equal(before, made.method.load(made.source, out / runs.STORE)(x))
    with pytest.raises(InputError, match="All rows of this choice were deleted already"):
        runs.plan_deletion(out, {"subjects": ("p3",)})


def test_what_a_method_cannot_train_is_said_before_any_work(entry: str) -> None:
    with pytest.raises(InputError, match="no partial_fit"):
        runs.plan(runs.PreparedConfig(model=f"{entry}:tree", method="sisa"))
    with pytest.raises(InputError, match="Choose sisa"):
        runs.plan(runs.PreparedConfig(model=f"{entry}:tree", method="deltagrad"))
    assert not hasattr(DecisionTreeClassifier(), "partial_fit")
