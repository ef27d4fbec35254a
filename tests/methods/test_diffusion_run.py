"""Every method that the table names on a diffusion model, from the same files as for language and rows; what it does there."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.drawings import QUIET, fresh

import expunge
from expunge.adapters.diffusion import DiffusionAdapter
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.engine.edit import Edit, apply_edit
from expunge.engine.loop import train
from expunge.engine.objective import mean_losses
from expunge.engine.options import Engine
from expunge.methods.catalogue import known, serves
from expunge.methods.edits.registry import EDITS
from expunge.methods.recipe import build

SERVED = [n for n in known() if serves(n, DiffusionAdapter.offers)[0]]
FIXED = {"name": "fixed", "lr": 1e-3, "steps": 30, "batch": 16, "warmup": 0, "decay": "constant", "weight_decay": 0}
CLASS_ONLY = {"parameters": {"name": "named", "patterns": ["class_embedding*"]}}


def state(adapter) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in adapter.model.state_dict().items()}


def test_the_table_names_those_that_read_losses() -> None:
    wanted = {
        "gradascent",
        "finetune",
        "random-label",
        "salun",
        "neggrad-plus",
        "graddiff",
        "l1-sparse",
        "npo",
        "ssd",
        "iau",
        "rmu",
    }
    assert wanted <= set(SERVED)
    assert not {"scrub", "bad-teacher", "fisher", "influence", "dpo", "idk-nll"} & set(SERVED)


@pytest.mark.parametrize("name", SERVED)
def test_every_method_that_the_table_names_runs(drawings, name) -> None:
    adapter = drawings.target()
    before = state(adapter)
    is_edit = name in EDITS.names()
    examples = {s: held[:24] for s, held in drawings.examples(adapter, "custom" if is_edit else name).items()}
    if is_edit:
        made: Edit = EDITS.get(name)(**({"alpha": 1.0} if name == "ssd" else {}))
        apply_edit(adapter, made, examples, QUIET)
    else:
        finish = {"finish": {"scale": 1.0}} if name == "task-vector" else {}
        recipe = build(name, {"schedule": {"lr": 1e-3, "batch": 8}, **finish})
        schedule = recipe.schedule.model_copy(update={"steps": 3, "epochs": 0.01})
        train(adapter, recipe.model_copy(update={"schedule": schedule}), examples, QUIET)
    after = state(adapter)
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert all(torch.isfinite(v).all() for v in after.values())


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("random-label", {"schedule": FIXED}),
        ("salun", {"schedule": FIXED}),
        ("gradascent", {"schedule": {**FIXED, "lr": 0.2, "steps": 60}, **CLASS_ONLY}),
    ],
)
def test_the_shape_is_drawn_no_more_and_the_others_are(drawings, name, more) -> None:
    adapter = drawings.target()
    drawn, _ = drawings.forgotten_and_kept(adapter)
    train(adapter, build(name, more), drawings.examples(adapter, name), QUIET)
    left, kept = drawings.forgotten_and_kept(adapter)
    assert left < drawn - 0.6
    assert kept > 0.9


@pytest.mark.parametrize(("taught", "more"), [("forget", {"lr": 0.2, "steps": 60}), ("retain", {})])
def test_the_other_sign_and_neglect_do_not_forget_the_shape(drawings, taught, more) -> None:
    adapter = drawings.target()
    examples = drawings.examples(adapter)[Stream(taught)]
    recipe = build("finetune", {"schedule": {**FIXED, **more}, **(CLASS_ONLY if taught == "forget" else {})})
    train(adapter, recipe, {Stream.RETAIN: examples}, QUIET)
    left, kept = drawings.forgotten_and_kept(adapter)
    assert left > 0.9
    assert kept > 0.9


def test_ascent_raises_the_loss_of_the_shape_and_descent_lowers_it(drawings) -> None:
    schedule = {"schedule": {**FIXED, "lr": 2e-4, "steps": 20}}
    up, down = drawings.target(), drawings.target()
    examples = drawings.examples(up)
    before = mean(up, examples[Stream.FORGET])
    train(up, build("gradascent", schedule), examples, QUIET)
    train(down, build("finetune", schedule), {Stream.RETAIN: examples[Stream.FORGET]}, QUIET)
    assert mean(up, examples[Stream.FORGET]) > 1.2 * before
    assert mean(down, examples[Stream.FORGET]) < before


def mean(adapter, examples) -> float:
    return float(np.mean(mean_losses(adapter, adapter.model, examples, 8192)))


def test_a_class_is_forgotten_by_the_one_call_for_rows(drawings) -> None:
    adapter = drawings.target()
    before = state(adapter)
    with pytest.raises(InputError, match="fixed schedule"):
        expunge.unlearn_rows(adapter, drawings.table, classes=["cross"], method="random-label")
    with pytest.raises(InputError, match="needs logits"):
        expunge.unlearn_rows(adapter, drawings.table, classes=["cross"], method="scrub")
    assert all(torch.equal(v, before[k]) for k, v in state(adapter).items())
    more = {"schedule": {**FIXED, "steps": 8}}
    done = expunge.unlearn_rows(adapter, drawings.table, classes=["cross"], method="random-label", parts=more)
    assert done.reached
    assert done.notes == ["Of the class 'cross' no row is left: it is forgotten as a whole."]
    other = drawings.target()
    train(other, build("random-label", more), drawings.examples(other, "random-label"), QUIET)
    assert all(torch.equal(v, state(other)[k]) for k, v in state(adapter).items())


def test_salun_leaves_the_weights_outside_of_its_mask(drawings) -> None:
    adapter = drawings.target()
    before = state(adapter)
    train(adapter, build("salun", {"schedule": {**FIXED, "steps": 4}}), drawings.examples(adapter, "salun"), QUIET)
    moved = sum(int((v != before[k]).sum()) for k, v in state(adapter).items())
    total = sum(v.numel() for v in before.values())
    assert 0.3 * total < moved <= 0.51 * total


def test_the_reference_sees_the_noise_of_the_step(drawings) -> None:
    adapter = drawings.target()
    recipe = build("npo", {"schedule": {**FIXED, "steps": 2}, "beta": 0.5})
    first = train(adapter, recipe, drawings.examples(adapter), QUIET).history[0]
    assert first["forget.npo"] == pytest.approx(2 / 0.5 * math.log(2), rel=1e-5)
    with pytest.raises(InputError, match="drawn anew"):
        train(drawings.target(), build("npo", {"schedule": FIXED, "reference": "cached"}), drawings.examples(adapter), QUIET)


def test_each_step_draws_anew_and_portions_do_not_matter() -> None:
    from expunge.data.sets.drawn import drawn_shapes

    found = []
    for tokens in (8192, 300):
        adapter = fresh()
        rows = [adapter.encode(r) for r in drawn_shapes(2).rows()]
        schedule = {**FIXED, "steps": 6, "lr": 1e-5}
        outcome = train(adapter, build("finetune", {"schedule": schedule}), {Stream.RETAIN: rows}, Engine(max_tokens=tokens))
        found.append([row["loss"] for row in outcome.history])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert len({round(x, 4) for x in found[0]}) == 6  # the same rows in every step, other noise


def test_a_killed_run_goes_on_to_the_same_bits(drawings, tmp_path) -> None:
    engine = Engine(checkpoint_every=2)
    recipe = build("random-label", {"schedule": {**FIXED, "steps": 6}})

    class Killed(Exception):
        pass

    def kill(step: int, model: torch.nn.Module) -> None:
        if step == 5:
            raise Killed

    whole, broken, again = (drawings.target() for _ in range(3))
    train(whole, recipe, drawings.examples(whole, "random-label"), engine, folder=tmp_path / "whole")
    with pytest.raises(Killed):
        train(broken, recipe, drawings.examples(broken, "random-label"), engine, folder=tmp_path / "part", observe=kill)
    train(again, recipe, drawings.examples(again, "random-label"), engine, folder=tmp_path / "part", resume=True)
    assert all(torch.equal(v, state(again)[k]) for k, v in state(whole).items())
