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
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from expunge.core.errors import InputError
from expunge.core.intervals import (
    Clusters,
    Floats,
    Interval,
    as_floats,
    bootstrap,
    bootstrap_means,
    cluster_codes,
    cluster_standard_error,
    mean,
    paired_bootstrap,
    prediction_band,
    seed_interval,
    wilson,
)
from expunge.core.kolmogorov import KSResult, ks
from expunge.core.ranking import auc, auc_delong, auc_difference, roc

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
    difference = as_floats(a)
    if b is not None:
        other = as_floats(b)
        if len(other) != len(difference):
            raise InputError(f"Paired samples must be of equal length; got {len(difference)} and {len(other)}.")
        with np.errstate(invalid="ignore"):
            difference = difference - other
    at = float(difference.mean())
    count = cluster_codes(clusters, difference)[1]
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


def harmonic_mean(values: ArrayLike) -> float:
    """Harmonic mean of non-negative numbers; 0 if any is 0.

    Raises:
        InputError: none given, or one is negative.
    """
    array = as_floats(values)
    if (array < 0).any():
        raise InputError(f"A harmonic mean needs non-negative numbers; got {float(array.min())}.")
    if (array == 0).any():
        return 0.0
    return float(len(array) / np.sum(1.0 / array))


def holm(pvalues: ArrayLike) -> Floats:
    """Holm's step-down adjusted p-values, in the order given: ``max_{j<=i} min(1, (m - j + 1) p_(j))``."""
    p = as_floats(pvalues)
    order = np.argsort(p, kind="stable")
    adjusted = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    out = np.empty_like(adjusted)
    out[order] = adjusted
    return out
