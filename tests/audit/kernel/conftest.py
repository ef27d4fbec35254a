from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
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


@pytest.fixture(scope="session")
def zoo() -> Zoo:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    task = digits()
    everything = np.ones((32, TRAIN))
    without = everything.copy()
    without[:, task.forget] = 0
    halves = np.random.default_rng(5).random((32, TRAIN)) < 0.5
    halves[16:] = ~halves[:16]  # every image is in exactly half of the shadows
    sets = [(everything, 1), (without, 2), (without, 3), (halves, 4)]
    models = [train(task, w, steps=400, seed=s) for w, s in sets]
    torch.set_num_threads(threads)
    return Zoo(task, *models, halves)
