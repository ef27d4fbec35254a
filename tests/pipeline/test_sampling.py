"""What trial i runs depends on the seed, the method, i and earlier rounds; not on order, workers or interruptions."""

from __future__ import annotations

import math
from typing import Any

import pytest

from expunge.core.search import Range
from expunge.methods.search import Dimension
from expunge.pipeline.sampling import rounds, values_of

SPACE = (
    Dimension("schedule.lr", Range(1e-5, 1e-1, log=True), 1e-5),
    Dimension("forget.beta", Range(0.0, 1.0), 0.1),
    Dimension("schedule.batch", Range(1, 9, whole=True), 8),
    Dimension("form", Range(choices=("paper", "official")), "paper"),
)


def draw(sampler: Any, index: int, seed: int = 0, method: str = "npo", earlier: Any = ()) -> dict[str, Any]:
    return values_of(sampler, method, SPACE, index=index, seed=seed, earlier=earlier)


def lost(values: dict[str, Any]) -> float:
    """A bowl with its bottom far from the own setting."""
    at = {d.path: values.get(d.path, d.default) for d in SPACE}
    return (math.log10(at["schedule.lr"]) + 2) ** 2 + (at["forget.beta"] - 0.8) ** 2 + 0.1 * (at["schedule.batch"] - 2) ** 2


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_the_first_trial_is_the_own_setting_and_all_are_within_the_ranges(sampler: str) -> None:
    if sampler == "tpe":
        pytest.importorskip("optuna")
    earlier = [({}, 3.0), *((draw("random", i), float(i)) for i in range(1, 6))]
    assert draw(sampler, 0) == {}
    for index in range(1, 30):
        values = draw(sampler, index, earlier=earlier)
        assert list(values) == [d.path for d in SPACE]
        assert all(d.range.holds(values[d.path]) for d in SPACE), values
        assert values == draw(sampler, index, earlier=earlier)  # again, whatever was drawn in between


def test_seeds_indices_and_methods_draw_differently() -> None:
    drawn = [str(draw("random", i, s, m)) for i in (1, 2) for s in (0, 1) for m in ("npo", "simnpo")]
    assert len(set(drawn)) == len(drawn)


def test_random_covers_the_range_evenly_on_its_scale() -> None:
    shares = [(math.log10(draw("random", i)["schedule.lr"]) + 5) / 4 for i in range(1, 401)]
    assert abs(sum(shares) / len(shares) - 0.5) < 0.05
    assert min(shares) < 0.02
    assert max(shares) > 0.98


@pytest.mark.parametrize(("sampler", "trials", "at_once"), [("random", 7, 5), ("tpe", 3, 5), ("tpe", 20, 4), ("tpe", 21, 8)])
def test_rounds_cover_every_trial_once_in_order(sampler: Any, trials: int, at_once: int) -> None:
    found = list(rounds(sampler, trials, at_once))
    assert [i for first, last in found for i in range(first, last)] == list(range(trials))
    assert sampler == "tpe" or len(found) == 1
    assert all(last - first <= max(5, at_once) for first, last in found) or sampler == "random"


def test_tpe_finds_the_bottom_of_a_bowl_sooner_than_chance() -> None:
    pytest.importorskip("optuna")

    def best(sampler: Any, seed: int) -> float:
        held: list[tuple[dict[str, Any], float]] = []
        for first, last in rounds(sampler, 40, 5):
            made = [draw(sampler, i, seed, earlier=held) for i in range(first, last)]
            held += [(v, lost(v)) for v in made]
        return min(s for _, s in held)

    seeds = range(8)
    wins = sum(best("tpe", s) < best("random", s) for s in seeds)
    assert wins >= 6, wins


def test_own_values_without_a_number_are_no_obstacle_to_tpe() -> None:
    pytest.importorskip("optuna")
    space = (Dimension("schedule.lr", Range(1e-5, 1e-1, log=True), None),)
    earlier = [({}, 1.0), ({"schedule.lr": 1e-3}, 0.5), ({"schedule.lr": 1e-2}, 0.7)]
    assert space[0].range.holds(values_of("tpe", "npo", space, index=5, seed=0, earlier=earlier)["schedule.lr"])
