from __future__ import annotations

import math

import numpy as np
import pytest

from expunge.audit.kernel import arrays
from expunge.core.errors import InputError


def test_shapes_and_values_are_checked():
    assert arrays.vector([1, 2], "scores").dtype == np.float64
    with pytest.raises(InputError, match="scores is empty"):
        arrays.vector([], "scores")
    with pytest.raises(InputError, match=r"must have one axis; got the shape \(2, 1\)"):
        arrays.vector([[1], [2]], "scores")
    with pytest.raises(InputError, match="must have two axes"):
        arrays.matrix([1, 2], "margins")
    np.testing.assert_array_equal(arrays.codes([3.0, -1.0], "groups"), [3, -1])
    for wrong in ([0.5], [math.nan], [math.inf]):
        with pytest.raises(InputError, match="whole numbers"):
            arrays.codes(wrong, "groups")
    np.testing.assert_array_equal(arrays.hits([True, False], "hits"), [True, False])
    for wrong in ([2], [0.5], [math.nan]):
        with pytest.raises(InputError, match="only 0 and 1"):
            arrays.hits(wrong, "hits")


def test_shares_and_lengths_are_checked():
    assert arrays.share(0.5, "accuracy") == 0.5
    assert math.isnan(arrays.share(math.nan, "accuracy"))
    for wrong in (-0.01, 1.01, 90):
        with pytest.raises(InputError, match="Divide percentages by 100"):
            arrays.share(wrong, "accuracy")
    with pytest.raises(InputError, match="labels 2, votes 3"):
        arrays.same_length(labels=[1, 2], votes=[1, 2, 3])
    assert arrays.finite(np.ones(2), np.zeros((2, 2)))
    assert not arrays.finite(np.ones(2), np.array([math.inf]))
