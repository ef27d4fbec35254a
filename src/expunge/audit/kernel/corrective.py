"""Corrective unlearning: is a model right again where wrong rows had damaged it, and still right elsewhere?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from expunge.audit.kernel.arrays import hits, share
from expunge.core.errors import InputError


@dataclass(frozen=True)
class Corrective:
    """Acc_corr and Acc_retain of *Corrective Machine Unlearning* (Goel et al. 2024, arXiv 2402.14015).

    The target is not 1 but the model retrained with ALL wrong rows left out (gamma = 1): a clean model too is hurt by a trigger
    on its input.

    Attributes:
        corrected: Acc_corr, accuracy against true labels where the wrong rows do damage, [0, 1]; higher is better.
        retained: Acc_retain, accuracy elsewhere, [0, 1]; higher is better.
    """

    corrected: float
    retained: float


def corrective(hit_concerned: ArrayLike, hit_elsewhere: ArrayLike) -> Corrective:
    """Both accuracies from hits ``[rows]`` of one model, on the two parts of :meth:`expunge.data.spoiled.Domain.split`.

    Raises:
        InputError: a part is empty, or a hit is neither 0 nor 1.
    """
    return Corrective(
        float(hits(hit_concerned, "hits on the damaged part").mean()), float(hits(hit_elsewhere, "hits elsewhere").mean())
    )


def corrective_area(curve: Mapping[float, Corrective]) -> Corrective:
    """Mean of both accuracies over the known share gamma, by the trapezoidal rule between the smallest and the largest.

    Args:
        curve: by gamma, (0, 1]; at least two.

    Raises:
        InputError: there are fewer than two shares, or one is out of range.
    """
    if len(curve) < 2:
        raise InputError("An area needs at least two shares of known rows.")
    gammas = np.array(sorted(share(g, "known share") for g in curve))
    parts = [[getattr(curve[g], name) for g in gammas.tolist()] for name in ("corrected", "retained")]
    areas = [float(np.trapezoid(part, gammas) / np.ptp(gammas)) for part in parts]
    return Corrective(*areas)
