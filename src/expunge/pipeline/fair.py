"""FairSISA on a run: equal error rates over groups, by post-processing the votes of an ensemble that gives rows up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from expunge.audit.kernel.fairness import (
    Derived,
    equalised_odds_difference,
    fit_derived,
    fix_then_vote,
    majority,
    statistical_parity_difference,
    vote_counts,
    vote_then_fix,
)
from expunge.core.errors import InputError
from expunge.core.files import write_json
from expunge.core.runs import Run
from expunge.data.rows import Table
from expunge.methods.prepared.aggregate import Aggregate
from expunge.pipeline.prepared_runs import STORE, PreparedConfig, is_prepared, source_of
from expunge.pipeline.row_runs import halves
from expunge.pipeline.supervised import load_entry

FILE = "fair.json"
_MANY = 8  #: members from which only how many say yes is looked at

Answers = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Way:
    """One way to answer, on rows that nothing was fitted on.

    Attributes:
        name: what is done.
        accuracy: expected share of right answers, [0, 1].
        equalised_odds: largest difference of a rate of errors between two groups, [0, 1]; 0 is equal.
        parity: largest difference of the share of positive answers, [0, 1].
    """

    name: str
    accuracy: float
    equalised_odds: float
    parity: float


@dataclass(frozen=True)
class Fairness:
    """What :func:`fairness` found.

    Attributes:
        ways: the vote as it is, and what post-processing makes of it.
        groups: names of the groups.
        positive: name of the class that counts as positive.
        fitted, judged: numbers of rows.
        members: of the ensemble.
        rule: probability of a positive answer by combination of votes and group, of the best way.
    """

    ways: tuple[Way, ...]
    groups: tuple[str, ...]
    positive: str
    fitted: int
    judged: int
    members: int
    rule: dict[str, Any]


def fairness(folder: Path, group: str, *, seed: int = 0) -> Fairness:
    """Fit the three ways of FairSISA on one half of the holdout and judge them on the other; leave ``fair.json`` in the run.

    The members of the ensemble stay as they are, and with them whatever was exactly deleted.

    Args:
        folder: of a run of ``sisa`` or ``s3t`` on two classes.
        group: column of the holdout that names each row's group.
        seed: of the halves.

    Raises:
        InputError: the run has no members that vote, there are not two classes, no holdout, no such column, or a group that
            lacks a class in one of the halves.
    """
    if not is_prepared(folder):
        raise InputError(
            f"{str(folder)!r} is no run of a prepared method.", "Make one: expunge train ENTRY --method sisa --out RUN."
        )
    config = PreparedConfig(**Run.open(folder).manifest["config"])
    if config.texts is not None:
        raise InputError("Error rates over groups are defined for two classes, not for texts.", "Give a run of rows.")
    problem = load_entry(config.model)
    if problem.data.task != "classification" or len(problem.data.classes) != 2:
        raise InputError("Error rates over groups are defined for two classes.", "Give a model of two classes.")
    if problem.holdout is None:
        raise InputError("There are no unseen rows to fit and judge on.", "Let the entry give holdout=...")
    if group not in problem.holdout.columns:
        known = ", ".join(problem.holdout.columns) or "none"
        raise InputError(f"The holdout has no column {group!r}.", f"It has: {known}.")
    source = source_of(problem)
    model = config.build().load(source, folder / STORE)
    if not isinstance(model, Aggregate) or len(model.members) < 2:
        raise InputError(f"The method {config.method!r} has no members that vote.", "Use sisa or s3t with several shards.")
    names, parts = _groups(problem.holdout, group), halves(problem.holdout, seed)
    votes = [_votes(model, part) for part in parts]
    codes = [np.searchsorted(names, part.columns[group].astype(str)) for part in parts]
    ways, best = _ways(votes, [part.targets for part in parts], codes)
    positive = problem.data.classes[1]
    rule = {
        "votes": best.cells.tolist(), "groups": [str(names[int(g)]) for g in best.groups], "probability": best.q.tolist(),
        "sorted": votes[0].shape[1] >= _MANY,
    }  # fmt: skip
    found = Fairness(tuple(ways), tuple(names.tolist()), positive, len(parts[0]), len(parts[1]), votes[0].shape[1], rule)
    write_json(folder / FILE, {"column": group, **asdict(found)})
    return found


def _ways(votes: list[Answers], labels: list[Any], groups: list[Answers]) -> tuple[list[Way], Derived]:
    """Every way, fitted on the first entries and judged on the second ones."""
    fit, judge = votes
    odd = fit.shape[1] % 2 == 1
    combine: Callable[[Answers], Answers] = vote_counts if fit.shape[1] >= _MANY else np.asarray
    best = fit_derived(combine(fit), labels[0], groups[0])
    answers: dict[str, Probabilities] = {}
    if odd:
        answers["vote"] = majority(judge).astype(np.float64)
        answers["vote, then fix"] = vote_then_fix(fit, labels[0], groups[0]).probabilities(majority(judge)[:, None], groups[1])
    else:
        answers["vote (ties: a half)"] = np.heaviside(judge.mean(axis=1) - 0.5, 0.5)
    answers["fix, then vote"] = fix_then_vote(fit, labels[0], groups[0]).probabilities(judge, groups[1])
    answers["fix all votes together"] = best.probabilities(combine(judge), groups[1])
    y = labels[1].astype(np.float64)
    return [
        Way(
            name, float((p * y + (1 - p) * (1 - y)).mean()), equalised_odds_difference(p, labels[1], groups[1]),
            statistical_parity_difference(p, labels[1], groups[1]),
        )
        for name, p in answers.items()
    ], best  # fmt: skip


def _groups(holdout: Table, group: str) -> npt.NDArray[np.str_]:
    names: npt.NDArray[np.str_] = np.unique(holdout.columns[group].astype(str))
    if len(names) < 2:
        raise InputError(f"All rows of the holdout are of the group {str(names[0])!r}.", "Name a column with two groups or more.")
    return names


@torch.no_grad()
def _votes(model: Aggregate, part: Table) -> Answers:
    found: Answers = model.votes(torch.from_numpy(part.inputs)).cpu().numpy().astype(np.int64)
    return found
