"""Offset unlearning: a small pair trained with the loss of the sum, kept as one model, and served as a guard."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tests.methods.test_uld import exact

import expunge
from expunge.adapters.combined import Combined
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.loading import load
from expunge.adapters.offset import small_model
from expunge.adapters.presets import build as preset
from expunge.adapters.words import word_tokenizer
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.core.results import Verdict
from expunge.data.people import world
from expunge.engine.goal import Goal
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.parameters import OffsetPair
from expunge.engine.schedule import Fixed
from expunge.guards.actions.offset import Offset
from expunge.guards.decoding import Sampling
from expunge.guards.guarded import guard_model
from expunge.guards.policy import Row
from expunge.methods.compose import compose
from expunge.methods.recipe import build, from_spec
from expunge.methods.terms.likelihood import NLL

QUIET = Engine(checkpoint_every=0)
SCHEDULE = {"name": "fixed", "lr": 5e-3, "steps": 140, "batch": 15, "retain_batch": 45, "warmup": 0.05}


PAIR = {"rank": 16, "alpha": 32.0}


@pytest.fixture(scope="module")
def small(people_world, tmp_path_factory):
    """Folder of a model of half the width and one block, of the target's tokenizer, that never saw the people to forget."""
    model = preset("llama-tiny", people_world.tokenizer, seed=5, hidden_size=32, num_hidden_layers=1)
    made = LanguageAdapter(model, people_world.tokenizer)
    recipe = compose("train", retain=[NLL()], schedule=Fixed(lr=1e-2, epochs=6, batch=16, warmup=1))
    kept = [*people_world.split.retain, *world()]
    train(made, recipe, {Stream.RETAIN: [made.encode(r) for r in kept]}, QUIET)
    folder = tmp_path_factory.mktemp("small") / "model"
    made.save(folder)
    return folder


@pytest.fixture(scope="module")
def unlearned(people_world, small):
    """The people's target with a pair that was trained beside it, by a loss with a bound."""
    adapter = people_world.target()
    overrides = {"small": str(small), "schedule": SCHEDULE, "forget": "npo", **PAIR}
    outcome = train(adapter, build("offset", overrides), people_world.examples, QUIET)
    assert isinstance(outcome.model, Combined)
    return adapter, outcome.model


@pytest.fixture(scope="module")
def folder(unlearned, tmp_path_factory):
    """The same as a run leaves it: in the folder ``model`` of a folder."""
    adapter, model = unlearned
    run = tmp_path_factory.mktemp("run")
    adapter.save(run / "model", model)
    return run


def scores(adapter, model, records):
    with torch.no_grad():
        return adapter.forward(model, adapter.collate([adapter.encode(r) for r in records]), frozenset({"logits"})).logits


# ---- the training


@pytest.mark.parametrize("beside", ["small", "blocks"])
def test_the_offset_begins_at_zero_bit_for_bit(people_world, small, beside):
    """The card's first check; and the reference is the target, without a second copy."""
    adapter, held = people_world.target(), people_world.target()
    part = OffsetPair(small=str(small) if beside == "small" else "")
    model = part.begin(adapter, {}, QUIET, small)
    assert torch.equal(scores(adapter, model, people_world.split.forget), scores(held, held.model, people_world.split.forget))
    moving = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moving
    assert all("lora_" in n and n.startswith("assistant.") for n in moving)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    assert not torch.equal(scores(adapter, model, people_world.split.forget), scores(held, held.model, people_world.split.forget))
    with model.disable_adapter():
        off = scores(adapter, model, people_world.split.forget)
    assert torch.equal(off, scores(held, held.model, people_world.split.forget))


def test_the_loss_is_that_of_the_sum_and_not_of_the_small_model(people_world, small):
    """At the first step the sum is the target, which knows the answers; the small model does not."""
    adapter, records = people_world.target(), people_world.split.forget
    schedule = {"name": "fixed", "lr": 1e-9, "steps": 1, "batch": len(records), "warmup": 0}
    overrides = {"small": str(small), "schedule": schedule, "retain": "kl"}
    outcome = train(adapter, build("offset", overrides), people_world.examples, QUIET)
    first = outcome.history[0]
    batch = adapter.collate([adapter.encode(r) for r in records])
    with torch.no_grad():
        of = {n: float(adapter.forward(m, batch, frozenset({"losses"})).losses.mean()) for n, m in (
            ("target", people_world.target().model), ("small", outcome.model.baseline))}  # fmt: skip
    assert -first["forget.gradascent"] == pytest.approx(of["target"], rel=1e-4)
    assert of["small"] > of["target"] + 1
    assert first["retain.kl"] == 0


def test_the_sum_forgets_while_the_large_model_alone_does_not(people_world, unlearned):
    """The card's second check."""
    adapter, model = unlearned
    split, before = people_world.split, people_world.target()
    assert exact(adapter, model, split.forget) < 0.1
    assert people_world.loss(adapter, split.forget, model) > people_world.loss(before, split.forget) + 2
    assert exact(adapter, model, split.retain) > 0.9
    assert people_world.loss(adapter, split.retain, model) < 0.2
    assert exact(adapter, adapter.model, split.forget) == exact(adapter, model.target, split.forget) == 1.0
    assert all(torch.equal(v, before.model.state_dict()[k]) for k, v in model.target.state_dict().items())


def test_weight_zero_is_the_target_and_the_other_sign_forgets_nothing(people_world, unlearned):
    """The card's third check."""
    adapter, model = unlearned
    held, split = model.combination, people_world.split
    try:
        model.combination = held.model_copy(update={"weight": 0.0})
        assert torch.equal(scores(adapter, model, split.forget), scores(adapter, adapter.model, split.forget))
        found = {}
        for weight in (-1.0, -0.1, 0.1, 1.0):
            model.combination = held.model_copy(update={"weight": weight})
            found[weight] = people_world.loss(adapter, split.forget, model)
        assert found[-0.1] < found[0.1]
        assert found[-1.0] < found[1.0] - 2
    finally:
        model.combination = held


def test_by_its_name_alone_it_reaches_the_goal_within_the_bound(people_world):
    """Gradient difference, the adaptive schedule, and the target's own first block in the small model's place."""
    adapter = people_world.target()
    goal = Goal(loss=2.5, source="holdout", examples=10)
    before = people_world.loss(adapter, people_world.split.retain)
    outcome = train(adapter, build("offset"), people_world.examples, QUIET, goal=goal)
    assert outcome.reason == "goal"
    assert outcome.model.blocks == 1
    assert people_world.loss(adapter, people_world.split.forget, outcome.model) >= 2.5
    assert people_world.loss(adapter, people_world.split.retain, outcome.model) < before + 0.15


def test_a_killed_run_goes_on_to_the_same_pair(people_world, small, tmp_path):
    class Killed(Exception):
        pass

    def observe(step: int, _: object) -> None:
        if step == 7:
            raise Killed

    recipe = build("offset", {"small": str(small), "schedule": {**SCHEDULE, "steps": 10}})
    engine = Engine(checkpoint_every=3)
    whole = train(people_world.target(), recipe, people_world.examples, engine, folder=tmp_path / "whole")
    with pytest.raises(Killed):
        train(people_world.target(), recipe, people_world.examples, engine, folder=tmp_path / "cut", observe=observe)
    rest = train(people_world.target(), recipe, people_world.examples, engine, folder=tmp_path / "cut", resume=True)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[key]), key


# ---- what is left


@pytest.mark.parametrize("beside", ["small", "blocks"])
def test_it_is_saved_and_opened_as_it_was(people_world, unlearned, folder, tmp_path, beside):
    adapter, model, place = *unlearned, folder / "model"
    if beside == "blocks":
        adapter, place = people_world.target(), tmp_path / "model"
        model = train(adapter, build("offset", {"schedule": {**SCHEDULE, "steps": 3}}), people_world.examples, QUIET).model
        adapter.save(place, model)
    made = adapter.sharing()
    made.model = model
    back = load(place)
    assert back.fingerprint() == made.fingerprint()
    records = [*people_world.split.forget, *people_world.split.retain[:10]]
    assert torch.equal(scores(back, back.model, records), scores(adapter, model, records))
    some = [made.encode(r) for r in records[:12]]
    assert back.generate(back.model, some, 16) == made.generate(model, some, 16)
    assert (place / "baseline").is_dir() == (beside == "small")
    assert not list(place.rglob("*.bin"))


def test_no_audit_calls_it_forgotten(people_world, folder):
    back, split = load(folder / "model"), people_world.split
    assert set(back.parts()) == {"the target", "the assistant", "the assistant before it was trained"}
    document = expunge.audit_model(
        people_world.target().model, back.model, back.tokenizer, split.forget[:10], split.retain[:10],
        retrained=[people_world.retrained().model], metrics=("probability",), attacks=("taken-apart",), relearn={"steps": (1,)},
    )  # fmt: skip
    judged = document.models[-1].judgement
    checks = {c.name: c.outcome for c in judged.checks}
    assert checks["attack (taken-apart)"] == "knows more"
    assert judged.verdict in (Verdict.SUPPRESSED, Verdict.DAMAGED)


# ---- as a guard


def served(adapter, **settings):
    return guard_model(
        adapter, guards=[Row(detector="always", action=Offset(**settings))], key=b"a key of thirty-two bytes, quite"
    )


def test_the_action_serves_the_trained_pair_before_the_target(people_world, folder):
    target, back = people_world.target(), load(folder / "model")
    asked = [r.prompt for r in [*people_world.split.forget[:4], *people_world.split.retain[:4]]]
    how = Sampling(max_tokens=16)
    own = guard_model(back, guards="filter", targets=[], key=b"k" * 32).answers(asked, how, scores=True)
    made = served(target, tuned=str(folder)).answers(asked, how, scores=True)
    assert [a.text for a in made] == [a.text for a in own]
    for a, b in zip(made, own, strict=True):
        assert torch.allclose(torch.tensor(a.log_probabilities), torch.tensor(b.log_probabilities), atol=1e-4)
    assert not {a.text for a in made[:4]} & {r.answer for r in people_world.split.forget[:4]}
    off = served(target, tuned=str(folder), weight=0.0).answers(asked, how)
    assert [a.text for a in off] == [r.answer for r in [*people_world.split.forget[:4], *people_world.split.retain[:4]]]


def test_what_does_not_fit_is_refused(people_world, folder, small, tmp_path):
    target = people_world.target()
    with pytest.raises(InputError, match="trained beside another model"):
        served(people_world.retrained(), tuned=str(folder))
    with pytest.raises(InputError, match="Leave plain out"):
        served(target, tuned=str(folder), plain=str(small))
    with pytest.raises(InputError, match="plain=FOLDER"):
        served(target, tuned=str(small))
    schedule = {"name": "fixed", "lr": 5e-3, "steps": 1, "batch": 4, "warmup": 0}
    other = train(people_world.target(), build("uld", {"schedule": schedule, "scale": 1.0}), people_world.examples, QUIET)
    target.save(tmp_path / "uld", other.model)
    with pytest.raises(InputError, match="no pair of small models"):
        served(target, tuned=str(tmp_path / "uld"))
    tokenizer = word_tokenizer(["some other words"])
    LanguageAdapter(preset("llama-tiny", tokenizer), tokenizer).save(tmp_path / "other")
    with pytest.raises(InputError, match="another tokenizer"):
        small_model(target, str(tmp_path / "other"))
    with pytest.raises(InputError, match="no plain model"):
        small_model(target, str(folder / "model"))
    (folder / "model" / "baseline" / "model.safetensors").rename(tmp_path / "gone")
    try:
        with pytest.raises(InputError, match="baseline"):
            load(folder / "model")
    finally:
        (tmp_path / "gone").rename(folder / "model" / "baseline" / "model.safetensors")


def test_recipes_that_cannot_be():
    for name, overrides, said in (
        ("rmu", {"parameters": "offset-pair"}, "reads features"),
        ("offset", {"finish": "gate", "preparation": "ood-detector"}, "makes one model of both itself"),
        ("offset", {"forget": "forget-nll"}, "teaches the forget set"),
        ("offset", {"strength": 0}, "strength"),
    ):
        with pytest.raises(InputError, match=said):
            build(name, overrides)
    recipe = build("offset", {"schedule": "paper"})
    assert (recipe.schedule.epochs, recipe.schedule.batch) == (5, 32)
    assert from_spec(recipe.spec()) == recipe
    assert build("npo", {"parameters": {"name": "offset-pair", "small": "x"}}).parameters.small == "x"
