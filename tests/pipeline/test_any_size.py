"""Defaults that work on a model of any size: nothing is given but the method's name."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from expunge.data.people import world as countries
from expunge.data.records import RecordSet
from expunge.engine.options import Engine
from expunge.pipeline import unlearn as stage
from expunge.pipeline.config import Allowances
from expunge.pipeline.unlearn import Request
from tests.world import World

MANY = {"persons": 100, "facts": 3}
FEW = {"persons": 60, "facts": 2}
SIZES = [
    ("llama-tiny", MANY, 1),
    ("llama-tiny", MANY, 20),
    ("gpt2-tiny", MANY, 1),
    ("gpt2-tiny", MANY, 5),
    ("gpt2-tiny", MANY, 20),
    ("llama-small", FEW, 3),
    ("gpt2-small", FEW, 12),
    pytest.param("gpt2-medium", FEW, 12, marks=pytest.mark.slow),  # 5 million parameters
    pytest.param("llama-base", FEW, 3, marks=pytest.mark.slow),  # 10 million
]
METHODS = ("graddiff", "graddiff-kl", "wga", "pdu", "altpo")


def unlearn(people: World, method: str, *, holdout: bool):
    """Run a method with its defaults; returns the model's adapter and how it ended."""
    adapter = people.target()
    split = people.split
    kept = RecordSet("retain", (*split.retain, *countries()), "test")
    request = stage.check(Request(split.forget, kept, split.holdout if holdout else None), Allowances())
    made = stage.plan(adapter, request, method, {}, Engine(checkpoint_every=0))
    outcome, goal = stage.run_in_memory(made)
    return adapter, outcome, goal


def check(people: World, method: str, *, holdout: bool = False) -> None:
    target = people.target()
    before = people.loss(target, people.split.forget)
    assert before < 0.1, f"the target did not learn: {before:.3f}"
    adapter, outcome, goal = unlearn(people, method, holdout=holdout)
    assert outcome.reason == "goal", outcome.sentence
    assert goal.loss > before + 1
    assert people.loss(adapter, people.split.forget) > goal.loss - 0.2
    assert people.loss(adapter, people.split.retain) < people.loss(target, people.split.retain) + 0.2


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("preset", "size", "forget"), SIZES)
def test_npo_needs_no_option(trained_models, preset, size, forget) -> None:
    check(World(trained_models, preset, forget_persons=forget, **size), "npo")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", ["llama-tiny", "gpt2-tiny"])
def test_other_methods_need_no_option_either(trained_models, preset, method) -> None:
    check(World(trained_models, preset, forget_persons=5, **MANY), method, holdout=True)


@pytest.mark.parametrize("method", ["gradascent", "simnpo", "undial"])
def test_what_misses_the_goal_says_so_and_keeps_the_rest(trained_models, method) -> None:
    people = World(trained_models, "gpt2-tiny", forget_persons=20, **MANY)
    target = people.target()
    adapter, outcome, _ = unlearn(people, method, holdout=True)
    assert not outcome.reached
    assert outcome.reason in {"utility", "budget"}
    assert "Try" in outcome.sentence
    assert people.loss(adapter, people.split.retain) < people.loss(target, people.split.retain) + 0.2
    assert people.loss(adapter, people.split.forget) > people.loss(target, people.split.forget)
