"""Unlearning of regressors: Blindspot against its formula and its published order, the proxy, drawn targets, weights by count."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import conv2d, normalize

from expunge.adapters.supervised import ClassifierAdapter, RegressionAdapter
from expunge.audit.kernel.regression import wasserstein
from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.data.rows import Table, table
from expunge.engine.balance import ByCount
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.preparation import run_preparation
from expunge.engine.reference import IncompetentReference
from expunge.methods.catalogue import serves
from expunge.methods.preparations.numbers import NormalTargets
from expunge.methods.preparations.proxy import Proxy
from expunge.methods.recipe import build

QUIET = Engine(checkpoint_every=0)
LEARN = {"name": "fixed", "lr": 1e-3, "epochs": 60, "batch": 64, "warmup": 0, "decay": "cosine", "weight_decay": 0, "clip": None}
STEADY = {"name": "fixed", "lr": 1e-3, "warmup": 0, "decay": "constant", "weight_decay": 0, "clip": None}
MIXED = {**STEADY, "steps": 60, "batch": 77, "retain_batch": 179}  # the shares of both sides, as in batches of all data


def fresh(seed: int) -> RegressionAdapter:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    return RegressionAdapter(model, layers=["1", "3", "4"])


def sample(rows: int, seed: int) -> Table:
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    x = rng.normal(size=(rows, 10))
    a, b = fixed.normal(size=10) / 3, fixed.normal(size=10) / 3
    y = 2 * np.sin(x @ a) + (x @ b) ** 2 / 2 + x[:, 0] * x[:, 1] + x @ a + rng.normal(size=rows) / 2
    return table(x, y, task="regression", ids=[f"{seed}-{i}" for i in range(rows)])


def encoded(adapter, held: Table, indices=None) -> list:
    return [adapter.encode(r) for r in held.rows(indices)]


@dataclass
class Band:
    """2,000 rows to train on and 1,000 unseen; those with the lowest 30 % of targets are to be forgotten."""

    folder: object

    @cached_property
    def tables(self) -> tuple[Table, Table]:
        return sample(2000, 0), sample(1000, 1)

    def split(self, which: int = 0) -> tuple[np.ndarray, np.ndarray]:
        below = np.quantile(self.tables[0].targets, 0.3)
        low = self.tables[which].targets < below
        return np.flatnonzero(low), np.flatnonzero(~low)

    def learnt(self, name: str, seed: int, indices) -> RegressionAdapter:
        adapter, path = fresh(seed), self.folder / f"band-{name}"
        with FileLock(str(self.folder / f"band-{name}.lock")):
            if not path.is_dir():
                train(
                    adapter,
                    build("finetune", {"schedule": LEARN}),
                    {Stream.RETAIN: encoded(adapter, self.tables[0], indices)},
                    QUIET,
                )
                adapter.save(path)
        adapter.model.load_state_dict(load_file(path / "model.safetensors"))
        return adapter

    def target(self) -> RegressionAdapter:
        return self.learnt("target", 0, range(2000))

    def retrained(self) -> RegressionAdapter:
        return self.learnt("retrained", 1, self.split()[1])

    def examples(self, adapter) -> dict[Stream, list]:
        forget, retain = (encoded(adapter, self.tables[0], i) for i in self.split())
        return {Stream.FORGET: forget, Stream.RETAIN: retain}

    def predictions(self, adapter, which: int, indices) -> np.ndarray:
        with torch.no_grad():
            return adapter.model(torch.from_numpy(self.tables[which].inputs[indices]))[:, 0].numpy()

    def measured(self, adapter) -> tuple[float, float, float]:
        """Unseen error on retain and forget rows, and the distance of the predictions on the forget set to the retrained's."""
        errors = [np.abs(self.predictions(adapter, 1, i) - self.tables[1].targets[i]).mean() for i in self.split(1)]
        forget = self.split()[0]
        distance = wasserstein(self.predictions(adapter, 0, forget), self.predictions(self.retrained(), 0, forget))
        return float(errors[1]), float(errors[0]), distance


@pytest.fixture(scope="module")
def band(trained_models) -> Band:
    """Checked: retraining makes the band harder to predict, and nothing else."""
    held = Band(trained_models)
    (kept, known, far), (again, unknown, _) = held.measured(held.target()), held.measured(held.retrained())
    assert unknown > 1.5 * known
    assert again < 1.1 * kept
    assert far > 0.5
    return held


def test_blindspot_is_nearer_to_retraining_than_tuning_and_random_targets(band) -> None:
    kept, _, _ = band.measured(band.target())
    _, gold, _ = band.measured(band.retrained())
    found = {}
    for name, more in (
        ("finetune", {"batch": 256, "retain_batch": None}), ("gaussian-amnesiac", {}), ("blindspot", {}),
    ):  # fmt: skip
        adapter = band.target()
        train(adapter, build(name, {"schedule": {**MIXED, **more}}), band.examples(adapter), QUIET)
        found[name] = band.measured(adapter)
    error = {n: abs(f - gold) for n, (_, f, _) in found.items()}
    distance = {n: w for n, (_, _, w) in found.items()}
    assert error["blindspot"] < 0.6 * min(error["finetune"], error["gaussian-amnesiac"]), found
    assert distance["blindspot"] < 0.5 * min(distance["finetune"], distance["gaussian-amnesiac"]), found
    assert found["blindspot"][0] < 1.15 * kept
    assert found["gaussian-amnesiac"][1] > 1.3 * gold  # overshoots
    assert found["gaussian-amnesiac"][0] < 1.25 * kept


def test_a_step_of_blindspot_is_the_formula_on_a_mixed_batch() -> None:
    held, adapter = sample(20, 3), fresh(0)
    streams = {Stream.FORGET: encoded(adapter, held, range(5)), Stream.RETAIN: encoded(adapter, held, range(5, 20))}
    proxy = Proxy(epochs=1, batch=5, lr=0.01)
    prepared = run_preparation(proxy, adapter, streams, QUIET, scratch=None)
    other = prepared.sources[Of.INCOMPETENT].adapter.model
    model = adapter.copy().model
    x, y = torch.from_numpy(held.inputs), torch.from_numpy(held.targets)
    ours, theirs = (model[:2](x[:5]), other[:2](x[:5]))
    deeper = (model[2:4](ours), other[2:4](theirs))
    maps = sum((normalize(a.square(), dim=1) - normalize(b.square(), dim=1)).square().mean() for a, b in ((ours, theirs), deeper))
    forget = (model[4](deeper[0]) - other[4](deeper[1])).abs().mean() + 50 * maps
    retain = (model(x[5:])[:, 0] - y[5:]).abs().mean()
    loss = 0.25 * forget + 0.75 * retain
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    wanted = [p.detach() - 0.1 * g for p, g in zip(model.parameters(), gradients, strict=True)]
    schedule = {**MIXED, "optimizer": "sgd", "momentum": 0, "lr": 0.1, "steps": 1, "batch": 5, "retain_batch": 15}
    recipe = build("blindspot", {"schedule": schedule}).model_copy(update={"preparation": proxy})
    outcome = train(adapter, recipe, streams, QUIET)
    assert outcome.history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for parameter, value in zip(adapter.model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-4, atol=1e-6)


def test_a_proxy_learns_the_retain_set_alone_and_leaves_the_target(band) -> None:
    adapter = band.target()
    before = {k: v.clone() for k, v in adapter.model.state_dict().items()}
    streams = band.examples(adapter)
    device = torch.device("cpu")

    def made(epochs: float, forget) -> nn.Module:
        part = Proxy(epochs=epochs, lr=1e-3, batch=64)
        found = run_preparation(part, adapter, {**streams, Stream.FORGET: forget}, QUIET, scratch=None)
        return found.sources[Of.INCOMPETENT].adapter.model

    random = IncompetentReference(adapter, device, QUIET.seed).adapter.model
    assert all(torch.equal(a, b) for a, b in zip(made(0, streams[Stream.FORGET]).parameters(), random.parameters(), strict=True))
    once, again = made(2, streams[Stream.FORGET]), made(2, streams[Stream.FORGET][:3])
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), again.parameters(), strict=True))
    assert not any(p.requires_grad for p in once.parameters())
    kept = torch.from_numpy(band.tables[0].inputs[band.split()[1]])
    targets = torch.from_numpy(band.tables[0].targets[band.split()[1]])
    errors = [float((m(kept)[:, 0] - targets).abs().mean().detach()) for m in (random, once, made(6, streams[Stream.FORGET]))]
    assert errors[0] > errors[1] + 0.1 > errors[2] + 0.2
    assert all(torch.equal(v, before[k]) for k, v in adapter.model.state_dict().items())
    assert all(p.requires_grad for p in adapter.model.parameters())


def test_drawn_targets_have_the_spread_of_all_and_belong_to_the_row(band) -> None:
    adapter = band.target()
    streams = band.examples(adapter)
    prepared = run_preparation(NormalTargets(), adapter, streams, QUIET, scratch=None)
    drawn = prepared.examples[Stream.ALTERNATIVE]
    numbers = adapter.collate(drawn).targets.numpy()
    y = band.tables[0].targets
    assert numbers.mean() == pytest.approx(y.mean(), abs=4 * y.std() / np.sqrt(600))
    assert numbers.std() == pytest.approx(y.std(), rel=0.1)
    own = adapter.collate(streams[Stream.FORGET]).targets.numpy()
    assert abs(np.corrcoef(numbers, own)[0, 1]) < 0.15
    assert np.array_equal(drawn[7].data[0], streams[Stream.FORGET][7].data[0])
    assert prepared.examples[Stream.RETAIN] is streams[Stream.RETAIN]
    assert "600 forget rows" in prepared.notes[0]
    turned = {**streams, Stream.FORGET: streams[Stream.FORGET][::-1]}
    again = run_preparation(NormalTargets(), adapter, turned, QUIET, scratch=None).examples[Stream.ALTERNATIVE]
    assert adapter.collate(again).targets.numpy()[::-1] == pytest.approx(numbers)
    other = run_preparation(NormalTargets(), adapter, streams, QUIET.model_copy(update={"seed": 1}), scratch=None)
    assert np.abs(adapter.collate(other.examples[Stream.ALTERNATIVE]).targets.numpy() - numbers).min() > 0


def test_maps_are_squares_averaged_over_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(48, 2))
    adapter = ClassifierAdapter(model, ["a", "b"], layers=["0", "2"])
    held = table(np.random.default_rng(0).normal(size=(4, 1, 6, 6)), [0, 1, 0, 1])
    batch = adapter.collate(encoded(adapter, held))
    found = adapter.forward(model, batch, frozenset({"maps:0", "maps:2", "features:0"}))
    states = conv2d(torch.from_numpy(held.inputs), model[0].weight, model[0].bias)
    torch.testing.assert_close(found.maps("0"), states.square().mean(1).flatten(1))
    torch.testing.assert_close(found.features("0"), states.flatten(1))
    torch.testing.assert_close(found.maps("2"), states.flatten(1).square())
    torch.testing.assert_close(found.narrow(1, 3).maps("0"), found.maps("0")[1:3])


def test_they_are_for_numbers_and_named_by_the_table() -> None:
    for name in ("blindspot", "gaussian-amnesiac"):
        assert serves(name, RegressionAdapter.offers)[0]
        assert not serves(name, ClassifierAdapter.offers)[0]
    assert ByCount().coefficients({}, 0.2) == (0.2, 0.8)
    one = build("gaussian-amnesiac", {"schedule": {"name": "fixed", "lr": 0.1}})
    assert one.balance == ByCount()
    with pytest.raises(InputError, match="no term"):
        build("finetune", {"preparation": "normal-targets"})
    assert build("blindspot", {"schedule": "paper"}).preparation == Proxy(epochs=2, lr=0.01, batch=256)
