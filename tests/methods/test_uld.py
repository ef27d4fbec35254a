"""Assistants: ULD and the subtraction of reinforced scores, through the engine, the audit, folders and the command line."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import expunge
from expunge.adapters.combined import Combined
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.loading import load
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.engine.finish import Subtract
from expunge.engine.goal import Goal
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.parameters import Assistant, Twin
from expunge.methods.recipe import build, from_spec

QUIET = Engine(checkpoint_every=0)
SCHEDULE = {"name": "fixed", "lr": 5e-3, "steps": 110, "batch": 15, "warmup": 0.05}


def exact(adapter: LanguageAdapter, model, records) -> float:
    """Share of records whose every target is the argmax."""
    batch = adapter.collate([adapter.encode(r) for r in records])
    with torch.no_grad():
        wrong = adapter.forward(model, batch, frozenset({"logits"})).logits.argmax(-1) != batch.targets
    return float((torch.zeros(len(records)).index_add(0, batch.owner, wrong.float()) == 0).float().mean())


@pytest.fixture(scope="module")
def unlearned(people_world) -> tuple[LanguageAdapter, Combined]:
    """The people's target with an assistant that was trained by ULD's recipe, at weight -1."""
    adapter = people_world.target()
    outcome = train(adapter, build("uld", {"schedule": SCHEDULE, "finish": {"scale": 1.0}}), people_world.examples, QUIET)
    assert outcome.reason == "schedule"
    assert outcome.notes == ["The assistant's scores are taken away with weight 1."]
    assert isinstance(outcome.model, Combined)
    return adapter, outcome.model


def test_the_forget_set_is_forgotten_and_the_rest_kept(people_world, unlearned):
    """The card's (iii)."""
    adapter, model = unlearned
    split = people_world.split
    assert exact(adapter, adapter.model, split.forget) == 1.0
    assert exact(adapter, model, split.forget) < 0.2
    assert exact(adapter, model, split.retain) >= exact(adapter, adapter.model, split.retain) - 0.01
    assert people_world.loss(adapter, split.forget, model) > people_world.loss(adapter, split.forget) + 1
    assert people_world.loss(adapter, split.retain, model) < 0.05


def test_the_target_is_untouched_and_weight_zero_is_the_target(people_world, unlearned):
    """The card's (i)."""
    adapter, model = unlearned
    before = people_world.target()
    assert all(torch.equal(v, before.model.state_dict()[k]) for k, v in adapter.model.state_dict().items())
    held = model.combination
    batch = adapter.collate([adapter.encode(r) for r in people_world.split.forget])
    with torch.no_grad():
        try:
            model.combination = held.model_copy(update={"weight": 0.0})
            got = adapter.forward(model, batch, frozenset({"logits"})).logits
        finally:
            model.combination = held
        assert torch.equal(got, adapter.forward(adapter.model, batch, frozenset({"logits"})).logits)


def test_the_other_sign_teaches_instead(people_world, unlearned):
    adapter, model = unlearned
    held = model.combination
    try:
        model.combination = held.model_copy(update={"weight": 1.0})
        assert people_world.loss(adapter, people_world.split.forget, model) < people_world.loss(
            adapter, people_world.split.forget
        )
        assert exact(adapter, model, people_world.split.forget) == 1.0
    finally:
        model.combination = held


def test_without_the_uniform_terms_the_rest_is_lost(people_world):
    """The card's (iv)."""
    adapter = people_world.target()
    overrides = {"forget": "forget-nll", "retain": "none", "schedule": {**SCHEDULE, "steps": 40}, "finish": {"scale": 1.0}}
    outcome = train(adapter, build("uld", overrides), people_world.examples, QUIET)
    assert exact(adapter, outcome.model, people_world.split.retain) < 0.9


def test_it_is_saved_audited_and_generated_from(people_world, unlearned, tmp_path):
    adapter, model = unlearned
    made = adapter.sharing()
    made.save(tmp_path / "model", model)
    made.model = model
    back = load(tmp_path / "model")
    assert back.fingerprint() == made.fingerprint()
    split = people_world.split
    some = [made.encode(r) for r in split.forget[:10]]
    said = back.generate(back.model, some, 16)
    assert said == made.generate(model, some, 16)
    known = [r.answer == g.text for r, g in zip(split.forget[:10], said, strict=True)]
    assert sum(known) <= 2
    document = expunge.audit_model(
        people_world.target().model, back.model, back.tokenizer, split.forget[:10], split.retain[:10],
        retrained=[people_world.retrained().model],
        metrics=("rouge-l-recall", "probability"), relearn={"steps": (5,)},
    )  # fmt: skip
    assert document.models[-1].judgement is not None


def test_the_schedule_finds_the_weight(people_world):
    """Whatever was learnt, the weight is the smallest with which the goal is reached."""
    adapter = people_world.target()
    goal = Goal(loss=1.5, source="holdout", examples=10)
    recipe = build("uld", {"schedule": {**SCHEDULE, "lr": None, "steps": 60}})
    outcome = train(adapter, recipe, people_world.examples, QUIET, goal=goal)
    assert outcome.lr > 0
    assert {"loss", "forget", "lr"} <= set(outcome.rate_test[0])
    weight = -outcome.model.combination.weight
    assert 0 < weight < 64
    assert outcome.forget_loss == pytest.approx(1.5, abs=0.1)
    assert outcome.forget_loss >= 1.5
    assert outcome.notes == [f"The assistant's scores are taken away with weight {weight:.4g}."]
    outcome.model.combination = outcome.model.combination.model_copy(update={"weight": -0.9 * weight})
    assert people_world.loss(adapter, people_world.split.forget, outcome.model) < 1.5


def test_a_killed_run_goes_on_to_the_same_assistant(people_world, tmp_path):
    class Killed(Exception):
        pass

    def observe(step: int, _: object) -> None:
        if step == 7:
            raise Killed

    recipe = build("uld", {"schedule": {**SCHEDULE, "steps": 10}, "finish": {"scale": 1.0}})
    engine = Engine(checkpoint_every=3)
    whole = train(people_world.target(), recipe, people_world.examples, engine, folder=tmp_path / "whole")
    with pytest.raises(Killed):
        train(people_world.target(), recipe, people_world.examples, engine, folder=tmp_path / "cut", observe=observe)
    rest = train(people_world.target(), recipe, people_world.examples, engine, folder=tmp_path / "cut", resume=True)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[key]), key


def test_reinforced_scores_are_subtracted(people_world):
    """WHP-logits is one setting of the same: a whole copy learns, and only what rose is pushed down."""
    adapter = people_world.target()
    schedule = {"name": "fixed", "lr": 5e-4, "steps": 40, "batch": 15, "warmup": 0}
    outcome = train(adapter, build("whp-logits", {"schedule": schedule, "finish": {"scale": 5.0}}), people_world.examples, QUIET)
    model = outcome.model
    assert model.blocks is None
    assert model.combination.weight == -5
    batch = adapter.collate([adapter.encode(r) for r in people_world.split.forget])
    with torch.no_grad():
        v, r, got = (
            adapter.forward(m, batch, frozenset({"logits"})).logits for m in (adapter.model, model.assistant, model)
        )  # fmt: skip
    torch.testing.assert_close(got, v - 5 * (r - v).clamp(min=0))
    assert exact(adapter, model, people_world.split.forget) < 0.2
    assert exact(adapter, model, people_world.split.retain) > 0.8
    before = people_world.target().model.state_dict()
    assert all(torch.equal(value, before[k]) for k, value in adapter.model.state_dict().items())


def test_the_published_setting():
    recipe = build("uld", {"schedule": "paper"})
    assert isinstance(recipe.finish, Subtract)
    assert (recipe.finish.scale, recipe.finish.filter) == (0.8, 0.01)
    assert isinstance(recipe.parameters, Assistant)
    assert (recipe.parameters.rank, recipe.parameters.alpha, recipe.parameters.dropout) == (16, 32.0, 0.05)
    assert sum(t.weight for t in recipe.terms() if "uniform" in t.name) == 5.0
    assert recipe.schedule.lr == 1e-3
    assert from_spec(recipe.spec()) == recipe
    assert isinstance(build("whp-logits").parameters, Twin)


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("uld", {"retain": "nll"}, "cannot follow nll"),
        ("uld", {"forget": "gradascent"}, "cannot follow gradascent"),
        ("uld", {"finish": "none"}, "'forget-nll' teaches the forget set"),
        ("uld", {"finish": "negate", "parameters": "all"}, "can only follow forget-nll"),
        ("uld", {"finish": "negate"}, "can only follow forget-nll"),
        ("uld", {"parameters": "lora"}, "joins the target with a model trained beside it, and parameters=lora trains none"),
        ("npo", {"parameters": "assistant"}, "trains a model beside the target, and nothing joins the two"),
        ("task-vector", {"parameters": "copy", "finish": {"name": "negate", "scale": 1}}, "and nothing joins the two"),
        ("npo", {"retain": "uniform"}, "'uniform' unteaches the retain set"),
        ("uld", {"schedule": {"name": "fixed", "lr": 1e-3}}, "has no scale"),
    ],
)
def test_parts_that_turn_nothing_around_are_refused(name, overrides, said):
    with pytest.raises(InputError, match=said):
        build(name, overrides)


def test_errors_come_before_training(people_world):
    adapter = people_world.target()
    with pytest.raises(InputError, match="An assistant of 7 blocks was asked for; the model has 2"):
        train(adapter, build("uld", {"blocks": 7}), people_world.examples, QUIET)
    recipe = build("uld", {"keep_target": False})
    with pytest.raises(InputError, match="has no name"):
        train(adapter, recipe, people_world.examples, QUIET)
    some = {s: e for s, e in people_world.examples.items() if s is not Stream.ALTERNATIVE}
    with pytest.raises(InputError, match="reads alternative examples"):
        train(adapter, build("uld"), some, QUIET)
