"""One array that rows are written into as they come, so that a table is never held twice."""

from __future__ import annotations

import array
from typing import Any

import numpy as np
import numpy.typing as npt

_FIRST = 64  #: rows that there is room for when their number is not known
_PAD = -1


class Filling:
    """Rows of one shape, written one block after the other.

    Args:
        dtype: type of the numbers.
        expected: how many rows will come; none: not known, and the array grows in place by a quarter.
    """

    def __init__(self, dtype: npt.DTypeLike, expected: int | None = None) -> None:
        self.dtype, self._expected = np.dtype(dtype), expected
        self._held: npt.NDArray[Any] | None = None
        self._rows = 0

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of a row; None before the first."""
        return None if self._held is None else self._held.shape[1:]

    def add(self, block: npt.NDArray[Any]) -> None:
        """Write rows ``[rows, ...]`` of the shape of those before."""
        n = len(block)
        if self._held is None:
            self._held = np.empty((max(n, self._expected or _FIRST), *block.shape[1:]), self.dtype)
        if self._rows + n > len(self._held):
            room = max(self._rows + n, len(self._held) + len(self._held) // 4)
            self._held.resize((room, *self._held.shape[1:]), refcheck=False)  # no view of it has left this object
        self._held[self._rows : self._rows + n] = block
        self._rows += n

    def done(self) -> npt.NDArray[Any]:
        """The array, cut to the rows that came; the object must not be used after that."""
        if self._held is None:
            return np.empty((0, 0), self.dtype)
        held, self._held = self._held, None
        if self._rows < len(held):
            held.resize((self._rows, *held.shape[1:]), refcheck=False)
        return held


class Tokens:
    """Token ids of texts of unequal length, four bytes each."""

    def __init__(self) -> None:
        self._ids, self._lengths = array.array("i"), array.array("q")

    def add(self, ids: list[int]) -> None:
        """The ids of one text."""
        self._ids.extend(ids)
        self._lengths.append(len(ids))

    def done(self) -> npt.NDArray[np.int32]:
        """``[texts, longest]``; behind the end of a text stands -1, which is no token id."""
        lengths = np.frombuffer(self._lengths, dtype=np.int64) if self._lengths else np.zeros(0, np.int64)
        held = np.full((len(lengths), int(lengths.max(initial=0))), _PAD, dtype=np.int32)
        held[np.arange(held.shape[1]) < lengths[:, None]] = np.frombuffer(self._ids, dtype=np.int32) if self._ids else []
        return held
