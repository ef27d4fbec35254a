"""Rows forgotten by a classifier or regressor that the caller holds: five lines of Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import expunge
from expunge.core.errors import InputError
from tests.digits import accuracy


def test_a_class_is_forgotten(digits) -> None:
    adapter = digits.target()
    data, unseen = digits.tables
    seen: list[int] = []
    done = expunge.unlearn_rows(
        adapter.model, data, classes=["3"], holdout=unseen, method="scrub", progress=lambda done, total, text: seen.append(done)
    )
    assert done.model is adapter.model
    assert done.notes == ["Of the class '3' no row is left: it is forgotten as a whole."]
    assert seen
    (forget, retain), (unseen_forget, unseen_retain) = digits.split(), digits.split(1)
    assert max(accuracy(adapter, forget), accuracy(adapter, unseen_forget)) < 0.5
    assert min(accuracy(adapter, retain), accuracy(adapter, unseen_retain)) > 0.88


@pytest.mark.parametrize(("method", "more"), [("npo", {}), ("ssd", {"alpha": 10}), ("salun", {"parameters__density": 0.3})])
def test_methods_of_every_kind(digits, method, more) -> None:
    adapter = digits.target()
    done = expunge.unlearn_rows(adapter.model, digits.tables[0], classes=["3"], holdout=digits.tables[1], method=method, **more)
    assert done.reached, done.sentence
    assert accuracy(adapter, digits.split()[0]) < 0.5
    assert accuracy(adapter, digits.split()[1]) > 0.9


def test_unseen_rows_say_when_to_stop() -> None:
    """Rows with wrong labels, learnt by heart: they come to look like rows that were never seen, and no worse."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(900, 20)).astype(np.float32)
    labels = (inputs[:, 0] > 0).astype(int)
    spoilt = rng.permutation(600)[:40]
    taught = labels.copy()
    taught[spoilt] = 1 - taught[spoilt]
    data = expunge.table(inputs[:600], taught[:600], columns={"spoilt": np.isin(np.arange(600), spoilt)})
    unseen = expunge.table(inputs[600:], labels[600:])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    x, y = torch.from_numpy(data.inputs), torch.from_numpy(data.targets)
    for _ in range(400):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    wrong = torch.from_numpy(spoilt)
    with torch.no_grad():
        assert (model(x).argmax(1) == y).float().mean() == 1
        goal = nn.functional.cross_entropy(model(torch.from_numpy(unseen.inputs)), torch.from_numpy(unseen.targets)).item()
    done = expunge.unlearn_rows(model, data, where="spoilt", holdout=unseen, method="npo")
    assert done.reached, done.sentence
    assert done.notes == []
    with torch.no_grad():
        assert (model(x)[wrong].argmax(1) == y[wrong]).float().mean() < 0.7
        kept = torch.from_numpy(np.setdiff1d(np.arange(600), spoilt))
        assert (model(x)[kept].argmax(1) == y[kept]).float().mean() > 0.95
    assert done.forget_loss == pytest.approx(goal, rel=0.8)  # the goal is estimated on 128 of the unseen rows


def test_a_regressor_forgets_a_subject() -> None:
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(200, 4)).astype(np.float32)
    inputs[:20, 0] += 4  # the subject lies apart
    targets = inputs.sum(1) + np.where(np.arange(200) < 20, 4.0, 0.0)
    data = expunge.table(inputs, targets, task="regression", subjects=["p" if i < 20 else f"q{i}" for i in range(200)])
    unseen = expunge.table(inputs[:20] + 0.1, inputs[:20].sum(1) + 2, task="regression")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, y = torch.from_numpy(data.inputs), torch.from_numpy(data.targets)
    for _ in range(1500):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x)[:, 0], y).backward()
        optimizer.step()
    with torch.no_grad():
        before = (model(x)[:, 0] - y).abs()
    assert before.max() < 0.5, "the regressor has not learnt its rows"
    done = expunge.unlearn_rows(model, data, subjects=["p"], holdout=unseen, method="graddiff")
    with torch.no_grad():
        after = (model(x)[:, 0] - y).abs()
    assert after[:20].mean() > before[:20].mean() + 0.5, done.sentence
    assert after[20:].mean() < before[20:].mean() + 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["11"]}, "no class '11'"),
        ({"ids": ["train0", "nobody"]}, "no row id 'nobody'"),
        ({"where": "target != '99'"}, "Every row is chosen"),
        ({"where": "target == '99'"}, "No row is chosen"),
        ({}, "Nothing says which rows"),
        ({"classes": ["3"], "method": "idkdpo"}, "needs text"),
        ({"classes": ["3"], "method": "nppo"}, "nppo"),
        ({"classes": ["3"], "holdout": None}, "never seen"),
        ({"classes": ["3"], "betta": 1}, "betta"),
        ({"classes": ["3"], "method": "ssd", "alhpa": 1}, "alhpa"),
        ({"classes": ["3"], "alternatives": "refusals", "method": "random-label"}, "does not fit"),
        ({"classes": [str(i) for i in range(8)]}, "rows to forget and"),
        ({"classes": ["3"], "layers": ["5"]}, "no module '5'"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_changes(digits, change, message) -> None:
    adapter = digits.target()
    before = {k: v.clone() for k, v in adapter.model.state_dict().items()}
    data, unseen = digits.tables
    with pytest.raises(InputError) as caught:
        expunge.unlearn_rows(adapter.model, data, **{"holdout": unseen, **change})
    assert message in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in adapter.model.state_dict().items())


def test_equal_rows_on_both_sides_are_counted(digits) -> None:
    data = digits.tables[0]
    doubled = expunge.table(
        np.concatenate([data.inputs, data.inputs[:5]]), np.concatenate([data.targets, data.targets[:5]]), classes=data.classes
    )
    model = digits.target().model
    chosen = {"ids": ["0", "1", "700"], "holdout": digits.tables[1], "schedule": {"name": "fixed", "lr": 1e-4, "steps": 1}}
    with pytest.raises(InputError, match="2 of the 3 rows to forget equal"):
        expunge.unlearn_rows(model, doubled, **chosen)
    assert expunge.unlearn_rows(model, doubled, allow_overlap=True, **chosen).notes[0].startswith("2 of the 3 rows")


def test_a_model_that_does_not_match_its_labels_is_refused(digits) -> None:
    data, unseen = digits.tables
    with pytest.raises(InputError, match="10 classes"):
        expunge.unlearn_rows(nn.Sequential(nn.Linear(64, 7)), data, classes=["3"], holdout=unseen)
    numbers = expunge.table(data.inputs, data.targets, task="regression")
    with pytest.raises(InputError, match="one number for each row"):
        expunge.unlearn_rows(nn.Sequential(nn.Linear(64, 7)), numbers, ids=["3"])
    other = expunge.table(unseen.inputs, unseen.targets, classes=[f"digit {i}" for i in range(10)])
    with pytest.raises(InputError, match="other classes"):
        expunge.unlearn_rows(digits.target().model, data, classes=["3"], holdout=other)
