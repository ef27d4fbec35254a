"""UNSIR on handwritten digits: noise that is no row of the class, impairment, repair."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.digits import QUIET, accuracy
from torch import nn

from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.preparation import run_preparation
from expunge.methods.preparations.noise import Noise
from expunge.methods.recipe import build

SCHEDULE = {"epochs": 5, "batch": 32, "repair_epochs": 2}  # at the published rates


def plain(digits, adapter) -> dict[Stream, list]:
    return {s: e for s, e in digits.examples(adapter).items() if s is not Stream.ALTERNATIVE}


def test_the_noise_is_what_the_target_errs_on_most(digits) -> None:
    adapter = digits.target()
    examples = plain(digits, adapter)
    before = {k: v.clone() for k, v in adapter.model.state_dict().items()}
    losses = {}
    for steps in (1, 40):
        made = run_preparation(Noise(steps=steps), adapter, examples, QUIET, scratch=None).examples[Stream.ALTERNATIVE]
        batch = adapter.collate(made)
        assert batch.targets.tolist() == [3] * len(made)
        with torch.no_grad():
            losses[steps] = float(adapter.row_losses(adapter.scores(adapter.model, dict(batch.tensors)), batch.targets).mean())
    assert losses[40] > max(5, 3 * losses[1])
    assert len({e.data[0].tobytes() for e in made}) == len(made) > 100
    fewer = run_preparation(Noise(inputs=7), adapter, examples, QUIET, scratch=None).examples[Stream.ALTERNATIVE]
    assert len({e.data[0].tobytes() for e in fewer}) == 7

    def size(shrink: float) -> float:
        held = run_preparation(Noise(shrink=shrink), adapter, examples, QUIET, scratch=None).examples[Stream.ALTERNATIVE]
        return float(np.mean([np.square(np.asarray(e.data[0])).sum() for e in held]))

    assert size(1.0) < size(0.1) < size(0.0)
    assert all(torch.equal(v, before[k]) for k, v in adapter.model.state_dict().items())


def test_only_class_and_shape_of_the_forget_rows_are_read(digits) -> None:
    adapter = digits.target()
    examples = plain(digits, adapter)
    other = [adapter.replace(e, inputs=np.zeros(64, dtype=np.float32)) for e in examples[Stream.FORGET]]
    one, two = (
        run_preparation(Noise(steps=3), adapter, {**examples, Stream.FORGET: f}, QUIET, scratch=None)
        for f in (examples[Stream.FORGET], other)
    )
    for a, b in zip(one.examples[Stream.ALTERNATIVE], two.examples[Stream.ALTERNATIVE], strict=True):
        assert np.array_equal(a.data[0], b.data[0])


def test_impairing_forgets_the_class_and_repairing_brings_the_rest_back(digits) -> None:
    adapter = digits.target()
    held: dict[int, nn.Module] = {}
    outcome = train(adapter, build("unsir", {"schedule": SCHEDULE}), plain(digits, adapter), QUIET,
                    observe=lambda step, model: held.__setitem__(step, copy.deepcopy(model)))  # fmt: skip
    rows = len(digits.split()[0])
    impair = 5 * -(-rows // 32)
    assert outcome.steps == impair + 2 * -(-(1000 - rows) // 32)
    both = [row["forget.alternative-nll"] > 0 for row in outcome.history]
    assert all(both[:3])
    assert not any(both[impair:])
    forget, retain = digits.split()
    bare = digits.target()
    bare.model = held[impair]
    impaired = accuracy(bare, retain)
    assert accuracy(bare, forget) < 0.1
    assert impaired < 0.85
    assert accuracy(adapter, forget) < 0.1
    assert accuracy(adapter, digits.split(1)[0]) < 0.1
    assert accuracy(adapter, retain) > max(impaired, 0.92)
    assert accuracy(adapter, digits.split(1)[1]) > 0.9
    kept = {"name": "noise", "lr": 1e-12}  # noise that is not learnt breaks less of the rest
    bare = digits.target()
    seen: list[float] = []

    def look(step: int, model: nn.Module) -> None:
        if step == impair:
            other = digits.target()
            other.model = model
            seen.append(accuracy(other, retain))

    train(bare, build("unsir", {"schedule": SCHEDULE, "preparation": kept}), plain(digits, bare), QUIET, observe=look)
    assert seen[0] > impaired + 0.1


def test_the_parts_of_the_schedule(digits, tmp_path) -> None:
    with pytest.raises(InputError, match="schedule=repair needs a retain term"):
        build("unsir", {"retain": "none"})
    adapter = digits.target()
    recipe = build("unsir", {"schedule": {**SCHEDULE, "epochs": 1, "repair_epochs": 1, "repair_lr": 1e-4}})
    outcome = train(adapter, recipe, plain(digits, adapter), Engine(checkpoint_every=3), folder=tmp_path / "whole")
    assert [row["lr"] for row in outcome.history] == [0.02] * 4 + [1e-4] * 28

    class Killed(Exception):
        pass

    def kill(step: int, model: nn.Module) -> None:
        if step == 8:
            raise Killed

    part, again = digits.target(), digits.target()
    with pytest.raises(Killed):
        train(part, recipe, plain(digits, part), Engine(checkpoint_every=3), folder=tmp_path / "part", observe=kill)
    train(again, recipe, plain(digits, again), Engine(checkpoint_every=3), folder=tmp_path / "part", resume=True)
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in adapter.model.state_dict().items())
