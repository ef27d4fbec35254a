"""Curvature products are the matrices of their definitions, and solvers invert them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from expunge.core.errors import InputError
from expunge.engine.functional import flatten, moving, squared_loss, unflatten
from expunge.engine.importance import per_example_gradients
from expunge.engine.solve import (
    conjugate_gradient,
    empirical_fisher_product,
    empirical_fisher_solve,
    exact_hessian,
    gauss_newton_product,
    hessian_product,
    hessian_solve,
    published_woodfisher,
    woodbury_solve,
)
from tests.engine import nets


@pytest.fixture
def small():
    """A perceptron of 66 weights, batches of different sizes, and its gradients per row [12, p]."""
    torch.manual_seed(2)
    model = nets.perceptron().train()
    x, y = nets.rows(12)
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    return model, batches, flatten(per_example_gradients(model, x, y), rows=True)


def matrix(product, size: int) -> torch.Tensor:
    return torch.stack([product(unit) for unit in torch.eye(size, dtype=torch.float64)], dim=1)


def autograd_hessian(model, batches) -> torch.Tensor:
    """By differentiating every entry of the gradient."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    weights = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        loss = cross_entropy(model(x), y)
    gradient = torch.autograd.grad(loss, weights, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    rows = [torch.autograd.grad(g, weights, retain_graph=True) for g in flat]
    return torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])


@pytest.fixture
def convolutional():
    torch.manual_seed(2)
    model, (x, y) = nets.convolutional(), nets.images(7)
    return model, [(x[:3], y[:3]), (x[3:], y[3:])], flatten(per_example_gradients(model, x, y), rows=True)


@pytest.fixture
def attention():
    torch.manual_seed(2)
    model, (x, y) = nets.attention(), nets.rows(7)
    return model, [(x[:3], y[:3]), (x[3:], y[3:])], flatten(per_example_gradients(model, x, y), rows=True)


@pytest.mark.parametrize("case", ["small", "convolutional", "attention"])
def test_products_are_their_definitions(case, request) -> None:
    model, batches, gradients = request.getfixturevalue(case)
    size = gradients.shape[1]
    hessian = autograd_hessian(model, batches)
    torch.testing.assert_close(matrix(hessian_product(model, batches), size), hessian)
    torch.testing.assert_close(exact_hessian(model, batches), hessian)
    fisher = gradients.T @ gradients / len(gradients)
    torch.testing.assert_close(matrix(empirical_fisher_product(model, batches), size), fisher, atol=1e-7, rtol=1e-5)


def test_a_single_precision_model_gets_its_hessian_in_double_precision(small) -> None:
    model, batches, _ = small
    single = [(x.float(), y) for x, y in batches]
    found = exact_hessian(model.float(), single)
    assert next(model.parameters()).dtype == torch.float32
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, autograd_hessian(model.double(), [(x.double(), y) for x, y in single]))


def test_the_gauss_newton_matrix_is_the_fisher_information_and_not_negative(small) -> None:
    model, batches, gradients = small
    x = torch.cat([b[0] for b in batches])
    p = model(x).softmax(-1).detach()
    expected = torch.zeros(gradients.shape[1], gradients.shape[1], dtype=torch.float64)
    for label in range(3):
        g = flatten(per_example_gradients(model, x, torch.full((12,), label)), rows=True)
        expected += (g * p[:, label : label + 1]).T @ g / 12
    found = matrix(gauss_newton_product(model, batches), gradients.shape[1])
    torch.testing.assert_close(found, expected)
    assert torch.linalg.eigvalsh(found)[0] > -1e-12
    assert torch.linalg.eigvalsh(exact_hessian(model, batches))[0] < -1e-4, "the example has no negative curvature"


def test_the_hessian_of_logistic_regression_is_the_closed_form() -> None:
    torch.manual_seed(3)
    model = nets.logistic()
    x, y = nets.rows(30)
    p = model(x).softmax(-1).detach()
    ones = torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1)
    blocks = torch.einsum("nc,ncd,ni,nj->cidj", torch.ones_like(p), torch.diag_embed(p) - p[:, :, None] * p[:, None], ones, ones)
    blocks /= 30
    weight = blocks[:, :5, :, :5].reshape(15, 15)
    mixed = blocks[:, :5, :, 5].reshape(15, 3)
    expected = torch.cat([torch.cat([weight, mixed], 1), torch.cat([mixed.T, blocks[:, 5, :, 5]], 1)])
    found = exact_hessian(model, [(x, y)])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(matrix(gauss_newton_product(model, [(x, y)]), 18), expected)


def test_one_newton_step_solves_least_squares() -> None:
    """The sign, the scale and the order of the weights: w - H^-1 g is the closed-form solution."""
    torch.manual_seed(4)
    model = nn.Linear(5, 1).double()
    x, _ = nets.rows(30)
    wanted = torch.randn(30, 1, dtype=torch.float64)
    gradient = flatten({n: g.mean(0) for n, g in per_example_gradients(model, x, wanted, loss=squared_loss).items()})
    solution = conjugate_gradient(hessian_product(model, [(x, wanted)], loss=squared_loss), gradient, tolerance=1e-12)
    assert solution.converged
    weights = moving(model)
    step = unflatten(flatten(weights) - solution.vector, weights)
    ones = torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(ones, wanted).solution.flatten()
    torch.testing.assert_close(torch.cat([step["weight"].flatten(), step["bias"]]), best)


def test_conjugate_gradients_solve(small) -> None:
    model, batches, gradients = small
    vector = torch.randn(gradients.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    damped = exact_hessian(model, batches) + 1.0 * torch.eye(len(vector), dtype=torch.float64)
    expected = torch.linalg.solve(damped, vector)
    solution = conjugate_gradient(hessian_product(model, batches), vector, damping=1.0, tolerance=1e-10)
    torch.testing.assert_close(solution.vector, expected, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(hessian_solve(exact_hessian(model, batches), vector, damping=1.0), expected)
    assert solution.converged
    assert solution.residual <= 1e-10
    rough = conjugate_gradient(hessian_product(model, batches), vector, damping=1.0, tolerance=1e-2)
    assert rough.steps < solution.steps
    true = float((damped @ rough.vector - vector).norm() / vector.norm())
    assert abs(true - rough.residual) < 1e-6
    short = conjugate_gradient(hessian_product(model, batches), vector, damping=1.0, tolerance=1e-10, steps=2)
    assert (short.steps, short.converged) == (2, False)
    assert conjugate_gradient(hessian_product(model, batches), 0 * vector).converged


def test_negative_curvature_is_told_with_the_damping_that_helps(small) -> None:
    model, batches, gradients = small
    vector = torch.randn(gradients.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="not positive definite"):
        conjugate_gradient(hessian_product(model, batches), vector, tolerance=1e-12, steps=500)
    with pytest.raises(InputError, match="smallest eigenvalue is -"):
        hessian_solve(exact_hessian(model, batches), vector)


def recursion(gradients: torch.Tensor, damping: float) -> torch.Tensor:
    """WoodFisher's inverse as stated, with the whole matrix."""
    inverse = torch.eye(gradients.shape[1], dtype=torch.float64) / damping
    for g in gradients:
        image = inverse @ g
        inverse = inverse - torch.outer(image, image) / (len(gradients) + g @ image)
    return inverse


@pytest.mark.parametrize("damping", [1.0, 0.01])
def test_the_low_rank_inverse_is_the_stated_recursion(small, damping) -> None:
    model, batches, gradients = small
    vector = torch.randn(gradients.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = recursion(gradients, damping) @ vector
    torch.testing.assert_close(woodbury_solve(gradients, vector, damping=damping), expected)
    torch.testing.assert_close(empirical_fisher_solve(model, batches, vector, damping=damping), expected)
    streamed = empirical_fisher_solve(model, batches, vector, damping=damping, memory=0, tolerance=1e-11)
    torch.testing.assert_close(streamed, expected, atol=1e-7, rtol=1e-6)
    assert not torch.allclose(expected, vector / damping, rtol=1e-2), "the gradients change nothing"


def test_the_published_recursion_is_another_one() -> None:
    draw = torch.Generator().manual_seed(0)
    vector, g = torch.randn(2, 20, dtype=torch.float64, generator=draw)
    assert torch.equal(published_woodfisher([g], vector, count=10), vector), "one gradient alone changes nothing"
    twice = published_woodfisher([g, g], vector, count=10)
    torch.testing.assert_close(twice, vector - (vector @ g) / (10 + g @ g) * g)
    gradients = torch.randn(10, 20, dtype=torch.float64, generator=draw)
    found = published_woodfisher(gradients, vector, count=10)
    assert torch.linalg.matrix_rank(torch.stack([found, vector, gradients[0]])) == 2
    assert not torch.allclose(found, woodbury_solve(gradients, vector), rtol=0.05)


def test_the_model_is_left_as_it_was(small) -> None:
    model, batches, gradients = small
    before = {n: p.clone() for n, p in model.state_dict().items()}
    model.zero_grad()
    hessian_product(model, batches)(gradients[0])
    empirical_fisher_solve(model, batches, gradients[0], memory=0)
    exact_hessian(model, batches)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m, b, v: hessian_product(m, []), "no batches"),
        (lambda m, b, v: hessian_product(m, b)(v[:3]), r"shape \[3\]"),
        (lambda m, b, v: conjugate_gradient(lambda u: u, v, damping=-1.0), "damping in"),
        (lambda m, b, v: woodbury_solve(v[None], v, damping=0.0), "damping of a low-rank"),
        (lambda m, b, v: woodbury_solve(v[None, :3], v), r"\[N, p\]"),
        (lambda m, b, v: exact_hessian(m, b, most=10), "not computed"),
        (lambda m, b, v: published_woodfisher([], v, count=3), "at least one gradient"),
        (lambda m, b, v: empirical_fisher_solve(m, b, v, damping=1e-9, memory=0, tolerance=1e-14), "is left"),
    ],
)
def test_bad_input(small, make, said) -> None:
    model, batches, gradients = small
    with pytest.raises(InputError, match=said):
        make(model, batches, gradients[0] + 1)
