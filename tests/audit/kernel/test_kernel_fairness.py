from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.audit.kernel import fairness
from expunge.core.errors import InputError


def task(n=4000, seed=0, members=3):
    """Labels, groups, and members that err more often in group 1."""
    rng = np.random.default_rng(seed)
    groups, labels = rng.integers(0, 2, n), rng.integers(0, 2, n)
    error = np.where(groups == 1, 0.3, 0.1)[:, None] + np.linspace(-0.05, 0.05, members)
    error = error + 0.1 * ((groups == 1) & (labels == 1))[:, None]
    votes = labels[:, None] ^ (rng.random((n, members)) < error)
    return votes.astype(int), labels, groups


def loss(answers, labels):
    return float(np.where(labels == 1, 1 - answers, answers).mean())


def test_rates_by_hand():
    answers, labels, groups = [1, 0, 1, 0, 1, 1], [1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]
    found = fairness.rates(answers, labels, groups)
    assert found[0] == fairness.Rates(0.5, 0.5, 0.5)
    assert found[1] == fairness.Rates(1, 1, 1)
    assert fairness.equalised_odds_difference(answers, labels, groups) == 0.5
    assert fairness.statistical_parity_difference(answers, labels, groups) == 0.5
    with pytest.raises(InputError, match="Group 1 has examples of one label"):
        fairness.rates([1, 0, 1], [1, 0, 1], [0, 0, 1])
    with pytest.raises(InputError, match="needs two groups"):
        fairness.equalised_odds_difference([1, 0], [1, 0], [0, 0])


def test_all_three_ways_remove_the_difference():
    votes, labels, groups = task()
    vote = fairness.majority(votes)
    assert fairness.equalised_odds_difference(vote, labels, groups) > 0.15
    single, members, whole = (
        f(votes, labels, groups) for f in (fairness.vote_then_fix, fairness.fix_then_vote, fairness.fit_derived)
    )
    answers = {
        "vote then fix": single.probabilities(vote[:, None], groups),
        "fix then vote": members.probabilities(votes, groups),
        "vectors": whole.probabilities(votes, groups),
    }
    for name, p in answers.items():
        assert fairness.equalised_odds_difference(p, labels, groups) < 0.03, name
    # The optimum is the loss that the predictor has, and a larger class of predictors has a lower one.
    assert single.loss == pytest.approx(loss(answers["vote then fix"], labels))
    assert whole.loss == pytest.approx(loss(answers["vectors"], labels))
    constant = min(labels.mean(), 1 - labels.mean())
    assert whole.loss <= single.loss + 1e-9
    assert single.loss <= constant + 1e-9
    assert whole.loss >= loss(vote, labels) - 0.02  # fairness is not free
    # Fresh data: fair in expectation as well.
    more = task(seed=1)
    assert fairness.equalised_odds_difference(whole.probabilities(more[0], more[2]), more[1], more[2]) < 0.06


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 3]))
def test_the_optimum_is_never_beaten_by_a_deterministic_fair_rule(seed, members):
    votes, labels, groups = task(60, seed, members)
    for label, group in itertools.product((0, 1), (0, 1)):
        labels[label * 2 + group], groups[label * 2 + group] = label, group  # every cell exists
    found = fairness.fit_derived(votes, labels, groups)
    p = found.probabilities(votes, groups)
    assert fairness.equalised_odds_difference(p, labels, groups) < 1e-7
    assert found.loss == pytest.approx(loss(p, labels))
    assert found.loss <= min(labels.mean(), 1 - labels.mean()) + 1e-9
    counts = fairness.fit_derived(fairness.vote_counts(votes), labels, groups)
    assert found.loss <= counts.loss + 1e-9
    if members == 1:  # all sixteen deterministic functions of (answer, group)
        for rule in itertools.product((0, 1), repeat=4):
            answers = np.array(rule)[2 * votes[:, 0] + groups]
            if fairness.equalised_odds_difference(answers, labels, groups) < 1e-12:
                assert found.loss <= loss(answers, labels) + 1e-9


def test_a_fair_ensemble_is_left_alone():
    labels, groups = np.tile([0, 0, 1, 1], 50), np.tile([0, 1], 100)
    votes = np.repeat(labels[:, None], 3, axis=1)
    found = fairness.fit_derived(votes, labels, groups)
    assert found.loss == pytest.approx(0)
    np.testing.assert_allclose(found.probabilities(votes, groups), labels, atol=1e-9)
    # A combination that the fit never saw gets its majority.
    np.testing.assert_array_equal(found.probabilities([[1, 1, 0], [0, 1, 0]], [0, 1]), [1, 0])
    drawn = fairness.Derived(np.array([[1]]), np.array([0]), np.array([[0.3]]), 0.0).sample(
        np.ones((4000, 1)), np.zeros(4000), seed=1
    )
    assert drawn.mean() == pytest.approx(0.3, abs=0.03)


def test_a_vote_of_fixed_members_is_the_sum_over_all_outcomes():
    votes, labels, groups = task(300)
    fixed = fairness.fix_then_vote(votes, labels, groups)
    p = np.stack([m.probabilities(votes[:, [i]], groups) for i, m in enumerate(fixed.members)])
    want = sum(
        np.prod([p[i] if bit else 1 - p[i] for i, bit in enumerate(bits)], axis=0)
        for bits in itertools.product((0, 1), repeat=3)
        if sum(bits) >= 2
    )
    np.testing.assert_allclose(fixed.probabilities(votes, groups), want)


def test_bad_input():
    votes, labels, groups = task(40)
    with pytest.raises(InputError, match="can be tied"):
        fairness.majority(votes[:, :2])
    with pytest.raises(InputError, match="two groups or more"):
        fairness.fit_derived(votes, labels, np.zeros(40))
    with pytest.raises(InputError, match="0 or 1"):
        fairness.fit_derived(votes + 0.5, labels, groups)
    with pytest.raises(InputError, match="equal length"):
        fairness.fit_derived(votes, labels[:-1], groups)
    found = fairness.fit_derived(votes, labels, groups)
    with pytest.raises(InputError, match=r"groups \[0, 1\] only"):
        found.probabilities(votes, groups + 5)
    with pytest.raises(InputError, match="3 answers"):
        found.probabilities(votes[:, :1], groups)
