"""Unlearn rows of a table from a classifier or a regressor that is held in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from expunge.adapters.base import Example
from expunge.adapters.supervised import ClassifierAdapter, RegressionAdapter, SupervisedAdapter
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.core.settings import nest
from expunge.data.rows import Indices, Table
from expunge.engine.edit import Edit, apply_edit
from expunge.engine.goal import Goal
from expunge.engine.loop import Outcome, Progress, train
from expunge.engine.objective import mean_losses
from expunge.engine.options import Engine
from expunge.engine.parts import Recipe
from expunge.engine.schedule import Adaptive
from expunge.methods.alternatives import alternatives, kind_for
from expunge.methods.catalogue import serves
from expunge.methods.edits.registry import EDITS
from expunge.methods.prepared.registry import refuse_prepared
from expunge.methods.recipe import build

_GOAL_ROWS = 128  #: unseen rows that the goal is estimated on, at most


@dataclass
class RowPlan:
    """A request on rows that has passed every check and has not begun.

    Attributes:
        adapter: holds the target model.
        method: the recipe or edit.
        examples: by stream.
        goal: the loss at which the forget rows count as forgotten; none where no schedule looks for it.
        engine: how to use the machine.
        notes: what a report must say, one sentence each.
    """

    adapter: SupervisedAdapter
    method: Recipe | Edit
    examples: dict[Stream, list[Example]]
    goal: Goal | None
    engine: Engine
    notes: list[str]


def open_rows(
    model: Any, data: Table, *, loss: Literal["l1", "mse"], layers: Sequence[str] | None, dropout: bool
) -> SupervisedAdapter:
    """The adapter for a model and the task of its table, tried on one row.

    Raises:
        InputError: the model's output does not match the labels.
    """
    adapter: SupervisedAdapter
    if data.task == "classification":
        adapter = ClassifierAdapter(model, data.classes, layers=layers, dropout=dropout)
    else:
        adapter = RegressionAdapter(model, loss, layers=layers, dropout=dropout)
    mean_losses(adapter, model, [adapter.encode(data.rows([0])[0])], 1)
    return adapter


def plan_rows(
    adapter: SupervisedAdapter,
    data: Table,
    chosen: Indices,
    method: str,
    *,
    parts: Mapping[str, Any],
    engine: Engine,
    holdout: Table | None = None,
    how: str = "auto",
    allow_overlap: bool = False,
    allow_large_forget: bool = False,
) -> RowPlan:
    """Check a request on rows and put its run together; nothing is changed.

    Args:
        adapter: holds the target model.
        data: all rows that it was trained on.
        chosen: indices of those to forget.
        method: name of a method or an edit, or ``custom``.
        parts: what differs from the method's own parts.
        engine: how to use the machine.
        holdout: rows never trained on; they tell when to stop.
        how: which other classes take the place of the own one, for methods that teach such.
        allow_overlap: go on although equal rows are to be forgotten and to be kept.
        allow_large_forget: go on although there is more to forget than to keep.

    Raises:
        InputError: the method does not fit the model, the sets do not fit each other, or nothing says when to stop.
    """
    refuse_prepared(method)
    forget, retain = data.rows(chosen, "forget"), data.rows(data.others(chosen), "retain")
    if len(forget) > len(retain) and not allow_large_forget:
        raise InputError(
            f"There are {len(forget)} rows to forget and {len(retain)} to keep.",
            "Check the choice, or give allow_large_forget=True.",
        )
    notes = [f"Of the class {name!r} no row is left: it is forgotten as a whole." for name in data.emptied(chosen)]
    same = _equal_rows(data, chosen)
    if same:
        sentence = f"{same} of the {len(forget)} rows to forget equal a row to keep (inputs and target)."
        if not allow_overlap:
            raise InputError(sentence, "Forget all copies, or give allow_overlap=True.")
        notes.append(sentence)
    ok, missing = (True, ()) if method == "custom" else serves(method, adapter.offers)
    if not ok:
        raise InputError(
            f"The method {method!r} needs {', '.join(missing)}, which a model for {adapter.modality} does not offer.",
            "See `expunge methods --matrix` for those that run.",
        )
    made = EDITS.get(method)(**nest(dict(parts))) if method in EDITS.names() else build(method, parts)
    examples = {Stream.FORGET: [adapter.encode(r) for r in forget], Stream.RETAIN: [adapter.encode(r) for r in retain]}
    if isinstance(made, Edit):
        return RowPlan(adapter, made, examples, None, engine, notes)
    if any(s is Stream.ALTERNATIVE for s, _, _ in made.needs(adapter.layers())):
        others = alternatives(forget, kind_for(method, how, forget), engine.seed, classes=adapter.n_classes)
        pairs = zip(forget, others, strict=True)
        examples[Stream.ALTERNATIVE] = [adapter.encode(r, answer=c, suffix="#other") for r, c in pairs]
    goal = _goal(adapter, made, data, chosen, holdout=holdout, engine=engine)
    return RowPlan(adapter, made, examples, goal, engine, notes)


def run_rows(made: RowPlan, *, progress: Progress | None = None) -> Outcome:
    """Change the model that the plan holds."""
    if isinstance(made.method, Edit):
        return apply_edit(made.adapter, made.method, made.examples, made.engine, progress=progress)
    return train(made.adapter, made.method, made.examples, made.engine, goal=made.goal, progress=progress)


def _goal(
    adapter: SupervisedAdapter, recipe: Recipe, data: Table, chosen: Indices, *, holdout: Table | None, engine: Engine
) -> Goal | None:
    """The loss of unseen rows; for whole classes at least that of a guess, because no unseen row tells how they would look."""
    schedule = recipe.schedule
    if not (isinstance(schedule, Adaptive) or schedule.lr is None) or not recipe.forget:
        return None
    if holdout is None:
        raise InputError(
            "Nothing says how a row looks that the model has never seen.",
            "Give holdout rows, or a fixed schedule with its rate: schedule='fixed', schedule__lr=1e-4.",
        )
    if holdout.task != data.task or holdout.classes != data.classes:
        raise InputError("The holdout rows are of another task, or of other classes.", "Name the same classes in both.")
    order = np.random.default_rng([engine.seed, 8]).permutation(len(holdout))[:_GOAL_ROWS]
    rows = [adapter.encode(r) for r in holdout.rows(order)]
    loss = float(np.mean(mean_losses(adapter, adapter.model, rows, engine.max_tokens)))
    if data.task == "classification" and set(data.targets[chosen].tolist()) <= {
        data.classes.index(name) for name in data.emptied(chosen)
    }:
        loss = max(loss, math.log(len(data.classes)))
    return Goal(loss=max(1e-6, loss), source="holdout", examples=len(rows))


def _equal_rows(data: Table, chosen: Indices) -> int:
    """How many rows to forget have the inputs and the target of a row to keep."""
    kept = {_content(data, int(i)) for i in data.others(chosen)}
    return sum(_content(data, int(i)) in kept for i in chosen)


def _content(data: Table, i: int) -> tuple[bytes, float]:
    return np.ascontiguousarray(data.inputs[i]).tobytes(), float(data.targets[i])
