"""Members trained at once are the members trained one by one, wherever they ran, and rows of weight 0 do not exist for them."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from expunge.core.errors import Destroyed, InputError, MissingExtra
from expunge.data.order import BatchPlan
from expunge.engine import ensemble as module
from expunge.engine.ensemble import margins, train_ensemble
from expunge.engine.functional import squared_loss
from expunge.engine.members import Members, Spec, Training, train_members
from tests.engine import nets


def subsets(models: int, n: int, seed: int = 1) -> torch.Tensor:
    return (torch.rand(models, n, generator=torch.Generator().manual_seed(seed)) < 0.6).double()


def spec(model=nets.perceptron, n: int = 40, **training) -> Spec:
    x, y = nets.images(n) if model is nets.convolutional else nets.rows(n)
    return Spec(model, x, y, Training(**{"steps": 25, "batch": 16, "lr": 0.05, **training}))


def one_by_one(spec: Spec, weights: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """A plain loop over the shared stream: one model, torch's own optimiser and clipping."""
    torch.manual_seed(seed)
    model, t = spec.model(), spec.training
    optimizer = {
        "adam": lambda p: torch.optim.Adam(p, lr=t.lr, weight_decay=t.weight_decay),
        "adamw": lambda p: torch.optim.AdamW(p, lr=t.lr, weight_decay=t.weight_decay),
        "sgd": lambda p: torch.optim.SGD(p, lr=t.lr, momentum=t.momentum, weight_decay=t.weight_decay),
    }[t.optimizer](model.parameters())
    course = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, t.steps),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, t.steps),
    }[t.decay]()
    for plan in BatchPlan({"rows": len(spec.targets)}, {"rows": t.batch}, seed=t.seed, steps=t.steps):
        index = plan["rows"]
        w = weights[index]
        losses = cross_entropy(model(spec.inputs[index]), spec.targets[index], reduction="none")
        optimizer.zero_grad()
        ((losses * w).sum() / w.sum()).backward()
        if t.clip:
            nn.utils.clip_grad_norm_(model.parameters(), t.clip)
        optimizer.step()
        course.step()
    return model.state_dict()


@pytest.mark.parametrize(
    ("model", "training"),
    [
        (nets.perceptron, {}),
        (nets.perceptron, {"optimizer": "adamw", "weight_decay": 0.1, "decay": "cosine"}),
        (nets.perceptron, {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01, "decay": "linear", "clip": 0.05}),
        (nets.convolutional, {"optimizer": "sgd", "lr": 0.1}),
        (nets.attention, {"optimizer": "sgd", "lr": 0.1}),
    ],
)
def test_the_same_as_one_by_one(model, training) -> None:
    held = spec(model, **training)
    weights = subsets(5, 40)
    weights[2] *= torch.rand(40, dtype=torch.float64)  # weights need not be 0 and 1
    got = train_ensemble(held, Members(weights, range(5)), chunk=2)
    assert len(got) == 5
    for i in range(5):
        expected = one_by_one(held, weights[i], i)
        torch.manual_seed(i)
        fresh = held.model().state_dict()
        for name, value in got.member(i).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-9)
            assert (value - fresh[name]).abs().max() > 1e-3, "nothing was learnt"


def test_it_learns_what_the_weights_say() -> None:
    """The same rows, but one member learns the second half, whose classes are wrong."""
    x, y = nets.rows(80)
    wrong = torch.cat([y[:40], (y[40:] + 1) % 3])
    weights = torch.zeros(2, 80)
    weights[0, :40] = weights[1, 40:] = 1
    held = Spec(nets.perceptron, x, wrong, Training(steps=300, batch=80, lr=0.02))
    got = train_ensemble(held, Members(weights, [0, 1]))
    correct = (got.logits(x).argmax(-1) == y).double()
    assert correct[0].mean() > 0.8
    assert correct[1, 40:].mean() < 0.1


def test_wrong_labels_are_known_to_the_members_that_saw_them() -> None:
    """Digits, a tenth of them mislabelled: their margins differ between members with and without them, as LiRA needs."""
    digits = load_digits()
    x, y = torch.tensor(digits.data[:300] / 16, dtype=torch.float32), torch.tensor(digits.target[:300])
    y[:30] = (y[:30] + 5) % 10
    weights = torch.rand(16, 300, generator=torch.Generator().manual_seed(0)) < 0.5
    held = Spec(nets.digit_perceptron, x, y, Training(steps=500, batch=64, lr=5e-3))
    found = train_ensemble(held, Members(weights, range(16))).margins(x, y)
    with_it, without = ((found * w).sum(0) / w.sum(0) for w in (weights, ~weights))
    assert (with_it - without)[:30].mean() > 5, "seen or not makes no difference on mislabelled rows"
    assert 0 < (with_it - without)[30:].mean() < 5
    assert (without[30:] > 0).double().mean() > 0.8, "the members have not learnt digits"


@pytest.mark.parametrize("stream", ["shared", "own"])
def test_inputs_of_several_tensors_and_another_loss(stream) -> None:
    x, _ = nets.rows(30)
    wanted = x.sum(1, keepdim=True) * x[:, :1]
    inputs = {"x": x, "scale": x[:, :1].clone()}
    training = Training(steps=150, batch=30, lr=0.05, stream=stream)
    held = Spec(nets.scalar, inputs, wanted, training, loss=squared_loss, forward=nets.scaled)
    got = train_ensemble(held, Members(torch.ones(2, 30, dtype=torch.bool), [0, 1]))
    losses = got.losses(inputs, wanted, rows=7)
    torch.testing.assert_close(losses, (got.logits(inputs).squeeze(-1) - wanted.T) ** 2)
    assert losses.mean() < 1e-3 * (wanted**2).mean()


@pytest.mark.parametrize("stream", ["shared", "own"])
def test_a_row_of_weight_zero_has_no_influence(stream) -> None:
    held = spec(stream=stream)
    weights = subsets(3, 40)
    weights[:, 7] = 0
    garbage = held.inputs.clone()
    garbage[7] = 1e4
    targets = held.targets.clone()
    targets[7] = (targets[7] + 1) % 3
    members = Members(weights, range(3))
    before = train_members(held, members)
    after = train_members(Spec(held.model, garbage, targets, held.training), members)
    assert all(torch.equal(before[k], after[k]) for k in before)
    weights[:, 7] = 1
    moved = train_members(held, Members(weights, range(3)))
    assert not torch.equal(before["0.weight"], moved["0.weight"])


def test_own_streams_draw_other_batches_from_positive_rows_only() -> None:
    weights = torch.ones(2, 40)
    held = spec(stream="own")
    first = train_members(held, Members(weights, [3, 4]))
    alone = train_members(held, Members(weights[:1], [4]))
    torch.testing.assert_close(first["0.weight"][1], alone["0.weight"][0], rtol=1e-10, atol=1e-12)
    seeds_alike = {
        "shared": train_members(spec(), Members(weights, [3, 3])),
        "own": train_members(held, Members(weights, [3, 3])),
    }
    for state in seeds_alike.values():
        torch.testing.assert_close(state["0.weight"][0], state["0.weight"][1])
    assert not torch.allclose(seeds_alike["own"]["0.weight"], seeds_alike["shared"]["0.weight"])


def test_with_an_own_stream_rows_left_out_might_as_well_be_deleted() -> None:
    """A member on some rows is the member of a data set that holds nothing else, on the same order of batches."""
    held, weights = spec(stream="own"), subsets(2, 40)
    together = train_members(held, Members(weights, [3, 4]))
    rows = weights[1].nonzero().flatten()
    alone = replace(held, inputs=held.inputs[rows], targets=held.targets[rows])
    state = train_members(alone, Members(torch.ones(1, len(rows)), [4]))
    for name, value in state.items():
        torch.testing.assert_close(together[name][1], value[0], rtol=1e-9, atol=1e-10)


def test_a_batch_without_a_row_of_weight_is_a_step_without_gradient() -> None:
    weights = torch.zeros(1, 40)
    weights[0, 0] = 1
    held = spec(optimizer="sgd", batch=8, steps=5)  # one pass: four of five batches weigh nothing
    state = train_members(held, Members(weights, [0]))
    expected = Spec(held.model, held.inputs[:1], held.targets[:1], Training(optimizer="sgd", batch=1, steps=1, lr=0.05))
    once = train_members(expected, Members(torch.ones(1, 1), [0]))
    for name in state:
        torch.testing.assert_close(state[name], once[name])


def test_dropout_differs_between_members_and_leaves_the_generators_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    held = spec(nets.with_dropout)
    state = train_members(held, Members(torch.ones(2, 40), [3, 3]))
    assert torch.equal(torch.rand(3), expected)
    assert not torch.allclose(state["0.weight"][0], state["0.weight"][1]), "both members had the same masks"
    again = train_members(held, Members(torch.ones(2, 40), [3, 3]))
    assert torch.equal(state["0.weight"], again["0.weight"])
    got = train_ensemble(held, Members(torch.ones(2, 40), [3, 3]))
    assert torch.equal(got.logits(held.inputs), got.logits(held.inputs)), "dropout is on in evaluation"


def test_members_begin_where_they_are_told() -> None:
    held = spec(steps=10)
    first = train_ensemble(held, Members(torch.ones(3, 40), range(3)))
    still = train_members(spec(steps=1, lr=1e-30), Members(torch.ones(3, 40), range(3), first.state))
    for name, value in still.items():
        torch.testing.assert_close(value, first.state[name])
    kept = first.state["0.weight"].clone()
    train_members(held, Members(torch.ones(3, 40), range(3), first.state))
    assert torch.equal(first.state["0.weight"], kept), "the start was written to"


def test_a_killed_run_goes_on_with_the_next_chunk(tmp_path: Path) -> None:
    held, members = spec(steps=4), Members(subsets(5, 40), range(5))
    expected = train_ensemble(held, members, chunk=2)
    calls: list[tuple[int, int]] = []

    def stop_in_the_second_chunk(done: int, total: int) -> None:
        calls.append((done, total))
        if done > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_ensemble(held, members, chunk=2, folder=tmp_path, progress=stop_in_the_second_chunk)
    assert calls == [(2, 20), (4, 20), (6, 20), (8, 20), (10, 20), (12, 20)]
    (first,) = tmp_path.glob("*.safetensors")
    stamp = first.stat().st_mtime_ns
    calls.clear()
    got = train_ensemble(held, members, chunk=2, folder=tmp_path, progress=lambda *at: calls.append(at))
    assert calls[0] == (8, 20)
    assert calls[-1] == (20, 20)
    assert len(calls) == 1 + 4 + 4
    assert first.stat().st_mtime_ns == stamp
    assert all(torch.equal(got.state[k], expected.state[k]) for k in expected.state)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def scaled_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return 0.5 * cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize(
    "change",
    [
        lambda s, m: (replace(s, training=Training(steps=3, batch=16, lr=0.06)), m),
        lambda s, m: (replace(s, inputs=s.inputs + 1e-9), m),
        lambda s, m: (replace(s, targets=(s.targets + 1) % 3), m),
        lambda s, m: (replace(s, model=nets.other_activation), m),
        lambda s, m: (replace(s, loss=scaled_loss), m),
        lambda s, m: (s, Members(m.weights.flip(0), m.seeds)),
        lambda s, m: (s, Members(m.weights, [0, 2])),
        lambda s, m: (s, Members(m.weights, m.seeds, {"first.bias": torch.ones(2, 7)})),
    ],
)
def test_whatever_makes_another_result_makes_another_key(tmp_path: Path, change) -> None:
    held, members = spec(nets.one_activation, steps=3), Members(subsets(2, 40), [0, 1])
    before = train_ensemble(held, members, folder=tmp_path)
    after = train_ensemble(*change(held, members), folder=tmp_path)
    assert not torch.equal(before.state["first.weight"], after.state["first.weight"])
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_logits_losses_and_margins_are_those_of_the_members() -> None:
    held = spec(nets.convolutional, 24)
    x, y = nets.images(23, seed=9)
    got = train_ensemble(held, Members(torch.ones(3, 24), range(3)), chunk=2)
    logits = got.logits(x, rows=10)
    assert logits.shape == (3, 23, 3)
    model = nets.convolutional().eval()
    for i in range(3):
        model.load_state_dict(got.member(i))
        with torch.no_grad():
            scores = model(x)
        torch.testing.assert_close(logits[i], scores)
        p = scores.softmax(-1).gather(1, y[:, None])[:, 0]
        torch.testing.assert_close(got.margins(x, y, rows=10)[i], p.log() - (1 - p).log())
        torch.testing.assert_close(got.losses(x, y, rows=10)[i], -p.log())


def test_margins_do_not_saturate() -> None:
    scores = torch.tensor([[40.0, 0.0, 0.0], [-50.0, 60.0, 0.0]])
    expected = torch.tensor([40 - torch.log(torch.tensor(2.0, dtype=torch.float64)), -110.0], dtype=torch.float64)
    torch.testing.assert_close(margins(scores, torch.tensor([0, 0])), expected)
    with pytest.raises(InputError, match="two classes"):
        margins(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))
    with pytest.raises(InputError, match="found 0 to 3"):
        margins(scores, torch.tensor([0, 3]))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: (spec(nets.tracked_norm), Members(torch.ones(2, 40), [0, 1])), "GroupNorm, or track_running_stats=False"),
        (lambda: (spec(nets.untracked_norm), Members(subsets(2, 40), [0, 1])), "rows of weight 0 would still be learnt"),
        (lambda: (spec(), Members(torch.ones(2, 39), [0, 1])), r"shape \[2, 40\]"),
        (lambda: (spec(), Members(torch.ones(2, 40), [0])), r"shape \[1, 40\]"),
        (lambda: (spec(), Members(torch.eye(2, 40) * -1, [0, 1])), "not negative"),
        (lambda: (spec(), Members(torch.eye(2, 40)[:1].repeat(2, 1) * torch.tensor([[1.0], [0.0]]), [0, 1])), "Member 1"),
        (lambda: (spec(), Members(torch.ones(1, 40), [-1])), "Seeds"),
        (lambda: (spec(), Members(torch.ones(1, 40), [0], {"9.weight": torch.ones(1, 2)})), "no such name"),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(make, said) -> None:
    with pytest.raises(InputError, match=said):
        train_ensemble(*make())


def test_not_a_number_in_the_inputs_names_the_row() -> None:
    held = spec()
    held.inputs[11, 2] = float("nan")
    with pytest.raises(InputError, match="Row 11"):
        train_ensemble(held, Members(torch.ones(1, 40), [0]))


def test_settings_that_nothing_reads_are_refused() -> None:
    with pytest.raises(InputError, match="Momentum is a parameter of sgd"):
        Training(steps=1, batch=1, lr=0.1, momentum=0.9)
    with pytest.raises(InputError, match="address"):
        train_ensemble(spec(), Members(torch.ones(1, 40), [0]), address="auto")


def test_untracked_batch_norm_serves_streams_of_their_own() -> None:
    state = train_members(spec(nets.untracked_norm, stream="own"), Members(subsets(2, 40), [0, 1]))
    assert torch.isfinite(state["0.weight"]).all()


def test_a_member_that_explodes_is_named() -> None:
    held = spec(optimizer="sgd", lr=1e308)
    with pytest.raises(Destroyed, match="seed 4"):
        train_ensemble(held, Members(torch.ones(1, 40), [4]))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # an import of it fails as if it were not there
    with pytest.raises(MissingExtra, match=r"expunge\[ray\]"):
        train_ensemble(spec(), Members(torch.ones(1, 40), [0]), workers="ray")


@pytest.mark.distributed
def test_results_do_not_depend_on_where_they_ran(tmp_path: Path) -> None:
    import ray

    root = str(Path(__file__).resolve().parents[2])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path_with(root)}})
    try:
        held, members = spec(), Members(subsets(5, 40), range(5))
        calls: list[tuple[int, int]] = []
        far = train_ensemble(held, members, chunk=2, folder=tmp_path, workers="ray", progress=lambda *at: calls.append(at))
        assert ray.is_initialized(), "a cluster that was there before is left as it is"
    finally:
        ray.shutdown()
    near = train_ensemble(held, members, chunk=2)
    assert calls[-1] == (125, 125)
    assert len(calls) == 3
    assert all(torch.equal(far.state[k], near.state[k]) for k in near.state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train_members", None)  # nothing is trained again
        found = train_ensemble(held, members, chunk=2, folder=tmp_path)
    assert all(torch.equal(found.state[k], near.state[k]) for k in near.state)


def path_with(root: str) -> str:
    return os.pathsep.join([root, *(p for p in sys.path if p)])
