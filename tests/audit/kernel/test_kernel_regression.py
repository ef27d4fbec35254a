from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neural_network import MLPRegressor

from expunge.audit.kernel.quantities import errors
from expunge.audit.kernel.regression import l1_attack, wasserstein
from expunge.core.errors import InputError

VALUES = st.lists(st.floats(-100, 100), min_size=5, max_size=5)


@settings(deadline=None)
@given(VALUES, VALUES, st.floats(-50, 50))
def test_wasserstein_of_equal_sizes_is_the_sorted_difference(a, b, shift):
    assert wasserstein(a, b) == pytest.approx(np.abs(np.sort(a) - np.sort(b)).mean(), abs=1e-9)
    assert wasserstein(a, np.array(a) + shift) == pytest.approx(abs(shift), abs=1e-9)
    assert wasserstein(a, a[::-1]) == 0


def test_undefined_and_bad_input():
    assert math.isnan(wasserstein([1.0, math.nan], [1.0]))
    with pytest.raises(InputError, match="is empty"):
        wasserstein([], [1.0])
    with pytest.raises(InputError, match="negative one"):
        l1_attack([1.0], [1.0], [-1.0])
    assert math.isnan(l1_attack([1.0, 1.0], [1.0], [1.0]))


def test_l1_attack_has_the_right_sign():
    rng = np.random.default_rng(0)
    train, test = np.abs(rng.normal(0, 0.2, 400)), np.abs(rng.normal(0, 2, 400))
    assert l1_attack(train, test, np.abs(rng.normal(0, 0.2, 200))) > 0.8
    assert l1_attack(train, test, np.abs(rng.normal(0, 2, 200))) < 0.35


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_forgetting_a_band_of_targets():
    """Without the lowest 30 % of the targets predictions there move up; the original's do not."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(900, 10))
    y = x @ rng.normal(size=10) / 3 + np.sin(x[:, 0]) + 0.3 * rng.normal(size=900)
    train, test = np.arange(600), np.arange(600, 900)
    band = y < np.quantile(y, 0.3)

    def fit(rows, seed):
        return MLPRegressor(hidden_layer_sizes=(64, 64), max_iter=80, random_state=seed).fit(x[rows], y[rows]).predict(x)

    original, retrained, again = fit(train, 0), fit(train[~band[train]], 1), fit(train[~band[train]], 2)
    rows = test[band[test]]
    assert errors(original, y).absolute_error[rows].mean() < errors(retrained, y).absolute_error[rows].mean() - 0.2
    floor = wasserstein(again[rows], retrained[rows])
    assert wasserstein(original[rows], retrained[rows]) > 3 * floor
    loss = {n: errors(p, y).absolute_error for n, p in (("original", original), ("retrained", retrained))}
    kept, forget = train[~band[train]], train[band[train]]
    found = {n: l1_attack(v[kept], v[test], v[forget]) for n, v in loss.items()}
    assert found["original"] > found["retrained"]
