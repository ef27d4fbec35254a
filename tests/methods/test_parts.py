"""What is done to gradients, coefficients and weights, and which parameters move."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from expunge.core.errors import InputError
from expunge.engine.balance import FixedBalance, PrimalDual
from expunge.engine.finish import Negate
from expunge.engine.gradient import ConflictProject, Plain, Project
from expunge.engine.parameters import LayerWindow, NamedParameters, block_index

close = torch.testing.assert_close
seeds = st.integers(0, 10_000)


def gradients(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (7,), (2, 2, 2)]
    return [torch.randn(s, generator=g) for s in shapes], [torch.randn(s, generator=g) for s in shapes]


def dot(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


# ---- gradients


@given(seed=seeds)
@settings(max_examples=50, deadline=None)
def test_projection_is_orthogonal_to_the_retain_gradient_and_still_forgets(seed: int):
    forget, retain = gradients(seed)
    combined = Project().combine(forget, retain, {})
    alone = [c - r for c, r in zip(combined, retain, strict=True)]
    norms = (dot(alone, alone) * dot(retain, retain)) ** 0.5
    assert abs(dot(alone, retain)) / norms < 1e-5
    assert dot(alone, forget) >= 0
    # the retain gradient itself passes through whole
    assert dot(combined, retain) == pytest.approx(dot(retain, retain), rel=1e-4)


@given(seed=seeds)
@settings(max_examples=50, deadline=None)
def test_surgery_is_the_sum_without_conflict_and_the_projection_with_it(seed: int):
    forget, retain = gradients(seed)
    other = Plain() if dot(forget, retain) >= 0 else Project()
    for a, b in zip(ConflictProject().combine(forget, retain, {}), other.combine(forget, retain, {}), strict=True):
        assert torch.equal(a, b)


def test_both_cases_of_surgery_occur():
    signs = {dot(*gradients(seed)) >= 0 for seed in range(20)}
    assert signs == {True, False}


@pytest.mark.parametrize("rule", [Plain(), Project(), ConflictProject()])
def test_no_retain_gradient_leaves_the_forget_gradient(rule):
    forget, retain = gradients(0)
    for a, b in zip(rule.combine(forget, [torch.zeros_like(r) for r in retain], {}), forget, strict=True):
        assert torch.equal(a, b)


def test_a_projected_step_changes_the_retain_loss_in_second_order_only():
    """Halving the step quarters the change of the retain loss; without projection it halves."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(20, generator=g, dtype=torch.float64)
    a, b = (torch.randn(20, 20, generator=g, dtype=torch.float64) for _ in range(2))

    def retain_loss(w):
        return (a @ w).tanh().square().sum()

    def forget_loss(w):
        return -(b @ w).sin().sum()

    w = start.clone().requires_grad_()
    (g_f,) = torch.autograd.grad(forget_loss(w), w)
    (g_r,) = torch.autograd.grad(retain_loss(w), w)
    projected = Project().combine([g_f], [g_r], {})[0] - g_r

    def change(direction, lr):
        return abs(float(retain_loss(start - lr * direction) - retain_loss(start)))

    assert change(projected, 1e-4) / change(projected, 5e-5) == pytest.approx(4, rel=0.05)
    assert change(g_f, 1e-4) / change(g_f, 5e-5) == pytest.approx(2, rel=0.05)


# ---- balance


def test_the_dual_variable_rises_while_the_constraint_is_broken_and_falls_to_zero_when_it_holds():
    rule = PrimalDual(initial=1.0, step=2.0, eps=0.5, warmup=0.0)
    state: dict[str, float] = {}
    assert rule.coefficients(state) == (1.0, 1.0)
    seen = []
    for _ in range(3):
        rule.update(state, 1.0, 0.0, 0.8)
        seen.append(rule.coefficients(state)[1])
    assert seen == pytest.approx([1.6, 2.2, 2.8])
    for _ in range(50):
        rule.update(state, 1.0, 0.0, 0.1)
    assert rule.coefficients(state) == (1.0, 0.0)


def test_the_dual_variable_rests_during_warm_up():
    rule, state = PrimalDual(warmup=5.0), {}
    rule.coefficients(state)
    rule.update(state, 4.9, 0.0, 9.0)
    assert rule.coefficients(state)[1] == 100.0
    rule.update(state, 5.0, 0.0, 9.0)
    assert rule.coefficients(state)[1] == pytest.approx(100.0 + 5.0 * 8.7)


def test_the_fixed_balance_never_moves():
    state: dict[str, float] = {}
    FixedBalance().update(state, 1.0, 5.0, 5.0)
    assert FixedBalance().coefficients(state) == (1.0, 1.0)


# ---- finish


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_negation_is_the_identity_at_zero_gives_the_trained_weights_at_minus_one_and_mirrors_at_one(dtype):
    before, after = torch.tensor([1.0, -2.0, 0.5], dtype=dtype), torch.tensor([1.25, -2.5, 0.5], dtype=dtype)
    rule = Negate()
    assert torch.equal(rule.weights(before, after, 0.0), before)
    assert torch.equal(rule.weights(before, after, -1.0), after)
    assert rule.weights(before, after, 1.0).tolist() == [0.75, -1.5, 0.5]
    assert rule.weights(before, after, 5.0).dtype == dtype


def test_negation_keeps_double_precision():
    before = torch.tensor([1.0], dtype=torch.float64)
    after = before + 1e-12
    assert Negate().weights(before, after, 1.0).item() == pytest.approx(1.0 - 1e-12, abs=1e-15)


# ---- parameters


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(2, 2)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(2, 2), "down_proj": nn.Linear(2, 2, bias=False)})


class Model(nn.Module):
    def __init__(self, depth: int = 12) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(2, 2)


def moving(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def names(depth: int) -> list[str]:
    return [f"h.{i}" for i in range(depth)]


def test_the_window_holds_the_mlp_outputs_of_the_layer_and_the_two_before_it():
    model = LayerWindow().prepare(Model(12), names(12))
    assert moving(model) == {f"h.{i}.mlp.down_proj.weight" for i in (1, 2, 3)}
    assert moving(LayerWindow().prepare(Model(2), names(2))) == {"h.0.mlp.down_proj.weight"}
    assert moving(LayerWindow(layer=-1, width=1).prepare(Model(12), names(12))) == {"h.11.mlp.down_proj.weight"}


def test_block_one_is_not_block_eleven():
    model = NamedParameters(patterns=("weight",), layers=(1,)).prepare(Model(12), names(12))
    assert moving(model) == {n for n, _ in Model(12).named_parameters() if n.startswith("h.1.") and n.endswith("weight")}


def test_what_does_not_match_is_an_error_that_names_something_that_exists():
    with pytest.raises(InputError, match=r"No parameter matches 'dwn_proj'\. Some that exist: down_proj"):
        NamedParameters(patterns=("dwn_proj",)).prepare(Model(2), names(2))
    with pytest.raises(InputError, match=r"Layer 5 is out of range: the model has 2 blocks\. Use -2 to 1\."):
        NamedParameters(layers=(5,)).prepare(Model(2), names(2))
    with pytest.raises(InputError, match="is no regular expression"):
        NamedParameters(patterns=("(",)).prepare(Model(2), names(2))
    with pytest.raises(InputError, match="the model has 0 blocks"):
        block_index(None, [])
