"""Path dependence: the theorem of linear regression, the spreads, and the experiment at its smallest."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from experiments import paths


def test_ridge_is_the_minimum() -> None:
    rng = np.random.default_rng(1)
    x, y, start = rng.normal(size=(5, 8)), rng.normal(size=5), rng.normal(size=8)

    def value(theta: np.ndarray) -> float:
        return float(np.sum((x @ theta - y) ** 2) + 0.7 * np.sum((theta - start) ** 2))

    found = paths.ridge(x, y, start, 0.7)
    assert all(value(found) < value(found + 1e-3 * rng.normal(size=8)) for _ in range(50))


@pytest.mark.parametrize("seed", range(3))
def test_two_orders_part_at_the_rate_of_the_theorem(seed: int) -> None:
    found = paths.linear_paths(seed=seed)
    assert found.log_distance[-1] - found.log_distance[-2] == pytest.approx(2 * math.log1p(found.largest), rel=1e-3)
    assert found.log_distance[-1] > found.log_distance[0] + 60
    assert (found.log_distance >= found.log_bound).all()
    assert 0 < found.rho <= found.largest


def test_without_steps_or_with_the_same_order_nothing_parts() -> None:
    still = paths.linear_paths(eta=0.0).log_distance
    assert np.allclose(still, still[0], rtol=0, atol=1e-12)
    assert np.isfinite(still[0])
    assert (paths.linear_paths(same=True).log_distance == -np.inf).all()


def test_spread_tells_paths_from_seeds() -> None:
    apart = paths.spread({"a": [1.0, 1.1, 0.9], "b": [3.0, 3.1, 2.9], "c": [5.0, 5.1, 4.9]})
    assert apart.between == pytest.approx(2.0)
    assert apart.within == pytest.approx(0.1)
    assert apart.chance == pytest.approx(0.1 / math.sqrt(3))
    assert apart.p < 0.01
    mixed = paths.spread({"a": [1.0, 3.0, 5.0], "b": [1.1, 3.1, 5.1], "c": [0.9, 2.9, 4.9]})
    assert mixed.p > 0.5
    assert mixed.between == pytest.approx(0.1)


def test_the_experiment_runs_and_its_page_can_be_written(tmp_path) -> None:
    plan = paths.Plan(persons=3, facts=2, seeds=(1, 2), epochs=2, steps=2)
    found = json.loads(json.dumps(paths.experiment(plan, lambda _: None)))
    for method in (paths.LOCAL, paths.WITH_RETAIN):
        rows = found["values"][method]
        assert set(rows) == set(paths.MEASURES)
        assert all(len(v) == 2 and np.isfinite(v).all() for row in rows.values() for v in row.values())
        assert list(rows["known"]) == ["first", "second", "last"]
    # Both methods start from the same targets, and ascent raises the loss.
    assert found["values"][paths.LOCAL]["known"] == found["values"][paths.WITH_RETAIN]["known"]
    assert all(v > 0 for row in found["values"][paths.LOCAL]["forgotten"].values() for v in row)
    (tmp_path / "paths.json").write_text(json.dumps({**found, "plan": {**found["plan"]}}), encoding="utf-8")
    text = paths.page(found)
    assert "| between paths |" in text
    assert text.count("| rise of the loss of the forget answers |") == 2


def test_orders_differ_only_in_the_place_of_the_stage() -> None:
    town = paths.Town.of(paths.Plan(persons=6, facts=2))
    orders = town.orders()
    assert [o.index(town.forget) for o in orders.values()] == [0, 1, 2]
    assert all([s for s in o if s is not town.forget] == list(town.others) for o in orders.values())
    assert not {r.subject for r in town.others[0]} & {r.subject for r in town.others[1]}
