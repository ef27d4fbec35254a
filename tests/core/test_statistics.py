"""Statistics against scipy, brute force, closed forms and simulated coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hyp
from scipy import stats

from expunge.core import statistics as st
from expunge.core.errors import InputError
from expunge.core.kolmogorov import _ks_asymptotic, _ks_equal, _ks_paths
from expunge.core.results import Direction

finite = hyp.floats(-1e3, 1e3, allow_nan=False)
samples = hyp.lists(hyp.integers(-5, 5).map(float), min_size=1, max_size=30)


def names(n: int, per: int = 1) -> list[str]:
    return [f"c{i // per}" for i in range(n)]


def clustered(rng: np.random.Generator, clusters: int, per: int, within: float = 0.5) -> np.ndarray:
    return np.repeat(rng.normal(size=clusters), per) + within * rng.normal(size=clusters * per)


# --- bootstrap -------------------------------------------------------------------------------------------------------------


def test_the_fast_mean_and_the_general_path_agree_in_distribution() -> None:
    rng = np.random.default_rng(1)
    values = clustered(rng, 25, 4)
    fast = st.bootstrap(values, names(100, 4), draws=20_000)
    slow = st.bootstrap(values, names(100, 4), lambda v: float(np.mean(v)), draws=20_000, seed=3)
    assert fast.value == slow.value == pytest.approx(values.mean())
    assert fast.low == pytest.approx(slow.low, abs=0.02)
    assert fast.high == pytest.approx(slow.high, abs=0.02)
    assert (fast.n, fast.clusters) == (100, 25)


def test_a_bootstrap_over_clusters_is_wider_than_one_over_examples_when_clusters_differ() -> None:
    values = clustered(np.random.default_rng(2), 20, 20, within=0.1)
    by_cluster = st.bootstrap(values, names(400, 20))
    by_example = st.bootstrap(values, names(400))
    assert by_cluster.high - by_cluster.low > 3 * (by_example.high - by_example.low)


@pytest.mark.parametrize("clusters", [6, 20])
def test_bootstrap_covers_the_truth_about_as_often_as_it_says(clusters: int) -> None:
    rng = np.random.default_rng(clusters)
    hits = 0
    for run in range(400):
        found = st.bootstrap(clustered(rng, clusters, 5), names(clusters * 5, 5), draws=500, seed=run)
        hits += found.low <= 0 <= found.high
    assert 0.92 <= hits / 400 <= 0.98  # a plain percentile interval with 6 clusters covers 0.87


def test_bootstrap_is_deterministic_and_seeded() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert st.bootstrap(values, names(50)) == st.bootstrap(values, names(50))
    assert st.bootstrap(values, names(50)).low != st.bootstrap(values, names(50), seed=1).low


def test_bootstrap_of_unequal_clusters_resamples_sums_and_sizes_together() -> None:
    values = np.array([0.0] * 9 + [10.0])
    clusters = ["a"] * 9 + ["b"]
    found = st.bootstrap(values, clusters, draws=4000)
    assert found.value == pytest.approx(1.0)
    assert (found.low, found.high) == (0.0, 10.0)  # resamples are aa (0), ab (1) and bb (10)


def test_a_statistic_of_two_arrays_keeps_them_aligned() -> None:
    x = np.arange(40.0)
    found = st.bootstrap((x, 2 * x + 1), names(40), lambda a, b: float(np.max(np.abs(b - 2 * a - 1))), draws=200)
    assert found.value == found.low == found.high == 0.0


def test_bootstrap_memory_blocks_do_not_change_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=60)
    whole = st.bootstrap(values, names(60))
    monkeypatch.setattr("expunge.core.intervals._BLOCK", 300)
    assert st.bootstrap(values, names(60)) == whole  # the generator's stream is consumed row by row


def test_no_interval_from_one_cluster_or_from_broken_values() -> None:
    single = st.bootstrap([1.0, 3.0], ["a", "a"])
    assert (single.value, single.low, single.high) == (2.0, None, None)
    number = single.number(Direction.UTILITY_UP)
    assert number.value == 2.0
    assert number.flags
    broken = st.bootstrap([1.0, math.inf], ["a", "b"])
    assert broken.low is None
    assert broken.number(Direction.UTILITY_UP).value is None  # flagged, never printed bare


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]]])
def test_bootstrap_refuses_what_is_no_sample(values: list[float]) -> None:
    with pytest.raises(InputError):
        st.bootstrap(values, [])
    with pytest.raises(InputError, match="one cluster per value"):
        st.bootstrap([1.0], ["a", "b"])


def test_bootstrap_means_reproduces_the_harmonic_mean_and_its_delta_method_interval() -> None:
    rng = np.random.default_rng(5)
    a, b, c = rng.uniform(0.6, 1, 200), rng.uniform(0.1, 0.5, 200), rng.uniform(0.4, 0.6, 150)

    def combine(means: np.ndarray) -> np.ndarray:
        return means.shape[1] / np.sum(1 / means, axis=1)

    found = st.bootstrap_means([((a, b), names(200)), ((c,), names(150))], combine, draws=4000)
    means = np.array([a.mean(), b.mean(), c.mean()])
    value = st.harmonic_mean(means)
    assert found.value == pytest.approx(value)
    gradient = value**2 / (3 * means**2)
    covariance = np.cov(a, b) / 200
    error = math.sqrt(gradient[:2] @ covariance @ gradient[:2] + gradient[2] ** 2 * c.var(ddof=1) / 150)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert found.n == 350


def test_bootstrap_means_resamples_arrays_of_one_group_together() -> None:
    a = np.random.default_rng(0).normal(size=50)
    found = st.bootstrap_means([((a, -a), names(50))], lambda m: m[:, 0] + m[:, 1])
    assert found.low == pytest.approx(0, abs=1e-12)
    assert found.high == pytest.approx(0, abs=1e-12)


def test_pairing_removes_what_both_models_share() -> None:
    rng = np.random.default_rng(3)
    item = 10 * rng.normal(size=200)
    a, b = item + rng.normal(size=200) + 0.5, item + rng.normal(size=200)
    found = st.paired_bootstrap(a, b, names(200))
    assert found.value == pytest.approx(np.mean(a) - np.mean(b))
    assert found.low > 0.1
    assert found.high - found.low < 0.7  # unpaired it would be about 3.9
    with pytest.raises(InputError, match="equal length"):
        st.paired_bootstrap([1.0], [1.0, 2.0], ["a"])


# --- closed forms ------------------------------------------------------------------------------------------------------------


def test_cluster_standard_error_is_the_textbook_one_without_clusters_and_of_cluster_means_when_equal() -> None:
    rng = np.random.default_rng(4)
    values = clustered(rng, 15, 6)
    assert st.cluster_standard_error(values, names(90)) == pytest.approx(values.std(ddof=1) / math.sqrt(90))
    by_cluster = values.reshape(15, 6).mean(axis=1)
    assert st.cluster_standard_error(values, names(90, 6)) == pytest.approx(by_cluster.std(ddof=1) / math.sqrt(15))
    assert st.cluster_standard_error([1.0, 2.0], ["a", "a"]) is None


def test_tost_equals_two_one_sided_t_tests_of_cluster_means() -> None:
    rng = np.random.default_rng(6)
    d = clustered(rng, 12, 5) * 0.2 + 0.05
    by_cluster = d.reshape(12, 5).mean(axis=1)
    found = st.tost(d, clusters=names(60, 5), margin=0.3)
    upper = stats.ttest_1samp(by_cluster, 0.3, alternative="less").pvalue
    lower = stats.ttest_1samp(by_cluster, -0.3, alternative="greater").pvalue
    assert found.p == pytest.approx(max(upper, lower))
    interval = stats.ttest_1samp(by_cluster, 0).confidence_interval(0.90)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.equivalent == (found.p < 0.05)


@given(
    hyp.lists(hyp.tuples(finite, hyp.integers(0, 5)), min_size=2, max_size=40),
    hyp.floats(0.01, 500),
)
def test_tost_interval_and_p_value_tell_the_same_story(rows: list[tuple[float, int]], margin: float) -> None:
    values, clusters = [v for v, _ in rows], [str(c) for _, c in rows]
    found = st.tost(values, clusters=clusters, margin=margin)
    assert 0 <= found.p <= 1
    if found.low is None:
        assert not found.equivalent
        return
    if abs(found.p - 0.05) > 1e-6:
        assert found.equivalent == (found.p < 0.05)
    mirrored = st.tost([-v for v in values], clusters=clusters, margin=margin)
    assert mirrored.p == pytest.approx(found.p, abs=1e-9)
    assert mirrored.difference == pytest.approx(-found.difference, abs=1e-9)


def test_tost_size_is_nominal_at_the_edge_of_the_margin() -> None:
    rng = np.random.default_rng(8)
    passed = sum(st.tost(0.5 + clustered(rng, 20, 3), clusters=names(60, 3), margin=0.5).equivalent for _ in range(1000))
    assert passed / 1000 < 0.075  # nominal 0.05
    inside = sum(st.tost(0.05 * clustered(rng, 20, 3), clusters=names(60, 3), margin=0.5).equivalent for _ in range(100))
    assert inside == 100


def test_tost_of_two_samples_is_that_of_their_difference_and_bad_margins_are_refused() -> None:
    a, b = [1.0, 2.0, 3.0], [0.5, 2.5, 3.0]
    pair = st.tost(a, b, clusters=names(3), margin=1.0)
    assert pair == st.tost([0.5, -0.5, 0.0], clusters=names(3), margin=1.0)
    with pytest.raises(InputError, match="positive"):
        st.tost(a, clusters=names(3), margin=0)
    with pytest.raises(InputError, match="equal length"):
        st.tost(a, b[:2], clusters=names(3), margin=1)
    assert not st.tost([math.nan, 1.0], clusters=names(2), margin=1).equivalent
    assert st.tost([0.1, 0.1], clusters=names(2), margin=1).equivalent
    assert not st.tost([1.1, 1.1], clusters=names(2), margin=1).equivalent


@given(hyp.integers(1, 300).flatmap(lambda n: hyp.tuples(hyp.integers(0, n), hyp.just(n))))
def test_wilson_equals_scipy(kn: tuple[int, int]) -> None:
    k, n = kn
    found = st.wilson(k, n)
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_at_zero_is_a_bound_and_nonsense_is_refused() -> None:
    assert st.wilson(0, 40).low == 0
    assert 0.05 < st.wilson(0, 40).high < 0.1
    assert st.wilson(40, 40).high == 1
    for k, n in [(1, 0), (-1, 5), (6, 5)]:
        with pytest.raises(InputError):
            st.wilson(k, n)


def test_seed_interval_and_prediction_band() -> None:
    values = [1.0, 2.0, 4.0]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = st.seed_interval(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.over == "seeds"
    for k, multiplier in [(2, 15.56), (3, 4.97), (5, 3.04), (10, 2.37), (20, 2.14)]:
        sample = np.random.default_rng(k).normal(size=k)
        band = st.prediction_band(sample)
        assert (band.high - band.low) / 2 == pytest.approx(multiplier * sample.std(ddof=1), rel=0.005)
    assert st.seed_interval([1.0]).low is None
    assert st.prediction_band([1.0]).high is None
    assert st.seed_interval([1.0]).number(Direction.REFERENCE).flags


def test_prediction_band_holds_the_next_draw() -> None:
    rng = np.random.default_rng(9)
    draws = rng.normal(size=(2000, 5))
    bands = [st.prediction_band(row[:4]) for row in draws]
    hits = np.mean([b.low <= row[4] <= b.high for b, row in zip(bands, draws, strict=True)])
    assert hits == pytest.approx(0.95, abs=0.02)


def test_harmonic_mean() -> None:
    values = [0.854, 0.772, 0.512, 0.430, 0.820, 0.552, 0.431, 0.831, 0.596]  # a published nine-component model utility
    assert st.harmonic_mean(values) == pytest.approx(stats.hmean(values))
    assert round(st.harmonic_mean(values), 3) == 0.601
    assert st.harmonic_mean([0.5, 0.0, 1.0]) == 0.0
    with pytest.raises(InputError):
        st.harmonic_mean([0.5, -0.1])
    with pytest.raises(InputError):
        st.harmonic_mean([])


def brute_holm(p: list[float]) -> list[float]:
    order = sorted(range(len(p)), key=lambda i: p[i])
    out, running = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p) - rank) * p[i]))
        out[i] = running
    return out


@given(hyp.lists(hyp.floats(0, 1), min_size=1, max_size=12))
def test_holm_equals_its_definition(p: list[float]) -> None:
    assert st.holm(p) == pytest.approx(brute_holm(p))


# --- AUC ---------------------------------------------------------------------------------------------------------------------


def brute_auc(less: list[float], more: list[float]) -> float:
    return float(np.mean([1.0 if x > y else 0.5 if x == y else 0.0 for x, y in itertools.product(less, more)]))


@given(samples, samples)
def test_auc_equals_pair_counting_and_the_area_under_the_curve(holdout: list[float], forget: list[float]) -> None:
    value = st.auc(holdout, forget)
    assert value == pytest.approx(brute_auc(holdout, forget))
    assert st.auc(forget, holdout) == pytest.approx(1 - value)
    fpr, tpr = st.roc(holdout, forget)
    assert np.trapezoid(tpr, fpr) == pytest.approx(value)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(tpr) >= 0).all()


def test_auc_orientation_memorised_forget_scores_are_low() -> None:
    rng = np.random.default_rng(0)
    assert st.auc(rng.normal(1, 1, 3000), rng.normal(0, 1, 3000)) == pytest.approx(0.76, abs=0.02)
    assert math.isnan(st.auc([1.0, math.nan], [0.0]))
    assert st.auc([math.inf], [1.0]) == 1.0


def brute_delong(holdout: np.ndarray, forget: np.ndarray) -> float:
    kernel = (holdout[:, None] > forget[None, :]) + 0.5 * (holdout[:, None] == forget[None, :])
    return float(kernel.mean(1).var(ddof=1) / len(holdout) + kernel.mean(0).var(ddof=1) / len(forget))


def test_delong_equals_its_definition_and_the_known_error_at_one_half() -> None:
    rng = np.random.default_rng(1)
    holdout, forget = rng.normal(0.5, 1, 80).round(1), rng.normal(size=60).round(1)
    found = st.auc_delong(holdout, forget)
    assert found.high - found.value == pytest.approx(1.959964 * math.sqrt(brute_delong(holdout, forget)))
    assert found.value == pytest.approx(brute_auc(list(holdout), list(forget)))
    widths = [(f.high - f.low) / 2 / 1.96 for f in (st.auc_delong(rng.normal(size=100), rng.normal(size=100)) for _ in range(50))]
    assert np.mean(widths) == pytest.approx(math.sqrt(201 / 12 / 100 / 100), rel=0.05)  # .041


def test_delong_covers() -> None:
    rng = np.random.default_rng(2)
    truth = stats.norm.cdf(1 / math.sqrt(2))
    found = [st.auc_delong(rng.normal(1, 1, 60), rng.normal(size=50)) for _ in range(600)]
    assert np.mean([f.low <= truth <= f.high for f in found]) == pytest.approx(0.95, abs=0.03)


def test_clustered_delong_covers_where_the_plain_one_does_not() -> None:
    rng = np.random.default_rng(3)
    plain = clusters = 0
    for _ in range(300):
        holdout, forget = clustered(rng, 20, 10, 0.3), clustered(rng, 20, 10, 0.3)
        groups = (names(200, 10), names(200, 10))
        a, b = st.auc_delong(holdout, forget), st.auc_delong(holdout, forget, clusters=groups)
        plain += a.low <= 0.5 <= a.high
        clusters += b.low <= 0.5 <= b.high
    assert plain / 300 < 0.7
    assert clusters / 300 > 0.89


def test_complete_separation_is_a_bound_not_a_certainty() -> None:
    found = st.auc_delong(np.arange(40) + 100.0, np.arange(50.0))
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025 ** (1 / 40))
    mirrored = st.auc_delong(np.arange(40.0), np.arange(50) + 100.0)
    assert (mirrored.value, mirrored.low) == (0.0, 0.0)
    assert mirrored.high == pytest.approx(1 - 0.025 ** (1 / 40))
    both = st.auc_difference((np.arange(40) + 100.0, np.arange(50.0)), (np.arange(40.0), np.arange(50) + 100.0))
    assert both.value == 1.0
    assert both.low < 1.0


def test_auc_difference_of_correlated_samples() -> None:
    rng = np.random.default_rng(4)
    holdout, forget = rng.normal(size=300), rng.normal(size=300)
    noisy = (holdout + 0.1 * rng.normal(size=300), forget + 0.1 * rng.normal(size=300))
    same = st.auc_difference((holdout, forget), (holdout, forget))
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    paired = st.auc_difference(noisy, (holdout, forget))
    alone = st.auc_delong(holdout, forget)
    assert paired.low <= 0 <= paired.high
    assert paired.high - paired.low < (alone.high - alone.low) / 2
    memorised = st.auc_difference((holdout, forget - 1), (holdout, forget))
    assert memorised.low > 0.15
    with pytest.raises(InputError, match="same examples"):
        st.auc_difference((holdout, forget), (holdout[1:], forget))


# --- Kolmogorov-Smirnov ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (4, 4), (6, 4), (5, 6), (3, 7)])
def test_ks_null_distribution_equals_the_enumeration_of_all_splits(n: int, m: int) -> None:
    values = np.arange(n + m, dtype=float)
    splits = [np.array(c) for c in itertools.combinations(range(n + m), n)]
    distances = np.array([st.ks(values[c], np.delete(values, c)).statistic for c in splits])
    for c in splits[:: max(1, len(splits) // 12)]:
        found = st.ks(values[c], np.delete(values, c))
        assert found.pvalue == pytest.approx(np.mean(distances >= found.statistic - 1e-12), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 30), (200, 150), (7, 300)])
@pytest.mark.parametrize("shift", [0.0, 0.4, 2.0])
def test_ks_equals_scipy_exact(n: int, m: int, shift: float) -> None:
    rng = np.random.default_rng(n + m)
    a, b = rng.normal(size=n), rng.normal(shift, 1, size=m)
    found, expected = st.ks(a, b), stats.ks_2samp(a, b, method="exact")
    assert found.statistic == pytest.approx(expected.statistic)
    assert found.pvalue == pytest.approx(expected.pvalue, rel=1e-8)
    assert found.log10_pvalue == pytest.approx(math.log10(expected.pvalue), abs=1e-7)


@pytest.mark.parametrize(("n", "exponent"), [(40, -22.7), (200, -118.7), (400, -239.0)])
def test_ks_floor_is_two_over_the_binomial(n: int, exponent: float) -> None:
    found = st.ks(np.arange(n), np.arange(n) + 1e6)
    exact = math.log10(2) - math.log10(math.comb(2 * n, n))
    assert found.log10_pvalue == pytest.approx(exact, rel=1e-9)
    assert found.log10_pvalue == pytest.approx(exponent, abs=0.1)


def test_ks_does_not_underflow_for_equal_and_unequal_sizes() -> None:
    rng = np.random.default_rng(0)
    for m in (1000, 900):
        found = st.ks(rng.normal(size=1000), rng.normal(50, 1, size=m))
        total = (math.lgamma(1001 + m) - math.lgamma(1001) - math.lgamma(m + 1)) / math.log(10)
        assert found.pvalue == 0.0
        assert found.log10_pvalue == pytest.approx(math.log10(2) - total, rel=1e-9)
    # Between the extremes: the two exact algorithms agree where both apply, far below the smallest double.
    assert _ks_paths(700, 700, 690) == pytest.approx(_ks_equal(700, 690), rel=1e-9)
    assert _ks_paths(60, 60, 9) == pytest.approx(_ks_equal(60, 9), rel=1e-9)


def test_ks_of_a_sample_with_itself_and_of_broken_samples() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert st.ks(values, values).pvalue == 1.0
    assert math.isnan(st.ks([1.0, math.nan], [1.0]).statistic)
    with pytest.raises(InputError):
        st.ks([], [1.0])


def test_ks_asymptotic_matches_the_exact_one_where_both_are_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=900), rng.normal(0.1, 1, size=700)
    exact = st.ks(a, b)
    monkeypatch.setattr("expunge.core.kolmogorov._EXACT_CELLS", 1)
    found = st.ks(a, b)
    assert (exact.method, found.method) == ("exact", "asymptotic")
    assert found.log10_pvalue == pytest.approx(exact.log10_pvalue, abs=0.02)
    assert math.isfinite(_ks_asymptotic(1e6, 0.9))


def test_ks_critical_values_at_five_percent() -> None:
    for n, critical in [(40, 0.304), (200, 0.136), (300, 0.111), (400, 0.096)]:
        assert math.exp(_ks_equal(n, math.floor(critical * n))) > 0.045
        assert math.exp(_ks_equal(n, math.ceil(critical * n))) < 0.055


# --- into a Number -----------------------------------------------------------------------------------------------------------


def test_an_interval_becomes_a_number_within_its_range() -> None:
    number = st.Interval(0.9, 0.7, 1.1, 0.95, 40, 20).number(Direction.UTILITY_UP, (0, 1), note="n")
    assert (number.low, number.high, number.n, number.clusters, number.note) == (0.7, 1.0, 40, 20, "n")
    assert number.text() == "0.900 [0.700, 1.000]"
