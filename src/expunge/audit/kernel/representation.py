"""Measures on features: a model may answer as if it had forgotten while its representation still holds what was learnt.

Kim, Cha and Kim 2025, *Are We Truly Forgetting? A Critical Re-examination of Machine Unlearning Evaluation Protocols*, arXiv
2503.06991, after Kornblith et al. 2019, *Similarity of Neural Network Representations Revisited*. Features are taken in
evaluation mode. The ceiling of each measure is that of two retrained models, not 1: report it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from sklearn.neighbors import KNeighborsClassifier

from expunge.audit.kernel.arrays import Floats, codes, finite, matrix, same_length, share, vector
from expunge.core.errors import InputError
from expunge.core.statistics import harmonic_mean


def linear_cka(first: ArrayLike, second: ArrayLike, *, unbiased: bool = False, batch: int | None = None) -> float:
    """Linear CKA ``= HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))`` with ``K = X X^T``, ``L = Y Y^T``, both centred.

    In [0, 1]; 1 for representations equal up to rotation, reflection, scale and shift. High against the retrained model is good
    on every set; high against the ORIGINAL on the forget set says that the features have not moved. Features are centred, which
    centres both kernels; without it a common offset alone gives a value near 1.

    With fewer examples than features the value is biased upward, to near 1 for independent noise. The unbiased estimator of HSIC
    (Song et al. 2012, *Feature selection via dependence maximization*) has mean 0 there and may go below 0. Cost ``O(n d e)``;
    kernels of size n x n appear only where n is smaller than the number of features.

    NaN if a feature is not finite, if one model's features are the same for all examples, or if an unbiased denominator is not
    positive.

    Args:
        first, second: features ``[examples, d]`` and ``[examples, e]`` of the same examples.
        unbiased: which estimator of HSIC.
        batch: average the CKA of consecutive batches of this size, as the paper does with 512; a rest smaller than half of it is
            left out. Compare only values of one batch size. None: all examples at once.

    Raises:
        InputError: the numbers of examples differ, or a batch has fewer than 4 examples.
    """
    x, y = matrix(first, "features (first)"), matrix(second, "features (second)")
    same_length(first=x, second=y)
    size = min(batch or len(x), len(x))
    if size < 4:
        raise InputError(f"CKA needs four examples at least; got {size}.")
    if not finite(x, y):
        return math.nan
    starts = [at for at in range(0, len(x), size) if len(x) - at >= size / 2 and len(x) - at >= 4]
    return float(np.mean([_cka(x[at : at + size], y[at : at + size], unbiased) for at in starts]))


def knn_transfer(
    train_features: ArrayLike, train_labels: ArrayLike, test_features: ArrayLike, test_labels: ArrayLike, *, k: int = 5
) -> float:
    """Accuracy of k nearest neighbours by cosine distance on another task's data, in [0, 1].

    What the features are worth for a downstream task. If that task is close to what was forgotten, the retrained model's value is
    low, and a value above it shows that the features are still there. NaN if a feature is not finite.

    Args:
        train_features, test_features: ``[examples, d]`` of the audited model.
        train_labels, test_labels: classes of the other task ``[examples]``.
        k: neighbours, at most the number of training examples.

    Raises:
        InputError: lengths differ, or there are fewer than k training examples.
    """
    train, test = matrix(train_features, "training features"), matrix(test_features, "test features")
    known, wanted = codes(train_labels, "training labels"), codes(test_labels, "test labels")
    same_length(features=train, labels=known)
    same_length(features=test, labels=wanted)
    if train.shape[1] != test.shape[1]:
        raise InputError(f"Training and test features must be of one width; got {train.shape[1]} and {test.shape[1]}.")
    if not 1 <= k <= len(train):
        raise InputError(f"The number of neighbours must be in [1, {len(train)}]; got {k}.")
    if not finite(train, test):
        return math.nan
    model = KNeighborsClassifier(n_neighbors=k, metric="cosine", algorithm="brute").fit(train, known)
    return float((model.predict(test) == wanted).mean())


def logit_agreement(unlearned: Mapping[str, float], retrained: Mapping[str, float]) -> float:
    """AGL ``= prod_s (1 - |a_u(s) - a_r(s)|)`` over sets s, in [0, 1]; higher is better, 1 for the retrained model itself.

    A working definition: the paper's formula was not checked.

    Args:
        unlearned, retrained: accuracies in [0, 1] by set: forget and retain, of training and test data.

    Raises:
        InputError: the sets differ, there is none, or an accuracy is out of range.
    """
    if not unlearned or unlearned.keys() != retrained.keys():
        raise InputError("Agreement needs the accuracies of both models on the same sets.")
    gaps = [abs(share(unlearned[s], f"accuracy on {s}") - share(retrained[s], f"accuracy on {s}")) for s in unlearned]
    return float(np.prod([1 - g for g in gaps]))


def representation_agreement(unlearned: Sequence[float], retrained: Sequence[float], cka: Sequence[float]) -> float:
    """AGR ``= prod_d (1 - |knn_u(d) - knn_r(d)|) CKA_d(u, r)`` over data sets d, in [0, 1]; higher is better.

    A working definition: the paper's formula was not checked. 1 for the retrained model itself; a second retrained model has the
    product of its CKAs, which falls with the number of data sets: compare over equal lists. NaN if a CKA is.

    Args:
        unlearned, retrained: :func:`knn_transfer` of both models by data set.
        cka: :func:`linear_cka` between both by data set; an unbiased one below 0 counts as 0.

    Raises:
        InputError: the lists differ in length or are empty, or an accuracy is out of range.
    """
    mine, theirs, similar = vector(unlearned, "accuracies"), vector(retrained, "accuracies"), vector(cka, "CKA")
    same_length(unlearned=mine, retrained=theirs, cka=similar)
    gaps = [abs(share(float(a), "accuracy") - share(float(b), "accuracy")) for a, b in zip(mine, theirs, strict=True)]
    return float(np.prod((1 - np.array(gaps)) * np.clip(similar, 0, 1)))


def unified_score(agl: float, agr: float) -> float:
    """H-LR: harmonic mean of :func:`logit_agreement` and :func:`representation_agreement`, in [0, 1]; higher is better.

    0 if either is 0: good outputs cannot make up for features that did not change. NaN if either is.

    Raises:
        InputError: an agreement is out of range.
    """
    values = [share(agl, "AGL"), share(agr, "AGR")]
    return math.nan if any(math.isnan(v) for v in values) else harmonic_mean(values)


def _cka(x: Floats, y: Floats, unbiased: bool) -> float:
    parts = [_centred(a) for a in (x, y)]
    if any(p is None for p in parts):
        return math.nan
    a, b = (p for p in parts if p is not None)
    hsic = _hsic_unbiased if unbiased else _hsic
    across, own, other = hsic(a, b), hsic(a, a), hsic(b, b)
    if not (own > 0 and other > 0):
        return math.nan
    value = across / math.sqrt(own) / math.sqrt(other)
    return value if unbiased else min(1.0, value)


def _centred(x: Floats) -> Floats | None:
    """Centred and scaled to one (CKA does not depend on the scale); None where all rows are equal up to rounding."""
    size = float(np.abs(x).max())
    centred = x - x.mean(axis=0)
    norm = float(np.linalg.norm(centred))
    return centred / norm if norm > 1e-12 * size * math.sqrt(x.size) else None


def _inner(x: Floats, y: Floats) -> float:
    """``trace(X X^T Y Y^T)`` by the smaller of the two products."""
    if x.shape[1] * y.shape[1] <= len(x) ** 2:
        return float(np.square(x.T @ y).sum())
    return float(np.vdot(x @ x.T, y @ y.T))


def _hsic(x: Floats, y: Floats) -> float:
    return _inner(x, y)


def _hsic_unbiased(x: Floats, y: Floats) -> float:
    """The estimator of Song et al. 2012 for linear kernels with their diagonals set to 0, up to the factor 1 / (n (n - 3))."""
    n = len(x)
    diagonals = [np.square(a).sum(axis=1) for a in (x, y)]
    rows = [a @ a.sum(axis=0) - d for a, d in zip((x, y), diagonals, strict=True)]
    first = _inner(x, y) - float(diagonals[0] @ diagonals[1])
    second = float(rows[0].sum() * rows[1].sum()) / ((n - 1) * (n - 2))
    return first + second - 2 / (n - 2) * float(rows[0] @ rows[1])
