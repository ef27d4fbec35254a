"""Checked arrays: every measure takes its inputs through these."""

from __future__ import annotations

from collections.abc import Sized

import numpy as np
from numpy.typing import ArrayLike, NDArray

from expunge.core.errors import InputError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]


def vector(values: ArrayLike, name: str) -> Floats:
    """A float64 array ``[n]`` with n > 0.

    Raises:
        InputError: it is empty or has more than one axis.
    """
    return _array(values, name, 1)


def matrix(values: ArrayLike, name: str) -> Floats:
    """A float64 array ``[m, n]`` with m, n > 0.

    Raises:
        InputError: it is empty or does not have two axes.
    """
    return _array(values, name, 2)


def _array(values: ArrayLike, name: str, axes: int) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != axes:
        wanted = {1: "one axis", 2: "two axes"}[axes]
        raise InputError(f"The array of {name} must have {wanted}; got the shape {array.shape}.")
    if array.size == 0:
        raise InputError(f"The array of {name} is empty.", "Give at least one value.")
    return array


def codes(values: ArrayLike, name: str) -> Integers:
    """Whole numbers ``[n]`` (classes, groups), n > 0.

    Raises:
        InputError: it is empty, has more than one axis or holds fractions.
    """
    array = vector(values, name)
    if not np.isfinite(array).all() or (array != np.floor(array)).any():
        raise InputError(f"The array of {name} must hold whole numbers.")
    return array.astype(np.int64)


def hits(values: ArrayLike, name: str) -> Bools:
    """Zeros and ones ``[n]`` as booleans, n > 0.

    Raises:
        InputError: it is empty, has more than one axis or holds another value.
    """
    array = vector(values, name)
    if not np.isin(array, (0.0, 1.0)).all():
        raise InputError(f"The array of {name} must hold only 0 and 1.")
    return array.astype(bool)


def share(value: float, name: str) -> float:
    """A number in [0, 1]; NaN passes.

    Raises:
        InputError: it is out of range.
    """
    if value < 0 or value > 1:
        raise InputError(f"The {name} must be in [0, 1]; got {value}.", "Divide percentages by 100.")
    return float(value)


def same_length(**arrays: Sized) -> None:
    """Check that all arrays are of one length.

    Raises:
        InputError: they are not.
    """
    sizes = {name: len(a) for name, a in arrays.items()}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {n}" for name, n in sizes.items())
        raise InputError(f"These arrays must be of equal length: {found}.")


def same_examples(first: Floats, second: Floats) -> None:
    """Check that the last axes agree.

    Raises:
        InputError: they do not.
    """
    if first.shape[-1] != second.shape[-1]:
        raise InputError(f"The two sets of models must score the same examples; got {first.shape[-1]} and {second.shape[-1]}.")


def finite(*arrays: Floats) -> bool:
    """Whether no value is NaN or infinite."""
    return all(bool(np.isfinite(a).all()) for a in arrays)
