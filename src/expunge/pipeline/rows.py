"""Unlearn rows of a table from a classifier or a regressor that is held in memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from expunge.adapters.base import Adapter, Example
from expunge.adapters.estimators import estimator_classes, estimator_network, is_estimator
from expunge.adapters.supervised import ClassifierAdapter, RegressionAdapter, SupervisedAdapter
from expunge.core.access import Of, Offer, Stream
from expunge.core.errors import InputError
from expunge.core.settings import nest
from expunge.data.rows import Indices, Table, alike
from expunge.engine.edit import Edit, apply_edit
from expunge.engine.goal import Goal
from expunge.engine.loop import Outcome, Progress, train
from expunge.engine.objective import mean_losses
from expunge.engine.options import Engine
from expunge.engine.parts import Recipe
from expunge.engine.reference import reset_weights
from expunge.engine.schedule import Adaptive
from expunge.methods.alternatives import alternatives, kind_for
from expunge.methods.catalogue import serves
from expunge.methods.edits.registry import EDITS
from expunge.methods.prepared.registry import refuse_prepared
from expunge.methods.recipe import build

_GUESSED = 0.9  #: share of the loss of a guess at which a class counts as forgotten: a mean over rows never quite gets there
_NEIGHBOURS, _NEIGHBOURS_AMONG = 10, 5000
_SAME_BY_CHANCE = 0.01  #: share of the holdout that may equal training rows
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
        oracle: a model trained without the rows to forget, for methods that read one.
    """

    adapter: Adapter
    method: Recipe | Edit
    examples: dict[Stream, list[Example]]
    goal: Goal | None
    engine: Engine
    notes: list[str]
    oracle: Adapter | None = None


def open_rows(
    model: Any, data: Table, *, loss: Literal["l1", "mse"], layers: Sequence[str] | None, dropout: bool
) -> SupervisedAdapter:
    """The adapter for a model (a scikit-learn estimator becomes a network) and the task of its table, tried on one row.

    Raises:
        InputError: the model's output does not match the labels.
    """
    adapter: SupervisedAdapter
    if is_estimator(model):
        own = estimator_classes(model)
        if own != data.classes:
            raise InputError(
                f"The {type(model).__name__} knows the classes {_listed(own)}; the rows {_listed(data.classes)}.",
                "Read the rows with the estimator's classes, in its order.",
            )
        model = estimator_network(model)
    if data.task == "classification":
        adapter = ClassifierAdapter(model, data.classes, layers=layers, dropout=dropout)
    else:
        adapter = RegressionAdapter(model, loss, layers=layers, dropout=dropout)
    mean_losses(adapter, model, [adapter.encode(data.rows([0])[0])], 1)
    return adapter


def plan_rows(
    adapter: Adapter,
    data: Table,
    chosen: Indices,
    method: str,
    *,
    parts: Mapping[str, Any],
    engine: Engine,
    holdout: Table | None = None,
    oracle: Adapter | None = None,
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
        oracle: holds a model trained without the rows to forget, for methods that read one.
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
            "Check the choice, or give allow_large_forget=True (--allow-large-forget).",
        )
    notes = [f"Of the class {name!r} no row is left: it is forgotten as a whole." for name in data.emptied(chosen)]
    same = _equal_rows(data, chosen)
    if same:
        sentence = f"{same} of the {len(forget)} rows to forget equal a row to keep (inputs and target)."
        if not allow_overlap:
            raise InputError(sentence, "Forget all copies, or give allow_overlap=True (--allow-overlap).")
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
    if made.start == "initial":
        _untrained(adapter, engine.seed)  # so that a model that cannot be set back is refused here
    if Of.ORACLE in made.models(adapter.layers()) and oracle is None:
        raise InputError(
            f"The method {method!r} reads an oracle: a model trained without the rows to forget.",
            "Give it: oracle=MODEL, or preparation='given-outputs' with a file of what it says.",
        )
    if Stream.ALTERNATIVE in made.streams(adapter.layers()):
        others = alternatives(forget, kind_for(method, how, forget), engine.seed, classes=adapter.n_classes)
        pairs = zip(forget, others, strict=True)
        examples[Stream.ALTERNATIVE] = [adapter.encode(r, answer=c, suffix="#other") for r, c in pairs]
    if Stream.VALIDATION in made.streams(adapter.layers()) and holdout is not None:
        examples[Stream.VALIDATION] = [adapter.encode(r) for r in holdout.rows(alike(holdout, data.targets[chosen], engine.seed))]
    goal = _goal(adapter, made, data, chosen, holdout=holdout, engine=engine)
    return RowPlan(adapter, made, examples, goal, engine, notes, oracle)


def run_rows(
    made: RowPlan,
    *,
    folder: Path | None = None,
    cache: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Change the model that the plan holds.

    Args:
        made: the checked plan.
        folder: where checkpoints and the log go; None keeps none.
        cache: where losses of the target are kept for other runs.
        resume: go on from the last checkpoint.
        progress: of the work.
    """
    if isinstance(made.method, Edit):
        return apply_edit(made.adapter, made.method, made.examples, made.engine, progress=progress)
    if made.method.start == "initial":
        made.adapter.model.load_state_dict(_untrained(made.adapter, made.engine.seed).state_dict())
    models = {} if made.oracle is None else {Of.ORACLE: made.oracle}
    return train(
        made.adapter, made.method, made.examples, made.engine, goal=made.goal, models=models, folder=folder, cache=cache,
        resume=resume, progress=progress,
    )  # fmt: skip


def _untrained(adapter: Adapter, seed: int) -> nn.Module:
    """A network of the same shape with fresh weights.

    Raises:
        InputError: a part of the model cannot be set back to random weights.
    """
    fresh = adapter.copy()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed + 1) * 7919)  # not the seed itself: the target may have begun from its weights
        reset_weights(fresh.model)
    model: nn.Module = fresh.model
    return model


def _goal(
    adapter: Adapter, recipe: Recipe, data: Table, chosen: Indices, *, holdout: Table | None, engine: Engine
) -> Goal | None:
    """The loss of unseen rows, and more for rows whose labels are odd among the retained ones (see :func:`oddity`).

    Of a classifier losses count up to that of a guess, as in the verdict: what some rows have lost beyond it must not make up for
    others that are still known.
    """
    schedule = recipe.schedule
    if not (isinstance(schedule, Adaptive) or schedule.lr is None) or not recipe.forget:
        return None
    if data.task == "classification" and Offer.LOGITS not in adapter.offers:
        raise InputError(
            f"Nothing says what a model for {adapter.modality} loses on a row whose class it has forgotten.",
            "Give a fixed schedule with its rate: schedule='fixed', schedule__lr=1e-3.",
        )
    if holdout is None:
        raise InputError(
            "Nothing says how a row looks that the model has never seen.",
            "Give holdout rows, or a fixed schedule with its rate: schedule='fixed', schedule__lr=1e-4.",
        )
    if holdout.task != data.task or holdout.classes != data.classes:
        raise InputError("The holdout rows are of another task, or of other classes.", "Name the same classes in both.")
    seen = holdout.subset(np.random.default_rng([engine.seed, 8]).permutation(len(holdout))[:_GOAL_ROWS])
    losses = np.array(
        mean_losses(adapter, adapter.model, [adapter.encode(r) for r in seen.rows()], engine.max_tokens), dtype=np.float64
    )
    if data.task != "classification":
        return Goal(loss=max(1e-6, float(losses.mean())), source="holdout", examples=len(seen))
    guess = math.log(len(data.classes))
    odd = oddity(data, chosen, seen, seed=engine.seed)
    loss = min(float(np.minimum(losses, guess).mean()) + odd, _GUESSED * guess)
    return Goal(loss=max(1e-6, loss), source="holdout", examples=len(seen), ceiling=guess)


def oddity(data: Table, chosen: Indices, unseen: Table, *, seed: int = 0) -> float:
    """By how much more the labels of the forget rows surprise those who go by the retained rows than those of unseen rows do.

    Unseen rows drawn at random tell how a forget row would look that is one of them. They do not tell it of rows that were learnt
    with a wrong label, or of a class of which nothing is retained. So the label of each row is guessed from its nearest retained
    rows (no model is asked, least of all a retrained one), and the mean losses of these guesses are compared, less one standard
    error.

    Args:
        data: all rows that the model was trained on; classification.
        chosen: the forget rows.
        unseen: rows that it was never trained on.
        seed: of the rows that are looked at, where there are many.

    Returns:
        A difference of losses in nats, [0, log C].
    """
    rng = np.random.default_rng([seed, 14])
    kept = _some_rows(data.others(chosen), _NEIGHBOURS_AMONG, rng)
    asked = _some_rows(chosen, _GOAL_ROWS, rng)
    guess = math.log(len(data.classes))
    words = np.unique(data.inputs[kept]) if data.inputs.dtype.kind in "iu" and data.inputs.ndim == 2 else None
    model = KNeighborsClassifier(n_neighbors=min(_NEIGHBOURS, len(kept)))
    model.fit(_flat(data.inputs[kept], words), data.targets[kept])

    def losses(inputs: npt.NDArray[Any], targets: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        share = np.zeros((len(targets), len(data.classes)))
        share[:, model.classes_] = model.predict_proba(_flat(inputs, words))
        own = share[np.arange(len(targets)), targets]
        # One guess among all classes is added to the neighbours, so that nothing is impossible.
        smoothed = (own * _NEIGHBOURS + 1 / len(data.classes)) / (_NEIGHBOURS + 1)
        found: npt.NDArray[np.float64] = np.minimum(-np.log(smoothed), guess)
        return found

    own, others = losses(data.inputs[asked], data.targets[asked]), losses(unseen.inputs, unseen.targets)
    error = math.sqrt(own.var() / len(own) + others.var() / len(others))
    return max(0.0, float(own.mean() - others.mean()) - error)


def _some_rows(indices: Indices, limit: int, rng: np.random.Generator) -> Indices:
    return indices if len(indices) <= limit else np.sort(rng.choice(indices, limit, replace=False))


def _flat(inputs: npt.NDArray[Any], words: npt.NDArray[Any] | None) -> npt.NDArray[np.float32]:
    """Rows as vectors; token ids as which of the known ones occur."""
    if words is None:
        return inputs.reshape(len(inputs), -1).astype(np.float32)
    codes = np.minimum(np.searchsorted(words, inputs), len(words) - 1)
    out = np.zeros((len(inputs), len(words)), dtype=np.float32)
    np.put_along_axis(out, codes, (words[codes] == inputs).astype(np.float32), axis=1)
    return out


def _listed(classes: Sequence[str]) -> str:
    return ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "") if classes else "none"


def _equal_rows(data: Table, chosen: Indices) -> int:
    """How many rows to forget have the inputs and the target of a row to keep."""
    kept = {_content(data, int(i)) for i in data.others(chosen)}
    return sum(_content(data, int(i)) in kept for i in chosen)


def unseen_notes(data: Table, holdout: Table | None, *, allow_overlap: bool) -> list[str]:
    """What a report must say of rows that are given as unseen and were trained on.

    They would say when to stop, and stand for non-members in every attack. A few may be equal by chance; more are refused.

    Raises:
        InputError: more than one in a hundred of them equals a row that was trained on, and that is not allowed.
    """
    if holdout is None or holdout.inputs.shape[1:] != data.inputs.shape[1:]:
        return []
    unseen = replace(holdout, inputs=holdout.inputs.astype(data.inputs.dtype, copy=False))
    trained = {_content(data, i) for i in range(len(data))}
    same = sum(_content(unseen, i) in trained for i in range(len(unseen)))
    if not same:
        return []
    sentence = f"{same} of {len(holdout)} holdout rows equal a row that was trained on (inputs and target): they are not unseen."
    if same > _SAME_BY_CHANCE * len(holdout) and not allow_overlap:
        raise InputError(sentence, "Leave them out of the holdout, or give allow_overlap=True (--allow-overlap).")
    return [sentence]


def _content(data: Table, i: int) -> tuple[bytes, float]:
    inputs = np.ascontiguousarray(data.inputs[i])
    return hashlib.blake2b(inputs.tobytes(), digest_size=16).digest(), float(data.targets[i])
