"""Attacks example by example, from many models: LiRA, U-LiRA, RMIA.

Membership scores here are HIGHER = MORE member-like, as in their papers; :mod:`expunge.core.ranking` wants the opposite, so pass
it the negative. Margins are ``phi = log p_y - log(1 - p_y)`` from :func:`~expunge.audit.kernel.quantities.quantities`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from expunge.audit.kernel.arrays import Bools, Floats, finite, matrix, same_examples, vector
from expunge.core.errors import InputError

Variance = Literal["auto", "example", "global"]

_ENOUGH = 64  # models from which a variance per example is better than one for all (the authors' code)


@dataclass(frozen=True)
class Gaussians:
    """One Gaussian per example: mean and standard deviation ``[examples]``."""

    mean: Floats
    deviation: Floats


def lira(
    target: ArrayLike, shadows: ArrayLike, trained_on: ArrayLike, *, mode: Literal["online", "offline"] = "online",
    variance: Variance = "auto",
) -> Floats:  # fmt: skip
    """LiRA scores ``[examples]``, higher = more member-like (Carlini et al. 2022, *Membership inference attacks from first
    principles*).

    Online: ``log N(phi; in) - log N(phi; out)``, unbounded. Offline: ``1 - Pr[Z > phi]`` with Z from the OUT Gaussian, in [0, 1].
    A retrained model's forget examples score like unseen ones: about 0.5 offline, negative on average online.

    The variance is one for all examples where fewer than 64 shadow models stand behind each Gaussian, else one per example. The
    single one is the mean of the variances *within* examples; the published code pools raw values instead and so adds the
    spread between examples, which no shadow model causes. NaN where a margin is not finite or a shadow variance is 0.

    Args:
        target: margins of the attacked model ``[examples]``.
        shadows: margins of the shadow models ``[models, examples]``.
        trained_on: whether each shadow model was trained on each example ``[models, examples]``.
        mode: offline needs no model trained on the example.
        variance: "auto" is the rule above.

    Raises:
        InputError: shapes differ, or an example has no OUT model (online: no IN model), or the single variance cannot be
        estimated
            because no example has two.
    """
    phi, margins = vector(target, "target margins"), matrix(shadows, "shadow margins")
    inside = _mask(trained_on, margins)
    if margins.shape[1] != len(phi):
        raise InputError(f"Shadow models and target must score the same examples; got {margins.shape[1]} and {len(phi)}.")
    out = gaussians(margins, ~inside, variance, "OUT")
    with np.errstate(invalid="ignore"):
        if mode == "offline":
            return np.asarray(special.ndtr((phi - out.mean) / out.deviation), dtype=np.float64)
        into = gaussians(margins, inside, variance, "IN")
        return _log_density(phi, into) - _log_density(phi, out)


def gaussians(margins: Floats, where: Bools, variance: Variance = "auto", name: str = "") -> Gaussians:
    """Fit one Gaussian per example over the models that a mask ``[models, examples]`` selects; see :func:`lira` for the variance.

    Deviations of 0 become NaN: models that agree to the last digit allow no likelihood.

    Raises:
        InputError: an example has no model, or there is no example with two.
    """
    count = where.sum(axis=0).astype(np.float64)
    if (count == 0).any():
        raise InputError(
            f"{int((count == 0).sum())} of {len(count)} examples have no {name} shadow model.",
            "Train more shadow models on random halves.",
        )
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(where, margins, 0.0).sum(axis=0) / count
        squares = (np.where(where, margins - mean, 0.0) ** 2).sum(axis=0)
        if variance == "global" or (variance == "auto" and count.min() < _ENOUGH):
            usable = np.isfinite(squares)
            freedom = float((count - 1)[usable].sum())
            if freedom == 0 and usable.any():
                raise InputError(
                    f"No example has two {name} shadow models: a variance cannot be estimated.", "Train at least two."
                )
            spread = np.full(len(count), float(squares[usable].sum()) / freedom if freedom else math.nan)
        else:
            spread = squares / (count - 1)
    deviation = np.sqrt(spread)
    return Gaussians(mean, np.where(deviation > 0, deviation, np.nan))


@dataclass(frozen=True)
class ULira:
    """Result of :func:`u_lira`.

    Attributes:
        accuracy: over models and examples, [0, 1]; 0.5 is perfect forgetting, 1 none.
        per_example: over models ``[examples]``.
        models: held-out models behind it.
    """

    accuracy: float
    per_example: Floats
    models: int


def u_lira(inside: ArrayLike, outside: ArrayLike, *, variance: Variance = "auto") -> ULira:
    """U-LiRA: can a model that unlearned an example be told from one that never had it? (Hayes et al. 2024, arXiv 2403.01218).

    Per example a Gaussian over each population; a held-out model of each is given to the likelier one. One model of each
    population is held out at a time, always in pairs, so that both Gaussians rest on equally many models and chance is exactly
    0.5 (leaving out only the tested one would bias it below). In [0, 1]: 0.5 = cannot be told apart, which is also what retrained
    models get against retrained models (compute that floor with a second set of them); towards 1 = remembered *or* overtreated.
    Values below 0.5 are noise.

    Populations: (in) models trained with the example that then unlearned it, (out) models trained without it that unlearned
    something else of the same kind; cheaper, originals or unlearned models against retrained ones. The variance follows
    :func:`lira`'s rule. NaN for an example with a margin that is not finite; the accuracy is then NaN too.

    Args:
        inside, outside: margins ``[models, examples]`` of both populations, three models or more each; the larger is cut to the
            size of the smaller.
        variance: one for all examples or one per example.

    Raises:
        InputError: the examples differ, or a population has fewer than three models.
    """
    first, second = matrix(inside, "margins (in)"), matrix(outside, "margins (out)")
    same_examples(first, second)
    size = min(len(first), len(second))
    if size < 3:
        raise InputError(f"U-LiRA needs three models of each population; got {len(first)} and {len(second)}.")
    single = variance == "global" or (variance == "auto" and size < _ENOUGH)
    with np.errstate(invalid="ignore", divide="ignore"):
        fits = [_leave_one_out(sample[:size], single) for sample in (first, second)]
        right = np.zeros(first.shape[1])
        for i in range(size):
            pair = [Gaussians(mean[i], deviation[i]) for mean, deviation in fits]
            for sample, own, other in ((first, pair[0], pair[1]), (second, pair[1], pair[0])):
                difference = _log_density(sample[i], own) - _log_density(sample[i], other)
                right += np.heaviside(difference, 0.5)
    per_example = right / (2 * size)
    return ULira(float(per_example.mean()), per_example, 2 * size)


def rmia(
    target: ArrayLike, references: ArrayLike, population_target: ArrayLike, population_references: ArrayLike,
    *, a: float = 0.3, gamma: float = 2.0,
) -> Floats:  # fmt: skip
    """RMIA scores ``[examples]`` in [0, 1], higher = more member-like (Zarifzadeh et al. 2024, arXiv 2312.03262), offline.

    ``ratio(x) = p(x) / pbar(x)``, ``pbar = ((1 + a) mean_OUT p + (1 - a)) / 2``; the score is the share of population points z
    with ``ratio(x) / ratio(z) > gamma``. Works with one to four reference models. A retrained model's forget examples score like
    unseen ones: about ``Pr[ratio(z') / ratio(z) > gamma]`` over the population, below 0.5 for gamma > 1. ``O((n + z) log z)``.
    NaN where a probability is.

    Args:
        target: label probabilities of the attacked model ``[n]``.
        references: of models not trained on these examples ``[models, n]``.
        population_target, population_references: the same for population points ``[z]``, ``[models, z]``.
        a: in [0, 1], tuned on a pair of reference models; 0.3 in the paper for CIFAR-10.
        gamma: 1 or larger.

    Raises:
        InputError: shapes differ, a probability or a parameter is out of range.
    """
    if not 0 <= a <= 1 or not gamma >= 1:
        raise InputError(f"RMIA needs a in [0, 1] and gamma of 1 or more; got {a} and {gamma}.")
    own = _ratio(vector(target, "target probabilities"), matrix(references, "reference probabilities"), a)
    others = _ratio(
        vector(population_target, "population probabilities"), matrix(population_references, "population references"), a
    )
    if not finite(others):
        return np.full(len(own), math.nan)
    below = np.searchsorted(np.sort(others * gamma), own, side="left") / len(others)
    return np.where(np.isnan(own), np.nan, below)


def _ratio(p: Floats, references: Floats, a: float) -> Floats:
    if references.shape[1] != len(p):
        raise InputError(f"Reference models and target must score the same examples; got {references.shape[1]} and {len(p)}.")
    for values in (p, references):
        if (values < 0).any() or (values > 1).any():
            raise InputError("RMIA reads probabilities in [0, 1].", "Pass the confidence, not the margin or the loss.")
    bar = ((1 + a) * references.mean(axis=0) + (1 - a)) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(p / bar, dtype=np.float64)


def _mask(trained_on: ArrayLike, margins: Floats) -> Bools:
    mask = np.asarray(trained_on)
    if mask.shape != margins.shape or not np.isin(mask, (0, 1)).all():
        raise InputError(f"'trained_on' must hold 0 or 1 for each shadow model and example, {margins.shape}; got {mask.shape}.")
    return mask.astype(bool)


def _log_density(phi: Floats, fit: Gaussians) -> Floats:
    return np.asarray(-np.log(fit.deviation) - 0.5 * ((phi - fit.mean) / fit.deviation) ** 2, dtype=np.float64)


def _leave_one_out(sample: Floats, single: bool) -> tuple[Floats, Floats]:
    """Means and deviations ``[models, examples]`` of all other models, by updating those of all."""
    n = len(sample)
    centre = sample.mean(axis=0)
    off = sample - centre
    mean = centre - off / (n - 1)
    squares = (off**2).sum(axis=0) - off**2 * n / (n - 1)
    spread = np.maximum(squares, 0.0) / (n - 2)
    if single:
        usable = np.isfinite(spread)
        spread = np.broadcast_to((np.where(usable, spread, 0.0).sum(axis=1) / usable.sum(axis=1))[:, None], spread.shape)
    deviation = np.sqrt(spread)
    return mean, np.where(deviation > 0, deviation, np.nan)
