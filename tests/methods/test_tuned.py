"""Settings that are shipped: every entry fits its method, errors name what there is, and a user's own values win."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expunge.adapters.language import LanguageAdapter
from expunge.core.errors import InputError
from expunge.core.settings import nest
from expunge.methods.catalogue import known, serves
from expunge.methods.edits.registry import EDITS
from expunge.methods.recipe import build
from expunge.methods.search import with_values
from expunge.methods.tuned import beneath, chosen, folder, names, shipped
from expunge.pipeline.config import UnlearnConfig
from expunge.pipeline.tuned import USED, check_tuned, read_used

REQUEST = {"model": "target", "forget": "forget.jsonl", "retain": "rest.jsonl"}


def some(name: str) -> str:
    """A method for which the set changes something."""
    return next(m for m, c in shipped(name).methods.items() if "schedule" in c.parts and m not in EDITS.names())


def test_both_sizes_are_shipped() -> None:
    assert names() == ["demo", "tofu-small"]


@pytest.mark.parametrize("name", names())
def test_every_entry_fits_its_method_and_says_where_it_comes_from(name: str) -> None:
    held = shipped(name)
    assert held.title
    assert {"experiment", "data", "model", "trials", "seed", "rule", "versions", "records"} <= set(held.origin)
    assert len(held.methods) > 10
    for method, entry in held.methods.items():
        assert method in known()
        assert serves(method, LanguageAdapter.offers)[0]
        assert 0 <= entry.trial < held.origin["trials"]
        assert (entry.trial == 0) == (entry.parts == {}), method
        if method in EDITS.names():
            EDITS.get(method)(**entry.parts)
        else:
            build(method, entry.parts)
        if entry.own_distance is not None and entry.own_lost is not None:
            score, own = (x.hex() for x in (entry.distance**2 + entry.lost**2, entry.own_distance**2 + entry.own_lost**2))
            assert float.fromhex(score) <= float.fromhex(own) + 1e-3, f"{method}: the own setting was one of the trials"
    used = read_used(folder(name) / USED)
    assert {n: s["records"] for n, s in used.items()} == held.origin["records"]
    check_tuned(UnlearnConfig(**REQUEST, method=some(name), settings=name).tuned)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"no set of settings 'tofu-smal'.*Did you mean 'tofu-small'"):
        chosen("tofu-smal", "npo")
    with pytest.raises(InputError, match=r"Known: demo, tofu-small|Did you mean"):
        shipped("nothing-like-it")
    for name in ("..", ".", "", "__pycache__"):
        with pytest.raises(InputError, match="no set of settings"):
            folder(name)
    with pytest.raises(InputError, match=r"hold nothing for the method 'retrain'.*Leave --settings out.*npo"):
        chosen("tofu-small", "retrain")
    with pytest.raises(InputError, match="hold nothing for the method 'custom'"):
        UnlearnConfig(**REQUEST, method="custom", settings="demo")


def test_own_values_win_and_another_part_is_the_users_alone() -> None:
    parts = {"forget": {"beta": 2.0}, "retain": {"weight": 3.0}, "schedule": {"utility_bound": 0.3}}
    assert beneath(parts, {}) == parts
    assert beneath(parts, {"retain": {"weight": 1.0}})["retain"] == {"weight": 1.0}
    both = beneath(parts, {"schedule": {"steps": 7}})
    assert both["schedule"] == {"utility_bound": 0.3, "steps": 7}
    assert both["forget"] == {"beta": 2.0}
    for other in ("paper", {"name": "fixed", "lr": 1e-3}):
        assert beneath(parts, {"schedule": other})["schedule"] == other
    assert beneath(parts, {"retain": None})["retain"] is None
    recipe = build("simnpo", beneath(parts, {"beta": 1.5, "schedule": {"steps": 7}}))
    assert recipe.forget[0].beta == 1.5  # type: ignore[attr-defined]
    assert recipe.schedule.utility_bound == 0.3  # type: ignore[attr-defined]
    assert recipe.retain[0].weight == 3.0
    assert parts == {"forget": {"beta": 2.0}, "retain": {"weight": 3.0}, "schedule": {"utility_bound": 0.3}}


@pytest.mark.parametrize("name", names())
def test_a_configuration_takes_them_by_name_and_keeps_them(name: str) -> None:
    method = some(name)
    config = UnlearnConfig(**REQUEST, method=method, settings=name)
    assert config.parts == chosen(name, method).parts
    assert config.tuned is not None
    assert Path(config.tuned.sweep) == folder(name)
    again = UnlearnConfig(**json.loads(config.model_dump_json()))
    assert again == config
    own = UnlearnConfig(**REQUEST, method=method, settings=name, parts={"schedule.utility_bound": 0.07, "schedule.steps": 9})
    bound = own.parts["schedule"]
    assert (bound["utility_bound"], bound["steps"]) == (0.07, 9)
    plain = UnlearnConfig(**REQUEST, method=method)
    assert plain.parts == {}
    assert plain.tuned is None
    assert build(method, config.parts).spec() != build(method).spec(), "the published values stay the defaults"


def test_a_set_holds_what_was_searched_and_nothing_of_the_budget() -> None:
    for name in names():
        for method, entry in shipped(name).methods.items():
            schedule = entry.parts.get("schedule", {})
            assert not {"steps", "check_examples", "name"} & set(schedule), method
            assert not {"subjects", "substitute"} & set(entry.parts), method
            assert with_values({}, nest(entry.parts)) == nest(entry.parts)
