"""Worst-case forget sets: the projection, a problem small enough to try every set, and digits of which some are mislabelled."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from expunge.adapters.supervised import ClassifierAdapter
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.data.rows import table
from expunge.data.spoiled import mislabel
from expunge.engine.loop import train
from expunge.engine.objective import mean_losses
from expunge.engine.worst_case import Selection, _unlearn, project, worst_case
from expunge.methods.recipe import build
from tests.digits import QUIET, TRAINING, encoded, network

FULL = {"batch": None, "epochs": 20, "lr": 1e-3, "step": 0.05, "outer": 5}


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=30), st.floats(0, 1), st.integers(0, 99))
def test_the_projection_is_the_nearest_point(values: list[float], share: float, seed: int) -> None:
    point, total = np.array(values), share * len(values)
    found = project(point, total)
    assert abs(found.sum() - total) < 1e-8 * len(values)
    assert found.min() >= 0
    assert found.max() <= 1
    other = np.random.default_rng(seed).random(len(values))  # any other point of the set lies on the far side
    other = other * total / other.sum() if total <= other.sum() else 1 - (1 - other) * (len(values) - total) / (1 - other).sum()
    assert (point - found) @ (other - found) <= 1e-6 * (1 + np.abs(point).max()) * len(values)


def test_a_total_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match="cannot sum"):
        project(np.zeros(3), 3.5)


@pytest.fixture(scope="module")
def small():
    """Nine rows of three classes, one of them far from its class, and a linear model that has learnt them."""
    rng = np.random.default_rng(3)
    centres = np.array([[2.0, 0], [-1, 2], [-1, -2]])
    x = np.concatenate([c + 0.6 * rng.normal(size=(3, 2)) for c in centres])
    x[4] = centres[0] + 0.3
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    data = table(x, np.repeat([0, 1, 2], 3))
    inputs, targets = torch.from_numpy(data.inputs), torch.from_numpy(data.targets)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    adapter = ClassifierAdapter(model, data.classes)
    return adapter, encoded(adapter, data.rows())


def left_out(adapter, examples, chosen, how) -> float:
    """Mean loss of a set after it was unlearnt by the lower level."""
    other = adapter.copy()
    weights = np.ones(len(examples))
    weights[list(chosen)] = 0
    _unlearn(other, examples, weights, how, 8192)
    return float(np.mean(mean_losses(other, other.model, [examples[i] for i in chosen], 8192)))


@pytest.mark.parametrize("goal", ["hardest", "easiest"])
def test_no_other_set_is_harder_or_easier(small, goal: str) -> None:
    adapter, examples = small
    how = Selection(**{**FULL, "lr": 0.01, "step": 0.3, "outer": 8}, goal=goal)
    before = {k: v.clone() for k, v in adapter.model.state_dict().items()}
    found = worst_case(adapter, examples, 2, how)
    assert all(torch.equal(before[k], v) for k, v in adapter.model.state_dict().items())
    each = {c: left_out(adapter, examples, c, how) for c in itertools.combinations(range(9), 2)}
    rank = sorted(each, key=each.get, reverse=goal == "easiest").index(tuple(found.examples.tolist()))
    assert rank <= 1, each  # of 36; the relaxation need not find the very first
    assert found.weights.sum() == pytest.approx(2)
    assert len(found.curve) == 8
    if goal == "easiest":
        assert 4 in found.examples


def test_the_lower_level_is_sign_descent_of_the_weighted_sum(small) -> None:
    adapter, examples = small
    weights = np.linspace(0, 1, 9)
    other = adapter.copy()
    _unlearn(other, examples, weights, Selection(batch=None, epochs=1, lr=0.01), 1)  # one row in a forward pass
    x = torch.from_numpy(np.stack([e.data[0] for e in examples]))
    y = torch.tensor([e.data[1] for e in examples])
    losses = nn.functional.cross_entropy(adapter.model(x), y, reduction="none")
    slopes = torch.autograd.grad((losses * torch.from_numpy(weights).float()).sum(), list(adapter.model.parameters()))
    for after, was, slope in zip(other.model.parameters(), adapter.model.parameters(), slopes, strict=True):
        torch.testing.assert_close(after, was - 0.01 * slope.sign())


def test_groups_are_chosen_as_a_whole(small) -> None:
    adapter, examples = small
    for goal, best in (("hardest", np.argmin), ("easiest", np.argmax)):
        how = Selection(**{**FULL, "lr": 0.01, "step": 0.3, "outer": 8}, goal=goal)
        found = worst_case(adapter, examples, 1, how, groups=[0, 0, 0, 1, 1, 1, 2, 2, 2])
        each = [left_out(adapter, examples, range(3 * g, 3 * g + 3), how) for g in range(3)]
        assert found.units.tolist() == [best(each)], each
        assert found.examples.tolist() == [3 * best(each) + i for i in range(3)]
        assert len(found.weights) == 3
    alone = worst_case(adapter, examples, 3, Selection(**FULL), groups=range(9))
    assert alone.examples.tolist() == worst_case(adapter, examples, 3, Selection(**FULL)).examples.tolist()


def test_bad_requests_are_refused(small) -> None:
    adapter, examples = small
    for count, groups, said in (
        (0, None, "cannot be chosen"), (9, None, "cannot be chosen"), (1, [0, 0, 2] * 3, "group 1 has no examples"),
        (1, [0, 1], "2 groups"), (1, [-1] * 9, "count from 0"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            worst_case(adapter, examples, count, Selection(), groups=groups)


def fitted(data, rows) -> ClassifierAdapter:
    adapter = ClassifierAdapter(network(), data.classes)
    train(adapter, build("finetune", {"schedule": TRAINING}), {Stream.RETAIN: encoded(adapter, data.rows(rows))}, QUIET)
    return adapter


def judged(data, chosen) -> tuple[float, float]:
    """Accuracy and mean loss on a set of the model that is trained without it."""
    adapter = fitted(data, np.setdiff1d(np.arange(len(data)), chosen))
    inputs, targets = torch.from_numpy(data.inputs[chosen]), torch.from_numpy(data.targets[chosen])
    with torch.no_grad():
        scores = adapter.model(inputs)
    return float((scores.argmax(1) == targets).float().mean()), float(nn.functional.cross_entropy(scores, targets))


def test_the_hardest_digits_are_those_that_retraining_answers_too(digits) -> None:
    made = mislabel(digits.tables[0], 100)
    data, wrong = made.table, set(made.rows.tolist())
    target = fitted(data, np.arange(len(data)))
    examples = encoded(target, data.rows())
    hardest = worst_case(target, examples, 100, Selection(**FULL)).examples
    easiest = worst_case(target, examples, 100, Selection(**FULL, goal="easiest")).examples
    drawn = np.random.default_rng(0).choice(1000, 100, replace=False)
    assert not wrong & set(hardest.tolist())
    assert len(wrong & set(easiest.tolist())) > 80
    worst, random, best = judged(data, hardest), judged(data, drawn), judged(data, easiest)
    assert worst[0] > 0.98
    assert worst[1] < 0.1
    assert 0.7 < random[0] < 0.93
    assert random[1] > 0.4
    assert best[0] < 0.15
    assert best[1] > 4
