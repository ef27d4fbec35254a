"""What is computed once per model and example: loss, margin, confidence, entropies, hit; for regression the error.

All other measures of the kernel read these arrays. Logits come in as numpy arrays or torch tensors of any float type; everything
is computed in float64, from logits and never from probabilities, which saturate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special
from torch import Tensor, float64

from expunge.audit.kernel.arrays import Bools, Floats, Integers
from expunge.core.errors import InputError

_BLOCK = 1 << 21  # logits held in float64 at a time: 16 MiB per temporary array, whatever the number of examples


@dataclass(frozen=True)
class Quantities:
    """Per-example quantities of one or many models, each ``[..., N]``.

    An example whose logits hold NaN or plus infinity, or are all minus infinity, has NaN everywhere, ``hit`` False and
    ``predicted`` -1. Minus infinity for some classes is a mask and allowed.

    Attributes:
        loss: cross-entropy ``-log p_y`` in nats, [0, inf].
        margin: ``phi = log p_y - log(1 - p_y)``, the logit of the confidence, [-inf, inf].
        confidence: ``p_y``, the probability of the label, [0, 1].
        entropy: ``-sum_c p_c log p_c`` in nats, [0, log C].
        modified_entropy: ``-(1 - p_y) log p_y - sum_{c != y} p_c log(1 - p_c)`` in nats, [0, inf] (Song and Mittal 2021,
            *Systematic evaluation of privacy risks of machine learning models*): low only if the model is sure *and*
            right.
        predicted: the most probable class, the first of equals.
        hit: whether it is the label.
    """

    loss: Floats
    margin: Floats
    confidence: Floats
    entropy: Floats
    modified_entropy: Floats
    predicted: Integers
    hit: Bools


@dataclass(frozen=True)
class Errors:
    """Per-example errors of regressors, each ``[..., N]``, in the unit of the target.

    Attributes:
        error: prediction minus target.
        absolute_error: its absolute value (the L1 loss).
    """

    error: Floats
    absolute_error: Floats


def quantities(logits: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> Quantities:
    """Everything that membership attacks and distances between models read, from logits.

    ``phi = logit_y - logsumexp_{c != y} logit_c`` and ``loss = log(1 + exp(-phi))``, so that losses far below the resolution of
    ``1 - p_y`` keep their digits. A binary model with one output ``s`` has the logits ``[0, s]``.

    Args:
        logits: ``[..., N, C]`` with C >= 2.
        labels: classes in [0, C), ``[N]`` or ``[..., N]``.

    Raises:
        InputError: the shapes do not match, there is no example or only one class, or a label is out of range.
    """
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else np.shape(logits)
    if len(shape) < 2 or 0 in shape:
        raise InputError(f"Logits must have the shape [..., examples, classes] with no empty axis; got {shape}.")
    if shape[-1] < 2:
        raise InputError(
            "A classifier needs two classes or more; got one logit per example.", "Give a single output s as [0, s]."
        )
    classes = _labels(labels, shape)
    rows = logits.reshape(-1, shape[-1]) if isinstance(logits, Tensor) else np.asarray(logits).reshape(-1, shape[-1])
    out = {name: np.empty(len(classes)) for name in ("loss", "margin", "confidence", "entropy", "modified_entropy")}
    predicted = np.empty(len(classes), dtype=np.int64)
    step = max(1, _BLOCK // shape[-1])
    for start in range(0, len(classes), step):
        part = slice(start, start + step)
        found = _block(_float64(rows[part]), classes[part])
        predicted[part] = found.pop("predicted")
        for name, values in found.items():
            out[name][part] = values
    outer = shape[:-1]
    return Quantities(
        **{name: values.reshape(outer) for name, values in out.items()},
        predicted=predicted.reshape(outer),
        hit=(predicted == classes).reshape(outer),
    )


def probabilities(logits: ArrayLike | Tensor) -> Floats:
    """Softmax over the last axis in float64, ``[..., C]``; a row of logits that holds NaN gives NaN."""
    return np.asarray(special.softmax(_float64(logits), axis=-1), dtype=np.float64)


def errors(predictions: ArrayLike | Tensor, targets: ArrayLike | Tensor) -> Errors:
    """Errors of regressors.

    Args:
        predictions: ``[..., N]``.
        targets: ``[N]`` or of the same shape. Nothing else is broadcast: ``[N, 1]`` against ``[N]`` would silently give N x N
            errors.

    Raises:
        InputError: the shapes do not match or there is no example.
    """
    predicted, wanted = _float64(predictions), _float64(targets)
    if predicted.ndim == 0 or predicted.size == 0:
        raise InputError(f"Predictions must have the shape [..., examples]; got {predicted.shape}.")
    if wanted.shape not in (predicted.shape, predicted.shape[-1:]):
        raise InputError(
            f"Predictions of shape {predicted.shape} do not match targets of shape {wanted.shape}.",
            "Flatten both to one value per example.",
        )
    error = predicted - wanted
    return Errors(error, np.abs(error))


def _float64(values: ArrayLike | Tensor) -> Floats:
    if isinstance(values, Tensor):
        return np.asarray(values.detach().to("cpu", float64).numpy())
    return np.asarray(values, dtype=np.float64)


def _labels(labels: ArrayLike | Tensor, shape: tuple[int, ...]) -> Integers:
    given = _float64(labels)
    if given.shape not in (shape[:-1], shape[-2:-1]):
        raise InputError(f"Logits of shape {shape} do not match labels of shape {given.shape}.")
    wrong = ~((given >= 0) & (given < shape[-1]) & (given == np.floor(given)))
    if wrong.any():
        raise InputError(f"Labels must be whole numbers from 0 to {shape[-1] - 1}; got {given[wrong].flat[0]:g}.")
    return np.broadcast_to(given.astype(np.int64), shape[:-1]).reshape(-1)


def _block(logits: Floats, labels: Integers) -> dict[str, Floats | Integers]:
    rows = np.arange(len(labels))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        top = logits.argmax(axis=1)
        z = logits - logits[rows, top][:, None]
        broken = ~np.isfinite(logits[rows, top])  # argmax stops at the first NaN
        z[broken] = 0.0
        margin = _margin(z, labels)
        loss = np.logaddexp(0.0, -margin)
        total = special.logsumexp(z, axis=1)
        logp = z - total[:, None]
        p = np.exp(logp)
        entropy = special.entr(p).sum(axis=1)
        # log(1 - p) loses its digits only where p is near 1, which one class at most can be.
        log_rest = np.log1p(-p)
        log_rest[rows, top] = -np.logaddexp(0.0, _margin(z, top))
        weight = p.copy()
        weight[rows, labels] = 0.0
        wrong = np.where(weight > 0, weight * log_rest, 0.0).sum(axis=1)
        right = special.expit(-margin)
        modified = np.where(right > 0, right * loss, 0.0) - wrong
    found = {
        "loss": loss, "margin": margin, "confidence": special.expit(margin), "entropy": entropy, "modified_entropy": modified,
    }  # fmt: skip
    for values in found.values():
        values[broken] = np.nan
    return {**found, "predicted": np.where(broken, -1, top)}


def _margin(logits: Floats, classes: Integers) -> Floats:
    rows = np.arange(len(classes))
    others = logits.copy()
    others[rows, classes] = -np.inf
    return np.asarray(logits[rows, classes] - special.logsumexp(others, axis=1), dtype=np.float64)
