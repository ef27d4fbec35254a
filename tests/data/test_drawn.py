"""Drawn shapes: what is in them, and that they depend on the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from expunge.core.errors import InputError
from expunge.data.sets.drawn import drawn_shapes


def test_shapes_differ_from_each_other_and_stay_in_the_picture() -> None:
    held = drawn_shapes(50, size=12)
    assert held.inputs.shape == (200, 1, 12, 12)
    assert held.inputs.min() == -1
    assert held.inputs.max() == 1
    assert held.classes == ("ring", "square", "cross", "triangle")
    assert np.bincount(held.targets).tolist() == [50] * 4
    edge = np.ones((12, 12), dtype=bool)
    edge[1:-1, 1:-1] = False
    assert held.inputs[:, 0, edge].mean() < -0.9
    flat = held.inputs.reshape(200, -1)
    other = drawn_shapes(20, size=12, seed=1)
    assert LogisticRegression(max_iter=500).fit(flat, held.targets).score(other.inputs.reshape(80, -1), other.targets) > 0.95
    assert len(np.unique(flat, axis=0)) == 200


def test_a_ring_is_hollow_a_cross_has_arms_and_a_triangle_stands_on_its_base() -> None:
    held = drawn_shapes(20, size=17)
    mean = [held.inputs[held.targets == k, 0].mean(0) for k in range(4)]
    ring, square, cross, triangle = mean
    assert ring[8, 8] < -0.9
    assert min(square[8, 8], cross[8, 8], triangle[8, 8]) > 0.9
    assert square[4, 4] > cross[4, 4] + 1
    assert cross[3, 8] > 0.5
    assert triangle[12].sum() > triangle[5].sum() + 5


def test_the_seed_alone_decides() -> None:
    assert np.array_equal(drawn_shapes(3, seed=2).inputs, drawn_shapes(3, seed=2).inputs)
    assert not np.array_equal(drawn_shapes(3, seed=2).inputs, drawn_shapes(3, seed=3).inputs)
    assert drawn_shapes(2, classes=["cross", "ring"]).ids == ("cross-0", "ring-0", "cross-1", "ring-1")
    with pytest.raises(InputError, match="'rings'"):
        drawn_shapes(2, classes=["rings"])
    for given in ({"per_class": 0}, {"per_class": 1, "size": 4}, {"per_class": 1, "classes": []}):
        with pytest.raises(InputError, match="Cannot draw"):
            drawn_shapes(**given)
