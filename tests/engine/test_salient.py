"""In each step only the entries with a large gradient move, whatever the optimiser remembers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from expunge.adapters.passes import evaluating
from expunge.core.access import Stream
from expunge.engine.gradient import Salient
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.methods.recipe import build

SCHEDULE = {"name": "fixed", "lr": 1e-2, "steps": 4, "batch": 100, "warmup": 0, "decay": "constant", "weight_decay": 0.1}


@pytest.mark.parametrize("n_std", [-1.0, 0.0, 1.5])
def test_the_threshold_is_mean_and_deviations_over_all_tensors_together(n_std) -> None:
    draw = torch.Generator().manual_seed(0)
    gradient = [torch.randn(7, 5, generator=draw) * 3, torch.randn(11, generator=draw), torch.zeros(4)]
    sizes = torch.cat([g.abs().flatten() for g in gradient]).double()
    threshold = sizes.mean() + n_std * sizes.std()
    masks = Salient(n_std=n_std).entries(gradient)
    assert [m.shape for m in masks] == [g.shape for g in gradient]
    moving = torch.cat([m.flatten() for m in masks])
    assert torch.equal(moving, sizes >= threshold)
    assert 0 < moving.sum() < len(moving)


@pytest.mark.parametrize(("optimizer", "momentum"), [("adamw", 0.9), ("sgd", 0.9), ("sgd", 0.0)])
def test_masked_entries_keep_their_value_bit_for_bit(people_world, optimizer, momentum) -> None:
    """Step by step against the gradient taken by hand; momentum and weight decay are at work."""
    adapter, twin = people_world.fresh(seed=2), people_world.fresh(seed=2)
    recipe = build(
        "custom",
        {
            "forget": "gradascent",
            "gradient": {"name": "salient", "n_std": 1.0},
            "schedule": {**SCHEDULE, "optimizer": optimizer, "momentum": momentum},
        },
    )
    forget = people_world.examples[Stream.FORGET]
    states: list[list[torch.Tensor]] = []
    outcome = train(
        adapter, recipe, {Stream.FORGET: forget}, Engine(),
        observe=lambda _, model: states.append([p.detach().clone() for p in model.parameters()]),
    )  # fmt: skip
    for step, (before, after) in enumerate(pairwise(states)):
        with torch.no_grad():
            for parameter, value in zip(twin.model.parameters(), before, strict=True):
                parameter.copy_(value)
        with evaluating(twin.model):
            losses = twin.forward(twin.model, twin.collate(forget), frozenset({"losses"})).losses
            gradient = torch.autograd.grad(-losses.mean(), list(twin.model.parameters()))
        size = torch.cat([g.abs().flatten() for g in gradient])
        threshold = size.mean() + size.std()
        moved = torch.cat([(a != b).flatten() for a, b in zip(before, after, strict=True)])
        assert not (moved & (size < threshold * 0.999)).any(), "a masked entry moved"
        assert moved[size > threshold * 1.001].float().mean() > 0.99
        seen = size[size >= threshold].norm().item()  # by the optimiser, and by what clips: the rest is 0
        assert outcome.history[step]["gradient_norm"] == pytest.approx(seen, rel=5e-3)
        assert seen < 0.985 * size.norm().item()
        assert outcome.history[step]["moved"] == pytest.approx(moved.float().mean().item(), abs=2e-3)
        assert 0.005 < outcome.history[step]["moved"] < 0.3
    changed = torch.cat([(a != b).flatten() for a, b in zip(states[0], states[-1], strict=True)]).float().mean().item()
    assert changed > outcome.history[0]["moved"], "the mask is made anew in every step"


def test_a_mask_that_lets_all_through_is_the_plain_gradient(people_world) -> None:
    ends = []
    for gradient in ("plain", {"name": "salient", "n_std": -4.0}):
        adapter = people_world.fresh(seed=2)
        recipe = build("custom", {"forget": "gradascent", "gradient": gradient, "schedule": SCHEDULE})
        outcome = train(adapter, recipe, {Stream.FORGET: people_world.examples[Stream.FORGET]}, Engine())
        ends.append([p.detach() for p in outcome.model.parameters()])
    assert outcome.history[0]["moved"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
