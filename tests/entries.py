"""Models of rows as users have them in a folder: a function that returns one, for commands that run in real processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from expunge.core.files import digest_file
from tests.command import Done, Server

DIGITS = '''"""300 handwritten digits of 30 writers."""

import numpy as np
from sklearn.datasets import load_digits
from torch import nn

import expunge


def network():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def tables():
    inputs, labels = load_digits(return_X_y=True)
    inputs = (inputs / 16).astype(np.float32)
    data = expunge.table(
        inputs[:300], labels[:300], ids=[f"row{i}" for i in range(300)], subjects=[f"writer{i // 10}" for i in range(300)],
        columns={"ink": inputs[:300].sum(1), "page": np.arange(300) // 50},
    )
    return data, expunge.table(inputs[300:600], labels[300:600], subjects=[f"other{i // 10}" for i in range(300)])


def problem():
    data, unseen = tables()
    return expunge.Supervised(
        data=data, holdout=unseen, build=network, training=expunge.Training(steps=100, batch=50, lr=1e-2)
    )
'''
FIXED = "schedule={name: fixed, lr: %s, steps: %d, batch: 50, warmup: 0, decay: constant, weight_decay: 0}"
RETRAIN = ["--method", "retrain", FIXED % (0.01, 100)]
"""By the recipe of the target."""


def write_entry(folder: Path, text: str = DIGITS, name: str = "digits.py") -> str:
    """Write a file with the function; returns how a command names it."""
    (folder / name).write_text(text, encoding="utf-8")
    return f"{name}:problem"


def weights(run: Path) -> str:
    """Digest of the weights that a run has left."""
    return digest_file(run / "model" / "model.safetensors")


class Desk:
    """A folder with an entry, runs made in it, and a cache, for tests that only read them."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        write_entry(folder)

    def run(self, *words: object) -> Done:
        """One command in the folder, with the cache that all commands in it share."""
        return self.server.run(*words, cwd=self.folder, EXPUNGE_CACHE=str(self.folder / "cache"))

    def kill_when(self, ready: Callable[[], bool], *words: object) -> Done:
        """One command, killed as soon as ``ready()`` holds."""
        return self.server.kill_when(ready, *words, cwd=self.folder, EXPUNGE_CACHE=str(self.folder / "cache"))

    def made(self, name: str, *words: object) -> Path:
        """A run of the request for class 3, made at the first call."""
        out = self.folder / name
        if not out.exists():
            done = self.run("unlearn", "digits.py:problem", "--class", 3, *words, "--out", name)
            assert done.code in (0, 3), done.err
        return out


@pytest.fixture(scope="module")
def desk(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """One for each file of tests."""
    return Desk(server, tmp_path_factory.mktemp("desk"))
