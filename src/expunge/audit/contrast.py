"""Where a model stands between retrained models and the target, with what is known about chance.

Two kinds of chance are kept apart. *Examples*: the forget set is a sample of what the person might be asked about; subjects
(clusters) are independent. *Training*: two retrained models differ although neither saw the forget set, each guesses in its own
way; what counts here is that the mean over the forget set moves as a whole from seed to seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from expunge.core.intervals import Clusters, Floats, cluster_codes
from expunge.core.ranking import placements

_EXAMPLE_PRIOR = 3  # degrees of freedom lent to "examples are independent" where there are few clusters
_SEED_PRIOR = 4  # degrees of freedom lent to the assumed training noise where there are few retrained models


@dataclass(frozen=True)
class Contrast:
    """A model against retrained models on one quantity, oriented so that the target lies on the positive side.

    Attributes:
        difference: model minus the mean of the retrained models; positive means knowing more.
        gap: target minus the mean of the retrained models; positive wherever the quantity tells anything.
        error: standard error of the difference by the choice of examples.
        freedom: degrees of freedom of ``error``.
        spread: standard deviation between retrained models.
        spread_freedom: degrees of freedom of ``spread``.
        seeds: retrained models.
        n, clusters: examples and independent units behind the difference.
    """

    difference: float
    gap: float
    error: float
    freedom: float
    spread: float
    spread_freedom: float
    seeds: int
    n: int
    clusters: int

    @property
    def share(self) -> float:
        """The difference in units of the gap: 0 retrained, 1 target; NaN where there is no gap."""
        return self.difference / self.gap if self.gap > 0 else math.nan

    def interval(self, level: float) -> tuple[float, float]:
        """Interval of the difference from the *mean* of retrained models."""
        total, freedom = self._combined(1 / self.seeds)
        half = float(special.stdtrit(freedom, (1 + level) / 2)) * total
        return self.difference - half, self.difference + half

    def p_more(self) -> float:
        """One-sided p-value of "a further retrained model would differ that much towards the target"."""
        return self._tail(self.difference)

    def p_less(self) -> float:
        """The same on the far side."""
        return self._tail(-self.difference)

    def band(self, level: float) -> float:
        """Half width of the prediction band of one further retrained model: ``t s sqrt(1 + 1/k)``."""
        t = float(special.stdtrit(self.spread_freedom, (1 + level) / 2))
        return t * self.spread * math.sqrt(1 + 1 / self.seeds)

    def noise(self) -> float:
        """Standard error of the difference from one further retrained model."""
        return self._combined(1 + 1 / self.seeds)[0]

    def needed(self, room: float, level: float) -> tuple[Literal["subjects", "seeds"], int]:
        """What would narrow the interval to a half width of ``room``: ("subjects", how many) or ("seeds", how many)."""
        t = float(special.stdtrit(self._combined(1 / self.seeds)[1], (1 + level) / 2))
        left = room**2 - t**2 * self.spread**2 / self.seeds
        if left <= 0:
            return "seeds", math.ceil(2 * t**2 * self.spread**2 / room**2)
        return "subjects", max(self.clusters + 1, math.ceil(self.clusters * t**2 * self.error**2 / left))

    def _combined(self, weight: float) -> tuple[float, float]:
        """Standard error from both sources, and its degrees of freedom by Satterthwaite's formula."""
        a, b = self.error**2, weight * self.spread**2
        if a + b == 0:
            return 0.0, self.freedom
        return math.sqrt(a + b), (a + b) ** 2 / (a**2 / self.freedom + b**2 / self.spread_freedom)

    def _tail(self, difference: float) -> float:
        total, freedom = self._combined(1 + 1 / self.seeds)
        if total == 0:
            return 0.0 if difference > 0 else 1.0
        return float(special.stdtr(freedom, -difference / total))


def contrast(
    model: Floats, retrained: Sequence[Floats], clusters: Clusters, gap: float, *, toward: int, noise: float
) -> Contrast:
    """Compare means over the same examples.

    Args:
        model: per-example values of the model that is judged.
        retrained: the same of each retrained model.
        clusters: independent unit of each example.
        gap: mean of the target minus that of the retrained models, oriented (see :func:`gap_of`).
        toward: +1 if knowing more makes the values larger, -1 if smaller.
        noise: assumed standard deviation between retrained models, as a share of the gap. It is all there is with one
            retrained model, and is outweighed by what several show: ``s^2 = (4 a^2 + (k-1) s_k^2) / (3 + k)``.
    """
    difference = toward * (model - np.mean(retrained, axis=0))
    error, freedom = moderated_error(difference, clusters)
    spread, spread_freedom = moderated_spread([float(r.mean()) for r in retrained], noise * abs(gap))
    return Contrast(
        float(difference.mean()), gap, error, freedom, spread, spread_freedom, len(retrained), len(model),
        cluster_codes(clusters, model)[1],
    )  # fmt: skip


def contrast_auc(
    model: tuple[Floats, Floats],
    retrained: Sequence[tuple[Floats, Floats]],
    target: tuple[Floats, Floats],
    clusters: tuple[Clusters, Clusters],
    *,
    noise: float,
) -> Contrast:
    """Compare areas under the ROC curve of (holdout, forget) scores, by DeLong's placement values; see :func:`contrast`."""

    def sides(pair: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
        found = placements(*pair)
        return found if found is not None else (np.full(len(pair[0]), np.nan), np.full(len(pair[1]), np.nan))

    own, controls = sides(model), [sides(r) for r in retrained]
    areas = [float(c[0].mean()) for c in controls]
    gap = float(sides(target)[0].mean()) - float(np.mean(areas))
    variance = weighted = 0.0
    for side in (0, 1):
        error, freedom = moderated_error(own[side] - np.mean([c[side] for c in controls], axis=0), clusters[side])
        variance += error**2
        weighted += error**4 / freedom
    spread, spread_freedom = moderated_spread(areas, noise * abs(gap))
    count = cluster_codes(clusters[1], model[1])[1]
    return Contrast(
        float(own[0].mean()) - float(np.mean(areas)), gap, math.sqrt(variance), variance**2 / weighted if weighted else 1.0,
        spread, spread_freedom, len(retrained), len(model[1]), count,
    )  # fmt: skip


def gap_of(target: Floats, retrained: Sequence[Floats], *, toward: int) -> float:
    """Mean of the target minus that of the retrained models, oriented."""
    return toward * (float(target.mean()) - float(np.mean(retrained)))


def moderated_error(values: Floats, clusters: Clusters) -> tuple[float, float]:
    """Standard error of a mean of clustered values, usable also with one cluster, and its degrees of freedom.

    With few clusters their own variance is hardly known, with one not at all. The variance is therefore a weighted mean of that
    between clusters (weight ``C - 1``) and of that which independent examples would give (weight 3); the weights are its
    degrees of freedom. With many clusters only the clusters count. NaN with fewer than two examples.
    """
    n = len(values)
    if n < 2:
        return math.nan, 1.0
    codes, count = cluster_codes(clusters, values)
    residual = values - values.mean()
    independent = float(residual @ residual) / (n * (n - 1))
    if count < 2:
        return math.sqrt(independent), float(min(_EXAMPLE_PRIOR, n - 1))
    sums = np.bincount(codes, weights=residual, minlength=count)
    between = count / (count - 1) * float(sums @ sums) / n**2
    prior = min(_EXAMPLE_PRIOR, n - count)  # nothing is lent where every example is its own cluster
    freedom = prior + count - 1
    return math.sqrt((prior * independent + (count - 1) * between) / freedom), float(freedom)


def moderated_spread(means: Sequence[float], assumed: float) -> tuple[float, float]:
    """Standard deviation between retrained models, moderated by an assumed one that weighs as much as 4 degrees of freedom."""
    k = len(means)
    seen = float(np.var(means, ddof=1)) if k > 1 else 0.0
    freedom = _SEED_PRIOR + k - 1
    return math.sqrt((_SEED_PRIOR * assumed**2 + (k - 1) * seen) / freedom), float(freedom)
