"""Every method on rows: the same files as for language, on a network that knows handwritten digits, and on a regressor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.digits import QUIET, accuracy, encoded, network
from torch import nn

from expunge.adapters.supervised import ClassifierAdapter, RegressionAdapter
from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.data.rows import table
from expunge.engine.goal import Goal
from expunge.engine.loop import train
from expunge.engine.objective import mean_losses
from expunge.engine.reference import IncompetentReference
from expunge.methods.alternatives import alternatives, kind_for
from expunge.methods.catalogue import serves
from expunge.methods.compose import compose
from expunge.methods.evaluate import loss_on
from expunge.methods.recipe import build
from expunge.methods.registry import METHODS
from expunge.methods.terms.likelihood import NLL

CHANCE = Goal(loss=math.log(10), source="holdout", examples=10)  # the class is to look like no class at all

#: those that work on a class by themselves; the others only run here (fine-tuning forgets by neglect, RMU turns features away)
FORGETTING = (
    "bad-teacher", "ceu", "gradascent", "graddiff", "graddiff-kl", "neggrad-plus", "npo", "pdu", "random-label", "salun",
    "satimp", "scrub", "simnpo", "undial", "wga",
)  # fmt: skip

SMALL = {
    "dmm": {"preparation": {"models": 16, "training": {"steps": 5, "batch": 50, "lr": 1e-3}}},
    "concept-poison": {"preparation": {"rows": "all"}},  # concepts are labelled in a file
}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", FORGETTING)
def test_the_class_is_forgotten_and_the_rest_kept_with_nothing_given(digits, name) -> None:
    adapter = digits.target()
    outcome = train(adapter, build(name), digits.examples(adapter, name), QUIET, goal=CHANCE)
    assert outcome.reached, outcome.sentence
    (forget, retain), (unseen_forget, unseen_retain) = digits.split(), digits.split(1)
    assert accuracy(adapter, forget) < 0.5
    assert accuracy(adapter, unseen_forget) < 0.5
    assert accuracy(adapter, retain) > 0.9
    assert accuracy(adapter, unseen_retain) > 0.88


@pytest.mark.parametrize("name", [n for n in METHODS.names() if serves(n, ClassifierAdapter.offers)[0]])
def test_every_method_that_the_table_names_runs_on_a_classifier(digits, name) -> None:
    adapter = digits.target()
    before = state(adapter.model)
    finish = {"finish": {"scale": 1.0}} if name == "task-vector" else {}
    recipe = build(name, {"schedule": {"lr": 1e-3, "batch": 20}, **finish, **SMALL.get(name, {})})
    recipe = recipe.model_copy(update={"schedule": _short(recipe.schedule)})
    oracle = {Of.ORACLE: digits.retrained()} if Of.ORACLE in recipe.models(adapter.layers()) else {}
    unseen = {Stream.VALIDATION: encoded(adapter, digits.split(1)[0])}
    train(adapter, recipe, digits.examples(adapter, name) | unseen, QUIET, models=oracle)
    after = state(adapter.model)
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert all(torch.isfinite(v).all() for v in after.values())


def _short(schedule):
    if schedule.name == "turns":
        return schedule.model_copy(update={"epochs": 1, "erase_epochs": 1})
    return schedule.model_copy(update={"steps": 3, "epochs": 0.01})


@pytest.mark.parametrize("name", [n for n in METHODS.names() if serves(n, RegressionAdapter.offers)[0]])
def test_every_method_that_the_table_names_runs_on_a_regressor(name) -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(60, 5))
    held = table(inputs, inputs @ rng.normal(size=5) + 1, task="regression")
    torch.manual_seed(0)
    adapter = RegressionAdapter(nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1)))
    before = state(adapter.model)
    finish = {"finish": {"scale": 1.0}} if name == "task-vector" else {}
    recipe = build(name, {"schedule": {"lr": 1e-3, "batch": 10}, **finish})
    recipe = recipe.model_copy(update={"schedule": _short(recipe.schedule)})
    streams = {Stream.FORGET: encoded(adapter, held.rows(range(15))), Stream.RETAIN: encoded(adapter, held.rows(range(15, 60)))}
    train(adapter, recipe, streams, QUIET)
    after = state(adapter.model)
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert all(torch.isfinite(v).all() for v in after.values())


def test_the_table_follows_from_what_is_declared() -> None:
    assert serves("npo", RegressionAdapter.offers)[0]
    assert not serves("graddiff-kl", RegressionAdapter.offers)[0]  # a number has no distribution
    assert not serves("random-label", RegressionAdapter.offers)[0]
    assert not serves("idkdpo", ClassifierAdapter.offers)[0]  # a class cannot say that it does not know


# ---- identities ------------------------------------------------------------------------------------------------------


def test_neggrad_plus_without_its_forget_side_is_fine_tuning(digits) -> None:
    forget, retain = digits.split()
    adapter = digits.target()
    full = build("neggrad-plus", {"forget.weight": 0, "retain.weight": 1})
    ours = loss_on(full, adapter, None, forget, retain)["total"]
    tuned = loss_on("finetune", adapter, None, [], retain)["total"]
    gradients = [torch.autograd.grad(loss, list(adapter.model.parameters())) for loss in (ours, tuned)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert build("neggrad-plus").forget[0].weight + build("neggrad-plus").retain[0].weight == 1


def test_salun_at_density_one_is_random_labels_and_below_it_freezes_the_rest(digits) -> None:
    found = []
    schedule = {"schedule": {"name": "fixed", "lr": 1e-3, "steps": 5, "batch": 20, "warmup": 0, "weight_decay": 0}}
    for name, more in (("salun", {"parameters": {"density": 1.0}}), ("random-label", {}), ("salun", {})):
        adapter = digits.target()
        train(adapter, build(name, {**schedule, **more}), digits.examples(adapter, "salun"), QUIET)
        found.append(state(adapter.model))
    before = state(digits.target().model)
    assert all(torch.equal(found[0][k], found[1][k]) for k in before)
    moved = sum(int((found[2][k] != before[k]).sum()) for k in before)
    total = sum(v.numel() for v in before.values())
    assert 0.2 * total < moved <= 0.51 * total


def test_scrub_without_its_max_steps_and_distillation_is_fine_tuning(digits) -> None:
    turns = {"name": "turns", "lr": 1e-3, "epochs": 2, "erase_epochs": 0, "batch": 32, "retain_batch": 128, "weight_decay": 0}
    scrub = build("scrub", {"schedule": turns, "retain": [{"name": "kl", "weight": 0}, {"name": "nll", "weight": 1}]})
    fixed = {"name": "fixed", "lr": 1e-3, "epochs": 2, "batch": 128, "warmup": 0, "decay": "constant", "weight_decay": 0}
    found = []
    for recipe in (scrub, build("finetune", {"schedule": fixed})):
        adapter = digits.target()
        train(adapter, recipe, digits.examples(adapter), QUIET)
        found.append(state(adapter.model))
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key])


def test_scrub_raises_the_divergence_in_max_steps_only(digits) -> None:
    adapter, target = digits.target(), digits.target()
    forget = digits.split()[0]
    seen: list[float] = []

    def divergence(step: int, model: nn.Module) -> None:
        batch = adapter.collate(encoded(adapter, forget))
        with torch.no_grad():
            ours, theirs = (adapter.forward(m, batch, frozenset({"logits"})).logits for m in (model, target.model))
        seen.append(float((theirs.softmax(1) * (theirs.log_softmax(1) - ours.log_softmax(1))).sum(1).mean()))

    recipe = build("scrub", {"schedule": {"lr": 2e-3, "epochs": 3, "erase_epochs": 2, "batch": 32, "retain_batch": 100}})
    outcome = train(adapter, recipe, digits.examples(adapter), QUIET, observe=divergence)
    sides = ["min" if row["retain.nll"] > 0 else "max" for row in outcome.history]
    rows = len(forget)
    per_max, per_min = math.ceil(rows / 32), math.ceil((1000 - rows) / 100)
    assert sides == (["max"] * per_max + ["min"] * per_min) * 2 + ["min"] * per_min
    assert seen[per_max] > seen[0] + 0.05
    kept = digits.split()[1]
    assert accuracy(adapter, kept) > 0.97


def test_bad_teacher_goes_to_the_predictions_of_the_random_network(digits) -> None:
    adapter = digits.target()
    forget, retain = digits.split()
    teacher = IncompetentReference(adapter, torch.device("cpu"), QUIET.seed)
    schedule = {"name": "fixed", "lr": 1e-3, "steps": 300, "batch": 50, "warmup": 0}
    train(adapter, build("bad-teacher", {"schedule": schedule}), digits.examples(adapter), QUIET)

    def entropy(rows) -> float:
        batch = adapter.collate(encoded(adapter, rows))
        with torch.no_grad():
            p = adapter.forward(adapter.model, batch, frozenset({"logits"})).logits.softmax(1)
        return float(-(p * p.clamp_min(1e-12).log()).sum(1).mean())

    batch = adapter.collate(encoded(adapter, forget))
    ignorant = teacher.outputs(adapter.model, batch, frozenset({"logits"})).logits.softmax(1)
    assert float(-(ignorant * ignorant.log()).sum(1).mean()) > 2  # of at most ln 10 = 2.3
    assert entropy(forget) > 1.5
    assert entropy(retain) < 0.6


def test_an_incompetent_teacher_is_random_but_the_same_for_a_seed(digits) -> None:
    adapter = digits.target()
    device = torch.device("cpu")
    rng = torch.get_rng_state()
    first, again, other = (IncompetentReference(adapter, device, seed).adapter.model for seed in (0, 0, 1))
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)
    assert not torch.equal(first[0].weight, adapter.model[0].weight)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(64, 10))

        def forward(self, x):
            return x @ self.weight

    with pytest.raises(InputError, match="set back"):
        IncompetentReference(ClassifierAdapter(Odd(), [str(i) for i in range(10)]), device, 0)


def test_an_incompetent_language_model_has_forgotten_its_language(people_world) -> None:
    target = people_world.target()
    ignorant = IncompetentReference(target, torch.device("cpu"), 0).adapter
    assert people_world.loss(ignorant, people_world.split.retain) > 0.9 * math.log(len(target.tokenizer))
    assert people_world.loss(target, people_world.split.retain) < 0.1


def test_l1_presses_the_weights_down_and_lets_go_at_the_end(digits) -> None:
    fixed = {"name": "fixed", "lr": 1e-3, "steps": 150, "batch": 100, "warmup": 0, "decay": "constant", "weight_decay": 0}
    small = {}
    for gamma in (0.0, 5e-4, 5e-3):
        adapter = digits.target()
        recipe = build("l1-sparse", {"schedule": fixed, "gamma": gamma})
        train(adapter, recipe, digits.examples(adapter), QUIET)
        values = torch.cat([p.detach().flatten() for p in adapter.model.parameters()])
        small[gamma] = float((values.abs() < 1e-3).float().mean())
    assert small[0.0] < 0.2
    assert small[0.0] + 0.1 < small[5e-4] < small[5e-3]
    penalty = build("l1-sparse", {"gamma": 0.5, "penalty": {"free": 0.5}}).penalty
    assert [penalty.weight(d) for d in (0, 0.25, 0.5, 0.9)] == [0.5, 0.25, 0, 0]
    assert torch.equal(penalty.gradient(torch.tensor([2.0, -3.0, 0.0]), 0.0), torch.tensor([0.5, -0.5, 0.0]))


def test_a_penalty_alone_shrinks_by_its_sign_step() -> None:
    torch.manual_seed(0)
    adapter = ClassifierAdapter(network(), [str(i) for i in range(10)])
    held = table(np.random.default_rng(0).normal(size=(20, 64)), np.arange(20) % 10)
    schedule = {"name": "fixed", "optimizer": "sgd", "momentum": 0, "lr": 0.1, "steps": 1, "batch": 20, "warmup": 0, "clip": None,
                "decay": "constant", "weight_decay": 0}  # fmt: skip
    found = []
    for gamma in (0.0, 1e-2):
        copy = adapter.copy()
        train(
            copy, build("l1-sparse", {"schedule": schedule, "gamma": gamma}), {Stream.RETAIN: encoded(copy, held.rows())}, QUIET
        )
        found.append(copy.model[0].weight.detach())
    torch.testing.assert_close(found[0] - found[1], 0.1 * 1e-2 * adapter.model[0].weight.detach().sign())


# ---- other classes -----------------------------------------------------------------------------------------------------


def test_other_classes_are_drawn_by_id_and_leave_the_own_one_out(digits) -> None:
    rows = digits.tables[0].rows()
    other = alternatives(rows, "other", 1, classes=10)
    assert all(o != r.target and 0 <= o < 10 for o, r in zip(other, rows, strict=True))
    assert other[500:] == alternatives(rows[500:], "other", 1, classes=10)
    assert other != alternatives(rows, "other", 2, classes=10)
    free = alternatives(rows, "any", 1, classes=10)
    hits = sum(o == r.target for o, r in zip(free, rows, strict=True))
    assert 60 < hits < 140  # a tenth of 1,000
    counts = np.bincount(other, minlength=10)
    assert counts.min() > 60
    assert kind_for("custom", "auto", rows) == "other"
    for how, classes in (("refusals", 10), ("other", None)):
        with pytest.raises(InputError, match="does not fit"):
            alternatives(rows, how, classes=classes)


# ---- the loop ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_killed_run_goes_on_to_the_same_bits(digits, tmp_path, optimizer) -> None:
    from expunge.engine.options import Engine

    schedule = {
        "name": "turns",
        "lr": 1e-2,
        "epochs": 2,
        "erase_epochs": 1,
        "batch": 32,
        "retain_batch": 128,
        "optimizer": optimizer,
    }
    engine = Engine(checkpoint_every=4)
    recipe = build("scrub", {"schedule": schedule})
    whole = digits.target()
    train(whole, recipe, digits.examples(whole), engine, folder=tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(step: int, model: nn.Module) -> None:
        if step == 10:
            raise Killed

    broken = digits.target()
    with pytest.raises(Killed):
        train(broken, recipe, digits.examples(broken), engine, folder=tmp_path / "part", observe=kill)
    again = digits.target()
    train(again, recipe, digits.examples(again), engine, folder=tmp_path / "part", resume=True)
    assert all(torch.equal(v, state(again.model)[k]) for k, v in state(whole.model).items())


def test_batch_statistics_move_only_if_asked_and_are_kept_by_checkpoints(tmp_path) -> None:
    from expunge.engine.options import Engine

    held = table(np.random.default_rng(0).normal(loc=3, size=(40, 6)), np.arange(40) % 2)

    def fresh() -> ClassifierAdapter:
        torch.manual_seed(0)
        return ClassifierAdapter(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)), ["a", "b"])

    recipe = compose(retain=[NLL()], schedule=build("finetune", {"schedule": {"name": "fixed", "lr": 1e-2, "steps": 8}}).schedule)
    found = {}
    for how in ("frozen", "batch"):
        adapter = fresh()
        train(adapter, recipe, {Stream.RETAIN: encoded(adapter, held.rows())}, Engine(batch_norm=how, checkpoint_every=0))
        found[how] = adapter.model[1]
    assert torch.equal(found["frozen"].running_mean, torch.zeros(8))
    assert found["batch"].running_mean.abs().max() > 0.1

    engine = Engine(batch_norm="batch", checkpoint_every=3)

    class Killed(Exception):
        pass

    def kill(step: int, model: nn.Module) -> None:
        if step == 5:
            raise Killed

    adapter = fresh()
    with pytest.raises(Killed):
        train(adapter, recipe, {Stream.RETAIN: encoded(adapter, held.rows())}, engine, folder=tmp_path, observe=kill)
    adapter = fresh()
    train(adapter, recipe, {Stream.RETAIN: encoded(adapter, held.rows())}, engine, folder=tmp_path, resume=True)
    assert torch.equal(adapter.model[1].running_var, found["batch"].running_var)
    assert torch.equal(adapter.model[1].weight, found["batch"].weight)


def test_views_read_only_what_a_recipe_declares(digits) -> None:
    needs = build("bad-teacher").needs(digits.target().layers())
    assert {of for _, of, _ in needs} == {Of.CURRENT, Of.REFERENCE, Of.INCOMPETENT}
    assert mean_losses(digits.target(), digits.target().model, encoded(digits.target(), digits.split()[0][:3]), 100)
