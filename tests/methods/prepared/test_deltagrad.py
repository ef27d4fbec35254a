"""DeltaGrad: the repeated run is near retraining, and equals it where nothing is approximated."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests.methods.prepared.small import blobs, perceptron, without
from torch import nn

from expunge.core.errors import InputError
from expunge.engine.ensemble import train_ensemble
from expunge.engine.members import Members, Spec, Training
from expunge.engine.record import Record
from expunge.engine.source import Source
from expunge.methods.prepared.deltagrad import DeltaGrad
from expunge.methods.prepared.quasi_newton import Curvature

TRAINING = Training(steps=150, batch=200, lr=0.3, optimizer="sgd", weight_decay=0.01)
GONE = [f"row{i}" for i in range(6)]


def logistic() -> nn.Module:
    return nn.Linear(4, 3)


def source(build=logistic, training: Training = TRAINING) -> Source:
    return Source(blobs(200), build, training)


def vector(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def run(method: DeltaGrad, folder: Path, given: Source, *requests: list[str], **options) -> torch.Tensor:
    method.train(given, folder, **options)
    for ids in requests:
        method.delete(given, folder, ids)
    return vector(method.load(given, folder))


def test_the_recorded_run_is_plain_gradient_descent(tmp_path: Path) -> None:
    for batch in (200, 32):
        given = source(training=TRAINING.model_copy(update={"batch": batch}))
        held = given.table
        spec = Spec(logistic, torch.from_numpy(held.inputs), torch.from_numpy(held.targets), given.training)
        there = train_ensemble(spec, Members(torch.ones(1, 200), [0])).member(0)
        found = run(DeltaGrad(), tmp_path / str(batch), given)
        torch.testing.assert_close(found, torch.cat([there[n].double().flatten() for n in ("weight", "bias")]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("batch", "period"), [(200, 10), (100, 5)])
def test_a_deletion_comes_near_retraining_and_at_period_one_is_it(tmp_path: Path, batch: int, period: int) -> None:
    given = source(training=TRAINING.model_copy(update={"batch": batch}))
    original = run(DeltaGrad(), tmp_path / "whole", given)
    retrained = run(DeltaGrad(), tmp_path / "never", given, without=GONE)
    exact = run(DeltaGrad(period=1), tmp_path / "exact", given, GONE)
    torch.testing.assert_close(exact, retrained, atol=2e-6, rtol=0)
    near = run(DeltaGrad(period=period), tmp_path / "near", given, GONE)
    moved = (original - retrained).norm()
    assert moved > 0.02
    assert (near - retrained).norm() < 0.1 * moved
    again = run(DeltaGrad(period=period), tmp_path / "again", given, GONE[:3], GONE[3:])
    assert (again - retrained).norm() < 0.1 * moved, "a second deletion starts from the first one's run"


def test_a_deletion_reads_few_rows_and_needs_no_record_of_the_old_run(tmp_path: Path) -> None:
    given, method, folder = source(), DeltaGrad(period=10), tmp_path / "run"
    method.train(given, folder)
    report = method.delete(given, folder, GONE)
    exact = len({t for t in range(150) if t < 15 or t % 10 == 0})
    assert report.redone == (f"{exact} of 150 gradients computed, the others corrected",)
    assert report.row_visits == exact * 200 + (150 - exact) * 6
    assert report.full_row_visits == 150 * 194
    assert [p.name for p in sorted(folder.glob("run-*"))] == ["run-00002"]


def test_a_network_without_curvature_to_trust_still_runs(tmp_path: Path) -> None:
    given = source(build=perceptron)
    retrained = run(DeltaGrad(), tmp_path / "never", given, without=GONE)
    original = run(DeltaGrad(), tmp_path / "whole", given)
    near = run(DeltaGrad(period=2), tmp_path / "near", given, GONE)
    assert (near - retrained).norm() < 0.5 * (original - retrained).norm()


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    given, method = source(), DeltaGrad()

    def stop(done: int, total: int, what: str) -> None:
        if done == 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.train(given, tmp_path / "run", progress=stop)
    method.train(given, tmp_path / "run")
    method.train(given, tmp_path / "whole")
    whole = Path(shutil.copytree(tmp_path / "whole", tmp_path / "copy"))
    method.delete(given, whole, GONE)
    with pytest.raises(KeyboardInterrupt):
        method.delete(given, tmp_path / "run", GONE, progress=stop)
    method.delete(given, tmp_path / "run", GONE)
    assert torch.equal(vector(method.load(given, tmp_path / "run")), vector(method.load(given, whole)))
    assert Record.open(tmp_path / "run").pending is None


def test_the_curvature_of_two_pairs_is_that_of_the_textbook() -> None:
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(6, 6, dtype=torch.float64, generator=draw)
    hessian = a @ a.T + torch.eye(6, dtype=torch.float64)
    held, full = Curvature(2), None
    steps = torch.randn(3, 6, dtype=torch.float64, generator=draw)
    for s in steps:
        assert held.add(s, hessian @ s)
    pairs = [(s, hessian @ s) for s in steps[1:]]
    full = (pairs[-1][0] @ pairs[-1][1]) / (pairs[-1][0] @ pairs[-1][0]) * torch.eye(6, dtype=torch.float64)
    for s, y in pairs:
        full = full - torch.outer(full @ s, full @ s) / (s @ full @ s) + torch.outer(y, y) / (y @ s)
    v = torch.randn(6, dtype=torch.float64, generator=draw)
    torch.testing.assert_close(held.times(v), full @ v)
    torch.testing.assert_close(held.times(steps[-1]), hessian @ steps[-1])
    assert not held.add(v, -v)
    assert len(held) == 2


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="plain gradient descent"):
        DeltaGrad().train(source(training=Training(steps=5, batch=8, lr=0.1)), tmp_path / "adam")
    with pytest.raises(InputError, match="on disk"):
        DeltaGrad(room=1e-9).train(source(), tmp_path / "large")
    method, given = DeltaGrad(), source()
    method.train(given, tmp_path / "run")
    with pytest.raises(InputError, match="not in the data"):
        method.delete(Source(without(given.table, GONE), logistic, TRAINING), tmp_path / "run", GONE)
    (tmp_path / "run" / "run-00001" / "00001.safetensors").unlink()
    with pytest.raises(InputError, match="is missing"):
        method.delete(given, tmp_path / "run", GONE)
