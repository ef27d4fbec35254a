"""Distances to the gold standard, their order, the Pareto front, seeds, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from expunge.audit.document import AuditDocument, ModelEntry, Role
from expunge.core.errors import InputError
from expunge.core.results import Direction, Number
from expunge.report.compare import check_comparable, compare
from expunge.report.drawings import comparison_plot

from . import factory

BASE = factory.document()


def entry(label: str, role: Role, forget: float | None, utility: float | None, **more: Any) -> ModelEntry:
    falling = more.pop("falling", False)
    numbers = {
        "forget.probability": Number(value=forget, direction=Direction.FORGET_DOWN),
        "model-utility": Number(value=utility, direction=Direction.UTILITY_DOWN if falling else Direction.UTILITY_UP),
    }
    return ModelEntry(label=label, role=role, numbers=numbers, **({"fingerprint": label, "method": label} | more))


def audit(*models: ModelEntry, **changes: Any) -> AuditDocument:
    return BASE.model_copy(update={"models": list(models), **changes})


TARGET = entry("target", "target", 0.9, 0.6)
GOLD = entry("gold", "retrained", 0.1, 0.5)


def rows(*models: ModelEntry) -> dict[str, tuple[float | None, bool]]:
    found = compare([audit(TARGET, GOLD, *models)]).rows
    return {r.label: (r.distance.value if r.distance else None, r.pareto) for r in found}


def test_distance_by_hand() -> None:
    found = rows(
        entry("perfect", "unlearned", 0.1, 0.5),
        entry("untouched", "unlearned", 0.9, 0.6),
        entry("half", "unlearned", 0.5, 0.5),
        entry("beyond", "unlearned", -0.1, 0.5),
        entry("broken", "unlearned", 0.1, 0.0),
        entry("mixed", "unlearned", 0.34, 0.3),
    )
    assert found["perfect"][0] == pytest.approx(0)
    assert found["untouched"][0] == pytest.approx(1)  # nothing forgotten; more utility than the gold standard is no fault
    assert found["half"][0] == pytest.approx(0.5)
    assert found["beyond"][0] == pytest.approx(0.25)  # over-unlearning counts
    assert found["broken"][0] == pytest.approx(1)
    assert found["mixed"][0] == pytest.approx(math.hypot(0.3, 0.4))


def test_nearest_first_and_unknown_last() -> None:
    found = rows(entry("c", "unlearned", 0.8, 0.5), entry("b", "unlearned", None, 0.5), entry("a", "unlearned", 0.2, 0.5))
    assert list(found) == ["a", "c", "b"]
    assert found["b"][0] is None


def test_utility_that_falls_is_better() -> None:
    gold = entry("gold", "retrained", 0.1, 2.0, falling=True)
    target = entry("target", "target", 0.9, 2.0, falling=True)
    low = entry("low", "unlearned", 0.1, 1.0, falling=True)
    high = entry("high", "unlearned", 0.1, 3.0, falling=True)
    found = {r.label: r for r in compare([audit(target, gold, low, high)]).rows}
    assert found["low"].distance is not None
    assert found["high"].distance is not None
    assert found["low"].distance.value == pytest.approx(0)
    assert found["high"].distance.value == pytest.approx(0.5)
    assert found["low"].pareto
    assert not found["high"].pareto


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12))
def test_pareto_front_against_its_definition(points: list[tuple[float, float]]) -> None:
    found = rows(*(entry(f"m{i}", "unlearned", f, u) for i, (f, u) in enumerate(points)))
    gaps = [abs(f - 0.1) for f, _ in points]
    for i, (_, u) in enumerate(points):
        better = [j for j, (_, v) in enumerate(points) if gaps[j] <= gaps[i] and v >= u and (gaps[j] < gaps[i] or v > u)]
        assert found[f"m{i}"][1] == (not better)
    assert any(on for _, on in found.values())


def test_seeds_become_one_row_with_a_t_interval() -> None:
    values = [0.18, 0.2, 0.25]
    models = [
        entry(
            f"npo {k}",
            "unlearned",
            v,
            0.5,
            method="npo",
            fingerprint=f"npo{k}",
            seed=k,
            settings={"beta": 0.1, "run": {"seed": k}},
        )
        for k, v in enumerate(values)
    ]
    (row,) = compare([audit(TARGET, GOLD, *models)]).rows
    assert (row.label, row.seeds) == ("npo", 3)
    assert row.forget is not None
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (row.forget.low, row.forget.high) == (pytest.approx(low), pytest.approx(high))
    assert row.forget.over == "seeds"
    assert row.distance is not None
    assert row.distance.value == pytest.approx(np.mean([(v - 0.1) / 0.8 for v in values]))


def test_other_settings_are_other_rows_and_say_how_they_differ() -> None:
    models = [
        entry(f"npo-{b}", "unlearned", 0.2, 0.5, method="npo", settings={"recipe": {"beta": b}, "batch": 8}) for b in (0.1, 0.5)
    ]
    assert {r.label for r in compare([audit(TARGET, GOLD, *models)]).rows} == {"npo (recipe.beta=0.1)", "npo (recipe.beta=0.5)"}


def test_the_same_model_in_two_audits_is_no_second_seed() -> None:
    model = entry("npo", "unlearned", 0.2, 0.5)
    found = compare([audit(TARGET, GOLD, model), audit(TARGET, GOLD, model, title="again")])
    assert [r.seeds for r in found.rows] == [1]
    assert found.gold is not None
    assert found.gold.seeds == 1


def test_single_runs_are_called_so() -> None:
    model = entry("npo", "unlearned", 0.2, 0.5)
    assert any(n.startswith("Single runs") for n in compare([audit(TARGET, GOLD, model)]).notes)
    many = [entry(f"npo {k}", "unlearned", 0.2, 0.5, method="npo", fingerprint=str(k)) for k in range(5)]
    assert not any("runs" in n for n in compare([audit(TARGET, GOLD, *many)]).notes)


def test_without_gold_or_target_there_is_no_distance_and_the_reason_is_told() -> None:
    model = entry("npo", "unlearned", 0.2, 0.5)
    for models, told in (((TARGET, model), "No retrained model"), ((GOLD, model), "No target model")):
        found = compare([audit(*models)])
        assert found.rows[0].distance is None
        assert any(told in n for n in found.notes)
    same = entry("target", "target", 0.1, 0.6)
    assert any("agree" in n for n in compare([audit(same, GOLD, model)]).notes)


def test_axes_can_be_chosen_and_a_wrong_name_gets_the_nearest() -> None:
    found = compare([factory.full()], forget="forget.loss", utility="retain.probability")
    assert (found.forget_key, found.utility_key) == ("forget.loss", "retain.probability")
    with pytest.raises(InputError, match=r"forget\.probability"):
        compare([factory.full()], forget="forget.probabilty")


def test_other_data_or_signature_is_refused_with_the_remedy() -> None:
    one = audit(TARGET, GOLD)
    other = audit(TARGET, GOLD, title="other", data={**one.data, "retain": {"digest": "f" * 64}})
    with pytest.raises(InputError, match="different retain data") as error:
        compare([one, other])
    assert "expunge audit" in error.value.remedy
    changed = audit(TARGET, GOLD, signature={**one.signature, "torch": "2.99"})
    with pytest.raises(InputError, match=r"torch 2\.13\.0 against 2\.99"):
        compare([one, changed])
    missing = audit(TARGET, GOLD, data={"forget": one.data["forget"]})
    with pytest.raises(InputError, match="different holdout data"):
        compare([one, missing])
    nameless = [audit(TARGET, GOLD, data={"forget": {"records": 3}}) for _ in range(2)]
    with pytest.raises(InputError, match="digest none"):
        compare(nameless)
    with pytest.raises(InputError, match="one modality"):
        compare([one, audit(TARGET, GOLD, modality="image")])
    with pytest.raises(InputError, match="no audit"):
        compare([])
    check_comparable([one, audit(TARGET, GOLD, title="another day", created="2027-01-01T00:00:00Z")])


def test_another_protocol_is_a_note() -> None:
    one, two = audit(TARGET, GOLD), audit(TARGET, GOLD, protocol={"relearn": {"steps": 9}})
    assert any("differ in bootstrap, metrics, relearn" in n for n in compare([one, two]).notes)


def test_guards_are_told_from_methods_that_change_weights() -> None:
    guard = entry("filter", "unlearned", 0.1, 0.5, method="filter", guarded=True)
    npo = entry("npo", "unlearned", 0.3, 0.45)
    found = compare([audit(TARGET, GOLD, guard, npo)])
    assert {row.label: row.guard for row in found.rows} == {"filter": True, "npo": False}
    note = next(n for n in found.notes if "Guards" in n)
    assert "filter" in note
    assert "npo" not in note
    drawn = comparison_plot(found, audit(guard), "compare")
    assert drawn is not None
    assert "Hollow" in drawn.caption
    without = compare([audit(TARGET, GOLD, guard.model_copy(update={"guarded": False}), npo)])
    plain = comparison_plot(without, audit(guard), "compare")
    assert plain is not None
    assert "Hollow" not in plain.caption
    assert not any("Guards" in n for n in without.notes)
    # Marks with a white face are those of guards alone.
    assert drawn.svg.count("fill: #ffffff; stroke: #c8501e") > plain.svg.count("fill: #ffffff; stroke: #c8501e")


def test_no_number_for_an_axis_is_an_error() -> None:
    with pytest.raises(InputError, match="forget number"):
        compare([audit(ModelEntry(label="a", role="target", fingerprint="a"))])
