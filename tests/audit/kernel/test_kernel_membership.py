from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.svm import SVC

from expunge.audit.kernel import membership
from expunge.audit.kernel.quantities import probabilities, quantities
from expunge.core.errors import InputError
from expunge.core.ranking import tpr_at_fpr

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12)


@settings(deadline=None)
@given(SCORES, SCORES)
def test_threshold_attack_by_brute_force(outside, inside):
    def balanced(t):
        return (np.mean(np.array(inside) < t) + np.mean(np.array(outside) >= t)) / 2

    found = membership.threshold_attack(outside, inside)
    assert found.auc == pytest.approx(np.mean([[(o > i) + 0.5 * (o == i) for i in inside] for o in outside]))
    best = max(balanced(t) for t in np.arange(-6, 7) + 0.5)
    assert found.balanced_accuracy == pytest.approx(best)
    threshold = membership.best_threshold(outside, inside)
    assert membership.threshold_accuracy(threshold, outside, inside) == pytest.approx(best)
    assert math.isnan(found.tpr_at_1_percent)  # there is no hundredth of 12 non-members


def test_threshold_attack_at_low_false_positive_rates():
    rng = np.random.default_rng(0)
    outside, inside = rng.normal(1, 1, 2000), rng.normal(0, 1, 500)
    found = membership.threshold_attack(outside, inside)
    assert found.auc == pytest.approx(0.76, abs=0.04)
    assert found.tpr_at_1_percent == pytest.approx(0.092, abs=0.05)  # P(Z < z_0.01 + 1)
    assert found.tpr_at_01_percent < found.tpr_at_1_percent
    assert membership.threshold_attack(-outside, -inside).auc == pytest.approx(1 - found.auc)
    assert math.isnan(membership.threshold_attack([1.0, math.nan], [0.0]).auc)
    with pytest.raises(InputError, match="members is empty"):
        membership.threshold_attack([1.0], [])
    with pytest.raises(InputError, match=r"\[0, 1\)"):
        tpr_at_fpr(outside, inside, 1.0)


def beta(seed, a, b, n=400):
    return np.random.default_rng(seed).beta(a, b, n)


def test_svc_efficacy_has_the_right_sign():
    known, unseen = beta(0, 8, 1), beta(1, 2, 2)
    remembered = membership.svc_efficacy(known, unseen, beta(2, 8, 1))
    forgotten = membership.svc_efficacy(known, unseen, beta(3, 2, 2))
    assert remembered < 0.35
    assert forgotten > 0.6
    # Extra retain examples beyond as many as there are test examples are not read.
    assert membership.svc_efficacy(np.concatenate([known, np.zeros(999)]), unseen, beta(2, 8, 1)) == remembered
    assert membership.svc_members(known, unseen, beta(2, 8, 1)) == pytest.approx(1 - remembered)
    assert math.isnan(membership.svc_efficacy(np.ones(5), np.ones(5), np.ones(5)))
    assert math.isnan(membership.svc_efficacy([math.nan, 1.0], [0.5], [0.1]))


def test_svc_is_the_published_machine():
    known, unseen, grid = beta(0, 8, 1, 60), beta(1, 2, 2, 60), np.linspace(0, 1, 200)
    machine = SVC(C=3, gamma=1).fit(np.concatenate([known, unseen])[:, None], np.repeat([1, 0], 60))
    want = machine.predict(grid[:, None])
    assert [membership.svc_members(known, unseen, [g]) for g in grid] == want.tolist()
    weaker = SVC(C=0.003, gamma=1).fit(np.concatenate([known, unseen])[:, None], np.repeat([1, 0], 60))
    assert (weaker.predict(grid[:, None]) != want).any()


def test_entropy_attack_has_the_right_sign():
    sure, unsure = beta(0, 1, 8), beta(1, 3, 3)
    assert membership.entropy_attack(sure, unsure, beta(2, 1, 8)) > 0.8
    assert membership.entropy_attack(sure, unsure, beta(3, 3, 3)) < 0.2
    # Class weights: a hundred times more members do not make everything a member.
    assert membership.entropy_attack(beta(4, 1, 8, 40_000), unsure, beta(3, 3, 3)) < 0.2
    assert math.isnan(membership.entropy_attack([1.0, 1.0], [1.0], [1.0]))


def test_logistic_attack_is_at_chance_for_equal_samples():
    rng = np.random.default_rng(0)
    same = [membership.logistic_attack(rng.normal(size=900), rng.normal(size=300), seed=s) for s in range(5)]
    assert np.mean(same) == pytest.approx(0.5, abs=0.05)  # not 0.75, the share of the larger set
    low = membership.logistic_attack(rng.normal(3, 1, 300), rng.normal(0, 1, 300))
    assert low > 0.88
    assert membership.logistic_attack(rng.normal(0, 1, 300), rng.normal(3, 1, 300)) > 0.88  # it learns either direction
    assert math.isnan(membership.logistic_attack(np.ones(20), np.ones(20)))
    with pytest.raises(InputError, match="needs 10 examples"):
        membership.logistic_attack(np.ones(9), np.ones(20))


def test_sorted_softmax_attack_does_not_see_labels():
    rng = np.random.default_rng(0)

    def outputs(scale, n):
        return probabilities(scale * rng.normal(size=(n, 6)))

    retain, test, forget = outputs(5, 600), outputs(1, 600), outputs(5, 200)
    remembered = membership.sorted_softmax_attack(retain, test, forget)
    assert remembered > 0.8
    shuffled = rng.permuted(forget, axis=1)
    assert membership.sorted_softmax_attack(retain, test, shuffled) == remembered
    assert membership.sorted_softmax_attack(retain, test, outputs(1, 200)) == pytest.approx(0.5, abs=0.1)
    same = membership.sorted_softmax_attack(outputs(1, 600), outputs(1, 600), outputs(1, 200))
    assert same == pytest.approx(0.5, abs=0.1)
    assert math.isnan(membership.sorted_softmax_attack(retain, test * math.nan, forget))
    with pytest.raises(InputError, match="same classes"):
        membership.sorted_softmax_attack(retain, test[:, :3], forget)


def test_population_attacks_on_a_class_that_was_suppressed(zoo):
    """Where outputs do differ, all attacks see it: the forget examples' logit of the label is pulled down."""
    task = zoo.task
    logits = zoo.originals(task.x)[0].numpy().astype(float)
    rows = task.clean
    test = zoo.test(zoo.originals)
    labels = task.y.numpy()
    before = zoo.score(zoo.originals)
    suppressed = logits.copy()
    suppressed[rows, labels[rows]] -= 30
    after = quantities(suppressed, labels)
    retain = np.setdiff1d(task.retain, np.arange(100))  # mislabelled rows that are kept have low confidences as well
    efficacy = [membership.svc_efficacy(q[retain], test.confidence[0], q[rows]) for q in (before.confidence[0], after.confidence)]
    assert efficacy[0] < 0.5 < efficacy[1]
    auc = [membership.threshold_attack(test.loss[0], q[rows]).auc for q in (before.loss[0], after.loss)]
    assert auc[1] < 0.02 < auc[0]  # stranger than anything unseen
