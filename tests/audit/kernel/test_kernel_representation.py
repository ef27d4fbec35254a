from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ortho_group

from expunge.audit.kernel.quantities import quantities
from expunge.audit.kernel.representation import knn_transfer, linear_cka, logit_agreement, representation_agreement, unified_score
from expunge.core.errors import InputError


def by_kernels(x, y, unbiased=False):
    """From the definition, with n x n kernels."""
    n = len(x)
    first, second = x @ x.T, y @ y.T
    if not unbiased:
        h = np.eye(n) - 1 / n

        def hsic(a, b):
            return ((h @ a @ h) * (h @ b @ h)).sum()
    else:

        def hsic(a, b):
            a, b = (m - np.diag(np.diag(m)) for m in (a, b))
            one = np.ones(n)
            return np.trace(a @ b) + (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ a @ b @ one

    return hsic(first, second) / math.sqrt(hsic(first, first) * hsic(second, second))


@settings(deadline=None)
@given(st.integers(4, 12), st.integers(1, 15), st.integers(1, 15), st.integers(0, 100))
def test_cka_equals_its_definition(n, d, e, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)) + 3, rng.normal(size=(n, e)) - 2
    assert linear_cka(x, y) == pytest.approx(by_kernels(x, y), abs=1e-9)
    xx, yy = (by_kernels_denominator(a) for a in (x, y))
    if min(xx, yy) > 1e-6:
        assert linear_cka(x, y, unbiased=True) == pytest.approx(by_kernels(x, y, unbiased=True), rel=1e-6, abs=1e-6)


def by_kernels_denominator(x):
    n = len(x)
    k = (x - x.mean(0)) @ (x - x.mean(0)).T
    k -= np.diag(np.diag(k))
    return np.trace(k @ k) + k.sum() ** 2 / ((n - 1) * (n - 2)) - 2 / (n - 2) * np.square(k.sum(0)).sum()


@pytest.mark.parametrize("unbiased", [False, True])
def test_what_cka_does_not_see_and_what_it_does(unbiased):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 8)) * np.arange(1, 9)
    q = ortho_group.rvs(8, random_state=0)
    for same in (x @ q, 5 * x, -x, x + 100, 1e-6 * x @ q + 3):
        assert linear_cka(x, same, unbiased=unbiased) == pytest.approx(1)
    assert linear_cka(x, rng.normal(size=(300, 8)), unbiased=unbiased) < 0.1
    assert linear_cka(x, x @ np.diag([10, 1, 1, 1, 1, 1, 1, 1]), unbiased=unbiased) < 0.8  # scaling one direction is seen
    shuffled = linear_cka(x, rng.permutation(x), unbiased=unbiased)
    assert shuffled < 0.1
    assert linear_cka(x, x[:, :2], unbiased=unbiased) == pytest.approx(linear_cka(x[:, :2], x, unbiased=unbiased))


def test_centring_matters():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 5)) + 50, rng.normal(size=(200, 5)) + 50
    uncentred = np.square(x.T @ y).sum() / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert uncentred > 0.99  # a common offset alone
    assert linear_cka(x, y) < 0.1


def test_small_batches_bias_the_plain_estimator_only():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 640, 200))
    assert linear_cka(x, y, batch=64) > 0.7
    assert linear_cka(x, y, batch=64, unbiased=True) == pytest.approx(0, abs=0.05)
    # A rest of less than half a batch is left out, a larger one is not.
    assert linear_cka(x[:148], y[:148], batch=64) == pytest.approx(linear_cka(x[:128], y[:128], batch=64))
    parts = [linear_cka(x[a:b], y[a:b]) for a, b in ((0, 64), (64, 128), (128, 170))]
    assert linear_cka(x[:170], y[:170], batch=64) == pytest.approx(np.mean(parts))


def test_undefined_cka():
    x = np.random.default_rng(0).normal(size=(10, 3))
    assert math.isnan(linear_cka(x, np.full((10, 2), 0.1)))
    assert math.isnan(linear_cka(x, np.full((10, 2), 1 / 3) * 1e9))
    assert math.isnan(linear_cka(x * math.nan, x))
    with pytest.raises(InputError, match="four examples"):
        linear_cka(x[:3], x[:3])
    with pytest.raises(InputError, match="equal length"):
        linear_cka(x, x[:5])


def test_knn_transfer():
    rng = np.random.default_rng(0)
    centres = np.eye(4) * 5
    labels = np.arange(200) % 4
    features = centres[labels] + rng.normal(size=(200, 4))
    scale = rng.uniform(0.01, 100, size=(200, 1))
    good = knn_transfer(features[:100], labels[:100], features[100:], labels[100:])
    assert good > 0.9
    # Cosine distance: the length of a feature vector says nothing.
    assert knn_transfer(features[:100], labels[:100], (features * scale)[100:], labels[100:]) == good
    assert knn_transfer(rng.normal(size=(100, 4)), labels[:100], features[100:], labels[100:]) < 0.5
    with pytest.raises(InputError, match=r"in \[1, 3\]"):
        knn_transfer(features[:3], labels[:3], features, labels)
    assert math.isnan(knn_transfer(features * math.nan, labels, features, labels))


def test_agreements():
    accuracies = {"forget": 0.0, "retain": 0.9, "forget test": 0.1, "retain test": 0.8}
    assert logit_agreement(accuracies, accuracies) == 1
    assert logit_agreement(accuracies, {**accuracies, "forget": 0.5}) == 0.5
    assert representation_agreement([0.5, 0.6], [0.5, 0.6], [1, 1]) == 1
    assert representation_agreement([0.5, 0.6], [0.4, 0.6], [0.5, 0.8]) == pytest.approx(0.9 * 0.4)
    assert unified_score(1, 1) == 1
    assert unified_score(1, 0) == 0
    assert unified_score(0.5, 1) == pytest.approx(2 / 3)
    assert math.isnan(unified_score(1, math.nan))
    with pytest.raises(InputError, match="same sets"):
        logit_agreement(accuracies, {"forget": 0.0})


def test_a_suppressed_last_layer_is_exposed(zoo):
    """Setting the row of a class to minus infinity gives perfect outputs and leaves every feature as it was."""
    task = zoo.task
    x, y = task.x, task.y.numpy()
    clean = np.arange(100, 1000)
    hidden = {n: m.hidden(x).numpy().astype(float) for n, m in (("original", zoo.originals), ("retrained", zoo.oracles))}
    logits = zoo.originals(x)[0].numpy().astype(float)
    logits[:, 3] = -np.inf
    hit = quantities(logits, y).hit[clean]
    assert hit[y[clean] == 3].mean() == 0
    assert hit[y[clean] != 3].mean() > 0.95
    original, retrained = hidden["original"][0], hidden["retrained"][0]
    assert linear_cka(original, original) == pytest.approx(1)  # the suppressed model's features ARE the original's
    ceiling = linear_cka(retrained, hidden["retrained"][1])
    assert 0.5 < linear_cka(original, retrained) < 1
    assert ceiling < 1
    threes = clean[y[clean] == 3]
    assert knn_transfer(original[clean[:600]], y[clean[:600]], original[threes], y[threes]) > 0.9
