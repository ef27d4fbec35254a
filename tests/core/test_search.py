"""Ranges: what is written is what is searched, and what cannot be searched is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expunge.core.errors import InputError
from expunge.core.search import Range, Search

SHARES = st.floats(0, 1, exclude_max=True)


@given(SHARES, st.floats(1e-6, 1e3), st.floats(1.01, 1e4), st.booleans())
def test_values_stay_within_the_range_and_grow_with_the_share(share: float, low: float, times: float, log: bool) -> None:
    made = Range(low, low * times, log=log)
    assert made.low <= made.at(share) <= made.high
    assert made.at(0.0) == pytest.approx(low, rel=1e-5)
    assert made.at(share / 2) <= made.at(share)


def test_logarithm_puts_the_middle_at_the_geometric_mean() -> None:
    assert Range(1e-5, 1e-3, log=True).at(0.5) == pytest.approx(1e-4)
    assert Range(0.0, 1.0).at(0.25) == 0.25


def test_whole_numbers_are_equally_often_drawn_and_choices_too() -> None:
    shares = (np.arange(6000) + 0.5) / 6000
    drawn = [Range(2, 4, whole=True).at(float(u)) for u in shares]
    assert {type(v) for v in drawn} == {int}
    assert [drawn.count(v) for v in (2, 3, 4)] == [2000] * 3
    assert [[Range(choices=("a", None)).at(float(u)) for u in shares].count(c) for c in ("a", None)] == [3000, 3000]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0.05..0.5:log", Range(0.05, 0.5, log=True)),
        ("1e-5..1e-3", Range(1e-5, 1e-3)),
        ("-1..1:linear", Range(-1, 1)),
        ("8|16|none", Range(choices=(8, 16, None))),
    ],
)
def test_parsing(text: str, wanted: Range) -> None:
    assert Range.parse("x", text) == wanted
    assert Range.parse("x", wanted.text()) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.5..0.5", "empty"), ("2..1", "empty"), ("0..1:log", "no logarithm"), ("1..2:sqrt", "neither log nor linear"),
        ("0.1", "no range"),
        ("a..b", "no number"), ("1..inf", "not finite"), ("a|a", "twice"), ("a|", "no range"), ("..", "no number"),
    ],
)  # fmt: skip
def test_what_is_no_range_is_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        Range.parse("schedule.lr", text)
    assert "'schedule.lr'" in str(raised.value)
    assert raised.value.remedy


def test_whole_parameters_refuse_parts_of_a_number() -> None:
    with pytest.raises(InputError, match="whole number"):
        Range.parse("rank", "1.5..8", whole=True)
    assert Range.parse("rank", "2..64:log", whole=True).ends() == (2, 64)


def test_relative_ranges_follow_the_value_at_hand() -> None:
    around = Search(around=10)
    assert around.range(1e-5) == Range(1e-6, 1e-4, log=True)
    assert around.range(1200.0) == Range(120, 12000, log=True)
    assert around.range(None) is None
    assert around.range(0.0) is None
    assert Search(around=3).range(1, whole=True) == Range(1, 3, log=True, whole=True)
    assert math.isclose(Range(1e-6, 1e-4, log=True).at(0.5), 1e-5)
