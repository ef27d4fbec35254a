"""How deep in a network something is: the Unlearning Depth Score, and the layers at which a probe begins to see a concept."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from expunge.audit.kernel.arrays import Floats, vector
from expunge.core.errors import InputError


def depth_score(lost: ArrayLike, retrained: ArrayLike, threshold: float = 0.05) -> Floats:
    """Unlearning Depth Score of each example: 0 if patching loses nothing, 1 if it loses what a retrained model's states lose.

    ``UDS = sum_KE D_l^ret clip(D_l / D_l^ret, 0, 1) / sum_KE D_l^ret`` over the layers ``KE = {l: D_l^ret > threshold}``,
    those where knowledge is encoded at all (arXiv 2605.24614).

    Args:
        lost: ``D_l`` of the model, what the target's log-probability loses with its states, ``[L]`` or ``[L, examples]``.
        retrained: ``D_l^ret``, the same of a retrained model (or the mean of several).
        threshold: see above, nats per token.

    Returns:
        In [0, 1], one per example (a single number as an array of no dimension); NaN where no layer counts.

    Raises:
        InputError: the shapes differ.
    """
    own, other = np.asarray(lost, dtype=np.float64), np.asarray(retrained, dtype=np.float64)
    if own.shape != other.shape or own.ndim not in (1, 2):
        raise InputError(f"A depth score compares the same layers and examples; got {own.shape} and {other.shape}.")
    counts = other > threshold
    weight = np.where(counts, other, 0.0)
    share = np.clip(np.divide(own, other, out=np.zeros_like(own), where=counts), 0.0, 1.0)
    total = weight.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(total > 0, (weight * share).sum(axis=0) / np.where(total > 0, total, 1.0), np.nan))


def jumping_point(accuracies: ArrayLike, ratio: float = 1.1) -> int | None:
    """The first layer whose accuracy is at least ``ratio`` times that of the layer before (Jin et al. 2024, arXiv 2404.07066).

    Args:
        accuracies: of a probe at each layer, from the input to the output ``[L]``.
        ratio: as published, as far as is known.

    Returns:
        Index of the layer, from 1; none if accuracy never jumps.
    """
    values = vector(accuracies, "accuracies")
    for at in range(1, len(values)):
        if values[at] > 0 and values[at] >= ratio * values[at - 1]:
            return at
    return None


def converging_point(accuracies: ArrayLike, within: float = 0.03) -> int:
    """The layer from which on accuracy stays: the ratio to the layer before is within ``within`` of 1 at every later layer.

    Args:
        accuracies: of a probe at each layer ``[L]``, at least one.
        within: as published, as far as is known.

    Raises:
        InputError: there is no layer.
    """
    values = vector(accuracies, "accuracies")
    if not len(values):
        raise InputError("A depth needs the accuracy of at least one layer.")
    at = len(values) - 1
    while at > 0 and values[at - 1] > 0 and abs(values[at] / values[at - 1] - 1) < within:
        at -= 1
    return at
