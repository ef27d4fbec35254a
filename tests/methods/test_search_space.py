"""What is searched of a method follows from its parts; every value that may be drawn is one that the method takes."""

from __future__ import annotations

from typing import Any

import pytest

from expunge.core.errors import InputError
from expunge.methods.catalogue import known
from expunge.methods.edits.registry import EDITS
from expunge.methods.prepared.registry import PREPARED
from expunge.methods.recipe import build
from expunge.methods.search import space, with_values

NAMES = [n for n in known() if n not in PREPARED]
OWN_RANGE = [n for n in NAMES if n not in EDITS]


def made(name: str, parts: dict[str, Any]) -> dict[str, Any]:
    return EDITS.get(name)(**parts).spec() if name in EDITS else build(name, parts).spec()


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_every_declared_range_is_taken_and_only_it_is_changed(name: str) -> None:
    found = space(name, {}, {})
    own = made(name, {})
    assert made(name, with_values({}, {d.path: d.default for d in found if d.default is not None})) == own
    for d in found:
        for share in (0.0, 0.5, 0.9999):
            value = d.range.at(share)
            changed = made(name, with_values({}, {d.path: value}))
            assert value == d.default or changed != own, d
            assert made(name, with_values({}, {d.path: d.default})) == own


@pytest.mark.parametrize("name", OWN_RANGE)
def test_the_own_setting_lies_within_what_is_searched(name: str) -> None:
    """A search that cannot find the published value again would be a search somewhere else."""
    for parts in ({}, {"schedule": "paper"}):
        for d in space(name, parts, {}):
            assert d.range.holds(d.default), d


def test_spaces_follow_from_the_parts() -> None:
    def paths(name: str, parts: dict[str, Any], **given: str) -> dict[str, str]:
        return {d.path: d.range.text() for d in space(name, parts, given)}

    assert list(paths("npo", {})) == ["forget.beta", "retain.weight", "schedule.utility_bound"]
    assert "schedule.lr" in paths("npo", {"schedule": "paper"})
    assert paths("npo", {"schedule": {"name": "fixed", "lr": 2e-4}}).keys().isdisjoint({"schedule.lr"})  # given: not searched
    assert "schedule.epochs" in paths("npo", {"schedule": "fixed"})
    assert "schedule.epochs" not in paths("npo", {"schedule": {"name": "fixed", "steps": 40}})  # steps decide
    assert "forget.beta" not in paths("npo", {"beta": 0.2})
    assert "forget.beta" not in paths("npo", {"forget": {"beta": 0.2}})
    assert {"retain.kl.weight", "retain.nll.weight"} <= set(paths("npo", {"retain": ["kl", "nll"]}))
    assert "parameters.density" in paths("salun", {})
    assert paths("ssd", {})["alpha"] == "1..100:log"
    assert paths("npo", {}, beta="0.05..0.5:log")["forget.beta"] == "0.05..0.5:log"


def test_of_the_weights_only_ratios_are_searched() -> None:
    assert "forget.weight" not in {d.path for d in space("npo", {}, {})}
    assert not any("weight" in d.path for d in space("gradascent", {}, {}))
    weights = [d.path for d in space("laf", {}, {}) if d.path.endswith("weight")]
    assert len(weights) == sum(len(made("laf", {})[side]) for side in ("forget", "retain")) - 1


def test_only_given_ranges() -> None:
    assert [d.path for d in space("npo", {}, {"schedule.batch": "4|8"}, declared=False)] == ["schedule.batch"]


@pytest.mark.parametrize(
    ("name", "parts", "given", "said"),
    [
        ("npo", {}, {"bteta": "1..2"}, "Did you mean 'beta'"),
        ("npo", {}, {"weight": "1..2"}, "forget.weight or retain.weight"),
        ("npo", {}, {"beta": "-1..2"}, r"must be a float in \(0, inf\); got -1.0"),
        ("npo", {"beta": 0.2}, {"beta": "0.1..1"}, "given and searched"),
        ("npo", {"schedule": {"lr": 1e-3}}, {"schedule.lr": "1e-4..1e-3"}, "given and searched"),
        ("ssd", {}, {"beta": "1..2"}, "no ssd parameter 'beta'"),
        ("ssd", {"alpha": 3, "dampening": 1}, {}, "nothing to search"),
        ("salun", {}, {"density": "0.5..2"}, "density"),
    ],
)
def test_what_cannot_be_searched_is_refused(name: str, parts: dict[str, Any], given: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        space(name, parts, given)


def test_values_are_put_into_parts_of_every_form() -> None:
    assert with_values({"retain": "kl"}, {"retain.weight": 2.0}) == {"retain": {"name": "kl", "weight": 2.0}}
    assert with_values({"retain": ["kl", {"name": "nll", "weight": 3}]}, {"retain.nll.weight": 2.0}) == {
        "retain": [{"name": "kl"}, {"name": "nll", "weight": 2.0}]
    }
    given = {"schedule": "paper"}
    assert with_values(given, {"schedule.lr": 1e-4}) == {"schedule": {"name": "paper", "lr": 1e-4}}
    assert given == {"schedule": "paper"}
    assert build("npo", with_values({"schedule": "paper"}, {"schedule.lr": 1e-4})).schedule.lr == 1e-4
