"""Corrective unlearning of a trigger: retraining fails where few wrong rows are known, dampening does not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tests.digits import QUIET, TRAINING, encoded, network

from expunge.adapters.supervised import ClassifierAdapter
from expunge.audit.kernel.corrective import Corrective, corrective, corrective_area
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.data.spoiled import Spoiled, poison
from expunge.engine.edit import apply_edit
from expunge.engine.loop import train
from expunge.methods.edits.dampening import SSD
from expunge.methods.recipe import build


def trained(made: Spoiled, without=()) -> ClassifierAdapter:
    adapter = ClassifierAdapter(network(), made.table.classes)
    rows = made.table.rows(np.setdiff1d(np.arange(len(made.table)), without))
    train(adapter, build("finetune", {"schedule": TRAINING}), {Stream.RETAIN: encoded(adapter, rows)}, QUIET)
    return adapter


def measured(adapter, made: Spoiled, test) -> Corrective:
    parts = made.domain.split(test)
    with torch.no_grad():
        hits = [(adapter.model(torch.from_numpy(p.inputs)).argmax(1).numpy() == p.targets) for p in parts]
    return corrective(*hits)


def dampened(target: ClassifierAdapter, made: Spoiled, share: float, test) -> Corrective:
    """The best of the published grid by the sum of both accuracies, as the benchmark chooses."""
    rows = made.table.rows(made.known(share)), made.table.rows(made.table.others(made.known(share)))
    found = []
    for alpha, ratio in itertools.product((0.1, 1, 5, 10, 50, 100), (0.1, 1, 5)):
        adapter = target.copy()
        examples = {Stream.FORGET: encoded(adapter, rows[0]), Stream.RETAIN: encoded(adapter, rows[1])}
        apply_edit(adapter, SSD(alpha=alpha, dampening=ratio * alpha), examples, QUIET)
        found.append(measured(adapter, made, test))
    return max(found, key=lambda c: c.corrected + c.retained)


def test_retraining_needs_most_of_the_wrong_rows_and_dampening_few(digits) -> None:
    data, test = digits.tables
    made = poison(data, 100, label="0", size=2, shape=(8, 8))
    naive = trained(made)
    assert measured(naive, made, test).corrected < 0.15
    assert measured(naive, made, test).retained > 0.93
    few = measured(trained(made, made.known(0.2)), made, test)
    all_ = measured(trained(made, made.known(1.0)), made, test)
    assert few.corrected < 0.2
    assert all_.corrected > 0.5  # a clean model is itself hurt by the patch
    assert min(few.retained, all_.retained) > 0.93
    edited = dampened(naive, made, 0.2, test)
    assert edited.corrected > 0.7
    assert edited.retained > 0.8


def test_both_accuracies_and_their_area() -> None:
    found = corrective([1, 0, 0, 0], [1, 1, 0, 1])
    assert (found.corrected, found.retained) == (0.25, 0.75)
    curve = {0.1: Corrective(0, 1), 1.0: Corrective(1, 1), 0.2: Corrective(0, 1)}
    area = corrective_area(curve)
    assert area.corrected == pytest.approx(0.4 / 0.9)
    assert area.retained == pytest.approx(1)
    for act in (lambda: corrective([], [1]), lambda: corrective([2], [1]), lambda: corrective_area({0.5: found})):
        with pytest.raises(InputError):
            act()
