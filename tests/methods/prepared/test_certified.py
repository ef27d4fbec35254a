"""Certified removal: the step, its bound, its budget, and what it is equal to."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from tests.digits import QUIET, encoded
from tests.methods.prepared.small import accuracy, blobs, slope, without
from torch import nn

from expunge.adapters.supervised import ClassifierAdapter
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.data.rows import Table, table
from expunge.engine.prepared import Job
from expunge.engine.record import Record
from expunge.engine.source import Source
from expunge.methods.edits.curvature import Influence
from expunge.methods.prepared.certified import CertifiedRemoval
from expunge.methods.prepared.linear import Logistic, Squares, fit, gradient, hessian, step


def threes_and_eights() -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = load_digits(return_X_y=True)
    chosen = np.isin(targets, (3, 8))
    x = inputs[chosen] / np.linalg.norm(inputs[chosen], axis=1, keepdims=True)
    return x, np.where(targets[chosen] == 8, 1.0, -1.0)


def test_thirty_removals_stay_below_their_bound_and_near_retraining() -> None:
    x, y = threes_and_eights()
    ridge, loss, b = 1e-2, Logistic(), np.zeros(64)
    whole, _ = fit(loss, x, y, ridge, b)
    w, bound = whole, 0.0
    for k in range(30):
        made = step(loss, w, (x[k : k + 1], y[k : k + 1]), x[k + 1 :], ridge)
        w, bound = made.weights, bound + made.bound
        assert np.linalg.norm(gradient(loss, w, (x[k + 1 :], y[k + 1 :]), ridge, b)) <= bound
    residual = np.linalg.norm(gradient(loss, w, (x[30:], y[30:]), ridge, b))
    retrained, _ = fit(loss, x[30:], y[30:], ridge, b)
    assert 3e-4 < residual < 5e-3
    assert 0.05 < bound < 0.5
    before, after = np.linalg.norm(whole - retrained), np.linalg.norm(w - retrained)
    assert after < 1e-2 * before
    wrong = step(loss, whole, (x[:30], y[:30]), x[30:], ridge, add=True).weights
    assert np.linalg.norm(wrong - retrained) > before


def test_the_optimum_is_that_of_scikit_learn() -> None:
    x, y = threes_and_eights()
    ridge = 1e-2
    w, passes = fit(Logistic(), x, y, ridge, np.zeros(64))
    there = LogisticRegression(C=1 / (ridge * len(x)), fit_intercept=False, tol=1e-12, max_iter=1000).fit(x, y).coef_[0]
    np.testing.assert_allclose(w, there, atol=1e-6)
    assert 10 < passes < 200
    w, _ = fit(Squares(), x, y, ridge, np.zeros(64))
    np.testing.assert_allclose(w, Ridge(alpha=ridge * len(x), fit_intercept=False).fit(x, y).coef_, atol=1e-9)
    b = np.random.default_rng(0).normal(size=64)
    w, _ = fit(Logistic(), x, y, ridge, b)
    assert np.linalg.norm(gradient(Logistic(), w, (x, y), ridge, b)) < 1e-9


def test_adding_and_then_deleting_leaves_a_linear_model_where_it_was() -> None:
    x, y = threes_and_eights()
    kept, new = (x[20:], y[20:]), (x[:20], y[:20])
    start, _ = fit(Squares(), *kept, 1e-2, np.zeros(64))
    added = step(Squares(), start, new, x, 1e-2, add=True)
    np.testing.assert_allclose(added.weights, fit(Squares(), x, y, 1e-2, np.zeros(64))[0], atol=1e-10)
    back = step(Squares(), added.weights, new, kept[0], 1e-2)
    assert np.linalg.norm(added.weights - start) > 1e-3
    np.testing.assert_allclose(back.weights, start, atol=1e-11)
    assert back.bound == 0


class OneVector(nn.Module):
    """Logistic regression of two classes with one weight vector."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 1, bias=False).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.last(x)
        return torch.cat([torch.zeros_like(z), z], dim=1)


def test_the_influence_step_with_the_exact_hessian_is_certified_removal() -> None:
    x, y = threes_and_eights()
    ridge = 1e-2
    whole, _ = fit(Logistic(), x, y, ridge, np.zeros(64))
    made = step(Logistic(), whole, (x[:20], y[:20]), x[20:], ridge).weights
    adapter = ClassifierAdapter(OneVector(), ["3", "8"])
    with torch.no_grad():
        adapter.model.last.weight.copy_(torch.from_numpy(whole))
    held = table(x, (y > 0).astype(int), precision="float64")
    streams = {Stream.FORGET: encoded(adapter, held.rows(range(20))), Stream.RETAIN: encoded(adapter, held.rows(range(20, 357)))}
    edit = Influence(curvature="hessian", damping=ridge, tolerance=1e-13)
    moved = edit.weights(adapter, streams, QUIET, None)["last.weight"]
    assert np.linalg.norm(made - whole) > 1e-2
    np.testing.assert_allclose(moved.numpy()[0], made, rtol=1e-7, atol=1e-9)


def test_derivatives_are_those_of_the_objective() -> None:
    x, y = threes_and_eights()
    x, y, b = x[:30], y[:30], np.linspace(-1, 1, 64)
    w = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def objective(w: torch.Tensor) -> torch.Tensor:
        z = torch.from_numpy(x) @ w
        return nn.functional.softplus(-torch.from_numpy(y) * z).sum() + 0.1 * 30 / 2 * w @ w + torch.from_numpy(b) @ w

    point = w.detach().numpy()
    np.testing.assert_allclose(torch.autograd.grad(objective(w), w)[0], gradient(Logistic(), point, (x, y), 0.1, b), atol=1e-12)
    np.testing.assert_allclose(torch.autograd.functional.hessian(objective, w), hessian(Logistic(), point, x, 0.1), atol=1e-12)


def digits_source(n: int) -> Source:
    inputs, targets = load_digits(return_X_y=True)
    return Source(table(inputs[:n], targets[:n], ids=[f"d{i}" for i in range(n)]))


def test_a_budget_is_spent_and_then_the_model_is_trained_anew(tmp_path: Path) -> None:
    given, folder = digits_source(1797), tmp_path / "run"
    method = CertifiedRemoval(ridge=0.01, sigma=0.3)
    first = method.train(given, folder)
    assert first.row_visits > 1000
    assert accuracy(method.load(given, folder), given.table) > 0.8
    spent, noise = [], held(method, given, folder)["noise"]
    for k in range(20):
        report = method.delete(given, folder, [f"d{2 * k}", f"d{2 * k + 1}"])
        spent.append(method.spent(Job(given, Record.open(folder))))
        assert "Certified" in report.guarantee
        assert "(1, 0.0001)" in report.guarantee
        assert spent[-1] <= method.budget
        if report.redone == ("trained anew with new noise",):
            break
        assert report.share < 0.2
        assert torch.equal(held(method, given, folder)["noise"], noise)
        assert all(a < b for a, b in itertools.pairwise(spent))
    else:
        pytest.fail("the budget was never spent")
    assert k > 1
    assert spent[-1] < spent[-2]
    assert report.notes[0].startswith("The budget was spent")
    assert report.share == 1
    assert not torch.equal(held(method, given, folder)["noise"], noise)


def held(method: CertifiedRemoval, given: Source, folder: Path) -> dict[str, torch.Tensor]:
    return method._held(Job(given, Record.open(folder)))


def test_what_is_removed_is_gone_from_every_class(tmp_path: Path) -> None:
    given, folder = digits_source(300), tmp_path / "run"
    method = CertifiedRemoval(sigma=5.0, epsilon=100.0)
    method.train(given, folder)
    before = method.load(given, folder).weight.detach().numpy()
    gone = [f"d{i}" for i in range(10)]
    method.delete(given, folder, gone)
    after, state = method.load(given, folder).weight.detach().numpy(), held(method, given, folder)
    x, labels = method._rows(given, [f"d{i}" for i in range(10, 300)])
    for k, y in enumerate(method._targets(given, labels)):
        retrained, _ = fit(Logistic(), x, y, method.ridge, state["noise"][k].numpy())
        assert np.linalg.norm(after[k] - retrained) < 0.05 * np.linalg.norm(before[k] - retrained)
        residual = np.linalg.norm(gradient(Logistic(), after[k], (x, y), method.ridge, state["noise"][k].numpy()))
        assert residual <= float(state["bound"][k])


def test_numbers_are_removed_exactly(tmp_path: Path) -> None:
    given, folder = Source(slope()), tmp_path / "run"
    method = CertifiedRemoval(unit=False)
    method.train(given, folder)
    for name in ("3", "17", "4"):
        report = method.delete(given, folder, [name])
    assert "Exact" in report.guarantee
    kept = without(given.table, ["3", "17", "4"])
    x = np.c_[kept.inputs.astype(float), np.ones(37)]
    there = Ridge(alpha=method.ridge * 37, fit_intercept=False).fit(x, kept.targets.astype(float)).coef_
    np.testing.assert_allclose(method.load(given, folder).weight.detach()[0], there, atol=1e-9)


def test_scores_fit_the_classes(tmp_path: Path) -> None:
    x, y = threes_and_eights()
    given = Source(table(x, (y > 0).astype(int)))
    method = CertifiedRemoval(sigma=0.5)
    method.train(given, tmp_path / "run")
    model = method.load(given, tmp_path / "run")
    assert accuracy(model, given.table) > 0.9
    assert model(torch.from_numpy(given.table.inputs)).shape == (357, 2)
    assert "Not certified" in report_of(CertifiedRemoval(sigma=0), given, tmp_path / "none")


def report_of(method: CertifiedRemoval, given: Source, folder: Path) -> str:
    method.train(given, folder)
    return method.delete(given, folder, ["0"]).guarantee


def test_bad_input(tmp_path: Path) -> None:
    given = Source(blobs())
    with pytest.raises(InputError, match="rows of length 1"):
        CertifiedRemoval(unit=False).train(given, tmp_path / "long")
    method = CertifiedRemoval()
    method.train(given, tmp_path / "run")
    with pytest.raises(InputError, match="'row3' was trained on and is not in the data"):
        method.delete(Source(without(blobs(), ["row3"])), tmp_path / "run", ["row3"])
    other: Table = dataclasses.replace(blobs(), inputs=blobs().inputs + 1)
    with pytest.raises(InputError, match="not trained on these rows"):
        method.delete(Source(other), tmp_path / "run", ["row3"])
    tokens = table(np.arange(12).reshape(4, 3), [0, 1, 0, 1])
    with pytest.raises(InputError, match="not token ids"):
        method.train(Source(tokens), tmp_path / "tokens")
    (tmp_path / "run" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="is missing"):
        method.load(given, tmp_path / "run")
