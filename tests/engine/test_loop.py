"""The loop: learns, forgets, accumulates exactly, resumes bit for bit, says why it stopped."""

from __future__ import annotations

import math

import pytest
import torch

from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.engine import checkpoint
from expunge.engine.goal import Goal, estimate, shuffled
from expunge.engine.loop import train
from expunge.engine.objective import mean_losses
from expunge.engine.options import Engine
from expunge.engine.parameters import Lora, NamedParameters
from expunge.engine.schedule import Adaptive, Fixed
from expunge.methods.compose import compose
from expunge.methods.recipe import build
from expunge.methods.terms.likelihood import NLL, ForgetNLL
from expunge.methods.terms.preference import NPO


def weights(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def goal_of(world, adapter) -> Goal:
    def losses(records):
        return mean_losses(adapter, adapter.model, [adapter.encode(r) for r in records], 8192)

    return estimate(losses, world.split.holdout.records, world.split.retain.records, seed=0)


def test_adaptive_npo_reaches_the_goal_and_keeps_the_rest(people_world) -> None:
    adapter = people_world.target()
    goal = goal_of(people_world, adapter)
    outcome = train(adapter, build("npo", {}), people_world.examples, Engine(), goal=goal)
    assert outcome.reason == "goal"
    assert people_world.loss(adapter, people_world.split.forget) >= 0.95 * goal.loss
    assert people_world.loss(adapter, people_world.split.forget) <= 2 * goal.loss, "forgetting overshot"
    assert people_world.loss(adapter, people_world.split.retain) <= 0.3
    assert outcome.steps < 200
    assert "Goal reached" in outcome.sentence
    assert outcome.rate_test, "no range test was made"


def test_flipped_forget_term_does_not_forget(people_world) -> None:
    """The sign matters: descending on the forget answers leaves them known."""
    adapter = people_world.target()
    recipe = compose("custom", forget=[ForgetNLL()], retain=[NLL()], schedule=Adaptive(steps=40, epochs=1))
    outcome = train(adapter, recipe, people_world.examples, Engine(), goal=goal_of(people_world, adapter))
    assert outcome.reason in {"budget", "utility"}
    assert not outcome.reached
    assert people_world.loss(adapter, people_world.split.forget) < 0.1
    assert "Try" in outcome.sentence


def test_utility_bound_stops_a_method_without_a_retain_term(people_world) -> None:
    adapter = people_world.target()
    before = people_world.loss(adapter, people_world.split.retain)
    outcome = train(adapter, build("gradascent", {}), people_world.examples, Engine(), goal=goal_of(people_world, adapter))
    assert outcome.reason == "utility"
    assert people_world.loss(adapter, people_world.split.retain) - before <= 0.2, (
        "the last weights within the bound were not kept"
    )


@pytest.mark.parametrize("gradient", ["plain", "project"])
def test_accumulation_equals_the_large_batch(people_world, gradient) -> None:
    """Many small forward passes give the step of one large one: token-weighted means over the whole step."""
    ends = []
    for max_tokens in (64, 100_000):
        adapter = people_world.fresh(seed=3)
        recipe = build(
            "npo", {"gradient": gradient, "schedule": {"name": "fixed", "lr": 1e-3, "steps": 3, "warmup": 0, "batch": 12}}
        )
        train(adapter, recipe, people_world.examples, Engine(max_tokens=max_tokens))
        ends.append(weights(adapter.model))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=0, atol=3e-5, msg=name)
    assert any(not torch.equal(value, people_world.fresh(seed=3).model.get_parameter(n)) for n, value in ends[0].items())


def test_a_step_is_the_gradient_of_the_declared_loss(people_world) -> None:
    """One plain step of the loop against the gradient computed by hand from transformers' own loss."""
    lr, adapter, twin = 1e-3, people_world.fresh(seed=4), people_world.fresh(seed=4)
    recipe = build(
        "graddiff",
        {"schedule": {"name": "fixed", "lr": lr, "steps": 1, "warmup": 0, "batch": 4, "clip": None, "weight_decay": 0}},
    )
    chosen = {s: v[:4] for s, v in people_world.examples.items() if s is not Stream.ALTERNATIVE}
    train(adapter, recipe, chosen, Engine())
    total = torch.zeros(())
    for sign, stream in ((-1, Stream.FORGET), (1, Stream.RETAIN)):
        losses = []
        for example in chosen[stream]:
            ids = torch.tensor(example.data.ids.astype("int64"))[None]
            logits = twin.model(ids).logits[0, example.data.start - 1 : -1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, example.data.start :], reduction="none"))
        total = total + sign * torch.cat(losses).mean()
    optimizer = torch.optim.AdamW(twin.model.parameters(), lr=lr, weight_decay=0)
    total.backward()
    optimizer.step()
    for name, value in weights(adapter.model).items():
        torch.testing.assert_close(value, twin.model.get_parameter(name), rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("kind", ["adaptive", "fixed"])
def test_resume_after_a_kill_is_bit_equal(people_world, tmp_path, kind) -> None:
    schedule = (
        {"name": "fixed", "lr": 3e-4, "steps": 12, "batch": 8}
        if kind == "fixed"
        else {"name": "adaptive", "steps": 12, "epochs": 1}
    )
    recipe, engine = build("npo", {"schedule": schedule}), Engine(checkpoint_every=4)

    class Killed(Exception):
        pass

    def run(folder, observe=None, resume=False):
        adapter = people_world.target()
        goal = Goal(loss=50.0, source="holdout", examples=1)
        return train(adapter, recipe, people_world.examples, engine, goal=goal, folder=folder, observe=observe, resume=resume)

    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = run(tmp_path / "whole")

    def kill(step, model):
        if step == 10:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "killed", observe=kill)
    steps = []
    resumed = run(tmp_path / "killed", observe=lambda step, _: steps.append(step), resume=True)
    assert steps[0] == 9, "it did not go on from the checkpoint at step 8"
    assert resumed.lr == whole.lr
    assert (tmp_path / "whole" / "log.jsonl").read_text() == (tmp_path / "killed" / "log.jsonl").read_text()
    for name, value in weights(whole.model).items():
        assert torch.equal(value, resumed.model.get_parameter(name)), name


def test_same_seed_same_weights_other_seed_other(people_world) -> None:
    def run(seed):
        adapter = people_world.target()
        recipe = build("simnpo", {"schedule": {"name": "fixed", "lr": 1e-3, "steps": 4, "batch": 4}})
        train(adapter, recipe, people_world.examples, Engine(seed=seed))
        return torch.cat([p.flatten() for p in adapter.model.parameters()])

    assert torch.equal(run(5), run(5))
    assert not torch.equal(run(5), run(6))


def test_not_finite_keeps_the_last_good_weights(people_world) -> None:
    adapter = people_world.target()
    before = weights(adapter.model)
    recipe = build("gradascent", {"schedule": {"name": "fixed", "lr": 1e30, "steps": 5, "warmup": 0, "clip": None}})
    outcome = train(adapter, recipe, people_world.examples, Engine())
    assert outcome.reason == "diverged"
    assert all(torch.isfinite(p).all() for p in adapter.model.parameters())
    for name, value in before.items():
        assert torch.equal(value, adapter.model.get_parameter(name))


def test_named_parameters_move_and_no_other(people_world) -> None:
    adapter = people_world.target()
    before = weights(adapter.model)
    recipe = compose(
        "custom", forget=[NPO()], retain=[NLL()], parameters=NamedParameters(patterns=("down_proj",)),
        schedule=Fixed(lr=1e-3, steps=2, warmup=0, batch=4),
    )  # fmt: skip
    train(adapter, recipe, people_world.examples, Engine())
    for name, value in before.items():
        assert torch.equal(value, adapter.model.get_parameter(name)) == ("down_proj" not in name), name


def test_saliency_mask_freezes_the_rest_bit_for_bit(people_world) -> None:
    adapter, target = people_world.target(), people_world.target()
    recipe = build(
        "npo",
        {
            "parameters": {"name": "mask", "density": 0.2},
            "schedule": {"name": "fixed", "lr": 1e-3, "steps": 8, "weight_decay": 0.1},
        },
    )
    train(adapter, recipe, people_world.examples, Engine())
    moved = (
        torch.cat([(p != target.model.get_parameter(n)).flatten() for n, p in adapter.model.named_parameters()]).float().mean()
    )
    assert 0.15 < moved <= 0.21, f"{moved:.3f} of the entries moved"
    assert people_world.loss(adapter, people_world.split.forget) > people_world.loss(target, people_world.split.forget) + 0.01


def test_mask_picks_the_entries_with_the_largest_forget_gradient(people_world) -> None:
    adapter, twin = people_world.target(), people_world.target()
    recipe = build(
        "gradascent",
        {"parameters": {"name": "mask", "density": 0.1}, "schedule": {"name": "fixed", "lr": 1e-4, "steps": 1, "warmup": 0}},
    )
    train(adapter, recipe, people_world.examples, Engine())
    examples = people_world.examples[Stream.FORGET]
    batch = twin.collate(examples)
    twin.forward(twin.model, batch, frozenset({"losses"})).losses.mean().backward()
    size = torch.cat([p.grad.abs().flatten() for p in twin.model.parameters()])
    moved = torch.cat([(p != q).flatten() for p, q in zip(adapter.model.parameters(), twin.model.parameters(), strict=True)])
    assert size[moved].min() >= size.kthvalue(int(0.88 * size.numel())).values
    assert moved.float().mean() > 0.08


def test_lora_with_the_adapter_off_is_the_target(people_world) -> None:
    adapter, target = people_world.target(), people_world.target()
    recipe = build(
        "undial",
        {
            "retain": "kl",
            "parameters": {"name": "lora", "rank": 4},
            "schedule": {"name": "fixed", "lr": 1e-2, "steps": 12, "batch": 8},
        },
    )
    outcome = train(adapter, recipe, people_world.examples, Engine())
    assert isinstance(recipe.parameters, Lora)
    with outcome.model.disable_adapter():
        off = people_world.loss(adapter, people_world.split.forget, outcome.model)
    assert math.isclose(off, people_world.loss(target, people_world.split.forget), rel_tol=1e-5)
    assert people_world.loss(adapter, people_world.split.forget, outcome.model) > off + 0.01


def test_gradient_checkpointing_changes_nothing(people_world) -> None:
    ends = []
    for checkpointing in (False, True):
        adapter = people_world.target()
        recipe = build("npo", {"schedule": {"name": "fixed", "lr": 1e-3, "steps": 2, "batch": 4}})
        train(adapter, recipe, people_world.examples, Engine(gradient_checkpointing=checkpointing))
        ends.append(weights(adapter.model))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=0, atol=2e-5)  # a step moves a weight by up to 1e-3


def test_bfloat16_runs_and_forgets(people_world) -> None:
    adapter = people_world.target()
    recipe = build("npo", {"schedule": {"name": "fixed", "lr": 1e-3, "steps": 30, "batch": 8}})
    train(adapter, recipe, people_world.examples, Engine(precision="bfloat16"))
    assert people_world.loss(adapter, people_world.split.forget) > 1.0


def test_task_vector_negation_finds_its_scale(people_world) -> None:
    adapter = people_world.target()
    before = people_world.loss(adapter, people_world.split.forget)
    outcome = train(adapter, build("task-vector", {}), people_world.examples, Engine(), goal=goal_of(people_world, adapter))
    assert people_world.loss(adapter, people_world.split.forget) > before + 0.2
    assert outcome.retain_loss is not None
    assert outcome.retain_loss < 0.2


def test_missing_streams_are_named(people_world) -> None:
    adapter = people_world.target()
    with pytest.raises(InputError, match="retain examples"):
        train(adapter, build("npo", {}), {Stream.FORGET: people_world.examples[Stream.FORGET]}, Engine())


def test_shuffled_answers_come_from_other_people(people_world) -> None:
    records = people_world.split.retain.records
    by_answer = {r.answer: r.cluster for r in records}
    made = shuffled(records, seed=0)
    assert len(made) > 50
    originals = {r.id + "#shuffled": r for r in records}
    assert all(by_answer[m.answer] != originals[m.id].cluster for m in made)
    target = people_world.target()
    assert people_world.loss(target, made) > 1.0, "answers of other people do not look unseen"


def test_checkpoint_round_trip(tmp_path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint.save(
        tmp_path / "c",
        "process-0",
        weights=checkpoint.snapshot(model),
        good=checkpoint.snapshot(model),
        optimizer=optimizer.state_dict(),
        state={"step": 3},
    )
    held = checkpoint.load(tmp_path / "c", "process-0")
    assert held is not None
    assert held.state == {"step": 3}
    other = torch.nn.Linear(3, 2)
    checkpoint.restore(other, held.weights)
    assert torch.equal(other.weight, model.weight)
    assert checkpoint.load(tmp_path / "none", "process-0") is None
