"""The forgetting quality of the NeurIPS 2023 unlearning competition: an empirical epsilon per example from many models.

Triantafillou et al. 2024, *Are we making progress in unlearning? Findings from the first NeurIPS unlearning competition*,
arXiv 2406.09073. The competition used 512 unlearned and 512 retrained models.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from expunge.audit.kernel.arrays import Bools, Floats, Integers, matrix, same_examples, share, vector
from expunge.core.errors import InputError

_CUTS = 48  # ends of the intervals tried: quantiles of the pooled sample, 1,128 intervals
_PEAKED = 0.01  # ratio of ranges below which one sample counts as a point (the competition's code)
_COLUMNS = 4096  # examples at a time: bounds the memory, whatever their number


def forgetting_epsilon(unlearned: ArrayLike, retrained: ArrayLike, *, delta: float = 1e-5, intervals: bool = True) -> Floats:
    """How well the best attack tells unlearned from retrained models, per example, ``[examples]`` in [0, inf]; lower is better.

    An attack is a rule on the margin; with its rates FPR and FNR over the two sets of models

        eps = max( log(1 - delta - FPR) - log FNR,  log(1 - delta - FNR) - log FPR )

    and the largest over all attacks counts, not below 0. Attacks are every threshold, and intervals between quantiles of the
    pooled sample, each in both directions (the published code walks grids of 100 thresholds a unit and intervals of one width). A
    rule that makes one kind of error only is dropped, for its rate of 0 says that there were too few models; a rule without any
    error gives infinity, and so does a set of models whose range is less than 1 % of the other's, as in the published code.
    Scores that are equal in all models of both sets leave no rule: NaN, as does a margin that is not finite.

    The maximum over many rules is above 0 for retrained against retrained models too: compute that floor with a second set of
    them. On a small network with 32 + 32 models its median was 1.9, and 1.4 with thresholds alone. With m models no finite value
    exceeds ``log(m - 1)``.

    Args:
        unlearned, retrained: margins ``[models, examples]`` of the forget set, two models or more each.
        delta: of the (epsilon, delta) definition, in [0, 1); 1e-5 in the competition.
        intervals: whether rules of two ends are tried as well as thresholds.

    Raises:
        InputError: the examples differ, a set has fewer than two models, or delta is out of range.
    """
    first, second = matrix(unlearned, "margins (unlearned)"), matrix(retrained, "margins (retrained)")
    same_examples(first, second)
    if min(len(first), len(second)) < 2:
        raise InputError(f"Rates of errors need several models; got {len(first)} unlearned and {len(second)} retrained.")
    if not 0 <= delta < 1:
        raise InputError(f"Delta must be in [0, 1); got {delta}.")
    parts = [slice(at, at + _COLUMNS) for at in range(0, first.shape[1], _COLUMNS)]
    return np.concatenate([_epsilon(first[:, part], second[:, part], delta, intervals) for part in parts])


def forgetting_quality(epsilon: ArrayLike, *, width: float = 0.5, bins: int = 13) -> float:
    """``F = mean_s H(s)``, ``H(s) = 2 / 2^n(s)``: mean score of the bins n = 1..``bins`` of epsilon.

    In (0, 1], higher is better: 1 if every epsilon is below ``width``; the last bin has no upper end (the published code gives 0
    points beyond it, and as many bins as ``ceil(log(m - 1)) / width`` for m models). Retrained models get less than 1: see
    :func:`forgetting_epsilon`. NaN if an epsilon is.

    Args:
        epsilon: of each forget example ``[examples]``, not negative.
        width: of a bin.
        bins: their number.

    Raises:
        InputError: there is no example, or a value is out of range.
    """
    return float(forgetting_scores(epsilon, width=width, bins=bins).mean())


def forgetting_scores(epsilon: ArrayLike, *, width: float = 0.5, bins: int = 13) -> Floats:
    """``H(s) = 2 / 2^n(s)`` of each example ``[examples]``, in (0, 1]: see :func:`forgetting_quality`. NaN where the epsilon is.

    Raises:
        InputError: there is no example, or a value is out of range.
    """
    values = vector(epsilon, "epsilons")
    if (values < 0).any() or width <= 0 or bins < 1:
        raise InputError("Epsilons must not be negative, and there must be a bin of positive width.")
    number = np.minimum(np.floor(values / width) + 1, bins)
    return np.asarray(2.0 ** (1 - number), dtype=np.float64)


def competition_score(quality: float, retain: tuple[float, float], test: tuple[float, float]) -> float:
    """Final score ``F (RA_u / RA_r)(TA_u / TA_r)``, 0 or more; higher is better.

    Above F only if the unlearned models are more accurate than the retrained ones.

    Args:
        quality: :func:`forgetting_quality`.
        retain: mean retain accuracy of the unlearned and of the retrained models.
        test: the same for test accuracy.

    Raises:
        InputError: a number is out of range, or a retrained accuracy is 0.
    """
    value = share(quality, "forgetting quality")
    for mine, theirs in (retain, test):
        if share(theirs, "accuracy of retrained models") == 0:
            raise InputError("The score is undefined: the retrained models are never right.")
        value *= share(mine, "accuracy of unlearned models") / theirs
    return value


def _epsilon(first: Floats, second: Floats, delta: float, intervals: bool) -> Floats:
    pooled = np.concatenate([first, second])
    order = pooled.argsort(axis=0, kind="stable")
    ranked = np.take_along_axis(pooled, order, axis=0)
    upto = np.cumsum(order < len(first), axis=0)  # of the first set, at or below each rank
    of_second = np.arange(1, len(pooled) + 1)[:, None] - upto
    cut = np.vstack([ranked[:-1] < ranked[1:], np.ones((1, first.shape[1]), dtype=bool)])  # ranks behind which a threshold fits
    sizes = len(first), len(second)
    best = np.full(first.shape[1], np.nan)
    for rank in range(len(pooled) - 1):
        best = np.fmax(best, _rule(upto[rank], of_second[rank], sizes, cut[rank], delta))
    for low, high in _intervals(len(pooled)) if intervals else ():
        inside = (upto[high] - upto[low], of_second[high] - of_second[low])
        best = np.fmax(best, _rule(*inside, sizes, cut[low] & cut[high], delta))
    with np.errstate(invalid="ignore", divide="ignore"):
        spans = np.stack([np.ptp(first, axis=0), np.ptp(second, axis=0)])
        best[spans.min(axis=0) / spans.max(axis=0) < _PEAKED] = math.inf
    best[~np.isfinite(pooled).all(axis=0)] = np.nan
    return best


def _intervals(n: int) -> list[tuple[int, int]]:
    ends = np.unique(np.linspace(0, n - 1, min(_CUTS, n)).astype(np.int64))
    return [(int(low), int(high)) for i, low in enumerate(ends) for high in ends[i + 1 :] if high < n - 1]


def _rule(first: Integers, second: Integers, sizes: tuple[int, int], valid: Bools, delta: float) -> Floats:
    """Epsilon of "the first set is where the counts are", and of the opposite, per example; NaN where the rule is dropped."""
    found = np.full(first.shape, np.nan)
    for fpr, fnr in ((second / sizes[1], 1 - first / sizes[0]), (1 - second / sizes[1], first / sizes[0])):
        with np.errstate(invalid="ignore", divide="ignore"):
            both = np.maximum(np.log(1 - delta - fpr) - np.log(fnr), np.log(1 - delta - fnr) - np.log(fpr))
        undefined = (fpr * fnr == 0) | ~valid
        value = np.where(undefined, np.nan, np.maximum(both, 0.0))
        value = np.where((fpr + fnr == 0) & valid, np.inf, value)
        found = np.fmax(found, value)
    return found
