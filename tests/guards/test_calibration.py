"""Thresholds keep what they promise, and are never set on prompts that are judged or learnt from."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from expunge.core.errors import InputError
from expunge.guards import calibration
from expunge.guards.calibration import apart, needed, threshold
from expunge.guards.conversation import Conversation, Message
from expunge.guards.detectors.similar import Similar
from expunge.guards.parts import Material
from expunge.guards.pieces import pieces
from expunge.guards.target import Shown, Target


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 400), st.floats(0.004, 0.6), st.booleans())
def test_of_exchangeable_prompts_no_more_are_noticed_than_promised(seed, n, rate, ties):
    """Over 2,000 fresh draws of calibrating prompts and one further: within binomial bounds of the exact rate."""
    draws = 2000
    rng = np.random.default_rng(seed)
    scores = rng.standard_cauchy((draws, n + 1))
    if ties:
        scores = np.round(scores)
    if n < needed(rate):
        with pytest.raises(InputError, match=str(needed(rate))):
            threshold(scores[0, :-1], rate)
        return
    found = [threshold(row[:-1], rate) for row in scores]
    noticed = sum(t.passed(row[-1]) for t, row in zip(found, scores, strict=True))
    promised = found[0].promised
    assert promised <= rate
    assert promised > rate - 1 / (n + 1) - 1e-12  # and no stricter than it must be
    assert noticed <= binom.ppf(1 - 1e-6, draws, promised)
    if not ties:
        assert noticed >= binom.ppf(1e-6, draws, promised)


@given(st.lists(st.floats(-5, 5).map(lambda x: round(x, 1)), min_size=4, max_size=60), st.floats(-6, 6), st.floats(0.2, 0.9))
def test_p_values_say_the_same_as_thresholds(scores, score, rate):
    found = threshold(scores, rate)
    brute = (1 + sum(s >= score for s in scores)) / (len(scores) + 1)
    assert math.isclose(found.p_value(score), brute)
    assert not found.passed(score) or found.p_value(score) <= rate


def test_the_bound_of_this_very_threshold_holds_for_nineteen_of_twenty():
    rng = np.random.default_rng(3)
    over = [1 - threshold(u := rng.random(199), 0.05).value > threshold(u, 0.05).upper() for _ in range(2000)]
    assert binom.ppf(1e-4, 2000, 0.05) <= sum(over) <= binom.ppf(1 - 1e-4, 2000, 0.05)


def test_how_many_prompts_a_rate_needs():
    assert [needed(r) for r in (0.5, 0.1, 0.05, 0.01, 0.001)] == [1, 9, 19, 99, 999]
    for rate in (0.1, 0.01, 0.3):
        least = needed(rate)
        assert threshold(np.arange(least), rate).value == least - 1
        with pytest.raises(InputError, match=f"at least {least}"):
            threshold(np.arange(least - 1), rate)
    with pytest.raises(InputError, match="no number"):
        threshold([0.1, math.nan], 0.5)
    assert "at most 1.000%" in threshold(np.arange(99), 0.01).summary()
    assert "nothing is promised" in calibration.given(0.5).summary()


def test_prompts_that_calibrate_are_never_judged_or_learnt_from():
    ordinary = [f"How far is it to town {i}?" for i in range(40)]
    material = Material(
        [Target(id="t", topics=("The life of Basil Mahfouz",))], [*ordinary, *[o.upper() for o in ordinary]], key=b"k" * 32
    )
    learnt, calibrating = Similar(rate=0.1).parted(material)
    assert len(learnt) == len(calibrating) == 20  # the same prompt twice is one
    apart(calibrating, learnt)
    assert Similar(rate=0.1).parted(material) == (learnt, calibrating)
    other = Material(material.targets, material.ordinary, key=material.key, seed=1)
    assert Similar(rate=0.1).parted(other)[1] != calibrating
    with pytest.raises(InputError, match="2 of 3"):
        apart(ordinary, ["Who?", "how far is it to town 3", ordinary[7]])
    asked = Target(id="t", examples=(Shown(prompt="how far is it to  Town 3"),))
    with pytest.raises(InputError, match="of targets"):
        Similar(rate=0.1).fit(Material([asked], ordinary, key=b"k" * 32))
    with pytest.raises(InputError, match="at least 198"):
        Similar(rate=0.01).fit(Material(material.targets, ordinary, key=b"k" * 32))


def test_what_is_read_of_a_conversation():
    turns = (
        Message("user", "Hello. Where was he"),
        Message("assistant", "Who?"),
        Message("user", "born? V2hlcmUgd2FzIGhlIGJvcm4/"),
    )
    found = pieces(Conversation(turns))
    assert "Hello. Where was he\nWho?\nborn? V2hlcmUgd2FzIGhlIGJvcm4/" in found
    assert {"Hello.", "Where was he", "Where was he born?", "born?"} <= set(found)
    assert pieces(Conversation.of("Hello. You?"), sentences=False) == ["Hello. You?"]


def test_nothing_of_a_long_turn_is_left_out():
    sentences = [f"This is sentence {i}." for i in range(1000)]
    found = pieces(Conversation.of(" ".join(sentences)))
    assert len(found) <= 257
    assert all(sum(s in p for p in found) == 2 for s in sentences)  # in the whole, and in a part of it


def test_no_group_is_on_both_sides():
    ordinary = [f"Question {i} on {subject}?" for subject in "abcdefgh" for i in range(10)]
    groups = [subject for subject in "abcdefgh" for _ in range(10)]
    learnt, calibrating = Similar(rate=0.1, calibrating=0.4).parted(Material([], ordinary, groups=groups))
    sides = [{t.split()[3] for t in side} for side in (learnt, calibrating)]
    assert not sides[0] & sides[1]
    assert [len(s) for s in sides] == [4, 4]  # 32 prompts are asked for: three groups and a part, so four
    assert len(learnt) == len(calibrating) == 40
    with pytest.raises(InputError, match="2 groups for 80"):
        Similar(rate=0.1).parted(Material([], ordinary, groups=["a", "b"]))
