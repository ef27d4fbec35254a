"""Hessian times a vector from a few pairs of steps and gradient differences (L-BFGS), never a matrix p x p."""

from __future__ import annotations

import torch
from torch import Tensor

_CURVED = 1e-10  #: smallest curvature of a pair that is kept, relative to the squared length of its step


class Curvature:
    """``B v`` with B the limited-memory BFGS matrix of the last pairs ``(s, y)``, ``B s = y`` for the latest.

    Source: the compact form of Byrd, Nocedal and Schnabel 1994, *Representations of quasi-Newton matrices and their use in
    limited memory methods*, theorem 2.3, with ``B_0 = (y . s / s . s) I`` of the latest pair. Time and memory are ``O(m p)``.

    Args:
        memory: m, how many pairs are kept.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self._s: list[Tensor] = []
        self._y: list[Tensor] = []
        self._middle: Tensor | None = None

    def __len__(self) -> int:
        return len(self._s)

    def add(self, s: Tensor, y: Tensor) -> bool:
        """Keep a pair ``[p]``; False if it has no positive curvature, as far from a minimum or after no step."""
        if not float(s @ y) > _CURVED * float(s @ s) or float(s @ s) == 0:
            return False
        self._s, self._y = [*self._s, s][-self.memory :], [*self._y, y][-self.memory :]
        self._middle = None
        return True

    def times(self, v: Tensor) -> Tensor:
        """``B v`` ``[p]``; there must be a pair."""
        s, y = torch.stack(self._s), torch.stack(self._y)
        scale = (s[-1] @ y[-1]) / (s[-1] @ s[-1])
        if self._middle is None:
            products = (s @ y.T).double()
            lower = products.tril(-1)
            top = torch.cat([float(scale) * (s @ s.T).double(), lower], dim=1)
            below = torch.cat([lower.T, -products.diagonal().diag()], dim=1)
            self._middle = torch.cat([top, below])
        right = torch.cat([scale * (s @ v), y @ v]).double()
        inner = torch.linalg.solve(self._middle, right).to(v.dtype)
        m = len(s)
        found: Tensor = scale * v - scale * (inner[:m] @ s) - inner[m:] @ y
        return found
