"""Equal error rates for the votes of a SISA, before and after a deletion: FairSISA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from expunge.audit.kernel.fairness import equalised_odds_difference, fit_derived, fix_then_vote, majority, vote_then_fix
from expunge.data.rows import Table, table
from expunge.engine.members import Training
from expunge.engine.source import Source
from expunge.methods.prepared.sisa import SISA


def two() -> nn.Module:
    return nn.Linear(4, 2)


def biased(n: int, seed: int) -> tuple[Table, np.ndarray]:
    """Labels that the features tell better in group 0 than in group 1, which they lean towards a positive answer."""
    draw = np.random.default_rng(seed)
    y, group = draw.integers(0, 2, n), draw.integers(0, 2, n)
    x = draw.normal(size=(n, 4))
    x[:, 0] += (2 * y - 1) * np.where(group == 0, 1.5, 0.5) + 0.8 * group
    return table(x, y, ids=[f"r{i}" for i in range(n)]), group


@pytest.fixture(scope="module")
def voted(tmp_path_factory: pytest.TempPathFactory):
    """Votes of three shards on held-out and on new rows, after five deletions."""
    seen, _ = biased(900, 0)
    given = Source(seen, two, Training(steps=60, batch=32, lr=0.05))
    method, folder = SISA(shards=3, slices=2), Path(tmp_path_factory.mktemp("fair")) / "run"
    method.train(given, folder)
    method.delete(given, folder, [f"r{i}" for i in range(5)])
    model = method.load(given, folder)
    out = []
    for seed in (1, 2):
        held, group = biased(6000, seed)
        with torch.no_grad():
            out.append((model.votes(torch.from_numpy(held.inputs)).numpy(), held.targets, group))
    return out


def test_two_ways_make_the_error_rates_of_the_groups_equal_and_the_third_more_equal(voted) -> None:
    (votes, labels, groups), (fresh, truth, which) = voted
    assert votes.shape == (6000, 3)
    before = equalised_odds_difference(majority(fresh), truth, which)
    assert before > 0.2
    single, joint, every = (
        vote_then_fix(votes, labels, groups),
        fix_then_vote(votes, labels, groups),
        fit_derived(votes, labels, groups),
    )
    found = {
        "vote, then fix": equalised_odds_difference(single.probabilities(majority(fresh)[:, None], which), truth, which),
        "fix, then vote": equalised_odds_difference(joint.probabilities(fresh, which), truth, which),
        "all votes": equalised_odds_difference(every.probabilities(fresh, which), truth, which),
    }
    assert found["vote, then fix"] < 0.03, found
    assert found["all votes"] < 0.03, found
    # Members that were fixed one by one and err together: their vote is fairer than it was, and nothing makes it fair.
    assert found["fix, then vote"] < before / 2, found
    assert equalised_odds_difference(every.probabilities(votes, groups), labels, groups) < 1e-6
    assert every.loss <= single.loss + 1e-9
    assert single.loss <= min(labels.mean(), 1 - labels.mean()) + 1e-9
