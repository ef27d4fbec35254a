"""Amnesiac unlearning: updates are kept, and taken back once."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.methods.prepared.small import blobs, perceptron

from expunge.core.errors import InputError
from expunge.engine.ensemble import train_ensemble
from expunge.engine.members import Members, Spec, Training, batches
from expunge.engine.record import Record
from expunge.engine.source import Source
from expunge.methods.prepared.amnesiac import Amnesiac

TRAINING = Training(steps=20, batch=10, lr=0.02)
STEPS = [set(index.tolist()) for index in batches(TRAINING, Members(torch.ones(1, 60), (0,)))]


def marked(rows: set[int]) -> Source:
    held = dataclasses.replace(blobs(), columns={"open": np.array([i in rows for i in range(60)])})
    return Source(held, perceptron, TRAINING)


def trained(steps: int) -> dict[str, torch.Tensor]:
    """Weights after some steps of plain training."""
    held = blobs()
    spec = Spec(
        perceptron, torch.from_numpy(held.inputs), torch.from_numpy(held.targets), TRAINING.model_copy(update={"steps": steps})
    )
    return train_ensemble(spec, Members(torch.ones(1, 60), [0])).member(0)


def updates(folder: Path) -> list[int]:
    return sorted(int(p.stem) for p in (folder / "updates").glob("*.safetensors"))


def test_exactly_the_updates_of_the_rows_batches_are_taken_back(tmp_path: Path) -> None:
    last = min(STEPS[-1] - STEPS[0])
    given = marked({last})
    method = Amnesiac(sensitive="open")
    method.train(given, tmp_path / "run")
    held = [k + 1 for k, rows in enumerate(STEPS) if last in rows]
    assert held[-1] == 20
    assert updates(tmp_path / "run") == held, "an update is kept for each batch with a sensitive row, and for no other"
    model = method.load(given, tmp_path / "run")
    assert all(torch.equal(v, trained(20)[k]) for k, v in model.state_dict().items())

    report = method.delete(given, tmp_path / "run", [f"row{last}"])
    assert report.redone == (f"{len(held)} of 20 updates taken back",)
    assert report.row_visits == 0
    assert "Approximate" in report.guarantee
    after = method.load(given, tmp_path / "run").state_dict()
    taken = {name: sum(trained(s)[name].double() - trained(s - 1)[name].double() for s in held) for name in after}
    for name, value in after.items():
        torch.testing.assert_close(value.double(), trained(20)[name].double() - taken[name], atol=1e-6, rtol=0)
    assert updates(tmp_path / "run") == []


def test_one_sensitive_batch_at_the_end_is_undone(tmp_path: Path) -> None:
    once = Training(steps=6, batch=10, lr=0.02)  # one pass: every row is in one batch
    plan = [set(i.tolist()) for i in batches(once, Members(torch.ones(1, 60), (0,)))]
    row = min(plan[-1])
    given = Source(blobs(), perceptron, once)
    method = Amnesiac()
    method.train(given, tmp_path / "run")
    assert updates(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    method.delete(given, tmp_path / "run", [f"row{row}"])
    held = blobs()
    spec = Spec(perceptron, torch.from_numpy(held.inputs), torch.from_numpy(held.targets), once.model_copy(update={"steps": 5}))
    before = train_ensemble(spec, Members(torch.ones(1, 60), [0])).member(0)
    for name, value in method.load(given, tmp_path / "run").state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-7, rtol=0)


def test_a_batch_is_taken_back_once(tmp_path: Path) -> None:
    a, b = sorted(STEPS[4])[:2]
    given, method = marked({a, b}), Amnesiac(sensitive="open")
    method.train(given, tmp_path / "together")
    one = Path(shutil.copytree(tmp_path / "together", tmp_path / "one"))
    method.delete(given, tmp_path / "together", [f"row{a}", f"row{b}"])
    method.delete(given, one, [f"row{a}"])
    method.delete(given, one, [f"row{b}"])
    there = method.load(given, tmp_path / "together").state_dict()
    for name, value in method.load(given, one).state_dict().items():
        torch.testing.assert_close(value, there[name], atol=1e-6, rtol=0)


def test_an_interrupted_deletion_takes_nothing_back_twice(tmp_path: Path) -> None:
    a = min(STEPS[4])
    given, method = marked({a}), Amnesiac(sensitive="open")
    method.train(given, tmp_path / "whole")
    kept = Path(shutil.copytree(tmp_path / "whole", tmp_path / "kept"))
    method.delete(given, tmp_path / "whole", [f"row{a}"])
    Record.open(kept).begin([f"row{a}"])  # killed after the weights were written and before the updates were removed
    shutil.copy(tmp_path / "whole" / "model.safetensors", kept / "model.safetensors")
    method.delete(given, kept, [f"row{a}"])
    assert (kept / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert updates(kept) == []


def test_bad_input(tmp_path: Path) -> None:
    given, method = marked({1, 2}), Amnesiac(sensitive="open")
    with pytest.raises(InputError, match="no column 'age'"):
        Amnesiac(sensitive="age").train(given, tmp_path / "bad")
    with pytest.raises(InputError, match="on disk"):
        Amnesiac(room=1e-9).train(given, tmp_path / "bad")
    with pytest.raises(InputError, match="No row is sensitive"):
        method.train(marked(set()), tmp_path / "bad")
    method.train(given, tmp_path / "run")
    with pytest.raises(InputError, match="'row5': it was not sensitive"):
        method.delete(given, tmp_path / "run", ["row5"])
    next((tmp_path / "run" / "updates").iterdir()).unlink()
    with pytest.raises(InputError, match="is missing"):
        method.delete(given, tmp_path / "run", ["row1", "row2"])
