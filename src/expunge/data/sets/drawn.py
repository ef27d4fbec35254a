"""Drawn shapes: small grey pictures of rings, squares, crosses and triangles, a data set without a download."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from expunge.core.errors import InputError, unknown
from expunge.data.rows import Table, table

Array = npt.NDArray[np.float64]

_JITTER = 0.4  #: how far a centre is moved, as a share of a pixel at most, on each axis
_RADIUS = (0.33, 0.40)  #: least and largest radius, as shares of the side


def _ring(x: Array, y: Array, r: Array) -> Array:
    return np.abs(np.hypot(x, y) - r) - 0.2 * r


def _square(x: Array, y: Array, r: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.85 * r


def _cross(x: Array, y: Array, r: Array) -> Array:
    a, b = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(a, b) - 0.25 * r, np.maximum(a, b) - 1.15 * r)


def _triangle(x: Array, y: Array, r: Array) -> Array:
    return np.maximum(y - 0.9 * r, 0.87 * np.abs(x) - 0.5 * y - 0.55 * r)


#: distance of a point from the edge of each shape (negative inside), by its offset from the centre and the radius, in pixels
DISTANCES: dict[str, Callable[[Array, Array, Array], Array]] = {
    "ring": _ring,
    "square": _square,
    "cross": _cross,
    "triangle": _triangle,
}


def drawn_shapes(per_class: int, *, size: int = 8, classes: Sequence[str] = tuple(DISTANCES), seed: int = 0) -> Table:
    """A table of pictures ``[per_class * C, 1, size, size]`` with values in [-1, 1]: -1 the ground, 1 the shape.

    Position and size vary, each drawn from the seed; edges are smooth (a pixel holds the share that the shape covers, about).
    The classes take turns. Ids are ``ring-0``, ``square-0``, ...

    Args:
        per_class: pictures of each shape, at least 1.
        size: side in pixels, at least 8.
        classes: which shapes, of ``ring``, ``square``, ``cross``, ``triangle``; at least one.
        seed: of positions and sizes.

    Raises:
        InputError: a number too small, or an unknown shape.
    """
    if per_class < 1 or size < 8 or not classes:
        raise InputError(
            f"Cannot draw {per_class} pictures of {size} pixels for each of {len(classes)} shapes.",
            "Give at least one picture, 8 pixels and one shape.",
        )
    for name in classes:
        if name not in DISTANCES:
            raise unknown("shape", name, DISTANCES)
    n = per_class * len(classes)
    rng = np.random.default_rng([seed, 31])
    centre = (size - 1) / 2 + rng.uniform(-_JITTER, _JITTER, (2, n, 1, 1))
    radius = size * rng.uniform(*_RADIUS, (n, 1, 1))
    grid = np.arange(size)
    x, y = grid[None, None, :] - centre[0], grid[None, :, None] - centre[1]
    kinds = np.arange(n) % len(classes)
    pictures: npt.NDArray[Any] = np.empty((n, 1, size, size), dtype=np.float32)
    for k, name in enumerate(classes):
        of = kinds == k
        pictures[of, 0] = 2 * np.clip(0.5 - DISTANCES[name](x[of], y[of], radius[of]), 0, 1) - 1
    ids = [f"{classes[i % len(classes)]}-{i // len(classes)}" for i in range(n)]
    return table(pictures, kinds, ids=ids, classes=list(classes), source=f"drawn:{size}")
