"""Measures for regressors: distance of the predictions to a retrained model's, and membership from the L1 loss.

Tarun et al. 2023, *Deep Regression Unlearning*, arXiv 2210.08196. The relearning ratio AIN is
:func:`~expunge.audit.kernel.gaps.relearn_ratio`; errors are :func:`~expunge.audit.kernel.quantities.errors`.
"""

from __future__ import annotations

import math

from numpy.typing import ArrayLike
from scipy import stats

from expunge.audit.kernel.arrays import finite, vector
from expunge.audit.kernel.membership import svc_members
from expunge.core.errors import InputError


def wasserstein(unlearned: ArrayLike, retrained: ArrayLike) -> float:
    """1-d Wasserstein distance of two models' predictions on the forget set, in the unit of the target; lower is better.

    In [0, inf). It compares distributions, not pairs: predictions exchanged among examples cost nothing. A second retrained model
    is above 0; that is the floor. NaN if a prediction is not finite.

    Args:
        unlearned, retrained: predictions ``[m]`` and ``[n]``.

    Raises:
        InputError: a sample is empty.
    """
    first, second = vector(unlearned, "predictions (unlearned)"), vector(retrained, "predictions (retrained)")
    return float(stats.wasserstein_distance(first, second)) if finite(first, second) else math.nan


def l1_attack(train: ArrayLike, test: ArrayLike, forget: ArrayLike) -> float:
    """Share of the forget set that an SVM on the absolute error calls member, in [0, 1]; the target is the retrained model's
    value.

    The machine is that of :func:`~expunge.audit.kernel.membership.svc_efficacy` (RBF, C = 3, gamma = 1): trained on the audited
    model with training data as members and test data as non-members, both cut to equal length. Gamma is fixed, so the value
    depends on the unit of the target. If the forget set is a band of targets, a low share may only mean large errors there. NaN
    if an error is not finite or all training errors are equal.

    Args:
        train, test, forget: absolute errors ``[examples]``.

    Raises:
        InputError: a set is empty or an error is negative.
    """
    for name, values in (("training", train), ("test", test), ("forget", forget)):
        if (vector(values, f"{name} errors") < 0).any():
            raise InputError("This attack reads absolute errors; got a negative one.", "Pass the field 'absolute_error'.")
    return svc_members(train, test, forget)
