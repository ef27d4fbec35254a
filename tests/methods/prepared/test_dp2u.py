"""A private base: what each row may do to it is clipped and drowned in noise as the budget asks; deletions start from it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.methods.prepared.small import accuracy, blobs, files, line, perceptron, slope, without
from torch import nn

pytest.importorskip("opacus")

from opacus.accountants import PRVAccountant

from expunge.core.errors import InputError
from expunge.data.rows import Table, table
from expunge.engine.functional import class_loss, squared_loss
from expunge.engine.members import Training
from expunge.engine.private import Mechanism, noise_for, of_group, rate_of, spent, train_privately
from expunge.engine.record import Record
from expunge.engine.source import Source
from expunge.methods.prepared.dp2u import DP2Unlearning

TRAINING = Training(steps=60, batch=8, lr=0.05)
QUICK = {"epsilon": 20.0, "delta": 1e-3, "base_passes": 8, "base_lr": 0.5}


def tensors(held: Table) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(held.inputs), torch.from_numpy(held.targets)


def private(model: nn.Module, held: Table, mechanism: Mechanism, seed: int = 0) -> dict[str, torch.Tensor]:
    loss = class_loss if held.task == "classification" else squared_loss
    x, y = tensors(held)
    return train_privately(model, x, y, mechanism, forward=lambda m, i: m(i), loss=loss, seed=seed)


def by_hand(model: nn.Module, held: Table, *, steps: int, lr: float, clip: float) -> dict[str, torch.Tensor]:
    """All rows in every step; each row's gradient by a backward pass of its own."""
    loss = class_loss if held.task == "classification" else squared_loss
    for _ in range(steps):
        total = [torch.zeros_like(p) for p in model.parameters()]
        for x, y in zip(*tensors(held), strict=True):
            gradient = torch.autograd.grad(loss(model(x[None]), y[None]).sum(), list(model.parameters()))
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradient))
            total = [t + g * min(1.0, clip / norm) for t, g in zip(total, gradient, strict=True)]
        with torch.no_grad():
            for p, g in zip(model.parameters(), total, strict=True):
                p.sub_(lr * g / len(held))
    return {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize(("build", "held"), [(perceptron, blobs(20)), (line, slope(20))])
@pytest.mark.parametrize("clip", [1e9, 0.3])
def test_without_noise_it_is_sgd_on_clipped_gradients(build, held, clip) -> None:
    torch.manual_seed(3)
    one, two = build(), build()
    two.load_state_dict(one.state_dict())
    found = private(one, held, Mechanism(4, 1.0, clip, 0.0, 0.2))
    wanted = by_hand(two, held, steps=4, lr=0.2, clip=clip)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_no_row_moves_the_weights_by_more_than_the_clip() -> None:
    held = blobs(20)
    for spoilt in (1.0, 1e3):
        torch.manual_seed(3)
        model = perceptron()
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        far = Table(held.ids, (held.inputs * spoilt).astype(np.float32), held.targets, held.task, held.classes)
        after = private(model, far, Mechanism(1, 1.0, 0.5, 0.0, 1.0))
        moved = math.sqrt(sum(float((after[n] - start[n]).square().sum()) for n in start))
        assert 0.01 < moved <= 0.5 + 1e-5


def test_the_noise_is_as_large_as_it_must_be_and_follows_the_seed() -> None:
    held, sizes = blobs(20), []
    for seed in (0, 0, 1):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 200), nn.Tanh(), nn.Linear(200, 3))
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        after = private(model, held, Mechanism(1, 1.0, 1e-3, 50.0, 1.0), seed)
        sizes.append(torch.cat([(after[n] - start[n]).flatten() for n in start]))
    wanted = 50.0 * 1e-3 / 20  # sigma C over the expected rows of a step
    assert sizes[0].std().item() == pytest.approx(wanted, rel=0.07)
    assert torch.equal(sizes[0], sizes[1])
    assert not torch.equal(sizes[0], sizes[2])


def test_each_row_is_drawn_with_the_rate_that_is_accounted_for() -> None:
    """Every row has a weight of its own, which each draw moves by the clip: so the weights count the draws."""
    n, steps, rate = 50, 300, rate_of(50, 16)
    model = nn.Linear(n, 1, bias=False)
    nn.init.zeros_(model.weight)
    held = table(np.eye(n), np.full(n, 1e6), task="regression")
    after = private(model, held, Mechanism(steps, rate, 1.0, 0.0, rate * n))["weight"].flatten()
    counts = after.round()
    torch.testing.assert_close(after, counts, rtol=0, atol=2e-2)
    assert counts.mean().item() == pytest.approx(steps * rate, rel=0.03)
    assert counts.std().item() == pytest.approx(math.sqrt(steps * rate * (1 - rate)), rel=0.4)


def test_a_step_for_which_nobody_is_drawn_is_noise_alone() -> None:
    torch.manual_seed(3)
    model = perceptron()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    after = private(model, blobs(5), Mechanism(1, 1e-6, 1.0, 1.0, 5e-6))
    assert all(bool((after[n] != start[n]).all()) for n in start)


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(0.5, 0.1, 100), (2.0, 0.25, 40), (10.0, 1.0, 5)])
def test_the_noise_meets_the_budget_and_hardly_more(epsilon, rate, steps) -> None:
    noise = noise_for(epsilon, 1e-5, rate=rate, steps=steps)
    assert epsilon * 0.9 < spent(Mechanism(steps, rate, 1.0, noise, 0.1), 1e-5) <= epsilon
    assert spent(Mechanism(steps, rate, 1.0, noise * 0.8, 0.1), 1e-5) > epsilon
    other = PRVAccountant()  # another way of accounting, which is tighter
    other.history = [(noise, rate, steps)]
    assert other.get_epsilon(delta=1e-5) <= epsilon * 1.01


def test_groups_of_rows_have_a_multiple_of_the_budget() -> None:
    assert of_group(0.5, 1e-6, 1) == (0.5, pytest.approx(1e-6))
    epsilon, delta = of_group(0.5, 1e-6, 3)
    assert epsilon == 1.5
    assert delta == pytest.approx(1e-6 * (1 + math.exp(0.5) + math.exp(1.0)))
    assert of_group(10.0, 1e-6, 90)[1] == 1.0
    assert rate_of(60, 16) == 0.25


def test_a_deletion_is_a_fine_tuning_of_the_base_on_what_is_left(tmp_path: Path) -> None:
    """By hand, bit for bit; the base is as it was, and the deleted rows are not looked at."""
    method, given = DP2Unlearning(**QUICK), Source(blobs(), perceptron, TRAINING)
    report = method.train(given, tmp_path / "run")
    assert report.row_visits == 8 * 60 + given.visits(TRAINING.model_copy(update={"steps": 30}), 60)
    assert "noise" in report.notes[0]
    before = files(tmp_path / "run")
    gone = ["row1", "row2", "row20"]
    less = Source(without(blobs(), gone), perceptron, TRAINING)
    done = method.delete(less, tmp_path / "run", gone)
    after = files(tmp_path / "run")
    assert after["base.safetensors"] == before["base.safetensors"]
    assert after["model.safetensors"] != before["model.safetensors"]
    record = Record.open(tmp_path / "run")
    base = record.load("base.safetensors", record.key("base", []))
    x, y = less.rows(record.remaining)
    wanted = less.learn(x, y, TRAINING.model_copy(update={"steps": 30}), 0, base)
    found = method.load(less, tmp_path / "run").state_dict()
    assert all(torch.equal(found[n], w) for n, w in wanted.items())
    assert done.row_visits < 0.6 * done.full_row_visits
    for words in ("epsilon", "delta", "one row", "3 rows deleted so far together", "Not covered"):
        assert words in done.guarantee
    assert accuracy(method.load(less, tmp_path / "run"), blobs()) > 0.7


def test_little_epsilon_has_learnt_nothing_and_much_has(tmp_path: Path) -> None:
    found = {}
    for epsilon in (0.05, 200.0):
        method = DP2Unlearning(**{**QUICK, "epsilon": epsilon, "base_passes": 20})
        given = Source(blobs(200), perceptron, TRAINING)
        method.train(given, tmp_path / str(epsilon))
        record = Record.open(tmp_path / str(epsilon))
        base = given.module(record.load("base.safetensors", record.key("base", [])))
        found[epsilon] = accuracy(base, blobs(200))
    assert found[200.0] > 0.75
    assert found[0.05] < 0.65


def wrong(n: int = 80) -> Table:
    """Blobs, and twelve rows far from them with classes at random: what a model says of these it can only know by heart."""
    held, x = blobs(n), blobs(n).inputs * 2
    x[:12, 3] += 8.0
    return table(x, held.targets, ids=list(held.ids), classes=list(held.classes))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))


def test_what_was_learnt_by_heart_is_gone_as_after_retraining_and_stays_without_a_private_base(tmp_path: Path) -> None:
    training = Training(steps=400, batch=16, lr=0.01)
    held, gone = wrong(), [f"row{i}" for i in range(12)]
    secret = table(held.inputs[:12], held.targets[:12], ids=gone, classes=list(held.classes))
    given, less = Source(held, wide, training), Source(without(held, gone), wide, training)
    method = DP2Unlearning(epsilon=1.0, delta=1e-3, base_passes=5, base_lr=0.1, share=0.25)
    method.train(given, tmp_path / "run")
    assert accuracy(method.load(given, tmp_path / "run"), secret) > 0.9
    method.delete(less, tmp_path / "run", gone)
    kept = accuracy(method.load(less, tmp_path / "run"), secret)
    x, y = less.rows(list(less.table.ids))
    retrained = accuracy(less.module(less.learn(x, y, training, 0, {})), secret)
    assert abs(kept - retrained) <= 0.25
    assert accuracy(method.load(less, tmp_path / "run"), less.table) > 0.95
    full = given.learn(*given.rows(list(held.ids)), training, 0, {})
    tuned = less.learn(x, y, training.model_copy(update={"steps": 100}), 0, full)
    assert accuracy(less.module(tuned), secret) > kept + 0.2, "a base that is not private keeps what it knew"


def test_a_budget_that_cannot_be_met_is_refused_before_training(tmp_path: Path) -> None:
    given = Source(blobs(), perceptron, TRAINING)
    with pytest.raises(InputError, match=r"delta=0.05 would allow one of 60 rows"):
        DP2Unlearning(delta=0.05).train(given, tmp_path / "run")
    with pytest.raises(InputError, match="No noise meets epsilon=1e-09"):
        DP2Unlearning(epsilon=1e-9).train(given, tmp_path / "run")
    mixed = Source(blobs(), lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), TRAINING)
    with pytest.raises(InputError, match=r"cannot be trained privately.*BatchNorm"):
        DP2Unlearning().train(mixed, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=30, max_position_embeddings=8, num_labels=2, **sizes)
    return transformers.BertForSequenceClassification(config)


def test_a_transformers_classifier_of_token_ids_has_a_private_base_too(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    ids = draw.integers(3, 30, (24, 6))
    given = Source(table(ids, (ids[:, 0] > 15).astype(int), classes=["a", "b"]), bert, Training(steps=6, batch=8, lr=0.01))
    method = DP2Unlearning(epsilon=50.0, delta=1e-3, base_passes=2)
    method.train(given, tmp_path / "run")
    before = method.load(given, tmp_path / "run").state_dict()
    assert method.delete(given, tmp_path / "run", [given.table.ids[3]]).remaining == 23
    after = method.load(given, tmp_path / "run").state_dict()
    assert any(not torch.equal(before[n], after[n]) for n in before)
