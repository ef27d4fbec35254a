from __future__ import annotations

import math
import zlib as zlib_module

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expunge.audit.attacks.membership import min_k, min_k_plus_plus, reference, zlib
from expunge.audit.gradients import gradient_norms
from expunge.audit.metrics.membership import placements, privleak, tpr_at_fpr
from expunge.core.errors import InputError
from expunge.core.statistics import auc, bootstrap

LOGP = np.log([0.5, 0.01, 0.9, 0.2, 0.05])


def test_min_k_by_sorting():
    assert min_k(LOGP, 0.4) == pytest.approx(-(math.log(0.01) + math.log(0.05)) / 2)
    assert min_k(LOGP, 1.0) == pytest.approx(-LOGP.mean())
    assert min_k(LOGP[:1], 0.4) == pytest.approx(-LOGP[0])  # floor(0.4) = 0 would be a mean of nothing
    for k in (0.0, 1.1):
        with pytest.raises(InputError, match="'k'"):
            min_k(LOGP, k)
    with pytest.raises(InputError, match="without tokens"):
        min_k([], 0.4)


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=30), st.floats(0.01, 1))
def test_min_k_is_the_mean_of_the_lowest(logp, k):
    n = max(1, math.floor(k * len(logp)))
    assert min_k(logp, k) == pytest.approx(-np.mean(sorted(logp)[:n]), abs=1e-9)


def test_min_k_plus_plus_standardises():
    logits = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logp = torch.log_softmax(logits, 1)
    p = logp.exp()
    mean = (p * logp).sum(1)
    std = ((p * logp**2).sum(1) - mean**2).sqrt()
    own = logp[:, 0]
    want = -((own - mean) / std).sort().values[:2].mean()
    assert min_k_plus_plus(own, mean, std, 0.4) == pytest.approx(float(want))
    # A uniform distribution has no spread: such a token says nothing either way.
    assert min_k_plus_plus([-math.log(4)], [-math.log(4)], [0.0]) == 0


def test_zlib_and_reference():
    text = "He was born in Vienna."
    assert zlib(LOGP, text) == pytest.approx(-LOGP.mean() / len(zlib_module.compress(text.encode())))
    assert reference(LOGP, LOGP - 1.0) == pytest.approx(-1.0)  # likelier than under the reference: member-like, so lower


def test_orientation_and_sign_of_privleak():
    rng = np.random.default_rng(0)
    forget, holdout = rng.normal(0, 1, 100), rng.normal(1, 1, 100)  # losses: the forget set is remembered
    area = auc(holdout, forget)
    assert area == pytest.approx(0.76, abs=0.06)
    assert 1 - area == pytest.approx(0.24, abs=0.06)  # in MUSE's orientation
    assert privleak(area, 0.5) < 0  # under-unlearned
    assert privleak(1.0, 0.5) == -100
    assert privleak(0.0, 0.5) == 100  # over-unlearned
    assert privleak(0.3, 0.3) == 0
    # The constants of MUSE: A_ret = 0.4772 on news; its ceiling is 100 (1/A_ret - 1).
    assert privleak(0.0, 1 - 0.4772) == pytest.approx(100 * (1 / 0.4772 - 1))
    with pytest.raises(InputError, match="undefined"):
        privleak(0.5, 1.0)
    with pytest.raises(InputError, match=r"in \[0, 1\]"):
        privleak(1.5, 0.5)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=15), st.lists(st.integers(0, 6), min_size=1, max_size=15))
def test_placements_have_the_auc_as_mean(holdout, forget):
    brute = np.mean([[(h > f) + 0.5 * (h == f) for f in forget] for h in holdout])
    for side in placements(holdout, forget):
        assert side.mean() == pytest.approx(brute)


def test_true_positives_at_one_percent():
    holdout = np.arange(1000.0)
    assert tpr_at_fpr(holdout, [-1.0, 5.0, 9.5, 10.0, 500.0]) == (3, 5)  # the ten lowest non-members may be wrong


class Sides:
    """Scores as the metric holds them."""

    def __init__(self, holdout, forget, groups) -> None:
        self.holdout, self.forget, self.clusters = holdout, forget, groups
        self.holdout_clusters, self.forget_clusters = groups


def test_error_of_privleak_agrees_with_a_paired_cluster_bootstrap():
    from expunge.audit.metrics.membership import privleak_error

    rng = np.random.default_rng(3)
    groups = ([f"h{i // 2}" for i in range(160)], [f"f{i // 2}" for i in range(160)])
    shared = rng.normal(size=(2, 80)).repeat(2, axis=1)
    own = Sides(shared[0] + rng.normal(size=160) + 0.6, shared[1] + rng.normal(size=160), groups)
    ret = Sides(shared[0] + rng.normal(size=160), shared[1] + rng.normal(size=160), groups)
    expected = auc(ret.holdout, ret.forget)
    error = privleak_error(own, [ret], auc(own.holdout, own.forget), expected)

    def statistic(side, a, b):
        out, inside = side == 0, side == 1
        return privleak(auc(a[out], a[inside]), auc(b[out], b[inside]))

    side = np.repeat([0.0, 1.0], 160)
    joint = (side, np.concatenate([own.holdout, own.forget]), np.concatenate([ret.holdout, ret.forget]))
    band = bootstrap(joint, [*groups[0], *groups[1]], statistic, draws=400)
    assert error == pytest.approx((band.high - band.low) / (2 * 1.96), rel=0.2)


def test_gradient_norm_is_the_global_norm_in_evaluation_mode(fresh, sets, tmp_path):
    from expunge.audit.store import ScoreStore

    examples = [fresh.encode(r) for r in sets["forget"][:3]]
    fresh.model.requires_grad_(False)
    fresh.model.train()
    store = ScoreStore(tmp_path)
    norms = gradient_norms(fresh, examples, store=store)
    assert fresh.model.training
    assert not any(p.requires_grad for p in fresh.model.parameters())
    assert all(p.grad is None for p in fresh.model.parameters())
    fresh.model.eval().requires_grad_(True)
    for example, norm in zip(examples, norms, strict=True):
        ids = torch.tensor(example.data.ids[None].astype(np.int64))
        labels = ids.clone()
        labels[:, : example.data.start] = -100
        fresh.model.zero_grad()
        fresh.model(input_ids=ids, labels=labels).loss.backward()
        want = math.sqrt(sum(float(p.grad.double().square().sum()) for p in fresh.model.parameters() if p.grad is not None))
        assert norm == pytest.approx(want, rel=1e-4)
    fresh.model.zero_grad()
    np.testing.assert_array_equal(gradient_norms(fresh, examples, store=store), norms)
