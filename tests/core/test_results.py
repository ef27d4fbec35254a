"""A number is never printed bare when something is wrong with it."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from expunge.core.results import Check, Direction, Judgement, Number, Verdict


def number(value: float | None, **more: object) -> Number:
    return Number(value=value, direction=Direction.UTILITY_UP, range=(0, 1), **more)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_removed_and_flagged(value: float) -> None:
    checked = number(value, low=0.1, high=0.2).checked()
    assert (checked.value, checked.low, checked.high) == (None, None, None)
    assert "not a finite number" in checked.flags[0]
    assert checked.text() == "-"


@pytest.mark.parametrize("value", [1.2, -0.01])
def test_an_impossible_value_is_flagged_wherever_it_is_printed(value: float) -> None:
    checked = number(value).checked()
    assert checked.value == value
    assert "impossible value" in checked.flags[0]
    assert checked.text().endswith("!")
    assert checked.checked() == checked  # once is enough


def test_possible_values_pass_and_rounding_is_no_crime() -> None:
    for value in (0.0, 0.5, 1.0, 1.0 + 1e-12):
        assert number(value).checked() == number(value)
    assert Number(value=1e6, direction=Direction.ZERO).checked().flags == ()
    assert number(None, note="no answers").checked().flags == ()


def test_bounds_that_are_not_finite_are_removed_and_flagged() -> None:
    checked = number(0.5, low=0.1, high=math.inf).checked()
    assert (checked.value, checked.low, checked.high) == (0.5, None, None)
    assert checked.flags


def test_text() -> None:
    assert number(0.8123, low=0.79, high=0.834).text() == "0.812 [0.790, 0.834]"
    assert number(0.8123).text(1) == "0.8"
    assert number(3e-20).text() == "3e-20"  # never shown as zero
    assert Number(value=123456.0, low=-2e5, high=0.0, direction=Direction.ZERO).text() == "1.23e+05 [-2e+05, 0.000]"


def test_numbers_and_judgements_survive_json() -> None:
    held = number(0.5, low=0.4, high=0.6, n=10, clusters=5, flags=("few",))
    assert Number.model_validate_json(held.model_dump_json()) == held
    check = Check(name="nll", outcome="knows more", difference=-0.1)
    judgement = Judgement(verdict=Verdict.NOT_FORGOTTEN, reason="because", checks=(check,), thresholds={"share": 0.2})
    assert Judgement.model_validate_json(judgement.model_dump_json()) == judgement
    with pytest.raises(ValidationError):
        Number(value=1.0, direction=Direction.ZERO, unknown=3)
    with pytest.raises(ValidationError):
        held.value = 2.0
