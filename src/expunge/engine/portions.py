"""Which examples are seen at which step of a recipe: the one place that says so, for the loop and for what it will cost."""

from __future__ import annotations

import math
from collections.abc import Mapping

from expunge.core.access import Stream
from expunge.data.order import BatchPlan, TurnPlan
from expunge.engine.parts import Recipe
from expunge.engine.schedule import Turns


def portions(recipe: Recipe, sizes: Mapping[Stream, int], seed: int) -> tuple[BatchPlan | TurnPlan, float]:
    """The batches of a recipe by step, and after how many steps the forget terms pause.

    The stream that defines the epoch (:attr:`~expunge.engine.parts.Schedule.epochs_over`; what is trained on, if it is one alone)
    is passed over whole in each; the other one is drawn from in turn.

    Args:
        recipe: with its schedule and the terms of both sides.
        sizes: examples of the forget and of the retain set, of those that it trains on.
        seed: of the order.

    Raises:
        InputError: a set that is trained on is empty.
    """
    schedule = recipe.schedule
    sides = [s for s, terms in ((Stream.FORGET, recipe.forget), (Stream.RETAIN, recipe.retain)) if terms]
    takes_turns = isinstance(schedule, Turns) and len(sides) == 2
    if len(sides) == 2 and schedule.epochs_over is Stream.RETAIN and not takes_turns:
        sides.reverse()
    counts = {str(s): sizes[s] for s in sides or [Stream.RETAIN]}
    kept, first = str(Stream.RETAIN), next(iter(counts))
    batch = {name: min(schedule.batch, n) for name, n in counts.items()}
    if kept in counts and len(sides) == 2:
        batch[kept] = min(schedule.retain_batch or schedule.batch, counts[kept])
    if takes_turns and isinstance(schedule, Turns):
        passes = {str(Stream.FORGET): schedule.erase_epochs, kept: math.ceil(schedule.epochs or 1)}
        return TurnPlan(counts, batch, seed=seed, passes=passes), math.inf
    erase = schedule.total_steps(_steps(counts[first], batch[first]))
    more = schedule.repair_steps(_steps(counts[kept], batch[kept])) if kept in counts else 0
    return BatchPlan(counts, batch, seed=seed, steps=erase + more), erase


def _steps(n: int, batch: int) -> int:
    return -(-n // max(1, batch))
