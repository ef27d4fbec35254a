"""Pruning before unlearning: the smallest weights are 0 and stay 0, with any recipe."""

from __future__ import annotations

import pytest
import torch
from tests.digits import QUIET, accuracy
from torch import nn

from expunge.core.errors import InputError
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.parameters import Pruned
from expunge.methods.recipe import build

FIXED = {"name": "fixed", "lr": 2e-3, "steps": 100, "batch": 100, "warmup": 0, "decay": "constant", "weight_decay": 0}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def trained(digits, name: str, schedule=FIXED, **parts):
    adapter = digits.target()
    train(adapter, build(name, {"schedule": schedule, **parts}), digits.examples(adapter, name), QUIET)
    return adapter


def test_at_rate_zero_it_is_the_recipe_itself(digits) -> None:
    for name in ("finetune", "random-label"):
        pruned = trained(digits, name, parameters={"name": "pruned", "rate": 0.0})
        plain = weights(trained(digits, name).model)
        assert all(torch.equal(v, plain[k]) for k, v in weights(pruned.model).items())
    named = trained(digits, "prune-finetune", parameters={"rate": 0.0})
    assert all(torch.equal(v, weights(trained(digits, "finetune").model)[k]) for k, v in weights(named.model).items())


@pytest.mark.parametrize(
    ("name", "schedule", "more"),
    [
        ("prune-finetune", {**FIXED, "weight_decay": 0.1}, {}),
        ("prune-finetune", {**FIXED, "optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}, {}),
        ("random-label", FIXED, {"penalty": "l1"}),
        ("scrub", {"lr": 1e-3, "epochs": 2, "erase_epochs": 1}, {}),
    ],
)
def test_the_smallest_weights_are_zero_and_stay_so_whatever_the_recipe(digits, name, schedule, more) -> None:
    before = weights(digits.target().model)
    after = weights(trained(digits, name, schedule, parameters={"name": "pruned", "rate": 0.8}, **more).model)
    matrices = [k for k, v in before.items() if v.ndim == 2]
    sizes = torch.cat([before[k].abs().flatten() for k in matrices])
    limit = sizes.sort().values[round(0.8 * len(sizes)) - 1]
    for key in matrices:
        kept = before[key].abs() > limit
        assert (after[key][before[key].abs() < limit] == 0).all()  # of those at the limit, as many as the rate asks for
        assert (after[key][kept] != 0).all()
        assert (after[key][kept] != before[key][kept]).float().mean() > 0.5
    zeros = sum(int((after[k] == 0).sum()) for k in matrices)
    assert zeros == round(0.8 * len(sizes))


def test_among_equal_sizes_exactly_the_share_is_pruned() -> None:
    model = nn.Linear(10, 10)
    with torch.no_grad():
        model.weight.fill_(0.5)
    Pruned(rate=0.37).prepare(model, [])
    assert int((model.weight == 0).sum()) == 37


def test_the_retain_rows_win_back_what_pruning_costs(digits) -> None:
    adapter = digits.target()
    Pruned(rate=0.9).prepare(adapter.model, adapter.layers())
    forget, retain = digits.split()
    assert accuracy(adapter, retain) < 0.9
    after = trained(digits, "prune-finetune", {**FIXED, "steps": 200}, parameters={"rate": 0.9})
    assert accuracy(after, retain) > 0.95
    assert accuracy(after, digits.split(1)[1]) > 0.88
    assert accuracy(after, forget) < accuracy(trained(digits, "finetune", {**FIXED, "steps": 200}), forget)


def test_a_sparse_model_keeps_its_zeros(digits) -> None:
    adapter = digits.target()
    Pruned(rate=0.9).prepare(adapter.model, adapter.layers())
    sparse = weights(adapter.model)
    for rate in (0.5, 0.9):
        Pruned(rate=rate).prepare(adapter.model, adapter.layers())
        assert all(torch.equal(v, sparse[k]) for k, v in weights(adapter.model).items())
        masks = Pruned(rate=rate).entries(list(adapter.model.parameters()))
        assert [bool(m.all()) for m in masks] == [False, True, False, True]


def test_scopes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    Pruned(rate=0.5, scope="convolutions").prepare(model, [])
    assert int((model[0].weight == 0).sum()) == 18
    assert (model[2].weight != 0).all()
    with pytest.raises(InputError, match="no convolutions that could be pruned"):
        Pruned(scope="convolutions").prepare(nn.Linear(2, 2), [])


def test_a_killed_run_goes_on_with_the_same_mask(digits, tmp_path) -> None:
    class Killed(Exception):
        pass

    def kill(step: int, model: nn.Module) -> None:
        if step == 7:
            raise Killed

    recipe = build("prune-finetune", {"schedule": {**FIXED, "steps": 12}})
    engine = Engine(checkpoint_every=5)
    whole, part, again = (digits.target() for _ in range(3))
    train(whole, recipe, digits.examples(whole), engine, folder=tmp_path / "whole")
    with pytest.raises(Killed):
        train(part, recipe, digits.examples(part), engine, folder=tmp_path / "part", observe=kill)
    train(again, recipe, digits.examples(again), engine, folder=tmp_path / "part", resume=True)
    assert all(torch.equal(v, weights(again.model)[k]) for k, v in weights(whole.model).items())
