"""Concepts in the features of a network: linear detectors of each, and how much each speaks for a class.

A post-hoc concept bottleneck (Yuksekgonul et al. 2022, arXiv 2205.15480) with the concept vectors of Kim et al. 2018 (arXiv
1711.11279), as arrays: it knows no modality.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from expunge.core.errors import InputError

Floats = npt.NDArray[np.float64]
_MAX_ITER = 2000


@dataclass(frozen=True)
class ConceptBank:
    """Linear detectors of K concepts.

    Attributes:
        names: of the concepts (K).
        directions: their vectors of length 1 in the space of the features, ``[K, D]``.
        offsets: ``b / ||v||`` of the detectors ``v . e + b``, ``[K]``.
    """

    names: tuple[str, ...]
    directions: Floats
    offsets: Floats

    def scores(self, features: npt.NDArray[Any]) -> Floats:
        """``(v . e + b) / ||v||`` of features ``[n, D]``, ``[n, K]``: the signed distance, above 0 where the concept is seen."""
        found: Floats = np.asarray(features, dtype=np.float64) @ self.directions.T + self.offsets
        return found


def learn_concepts(
    features: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    names: tuple[str, ...],
    *,
    samples: int = 100,
    c: float = 0.1,
    seed: int = 0,
) -> ConceptBank:
    """A linear support vector machine for each concept, on as many rows that show it as rows that do not.

    Args:
        features: ``[n, D]``.
        labels: whether each row shows each concept, bool ``[n, K]``.
        names: of the concepts (K).
        samples: rows of each side, at most.
        c: penalty of the machine.
        seed: of the choice of rows.

    Raises:
        InputError: a concept is shown by no row or by all.
    """
    from sklearn.svm import SVC

    directions, offsets = [], []
    for k, name in enumerate(names):
        rng = np.random.default_rng([seed, 41, k])
        sides = [np.flatnonzero(labels[:, k]), np.flatnonzero(~labels[:, k])]
        size = min(samples, *map(len, sides))
        if size == 0:
            raise InputError(
                f"The concept {name!r} is shown by {len(sides[0])} of {len(labels)} labelled rows.",
                "Label rows that show it and rows that do not.",
            )
        chosen = np.concatenate([rng.permutation(side)[:size] for side in sides])
        machine = SVC(kernel="linear", C=c).fit(features[chosen], labels[chosen, k])
        norm = max(float(np.linalg.norm(machine.coef_[0])), np.finfo(float).tiny)
        directions.append(machine.coef_[0] / norm)
        offsets.append(float(machine.intercept_[0]) / norm)
    return ConceptBank(names, np.array(directions), np.array(offsets))


def concept_weights(
    scores: Floats,
    classes: npt.NDArray[np.int64],
    n_classes: int,
    *,
    lam: float | None = None,
    l1_ratio: float = 0.99,
    seed: int = 0,
) -> Floats:
    """How much each concept speaks for each class, ``[C, K]``: one elastic-net logistic regression per class, by SGD.

    The scores of a concept are brought to mean 0 and deviation 1 first, so that the weights of concepts can be compared (the
    published code takes them as they are).

    Args:
        scores: of the concepts, ``[n, K]``.
        classes: of the rows, in [0, C), ``[n]``; a class without rows gets weights 0.
        n_classes: C.
        lam: weight of the penalty; none: ``0.01 / (K C)``, the order that the published code uses.
        l1_ratio: share of it that is absolute, in [0, 1].
        seed: of the order of the steps.

    Raises:
        InputError: fewer than two classes have rows.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import SGDClassifier

    present = np.unique(classes)
    if len(present) < 2:
        raise InputError("Concepts can only be weighed between classes, and all rows are of one.", "Give rows of other classes.")
    alpha = lam if lam is not None else 0.01 / (scores.shape[1] * n_classes)
    layer = SGDClassifier(
        loss="log_loss", penalty="elasticnet", alpha=alpha, l1_ratio=l1_ratio, max_iter=_MAX_ITER, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a few more passes would not change which concepts lead
        layer.fit((scores - scores.mean(axis=0)) / np.maximum(scores.std(axis=0), np.finfo(float).tiny), classes)
    found = layer.coef_ if len(present) > 2 else np.concatenate([-layer.coef_, layer.coef_])
    weights = np.zeros((n_classes, scores.shape[1]))
    weights[present] = found
    return weights


def carrying(weights: Floats, which: int, top: int) -> list[int]:
    """The concepts that carry a class, at most ``top``: a large weight for it and low ones for the others, on average.

    Their order is that of the weight for the class less the mean weight for the others; both it and the weight are above 0.

    Args:
        weights: ``[C, K]``, as :func:`concept_weights` returns them.
        which: the class.
        top: how many, at least 1.
    """
    margin = weights[which] - np.delete(weights, which, axis=0).mean(axis=0)
    order = np.argsort(-margin, kind="stable")[:top]
    return [int(k) for k in order if margin[k] > 0 and weights[which, k] > 0]


def class_similarity(scores: Floats, classes: npt.NDArray[np.int64], n_classes: int) -> Floats:
    """Cosine of the mean concept scores of two classes, centred over all classes, ``[C, C]``; NaN for a class without rows."""
    means = np.full((n_classes, scores.shape[1]), np.nan)
    for c in np.unique(classes):
        means[c] = scores[classes == c].mean(axis=0)
    centred = means - np.nanmean(means, axis=0)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.maximum(norms, np.finfo(float).tiny)
    found: Floats = unit @ unit.T
    return found
