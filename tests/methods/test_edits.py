"""Edits: the checks that a right implementation must pass, on a network that knows handwritten digits, and on text."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.digits import QUIET, accuracy, encoded
from torch import nn

from expunge.adapters.supervised import ClassifierAdapter, RegressionAdapter
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.data.rows import table
from expunge.engine.edit import apply_edit
from expunge.engine.gradients import batch_importance, mean_gradient
from expunge.methods.edits.curvature import Fisher, Influence
from expunge.methods.edits.dampening import SSD, dampen
from expunge.methods.edits.influence_step import IAU
from expunge.methods.edits.registry import EDITS


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def accuracies(digits, adapter) -> tuple[float, float, float, float]:
    (forget, retain), (unseen_forget, unseen_retain) = digits.split(), digits.split(1)
    return tuple(accuracy(adapter, r) for r in (forget, unseen_forget, retain, unseen_retain))


def loss(adapter, rows) -> float:
    batch = adapter.collate(encoded(adapter, rows))
    with torch.no_grad():
        return float(adapter.forward(adapter.model, batch, frozenset({"losses"})).losses.mean())


@pytest.mark.parametrize("name", EDITS.names())
def test_every_edit_is_documented_and_changes_a_classifier(digits, name) -> None:
    kind = EDITS.get(name)
    assert len(kind.__doc__) > 200
    assert kind.title
    assert kind.formula
    assert kind.caveats
    assert kind.paper.url.startswith("https://arxiv.org/")
    assert all(p.text for p in kind.declared())
    adapter = digits.target()
    before = state(adapter.model)
    outcome = apply_edit(adapter, kind(), digits.examples(adapter), QUIET)
    assert outcome.reached
    assert outcome.reason == "edited"
    assert any(not torch.equal(before[k], v) for k, v in state(adapter.model).items())
    if Stream.FORGET in kind.streams:
        assert loss(adapter, digits.split()[0]) > loss(digits.target(), digits.split()[0])


@pytest.mark.parametrize("alpha", [5, 10])
def test_ssd_forgets_the_class_and_shrinks_only_what_it_chose(digits, alpha) -> None:
    adapter = digits.target()
    before = state(adapter.model)
    streams = digits.examples(adapter)
    apply_edit(adapter, SSD(alpha=alpha), streams, QUIET)
    forget, unseen_forget, retain, unseen_retain = accuracies(digits, adapter)
    assert max(forget, unseen_forget) < 0.05
    assert min(retain, unseen_retain) > 0.85
    after = state(adapter.model)
    assert all((after[k].abs() <= before[k].abs()).all() for k in before)
    changed = sum(int((after[k] != before[k]).sum()) for k in before)
    assert 0.05 < changed / sum(v.numel() for v in before.values()) < 0.4


def test_ssd_leaves_bit_for_bit_what_it_did_not_choose() -> None:
    g = torch.Generator().manual_seed(0)
    weight, forget, everything = (torch.rand(200, generator=g) for _ in range(3))
    forget[:5] = 0
    made = dampen(weight, forget, everything, alpha=2.0, dampening=0.5)
    chosen = forget > 2 * everything
    assert chosen.any()
    assert torch.equal(made[~chosen], weight[~chosen])
    torch.testing.assert_close(made[chosen], weight[chosen] * 0.5 * everything[chosen] / forget[chosen])
    assert torch.equal(dampen(weight, forget, everything, alpha=1e30, dampening=1.0), weight)
    assert torch.equal(dampen(weight, forget, everything, alpha=0.0, dampening=1e30), weight)  # never grows
    assert torch.isfinite(dampen(weight, torch.zeros(200), torch.zeros(200), 1.0, 1.0)).all()


def test_ssd_with_the_sets_exchanged_damages_and_does_not_forget(digits) -> None:
    adapter = digits.target()
    streams = digits.examples(adapter)
    forget, everything = streams[Stream.FORGET], [*streams[Stream.FORGET], *streams[Stream.RETAIN]]
    importance = [batch_importance(adapter, held, batch=64) for held in (everything, forget)]
    with torch.no_grad():
        for name, p in adapter.model.named_parameters():
            p.copy_(dampen(p, importance[0][name], importance[1][name], 10.0, 1.0))
    known, _, retain, _ = accuracies(digits, adapter)
    assert known > 0.9
    assert retain < 0.85


def test_lfssd_forgets_without_a_label(digits) -> None:
    found = []
    for labels in ("own", "wrong"):
        adapter = digits.target()
        streams = digits.examples(adapter)
        if labels == "wrong":
            rows = digits.split()
            streams = {
                stream: [adapter.encode(r, answer=(r.target + 3) % 10) for r in held]
                for stream, held in zip((Stream.FORGET, Stream.RETAIN), rows, strict=True)
            }
        apply_edit(adapter, EDITS.get("lfssd")(alpha=5), streams, QUIET)
        found.append(state(adapter.model))
        forget, _, retain, unseen = accuracies(digits, adapter)
        assert forget < 0.05
        assert min(retain, unseen) > 0.9
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])  # no label was read


def test_iau_is_a_sign_step_or_a_gradient_step(digits) -> None:
    adapter = digits.target()
    streams = digits.examples(adapter)
    before = state(adapter.model)
    g = {n: -v for n, v in mean_gradient(adapter, streams[Stream.FORGET], 64).items()}
    for name, value in mean_gradient(adapter, streams[Stream.RETAIN], 10**6).items():
        g[name] = g[name] + value
    for step, lr in (("adam", 5e-3), ("sgd", 0.5)):
        edited = digits.target()
        apply_edit(edited, IAU(step=step, lr=lr), streams, QUIET)
        for name, value in state(edited.model).items():
            delta = value - before[name]
            if step == "sgd":
                torch.testing.assert_close(delta, -lr * g[name], atol=1e-6, rtol=1e-3)
            else:
                clear = g[name].abs() > 1e-5
                torch.testing.assert_close(delta[clear], -lr * g[name][clear].sign(), atol=1e-5, rtol=1e-2)
    weakened = digits.target()
    apply_edit(weakened, IAU(lr=1e-2), streams, QUIET)
    forget, retain = digits.split()
    rise = [loss(weakened, rows) - loss(digits.target(), rows) for rows in (forget, retain)]
    assert rise[0] > 0.5
    assert rise[1] < rise[0] / 10
    flipped = digits.target()
    with torch.no_grad():
        for name, p in flipped.model.named_parameters():
            p.add_(5e-3 * g[name].sign())
    assert loss(flipped, forget) < loss(digits.target(), forget)


def test_gradients_of_a_set_equal_those_of_one_batch(digits) -> None:
    adapter = digits.target()
    rows = encoded(adapter, digits.split()[0][:7])
    pieces, whole = (mean_gradient(adapter, rows, units) for units in (2, 10**6))
    batch = adapter.collate(rows)
    value = adapter.forward(adapter.model, batch, frozenset({"losses"})).losses.mean()
    direct = torch.autograd.grad(value, list(adapter.model.parameters()))
    for ours, again, want in zip(pieces.values(), whole.values(), direct, strict=True):
        torch.testing.assert_close(ours, want, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(again, want, atol=1e-6, rtol=1e-4)


def test_importance_is_that_of_batch_means(digits) -> None:
    adapter = digits.target()
    rows = encoded(adapter, digits.split()[0][:5])
    for of, power in (("loss", "square"), ("norm", "absolute"), ("loss", "absolute")):
        got = batch_importance(adapter, rows, batch=2, of=of, power=power)
        want = [torch.zeros_like(p) for p in adapter.model.parameters()]
        for part in (rows[:2], rows[2:4], rows[4:]):
            out = adapter.forward(adapter.model, adapter.collate(part), frozenset({"losses", "logits"}))
            value = out.losses.mean() if of == "loss" else out.logits.square().sum(1).mean()
            for total, g in zip(want, torch.autograd.grad(value, list(adapter.model.parameters())), strict=True):
                total.add_((g.square() if power == "square" else g.abs()) / 3)
        for ours, expected in zip(got.values(), want, strict=True):
            torch.testing.assert_close(ours, expected)


def test_edits_run_on_text_too(people_world) -> None:
    adapter = people_world.target()
    split = people_world.split
    streams = {Stream.FORGET: [adapter.encode(r) for r in split.forget], Stream.RETAIN: [adapter.encode(r) for r in split.retain]}
    before = people_world.loss(adapter, split.forget), people_world.loss(adapter, split.retain)
    apply_edit(adapter, SSD(alpha=5), streams, QUIET)
    rise = people_world.loss(adapter, split.forget) - before[0], people_world.loss(adapter, split.retain) - before[1]
    assert rise[0] > 0.5
    assert rise[1] < rise[0] / 3


def test_fisher_noise_is_larger_where_the_retain_set_does_not_mind(digits) -> None:
    fisher = torch.tensor([0.0, 1e-6, 1e-2, 1.0])
    paper, official = Fisher(alpha=0.1).deviation(fisher), Fisher(alpha=1e-6, form="official").deviation(fisher)
    assert (paper.diff() < 0).all()
    torch.testing.assert_close(paper[1:], 0.1 * fisher[1:] ** -0.25, rtol=1e-2, atol=0)
    torch.testing.assert_close(official, torch.tensor([1e-3, 1e-3, 1e-4, 1e-6]).sqrt(), rtol=1e-4, atol=0)
    streams = digits.examples(digits.target())
    found = {}
    for alpha in (0.0, 1e-3, 5e-3, 1.0):
        adapter = digits.target()
        apply_edit(adapter, Fisher(alpha=alpha), {Stream.RETAIN: streams[Stream.RETAIN]}, QUIET)
        found[alpha] = accuracy(adapter, digits.split()[1])
        if alpha == 0:
            assert all(torch.equal(v, state(digits.target().model)[k]) for k, v in state(adapter.model).items())
    assert found[1e-3] > 0.98
    assert found[0.0] >= found[5e-3] > found[1.0]
    assert found[1.0] < 0.3


def test_fisher_draws_one_class_for_each_row_where_there_are_many(digits) -> None:
    def moved(adapter, streams, labels: str) -> torch.Tensor:
        before = torch.cat([p.detach().flatten() for p in adapter.model.parameters()])
        made = Fisher(alpha=1e-3, labels=labels).weights(adapter, {Stream.RETAIN: streams}, QUIET, None)
        return torch.cat([made[n].flatten() for n, _ in adapter.model.named_parameters()]) - before

    adapter = digits.target()
    rows = digits.examples(adapter)[Stream.RETAIN]
    exact, drawn = moved(adapter, rows, "all"), moved(adapter, rows, "drawn")
    assert torch.equal(moved(adapter, rows, "auto"), exact)
    larger = drawn.abs() / exact.abs()  # the noise is the same, its size is an estimate
    assert 0.8 < float(larger[exact != 0].median()) < 1.25
    assert not torch.equal(drawn, exact)
    torch.manual_seed(0)
    many = ClassifierAdapter(nn.Sequential(nn.Linear(64, 40)), tuple(map(str, range(40))))
    assert torch.equal(moved(many, rows[:50], "auto"), moved(many, rows[:50], "drawn"))


def linear_world(task: str):
    """Rows of a linear model in float64, a tenth of them to be forgotten, and their inputs and targets as tensors."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(200, 6))
    targets = inputs @ rng.normal(size=6) + 0.5 * rng.normal(size=200)
    if task == "classification":
        targets = (targets > 0).astype(int)
    held = table(inputs, targets, task=task, precision="float64")
    return held, torch.from_numpy(inputs), torch.from_numpy(np.asarray(targets))


def test_influence_on_least_squares_is_retraining() -> None:
    held, x, y = linear_world("regression")
    adapter = RegressionAdapter(nn.Sequential(nn.Linear(6, 1, bias=False)).double(), "mse")
    whole, without = (torch.linalg.lstsq(x[a:], y[a:, None]).solution.T for a in (0, 20))
    streams = {Stream.FORGET: encoded(adapter, held.rows(range(20))), Stream.RETAIN: encoded(adapter, held.rows(range(20, 200)))}
    exact = {"curvature": "hessian", "damping": 0.0, "tolerance": 1e-12}
    for sign in (1, -1):
        with torch.no_grad():
            adapter.model[0].weight.copy_(whole)
        made = Influence(**exact).weights(adapter, streams, QUIET, None)["0.weight"]
        moved = whole + sign * (made - whole)
        if sign == 1:
            torch.testing.assert_close(moved, without, rtol=1e-9, atol=1e-10)
        else:
            assert (moved - without).norm() > 1.9 * (whole - without).norm()


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_influence_on_logistic_regression_is_the_newton_step(curvature) -> None:
    held, x, y = linear_world("classification")
    adapter = ClassifierAdapter(nn.Sequential(nn.Linear(6, 2, bias=False)).double(), ["a", "b"])
    ridge = 1e-2

    def fitted(rows: slice) -> torch.Tensor:
        weight = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS(
            [weight], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
        )

        def closure() -> torch.Tensor:
            solver.zero_grad()
            value = torch.nn.functional.cross_entropy(x[rows] @ weight.T, y[rows]) + ridge / 2 * weight.square().sum()
            value.backward()
            return value

        solver.step(closure)
        return weight.detach()

    whole, without = fitted(slice(0, 200)), fitted(slice(20, 200))
    with torch.no_grad():
        adapter.model[0].weight.copy_(whole)
    streams = {Stream.FORGET: encoded(adapter, held.rows(range(20))), Stream.RETAIN: encoded(adapter, held.rows(range(20, 200)))}
    edit = Influence(curvature=curvature, damping=ridge, tolerance=1e-12)
    made = edit.weights(adapter, streams, QUIET, None)["0.weight"]
    assert (made - without).norm() < 0.1 * (whole - without).norm()

    # The Newton step of certified removal: the gradient of what stays, through the Hessian of what stays.
    flat = whole.flatten().requires_grad_()

    def objective(w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(x[20:] @ w.view(2, 6).T, y[20:]) + ridge / 2 * w.square().sum()

    hessian = torch.autograd.functional.hessian(objective, flat)
    gradient = torch.autograd.grad(objective(flat), flat)[0]
    torch.testing.assert_close(made.flatten(), (flat - torch.linalg.solve(hessian, gradient)).detach(), rtol=1e-6, atol=1e-8)


def test_influence_forgets_a_class(digits) -> None:
    for settings in ({"alpha": 10.0}, {"damping": 0.01}):
        adapter = digits.target()
        apply_edit(adapter, Influence(**settings), digits.examples(adapter), QUIET)
        forget, _, retain, unseen = accuracies(digits, adapter)
        assert forget < 0.3
        assert min(retain, unseen) > 0.9


@pytest.mark.parametrize("name", EDITS.names())
def test_a_frozen_part_keeps_its_value(digits, name) -> None:
    adapter = digits.target()
    adapter.model[0].requires_grad_(False)
    before = state(adapter.model)
    apply_edit(adapter, EDITS.get(name)(), digits.examples(adapter), QUIET)
    assert torch.equal(adapter.model[0].weight, before["0.weight"])
    assert not torch.equal(adapter.model[2].weight, before["2.weight"])


def test_what_is_missing_or_ruins_the_model_is_refused(digits) -> None:
    adapter = digits.target()
    streams = digits.examples(adapter)
    before = copy.deepcopy(state(adapter.model))
    with pytest.raises(InputError, match="retain examples"):
        apply_edit(adapter, SSD(), {Stream.FORGET: streams[Stream.FORGET]}, QUIET)
    with pytest.raises(InputError, match="infinite or NaN"):
        apply_edit(adapter, IAU(lr=1e39), streams, QUIET)
    regressor = RegressionAdapter(nn.Sequential(nn.Linear(64, 1)))
    with pytest.raises(InputError, match="logits"):
        apply_edit(regressor, EDITS.get("lfssd")(), {}, QUIET)
    assert all(torch.equal(before[k], v) for k, v in state(adapter.model).items())
    assert isinstance(adapter, ClassifierAdapter)
