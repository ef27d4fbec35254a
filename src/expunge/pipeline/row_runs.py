"""Unlearning runs on rows: what ``expunge unlearn ENTRY --class 3 --out RUN`` does."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from expunge.adapters.base import Adapter
from expunge.adapters.extra import quiet
from expunge.adapters.supervised import SupervisedAdapter
from expunge.core.errors import Destroyed, InputError
from expunge.core.files import atomic_path, check_room
from expunge.core.runs import Run, cache_folder
from expunge.core.settings import Settings
from expunge.data.records import RecordSet
from expunge.data.rows import Indices, Row, Table
from expunge.data.tables import Reading
from expunge.engine.edit import Edit
from expunge.engine.loop import Outcome, Progress, write_log_summary
from expunge.engine.members import Training
from expunge.engine.options import Engine
from expunge.pipeline.cost import Cost, estimate
from expunge.pipeline.models import check_memory
from expunge.pipeline.problems import load_problem
from expunge.pipeline.processes import drop_checkpoint
from expunge.pipeline.rows import RowPlan, plan_rows, run_rows, unseen_notes
from expunge.pipeline.supervised import Supervised, target_of

KIND = "unlearn-rows"


class RowsConfig(Settings):
    """Everything that an unlearning run on rows depends on."""

    name: ClassVar[str] = "unlearn-rows"

    model: str = Field(
        description="package.module:function or file.py:function that returns expunge.Supervised; or a transformers classifier"
    )
    data: str | None = Field(None, description="rows that a transformers classifier was trained on")
    holdout: str | None = Field(None, description="rows that a transformers classifier was never trained on")
    reading: Reading = Field(default_factory=Reading, description="which column of the rows is what")
    training: Training | None = Field(None, description="how a transformers classifier was trained, to retrain it")
    base: str | None = Field(None, description="what the training of a transformers classifier began from; none: fresh weights")
    ids: tuple[str, ...] | None = Field(None, description="ids of the rows to forget")
    classes: tuple[str, ...] | None = Field(None, description="classes to forget as a whole")
    where: str | None = Field(None, description="condition on the columns, such as \"age < 18 and city == 'Graz'\"")
    subjects: tuple[str, ...] | None = Field(None, description="subjects (persons, devices) whose rows are forgotten")
    method: str = Field("npo", description="a method's name, or 'custom' with all parts given")
    parts: dict[str, Any] = Field(default_factory=dict, description="parts and parameters that differ from the method's own")
    alternatives: Literal["auto", "other", "any"] = Field(
        "auto", description="classes put in the place of forgotten ones; auto: as the method publishes"
    )
    allow_overlap: bool = Field(False, description="go on although rows of two sides are equal: forget, retain, holdout")
    allow_large_forget: bool = Field(False, description="go on although there is more to forget than to keep")
    engine: Engine = Field(default_factory=Engine, description="how the machine is used")

    def load(self) -> Supervised:
        """The model with its rows.

        Raises:
            InputError: see :func:`~expunge.pipeline.problems.load_problem`.
        """
        return load_problem(
            self.model, data=self.data, holdout=self.holdout, reading=self.reading, training=self.training, base=self.base
        )

    def choose(self, data: Table) -> Indices:
        """Indices of the rows to forget.

        Raises:
            InputError: nothing says which, or there are none; see :meth:`~expunge.data.rows.Table.select`.
        """
        return data.select(ids=self.ids, classes=self.classes, where=self.where, subjects=self.subjects)


def halves(holdout: Table, seed: int) -> tuple[Table, Table]:
    """Divide unseen rows by subject: one half sets the goal of training, the other is left to the audit.

    An audit must not judge by what training was stopped by.
    """
    owners = np.array(holdout.subjects if len(set(holdout.subjects)) > 1 else holdout.ids, dtype=object)
    names = sorted(set(owners.tolist()))
    order = np.random.default_rng([seed, 11]).permutation(len(names))
    first = {names[int(i)] for i in order[: len(names) // 2]}
    chosen = np.array([o in first for o in owners.tolist()], dtype=bool)
    return holdout.subset(np.flatnonzero(chosen)), holdout.subset(np.flatnonzero(~chosen))


@dataclass
class RowRunPlan:
    """A run that has passed every check and has not begun."""

    config: RowsConfig
    problem: Supervised
    chosen: Indices
    made: RowPlan
    cost: Cost


def plan(
    config: RowsConfig, problem: Supervised | None = None, *, dry: bool = False, progress: Progress | None = None
) -> RowRunPlan:
    """Load what a configuration names and check that all fits; the target is trained if it was not.

    Args:
        config: the request.
        problem: model and rows, if they are loaded already.
        dry: train no target: what is told of the cost does not depend on its weights.
        progress: of its training.

    Raises:
        InputError: anything does not fit; nothing was changed.
    """
    held = config.load() if problem is None else problem
    chosen = config.choose(held.data)
    fresh = held.untrained() if held.model is None else None
    if isinstance(fresh, nn.Module):  # an estimator has no weights before it is fitted
        made = _checked(config, held, chosen, fresh)  # training takes long: what is wrong with the request is found before
        if dry:
            return made
    model = target_of(held, progress=progress)
    # A model that the caller holds serves other requests too; one that was loaded here is changed in place.
    return _checked(config, held, chosen, copy.deepcopy(model) if problem is not None else model)


def _checked(config: RowsConfig, held: Supervised, chosen: Indices, model: nn.Module) -> RowRunPlan:
    adapter = held.adapter(model, dropout=config.engine.dropout)
    notes = unseen_notes(held.data, held.holdout, allow_overlap=config.allow_overlap)
    goal = halves(held.holdout, config.engine.seed)[0] if held.holdout is not None else None
    made = plan_rows(
        adapter, held.data, chosen, config.method, parts=config.parts, engine=config.engine, holdout=goal,
        how=config.alternatives, allow_overlap=config.allow_overlap, allow_large_forget=config.allow_large_forget,
    )  # fmt: skip
    made.notes.extend(notes)
    return RowRunPlan(config, held, chosen, made, _cost(adapter, made))


def _cost(adapter: SupervisedAdapter, made: RowPlan) -> Cost:
    parameters = sum(p.numel() for p in adapter.model.parameters())
    weights = sum(p.numel() * p.element_size() for p in adapter.model.parameters())
    memory = 6 * weights  # weights, gradients, two moments, the start, and what a penalty or an importance takes
    check_memory(memory, "Unlearning")
    if isinstance(made.method, Edit):
        return Cost(0, sum(e.size for s in made.method.streams for e in made.examples[s]), memory, weights, parameters)
    return estimate(made.method, made.examples, parameters, memory, disk=weights * 5)


def execute(made: RowRunPlan, out: Path, *, resume: bool = False, progress: Progress | None = None) -> Run:
    """Unlearn and leave a run folder with ``model/``.

    Raises:
        Destroyed: the loss became NaN or infinite; the last good weights are in ``model/``.
    """
    check_room(out, made.cost.disk, "Unlearning")
    config, rows = made.config, made.made
    run = Run.start(out, KIND, config.model_dump(mode="json"), resume=resume)
    data = made.problem.data
    inputs = {
        "target": rows.adapter.fingerprint(), "recipe": rows.method.spec(), "engine": config.engine.model_dump(mode="json"),
        "data": {"rows": data.rows().digest, "forget": data.rows(made.chosen).digest},
    }  # fmt: skip
    run.check_same("unlearn", inputs)
    run.note_inputs(
        target={"source": config.model, "digest": inputs["target"]},
        forget={"rows": len(made.chosen), "of": len(data), "notes": rows.notes},
    )

    def work() -> dict[str, Any]:
        outcome = run_rows(rows, folder=out, cache=cache_folder() / "references", resume=resume, progress=progress)
        result = save_rows(rows.adapter, outcome, out)
        goal = rows.goal.model_dump() if rows.goal else None
        return result | {"recipe": rows.method.spec(), "goal": goal, "notes": [*rows.notes, *outcome.notes]}

    log = [] if isinstance(rows.method, Edit) else ["log.jsonl"]
    result = run.stage("unlearn", inputs, work, ["model", "training.json", *log])
    drop_checkpoint(out)
    if result["reason"] == "diverged":
        raise Destroyed(result["sentence"])
    return run


def save_rows(adapter: Adapter, outcome: Outcome, out: Path) -> dict[str, Any]:
    """Write the model and how training ended. Returns what the manifest records."""
    with atomic_path(out / "model") as temporary:
        adapter.save(temporary, outcome.model)
    write_log_summary(out, outcome)
    return {
        "reason": outcome.reason, "reached": outcome.reached, "sentence": outcome.sentence, "steps": outcome.steps,
        "lr": outcome.lr, "tokens": outcome.tokens, "seconds": outcome.seconds, "peak_bytes": outcome.peak_bytes,
    }  # fmt: skip


def load_weights(adapter: SupervisedAdapter, folder: Path) -> SupervisedAdapter:
    """A copy of the adapter with the weights that a run has written.

    Raises:
        InputError: they are not there, or do not fit the model.
    """
    held = adapter.copy()
    try:
        described = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        state = _state(held.model, folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"The weights in {str(folder)!r} cannot be read: {error}.", "Do the run again.") from None
    try:
        held.model.load_state_dict(state)
        fits = described == adapter.describe()
    except RuntimeError:  # torch's own error for names or shapes that differ
        fits = False
    if not fits:
        raise InputError(f"The weights in {str(folder)!r} do not fit this model.", "Give the entry that the run was made with.")
    return held


def _state(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Weights by the model's own names; transformers may write other names than it uses, so it reads its own files itself."""
    if not hasattr(model, "save_pretrained"):
        return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}
    with quiet():
        loaded, found = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)  # type: ignore[attr-defined]
    if any(found[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return {}  # fits no model
    state: dict[str, Tensor] = loaded.state_dict()
    return state


def sets_of(problem: Supervised, chosen: Indices, seed: int, *, whole: bool = False) -> dict[str, RecordSet[Row]]:
    """The sets that are scored: forget, retain; of the unseen rows the half that training never looked at (or ``whole``: all).

    ``holdout`` are unseen rows of the forgotten kind, for membership attacks: where whole classes are forgotten, those classes
    alone (other classes would be told apart without any memory). ``test`` are unseen rows of what is kept, for usefulness.
    Further sets are those that the problem names.
    """
    data = problem.data
    found = {"forget": data.rows(chosen, "forget"), "retain": data.rows(data.others(chosen), "retain")}
    further = {name: rows.rows(name=name) for name, rows in problem.sets.items()}
    if problem.holdout is None:
        return found | further
    unseen = problem.holdout if whole else halves(problem.holdout, seed)[1]
    gone = [data.classes.index(c) for c in data.emptied(chosen)]
    alike = np.isin(unseen.targets, gone) if gone else np.ones(len(unseen), dtype=bool)
    kept = ~alike if gone else alike
    for name, mask in (("holdout", alike), ("test", kept)):
        if mask.any():
            found[name] = unseen.rows(np.flatnonzero(mask), name)
    return found | further
