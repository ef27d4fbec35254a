"""Intervals of measured numbers: over examples by clusters, over seeds by Student's t.

Re-exported by :mod:`expunge.core.statistics`, which is what the rest of Expunge imports.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from expunge.core.errors import InputError
from expunge.core.results import Direction, Number

Floats = NDArray[np.float64]
Clusters = Sequence[str] | NDArray[np.str_]

_KEPT = 1 << 24  #: numbers of resamples that are kept, at two bytes each
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
        fewest: independent units on the smaller side, where the value compares two samples; None: ``clusters``.
        exact: whether it holds its level however few they are.
    """

    value: float
    low: float | None
    high: float | None
    level: float
    n: int
    clusters: int
    over: Literal["examples", "seeds"] = "examples"
    fewest: int | None = None
    exact: bool = False

    def too_few(self) -> str:
        """Why there are too few independent units for the interval, one sentence; empty where there are enough.

        Resampled means lie between those of the smallest and the largest unit, and C units are all above or all below the
        median of what they were drawn from with probability ``2^(1-C)``. So no such interval holds a level above ``1 - 2^(1-C)``.
        """
        units = self.clusters if self.fewest is None else self.fewest
        if self.exact or not math.isfinite(self.value):
            return ""
        if self.over == "seeds":
            return "too few: one seed has no interval" if self.low is None else ""
        held = f"{units} independent group{'s' * (units != 1)}"
        if self.low is None:
            return (
                f"too few: {held}, and an interval needs two"
                if units < 2
                else "too few: on some resamples nothing is left to measure"
            )
        needed = math.ceil(1 - math.log2(1 - self.level))
        return f"too few: {held}, and an interval at {self.level:.0%} needs {needed}" if units < needed else ""

    def number(
        self,
        direction: Direction,
        range: tuple[float | None, float | None] = (None, None),
        note: str = "",
        flags: tuple[str, ...] = (),
    ) -> Number:
        """This interval as a checked :class:`~expunge.core.results.Number`; its bounds are cut to ``range``.

        A single example says nothing about others, so its value is withheld; what rests on too few is flagged.
        """
        least, most = range
        low, high = self.low, self.high
        if low is not None and least is not None:
            low = max(low, least)
        if high is not None and most is not None:
            high = min(high, most)
        few = self.too_few()
        flags = (*flags, few) if few else flags
        value = None if few and self.over == "examples" and self.n < 2 else self.value
        return Number(
            value=value, low=low, high=high, level=self.level, over=self.over, n=self.n, clusters=self.clusters,
            direction=direction, range=range, note=note, flags=flags,
        ).checked()  # fmt: skip


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
    arrays = tuple(as_floats(v) for v in (values if isinstance(values, tuple) else (values,)))
    codes, n_clusters = cluster_codes(clusters, *arrays)
    n = len(codes)
    value = float(statistic(*arrays))
    if n_clusters < 2 or not math.isfinite(value) or not all(np.isfinite(a).all() for a in arrays):
        return Interval(value, None, None, level, n, n_clusters)
    rng = np.random.default_rng(seed)
    if statistic is mean:
        kept = _kept(n_clusters, draws, seed)
        replicas = _resampled_means(arrays, codes, n_clusters, draws, rng if kept is None else kept)[:, 0]
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
        arrays = tuple(as_floats(v) for v in values)
        codes, count = cluster_codes(clusters, *arrays)
        points += [float(a.mean()) for a in arrays]
        replicas.append(_resampled_means(arrays, codes, count, draws, rng))
        n, total = n + len(codes), total + count
        fewest = count if fewest is None else min(fewest, count)
    value = float(combine(np.array([points]))[0])
    combined = combine(np.concatenate(replicas, axis=1))
    if fewest is None or fewest < 2 or not math.isfinite(value) or not np.isfinite(combined).all():
        return Interval(value, None, None, level, n, total, fewest=fewest)
    low, high = _percentiles(combined, fewest, level)
    return Interval(value, low, high, level, n, total, fewest=fewest)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, clusters: Clusters, *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Bootstrap interval over clusters of ``mean(a - b)``, where ``a[i]`` and ``b[i]`` belong to the same example.

    Raises:
        InputError: no observations, or lengths differ.
    """
    first, second = as_floats(a), as_floats(b)
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
    array = as_floats(values)
    codes, count = cluster_codes(clusters, array)
    if count < 2:
        return None
    residual = np.bincount(codes, weights=array - array.mean(), minlength=count)
    return float(math.sqrt(count / (count - 1) * float(residual @ residual)) / len(array))


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
    return Interval(share, low, high, level, n, n, exact=True)


def seed_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Student's t interval of the mean over seeds; one seed has no interval."""
    array = as_floats(values)
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
    array = as_floats(values)
    k = len(array)
    value = float(array.mean())
    if k < 2 or not math.isfinite(value):
        return Interval(value, None, None, level, k, k, "seeds")
    half = float(special.stdtrit(k - 1, (1 + level) / 2)) * math.sqrt(1 + 1 / k) * float(array.std(ddof=1))
    return Interval(value, value - half, value + half, level, k, k, "seeds")


def as_floats(values: ArrayLike) -> Floats:
    """A flat float64 array.

    Raises:
        InputError: it is empty or not flat.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise InputError(f"A statistic needs a flat, non-empty array of numbers; got shape {array.shape}.")
    return array


def cluster_codes(clusters: Clusters, *arrays: Floats) -> tuple[NDArray[np.intp], int]:
    """The cluster of each observation as a number from 0, and how many there are.

    Raises:
        InputError: an array has another length.
    """
    for array in arrays:
        if len(array) != len(clusters):
            raise InputError(f"There must be one cluster per value; got {len(clusters)} clusters and {len(array)} values.")
    names, codes = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    return codes.astype(np.intp), len(names)


def _resampled_means(
    arrays: tuple[Floats, ...], codes: NDArray[np.intp], count: int, draws: int, source: np.random.Generator | NDArray[np.uint16]
) -> Floats:
    """Means of each array under ``draws`` resamples of clusters, ``[draws, k]``: only cluster sums and sizes are touched.

    The resamples come from a generator, or are given: how often each cluster is drawn, ``[draws, count]``.
    """
    sizes = np.bincount(codes, minlength=count).astype(np.float64)
    columns = [sizes, *(np.bincount(codes, weights=a, minlength=count) for a in arrays)]
    sums = np.stack(columns, axis=1)
    block = max(1, _BLOCK // count)
    out = np.empty((draws, len(arrays)))
    for start in range(0, draws, block):
        stop = min(draws, start + block)
        counts = source[start:stop] if isinstance(source, np.ndarray) else _drawn(source, count, stop - start)
        drawn = counts.astype(np.float64) @ sums
        out[start:stop] = drawn[:, 1:] / drawn[:, :1]
    return out


def _drawn(rng: np.random.Generator, count: int, draws: int) -> NDArray[np.integer[Any]]:
    """How often each of ``count`` clusters is drawn, ``[draws, count]``."""
    found: NDArray[np.integer[Any]] = rng.multinomial(count, np.full(count, 1.0 / count), size=draws)
    return found


@functools.lru_cache(maxsize=4)
def _kept(count: int, draws: int, seed: int) -> NDArray[np.uint16] | None:
    """The resamples of a seed, which every metric on a set of so many clusters shares; None where they would be large to keep."""
    if count * draws > _KEPT or count > np.iinfo(np.uint16).max:
        return None
    rng, block = np.random.default_rng(seed), max(1, _BLOCK // count)
    parts = [_drawn(rng, count, min(block, draws - start)) for start in range(0, draws, block)]
    return np.concatenate(parts).astype(np.uint16)


def _percentiles(replicas: Floats, count: int, level: float) -> tuple[float, float]:
    t = float(special.stdtrit(count - 1, (1 - level) / 2))
    tail = float(special.ndtr(math.sqrt(count / (count - 1)) * t))
    low, high = np.quantile(replicas, [tail, 1 - tail])
    return float(low), float(high)
