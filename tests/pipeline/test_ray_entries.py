"""Models of a user's own file are trained on Ray workers, who cannot import that file, to the same bits as here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from expunge.pipeline.supervised import load_entry

ENTRY = """
import numpy as np
from torch import nn

import expunge


class Narrow(nn.Linear):
    pass


def network():
    return Narrow(4, 3)


def problem():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(60, 4)).astype("float32")
    return expunge.Supervised(
        data=expunge.table(inputs, inputs[:, :3].argmax(1)), build=network, training=expunge.Training(steps=20, batch=20, lr=0.01)
    )
"""


@pytest.mark.distributed
def test_what_a_file_defines_travels_to_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(ENTRY)
    problem = load_entry(f"{tmp_path / 'mine.py'}:problem")
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "here"))
    here = problem.trained(np.arange(5), [1, 2])
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "there"))
    there = problem.trained(np.arange(5), [1, 2], workers="ray")
    assert here.state.keys() == there.state.keys()
    assert all(torch.equal(value, there.state[name]) for name, value in here.state.items())
    assert not torch.equal(here.state["weight"][0], here.state["weight"][1])
