"""Settings from a file and from the command line become one mapping."""

from __future__ import annotations

from expunge.methods.recipe import build
from expunge.pipeline.config import merge


def test_later_layers_win_and_an_option_that_was_not_given_does_not() -> None:
    file = {"model": "a", "method": "npo", "parts": {"beta": 0.2, "schedule": {"epochs": 3}}}
    line = {"model": None, "method": "simnpo", "parts": {"schedule": {"lr": 1e-4}}}
    assert merge(file, line) == {"model": "a", "method": "simnpo", "parts": {"beta": 0.2, "schedule": {"epochs": 3, "lr": 1e-4}}}
    assert file["parts"] == {"beta": 0.2, "schedule": {"epochs": 3}}


def test_no_value_inside_is_a_value() -> None:
    file = {"parts": {"schedule": {"clip": 0.5}}}
    assert merge(file, {"parts": {"retain": None, "schedule": {"clip": None}}}) == {
        "parts": {"retain": None, "schedule": {"clip": None}}
    }
    recipe = build("npo", merge(file, {"parts": {"retain": None, "schedule": {"clip": None}}})["parts"])
    assert recipe.retain == ()
    assert recipe.schedule.clip is None
