"""FairSISA on the command line: a biased problem, an ensemble, a deletion, and equal error rates over groups."""

from __future__ import annotations

import json

import pytest

from tests.command import Run, refused
from tests.entries import Desk, write_entry

BIASED = """
import numpy as np
from torch import nn

import expunge


def network():
    return nn.Linear(4, 2)


def rows(n, seed):
    draw = np.random.default_rng(seed)
    y, group = draw.integers(0, 2, n), draw.integers(0, 2, n)
    x = draw.normal(size=(n, 4)).astype(np.float32)
    x[:, 0] += (2 * y - 1) * np.where(group == 0, 1.5, 0.5) + 0.8 * group
    sex = np.where(group == 0, "f", "m")
    return expunge.table(x, y, ids=[f"r{i}" for i in range(n)], columns={"sex": sex, "all": np.zeros(n)})


def problem():
    return expunge.Supervised(
        data=rows(600, 0), holdout=rows(8000, 1), build=network, training=expunge.Training(steps=60, batch=32, lr=0.05)
    )
"""


@pytest.fixture(scope="module")
def trained(desk: Desk) -> Desk:
    write_entry(desk.folder, BIASED, "biased.py")
    done = desk.run("train", "biased.py:problem", "--method", "sisa", "shards=3", "slices=2", "--out", "sisa")
    assert done.code == 0, done.err
    assert desk.run("unlearn", "sisa", "--id", "r7").code == 0
    return desk


def test_error_rates_become_equal_at_a_cost_that_is_stated(trained: Desk) -> None:
    done = trained.run("fair", "sisa", "--group", "sex", "--json")
    assert done.code == 0, done.err
    said = done.json()
    ways = {w["name"]: w for w in said["ways"]}
    assert ways["vote"]["equalised_odds"] > 0.2
    for name in ("vote, then fix", "fix all votes together"):
        assert ways[name]["equalised_odds"] < 0.05
        assert 0.5 < ways[name]["accuracy"] < ways["vote"]["accuracy"]
    assert ways["fix, then vote"]["equalised_odds"] < ways["vote"]["equalised_odds"]
    assert (said["groups"], said["members"], said["fitted"], said["judged"]) == (["f", "m"], 3, 4000, 4000)
    held = json.loads((trained.folder / "sisa" / "fair.json").read_text())
    assert held["rule"]["groups"] == ["f", "m"]
    assert len(held["rule"]["votes"]) == len(held["rule"]["probability"]) <= 8


def test_members_are_left_as_they_were(trained: Desk) -> None:
    files = sorted((trained.folder / "sisa" / "prepared").rglob("*.safetensors"))
    before = [f.read_bytes() for f in files]
    assert trained.run("fair", "sisa", "--group", "sex").code == 0
    assert [f.read_bytes() for f in files] == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sisa", "--group", "age"], ["no column 'age'", "sex, all"]),
        (["sisa", "--group", "all"], ["of the group '0.0'", "two groups"]),
        (["nowhere", "--group", "sex"], ["no run of a prepared method"]),
    ],
)
def test_bad_requests(trained: Desk, words: list[str], says: list[str]) -> None:
    refused(trained.run("fair", *words), *says)


def test_more_than_two_classes(expunge: Run, tmp_path) -> None:
    write_entry(tmp_path)
    assert expunge("train", "digits.py:problem", "--method", "sisa", "shards=2", "slices=1", "--out", "out").code == 0
    refused(expunge("fair", "out", "--group", "page"), "two classes")
