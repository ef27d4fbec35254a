"""Datamodels: exact where outputs are linear in the rows, and better than doing nothing on networks; matching them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from expunge.adapters.supervised import ClassifierAdapter
from expunge.audit.kernel.klom import klom
from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.data.rows import table
from expunge.engine.datamodel import Datamodel, coefficients, fit_datamodel
from expunge.engine.ensemble import margins, train_ensemble
from expunge.engine.functional import class_loss
from expunge.engine.loop import train
from expunge.engine.members import Members, Spec, Training
from expunge.engine.options import Engine
from expunge.methods.recipe import build

ROWS, FORGOTTEN, MODELS = 300, 10, 256
TRAINING = Training(steps=150, batch=100, lr=5e-3)


@given(seed=st.integers(0, 1000), rows=st.sets(st.integers(0, 4), min_size=1))
@settings(max_examples=30, deadline=None)
def test_effects_are_exact_where_outputs_are_linear_in_the_rows(seed: int, rows: set[int]) -> None:
    every = torch.tensor(list(itertools.product([False, True], repeat=5)))
    g = torch.Generator().manual_seed(seed)
    base, beta = torch.randn(3, generator=g, dtype=torch.float64), torch.randn(5, 3, generator=g, dtype=torch.float64)
    outputs = base + every.double() @ beta
    found = coefficients(every, sorted(rows)) @ outputs
    torch.testing.assert_close(found, beta[sorted(rows)].sum(0))
    assert abs(float(coefficients(every, sorted(rows)).sum())) < 1e-12  # whatever all models say cancels


def test_it_is_the_sum_of_the_differences_of_means() -> None:
    g = torch.Generator().manual_seed(0)
    members, outputs = torch.rand(40, 8, generator=g) < 0.5, torch.randn(40, 6, generator=g, dtype=torch.float64)
    by_hand = sum(outputs[members[:, i]].mean(0) - outputs[~members[:, i]].mean(0) for i in (1, 4, 5))
    torch.testing.assert_close(coefficients(members, [1, 4, 5]) @ outputs, by_hand)


def test_what_cannot_be_estimated_is_refused() -> None:
    members = torch.tensor([[True, True], [True, False]])
    with pytest.raises(InputError, match="in none of the models, or in all"):
        coefficients(members, [0])
    with pytest.raises(InputError, match="no rows"):
        coefficients(members, [])
    spec = Spec(network, torch.zeros(4, 64), torch.zeros(4, dtype=torch.int64), TRAINING)
    with pytest.raises(InputError, match="at least 2 models of some of the rows; got 8 of 4 of 4"):
        fit_datamodel(spec, 8, share=0.95)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


@pytest.fixture(scope="module")
def world():
    """300 digits of which 30 have a wrong label; 10 of these are to be forgotten. A target, and 24 models without them."""
    inputs, targets = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(inputs))[:ROWS]
    x = torch.tensor(inputs[order] / 16, dtype=torch.float32)
    y = torch.tensor(targets[order])
    rng = np.random.default_rng(1)
    wrong = rng.permutation(ROWS)[:30]
    y[wrong] = (y[wrong] + torch.tensor(rng.integers(1, 10, 30))) % 10
    forget = wrong[:FORGOTTEN].tolist()
    spec = Spec(network, x, y, TRAINING, class_loss)
    without = torch.ones(24, ROWS)
    without[:, forget] = 0
    oracles = train_ensemble(spec, Members(without, range(24)))
    target = train_ensemble(spec, Members(torch.ones(1, ROWS), [100]))
    model = network()
    model.load_state_dict(target.member(0))
    rows = table(x.numpy(), y.numpy())
    return spec, forget, oracles, ClassifierAdapter(model, rows.classes), rows


def streams(adapter, rows, forget) -> dict[Stream, list]:
    kept = rows.others(np.array(forget))
    return {
        Stream.FORGET: [adapter.encode(r) for r in rows.rows(forget)],
        Stream.RETAIN: [adapter.encode(r) for r in rows.rows(kept)],
    }


def logits(adapter, spec) -> torch.Tensor:
    with torch.no_grad():
        return adapter.model(spec.inputs)


def away(scores: torch.Tensor, oracles, spec, at) -> float:
    """Squared distance of margins to those of the mean retrained model, averaged over rows."""
    mean = oracles.margins(spec.inputs, spec.targets).mean(0)
    return float((margins(scores, spec.targets) - mean)[at].square().mean())


def test_predictions_and_matching_come_closer_to_retrained_models(world, tmp_path) -> None:
    spec, forget, oracles, target, rows = world
    adapter = target.copy()
    before = logits(target, spec)
    schedule = {"name": "fixed", "lr": 2e-3, "steps": 200, "batch": 10, "retain_batch": 100}
    preparation = {"models": MODELS, "training": TRAINING.model_dump()}
    engine = Engine(checkpoint_every=0)
    recipe = build("dmm", {"preparation": preparation, "schedule": schedule})
    train(adapter, recipe, streams(adapter, rows, forget), engine, folder=tmp_path)
    nothing = away(before, oracles, spec, forget)
    matched = away(logits(adapter, spec), oracles, spec, forget)
    # The same models again, from the files that the run left.
    full = torch.cat([torch.tensor(forget), torch.tensor(rows.others(np.array(forget)))])
    files = tmp_path / "checkpoint" / "preparation"
    held = sorted(files.iterdir())
    same = Spec(network, spec.inputs[full], spec.targets[full], TRAINING, class_loss)
    again = fit_datamodel(same, MODELS, seed=engine.seed, folder=files)
    assert sorted(files.iterdir()) == held
    direct = away(again.without(before, spec.inputs, range(FORGOTTEN)), oracles, spec, forget)
    flipped = away(before + again.effect(spec.inputs, range(FORGOTTEN)), oracles, spec, forget)

    bare = target.copy()
    ideal = target.copy()
    ideal.model.load_state_dict(oracles.member(0))
    matching = build("oracle-matching", {"schedule": schedule})
    train(bare, matching, streams(bare, rows, forget), engine, models={Of.ORACLE: ideal})
    best = away(logits(bare, spec), oracles, spec, forget)
    assert direct < 0.3 * nothing
    assert best < matched < 0.25 * nothing
    assert flipped > 2 * nothing
    others = rows.others(np.array(forget))
    assert away(logits(adapter, spec), oracles, spec, others) < 2 * away(before, oracles, spec, others)


def test_a_killed_preparation_goes_on_with_its_files(world, tmp_path) -> None:
    _, forget, _, target, rows = world
    preparation = {"models": 16, "chunk": 8, "training": {"steps": 20, "batch": 50, "lr": 1e-3}}
    recipe = build("dmm", {"preparation": preparation, "schedule": {"name": "fixed", "steps": 5, "batch": 10, "lr": 1e-3}})
    whole = target.copy()
    train(whole, recipe, streams(whole, rows, forget), Engine(), folder=tmp_path / "whole")

    class Killed(Exception):
        pass

    told: list[int] = []

    def kill(done: int, total: int, text: str) -> None:
        told.append(done)
        if "models" in text and done > 8 * 20:
            raise Killed

    part = target.copy()
    with pytest.raises(Killed):
        train(part, recipe, streams(part, rows, forget), Engine(), folder=tmp_path / "part", progress=kill)
    told.clear()
    again = target.copy()
    train(again, recipe, streams(again, rows, forget), Engine(), folder=tmp_path / "part", resume=True,
          progress=lambda done, total, text: told.append(done) if "models" in text else None)  # fmt: skip
    assert min(told) == 8 * 20  # the first chunk was read
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key])


def test_a_datamodel_holds_what_it_was_fitted_on(world) -> None:
    spec = world[0]
    short = Spec(spec.model, spec.inputs, spec.targets, Training(steps=2, batch=50, lr=1e-3), class_loss)
    fitted = fit_datamodel(short, 8, share=0.25, seed=3)
    assert isinstance(fitted, Datamodel)
    assert fitted.members.sum(1).tolist() == [75] * 8
    blocks = [fitted.effect(spec.inputs, [0, 1], block=b) for b in (7, 1000)] if _covered(fitted, [0, 1]) else []
    for one, other in itertools.pairwise(blocks):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def _covered(fitted: Datamodel, rows: list[int]) -> bool:
    inside = fitted.members[:, rows].sum(0)
    return bool(((inside > 0) & (inside < len(fitted.members))).all())


def test_matched_models_are_as_far_from_oracles_as_other_oracles_are(world) -> None:
    """KLoM of models matched to one oracle each is at its floor, on forget rows and on the others; of untouched ones not."""
    spec, forget, oracles, target, rows = world
    models = 12
    without = torch.ones(models, ROWS)
    without[:, forget] = 0
    second = train_ensemble(spec, Members(without, range(500, 500 + models)))
    originals = train_ensemble(spec, Members(torch.ones(models, ROWS), range(1000, 1000 + models)))
    schedule = {"name": "fixed", "lr": 5e-3, "steps": 80, "batch": 10, "retain_batch": 100}
    matched = []
    for i in range(models):
        adapter, oracle = target.copy(), target.copy()
        adapter.model.load_state_dict(originals.member(i))
        oracle.model.load_state_dict(second.member(i))
        recipe = build("oracle-matching", {"schedule": schedule})
        train(adapter, recipe, streams(adapter, rows, forget), Engine(checkpoint_every=0), models={Of.ORACLE: oracle})
        matched.append(margins(logits(adapter, spec), spec.targets).numpy())
    others = rows.others(np.array(forget))
    of = {"matched": np.stack(matched)}
    of |= {k: e.margins(spec.inputs, spec.targets).numpy() for k, e in (("floor", second), ("nothing", originals))}
    reference = oracles.margins(spec.inputs, spec.targets).numpy()[:models]
    for part in (forget, others):
        found = {k: float(klom(m, reference)[part].mean()) for k, m in of.items()}
        assert found["matched"] < found["floor"] + 0.25 * (found["nothing"] - found["floor"])
        assert found["nothing"] > found["floor"] + 0.8
