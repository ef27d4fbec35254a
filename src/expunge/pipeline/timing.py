"""How long a method will take on this machine: a few of its own steps, timed on a copy of the model and on the request's data.

A recipe runs as it would, its preparation and the cache of its reference included, until a few steps are done. What came before
the first step is paid once, a step as often as there are steps. An edit runs on two parts of the records; its time is taken to
grow with the tokens that it reads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from scipy import special
from torch import nn

from expunge.adapters.base import Example
from expunge.core.errors import InputError
from expunge.engine.edit import Edit, apply_edit
from expunge.engine.loop import train
from expunge.engine.outcome import Progress
from expunge.engine.parts import Recipe
from expunge.engine.schedule import Adaptive
from expunge.pipeline.guarding import Shield
from expunge.pipeline.models import check_memory
from expunge.pipeline.unlearn import UnlearnPlan, goal_of

STEPS = 8  #: steps that are timed, after one that warms up
LIMIT = 120.0  #: seconds after which a method that has not come to its first steps is given up
PARTS = (16, 48)  #: records of each set that an edit is timed on
LEVEL = 0.95
_STILL = 1e-12  #: a learning rate at which nothing moves, so that no step depends on how many came before

Kind = Literal["steps", "parts", "whole", "unfinished"]


@dataclass(frozen=True)
class Seconds:
    """An estimate of wall time.

    Attributes:
        value: seconds; of a schedule that may stop early, for all its steps.
        low, high: an interval; none where it ran as a whole, or did not come to its steps.
        how: ``steps``: extrapolated from steps; ``parts``: from parts of the records; ``whole``: it ran as a whole;
            ``unfinished``: it had not come to its steps when it was given up, and takes longer than this.
        once: seconds of what is done once, before the first step.
        step: seconds of a step; 0 without steps.
        timed: how many steps were timed.
        at_most: whether the method may stop before all its steps are done.
        memory: peak bytes on the accelerator; none without one.
    """

    value: float
    low: float | None
    high: float | None
    how: Kind
    once: float
    step: float
    timed: int
    at_most: bool
    memory: int | None = None

    def json(self) -> dict[str, Any]:
        """A plain mapping."""
        return {**asdict(self), "level": LEVEL}

    def text(self) -> str:
        """For a table."""
        if self.how == "unfinished":
            return f"over {spell(self.value)}"
        found = spell(self.value)
        if self.low is not None and self.high is not None and spell(self.low) != spell(self.high):
            found = f"{spell(self.low)} to {spell(self.high)}"
        return f"at most {found}" if self.at_most else found


def spell(seconds: float) -> str:
    """A duration for people: two significant digits, in s, min or h."""
    for size, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{_two(seconds / size)} {name}"
    return f"{_two(seconds)} s"


def _two(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


class _Enough(Exception):
    """Raised inside training once enough was seen."""


def timed(made: UnlearnPlan, progress: Progress | None = None) -> Seconds:
    """Time a planned run on a copy of its model; the model itself is left as it is.

    Args:
        made: the plan.
        progress: called as it goes on; raised out of where it takes too long.

    Raises:
        InputError: a second copy of the model does not fit into memory, or the method refuses the data.
    """
    weights = sum(p.numel() * p.element_size() for p in made.adapter.model.parameters())
    check_memory(made.cost.memory + weights, "Timing it on a copy of the model")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if isinstance(made.recipe, Shield):
        raise InputError("A guard has no steps that could be timed.", "Leave it out.")
    found = _edit(made, made.recipe, progress) if isinstance(made.recipe, Edit) else _recipe(made, made.recipe, progress)
    return replace(found, memory=torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else found


def _recipe(made: UnlearnPlan, recipe: Recipe, progress: Progress | None) -> Seconds:
    at_most = isinstance(recipe.schedule, Adaptive) or recipe.control is not None or getattr(recipe.schedule, "limit", None)
    still = recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"lr": _STILL})})
    held = replace(made, adapter=made.adapter.copy(), recipe=still)
    begun = time.perf_counter()
    marks: list[float] = []

    def observe(done: int, _model: nn.Module) -> None:
        marks.append(time.perf_counter())
        if done > STEPS:
            raise _Enough

    def tell(done: int, total: int, text: str) -> None:
        if progress is not None:
            progress(min(len(marks), STEPS), STEPS, f"timing {recipe.name}: {text}")
        if len(marks) < 3 and time.perf_counter() - begun > LIMIT:
            raise _Enough

    with suppress(_Enough):  # raised above, once enough was seen
        goal = goal_of(held)
        origin = held.began.origin if held.began else None
        train(held.adapter, still, held.examples, held.engine, goal=goal, origin=origin, observe=observe, progress=tell)
    spent = time.perf_counter() - begun
    if len(marks) < 3:
        return Seconds(spent, None, None, "unfinished" if spent > LIMIT else "whole", spent, 0.0, 0, bool(at_most))
    durations = np.diff(marks)
    once = marks[0] - begun + max(0.0, durations[0] - float(np.median(durations[1:])))
    return extrapolated(once, durations[1:].tolist(), made.cost.steps, at_most=bool(at_most))


def extrapolated(once: float, durations: Sequence[float], steps: int, *, at_most: bool = False) -> Seconds:
    """``once + steps * mean`` with Student's interval of the mean step.

    Args:
        once: seconds before the first step.
        durations: of timed steps, at least one.
        steps: how many there will be.
        at_most: whether there may be fewer.
    """
    values = np.asarray(durations, dtype=np.float64)
    mean, count = float(values.mean()), len(values)
    half = float(special.stdtrit(count - 1, (1 + LEVEL) / 2) * values.std(ddof=1) / math.sqrt(count)) if count > 1 else mean
    low, high = (once + steps * max(0.0, mean + sign * half) for sign in (-1, 1))
    return Seconds(once + steps * mean, low, high, "steps", once, mean, count, at_most)


def _edit(made: UnlearnPlan, edit: Edit, progress: Progress | None) -> Seconds:
    """Two parts, each twice, or all of a small request."""
    sizes: list[int] = []
    spent: list[list[float]] = []
    whole = sum(e.size for s in edit.streams for e in made.examples[s])
    for number, part in enumerate(PARTS):
        examples = {s: _spread(held, part) for s, held in made.examples.items()}
        if sizes and sum(e.size for s in edit.streams for e in examples[s]) == sizes[0]:
            break
        sizes.append(sum(e.size for s in edit.streams for e in examples[s]))
        spent.append([])
        for _ in range(2):
            if progress is not None:
                progress(number, len(PARTS), f"timing {edit.name}")
            adapter = made.adapter.copy()
            begun = time.perf_counter()
            apply_edit(adapter, edit, examples, made.engine)
            spent[-1].append(time.perf_counter() - begun)
    return from_parts(sizes, spent, whole)


def from_parts(sizes: Sequence[int], spent: Sequence[Sequence[float]], whole: int) -> Seconds:
    """A line through what two parts took; its interval by the fastest and slowest run of each.

    Args:
        sizes: tokens of one or two parts, ascending.
        spent: seconds of the runs on each part.
        whole: tokens of all.
    """
    last = float(np.mean(spent[-1]))
    if sizes[-1] >= whole or len(sizes) == 1:
        return Seconds(last, min(spent[-1]), max(spent[-1]), "whole", last, 0.0, 0, False)
    wide, ahead = sizes[1] - sizes[0], whole - sizes[1]

    def reach(first: float, second: float) -> float:
        return second + max(0.0, second - first) / wide * ahead

    low = reach(max(spent[0]), min(spent[1]))
    high = reach(min(spent[0]), max(spent[1]))
    return Seconds(reach(float(np.mean(spent[0])), last), low, high, "parts", 0.0, 0.0, 0, False)


def _spread(held: Sequence[Example], count: int) -> list[Example]:
    """So many examples, evenly spread."""
    if len(held) <= count:
        return list(held)
    return [held[int(i)] for i in np.linspace(0, len(held) - 1, count).round()]


def time_of(made: UnlearnPlan, progress: Progress | None = None) -> tuple[Seconds | None, str]:
    """The time, or why it is not known."""
    try:
        return timed(made, progress), ""
    except InputError as error:
        return None, f"{error.message} {error.remedy}".strip()
