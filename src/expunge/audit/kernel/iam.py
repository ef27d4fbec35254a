"""IAM, interpolated approximate measurement: how completely was each sample unlearned? (Wang et al. 2025, arXiv 2506.06112)

Needs the probability of the label only, from the unlearned model and from one or more models that were not trained on the sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from expunge.audit.kernel.arrays import Floats, matrix, vector
from expunge.core.errors import InputError

_EULER = 0.5772  # as in the authors' code


def gumbel_signal(probability: ArrayLike, *, e1: float = 1e-2, e2: float = 1e-5) -> Floats:
    """Bounded signal ``r(p) = -log(e1 - log(p + e2))``, rescaled to 0 at p = 0 and 1 at p = 1; rises with p.

    Args:
        probability: of the label, in [0, 1], any shape.
        e1: bounds the signal at p = 1; 0.1 for small tables.
        e2: bounds it at p = 0, smaller than e1; 1e-6 for small tables.

    Raises:
        InputError: a probability is out of range, or not 0 < e2 < e1.
    """
    if not 0 < e2 < e1:
        raise InputError(f"The bounds of the signal must satisfy 0 < e2 < e1; got {e2} and {e1}.")
    p = np.asarray(probability, dtype=np.float64)
    if (p < 0).any() or (p > 1).any():
        raise InputError("IAM reads probabilities in [0, 1].", "Pass the confidence, not the margin or the loss.")
    low, high = (-math.log(e1 - math.log(end + e2)) for end in (0.0, 1.0))
    return np.asarray((-np.log(e1 - np.log(p + e2)) - low) / (high - low), dtype=np.float64)


def iam_online(
    unlearned: ArrayLike, shadows: ArrayLike, original: ArrayLike, *, steps: int = 100,
    variance: Literal["joint", "example"] = "joint", e1: float = 1e-2, e2: float = 1e-5,
) -> Floats:  # fmt: skip
    """Unlearning score of each sample ``[examples]`` in [0, 1]: 1 looks never seen, 0 looks fully fitted.

    Between the signal of each OUT model and that of the original model lie ``steps`` interpolations ``a_k = k / (K - 1)``; at
    each a Gumbel distribution is fitted by moments, ``beta = sqrt(6) std / pi``, ``mu = mean - 0.5772 beta``, and the membership
    is ``sum_k a_{k+1} CDF_k(r_u) / sum_k a_{k+1}`` over k = 0..K-2. (The weights run from a_1 and the distributions from a_0, as
    in the published code.) The score is one minus that.

    Read it against the scores of retrained models on the same samples: above them is over-unlearned, below under-unlearned. A
    retrained model is near 1 only on samples that must be memorised; where models predict right without having seen the sample,
    original and retrained models score alike (0.48 and 0.43 on clean digits, against 0.15 and 0.98 on mislabelled ones). NaN
    where a probability is NaN.

    Args:
        unlearned: probability of the label under the audited model ``[examples]``.
        shadows: under models not trained on these samples ``[shadows, examples]``.
        original: under the model before unlearning ``[examples]``.
        steps: K, 2 or more.
        variance: "joint" is one spread over shadows and samples; "example" one per sample over shadows. One shadow has only the
            joint one. Where the spread of a sample is 0 the distribution is a step at the mean.
        e1, e2: see :func:`gumbel_signal`.

    Raises:
        InputError: shapes differ, a probability is out of range, or the joint spread is 0 (one sample with one shadow).
    """
    fit = gumbel_signal(vector(original, "original probabilities"), e1=e1, e2=e2)
    out = gumbel_signal(matrix(shadows, "shadow probabilities"), e1=e1, e2=e2)
    if len(fit) != out.shape[1]:
        raise InputError(f"Original and shadow models must score the same samples; got {len(fit)} and {out.shape[1]}.")
    return _score(gumbel_signal(vector(unlearned, "probabilities"), e1=e1, e2=e2), out, fit[None], steps, variance)


def iam_offline(
    unlearned: ArrayLike, shadows: ArrayLike, shadow_training: Sequence[ArrayLike], *, steps: int = 100,
    variance: Literal["joint", "example"] = "joint", e1: float = 1e-2, e2: float = 1e-5,
) -> Floats:  # fmt: skip
    """:func:`iam_online` without the original model: "fully fitted" is each shadow's mean signal over its OWN training data.

    Not for the forgetting of a class: the mean over all classes says nothing about how that class would be fitted.

    Args:
        unlearned, shadows: as for :func:`iam_online`.
        shadow_training: for each shadow, label probabilities of its training samples; lengths may differ.
        steps, variance, e1, e2: as for :func:`iam_online`.

    Raises:
        InputError: as :func:`iam_online`; or there is not one training sample set per shadow.
    """
    out = gumbel_signal(matrix(shadows, "shadow probabilities"), e1=e1, e2=e2)
    if len(shadow_training) != len(out):
        raise InputError(f"Each of the {len(out)} shadow models needs its own training samples; got {len(shadow_training)} sets.")
    own = [gumbel_signal(vector(t, "shadow training probabilities"), e1=e1, e2=e2).mean() for t in shadow_training]
    return _score(gumbel_signal(vector(unlearned, "probabilities"), e1=e1, e2=e2), out, np.array(own)[:, None], steps, variance)


def _score(signal: Floats, out: Floats, fit: Floats, steps: int, variance: Literal["joint", "example"]) -> Floats:
    if len(signal) != out.shape[1]:
        raise InputError(f"Unlearned and shadow models must score the same samples; got {len(signal)} and {out.shape[1]}.")
    if steps < 2:
        raise InputError(f"IAM needs two interpolations or more; got {steps}.")
    axes = 0 if variance == "example" and len(out) > 1 else None
    weights = np.linspace(0.0, 1.0, steps)
    total = np.zeros(len(signal))
    for at, weight in pairwise(weights):
        between = out + at * (fit - out)
        spread = _spread(between, axes)
        total += weight * _gumbel_cdf(signal, between.mean(axis=0), spread)
    return np.asarray(1 - total / weights[1:].sum(), dtype=np.float64)


def _spread(values: Floats, axis: int | None) -> Floats:
    if axis == 0:
        return np.asarray(values.std(axis=0), dtype=np.float64)
    usable = values[np.isfinite(values)]
    spread = float(usable.std()) if usable.size else math.nan
    if spread == 0:
        raise InputError("The shadow models' signals do not vary at all.", "Score more samples or more shadow models.")
    return np.full(values.shape[1], spread)


def _gumbel_cdf(x: Floats, mean: Floats, deviation: Floats) -> Floats:
    beta = math.sqrt(6) * deviation / math.pi
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        z = (x - mean) / beta + _EULER
        value = np.exp(-np.exp(-z))
    step = np.where(np.isnan(x) | np.isnan(mean), np.nan, (x >= mean).astype(np.float64))
    return np.asarray(np.where(deviation == 0, step, value), dtype=np.float64)


def iam_language(queried: ArrayLike, fit: ArrayLike, reference: ArrayLike, *, steps: int = 1000) -> Floats:
    """Membership of each text ``[texts]`` in [0, 1] from its mean loss under three models: 1 is fitted, 0 is not.

    The signal ``s = -log(e1 - log(u + e2))`` of ``u = 1 - exp(-NLL)``, with e1 = 0.1 and e2 = 1e-5, rises with the loss. Between
    the signals of a model that was trained on the texts and of one that was not lie ``steps`` interpolations
    ``s_fit + a (s_ref - s_fit)``; each is a Gumbel distribution with the spread of that curve over the texts; the membership is
    ``1 - sum_a a CDF_a(s_queried) / sum_a a``. (Weights and distributions are one step apart, as in the published code.)

    The reference itself does not score 0 (0.1 to 0.24, the closer the two models are): subtract what retrained models score on
    the same texts. What is less likely than under the reference saturates near 0. The spread is over the texts, so only scores of
    the same texts can be compared.

    Args:
        queried: mean loss of each text under the audited model, nats, at least 0.
        fit: under a model that was trained on them.
        reference: under a model that was not.
        steps: interpolations, 2 or more.

    Raises:
        InputError: lengths differ, a loss is negative, or the losses do not vary.
    """
    signals = [
        _loss_signal(vector(v, name)) for v, name in ((queried, "losses"), (fit, "fit losses"), (reference, "reference losses"))
    ]
    own, low, high = signals
    if not len(own) == len(low) == len(high):
        raise InputError(f"IAM compares the same texts under three models; got {len(own)}, {len(low)} and {len(high)}.")
    return _score(own, low[None], high[None], steps, "joint")


def _loss_signal(losses: Floats, e1: float = 0.1, e2: float = 1e-5) -> Floats:
    if (losses < 0).any():
        raise InputError("IAM reads mean losses of at least 0.", "Pass the loss, not the log-probability.")
    return np.asarray(-np.log(e1 - np.log(-np.expm1(-losses) + e2)), dtype=np.float64)
