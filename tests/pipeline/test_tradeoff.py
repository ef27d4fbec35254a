"""Distances, the front and the rules, against closed forms and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expunge.core.errors import InputError
from expunge.pipeline.tradeoff import Place, Reference, choose, front, place, score
from expunge.pipeline.validation import Measured

PLACES = st.lists(
    st.one_of(st.none(), st.builds(lambda d, u: Place(d / 4, d / 4, d / 4, u / 4), st.integers(0, 8), st.integers(0, 4))),
    min_size=1, max_size=12,
)  # fmt: skip


def reference(target: list[float], unseen: list[list[float]], *, retrained: bool = True) -> Reference:
    return Reference(np.array(target), np.array(unseen), retrained, {"retain": 0.8}, tuple(map(str, range(len(target)))))


def test_target_is_at_one_unseen_at_zero_and_what_is_beyond_counts_too() -> None:
    held = reference([0.0, 0.0, 0.0, 0.0], [[2.0, 2.0, 2.0, 2.0]])
    for losses, wanted in ((0.0, 1.0), (2.0, 0.0), (1.0, 0.5), (5.0, 1.5)):
        found = place(Measured((losses,) * 4, {"retain": 0.8}), held)
        assert found.distance == pytest.approx(wanted)
        assert found.low <= found.distance <= found.high


def test_a_mean_that_hides_what_is_known_by_heart_does_not_pass() -> None:
    held = reference([0.0] * 4, [[2.0] * 4])
    assert place(Measured((0.0, 0.0, 4.0, 4.0), {"retain": 0.8}), held).distance == pytest.approx(1.0)


def test_lost_usefulness_is_that_of_the_worst_set_and_gains_do_not_count() -> None:
    held = Reference(np.zeros(3), np.ones((1, 3)), True, {"retain": 0.8, "unseen": 0.5}, ("a", "b", "c"))
    assert place(Measured((1.0,) * 3, {"retain": 0.9, "unseen": 0.4}), held).lost == pytest.approx(0.2)
    assert place(Measured((1.0,) * 3, {"retain": 0.9, "unseen": 0.6}), held).lost == 0.0


def test_interval_is_over_subjects_not_records() -> None:
    """Ten copies of the records of three subjects say no more than three subjects do."""
    rng = np.random.default_rng(0)
    losses = rng.normal(1.0, 0.4, 6)
    few = Reference(np.zeros(6), np.full((1, 6), 2.0), True, {}, tuple("aabbcc"))
    many = Reference(np.zeros(60), np.full((1, 60), 2.0), True, {}, tuple("aabbcc" * 10))
    one, ten = place(Measured(tuple(losses), {}), few), place(Measured(tuple(losses) * 10, {}), many)
    assert one.high - one.low == pytest.approx(ten.high - ten.low, rel=1e-9)
    assert one.high > one.low


def test_nothing_to_forget_is_said_before_any_trial() -> None:
    with pytest.raises(InputError, match="nothing there could be forgotten"):
        reference([1.0, 2.0], [[2.0, 1.0]]).check()
    reference([0.0, 0.1], [[2.0, 1.0]]).check()


@given(PLACES)
def test_front_by_brute_force(held: list[Place | None]) -> None:
    for mark, at in zip(front(held), held, strict=True):
        beaten = at is None or any(
            p is not None and p.distance <= at.distance and p.lost <= at.lost and (p.distance < at.distance or p.lost < at.lost)
            for p in held
        )
        assert mark is not beaten


@given(PLACES, st.sampled_from([0.0, 0.25, 0.5]))
def test_nearest_is_the_smallest_distance_within_the_bound(held: list[Place | None], bound: float) -> None:
    found = choose(held, "nearest", bound)
    allowed = [i for i, p in enumerate(held) if p is not None and p.lost <= bound]
    if not allowed:
        assert found is None
        return
    at = held[found]
    assert at is not None
    assert at.lost <= bound
    assert at.distance == min(held[i].distance for i in allowed)
    assert front([held[i] for i in allowed])[allowed.index(found)]
    assert found == min(i for i in allowed if (held[i].distance, held[i].lost) == (at.distance, at.lost))


@given(PLACES, st.sampled_from(["nearest", "balanced"]), st.sampled_from([0.0, 0.25]))
def test_what_the_sampler_minimises_is_what_the_rule_chooses(held: list[Place | None], rule, bound: float) -> None:
    found = choose(held, rule, bound)
    if found is not None:
        assert score(held[found], rule, bound) == min(score(p, rule, bound) for p in held)
