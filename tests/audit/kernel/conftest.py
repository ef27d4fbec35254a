from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from kernel_models import TRAIN, Digits, Ensemble, digits, train

from expunge.audit.kernel.quantities import Quantities, quantities


@dataclass(frozen=True)
class Zoo:
    """Originals, two independent sets of oracles (retrained without the forget set), and shadows on random halves."""

    task: Digits
    originals: Ensemble
    oracles: Ensemble
    others: Ensemble
    shadows: Ensemble
    halves: np.ndarray

    def score(self, models: Ensemble) -> Quantities:
        """On the training images, ``[models, 1000]``."""
        return quantities(models(self.task.x), self.task.y)

    def test(self, models: Ensemble) -> Quantities:
        return quantities(models(self.task.test_x), self.task.test_y)


def _once(folder: Path, name: str, task: Digits, weights: np.ndarray, seed: int) -> Ensemble:
    """Trained once a session, for all workers."""
    file = folder / f"digits-{name}.pt"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            torch.save(train(task, weights, steps=400, seed=seed).parameters, file)
    return Ensemble(torch.load(file))


@pytest.fixture(scope="session")
def zoo(trained_models: Path) -> Zoo:
    task = digits()
    everything = np.ones((32, TRAIN))
    without = everything.copy()
    without[:, task.forget] = 0
    halves = np.random.default_rng(5).random((32, TRAIN)) < 0.5
    halves[16:] = ~halves[:16]  # every image is in exactly half of the shadows
    sets = {"originals": (everything, 1), "oracles": (without, 2), "others": (without, 3), "shadows": (halves, 4)}
    models = {name: _once(trained_models, name, task, weights, seed) for name, (weights, seed) in sets.items()}
    return Zoo(task, **models, halves=halves)
