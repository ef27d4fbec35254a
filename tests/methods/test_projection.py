"""Geometric-disentanglement updates: orthogonal to what is kept, in the metric of the optimiser, on real models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.engine.gradient import ConflictProject, Project, project_off
from expunge.engine.loop import train
from expunge.engine.moving import Moving
from expunge.engine.objective import mean_losses
from expunge.engine.options import Engine
from expunge.methods.recipe import build

QUIET = Engine(checkpoint_every=0)
SHAPES = [(3, 4), (7,), (2, 2, 2)]
STEP = {"name": "fixed", "steps": 1, "warmup": 0, "decay": "constant", "weight_decay": 0, "clip": None, "momentum": 0}


def draw(seed: int, count: int) -> list[list[torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=g, dtype=torch.float64) for s in SHAPES] for _ in range(count)]


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


@given(seed=st.integers(0, 10_000), rank=st.integers(1, 6), weighed=st.booleans())
@settings(max_examples=40, deadline=None)
def test_projection_off_several_directions_is_the_least_squares_residual(seed: int, rank: int, weighed: bool) -> None:
    vector, *directions = draw(seed, rank + 1)
    directions.append([2 * t for t in directions[0]])  # dependent ones must do no harm
    directions.append([0 * t for t in directions[0]])
    metric = [t.exp() for t in draw(seed + 1, 1)[0]] if weighed else None
    found = flat(project_off(vector, directions, metric))
    root = torch.ones(27, dtype=torch.float64) if metric is None else flat(metric).sqrt()
    basis = torch.stack([flat(d) for d in directions[:rank]], 1) * root[:, None]
    q, _ = torch.linalg.qr(basis)
    whitened = flat(vector) * root
    torch.testing.assert_close(found, (whitened - q @ (q.T @ whitened)) / root, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("scope", ["all", "tensor"])
def test_the_basis_holds_the_retain_gradients_of_the_last_steps_and_drops_the_oldest(scope) -> None:
    rule, state = Project(directions=3, scope=scope), {}
    forgets, retains = draw(1, 6), draw(2, 6)
    for forget, retain in zip(forgets, retains, strict=True):
        made = rule.combine(forget, retain, state)
    alone = [m - r for m, r in zip(made, retains[-1], strict=True)]

    def across(step: int) -> float:
        if scope == "all":
            return abs(float(flat(alone) @ flat(retains[step])))
        return max(abs(float((a * r).sum())) for a, r in zip(alone, retains[step], strict=True))

    assert max(across(s) for s in (3, 4, 5)) < 1e-9
    assert across(2) > 1e-3
    assert len(state["recent"]) == 2
    assert float(flat(alone) @ flat(forgets[-1])) > 0  # it still forgets


def test_surgery_on_conflict_is_a_case_of_the_projection() -> None:
    assert ConflictProject().model_dump() == Project(when="conflict", geometry="plain").model_dump()
    g_f, g_r = draw(3, 2)
    for sign in (1, -1):
        retain = [sign * r for r in g_r]
        made = ConflictProject().combine(g_f, retain, {})
        expected = Project(geometry="plain").combine(g_f, retain, {})
        if float(flat(g_f) @ flat(retain)) >= 0:
            expected = [f + r for f, r in zip(g_f, retain, strict=True)]
        assert all(torch.equal(m, e) for m, e in zip(made, expected, strict=True))


def doubled(people_world):
    adapter = people_world.target()
    adapter.model.double()
    return adapter


def few(people_world) -> dict[Stream, list]:
    """Some retain examples that the target has not learnt to the last digit: their gradient must be one."""
    held = people_world.encode(people_world.split.holdout[:12])
    return {Stream.FORGET: people_world.examples[Stream.FORGET][:6], Stream.RETAIN: held}


def change(people_world, lr: float, optimizer: str, parameters="all", **gradient) -> float:
    """By how much one step changes the retain loss of its own batch, if retain terms count for their direction alone."""
    adapter, examples = doubled(people_world), few(people_world)

    def loss() -> float:
        # The mean over all targets, which is what the step's retain term is.
        batch = adapter.collate(examples[Stream.RETAIN])
        with torch.no_grad():
            return float(adapter.forward(adapter.model, batch, frozenset({"losses"})).losses.mean())

    before = loss()
    schedule = {**STEP, "lr": lr, "batch": 6, "retain_batch": 12, "optimizer": optimizer}
    overrides = {
        "retain.weight": 1e-12,
        "gradient": {"name": "project", "geometry": "optimizer", **gradient},
        "schedule": schedule,
    }
    overrides["parameters"] = parameters
    train(adapter, build("graddiff", overrides), examples, QUIET)
    return abs(loss() - before)


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.3), ("adamw", 2e-4)])
@pytest.mark.parametrize("scope", ["all", "tensor"])
def test_a_projected_step_changes_the_retain_loss_in_second_order_only(people_world, optimizer, lr, scope) -> None:
    ratio = change(people_world, lr, optimizer, scope=scope) / change(people_world, lr / 2, optimizer, scope=scope)
    assert ratio == pytest.approx(4, rel=0.05)


def test_adamw_without_its_metric_and_a_rule_that_does_nothing_change_it_in_first_order(people_world) -> None:
    for gradient in ({"geometry": "plain"}, {"tensors": ["norm"]}):
        ratio = change(people_world, 2e-5, "adamw", **gradient) / change(people_world, 1e-5, "adamw", **gradient)
        assert ratio == pytest.approx(2, rel=0.1)


def test_the_metric_is_that_of_the_step_which_adamw_takes() -> None:
    g = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64)) for s in SHAPES]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, betas=(0.0, 0.99), weight_decay=0)
    moving = Moving(("a", "b", "c"), optimizer, tuple(parameters), clip=1.0)
    for seed in range(4):
        forget, retain = draw(10 + seed, 2)
        made = Project(geometry="optimizer").combine(forget, retain, {}, moving)
        metric = moving.scales(made)
        before = [p.detach().clone() for p in parameters]
        for p, value in zip(parameters, made, strict=True):
            p.grad = value.clone()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        clipped = flat(p.grad for p in parameters)
        optimizer.step()
        moved = flat(b - p.detach() for b, p in zip(before, parameters, strict=True))
        torch.testing.assert_close(moved, 0.1 * flat(metric).double() * clipped, rtol=1e-4, atol=1e-7)
        ours = flat(m - r for m, r in zip(made, retain, strict=True)) * flat(metric).double()
        assert abs(float(ours @ flat(retain))) < 1e-5 * float(ours.norm() * flat(retain).norm())


def test_it_keeps_more_than_bare_ascent_at_the_same_forgetting(people_world) -> None:
    kept = {}
    for name, gradient in (
        ("plain", "plain"),
        ("project", {"name": "project", "geometry": "optimizer", "directions": 4, "scope": "tensor"}),
    ):
        adapter = people_world.target()
        examples = people_world.examples

        class Done(Exception):
            pass

        def look(step, model, adapter=adapter, examples=examples) -> None:
            if step and sum(mean_losses(adapter, model, examples[Stream.FORGET], 8192)) / len(examples[Stream.FORGET]) > 3:
                raise Done

        schedule = {**STEP, "lr": 1e-4, "steps": 60, "batch": 16, "retain_batch": 32}
        overrides = {"retain.weight": 1e-9, "gradient": gradient, "schedule": schedule}
        with pytest.raises(Done):
            train(adapter, build("graddiff", overrides), examples, QUIET, observe=look)
        kept[name] = people_world.loss(adapter, people_world.split.retain)
    assert all(v > 0.05 for v in kept.values()), kept
    assert kept["project"] < 0.7 * kept["plain"]


def test_the_run_says_when_the_step_is_not_exact_or_refuses(people_world) -> None:
    schedule = {"name": "fixed", "lr": 1e-5, "steps": 1, "batch": 4}
    adapter = people_world.target()
    outcome = train(
        adapter,
        build("npo", {"gradient": {"name": "project", "geometry": "optimizer"}, "schedule": schedule}),
        people_world.examples,
        QUIET,
    )
    assert "0.9 of earlier steps (momentum) and weight decay of 0.01" in outcome.notes[0]
    exact = {"gradient": {"name": "project", "geometry": "optimizer", "exact": True}, "schedule": schedule}
    with pytest.raises(InputError, match=r"Set schedule\.momentum=0"):
        train(people_world.target(), build("npo", exact), people_world.examples, QUIET)
    exact["schedule"] = {**schedule, "momentum": 0, "weight_decay": 0}
    assert train(people_world.target(), build("npo", exact), people_world.examples, QUIET).notes == []
    wrong = {"gradient": {"name": "project", "tensors": ["layer9"]}, "schedule": schedule}
    with pytest.raises(InputError, match=r"finds no moving tensor called layer9.*Some that move: layers"):
        train(people_world.target(), build("npo", wrong), people_world.examples, QUIET)


def test_what_a_mask_holds_still_does_not_count_in_the_projection(people_world) -> None:
    masked = {"parameters": {"name": "mask", "density": 0.2}}
    ratio = change(people_world, 2e-4, "adamw", **masked) / change(people_world, 1e-4, "adamw", **masked)
    assert ratio == pytest.approx(4, rel=0.05)


def test_a_run_that_goes_on_after_a_kill_has_the_same_basis(people_world, tmp_path) -> None:
    schedule = {"name": "fixed", "lr": 1e-3, "steps": 6, "batch": 6, "warmup": 0}
    recipe = build("npo", {"gradient": {"name": "project", "geometry": "optimizer", "directions": 4}, "schedule": schedule})
    engine = Engine(checkpoint_every=3)
    whole = people_world.target()
    train(whole, recipe, people_world.examples, engine, folder=tmp_path)

    class Killed(Exception):
        pass

    def kill(step, _model) -> None:
        if step == 4:
            raise Killed

    folder = tmp_path / "killed"
    folder.mkdir()
    with pytest.raises(Killed):
        train(people_world.target(), recipe, people_world.examples, engine, folder=folder, observe=kill)
    resumed = people_world.target()
    train(resumed, recipe, people_world.examples, engine, folder=folder, resume=True)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
