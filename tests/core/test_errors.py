"""Messages for people: near names, remedies, exit codes."""

from __future__ import annotations

import pytest

from expunge.core.errors import Destroyed, ExpungeError, InputError, MissingExtra, nearest, unknown


def test_message_and_remedy_are_joined_and_kept_apart() -> None:
    error = InputError("It is empty.", "Fill it.")
    assert str(error) == "It is empty. Fill it."
    assert (error.message, error.remedy) == ("It is empty.", "Fill it.")
    assert str(InputError("Alone.")) == "Alone."


def test_exit_codes_are_those_documented() -> None:
    assert [e.exit_code for e in (ExpungeError, InputError, MissingExtra, Destroyed)] == [1, 2, 2, 4]
    assert issubclass(MissingExtra, InputError)


def test_a_missing_extra_gives_the_command() -> None:
    assert "pip install 'expunge[llm]'" in str(MissingExtra("LoRA", "llm"))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("simnpoo", "simnpo"), ("grad-asent", "grad-ascent"), ("grad_ascent", "grad-ascent"), ("ascent", "grad-ascent")],
)
def test_nearest_finds_typos_and_parts_of_names(typed: str, meant: str) -> None:
    assert nearest(typed, ["npo", "simnpo", "grad-ascent", "rmu"])[0] == meant


def test_nearest_gives_nothing_rather_than_nonsense() -> None:
    assert nearest("zzzz", ["npo", "rmu"]) == []
    assert nearest("", ["npo"]) == []


def test_unknown_lists_all_when_few_some_when_many_and_near_ones_when_there_are() -> None:
    assert str(unknown("method", "zzzz", ["rmu", "npo"])) == "There is no method 'zzzz'. Known: npo, rmu."
    assert "Did you mean 'npo'?" in str(unknown("method", "np0", ["rmu", "npo"]))
    many = str(unknown("method", "zzzz", [f"name{i:02}" for i in range(40)]))
    assert "There are 40 to choose from, such as name00" in many
    assert "There are no methods here." in str(unknown("method", "zzzz", []))
