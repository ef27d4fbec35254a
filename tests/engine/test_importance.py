"""Gradients per row are those of a loop, importances those of their definitions on five rows, Fisher that of a logistic model."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from expunge.core.errors import InputError
from expunge.engine.functional import squared_loss
from expunge.engine.importance import _fisher_factor, diagonal_importance, gradient_norms, per_example_gradients
from tests.engine import nets


def loop(model, loss, *inputs) -> list[dict[str, torch.Tensor]]:
    """The gradient of ``loss(outputs, ...)`` of one row after the other."""
    out = []
    for row in zip(*(i.split(1) for i in inputs), strict=True):
        model.zero_grad()
        loss(model(row[0]), *row[1:]).backward()
        out.append({n: p.grad.clone() for n, p in model.named_parameters()})
    return out


def mean_of(gradients, power) -> dict[str, torch.Tensor]:
    return {n: torch.stack([power(g[n]) for g in gradients]).mean(0) for n in gradients[0]}


def same(found, expected, **tolerance) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance)
        assert value.abs().max() > 1e-6, "the reference is zero"


def case(kind):
    """Model, inputs, targets; in training mode, with dropout that must be off."""
    torch.manual_seed(0)
    if kind == "attention":
        return nets.attention(), *nets.rows(5)
    if kind == "images":
        return nets.convolutional().train(), *nets.images(5)
    return nets.with_dropout().train(), *nets.rows(5)


def plain_loop(model, x, y):
    model.eval()
    held = loop(model, cross_entropy, x, y)
    model.train()
    return held


@pytest.mark.parametrize("kind", ["rows", "images", "attention"])
@pytest.mark.parametrize("chunk", [None, 2, 1])
def test_gradients_per_row_are_those_of_a_loop(kind, chunk) -> None:
    model, x, y = case(kind)
    expected = plain_loop(model, x, y)
    found = per_example_gradients(model, x, y, chunk=chunk)
    same(found, {n: torch.stack([g[n] for g in expected]) for n in expected[0]})
    norms = gradient_norms(model, x, y, chunk=chunk)
    torch.testing.assert_close(norms, torch.stack([torch.cat([v.flatten() for v in g.values()]).norm() for g in expected]))
    assert all(m.training for m in model.modules()), "the mode was changed"


def test_a_forward_pass_that_decides_by_values_is_told_and_served_one_row_at_a_time() -> None:
    torch.manual_seed(0)
    model, (x, y) = nets.Attention(look=True), nets.rows(5)
    with pytest.raises(InputError, match="chunk=1"):
        gradient_norms(model, x, y)
    expected = plain_loop(model, x, y)
    same(per_example_gradients(model, x, y, chunk=1), {n: torch.stack([g[n] for g in expected]) for n in expected[0]})
    found = diagonal_importance(model, [(x, None)], estimator="sample", labels="model", chunk=1)
    same(found, brute_fisher(model, x))


def test_other_inputs_forwards_and_losses() -> None:
    """A mapping of tensors, a forward pass of one's own, a regression, a frozen layer."""
    torch.manual_seed(0)
    model = nets.perceptron()
    model[0].bias.requires_grad_(False)
    x, _ = nets.rows(5)
    wanted = torch.randn(5, 3, dtype=torch.float64)
    found = per_example_gradients(model, {"x": x, "scale": x[:, :1]}, wanted, lambda m, i: m(i["x"]) * i["scale"], squared_loss)
    assert list(found) == ["0.weight", "2.weight", "2.bias"]
    ((model(x[3:4]) * x[3:4, :1] - wanted[3:4]) ** 2).sum().backward()
    for name, value in found.items():
        torch.testing.assert_close(value[3], model.get_parameter(name).grad)


@pytest.mark.parametrize("kind", ["rows", "images"])
@pytest.mark.parametrize(("power", "change"), [("square", torch.square), ("absolute", torch.abs)])
def test_sample_importance_is_the_mean_over_rows(kind, power, change) -> None:
    model, x, y = case(kind)
    expected = mean_of(plain_loop(model, x, y), change)
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]  # of different sizes: every row counts the same
    same(diagonal_importance(model, batches, estimator="sample", power=power), expected)


@pytest.mark.parametrize(("power", "change"), [("square", torch.square), ("absolute", torch.abs)])
def test_batch_importance_is_that_of_mean_gradients(power, change) -> None:
    model, x, y = case("rows")
    rows = plain_loop(model, x, y)
    means = [{n: torch.stack([g[n] for g in part]).mean(0) for n in rows[0]} for part in (rows[:3], rows[3:])]
    found = diagonal_importance(model, [(x[:3], y[:3]), (x[3:], y[3:])], power=power)
    same(found, mean_of(means, change))
    sample = diagonal_importance(model, [(x, y)], estimator="sample", power=power)
    assert any(not torch.allclose(found[n], sample[n], rtol=0.1) for n in found), "the two estimators are not told apart"


def test_norm_importance_reads_no_label() -> None:
    model, x, _ = case("images")
    model.eval()
    rows = loop(model, lambda out: out.square().sum(), x)
    mean = {n: torch.stack([g[n] for g in rows]).mean(0).abs() for n in rows[0]}
    same(diagonal_importance(model, [(x, None)], labels="norm", power="absolute"), mean)
    same(diagonal_importance(model, [(x, None)], labels="norm", estimator="sample"), mean_of(rows, torch.square))


def brute_fisher(model, x) -> dict[str, torch.Tensor]:
    """The definition: every row, every label, its squared gradient times its probability."""
    model.eval()
    p = model(x).softmax(-1).detach()
    total = {n: torch.zeros_like(v) for n, v in model.named_parameters()}
    for label in range(p.shape[1]):
        for i, gradient in enumerate(loop(model, cross_entropy, x, torch.full((len(x),), label))):
            for n, g in gradient.items():
                total[n] += p[i, label] * g**2 / len(x)
    return total


@pytest.mark.parametrize("kind", ["rows", "images"])
def test_the_fisher_information_is_its_definition(kind) -> None:
    model, x, y = case(kind)
    expected = brute_fisher(model, x)
    same(diagonal_importance(model, [(x[:2], None), (x[2:], None)], estimator="sample", labels="model", chunk=2), expected)
    empirical = diagonal_importance(model, [(x, y)], estimator="sample")
    assert any(not torch.allclose(expected[n], empirical[n], rtol=0.1) for n in expected)


def test_the_fisher_information_of_a_logistic_model_is_the_closed_form() -> None:
    torch.manual_seed(1)
    model = nets.logistic()
    x, _ = nets.rows(30)
    p = model(x).softmax(-1).detach()
    spread = p * (1 - p)  # of label c: E_y (y_c - p_c)^2
    expected = {"weight": spread.T @ x**2 / 30, "bias": spread.mean(0)}
    same(diagonal_importance(model, [(x, None)], estimator="sample", labels="model"), expected)


def test_drawn_labels_estimate_the_fisher_information() -> None:
    torch.manual_seed(1)
    model = nets.logistic()
    x, _ = nets.rows(8)
    many = [(x.repeat(500, 1), None)]
    found = diagonal_importance(model, many, estimator="sample", labels="sampled", seed=3)
    exact = diagonal_importance(model, [(x, None)], estimator="sample", labels="model")
    for name in exact:
        torch.testing.assert_close(found[name], exact[name], rtol=0.15, atol=0.002)
    again = diagonal_importance(model, many, estimator="sample", labels="sampled", seed=3)
    other = diagonal_importance(model, many, estimator="sample", labels="sampled", seed=4)
    assert torch.equal(found["weight"], again["weight"])
    assert not torch.equal(found["weight"], other["weight"])


@hypothesis.given(st.lists(st.floats(-40, 40), min_size=2, max_size=7))
@hypothesis.settings(deadline=None, max_examples=60)
def test_the_directions_add_up_to_the_covariance_of_labels(scores) -> None:
    p = torch.tensor(scores, dtype=torch.float64).softmax(0)
    factor = _fisher_factor(p)
    assert factor.shape == (len(p), len(p) - 1)
    torch.testing.assert_close(factor @ factor.T, torch.diag(p) - torch.outer(p, p), rtol=1e-9, atol=1e-12)


def test_sums_of_half_precision_models_are_kept_in_single_precision() -> None:
    model = nn.Linear(3, 2).to(torch.bfloat16)
    x = torch.full((4, 3), 1e-2, dtype=torch.bfloat16)
    found = diagonal_importance(model, [(x, torch.tensor([0, 1, 0, 1]))] * 3, estimator="sample")
    assert all(v.dtype == torch.float32 and v.min() > 0 for v in found.values())


def test_a_part_weighs_at_most_its_share_by_rows_but_not_by_batches() -> None:
    """With n rows of which F are a tenth, mean squares over rows obey I_F <= 10 I_D everywhere; squares of means do not."""
    torch.manual_seed(0)
    model = nets.perceptron()
    x, y = nets.rows(400)
    order = torch.argsort((y == 2).double(), stable=True).flip(0)  # one class first
    x, y = x[order], y[order]
    part, whole = [(x[:40], y[:40])], [(a, b) for a, b in zip(x.split(40), y.split(40), strict=True)]
    by_row = [diagonal_importance(model, b, estimator="sample") for b in (part, whole)]
    by_batch = [diagonal_importance(model, b) for b in (part, [(x[i::10], y[i::10]) for i in range(10)])]
    assert all((by_row[0][n] <= 10 * by_row[1][n] * (1 + 1e-9)).all() for n in by_row[0])
    assert any((by_batch[0][n] > 10 * by_batch[1][n]).any() for n in by_batch[0])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m, x, y: diagonal_importance(m, []), "no batches"),
        (lambda m, x, y: diagonal_importance(m, [(x, None)]), "need targets"),
        (lambda m, x, y: diagonal_importance(m, [(x, y[:3])]), "5 rows of inputs and 3 targets"),
        (lambda m, x, y: diagonal_importance(m, [(x, y)], labels="model"), 'estimator="sample"'),
        (lambda m, x, y: diagonal_importance(m, [(x, y)], loss=squared_loss, labels="sampled"), "regression"),
        (
            lambda m, x, y: diagonal_importance(m, [(x, y)], lambda m, x: m(x)[:, :1], estimator="sample", labels="model"),
            "scores",
        ),
        (lambda m, x, y: per_example_gradients(m, x, y, chunk=None if m.requires_grad_(False) else 1), "no parameter"),
        (lambda m, x, y: gradient_norms(m, x, y[:2]), "targets"),
        (lambda m, x, y: gradient_norms(m, "text", y), "must be tensors"),
    ],
)
def test_bad_input(make, said) -> None:
    with pytest.raises(InputError, match=said):
        make(*case("rows"))
