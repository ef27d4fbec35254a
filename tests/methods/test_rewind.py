"""SCRUB with rewinding: back to the epoch whose forget error is nearest to the last one's on unseen rows."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.digits import QUIET, accuracy, encoded
from torch import nn

import expunge
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.data.order import BatchPlan, TurnPlan
from expunge.data.rows import alike
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.rewind import error_rate
from expunge.methods.catalogue import describe
from expunge.methods.recipe import build

SCHEDULE = {"lr": 2e-3, "epochs": 6, "erase_epochs": 3, "batch": 16, "retain_batch": 100}


def streams(digits, adapter) -> dict[Stream, list]:
    return {**digits.examples(adapter), Stream.VALIDATION: encoded(adapter, digits.split(1)[0])}


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 4), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_epochs_end_where_the_next_one_begins(first: int, second: int, batch: int, erase: int, epochs: int) -> None:
    plan = TurnPlan({"a": first, "b": second}, {"a": batch, "b": batch}, seed=0, passes={"a": erase, "b": epochs})
    ends = plan.ends()
    assert len(ends) == epochs
    assert ends[-1] == plan.steps
    for end in ends:
        assert plan.turn(end - 1)[0] == "b"
        assert end == plan.steps or plan.turn(end)[0] == ("a" if ends.index(end) + 1 < min(erase, epochs) else "b")
    steps = BatchPlan({"a": first}, {"a": batch}, seed=0, steps=7).ends()
    assert steps[-1] == 7
    assert all(e % -(-first // batch) == 0 for e in steps[:-1])


def test_it_takes_the_epoch_that_brute_force_takes(digits) -> None:
    adapter = digits.target()
    held: dict[int, nn.Module] = {}
    outcome = train(adapter, build("scrub-rewind", {"schedule": SCHEDULE}), streams(digits, adapter), QUIET,
                    observe=lambda step, model: held.__setitem__(step, copy.deepcopy(model)))  # fmt: skip
    forget, unseen = digits.split()[0], digits.split(1)[0]
    bare = digits.target()

    def error(model: nn.Module, rows) -> float:
        bare.model = model
        return 1 - accuracy(bare, rows)

    rows = len(forget)
    per_forget, per_retain = -(-rows // 16), -(-(1000 - rows) // 100)
    ends = [(per_forget + per_retain) * k for k in (1, 2, 3)]
    ends += [ends[-1] + per_retain * k for k in (1, 2, 3)]
    assert max(held) == ends[-1]
    reference = error(held[ends[-1]], unseen)
    errors = [abs(error(held[e], forget) - reference) for e in ends]
    best = ends[int(np.argmin(errors))]
    assert len(set(errors)) > 1
    assert all(torch.equal(v, held[best].state_dict()[k]) for k, v in adapter.model.state_dict().items())
    assert f"epoch {ends.index(best) + 1} of 6" in outcome.notes[-1]
    assert error_rate(bare, held[best], encoded(bare, forget), 50) == pytest.approx(error(held[best], forget))


def test_without_rewinding_it_is_scrub(digits) -> None:
    found = []
    for name, more in (("scrub", {}), ("scrub-rewind", {"rewind": False})):
        adapter = digits.target()
        train(adapter, build(name, {"schedule": {**SCHEDULE, **more}}), streams(digits, adapter), QUIET)
        found.append({k: v.clone() for k, v in adapter.model.state_dict().items()})
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())


def test_a_killed_run_rewinds_to_the_same_weights(digits, tmp_path) -> None:
    class Killed(Exception):
        pass

    def kill(step: int, model: nn.Module) -> None:
        if step == 45:
            raise Killed

    recipe, engine = build("scrub-rewind", {"schedule": SCHEDULE}), Engine(checkpoint_every=20)
    whole, part, again = (digits.target() for _ in range(3))
    train(whole, recipe, streams(digits, whole), engine, folder=tmp_path / "whole")
    with pytest.raises(Killed):
        train(part, recipe, streams(digits, part), engine, folder=tmp_path / "part", observe=kill)
    train(again, recipe, streams(digits, again), engine, folder=tmp_path / "part", resume=True)
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in whole.model.state_dict().items())


def test_rows_to_choose_by_have_the_classes_of_the_forget_set(digits) -> None:
    seen, unseen = digits.tables
    rng = np.random.default_rng(0)
    for chosen in (seen.select(classes=["3"]), rng.permutation(1000)[:60], np.flatnonzero(seen.targets < 2)[:30]):
        found = alike(unseen, seen.targets[chosen], 0)
        want = np.bincount(seen.targets[chosen], minlength=10) / len(chosen)
        got = np.bincount(unseen.targets[found], minlength=10) / len(found)
        assert np.abs(want - got).max() < 0.02
        assert len(set(found.tolist())) == len(found)
    without = np.flatnonzero(unseen.targets != 3)
    fewer = expunge.table(unseen.inputs[without], unseen.targets[without])
    with pytest.raises(InputError, match="class '3' there is no row"):
        alike(fewer, np.array([3]), 0)


def test_from_python_and_without_unseen_rows(digits) -> None:
    seen, unseen = digits.tables
    assert describe("scrub-rewind").wants == ("retain", "holdout")
    given = {"classes": ["3"], "method": "scrub-rewind", "parts": {"schedule": SCHEDULE}}
    with pytest.raises(InputError, match="never trained on"):
        expunge.unlearn_rows(digits.target().model, seen, **given)
    done = expunge.unlearn_rows(digits.target().model, seen, holdout=unseen, **given)
    assert any("Rewound" in note for note in done.notes)
