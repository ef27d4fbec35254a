"""Worst-case rows of a table, by row, class and person."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import expunge
from expunge.core.errors import InputError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3)).astype(np.float32)
Y = np.where(X[:, 0] > 0, 3, 1)
PEOPLE = [f"p{i // 4}" for i in range(36)] + [""] * 4


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Linear(3, 5)
    with torch.no_grad():
        made.weight.zero_()
        made.bias.copy_(torch.tensor([-9.0, 0, -9, 0, -9]))
        made.weight[1, 0], made.weight[3, 0] = -3.0, 3.0
    return made


def test_rows_classes_and_persons() -> None:
    data = expunge.table(X, Y, classes=list("abcde"), subjects=PEOPLE, ids=[f"r{i}" for i in range(40)])
    held = model()
    before = held.weight.clone()
    hard = expunge.worst_rows(held, data, 5, batch=None)
    assert torch.equal(held.weight, before)
    assert {f"r{i}" for i in np.argsort(-np.abs(X[:, 0]))[:5]} == set(hard.ids)  # far from the border between the classes
    easy = expunge.worst_rows(held, data, 5, batch=None, goal="easiest")
    assert {f"r{i}" for i in np.argsort(np.abs(X[:, 0]))[:5]} == set(easy.ids)
    whole = expunge.worst_rows(held, data, 1, by="class")
    assert set(Y[whole.examples].tolist()) in ({1}, {3})
    assert len(whole.examples) == (Y[whole.examples[0]] == Y).sum()
    people = expunge.worst_rows(held, data, 2, by="subject")
    assert len(people.weights) == 13
    chosen = {PEOPLE[i] or str(i) for i in people.examples}
    assert len(chosen) == 2
    assert len(people.curve) == 2


def test_bad_requests_are_refused() -> None:
    data = expunge.table(X, Y)
    with pytest.raises(InputError, match="no subject to choose by"):
        expunge.worst_rows(model(), data, 1, by="subject")
    with pytest.raises(InputError, match="no class to choose by"):
        expunge.worst_rows(nn.Linear(3, 1), expunge.table(X, X[:, 0], task="regression"), 1, by="class")
    with pytest.raises(InputError, match="outer"):
        expunge.worst_rows(model(), expunge.table(X, Y, classes=list("abcde")), 1, outre=3)
