"""The ground on which settings are chosen: a validation request, made of a part of a request, and what is measured on it.

A request has records to forget (F), to keep (R) and never seen (H). By subject, with a seed:

* F is divided into V and a rest. A trial forgets V, and is measured on V. The rest is neither forgotten nor kept in it.
* R is divided into K and a rest. A trial may train on the rest, and is measured on K.
* Of H only the half that sets the goal of training is used (the other is the audit's): one part of it sets the goal of a trial,
  the other tells how unseen records look.

What a trial is measured on (V, K, that half of H) an audit of the final run leaves out.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import nn

from expunge.adapters.base import Adapter, Example
from expunge.adapters.passes import evaluating
from expunge.audit.kernel.quantities import quantities
from expunge.core.errors import InputError
from expunge.core.settings import Settings
from expunge.data.records import Item, RecordSet
from expunge.data.rows import Table
from expunge.engine.edit import Edit
from expunge.engine.objective import mean_losses
from expunge.engine.outcome import Outcome, Progress
from expunge.engine.parts import Recipe
from expunge.pipeline import row_runs, unlearn
from expunge.pipeline.config import UnlearnConfig
from expunge.pipeline.cost import Cost
from expunge.pipeline.guarding import Shield
from expunge.pipeline.models import open_adapter
from expunge.pipeline.row_runs import RowsConfig
from expunge.pipeline.rows import oddity, plan_rows, run_rows
from expunge.pipeline.supervised import member, target_of
from expunge.pipeline.train import retrained

Indices = npt.NDArray[np.int64]
_LEAST = 2  #: subjects in each part: with one nothing can be said about its scatter


class Split(Settings):
    """How a request is divided."""

    name: ClassVar[str] = "split"

    forget_share: float = Field(0.5, gt=0, le=1, description="share of the subjects to forget that trials forget; 1: all")
    retain_share: float = Field(0.3, gt=0, lt=1, description="share of the subjects to keep that trials are measured on")
    records: int = Field(500, ge=2, description="records to keep that trials are measured on, about, at most")
    seed: int = Field(0, ge=0, description="of the division")


@dataclass(frozen=True)
class Measured:
    """What one model says on the validation records.

    Attributes:
        losses: mean loss of each record to forget, up to that of a guess where classes are told apart, ``[n]``.
        utility: by set, how useful the model is there: mean probability of the answers, accuracy, or skill.
    """

    losses: tuple[float, ...]
    utility: Mapping[str, float]


@dataclass(frozen=True)
class Planned:
    """A trial that has passed every check: its method, what it costs, and how it is done."""

    method: Recipe | Edit
    cost: Cost
    adapter: Adapter
    run: Callable[[Path | None, bool, Progress | None], Outcome]


def divide(records: Sequence[Item], share: float, seed: Sequence[int], what: str) -> tuple[Indices, Indices]:
    """Indices of the records of so many subjects, and of the others, each ascending.

    Args:
        records: to be divided; one without a subject is its own.
        share: of the subjects, in (0, 1]; both parts get two subjects at least, unless all are asked for.
        seed: of the draw.
        what: names the set in messages.

    Raises:
        InputError: there are too few subjects.
    """
    owners = [r.cluster for r in records]
    names = sorted(set(owners))
    least = _LEAST if share == 1 else 2 * _LEAST
    if len(names) < least:
        found = f"{len(records)} records of {len(names)} subject{'s' if len(names) != 1 else ''}"
        raise InputError(
            f"The {what} set is too small to be divided: it has {found}, and {least} subjects are needed.",
            "Sweep on a stand-in, other records like these, with --forget-share 1; then unlearn these with the settings found."
            if what == "forget"
            else "Give more data.",
        )
    count = len(names) if share == 1 else min(max(_LEAST, round(share * len(names))), len(names) - _LEAST)
    first = {names[int(i)] for i in np.random.default_rng(list(seed)).permutation(len(names))[:count]}
    inside = np.array([o in first for o in owners], dtype=bool)
    return np.flatnonzero(inside), np.flatnonzero(~inside)


class Ground(abc.ABC):
    """A validation request on one kind of model.

    Attributes:
        forget: what trials forget.
        spared: what the request forgets beyond that; no trial touches or sees it.
        useful: kept records that trials are measured on.
        train: kept records that trials may train on.
        unseen: records never trained on that trials are stopped by or measured on; empty without a holdout.
    """

    forget: RecordSet[Any]
    spared: RecordSet[Any]
    useful: RecordSet[Any]
    train: RecordSet[Any]
    unseen: RecordSet[Any]
    stand_in: str = "held-out records under the target"  #: what stands for unseen records where no model is retrained

    def used(self) -> dict[str, RecordSet[Any]]:
        """By set, the records that a choice rests on."""
        held = {"forget": self.forget, "retain": self.useful, "holdout": self.unseen}
        return {name: records for name, records in held.items() if len(records)}

    def counts(self) -> dict[str, int]:
        """How many records each part has."""
        return {
            "forget": len(self.forget), "forget for the audit": len(self.spared), "retain": len(self.useful),
            "retain to train on": len(self.train), "unseen": len(self.unseen),
        }  # fmt: skip

    @abc.abstractmethod
    def target(self) -> Adapter:
        """A new adapter with the target model."""

    def shape(self) -> Adapter:
        """An adapter with a model of the target's shape, for checks and costs that do not ask for its weights."""
        return self.target()

    @abc.abstractmethod
    def plan(self, method: str, parts: Mapping[str, Any], seed: int, adapter: Adapter | None = None) -> Planned:
        """Put a trial together; nothing is changed.

        Args:
            method: name of a method or an edit.
            parts: what differs from its own parts.
            seed: of the trial.
            adapter: holds the target, and is changed by the trial; none: a new one.

        Raises:
            InputError: anything does not fit.
        """

    @abc.abstractmethod
    def measure(self, adapter: Adapter, model: nn.Module) -> Measured:
        """Losses and usefulness of a model on the validation records."""

    @abc.abstractmethod
    def level(self, adapter: Adapter) -> list[float]:
        """Losses of unseen records under the target: how a record looks that a model has never seen; none without a holdout."""

    @abc.abstractmethod
    def gold(self, count: int, given: Sequence[str], progress: Progress | None) -> Iterator[Adapter]:
        """Models trained without anything that the request forgets."""


class TextGround(Ground):
    """A validation request on a language model.

    Args:
        config: the request.
        split: how it is divided.
    """

    def __init__(self, config: UnlearnConfig, split: Split) -> None:
        self.config = config
        request = unlearn.load_request(config)
        if request.retain is None:
            raise InputError("A sweep measures usefulness on retain records, and none were given.", "Give --retain DATA.")
        chosen, rest = divide(request.forget, split.forget_share, (split.seed, 31), "forget")
        share = min(split.retain_share, split.records / len(request.retain))
        useful, train = divide(request.retain, share, (split.seed, 32), "retain")
        self.whole = request.forget
        self.forget, self.spared = _part(request.forget, chosen), _part(request.forget, rest)
        self.useful, self.train = _part(request.retain, useful), _part(request.retain, train)
        self.unseen = RecordSet("holdout", ())
        self.goal = self.apart = None
        if request.holdout is not None:
            self.unseen = unlearn.split_holdout(request.holdout, config.engine.seed)[0]
            self.goal, self.apart = unlearn.split_holdout(self.unseen, split.seed + 1)
            _enough(len(self.goal), len(self.apart))

    def target(self) -> Adapter:
        """Loaded anew."""
        return open_adapter(self.config.model, self.config.text, dropout=self.config.engine.dropout)

    def plan(self, method: str, parts: Mapping[str, Any], seed: int, adapter: Adapter | None = None) -> Planned:
        """As for a request of its own; the goal comes from its part of the holdout."""
        config = self.config.model_copy(
            update={"method": method, "parts": dict(parts), "engine": self.config.engine.model_copy(update={"seed": seed})}
        )
        held: Any = adapter if adapter is not None else self.target()
        base = open_adapter(config.base, config.text, dropout=config.engine.dropout) if config.base else None
        made = unlearn.plan(
            held, unlearn.Request(self.forget, self.train), method, parts, config.engine, how=config.alternatives,
            template=config.alternative_template, base=base, goal=self.goal,
        )  # fmt: skip
        if isinstance(made.recipe, Shield):
            raise InputError(
                f"A guard such as {method!r} is not swept: its thresholds are set by calibration.", "Put it before the model."
            )

        def run(folder: Path | None, resume: bool, progress: Progress | None) -> Outcome:
            return unlearn.run_in_memory(made, folder=folder, resume=resume, progress=progress)[0]

        return Planned(made.recipe, made.cost, made.adapter, run)

    def measure(self, adapter: Adapter, model: nn.Module) -> Measured:
        """Mean loss per token, and the mean probability of kept answers (the geometric mean over their tokens)."""
        with evaluating(model):
            losses = self._losses(adapter, model, self.forget)
            kept = self._losses(adapter, model, self.useful)
        return Measured(tuple(losses), {"retain": float(np.exp(-np.array(kept)).mean())})

    def level(self, adapter: Adapter) -> list[float]:
        """Of the part of the holdout that no trial is stopped by."""
        if self.apart is None:
            return []
        with evaluating(adapter.model):
            return self._losses(adapter, adapter.model, self.apart)

    def gold(self, count: int, given: Sequence[str], progress: Progress | None) -> Iterator[Adapter]:
        """Given models, and models retrained here or found in the cache."""
        for source in given:
            yield open_adapter(source, self.config.text)
        for seed in range(1, count + 1):
            folder = retrained(
                self.config.model, self.whole, seed, base=self.config.base, retain=self.config.retain, progress=progress
            )
            yield open_adapter(str(folder), self.config.text)

    def _losses(self, adapter: Adapter, model: nn.Module, records: RecordSet[Any]) -> list[float]:
        return mean_losses(adapter, model, [adapter.encode(r) for r in records], self.config.engine.max_tokens)


class RowGround(Ground):
    """A validation request on a classifier or a regressor.

    Args:
        config: the request.
        split: how it is divided.
        weights: folder with the target's weights, if they have been written.
    """

    def __init__(self, config: RowsConfig, split: Split, weights: Path | None = None, progress: Progress | None = None) -> None:
        self.config, self.weights, self.progress = config, weights, progress
        self.problem = config.load()
        data = self.problem.data
        self.chosen = config.choose(data)
        kept = data.others(self.chosen)
        forget, retain = data.rows(self.chosen), data.rows(kept)
        first, rest = divide(forget, split.forget_share, (split.seed, 31), "forget")
        useful, train = divide(retain, min(split.retain_share, split.records / len(retain)), (split.seed, 32), "retain")
        self.forget, self.spared = _part(forget, first), _part(forget, rest)
        self.useful, self.train = _part(retain, useful), _part(retain, train)
        there = np.sort(np.concatenate([self.chosen[first], kept[train]]))
        self.data = data.subset(there)
        self.forgotten = np.searchsorted(there, self.chosen[first])
        self.middle = float(np.median(data.targets[kept])) if data.task == "regression" else 0.0
        self.ceiling = math.log(len(data.classes)) if data.task == "classification" else math.inf
        self.goal: Table | None = None
        self.apart: Table | None = None
        self.unseen = RecordSet("holdout", ())
        if self.problem.holdout is not None:
            half = row_runs.halves(self.problem.holdout, config.engine.seed)[0]
            self.unseen = half.rows(name="holdout")
            self.goal, self.apart = row_runs.halves(half, split.seed + 1)
            _enough(len(self.goal), len(self.apart))

    def shape(self) -> Adapter:
        """An untrained network where one can be made: a target that there is not yet takes long to train."""
        fresh = self.problem.untrained() if self.problem.model is None else None
        return self.problem.adapter(fresh) if isinstance(fresh, nn.Module) else self.target()

    def target(self) -> Adapter:
        """From the weights that were written, where the network can be made; else as the entry brings or trains it."""
        fresh = self.problem.untrained() if self.problem.model is None else None
        if self.weights is not None and isinstance(fresh, nn.Module):
            return row_runs.load_weights(self.problem.adapter(fresh, dropout=self.config.engine.dropout), self.weights)
        model = target_of(self.problem, progress=self.progress)
        return self.problem.adapter(model, dropout=self.config.engine.dropout).copy()

    def plan(self, method: str, parts: Mapping[str, Any], seed: int, adapter: Adapter | None = None) -> Planned:
        """As for a request of its own on the rows that the trial may see."""
        config, held = self.config, adapter if adapter is not None else self.target()
        made = plan_rows(
            held, self.data, self.forgotten, method, parts=parts, engine=config.engine.model_copy(update={"seed": seed}),
            holdout=self.goal, how=config.alternatives, allow_overlap=config.allow_overlap,
            allow_large_forget=config.allow_large_forget,
        )  # fmt: skip

        def run(folder: Path | None, resume: bool, progress: Progress | None) -> Outcome:
            return run_rows(made, folder=folder, resume=resume, progress=progress)

        return Planned(made.method, row_runs.cost_of(held, made), held, run)  # type: ignore[arg-type]

    def measure(self, adapter: Adapter, model: nn.Module) -> Measured:
        """Losses up to that of a guess; accuracy or skill on kept rows and on unseen rows of what is kept."""
        with evaluating(model):
            losses = np.minimum(self._losses(adapter, model, self.forget), self.ceiling)
            utility = {name: self._useful(adapter, model, rows) for name, rows in self._sets().items()}
        return Measured(tuple(losses.tolist()), utility)

    def level(self, adapter: Adapter) -> list[float]:
        """Of unseen rows, and more where the rows to forget are odd among the kept ones (see :func:`~.rows.oddity`).

        Of a class of which nothing is kept no unseen row tells: a model without it never names it, and loses at least a guess.
        """
        if self.apart is None:
            return []
        gone = sum(r.target in self._emptied() for r in self.forget)
        if gone == len(self.forget):
            self.stand_in = "a guess among all classes, since nothing of the class is kept"
            return [self.ceiling] * gone
        with evaluating(adapter.model):
            losses = np.minimum(self._losses(adapter, adapter.model, self.apart.rows()), self.ceiling)
        if self.data.task == "classification":
            losses = np.minimum(
                losses + oddity(self.data, self.forgotten, self.apart, seed=self.config.engine.seed), self.ceiling
            )
        others = [float(x) for x in losses]
        return others + [self.ceiling] * round(len(others) * gone / (len(self.forget) - gone))

    def gold(self, count: int, given: Sequence[str], progress: Progress | None) -> Iterator[Adapter]:
        """Models retrained here or found in the cache."""
        if given:
            raise InputError("--retrained is for language models.", "Models of rows are retrained here: --retrain 3.")
        if not count:
            return
        held = self.problem.trained(self.chosen, list(range(1, count + 1)), progress=progress, what="retraining")
        for i in range(count):
            yield self.problem.adapter(member(self.problem, held, i))

    def _sets(self) -> dict[str, RecordSet[Any]]:
        if self.apart is None:
            return {"retain": self.useful}
        gone = sorted(self._emptied())
        kept = np.flatnonzero(~np.isin(self.apart.targets, gone)) if gone else np.arange(len(self.apart))
        return {"retain": self.useful, **({"unseen": self.apart.rows(kept)} if len(kept) else {})}

    def _emptied(self) -> set[int]:
        """Classes of which the request leaves nothing."""
        data = self.problem.data
        return {data.classes.index(c) for c in data.emptied(self.chosen)}

    def _losses(self, adapter: Adapter, model: nn.Module, rows: RecordSet[Any]) -> npt.NDArray[np.float64]:
        examples = [adapter.encode(r) for r in rows]
        return np.array(mean_losses(adapter, model, examples, self.config.engine.max_tokens), dtype=np.float64)

    def _useful(self, adapter: Adapter, model: nn.Module, rows: RecordSet[Any]) -> float:
        scores = _scores(adapter, model, [adapter.encode(r) for r in rows], self.config.engine.max_tokens)
        targets = np.array([float(r.target) for r in rows])
        if self.problem.data.task == "classification":
            return float(quantities(scores, targets).hit.mean())
        base = float(np.abs(targets - self.middle).mean())
        return 1 - float(np.abs(scores[:, 0] - targets).mean()) / base if base > 0 else 0.0


def open_ground(rows: bool, request: Mapping[str, Any], split: Split, weights: Path | None = None) -> Ground:
    """The ground of a request: the settings of an unlearning run."""
    return RowGround(RowsConfig(**request), split, weights) if rows else TextGround(UnlearnConfig(**request), split)


def _part(records: RecordSet[Any], chosen: Indices) -> RecordSet[Any]:
    return RecordSet(records.name, tuple(records[int(i)] for i in chosen), records.source)


def _enough(goal: int, apart: int) -> None:
    if goal < 2 or apart < 2:
        raise InputError(
            f"Of the holdout a sweep uses one half, of which {goal} records would set the goal and {apart} be the measure.",
            "Give more held-out records, eight at least.",
        )


@torch.no_grad()
def _scores(adapter: Adapter, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> npt.NDArray[np.float32]:
    """Scores of rows, ``[n, C]``, or predicted numbers ``[n, 1]``."""
    per = max(1, max_tokens // max(e.units for e in examples))
    where = next(model.parameters()).device
    found = []
    for start in range(0, len(examples), per):
        batch = adapter.collate(examples[start : start + per]).to(where)
        found.append(adapter.forward(model, batch, frozenset({"logits"})).logits.float().cpu().numpy())
    scores = np.concatenate(found)
    return scores.reshape(len(scores), -1)
