from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_models import TRAIN, Digits, digits, train
from scipy.spatial.distance import jensenshannon

from expunge.audit.kernel import gaps, membership
from expunge.audit.kernel.gaps import FiveMetrics
from expunge.audit.kernel.quantities import quantities
from expunge.core.errors import InputError

SHARE = st.floats(0, 1)
TRIPLE = st.tuples(SHARE, SHARE, SHARE)
FIVE = st.builds(FiveMetrics, SHARE, SHARE, SHARE, SHARE)


def softmax(rng, n, c, scale=1.0):
    e = np.exp(scale * rng.normal(size=(n, c)))
    return e / e.sum(axis=1, keepdims=True)


def test_the_five_metrics_by_hand():
    found = gaps.five_metrics([1, 0, 0, 0], [1, 1, 1, 0], [1, 0], 0.8, seconds=3.0)
    assert found == FiveMetrics(0.75, 0.8, 0.75, 0.5, 3.0)
    other = FiveMetrics(0.25, 0.6, 0.75, 0.9)
    assert gaps.gaps(found, other)["unlearning_accuracy"] == pytest.approx(0.5)  # forgets more than retraining
    assert gaps.average_gap(found, [other]) == pytest.approx((0.5 + 0.2 + 0 + 0.4) / 4)


@settings(deadline=None)
@given(FIVE, FIVE)
def test_the_average_gap_is_a_distance(a, b):
    assert gaps.average_gap(a, [a]) == 0
    assert gaps.average_gap(a, [b]) == pytest.approx(gaps.average_gap(b, [a]))
    assert 0 <= gaps.average_gap(a, [a, b]) <= 1
    with pytest.raises(InputError, match="at least one retrained"):
        gaps.average_gap(a, [])


def test_adaptive_unlearning_score():
    aus = gaps.adaptive_unlearning_score
    assert aus(0.9, 0.9, 0.0, "class") == 1
    assert aus(0.9, 0.9, 1.0, "class") == 0.5  # nothing forgotten
    assert aus(0.9, 0.9, 0.9, "random") == 1
    assert aus(0.9, 0.8, 0.3, "random") == pytest.approx(0.9 / 1.5)
    with pytest.raises(InputError, match="Divide percentages"):
        aus(90, 0.9, 0.0, "class")


@settings(deadline=None)
@given(TRIPLE, TRIPLE)
def test_tug_of_war_is_one_only_at_the_retrained_model(u, r):
    assert gaps.tug_of_war(r, r) == 1
    assert 0 <= gaps.tug_of_war(u, r) <= 1
    assert gaps.tug_of_war(u, r) <= 1 - max(abs(a - b) for a, b in zip(u, r, strict=True)) + 1e-12
    assert gaps.tug_of_war_mia(u, r) == gaps.tug_of_war(u, r)
    assert gaps.tug_of_war((0.5, 1, 1), (0, 1, 1)) == 0.5


@settings(deadline=None)
@given(SHARE, SHARE, SHARE)
def test_nomus(accuracy, mia, weight):
    value = gaps.nomus(accuracy, mia, weight)
    assert value == pytest.approx(gaps.nomus(accuracy, 1 - mia, weight))  # 0.3 and 0.7 are the same
    assert 0 <= value <= 1
    assert gaps.nomus(1, 0.5) == 1
    assert gaps.forgetting_score(0.3) == pytest.approx(0.2)


def test_nomus_of_a_published_row():
    # MUFAC's original model: test accuracy 0.5951, |MIA - 0.5| = 0.2136, NoMUS 0.5839.
    assert gaps.nomus(0.5951, 0.5 + 0.2136) == pytest.approx(0.5839, abs=1e-4)


def test_activation_distance():
    a = np.array([[1.0, 0.0], [0.5, 0.5]])
    b = np.array([[0.0, 1.0], [0.5, 0.5]])
    assert gaps.activation_distance(a, a) == 0
    assert gaps.activation_distance(a, b) == pytest.approx(math.sqrt(2) / 2)
    assert math.isnan(gaps.activation_distance([[math.nan, 1.0]], [[0.5, 0.5]]))
    with pytest.raises(InputError, match="not logits"):
        gaps.activation_distance([[3.0, 1.0]], [[0.5, 0.5]])
    with pytest.raises(InputError, match="same classes"):
        gaps.activation_distance(a, b[:1])


def test_divergence_is_summed_over_classes():
    rng = np.random.default_rng(0)
    p, q = softmax(rng, 20, 10, 3), softmax(rng, 20, 10, 3)
    np.testing.assert_allclose(gaps.jensen_shannon(p, q), jensenshannon(p, q, base=2, axis=1) ** 2)
    one_hot = np.eye(10)
    # Certain and different is one bit, whatever the number of classes: a mean over classes would give a tenth.
    np.testing.assert_allclose(gaps.jensen_shannon(one_hot, np.roll(one_hot, 1, axis=1)), 1)
    assert gaps.zero_retrain_forgetting(one_hot, np.roll(one_hot, 1, axis=1)) == 0
    assert gaps.zero_retrain_forgetting(p, p) == 1
    # The nearer to the incompetent network, the higher.
    mixes = [gaps.zero_retrain_forgetting((1 - t) * p + t * q, q) for t in (0, 0.3, 0.6, 1)]
    assert mixes == sorted(mixes)
    assert math.isnan(gaps.zero_retrain_forgetting([[math.nan, 1.0]], [[0.5, 0.5]]))


def test_relearning():
    assert gaps.relearn_steps([2.0, 1.0, 0.52, 0.4], original=0.5) == 2
    assert gaps.relearn_steps([0.5], original=0.5) == 0
    assert gaps.relearn_steps([2.0, 1.0], original=0.5) is None
    assert gaps.relearn_steps([2.0, math.nan], original=0.5) is None
    assert gaps.relearn_ratio(5, 50) == 0.1  # remembers
    assert gaps.relearn_ratio(50, 50) == 1
    assert math.isnan(gaps.relearn_ratio(5, 0))
    assert math.isnan(gaps.relearn_ratio(None, 10))
    with pytest.raises(InputError, match="not negative"):
        gaps.relearn_steps([-1.0], 0.5)
    assert gaps.regain_steps([0.0, 0.5, 0.94, 0.96], original=1.0) == 3
    assert gaps.regain_steps([0.0, 0.5, 0.94], original=1.0) is None
    assert gaps.regain_steps([0.0], original=0.0) == 0
    with pytest.raises(InputError, match="must be in"):
        gaps.regain_steps([1.5], 0.5)


def test_retrain_free_divergence():
    rng = np.random.default_rng(0)
    p, labels = softmax(rng, 40, 5, 2), np.arange(40) % 4
    assert gaps.retrain_free_divergence(p, labels, p, labels) == pytest.approx(0, abs=1e-12)
    order = rng.permutation(40)
    assert gaps.retrain_free_divergence(p, labels, p[order], labels[order]) == pytest.approx(0, abs=1e-12)
    q = softmax(rng, 8, 5, 2)
    want = [jensenshannon(p[labels == c].mean(0), q[2 * c : 2 * c + 2].mean(0), base=2) ** 2 for c in range(4)]
    assert gaps.retrain_free_divergence(p, labels, q, np.arange(8) // 2) == pytest.approx(np.mean(want))
    with pytest.raises(InputError, match="class 3"):
        gaps.retrain_free_divergence(p, labels, p[labels < 3], labels[labels < 3])


@pytest.fixture(scope="module")
def noisy():
    """Digits of which 40 % have a wrong label, in training and test alike: an original, and two models without 300 images."""
    task = digits()
    labels = torch.cat([task.y, task.test_y])
    generator = torch.Generator().manual_seed(3)
    wrong = torch.rand(len(labels), generator=generator) < 0.4
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (int(wrong.sum()),), generator=generator)) % 10
    task = Digits(task.x, labels[:TRAIN], task.test_x, labels[TRAIN:])
    weights = np.ones((3, TRAIN))
    weights[1:, 700:] = 0
    models = train(task, weights, steps=1200, seed=9)
    return quantities(models(task.x), task.y), quantities(models(task.test_x), task.test_y)


def test_the_gap_and_nomus_of_an_original_and_of_retrained_models(noisy):
    """Fed with a retrained model every gap is seed noise, and the original is worse by either score."""
    train_set, test = noisy
    five, scores = [], []
    for m in range(3):
        confidence = train_set.confidence[m]
        efficacy = membership.svc_efficacy(confidence[:700], test.confidence[m], confidence[700:])
        five.append(gaps.five_metrics(train_set.hit[m, 700:], train_set.hit[m, :700], test.hit[m], efficacy))
        attack = membership.logistic_attack(test.loss[m], train_set.loss[m, 700:])
        scores.append(gaps.nomus(gaps.accuracy(test.hit[m]), attack))
    original, retrained = gaps.average_gap(five[0], five[1:]), gaps.average_gap(five[1], [five[2]])
    assert original > 0.2
    assert retrained < 0.08
    assert original > 4 * retrained
    assert five[0].mia_efficacy < five[1].mia_efficacy
    assert scores[0] < min(scores[1:]) - 0.05
    accuracies = [(1 - f.unlearning_accuracy, f.retain_accuracy, f.test_accuracy) for f in five]
    tow = [gaps.tug_of_war(a, accuracies[2]) for a in accuracies[:2]]
    assert tow[0] < 0.7 < tow[1]
