"""Intervals and tests for measured numbers.

Three sources of variance are never mixed: *examples* (the finite probe set; resampled by cluster, because questions about one
person share their fate), *training* (the seed of a retrained model; :func:`seed_interval`, :func:`prediction_band`), and the
protocol, about which no formula here says anything.

All functions are pure and deterministic (random ones by ``seed``), work in float64 and take numpy arrays or sequences.
A sample that holds NaN or infinity gives an :class:`Interval` without bounds, whose value says so; it is no error, because a
destroyed model does produce such losses and they must be reported as what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from expunge.core.errors import InputError
from expunge.core.kolmogorov import KSResult, ks
from expunge.core.results import Direction, Number

__all__ = [
    "Equivalence",
    "Interval",
    "KSResult",
    "auc",
    "auc_delong",
    "auc_difference",
    "bootstrap",
    "bootstrap_means",
    "cluster_standard_error",
    "equivalence",
    "harmonic_mean",
    "holm",
    "ks",
    "mean",
    "paired_bootstrap",
    "prediction_band",
    "roc",
    "seed_interval",
    "tost",
    "wilson",
]

Floats = NDArray[np.float64]
Clusters = Sequence[str] | NDArray[np.str_]

_BLOCK = 1 << 22  # numbers held at a time by a bootstrap: 32 MiB of weights, whatever the number of clusters


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval.

    Attributes:
        value: the estimate.
        low, high: bounds; None where none can be given (one cluster, one seed, a value that is not finite).
        level: nominal coverage.
        n: observations behind it.
        clusters: independent units among them.
        over: what the interval is about: the choice of examples or the seeds of training.
    """

    value: float
    low: float | None
    high: float | None
    level: float
    n: int
    clusters: int
    over: Literal["examples", "seeds"] = "examples"

    def number(
        self,
        direction: Direction,
        range: tuple[float | None, float | None] = (None, None),
        note: str = "",
        flags: tuple[str, ...] = (),
    ) -> Number:
        """This interval as a checked :class:`~expunge.core.results.Number`; its bounds are cut to ``range``."""
        least, most = range
        low, high = self.low, self.high
        if low is not None and least is not None:
            low = max(low, least)
        if high is not None and most is not None:
            high = min(high, most)
        if self.clusters < 2 and self.low is None:
            flags = (*flags, f"no interval: only {self.clusters} independent {'group' if self.over == 'examples' else 'seed'}")
        return Number(
            value=self.value, low=low, high=high, level=self.level, over=self.over, n=self.n, clusters=self.clusters,
            direction=direction, range=range, note=note, flags=flags,
        ).checked()  # fmt: skip


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests: is a mean difference within ``+- margin``?

    Attributes:
        difference: the mean difference.
        low, high: its interval at ``level`` (90 %: each one-sided test at 5 %); None if there are fewer than two clusters.
        p: the larger of the two one-sided p-values; 1.0 where it cannot be computed.
        margin: the margin tested.
        level: coverage of the interval.
        equivalent: whether the whole interval lies within the margin.
    """

    difference: float
    low: float | None
    high: float | None
    p: float
    margin: float
    level: float
    equivalent: bool


def mean(values: Floats) -> float:
    """Arithmetic mean; the default statistic of :func:`bootstrap`, which resamples it without copying the values."""
    return float(np.mean(values))


def bootstrap(
    values: ArrayLike | tuple[ArrayLike, ...],
    clusters: Clusters,
    statistic: Callable[..., float] = mean,
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval over clusters.

    Whole clusters are drawn with replacement. The bounds are *expanded* percentiles: a plain percentile interval is too narrow
    for few clusters (it ignores both the factor ``C/(C-1)`` and Student's t), so the tails are taken at
    ``Phi(-sqrt(C/(C-1)) t_{C-1})`` instead (Hesterberg 2015, *What teachers should know about the bootstrap*, section 4.3).
    With many clusters both agree.

    Args:
        values: one value per observation, or a tuple of aligned arrays that the statistic takes as arguments.
        clusters: independent unit of each observation.
        statistic: function of the array(s); for :func:`mean` the resampling costs milliseconds, any other function is called
            ``draws`` times.
        draws: resamples.
        level: coverage, in (0, 1).
        seed: of the resampling.

    Raises:
        InputError: no observations, or lengths differ.
    """
    arrays = tuple(_array(v) for v in (values if isinstance(values, tuple) else (values,)))
    codes, n_clusters = _codes(clusters, *arrays)
    n = len(codes)
    value = float(statistic(*arrays))
    if n_clusters < 2 or not math.isfinite(value) or not all(np.isfinite(a).all() for a in arrays):
        return Interval(value, None, None, level, n, n_clusters)
    rng = np.random.default_rng(seed)
    if statistic is mean:
        replicas = _resampled_means(arrays, codes, n_clusters, draws, rng)[:, 0]
    else:
        order = np.argsort(codes, kind="stable")
        members = np.split(order, np.cumsum(np.bincount(codes, minlength=n_clusters))[:-1])
        replicas = np.empty(draws)
        for draw in range(draws):
            rows = np.concatenate([members[c] for c in rng.integers(n_clusters, size=n_clusters)])
            replicas[draw] = statistic(*(a[rows] for a in arrays))
    low, high = _percentiles(replicas, n_clusters, level)
    return Interval(value, low, high, level, n, n_clusters)


def bootstrap_means(
    groups: Sequence[tuple[Sequence[ArrayLike], Clusters]],
    combine: Callable[[Floats], Floats],
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Joint bootstrap of a function of several means, such as the nine components of TOFU's model utility.

    Arrays of one group are aligned and resampled together; groups (data sets) are resampled independently.

    Args:
        groups: pairs of aligned arrays and their clusters.
        combine: maps component means ``[draws, k]`` (components in order of the groups) to ``[draws]``.
        draws, level, seed: as in :func:`bootstrap`.

    Raises:
        InputError: a group is empty, or lengths differ.
    """
    rng = np.random.default_rng(seed)
    points: list[float] = []
    replicas: list[Floats] = []
    n = total = 0
    fewest = None
    for values, clusters in groups:
        arrays = tuple(_array(v) for v in values)
        codes, count = _codes(clusters, *arrays)
        points += [float(a.mean()) for a in arrays]
        replicas.append(_resampled_means(arrays, codes, count, draws, rng))
        n, total = n + len(codes), total + count
        fewest = count if fewest is None else min(fewest, count)
    value = float(combine(np.array([points]))[0])
    combined = combine(np.concatenate(replicas, axis=1))
    if fewest is None or fewest < 2 or not math.isfinite(value) or not np.isfinite(combined).all():
        return Interval(value, None, None, level, n, total)
    low, high = _percentiles(combined, fewest, level)
    return Interval(value, low, high, level, n, total)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, clusters: Clusters, *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Bootstrap interval over clusters of ``mean(a - b)``, where ``a[i]`` and ``b[i]`` belong to the same example.

    Raises:
        InputError: no observations, or lengths differ.
    """
    first, second = _array(a), _array(b)
    if len(first) != len(second):
        raise InputError(f"Paired samples must be of equal length; got {len(first)} and {len(second)}.")
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, and reported as such
        difference = first - second
    return bootstrap(difference, clusters, draws=draws, level=level, seed=seed)


def cluster_standard_error(values: ArrayLike, clusters: Clusters) -> float | None:
    """Standard error of the mean of clustered observations; None with fewer than two clusters.

    The mean is the ratio of cluster sums to cluster sizes, linearised:
    ``SE = sqrt(C/(C-1) sum_c (S_c - m n_c)^2) / n``; with one observation per cluster it is the textbook ``s/sqrt(n)``.
    """
    array = _array(values)
    codes, count = _codes(clusters, array)
    if count < 2:
        return None
    residual = np.bincount(codes, weights=array - array.mean(), minlength=count)
    return float(math.sqrt(count / (count - 1) * float(residual @ residual)) / len(array))


def tost(a: ArrayLike, b: ArrayLike | None = None, *, clusters: Clusters, margin: float, level: float = 0.90) -> Equivalence:
    """Two one-sided t-tests for ``|mean(a - b)| < margin``, with clusters as the independent units.

    Equivalent if and only if the ``level`` interval of the mean difference lies strictly within ``(-margin, margin)``, which is
    the test at size ``(1 - level) / 2`` (Schuirmann 1987). The interval uses :func:`cluster_standard_error` and Student's t with
    ``C - 1`` degrees of freedom.

    Args:
        a: differences, or the first of two aligned samples.
        b: the second sample; none if ``a`` holds differences.
        clusters: independent unit of each observation.
        margin: positive, in the unit of the differences.
        level: coverage of the interval.

    Raises:
        InputError: no observations, lengths differ, or the margin is not positive.
    """
    if not margin > 0:
        raise InputError(f"An equivalence margin must be positive; got {margin}.")
    difference = _array(a)
    if b is not None:
        other = _array(b)
        if len(other) != len(difference):
            raise InputError(f"Paired samples must be of equal length; got {len(difference)} and {len(other)}.")
        with np.errstate(invalid="ignore"):
            difference = difference - other
    at = float(difference.mean())
    count = _codes(clusters, difference)[1]
    if not math.isfinite(at):
        return Equivalence(at, None, None, 1.0, margin, level, False)
    error = cluster_standard_error(difference, clusters)
    if error is None:
        return Equivalence(at, None, None, 1.0, margin, level, False)
    return equivalence(at, error, count - 1, margin, level)


def equivalence(difference: float, error: float, freedom: float, margin: float, level: float = 0.90) -> Equivalence:
    """Two one-sided t-tests from a difference, its standard error and the degrees of freedom; see :func:`tost`."""
    if error == 0:
        inside = abs(difference) < margin
        return Equivalence(difference, difference, difference, 0.0 if inside else 1.0, margin, level, inside)
    half = float(special.stdtrit(freedom, (1 + level) / 2)) * error
    upper = float(special.stdtr(freedom, (difference - margin) / error))
    lower = float(special.stdtr(freedom, (-margin - difference) / error))
    low, high = difference - half, difference + half
    return Equivalence(difference, low, high, max(upper, lower), margin, level, -margin < low and high < margin)


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion of ``k`` in ``n``; never empty at 0 or n, so "no leak" is a bound, not a zero.

    Raises:
        InputError: ``n`` is not positive or ``k`` is not in [0, n].
    """
    if n < 1 or not 0 <= k <= n:
        raise InputError(f"A proportion needs 0 <= k <= n and n >= 1; got k={k}, n={n}.")
    z = float(special.ndtri((1 + level) / 2))
    share = k / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if k == 0 else centre - half
    high = 1.0 if k == n else centre + half
    return Interval(share, low, high, level, n, n)


def seed_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Student's t interval of the mean over seeds; one seed has no interval."""
    array = _array(values)
    k = len(array)
    value = float(array.mean())
    if k < 2 or not math.isfinite(value):
        return Interval(value, None, None, level, k, k, "seeds")
    half = float(special.stdtrit(k - 1, (1 + level) / 2)) * float(array.std(ddof=1)) / math.sqrt(k)
    return Interval(value, value - half, value + half, level, k, k, "seeds")


def prediction_band(values: ArrayLike, level: float = 0.95) -> Interval:
    """Where the value of one *further* model is expected: ``mean +- t_{k-1} sqrt(1 + 1/k) s``.

    The multipliers of ``s`` at 95 % are 15.6 (k = 2), 5.0 (3), 3.0 (5), 2.4 (10): few seeds say little. One seed has no band.
    """
    array = _array(values)
    k = len(array)
    value = float(array.mean())
    if k < 2 or not math.isfinite(value):
        return Interval(value, None, None, level, k, k, "seeds")
    half = float(special.stdtrit(k - 1, (1 + level) / 2)) * math.sqrt(1 + 1 / k) * float(array.std(ddof=1))
    return Interval(value, value - half, value + half, level, k, k, "seeds")


def harmonic_mean(values: ArrayLike) -> float:
    """Harmonic mean of non-negative numbers; 0 if any is 0.

    Raises:
        InputError: none given, or one is negative.
    """
    array = _array(values)
    if (array < 0).any():
        raise InputError(f"A harmonic mean needs non-negative numbers; got {float(array.min())}.")
    if (array == 0).any():
        return 0.0
    return float(len(array) / np.sum(1.0 / array))


def holm(pvalues: ArrayLike) -> Floats:
    """Holm's step-down adjusted p-values, in the order given: ``max_{j<=i} min(1, (m - j + 1) p_(j))``."""
    p = _array(pvalues)
    order = np.argsort(p, kind="stable")
    adjusted = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    out = np.empty_like(adjusted)
    out[order] = adjusted
    return out


def auc(less_member: ArrayLike, more_member: ArrayLike) -> float:
    """``P(less > more) + P(less = more) / 2`` for scores oriented "higher = less member-like".

    With holdout scores first and forget scores second: 1 is full memorisation, 0.5 none, below 0.5 over-unlearning. Costs
    ``O(n log n)``. NaN if a score is NaN.

    Raises:
        InputError: a sample is empty.
    """
    placements = _placements(_array(less_member), _array(more_member))
    return float(placements[0].mean()) if placements is not None else math.nan


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
    return _auc_interval(((_array(holdout), _array(forget)),), level, clusters)


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
    a, b = (_array(first[0]), _array(first[1])), (_array(second[0]), _array(second[1]))
    if len(a[0]) != len(b[0]) or len(a[1]) != len(b[1]):
        raise InputError("Two models can only be compared on the same examples: the samples differ in length.")
    return _auc_interval((a, b), level, clusters)


def roc(holdout: ArrayLike, forget: ArrayLike) -> tuple[Floats, Floats]:
    """False and true positive rates of "member if the score is at most t", for every threshold, from (0, 0) to (1, 1).

    The area under the line (trapezoids) is :func:`auc`.

    Raises:
        InputError: a sample is empty.
    """
    outside, inside = np.sort(_array(holdout)), np.sort(_array(forget))
    thresholds = np.unique(np.concatenate([outside, inside]))
    fpr = np.searchsorted(outside, thresholds, side="right") / len(outside)
    tpr = np.searchsorted(inside, thresholds, side="right") / len(inside)
    return np.concatenate([[0.0], fpr]), np.concatenate([[0.0], tpr])


def _array(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise InputError(f"A statistic needs a flat, non-empty array of numbers; got shape {array.shape}.")
    return array


def _codes(clusters: Clusters, *arrays: Floats) -> tuple[NDArray[np.intp], int]:
    for array in arrays:
        if len(array) != len(clusters):
            raise InputError(f"There must be one cluster per value; got {len(clusters)} clusters and {len(array)} values.")
    names, codes = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    return codes.astype(np.intp), len(names)


def _resampled_means(
    arrays: tuple[Floats, ...], codes: NDArray[np.intp], count: int, draws: int, rng: np.random.Generator
) -> Floats:
    """Means of each array under ``draws`` resamples of clusters, ``[draws, k]``: only cluster sums and sizes are touched."""
    sizes = np.bincount(codes, minlength=count).astype(np.float64)
    columns = [sizes, *(np.bincount(codes, weights=a, minlength=count) for a in arrays)]
    sums = np.stack(columns, axis=1)
    block = max(1, _BLOCK // count)
    out = np.empty((draws, len(arrays)))
    for start in range(0, draws, block):
        stop = min(draws, start + block)
        weights = rng.multinomial(count, np.full(count, 1.0 / count), size=stop - start).astype(np.float64)
        drawn = weights @ sums
        out[start:stop] = drawn[:, 1:] / drawn[:, :1]
    return out


def _percentiles(replicas: Floats, count: int, level: float) -> tuple[float, float]:
    t = float(special.stdtrit(count - 1, (1 - level) / 2))
    tail = float(special.ndtr(math.sqrt(count / (count - 1)) * t))
    low, high = np.quantile(replicas, [tail, 1 - tail])
    return float(low), float(high)


def _placements(less: Floats, more: Floats) -> tuple[Floats, Floats] | None:
    """Share of the other sample that each value is above (less member) or below (more member), ties counted half."""
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
    counts = (_codes(groups[0], less)[1], _codes(groups[1], more)[1])
    placements = [_placements(*pair) for pair in pairs]
    sides: list[list[Floats]] = [[], []]
    for found in placements:
        if found is None:
            return Interval(math.nan, None, None, level, n, sum(counts))
        sides[0].append(found[0])
        sides[1].append(found[1])
    areas = [float(v.mean()) for v in sides[0]]
    value = areas[0] if len(areas) == 1 else areas[0] - areas[1]
    if min(counts) < 2:
        return Interval(value, None, None, level, n, sum(counts))
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
    return Interval(value, max(bound, low), min(1.0, high), level, n, sum(counts))
