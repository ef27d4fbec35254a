from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from expunge.audit.kernel.forgetting import competition_score, forgetting_epsilon, forgetting_quality
from expunge.audit.kernel.likelihood import lira, rmia, u_lira
from expunge.audit.kernel.membership import threshold_attack
from expunge.core.errors import InputError
from expunge.core.ranking import auc


def test_lira_equals_two_gaussians():
    rng = np.random.default_rng(0)
    shadows, phi = rng.normal(size=(8, 5)), rng.normal(size=5)
    inside = np.zeros((8, 5), dtype=bool)
    for j in range(5):
        inside[rng.choice(8, 4, replace=False), j] = True
    found = lira(phi, shadows, inside, variance="example")
    offline = lira(phi, shadows, inside, mode="offline", variance="example")
    for j in range(5):
        a, b = shadows[inside[:, j], j], shadows[~inside[:, j], j]
        want = stats.norm.logpdf(phi[j], a.mean(), a.std(ddof=1)) - stats.norm.logpdf(phi[j], b.mean(), b.std(ddof=1))
        assert found[j] == pytest.approx(want)
        assert offline[j] == pytest.approx(1 - stats.norm.sf(phi[j], b.mean(), b.std(ddof=1)))
    # Fewer than 64: one variance, the mean of those within examples. A shift of an example must not change it.
    shifted = shadows + 100 * np.arange(5)
    np.testing.assert_allclose(lira(phi, shadows, inside), lira(phi + 100 * np.arange(5), shifted, inside))
    pooled = np.mean([shadows[~inside[:, j], j].var(ddof=1) for j in range(5)])
    np.testing.assert_allclose(
        lira(phi, shadows, inside, mode="offline"),
        [stats.norm.cdf(phi[j], shadows[~inside[:, j], j].mean(), math.sqrt(pooled)) for j in range(5)],
    )


def test_lira_switches_to_variances_per_example_at_64_models():
    rng = np.random.default_rng(0)
    shadows, phi = rng.normal(size=(128, 3)) * [1, 5, 20], np.ones(3)
    inside = np.tile(np.arange(128)[:, None] % 2 == 0, (1, 3))
    np.testing.assert_array_equal(lira(phi, shadows, inside), lira(phi, shadows, inside, variance="example"))
    few = slice(0, 126)
    np.testing.assert_array_equal(lira(phi, shadows[few], inside[few]), lira(phi, shadows[few], inside[few], variance="global"))


def test_lira_says_what_is_missing():
    with pytest.raises(InputError, match="1 of 2 examples have no OUT"):
        lira([0, 0], [[1, 2], [3, 4]], [[1, 0], [1, 1]])
    with pytest.raises(InputError, match="no IN"):
        lira([0.0], [[1.0], [2.0]], [[0], [0]])
    with pytest.raises(InputError, match="No example has two OUT"):
        lira([0.0], [[1.0], [2.0]], [[0], [1]], mode="offline")
    with pytest.raises(InputError, match="0 or 1"):
        lira([0.0], [[1.0], [2.0]], [[0, 1]])
    assert np.isnan(lira([0.0], [[1.0], [1.0]], [[0], [0]], mode="offline")).all()  # no spread, no likelihood
    broken = lira([0.0, 0.0], [[1.0, math.nan], [2.0, 1.0], [3.0, 2.0]], np.zeros((3, 2)), mode="offline")
    assert np.isfinite(broken[0])
    assert np.isnan(broken[1])


def test_lira_finds_members_of_a_network(zoo):
    """The last pair of shadows are the targets; each image is in exactly one of them."""
    margins = zoo.score(zoo.shadows).margin
    rest = [i for i in range(32) if i not in (15, 31)]
    found = {}
    for mode in ("online", "offline"):
        scores = [lira(margins[i], margins[rest], zoo.halves[rest], mode=mode) for i in (15, 31)]
        for name, rows in (("flipped", np.arange(100)), ("clean", np.arange(100, 1000))):
            values = np.concatenate([s[rows] for s in scores])
            member = np.concatenate([zoo.halves[i][rows] for i in (15, 31)])
            found[mode, name] = auc(-values[~member], -values[member])
    assert found["online", "flipped"] > 0.85
    assert found["offline", "flipped"] > 0.75
    assert found["online", "clean"] > 0.52


@settings(deadline=None)
@given(st.integers(3, 9), st.integers(0, 10_000))
def test_u_lira_by_brute_force(models, seed):
    rng = np.random.default_rng(seed)
    sets = rng.normal(0, 1, (models, 4)), rng.normal(1, 1, (models, 4))
    found = u_lira(*sets, variance="example")
    right = np.zeros(4)
    for i in range(models):
        fits = [np.delete(s, i, axis=0) for s in sets]
        for own in (0, 1):
            logs = [stats.norm.logpdf(sets[own][i], f.mean(0), f.std(0, ddof=1)) for f in fits]
            right += logs[own] > logs[1 - own]
    np.testing.assert_allclose(found.per_example, right / (2 * models))
    assert found.accuracy == pytest.approx(found.per_example.mean())
    assert found.models == 2 * models


def test_u_lira_is_at_chance_for_equal_populations_and_sees_both_directions():
    rng = np.random.default_rng(0)
    same = rng.normal(size=(2, 16, 3000))
    assert u_lira(*same).accuracy == pytest.approx(0.5, abs=0.01)
    assert u_lira(*same, variance="example").accuracy == pytest.approx(0.5, abs=0.01)
    for shift in (-4, 4):
        assert u_lira(same[0] + shift, same[1]).accuracy > 0.95
    # Equal means: what differs is the spread, which a Gaussian of each example sees and a single threshold could not.
    assert u_lira(10 * same[0], same[1], variance="example").accuracy > 0.75
    with pytest.raises(InputError, match="three models"):
        u_lira(same[0][:2], same[1])
    with pytest.raises(InputError, match="same examples"):
        u_lira(same[0][:, :5], same[1])
    broken = same[0].copy()
    broken[0, 0] = math.inf
    found = u_lira(broken, same[1])
    assert math.isnan(found.accuracy)
    assert np.isnan(found.per_example).sum() == 1


def test_u_lira_sees_what_a_population_attack_does_not(zoo):
    """A loss attack gives the same for originals and oracles, the attack by example tells them apart."""
    task = zoo.task
    originals, oracles, others = (zoo.score(m) for m in (zoo.originals, zoo.oracles, zoo.others))
    losses = zoo.test(zoo.originals).loss, zoo.test(zoo.oracles).loss
    areas = [
        np.mean([threshold_attack(test[i], q.loss[i, task.forget]).auc for i in range(8)])
        for test, q in zip(losses, (originals, oracles), strict=True)
    ]
    assert abs(areas[0] - areas[1]) < 0.1
    assert u_lira(originals.margin[:, task.flipped], oracles.margin[:, task.flipped]).accuracy > 0.85
    assert 0.55 < u_lira(originals.margin[:, task.clean], oracles.margin[:, task.clean]).accuracy < 0.9
    assert u_lira(others.margin[:, task.forget], oracles.margin[:, task.forget]).accuracy == pytest.approx(0.5, abs=0.06)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(1, 3), st.integers(0, 1000))
def test_rmia_by_brute_force(a, gamma, seed):
    rng = np.random.default_rng(seed)
    p, refs, z, z_refs = rng.random(6), rng.random((2, 6)), rng.random(9), rng.random((2, 9))
    own = p / (((1 + a) * refs.mean(0) + 1 - a) / 2)
    others = z / (((1 + a) * z_refs.mean(0) + 1 - a) / 2)
    want = [(x / others > gamma).mean() for x in own]
    np.testing.assert_allclose(rmia(p, refs, z, z_refs, a=a, gamma=gamma), want)


def test_rmia_of_a_network_and_bad_input(zoo):
    confidence = zoo.score(zoo.shadows).confidence
    test = zoo.test(zoo.shadows).confidence
    inside, rows = zoo.halves[31], np.arange(100)
    out = ~zoo.halves[:31][:, rows]
    # As references one OUT model per image: the first that did not see it.
    reference = confidence[out.argmax(axis=0), rows][None]
    scores = rmia(confidence[31, rows], reference, test[31], test[:1], gamma=1.0)
    assert auc(-scores[~inside[rows]], -scores[inside[rows]]) > 0.6
    with pytest.raises(InputError, match="not the margin"):
        rmia([2.0], [[0.5]], [0.5], [[0.5]])
    with pytest.raises(InputError, match="gamma"):
        rmia([0.2], [[0.5]], [0.5], [[0.5]], gamma=0.5)
    assert np.isnan(rmia([0.2], [[0.5]], [math.nan], [[0.5]])).all()


def brute_epsilon(u, r, delta):
    """Every interval between pooled values, thresholds among them, in both directions."""
    cuts = [-math.inf, *(np.unique([*u, *r])[:-1] + np.diff(np.unique([*u, *r])) / 2), math.inf]
    best = math.nan
    for i, low in enumerate(cuts):
        for high in cuts[i + 1 :]:
            a, b = ((s > low) & (s < high) for s in (u, r))
            for fpr, fnr in ((b.mean(), 1 - a.mean()), (1 - b.mean(), a.mean())):
                if fpr == 0 and fnr == 0:
                    return math.inf
                if fpr > 0 and fnr > 0 and 1 - delta - fpr > 0 and 1 - delta - fnr > 0:
                    eps = max(math.log(1 - delta - fpr) - math.log(fnr), math.log(1 - delta - fnr) - math.log(fpr), 0)
                    best = np.fmax(best, eps)
    return best


@settings(deadline=None)
@given(
    st.lists(st.integers(-6, 6).map(float), min_size=4, max_size=7),
    st.lists(st.integers(-6, 6).map(float), min_size=4, max_size=7),
)
def test_epsilon_by_brute_force(u, r):
    found = forgetting_epsilon(np.array(u)[:, None], np.array(r)[:, None])[0]
    if len({*u, *r}) == 1:
        assert math.isnan(found)
    elif len(set(u)) == 1 or len(set(r)) == 1:
        assert found == math.inf  # one set is a point
    else:
        assert found == pytest.approx(brute_epsilon(np.array(u), np.array(r), 1e-5), nan_ok=True)


def test_epsilon_and_quality():
    rng = np.random.default_rng(0)
    retrained, again = rng.normal(size=(2, 256, 20))
    floor = forgetting_epsilon(again, retrained)
    some = forgetting_epsilon(retrained[::-1] + 1, retrained)
    assert floor.max() < 2.5
    assert some.mean() > floor.mean() + 0.5
    assert (forgetting_epsilon(retrained + 50, retrained) == math.inf).all()
    assert (forgetting_epsilon(retrained * 1e-3, retrained) == math.inf).all()  # all unlearned models say the same
    quality = [forgetting_quality(e) for e in (floor, some, np.full(3, math.inf))]
    assert quality == sorted(quality, reverse=True)
    assert quality[2] == 2 / 2**13
    assert forgetting_quality([0.0, 0.49]) == 1
    assert forgetting_quality([0.5, 1.2]) == pytest.approx((0.5 + 0.25) / 2)
    assert math.isnan(forgetting_quality([math.nan]))
    broken = retrained.copy()
    broken[0, 0] = math.nan
    assert np.isnan(forgetting_epsilon(broken, again)).sum() == 1
    with pytest.raises(InputError, match="several models"):
        forgetting_epsilon(retrained[:1], again)


def test_competition_score():
    assert competition_score(0.5, (0.9, 0.9), (0.8, 0.8)) == 0.5
    assert competition_score(0.5, (0.45, 0.9), (0.4, 0.8)) == pytest.approx(0.125)
    with pytest.raises(InputError, match="never right"):
        competition_score(0.5, (0.5, 0.0), (0.5, 0.5))


def test_competition_metric_of_networks(zoo):
    """Flipped forget examples of untouched models are told from retrained ones; retrained ones from each other are not."""
    task = zoo.task
    a, b, c = (zoo.score(m).margin[:, task.flipped] for m in (zoo.originals, zoo.oracles, zoo.others))
    before, floor = (forgetting_quality(forgetting_epsilon(m, b)) for m in (a, c))
    assert before < 0.02
    assert floor > 0.06  # not 1: with 32 models the best of many rules always finds something
    assert forgetting_quality(forgetting_epsilon(c, b, intervals=False)) > floor + 0.05
