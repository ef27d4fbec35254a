"""How well scores tell two samples apart: area under the ROC curve with DeLong's intervals, and the curve itself."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from expunge.core.errors import InputError
from expunge.core.intervals import Clusters, Floats, Interval, as_floats, cluster_codes, cluster_standard_error


def auc(less_member: ArrayLike, more_member: ArrayLike) -> float:
    """``P(less > more) + P(less = more) / 2`` for scores oriented "higher = less member-like".

    With holdout scores first and forget scores second: 1 is full memorisation, 0.5 none, below 0.5 over-unlearning. Costs
    ``O(n log n)``. NaN if a score is NaN.

    Raises:
        InputError: a sample is empty.
    """
    found = placements(as_floats(less_member), as_floats(more_member))
    return float(found[0].mean()) if found is not None else math.nan


def auc_delong(
    holdout: ArrayLike,
    forget: ArrayLike,
    level: float = 0.95,
    *,
    clusters: tuple[Clusters, Clusters] | None = None,
) -> Interval:
    """:func:`auc` with DeLong's interval (DeLong, DeLong and Clarke-Pearson 1988).

    Examples of one cluster are dependent; with ``clusters`` (of holdout, of forget) the placement values are summed by cluster
    first (Obuchowski 1997, for clusters that do not span both samples). Where the samples separate completely the variance
    estimate is zero and says nothing; the bound is then the exact one of ``k`` independent pairs that all agree,
    ``((1 - level)/2)^(1/k)`` with ``k`` the smaller number of clusters.

    Raises:
        InputError: a sample is empty, or lengths differ.
    """
    return _auc_interval(((as_floats(holdout), as_floats(forget)),), level, clusters)


def auc_difference(
    first: tuple[ArrayLike, ArrayLike],
    second: tuple[ArrayLike, ArrayLike],
    level: float = 0.95,
    *,
    clusters: tuple[Clusters, Clusters] | None = None,
) -> Interval:
    """``auc(*first) - auc(*second)`` with DeLong's interval for correlated samples: both pairs (holdout, forget) score the same
    examples in the same order, under two models.

    Raises:
        InputError: a sample is empty, or lengths differ.
    """
    a, b = (as_floats(first[0]), as_floats(first[1])), (as_floats(second[0]), as_floats(second[1]))
    if len(a[0]) != len(b[0]) or len(a[1]) != len(b[1]):
        raise InputError("Two models can only be compared on the same examples: the samples differ in length.")
    return _auc_interval((a, b), level, clusters)


def roc(holdout: ArrayLike, forget: ArrayLike) -> tuple[Floats, Floats]:
    """False and true positive rates of "member if the score is at most t", for every threshold, from (0, 0) to (1, 1).

    The area under the line (trapezoids) is :func:`auc`.

    Raises:
        InputError: a sample is empty.
    """
    outside, inside = np.sort(as_floats(holdout)), np.sort(as_floats(forget))
    thresholds = np.unique(np.concatenate([outside, inside]))
    fpr = np.searchsorted(outside, thresholds, side="right") / len(outside)
    tpr = np.searchsorted(inside, thresholds, side="right") / len(inside)
    return np.concatenate([[0.0], fpr]), np.concatenate([[0.0], tpr])


def tpr_at_fpr(holdout: ArrayLike, forget: ArrayLike, fpr: float = 0.01) -> tuple[int, int]:
    """Members that are caught while at most a share ``fpr`` of non-members is: (caught, members).

    Args:
        holdout: scores of non-members, higher = less member-like ``[m]``.
        forget: scores of members ``[n]``.
        fpr: allowed share of non-members, in [0, 1).

    Raises:
        InputError: a sample is empty, or the share is out of range.
    """
    if not 0 <= fpr < 1:
        raise InputError(f"The allowed share of false positives must be in [0, 1); got {fpr}.")
    outside, inside = np.sort(as_floats(holdout)), as_floats(forget)
    return int(np.sum(inside < outside[math.floor(fpr * len(outside))])), len(inside)


def placements(less: Floats, more: Floats) -> tuple[Floats, Floats] | None:
    """Share of the other sample that each value is above (less member) or below (more member), ties counted half.

    The mean of either is :func:`auc`; None if a score is NaN.
    """
    if np.isnan(less).any() or np.isnan(more).any():
        return None
    sorted_more, sorted_less = np.sort(more), np.sort(less)
    below = np.searchsorted(sorted_more, less, side="left") + np.searchsorted(sorted_more, less, side="right")
    upto = np.searchsorted(sorted_less, more, side="left") + np.searchsorted(sorted_less, more, side="right")
    return below / (2 * len(more)), 1 - upto / (2 * len(less))


def _auc_interval(pairs: tuple[tuple[Floats, Floats], ...], level: float, clusters: tuple[Clusters, Clusters] | None) -> Interval:
    less, more = pairs[0]
    n = len(less) + len(more)
    groups = clusters or ([str(i) for i in range(len(less))], [str(i) for i in range(len(more))])
    counts = (cluster_codes(groups[0], less)[1], cluster_codes(groups[1], more)[1])
    found = [placements(*pair) for pair in pairs]
    sides: list[list[Floats]] = [[], []]
    for both in found:
        if both is None:
            return Interval(math.nan, None, None, level, n, sum(counts))
        sides[0].append(both[0])
        sides[1].append(both[1])
    areas = [float(v.mean()) for v in sides[0]]
    value = areas[0] if len(areas) == 1 else areas[0] - areas[1]
    if min(counts) < 2:
        return Interval(value, None, None, level, n, sum(counts), fewest=min(counts))
    variance = 0.0
    for side, names in zip(sides, groups, strict=True):
        error = cluster_standard_error(side[0] if len(side) == 1 else side[0] - side[1], names)
        variance += 0.0 if error is None else error**2
    half = float(special.ndtri((1 + level) / 2)) * math.sqrt(variance)
    slack = 1 - ((1 - level) / 2) ** (1 / min(counts))
    # Complete separation leaves no variance to estimate from: each separated model keeps the exact bound of agreeing pairs.
    low, high = value - half, value + half
    for sign, area in zip((1, -1), areas, strict=False):
        if area in (0.0, 1.0):
            upward = (area == 0.0) == (sign == 1)
            low, high = (low, high + slack) if upward else (low - slack, high)
    bound = -1.0 if len(areas) == 2 else 0.0
    return Interval(value, max(bound, low), min(1.0, high), level, n, sum(counts), fewest=min(counts))
