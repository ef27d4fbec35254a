from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_models import TRAIN, digits, train
from scipy import stats

from expunge.audit.kernel.iam import gumbel_signal, iam_offline, iam_online
from expunge.audit.kernel.quantities import quantities
from expunge.core.errors import InputError
from expunge.core.ranking import auc


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=10))
def test_the_signal_is_bounded_and_rises(p):
    p = sorted(p)
    found = gumbel_signal(p)
    assert (np.diff(found) >= 0).all()
    assert found.min() >= 0
    assert found.max() <= 1
    np.testing.assert_allclose(gumbel_signal([0.0, 1.0]), [0, 1])
    low, high = -math.log(1e-2 - math.log(1e-5)), -math.log(1e-2 - math.log(1 + 1e-5))
    assert gumbel_signal([0.5])[0] == pytest.approx((-math.log(1e-2 - math.log(0.50001)) - low) / (high - low))


def test_the_score_equals_its_definition():
    rng = np.random.default_rng(0)
    unlearned, original, shadows = rng.random(6), rng.random(6), rng.random((3, 6))
    training = [rng.random(n) for n in (4, 9, 7)]
    r_u, r_o, r_s = gumbel_signal(unlearned), gumbel_signal(original), gumbel_signal(shadows)
    a = np.arange(5) / 4
    own = np.array([gumbel_signal(t).mean() for t in training])[:, None]
    for variance in ("joint", "example"):
        online, offline = np.zeros(6), np.zeros(6)
        for k in range(4):
            for fit, into in ((r_o, online), (own, offline)):
                mixed = r_s + a[k] * (fit - r_s)
                std = mixed.std() if variance == "joint" else mixed.std(axis=0)
                beta = math.sqrt(6) * std / math.pi
                cdf = stats.gumbel_r.cdf(r_u, mixed.mean(axis=0) - 0.5772 * beta, beta)
                np.add(into, a[k + 1] * cdf / a[1:].sum(), out=into)
        np.testing.assert_allclose(iam_online(unlearned, shadows, original, steps=5, variance=variance), 1 - online)
        np.testing.assert_allclose(iam_offline(unlearned, shadows, training, steps=5, variance=variance), 1 - offline)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3))
def test_the_score_falls_with_the_probability(seed, shadows):
    rng = np.random.default_rng(seed)
    out, original = rng.random((shadows, 5)), rng.random(5)
    scores = [iam_online(np.full(5, p), out, original, steps=20) for p in np.linspace(0, 1, 9)]
    assert (np.diff(scores, axis=0) <= 1e-12).all()
    assert np.min(scores) >= -1e-12
    assert np.max(scores) <= 1 + 1e-12


def test_nan_and_bad_input():
    rng = np.random.default_rng(0)
    unlearned, original, shadows = rng.random(4), rng.random(4), rng.random((2, 4))
    unlearned[1] = math.nan
    shadows[0, 2] = math.nan
    found = iam_online(unlearned, shadows, original)
    np.testing.assert_array_equal(np.isnan(found), [False, True, True, False])
    with pytest.raises(InputError, match="do not vary"):
        iam_online([0.5], [[0.5]], [0.9])
    with pytest.raises(InputError, match="not the margin"):
        iam_online([5.0], [[0.5]], [0.9])
    with pytest.raises(InputError, match="own training samples"):
        iam_offline([0.5], [[0.5]], [])
    # A sample on which all shadows agree with the original has a spread of 0: a step at the mean.
    found = iam_online([0.2, 0.9], [[0.5, 0.5], [0.5, 0.5]], [0.5, 0.5], variance="example")
    np.testing.assert_allclose(found, [1, 0])


@pytest.fixture(scope="module")
def memorised():
    """The task, and label probabilities ``[models, images]`` of an original, which learnt the wrong labels, and 7 oracles."""
    task = digits()
    weights = np.ones((8, TRAIN))
    weights[1:, task.forget] = 0
    return task, quantities(train(task, weights, steps=1500, seed=7)(task.x), task.y).confidence


@pytest.mark.parametrize("shadows", [1, 6])
def test_iam_on_networks(memorised, shadows):
    """The original looks fitted, retrained models do not, and mixtures of both lie between in order."""
    task, p = memorised
    out, original, retrained = p[2 : 2 + shadows, task.flipped], p[0, task.flipped], p[1, task.flipped]

    def score(probability):
        return iam_online(probability, out, original)

    assert original.mean() > 0.6
    assert score(original).mean() < 0.3
    assert score(retrained).mean() > 0.9
    assert score(out[0]).mean() > 0.9
    assert score(np.ones(50)).mean() < score(original).mean()
    mixing = np.linspace(0, 1, 11)
    means = [score((1 - t) * original + t * retrained).mean() for t in mixing]
    assert stats.spearmanr(mixing, means).statistic > 0.9


def test_iam_offline_tells_forgotten_from_kept_rows(memorised):
    task, p = memorised
    kept, seen = np.arange(50, 100), np.setdiff1d(np.arange(TRAIN), task.forget)  # mislabelled and still trained on
    forgotten = iam_offline(p[1, task.flipped], p[2:4, task.flipped], [q[seen] for q in p[2:4]])
    # Shadows that never saw the kept rows do not exist here; a retrained model's signal on the forgotten ones stands in.
    retained = iam_offline(p[1, kept], p[2:4, task.flipped], [q[seen] for q in p[2:4]])
    assert auc(forgotten, retained) > 0.9  # the score is higher = less member-like
