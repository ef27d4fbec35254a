from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from expunge.audit.kernel.quantities import errors, probabilities, quantities
from expunge.core.errors import InputError

LOGITS = arrays(np.float64, (3, 7, 4), elements=st.floats(-30, 30))
FIELDS = ("loss", "margin", "confidence", "entropy", "modified_entropy")


@settings(deadline=None)
@given(LOGITS, arrays(np.int64, 7, elements=st.integers(0, 3)))
def test_quantities_equal_their_definitions(logits, labels):
    found = quantities(logits, labels)
    logp = torch.log_softmax(torch.tensor(logits), dim=-1).numpy()
    p = np.exp(logp)
    for m in range(3):
        for i, y in enumerate(labels):
            others = [c for c in range(4) if c != y]
            rest = {c: sum(p[m, i, d] for d in range(4) if d != c) for c in range(4)}  # 1 - p without cancellation
            modified = -rest[y] * logp[m, i, y] - sum(p[m, i, c] * math.log(rest[c]) for c in others)
            assert found.loss[m, i] == pytest.approx(-logp[m, i, y], rel=1e-9, abs=1e-12)
            assert found.margin[m, i] == pytest.approx(logp[m, i, y] - math.log(rest[y]), rel=1e-9, abs=1e-9)
            assert found.confidence[m, i] == pytest.approx(p[m, i, y], rel=1e-9)
            assert found.entropy[m, i] == pytest.approx(-(p[m, i] * logp[m, i]).sum(), rel=1e-9, abs=1e-12)
            assert found.modified_entropy[m, i] == pytest.approx(modified, rel=1e-8, abs=1e-12)
            assert found.hit[m, i] == (found.predicted[m, i] == y)
    assert (found.predicted == logits.argmax(axis=-1)).all()


def test_no_digit_is_lost_where_probabilities_saturate():
    logits = np.array([[0.0, 800.0, 0.0], [0.0, 60.0, 0.0], [700.0, -700.0, 0.0]])
    found = quantities(logits, [1, 1, 1])
    assert found.margin[0] == pytest.approx(800 - math.log(2))
    assert found.margin[1] == pytest.approx(60 - math.log(2))
    assert found.loss[1] == pytest.approx(2 * math.exp(-60), rel=1e-12)  # 1 - p_y rounds to 0 here
    assert found.margin[2] == pytest.approx(-1400)
    assert found.loss[2] == pytest.approx(1400)
    # Sure and wrong: log(1 - p) of the class that is believed must not be log(0).
    assert found.modified_entropy[2] == pytest.approx(1400 + 700)
    assert found.modified_entropy[1] < 1e-20
    assert found.entropy[2] == pytest.approx(0, abs=1e-12)


def test_modified_entropy_by_hand():
    p = [Fraction(1, 2), Fraction(1, 4), Fraction(1, 4)]
    found = quantities(np.log([[float(v) for v in p]] * 2), [0, 1]).modified_entropy
    assert found[0] == pytest.approx(0.5 * math.log(2) + 2 * 0.25 * math.log(4 / 3))
    assert found[1] == pytest.approx(0.75 * math.log(4) + 0.5 * math.log(2) + 0.25 * math.log(4 / 3))
    # Uniform guesses have the highest entropy; being surely wrong costs more than not knowing, which the plain entropy cannot
    # see.
    sure_right, unknown, sure_wrong = quantities([[5.0, 0, 0], [0, 0, 0], [0, 5.0, 0]], [0, 0, 0]).modified_entropy
    assert sure_right < unknown < sure_wrong


def test_tensors_of_any_type_and_blocks_give_the_same(monkeypatch):
    logits = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(9) % 5
    whole = quantities(logits, labels)
    monkeypatch.setattr("expunge.audit.kernel.quantities._BLOCK", 10)
    blocked = quantities(logits.double().numpy(), labels.numpy())
    for field in (*FIELDS, "predicted", "hit"):
        np.testing.assert_array_equal(getattr(whole, field), getattr(blocked, field))
    rough = quantities(logits.bfloat16().requires_grad_(), labels)
    assert rough.loss.dtype == np.float64
    np.testing.assert_allclose(rough.loss, whole.loss, atol=0.05)
    np.testing.assert_allclose(probabilities(logits).sum(axis=-1), 1)


def test_broken_logits_are_nan_and_a_mask_is_not():
    found = quantities(
        [[0.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf], [-math.inf, 1.0], [-math.inf, 1.0]], [1, 0, 0, 1, 0]
    )
    for field in FIELDS:
        assert np.isnan(getattr(found, field)[:3]).all()
    assert not found.hit[:3].any()
    assert (found.predicted[:3] == -1).all()
    assert (found.loss[3], found.margin[3], found.confidence[3], found.entropy[3], found.modified_entropy[3]) == (
        0,
        math.inf,
        1,
        0,
        0,
    )
    assert (found.loss[4], found.margin[4], found.confidence[4], found.modified_entropy[4]) == (math.inf, -math.inf, 0, math.inf)


def test_bad_input_is_named():
    with pytest.raises(InputError, match="two classes"):
        quantities([[1.0]], [0])
    with pytest.raises(InputError, match="from 0 to 1; got 2"):
        quantities([[1.0, 2.0]], [2])
    with pytest.raises(InputError, match="do not match labels"):
        quantities(np.zeros((3, 2)), [0, 1])
    with pytest.raises(InputError, match="no empty axis"):
        quantities(np.zeros((0, 2)), [])


def test_errors_of_regression_do_not_broadcast():
    found = errors(np.array([[1.0, 2.0], [0.0, 5.0]]), [2.0, 1.0])
    np.testing.assert_array_equal(found.error, [[-1, 1], [-2, 4]])
    np.testing.assert_array_equal(found.absolute_error, [[1, 1], [2, 4]])
    with pytest.raises(InputError, match="do not match targets"):
        errors(np.zeros((2, 1)), np.zeros(2))
    with pytest.raises(InputError, match="do not match targets"):
        errors(np.zeros(2), np.zeros((2, 1)))
