"""Which examples a recipe sees at which step, against brute force, and that its price is counted from the same plan."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from expunge.adapters.base import Example
from expunge.core.access import Stream
from expunge.engine.portions import portions
from expunge.methods.recipe import build
from expunge.pipeline.cost import estimate

SIZES = {Stream.FORGET: 10, Stream.RETAIN: 37}


def planned(method: str, **schedule: object):
    recipe = build(method, {"schedule": schedule} if schedule else {"schedule": "paper"})
    plan, erase = portions(recipe, SIZES, 3)
    return recipe, plan, erase


def test_epochs_over_the_retain_set_see_each_retain_row_once_and_repeat_the_forget_set() -> None:
    _, plan, _ = planned("neggrad-plus", name="fixed", epochs=2, over="retain", batch=4, retain_batch=8, lr=1e-3)
    assert plan.steps == 2 * math.ceil(37 / 8)
    steps = [plan.plan(i) for i in range(plan.steps)]
    first = Counter(i for step in steps[: plan.steps // 2] for i in step["retain"])
    assert first == Counter(range(37))
    assert {len(step["forget"]) for step in steps} == {4}
    seen = Counter(i for step in steps for i in step["forget"])
    assert set(seen) == set(range(10))
    assert max(seen.values()) - min(seen.values()) <= 1


def test_epochs_over_the_forget_set_are_what_is_asked_for_by_nobody() -> None:
    _, plan, _ = planned("neggrad-plus", name="fixed", epochs=2, batch=4, retain_batch=8, lr=1e-3)
    assert plan.steps == 2 * math.ceil(10 / 4)
    assert Counter(i for step in range(3) for i in plan.plan(step)["forget"]) == Counter(range(10))


@pytest.mark.parametrize(("name", "passes"), [("salun", 10), ("random-label", 3), ("concept-poison", 3)])
def test_published_relabelling_passes_over_all_rows_in_every_epoch(name: str, passes: int) -> None:
    _, plan, _ = planned(name)
    found = {s: Counter(i for step in range(plan.steps) for i in plan.plan(step).get(s, ())) for s in ("forget", "retain")}
    assert found == {"forget": Counter(dict.fromkeys(range(10), passes)), "retain": Counter(dict.fromkeys(range(37), passes))}


def test_published_neggrad_plus_passes_over_the_retain_set() -> None:
    recipe, plan, _ = planned("neggrad-plus")
    assert plan.steps == 5 * math.ceil(37 / 32)
    assert recipe.schedule.clip is None


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("scrub", {"name": "turns", "lr": 1e-3, "epochs": 3, "erase_epochs": 2, "batch": 3, "retain_batch": 5}),
        ("unsir", {"name": "repair", "lr": 1e-3, "epochs": 2, "repair_epochs": 3, "batch": 4}),
        ("neggrad-plus", {"name": "fixed", "lr": 1e-3, "epochs": 2, "over": "retain", "batch": 4, "retain_batch": 8}),
        ("finetune", {"name": "fixed", "lr": 1e-3, "epochs": 2, "batch": 4}),
        ("gradascent", {"name": "fixed", "lr": 1e-3, "steps": 7, "epochs": None, "batch": 4}),
    ],
)
def test_the_price_is_that_of_the_plan(name: str, schedule: dict[str, object]) -> None:
    recipe, plan, _ = planned(name, **schedule)
    sizes = {Stream.FORGET: 2, Stream.RETAIN: 3}
    held = {s: [Example(f"{s}{i}", "", 1, sizes[s], None) for i in range(n)] for s, n in SIZES.items()}
    cost = estimate(recipe, held, 1, 0, 0)
    tokens = sum(sizes[Stream(s)] * len(rows) for i in range(plan.steps) for s, rows in plan.plan(i).items())
    assert (cost.steps, cost.tokens) == (plan.steps, tokens)
