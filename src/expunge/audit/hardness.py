"""Circuit-guided unlearning difficulty (CUD): is a record's circuit like those of records that were hard to erase?

*Toward Understanding Unlearning Difficulty: A Mechanistic Perspective and Circuit-Guided Difficulty Metric* (arXiv 2601.09624).
A few models are unlearned once. Records that these erased least and most lend their circuits as anchors; then

    CUD(z) = sim(C_z, C_hard) / (sim(C_z, C_hard) + sim(C_z, C_easy)),

``sim`` the cosine of the edges, in [0, 1], and higher is harder. There is no public code; the formula is as the paper describes
it, and here an anchor is the mean of the group's circuits rather than a majority, which has no ties.

Anchors come from an outcome of unlearning. To score a record by anchors that it is part of would be circular, so records are
dealt to folds, those of one subject together, and each is scored by anchors of the other folds. Whether the anchors say anything
is tested against anchors drawn at random: circuits of one model are much alike, and any two groups of them give a measure that
goes along with something. How well a record is remembered is a rival explanation: the rank correlation is given with the loss
held constant too.

Means and cosines of circuits need nothing but how many edges each two of them share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from expunge.core.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
GROUP = 1 / 3  #: share of the records that make up the easiest and the hardest group
LEAST = 6  #: records without which there are no two groups
DRAWS = 999  #: random anchors
_EDGES = 1 << 16  #: edges counted at a time


def shared(some: NDArray[np.bool_], others: NDArray[np.bool_]) -> Floats:
    """How many edges each two circuits share, ``[A, P]``.

    Args:
        some: circuits, bool ``[A, E]``.
        others: circuits, bool ``[P, E]``.
    """
    out = np.zeros((len(some), len(others)))
    for at in range(0, some.shape[1], _EDGES):
        out += some[:, at : at + _EDGES].astype(np.float32) @ others[:, at : at + _EDGES].astype(np.float32).T
    return out


@dataclass(frozen=True)
class Overlap:
    """Circuits to be scored, and those that anchors are made of, by the edges they share.

    Attributes:
        across: edges that each circuit shares with each of the pool, ``[A, P]``.
        within: edges that each two of the pool share, ``[P, P]``.
        sizes: edges of each circuit to be scored, ``[A]``.
        folds: fold of each circuit to be scored, ``[A]``.
        pool_folds: fold of each of the pool, ``[P]``.
    """

    across: Floats
    within: Floats
    sizes: Floats
    folds: Ints
    pool_folds: Ints

    @classmethod
    def of(cls, some: NDArray[np.bool_], pool: NDArray[np.bool_], folds: Ints, pool_folds: Ints) -> Overlap:
        """Count the edges."""
        return cls(shared(some, pool), shared(pool, pool), some.sum(1).astype(np.float64), folds, pool_folds)

    @classmethod
    def own(cls, circuits: NDArray[np.bool_], folds: Ints) -> Overlap:
        """Circuits that are scored by one another."""
        both = shared(circuits, circuits)
        return cls(both, both, circuits.sum(1).astype(np.float64), folds, folds)

    def likeness(self, rows: Ints, group: Ints) -> Floats:
        """Cosine of the circuits ``rows`` to the mean circuit of a ``group`` of the pool; 0 where either is empty."""
        norms = np.sqrt(self.sizes[rows] * self.within[np.ix_(group, group)].mean())
        dots = self.across[np.ix_(rows, group)].mean(1)
        return np.asarray(np.divide(dots, norms, out=np.zeros(len(rows)), where=norms > 0), dtype=np.float64)


def cud(overlap: Overlap, erased: Floats) -> Floats:
    """The measure of each circuit by anchors from the other folds, ``[A]``; 0.5 where it is like neither anchor.

    Args:
        overlap: of the circuits.
        erased: how well each of the pool was erased, higher is better, ``[P]``; comparable within what is not in one fold.

    Raises:
        InputError: outside of a fold there are fewer than six records.
    """
    out = np.full(len(overlap.folds), 0.5)
    for fold in np.unique(overlap.folds):
        rows = np.flatnonzero(overlap.folds == fold)
        hard, easy = groups(np.flatnonzero(overlap.pool_folds != fold), erased)
        to_hard, to_easy = overlap.likeness(rows, hard), overlap.likeness(rows, easy)
        total = to_hard + to_easy
        out[rows] = np.divide(to_hard, total, out=np.full(len(rows), 0.5), where=total > 0)
    return out


def groups(members: Ints, erased: Floats) -> tuple[Ints, Ints]:
    """The third of the members that was erased least, and the third that was erased most.

    Raises:
        InputError: fewer than six members.
    """
    if len(members) < LEAST:
        raise InputError(
            f"{len(members)} records are too few for an easy and a hard group.",
            f"At least {LEAST} with prompts must be left when a fold is set aside: give more records or subjects, or --anchors.",
        )
    size = round(GROUP * len(members))
    order = members[np.argsort(erased[members], kind="stable")]
    return order[:size], order[-size:]


def folds(clusters: Sequence[str], count: int, seed: int) -> Ints:
    """A fold of each record, ``[P]``: clusters stay together, and folds are of about the same number of records.

    Args:
        clusters: of each record.
        count: of folds; fewer where there are not as many clusters.
        seed: of the order in which clusters of one size are dealt.
    """
    names, codes, sizes = np.unique(np.asarray(clusters), return_inverse=True, return_counts=True)
    order = np.random.default_rng([seed, 11]).permutation(len(names))
    held = np.zeros(min(count, len(names)), dtype=np.int64)
    fold = np.zeros(len(names), dtype=np.int64)
    for at in order[np.argsort(-sizes[order], kind="stable")]:
        fold[at] = int(held.argmin())
        held[fold[at]] += sizes[at]
    return np.asarray(fold[codes], dtype=np.int64)


@dataclass(frozen=True)
class Foretold:
    """Whether anchors foretell what was hard to erase, over records that are in no anchor of their own.

    Attributes:
        value: Spearman's rank correlation of the measure with the outcome; 0 where either is constant.
        partial: the same with the ranks of the loss before unlearning held constant.
        p, p_partial: share of random anchors that do as well, one-sided; the given ones count among them.
        random: what random anchors gave, ``[draws]``.
        records: how many.
    """

    value: float
    partial: float
    p: float
    p_partial: float
    random: Floats
    records: int


def foretold(
    overlap: Overlap, erased: Floats, outcome: Floats, losses: Floats, *, clusters: Sequence[str], seed: int, draws: int = DRAWS
) -> Foretold:
    """Compare the measure of circuits that are scored by one another with an outcome, and with what random anchors give.

    Random anchors: how well records were erased is exchanged among whole clusters of one size.

    Args:
        overlap: see :meth:`Overlap.own`.
        erased: how well each was erased, which the anchors are made of.
        outcome: how well each was erased, which is to be foretold: by the same method, or another.
        losses: of each record before unlearning.
        clusters: independent units.
        seed: of the draws.
        draws: how many random anchors.
    """
    hardness, before = _ranks(-outcome), _ranks(losses)
    places, rng = _places(clusters), np.random.default_rng([seed, 12])

    def both(order: Ints) -> tuple[float, float]:
        measure = _ranks(cud(overlap, erased[order]))
        return _correlation(measure, hardness), _correlation(_residual(measure, before), _residual(hardness, before))

    seen = both(np.arange(len(erased)))
    found = np.empty((draws, 2))
    for draw in range(draws):
        order = np.arange(len(erased))
        for held in places:
            order[held.reshape(-1)] = held[rng.permutation(len(held))].reshape(-1)
        found[draw] = both(order)
    p, p_partial = ((1 + (found >= np.array(seen) - 1e-12).sum(0)) / (1 + draws)).tolist()
    return Foretold(*seen, p, p_partial, np.asarray(found[:, 0], dtype=np.float64), len(erased))


def _places(clusters: Sequence[str]) -> list[Ints]:
    """Positions of the records of clusters of one size, ``[clusters, size]`` for each size."""
    held: dict[str, list[int]] = {}
    for at, name in enumerate(clusters):
        held.setdefault(name, []).append(at)
    sizes = sorted({len(v) for v in held.values()})
    return [np.array([v for v in held.values() if len(v) == n], dtype=np.int64) for n in sizes]


def _ranks(values: Floats) -> Floats:
    return np.asarray(stats.rankdata(values), dtype=np.float64)


def _residual(ranks: Floats, given: Floats) -> Floats:
    """What a line through the ranks of ``given`` leaves."""
    centred, other = ranks - ranks.mean(), given - given.mean()
    total = float(other @ other)
    return np.asarray(centred - (centred @ other / total * other if total > 0 else 0.0), dtype=np.float64)


def _correlation(a: Floats, b: Floats) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 1e-9 else 0.0
