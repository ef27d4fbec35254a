"""Linear models with a ridge: their optimum, and the Newton step to the optimum without some rows; in float64.

``L_b(w; D) = sum_i l(w . x_i, y_i) + (lambda n / 2) |w|^2 + b . w`` with n the rows of D: a sum, not a mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize
from scipy.special import expit

from expunge.core.errors import ExpungeError, InputError

Floats = npt.NDArray[np.float64]


class Logistic:
    """``l = log(1 + exp(-y z))`` with y = -1 or 1; the second derivative in z is Lipschitz with a constant below 1/4."""

    lipschitz = 0.25  #: as published; the smallest valid constant is 1 / (6 sqrt 3) = 0.096

    def value(self, z: Floats, y: Floats) -> Floats:
        """Loss of each row."""
        return np.asarray(np.logaddexp(0.0, -y * z))

    def slope(self, z: Floats, y: Floats) -> Floats:
        """First derivative in z."""
        return np.asarray(-y * expit(-y * z))

    def curvature(self, z: Floats) -> Floats:
        """Second derivative in z."""
        return np.asarray(expit(z) * expit(-z))


class Squares:
    """``l = (z - y)^2 / 2``: the Newton step is exact."""

    lipschitz = 0.0

    def value(self, z: Floats, y: Floats) -> Floats:
        """Loss of each row."""
        return np.asarray((z - y) ** 2 / 2)

    def slope(self, z: Floats, y: Floats) -> Floats:
        """First derivative in z."""
        return np.asarray(z - y)

    def curvature(self, z: Floats) -> Floats:
        """Second derivative in z."""
        return np.ones_like(z)


Loss = Logistic | Squares


def gradient(loss: Loss, w: Floats, rows: tuple[Floats, Floats], ridge: float, b: Floats) -> Floats:
    """Gradient of ``L_b`` ``[d]`` at w, on rows ``x`` ``[n, d]`` and ``y`` ``[n]``."""
    x, y = rows
    return np.asarray(x.T @ loss.slope(x @ w, y) + ridge * len(x) * w + b)


def hessian(loss: Loss, w: Floats, x: Floats, ridge: float) -> Floats:
    """Hessian of ``L_b`` ``[d, d]``."""
    return np.asarray((x.T * loss.curvature(x @ w)) @ x + ridge * len(x) * np.eye(len(w)))


def fit(loss: Loss, x: Floats, y: Floats, ridge: float, b: Floats) -> tuple[Floats, int]:
    """The minimiser of ``L_b`` and how often all rows were read.

    Raises:
        InputError: the ridge is not positive, so that there may be none.
        ExpungeError: the optimiser did not get there.
    """
    if not ridge > 0:
        raise InputError(f"A linear model with a certificate needs a ridge in (0, inf); got {ridge}.")
    scale = len(x)  # of the mean, whose gradient norm can be asked to be small whatever n is

    def value(w: Floats) -> float:
        z = x @ w
        return float(loss.value(z, y).sum() + ridge * scale / 2 * (w @ w) + b @ w) / scale

    found = optimize.minimize(
        value,
        np.zeros(x.shape[1]),
        jac=lambda w: gradient(loss, w, (x, y), ridge, b) / scale,
        hess=lambda w: hessian(loss, w, x, ridge) / scale,
        method="trust-exact",
        options={"gtol": 1e-6, "maxiter": 1000},
    )
    w = np.asarray(found.x, dtype=np.float64)
    for _ in range(5):  # the trust region gives up where the value no longer falls in the last digits; Newton's steps do not
        w = w - np.linalg.solve(hessian(loss, w, x, ridge), gradient(loss, w, (x, y), ridge, b))
    left = float(np.linalg.norm(gradient(loss, w, (x, y), ridge, b)))
    if not left <= 1e-6 * scale:
        raise ExpungeError(f"The optimum of the linear model was not found: a gradient of norm {left:.1e} is left.")
    return w, int(found.nfev + found.njev + found.nhev) + 10


@dataclass(frozen=True)
class Step:
    """A Newton step.

    Attributes:
        weights: after it ``[d]``.
        bound: of the norm of the gradient that it leaves, beside what was left before.
    """

    weights: Floats
    bound: float


def step(loss: Loss, w: Floats, rows: tuple[Floats, Floats], kept: Floats, ridge: float, *, add: bool = False) -> Step:
    """From the optimum on all rows to that without some of them, or with some more.

    ``w + H^-1 Delta`` with ``Delta = sum over the rows of (lambda w + grad l)`` and H the Hessian on the rows that are left. It
    leaves at most ``gamma |X|_2 |H^-1 Delta| |X H^-1 Delta|`` (Guo et al. 2020, corollary 1; X the rows that are left), nothing
    at all for squares.

    Args:
        loss: of a row.
        w: the optimum before, ``[d]``.
        rows: inputs ``[m, d]`` and targets ``[m]`` of the rows that go or come.
        kept: inputs of the rows afterwards ``[n, d]``.
        ridge: lambda.
        add: the rows come and do not go.
    """
    x, y = rows
    delta = x.T @ loss.slope(x @ w, y) + ridge * len(x) * w
    move = np.linalg.solve(hessian(loss, w, kept, ridge), -delta if add else delta)
    size = np.sqrt(max(0.0, float(np.linalg.eigvalsh(kept.T @ kept)[-1])))
    bound = loss.lipschitz * size * float(np.linalg.norm(move)) * float(np.linalg.norm(kept @ move))
    return Step(w + move, bound)
