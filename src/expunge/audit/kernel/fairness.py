"""FairSISA: equal error rates over groups for an ensemble of binary classifiers, by post-processing alone.

Kadhe et al. 2023, *FairSISA: Ensemble Post-Processing to Improve Fairness of Unlearning in LLMs*, arXiv 2312.07420, on Hardt,
Price and Srebro 2016, *Equality of Opportunity in Supervised Learning*. Only predicted labels and groups of a held-out labelled
set are used; the members of the ensemble stay as they are, and with them whatever was exactly unlearned from them.

A post-processed predictor is randomised: it answers 1 with a probability. Everything here works with that probability, so that
rates are expectations and need no seed; :meth:`Derived.sample` draws answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

from expunge.audit.kernel.arrays import Bools, Floats, Integers, codes, hits, matrix, same_length, vector
from expunge.core.errors import ExpungeError, InputError


@dataclass(frozen=True)
class Rates:
    """True and false positive rate and share of positive answers of one group, each in [0, 1]."""

    tpr: float
    fpr: float
    positive: float


def rates(answers: ArrayLike, labels: ArrayLike, groups: ArrayLike) -> dict[int, Rates]:
    """Rates by group.

    Args:
        answers: answers 0 or 1, or probabilities of 1 ``[examples]``.
        labels: 0 or 1.
        groups: whole numbers.

    Raises:
        InputError: lengths differ, an answer is not in [0, 1], or a group lacks one of the labels.
    """
    given, y, a = vector(answers, "answers"), hits(labels, "labels"), codes(groups, "groups")
    same_length(answers=given, labels=y, groups=a)
    if not ((given >= 0) & (given <= 1)).all():
        raise InputError("Answers must be 0, 1 or a probability in between.")
    out = {}
    for group in _groups(y, a):
        inside = a == group
        out[int(group)] = Rates(float(given[inside & y].mean()), float(given[inside & ~y].mean()), float(given[inside].mean()))
    return out


def equalised_odds_difference(answers: ArrayLike, labels: ArrayLike, groups: ArrayLike) -> float:
    """``max(|TPR_a - TPR_b|, |FPR_a - FPR_b|)`` over all pairs of groups, in [0, 1]; lower is fairer, 0 is equal error rates.

    A finite sample of a perfectly fair predictor is above 0. Says nothing about forgetting: compare before and after unlearning.

    Raises:
        InputError: as :func:`rates`; or there is one group only.
    """
    found = _several(rates(answers, labels, groups))
    return max(float(np.ptp([r.tpr for r in found])), float(np.ptp([r.fpr for r in found])))


def statistical_parity_difference(answers: ArrayLike, labels: ArrayLike, groups: ArrayLike) -> float:
    """Largest difference of the share of positive answers between two groups, in [0, 1]; lower is more equal.

    Not 0 for a perfect predictor where the groups' shares of positive labels differ.

    Raises:
        InputError: as :func:`rates`; or there is one group only.
    """
    found = _several(rates(answers, labels, groups))
    return float(np.ptp([r.positive for r in found]))


@dataclass(frozen=True)
class Derived:
    """A predictor derived from others' answers and the group: ``q(cell, group) = Pr(answer 1)``.

    Attributes:
        cells: the combinations of answers it was fitted on ``[cells, members]``.
        groups: the groups ``[groups]``, sorted.
        q: probabilities ``[cells, groups]``.
        loss: optimum of the linear program: the expected share of wrong answers on the set that it was fitted on.
    """

    cells: Integers
    groups: Integers
    q: Floats
    loss: float

    def probabilities(self, votes: ArrayLike, groups: ArrayLike) -> Floats:
        """Probability of answering 1 ``[examples]``.

        A combination of answers that the fit never saw gets their majority (a half for a tie).

        Args:
            votes: answers 0 or 1 ``[examples, members]``, as in the fit.
            groups: of the examples.

        Raises:
            InputError: shapes do not match, or a group is unknown.
        """
        given, a = _votes(votes), codes(groups, "groups")
        same_length(votes=given, groups=a)
        column = np.minimum(np.searchsorted(self.groups, a), len(self.groups) - 1)
        if (self.groups[column] != a).any():
            raise InputError(f"The predictor was fitted for the groups {self.groups.tolist()} only.", "Fit it with all groups.")
        if given.shape[1] != self.cells.shape[1]:
            raise InputError(f"The predictor was fitted on {self.cells.shape[1]} answers an example; got {given.shape[1]}.")
        known = {cell.tobytes(): i for i, cell in enumerate(self.cells)}
        unique, inverse = np.unique(given, axis=0, return_inverse=True)
        row = np.array([known.get(cell.tobytes(), -1) for cell in unique])[inverse.reshape(-1)]
        return np.where(row >= 0, self.q[row, column], _majority(given))

    def sample(self, votes: ArrayLike, groups: ArrayLike, seed: int) -> Bools:
        """Random answers drawn from :meth:`probabilities`."""
        p = self.probabilities(votes, groups)
        return np.random.default_rng(seed).random(len(p)) < p


def fit_derived(votes: ArrayLike, labels: ArrayLike, groups: ArrayLike) -> Derived:
    """The best predictor with equal error rates among all functions of (vector of answers, group); FairSISA's ensemble
    post-processing.

    Unknowns ``q(v, a)`` for each combination v of answers that occurs (at most ``min(2^S, examples)``) and group a; a linear
    program minimises the expected share of wrong answers subject to equal TPR and equal FPR over the groups and 0 <= q <= 1. It
    contains the post-processed majority vote as a special case, so its loss on the fitting set is never larger, and never larger
    than that of a constant answer. With many members and few examples it overfits: judge it on other data, or fit on counts
    (:func:`vote_counts`).

    Args:
        votes: predicted labels 0 or 1 ``[examples, members]``; one column is the fix of a single classifier.
        labels: 0 or 1.
        groups: whole numbers.

    Raises:
        InputError: shapes do not match, a value is not 0 or 1, a group lacks one of the labels, or there is one group only.
    """
    given, y, a = _votes(votes), hits(labels, "labels"), codes(groups, "groups")
    same_length(votes=given, labels=y, groups=a)
    names = _groups(y, a)
    if len(names) < 2:
        raise InputError("Equal error rates need two groups or more; got one.")
    cells, cell = np.unique(given, axis=0, return_inverse=True)
    column = np.searchsorted(names, a)
    shape = (2, len(cells), len(names))
    counts = np.zeros(shape)
    np.add.at(counts, (y.astype(np.int64), cell.reshape(-1), column), 1.0)
    q, objective = _solve(counts)
    loss = objective + float(counts[1].sum()) / len(y)  # answering 0 everywhere is wrong on the positives
    return Derived(cells, names, q, loss)


def vote_counts(votes: ArrayLike) -> Integers:
    """Answers sorted within each example, so that only how many members say 1 matters: S + 1 combinations instead of ``2^S``.

    Raises:
        InputError: an answer is not 0 or 1, or there is no example or member.
    """
    return np.asarray(np.sort(_votes(votes), axis=1), dtype=np.int64)


def vote_then_fix(votes: ArrayLike, labels: ArrayLike, groups: ArrayLike) -> Derived:
    """Aggregate, then post-process: one fix of the majority vote. Apply it to :func:`majority` answers.

    Raises:
        InputError: as :func:`fit_derived`, or a vote can be tied (an even number of members).
    """
    return fit_derived(majority(votes)[:, None], labels, groups)


@dataclass(frozen=True)
class FixedMembers:
    """Post-process, then aggregate: the majority of members each of which was fixed on its own."""

    members: tuple[Derived, ...]

    def probabilities(self, votes: ArrayLike, groups: ArrayLike) -> Floats:
        """Probability that a majority of the fixed members, drawn independently, answers 1 ``[examples]``; ties count half.

        Raises:
            InputError: as :meth:`Derived.probabilities`.
        """
        given = _votes(votes)
        if given.shape[1] != len(self.members):
            raise InputError(f"There are {len(self.members)} fixed members; got answers of {given.shape[1]}.")
        each = np.stack([m.probabilities(given[:, [i]], groups) for i, m in enumerate(self.members)])
        ones = np.zeros((len(each) + 1, each.shape[1]))
        ones[0] = 1.0
        for p in each:
            ones[1:] = ones[1:] * (1 - p) + ones[:-1] * p
            ones[0] *= 1 - p
        weight = np.array([float(2 * k > len(each)) + 0.5 * (2 * k == len(each)) for k in range(len(each) + 1)])
        return np.asarray(weight @ ones, dtype=np.float64)


def fix_then_vote(votes: ArrayLike, labels: ArrayLike, groups: ArrayLike) -> FixedMembers:
    """Post-process, then aggregate. Each member has equal error rates afterwards; their vote need not.

    Raises:
        InputError: as :func:`fit_derived`.
    """
    given = _votes(votes)
    return FixedMembers(tuple(fit_derived(given[:, [i]], labels, groups) for i in range(given.shape[1])))


def majority(votes: ArrayLike) -> Integers:
    """The majority's answer 0 or 1 ``[examples]``.

    Raises:
        InputError: the number of members is even, or an answer is not 0 or 1.
    """
    given = _votes(votes)
    if given.shape[1] % 2 == 0:
        raise InputError(
            f"A majority of {given.shape[1]} members can be tied.", "Use an odd number, or fit_derived on the votes."
        )
    return np.asarray(2 * given.sum(axis=1) > given.shape[1], dtype=np.int64)


def _solve(counts: Floats) -> tuple[Floats, float]:
    """Minimise the expected errors over q ``[cells, groups]``, given counts ``[label, cells, groups]``; up to a constant."""
    _, cells, groups = counts.shape
    cost = (counts[0] - counts[1]) / counts.sum()
    shares = counts / counts.sum(axis=1, keepdims=True)  # of each cell, within (label, group)
    rows = []
    for label in (0, 1):
        for group in range(1, groups):
            row = np.zeros((cells, groups))
            row[:, 0], row[:, group] = shares[label, :, 0], -shares[label, :, group]
            rows.append(row.ravel())
    found = optimize.linprog(cost.ravel(), A_eq=np.array(rows), b_eq=np.zeros(len(rows)), bounds=(0, 1), method="highs")
    if not found.success:  # a constant answer is always feasible, so this is the solver's failure
        raise ExpungeError(f"The linear program for equal error rates was not solved: {found.message}.")
    return np.clip(found.x, 0, 1).reshape(cells, groups), float(found.fun)


def _groups(labels: Bools, groups: Integers) -> Integers:
    names = np.unique(groups)
    for group in names:
        if len(np.unique(labels[groups == group])) < 2:
            raise InputError(f"Group {group} has examples of one label only: one of its error rates is undefined.")
    return names


def _several(found: dict[int, Rates]) -> list[Rates]:
    if len(found) < 2:
        raise InputError("A difference between groups needs two groups; got one.")
    return list(found.values())


def _votes(votes: ArrayLike) -> Integers:
    given = matrix(votes, "votes")
    if not np.isin(given, (0.0, 1.0)).all():
        raise InputError("Votes must be predicted labels, 0 or 1.")
    return given.astype(np.int64)


def _majority(votes: Integers) -> Floats:
    return np.asarray(np.heaviside(2.0 * votes.sum(axis=1) - votes.shape[1], 0.5), dtype=np.float64)
