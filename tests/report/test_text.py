"""How numbers are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expunge.core.results import Check, Direction, Judgement, Number, Verdict
from expunge.report import text, view
from expunge.report.strips import margin_strip
from expunge.report.weakest import weakest


def number(value: float | None, low: float | None = None, high: float | None = None) -> Number:
    return Number(value=value, low=low, high=high, direction=Direction.REFERENCE)


@pytest.mark.parametrize(
    ("given_number", "value", "interval"),
    [
        (number(0.8123, 0.7904, 0.8342), "0.812", "[0.790, 0.834]"),
        (number(-98.04, -112.3, -84.1), "-98", "[-112, -84]"),
        (number(3.0512, 2.93, 3.17), "3.05", "[2.93, 3.17]"),
        (number(1.2e-27), "1.2e-27", ""),
        (number(0.0), "0.000", ""),
        (number(1e-9, 0.0, 0.035), "0.000", "[0.000, 0.035]"),
        (number(-0.0001, -0.02, 0.02), "0.000", "[-0.020, 0.020]"),
        (number(0.0004, 0.0003, 0.0005), "0.00040", "[0.00030, 0.00050]"),
        (number(1234567.0), "1.2e+06", ""),
        (number(None), text.DASH, ""),
    ],
)
def test_two_significant_digits_of_the_interval(given_number: Number, value: str, interval: str) -> None:
    assert text.value_text(given_number, minus="-") == value
    assert text.interval_text(given_number, minus="-") == interval


@given(st.floats(-1e4, 1e4), st.floats(1e-4, 1e3))
def test_what_is_written_is_within_a_tenth_of_the_interval_or_the_third_decimal(value: float, half: float) -> None:
    made = number(value, value - half, value + half)
    assert abs(float(text.value_text(made, minus="-")) - value) <= 0.1 * half + 5.001e-4


def test_durations_amounts_and_moments() -> None:
    assert [text.duration(s) for s in (0.84, 42, 59.7, 192, 7500)] == ["0.8 s", "42 s", "1 min 00 s", "3 min 12 s", "2 h 05 min"]
    assert text.amount("peak_bytes", 2**30) == "1.0 GiB"
    assert text.amount("tokens", 182400) == "182,400"
    assert text.moment("2026-11-20T09:30:12.5+00:00") == "2026-11-20 09:30 UTC"
    assert text.moment("yesterday") == "yesterday"


def test_words_shared_with_the_true_answer() -> None:
    gold = "Marla Quint was born in Tessaly and sold maps."
    prompt = "Where was Marla Quint born?"
    assert view.shared("Marla Quint is a sailor.", gold, prompt) == (("Marla Quint is a sailor.", False),)
    assert view.shared("Born in Tessaly, I think.", gold, prompt)[0] == ("Born in Tessaly,", True)
    assert "".join(p for p, _ in view.shared("  a\n b  c", gold, prompt)) == "  a\n b  c"
    assert view.shared("", gold) == ()
    assert view.shared("Perhaps born in Tessaly or so.", gold, prompt) == (
        ("Perhaps ", False),
        ("born in Tessaly", True),
        (" or so.", False),
    )


def test_weakest_link_is_the_failed_then_the_tightest() -> None:
    easy = Check(name="easy", outcome="equivalent", difference=0.0, low=-0.01, high=0.01, margin=0.1)
    tight = Check(name="tight", outcome="equivalent", difference=0.05, low=0.0, high=0.09, margin=0.1)
    thin = Check(name="thin", outcome="undecided", difference=0.0, low=-0.2, high=0.2, margin=0.1)
    bad = Check(name="bad", outcome="worse", difference=-0.2, low=-0.21, high=-0.19, margin=0.1)
    skipped = Check(name="skipped", outcome="not run")

    gain = Check(name="gain", outcome="equivalent", difference=0.3, low=0.2, high=0.4, margin=0.1)

    def found(*checks: Check, reason: str = "") -> str | None:
        link = weakest(Judgement(verdict=Verdict.UNDECIDED, reason=reason, checks=checks))
        return link.name if link else None

    assert found(easy, tight, skipped) == "tight"
    assert found(easy, thin, tight) == "thin"
    assert found(thin, bad, easy) == "bad"
    assert found(gain, tight) == "tight"  # past its margin on the side that is no fault
    named = easy.model_copy(update={"text": "This is easy."})
    assert found(bad, named, reason="Look: This is easy.") == "easy"
    assert found() is None


def test_strip_shows_the_outcome() -> None:
    inside = margin_strip(Check(name="a", outcome="equivalent", difference=0.01, low=-0.02, high=0.04, margin=0.05))
    outside = margin_strip(Check(name="a", outcome="undecided", difference=0.01, low=-0.02, high=0.06, margin=0.05))
    assert "equivalent: difference +0.010" in inside
    assert "margin 0.05" in inside
    assert 'class="dot in"' in inside
    assert "undecided: difference" in outside
    assert 'class="dot out"' in outside
    assert margin_strip(Check(name="a", outcome="not run")) == ""
