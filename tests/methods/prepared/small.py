"""Small data and models that the tests of prepared methods share; functions of a module, so that other processes find them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from expunge.data.rows import Table, table
from expunge.engine.members import Training
from expunge.engine.record import Record
from expunge.engine.source import Source
from expunge.methods.prepared.sisa import SISA

TRAINING = Training(steps=24, batch=8, lr=0.05)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def line() -> nn.Module:
    return nn.Linear(4, 1)


def blobs(n: int = 60, seed: int = 0) -> Table:
    """Three classes in four dimensions, overlapping a little."""
    draw = np.random.default_rng(seed)
    y = draw.integers(0, 3, n)
    x = 2 * np.eye(3, 4)[y] + draw.normal(size=(n, 4))
    return table(x, y, ids=[f"row{i}" for i in range(n)], classes=["a", "b", "c"])


def slope(n: int = 40) -> Table:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(n, 4))
    return table(x, x @ [1.0, -2.0, 0.5, 0.0] + 0.1 * draw.normal(size=n), task="regression")


def source(held: Table | None = None, training: Training = TRAINING, build=perceptron) -> Source:
    return Source(blobs() if held is None else held, build, training)


def files(folder: Path) -> dict[str, bytes]:
    """Contents of all weights files, by name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


def without(held: Table, ids: list[str]) -> Table:
    """The table after its owner has removed some rows."""
    keep = [i for i, name in enumerate(held.ids) if name not in ids]
    return Table(
        tuple(held.ids[i] for i in keep), held.inputs[keep], held.targets[keep], held.task, held.classes, source=held.source
    )


def accuracy(model: nn.Module, held: Table) -> float:
    with torch.no_grad():
        return float((model(torch.from_numpy(held.inputs)).argmax(1).numpy() == held.targets).mean())


def main(folder: Path, names: list[str]) -> None:
    """Train in a process of its own that may be killed, or delete ``names``; the settings are those of the folder."""
    plan = Record.open(folder).plan
    method, given = SISA(**plan["settings"]), source(training=Training(**plan["training"]))
    if names:
        method.delete(given, folder, names)
    else:
        method.train(given, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
