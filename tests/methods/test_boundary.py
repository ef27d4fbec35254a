"""Boundary unlearning on handwritten digits, and the adversarial step behind it."""

from __future__ import annotations

import math

import pytest
import torch
from tests.digits import QUIET, accuracy, encoded
from torch import nn

from expunge.adapters.supervised import ClassifierAdapter, RegressionAdapter
from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.engine.adversarial import attacked, classes_under_attack
from expunge.engine.goal import Goal
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.parts import Views
from expunge.engine.preparation import run_preparation
from expunge.methods.catalogue import serves
from expunge.methods.preparations.nearest import NearestClasses
from expunge.methods.recipe import build

CHANCE = Goal(loss=math.log(10), source="holdout", examples=10)


def plain(digits, adapter) -> dict[Stream, list]:
    return {s: e for s, e in digits.examples(adapter).items() if s is not Stream.ALTERNATIVE}


def test_the_step_raises_the_loss_of_each_row_and_moves_every_number_by_the_bound(digits) -> None:
    adapter = digits.target()
    rows = encoded(adapter, digits.split()[0])
    before, after, seen = [], [], []
    for chosen, tensors in attacked(adapter, rows, bound=0.05, max_units=40):
        batch = adapter.collate(chosen)
        change = (tensors["inputs"] - batch.tensors["inputs"]).abs()
        assert change.max() == pytest.approx(0.05, abs=1e-6)
        assert (change > 0.049).float().mean() > 0.95
        with torch.no_grad():
            for held, where in ((batch.tensors["inputs"], before), (tensors["inputs"], after)):
                where.extend(adapter.row_losses(adapter.scores(adapter.model, {"inputs": held}), batch.targets).tolist())
        seen += [e.id for e in chosen]
    assert sorted(seen) == sorted(e.id for e in rows)
    assert sum(a > b for a, b in zip(after, before, strict=True)) > 0.99 * len(rows)
    for _, tensors in attacked(adapter, rows, bound=0.5, max_units=4000, clamp=(0.0, 1.0)):
        assert tensors["inputs"].min() == 0
        assert tensors["inputs"].max() == 1
    assert all(p.grad is None for p in adapter.model.parameters())


def test_without_a_step_the_class_is_the_prediction(digits) -> None:
    adapter = digits.target()
    rows = encoded(adapter, digits.split(1)[0])
    batch = adapter.collate(rows)
    with torch.no_grad():
        predicted = adapter.forward(adapter.model, batch, frozenset({"logits"})).logits.argmax(1).tolist()
    found = classes_under_attack(adapter, rows, bound=0, max_units=100)
    assert [found[e.id] for e in rows] == predicted


def test_numbers_that_cannot_move_are_refused() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 2)

        def forward(self, ids):
            return self.table(ids).mean(1)

    from expunge.data.rows import table

    held = table([[1, 2], [3, 4]], [0, 1])
    adapter = ClassifierAdapter(Bag(), ["a", "b"])
    with pytest.raises(InputError, match="no real numbers"):
        classes_under_attack(adapter, encoded(adapter, held.rows()), bound=0.1, max_units=10)


def test_after_a_step_that_suffices_no_row_keeps_its_class(digits) -> None:
    adapter = digits.target()
    examples = plain(digits, adapter)
    classes = {}
    for bound in (0.05, 0.2):
        made = run_preparation(NearestClasses(bound=bound), adapter, examples, QUIET, scratch=None)
        assert made.examples[Stream.FORGET] == examples[Stream.FORGET]
        classes[bound] = adapter.collate(made.examples[Stream.ALTERNATIVE]).targets
        assert bool(made.notes) == (bound == 0.05)
    assert (classes[0.05] == 3).any()
    assert not (classes[0.2] == 3).any()
    assert len(set(classes[0.2].tolist())) > 2
    with pytest.raises(InputError, match="takes no forget row to another class"):
        run_preparation(NearestClasses(bound=0), adapter, examples, QUIET, scratch=None)


def test_shrinking_forgets_the_class_and_keeps_the_rest(digits) -> None:
    adapter = digits.target()
    outcome = train(adapter, build("boundary-shrink", {"bound": 0.2}), plain(digits, adapter), QUIET, goal=CHANCE)
    assert outcome.reached, outcome.sentence
    (forget, retain), (unseen_forget, unseen_retain) = digits.split(), digits.split(1)
    assert accuracy(adapter, forget) < 0.5
    assert accuracy(adapter, unseen_forget) < 0.5
    assert accuracy(adapter, retain) > 0.96
    assert accuracy(adapter, unseen_retain) > 0.93
    assert not serves("boundary-shrink", RegressionAdapter.offers)[0]


# ---- expanding ---------------------------------------------------------------------------------------------------------


def test_the_term_is_the_cross_entropy_of_a_wider_last_layer(digits) -> None:
    adapter = digits.target()
    examples = plain(digits, adapter)
    recipe = build("boundary-expand")
    made = run_preparation(recipe.preparation, adapter, examples, QUIET, scratch=None)
    extra, head = made.made["extra-class"], adapter.model[2]
    wider = nn.Linear(128, 11)
    with torch.no_grad():
        wider.weight.copy_(torch.cat([head.weight, extra.weight]))
        wider.bias.copy_(torch.cat([head.bias, extra.bias]))
    batch = adapter.collate(examples[Stream.FORGET])
    scores = wider(adapter.model[:2](batch.tensors["inputs"]))
    want = nn.functional.cross_entropy(scores, torch.full((len(scores),), 10), reduction="none")
    outputs = adapter.forward(adapter.model, batch, frozenset({"logits", "features:2"}))
    views = Views({(Stream.FORGET, Of.CURRENT): outputs}, adapter.layers(), made.made)
    torch.testing.assert_close(recipe.forget[0].values(views), want)


def test_expanding_forgets_the_class_into_many_and_leaves_the_model_its_shape(digits) -> None:
    adapter = digits.target()
    names = list(adapter.model.state_dict())
    outcome = train(adapter, build("boundary-expand"), plain(digits, adapter), QUIET, goal=CHANCE)
    assert outcome.reached, outcome.sentence
    assert list(adapter.model.state_dict()) == names
    (forget, retain), (unseen_forget, unseen_retain) = digits.split(), digits.split(1)
    assert accuracy(adapter, forget) < 0.5
    assert accuracy(adapter, unseen_forget) < 0.5
    assert accuracy(adapter, retain) > 0.92
    assert accuracy(adapter, unseen_retain) > 0.87
    batch = adapter.collate(encoded(adapter, forget))
    with torch.no_grad():
        found = adapter.forward(adapter.model, batch, frozenset({"logits"})).logits.argmax(1)
    counts = torch.bincount(found, minlength=10)
    assert int((counts > 0).sum()) >= 5
    assert int(counts.max()) < 0.6 * len(found)


def test_the_further_class_is_kept_by_checkpoints_and_dropped_after_a_kill(digits, tmp_path) -> None:
    class Killed(Exception):
        pass

    def kill(step: int, model: nn.Module) -> None:
        if step == 8:
            raise Killed

    schedule = {"name": "fixed", "lr": 1e-3, "steps": 12, "batch": 32, "warmup": 0}
    recipe, engine = build("boundary-expand", {"schedule": schedule}), Engine(checkpoint_every=5)
    whole, part, again = (digits.target() for _ in range(3))
    names = list(whole.model.state_dict())
    train(whole, recipe, plain(digits, whole), engine, folder=tmp_path / "whole")
    with pytest.raises(Killed):
        train(part, recipe, plain(digits, part), engine, folder=tmp_path / "part", observe=kill)
    assert list(part.model.state_dict()) == names
    train(again, recipe, plain(digits, again), engine, folder=tmp_path / "part", resume=True)
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in whole.model.state_dict().items())
