"""Gradient restriction in training (IAU): against autograd by hand, and that rows then pull less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from expunge.engine.ensemble import train_ensemble
from expunge.engine.importance import gradient_norms
from expunge.engine.members import Members, Spec, Training
from tests.digits import network


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def by_hand(model: nn.Module, x: Tensor, y: Tensor, alpha: float) -> list[Tensor]:
    parameters = list(model.parameters())
    loss = cross_entropy(model(x), y)
    norms = [g.norm() for g in torch.autograd.grad(loss, parameters, create_graph=True)]
    return list(torch.autograd.grad(loss + alpha * torch.stack(norms).sum(), parameters))


def test_a_step_is_that_of_the_loss_and_the_norms_of_its_gradients_for_every_member() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.randint(0, 3, (12,))
    alpha, lr, seeds = 0.7, 0.1, (3, 4)
    training = Training(steps=1, batch=12, lr=lr, optimizer="sgd", restriction=alpha)
    found = train_ensemble(Spec(small, x, y, training), Members(torch.ones(2, 12), seeds))
    for i, seed in enumerate(seeds):
        torch.manual_seed(seed)
        model = small()
        wanted = [p.detach() - lr * g for p, g in zip(model.parameters(), by_hand(model, x, y, alpha), strict=True)]
        held = found.member(i)
        for (name, _), value in zip(model.named_parameters(), wanted, strict=True):
            torch.testing.assert_close(held[name], value, rtol=0, atol=1e-12)


def test_at_equal_loss_rows_pull_less_where_it_was_restricted(digits) -> None:
    """Not at equal steps: a restricted training fits more slowly, and its rows pull more as long as their loss is higher."""
    data = digits.tables[0]
    x, y = torch.from_numpy(data.inputs), torch.from_numpy(data.targets)
    pull, right = {}, {}
    for alpha in (0.0, 0.5):
        training = Training(steps=400, batch=100, lr=3e-3, restriction=alpha)
        held = train_ensemble(Spec(network, x, y, training), Members(torch.ones(1, len(x)), (0,)))
        model = network()
        model.load_state_dict(held.member(0))
        with torch.no_grad():
            scores = model(x)
        pull[alpha] = float(gradient_norms(model, x, y).detach().mean() / cross_entropy(scores, y))
        right[alpha] = float((scores.argmax(1) == y).float().mean())
    assert pull[0.5] < 0.7 * pull[0.0]
    assert right[0.5] > right[0.0] - 0.03


def test_a_row_that_is_learnt_has_no_slope_and_stays_finite() -> None:
    x, y = torch.zeros(4, 5, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)  # no gradient at the first layer's weights
    training = Training(steps=3, batch=4, lr=0.1, restriction=1.0)
    found = train_ensemble(Spec(small, x, y, training), Members(torch.ones(1, 4), (0,)))
    assert all(bool(torch.isfinite(v).all()) for v in found.state.values())


def test_a_negative_restriction_is_refused() -> None:
    with pytest.raises(Exception, match="restriction"):
        Training(steps=1, batch=1, lr=1, restriction=-1)
