"""The fused loss against plain autograd: value, gradient, types, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from expunge.adapters import head
from expunge.adapters.head import linear_cross_entropy


def inputs(n, d, v, dtype, bias, seed=0):
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=make, dtype=torch.float64).to(dtype)
    weight = torch.randn(v, d, generator=make, dtype=torch.float64).to(dtype)
    offset = torch.randn(v, generator=make, dtype=torch.float64).to(dtype) if bias else None
    targets = torch.randint(v, (n,), generator=make)
    leaves = [t.requires_grad_() for t in (hidden, weight, offset) if t is not None]
    return leaves, targets


def plain(leaves, targets):
    scores = functional.linear(*leaves)
    return functional.cross_entropy(scores.to(torch.promote_types(scores.dtype, torch.float32)), targets, reduction="none")


def fused(leaves, targets, **options):
    return linear_cross_entropy(leaves[0], leaves[1], targets, leaves[2] if len(leaves) == 3 else None, **options)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 9),
    d=st.integers(1, 5),
    v=st.integers(1, 11),
    rows=st.integers(1, 10),
    keep=st.booleans(),
    bias=st.booleans(),
)
def test_value_and_gradient_equal_plain_autograd_in_float64(n, d, v, rows, keep, bias):
    leaves, targets = inputs(n, d, v, torch.float64, bias, seed=n + v)
    upstream = torch.linspace(-2, 3, n, dtype=torch.float64)
    expected, got = plain(leaves, targets), fused(leaves, targets, rows=rows, keep=keep)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    right = torch.autograd.grad(expected @ upstream, leaves)
    for a, b in zip(torch.autograd.grad(got @ upstream, leaves), right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keep", [True, False])
def test_gradcheck(keep):
    leaves, targets = inputs(5, 3, 7, torch.float64, True)
    assert torch.autograd.gradcheck(lambda *x: fused(x, targets, rows=2, keep=keep), leaves)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_low_precision_weights_have_float32_losses(dtype, tolerance, keep):
    leaves, targets = inputs(33, 16, 101, dtype, True)
    expected, got = plain(leaves, targets), fused(leaves, targets, rows=8, keep=keep)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    right = torch.autograd.grad(expected.sum(), leaves)
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), right, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("keep", [True, False])
def test_huge_and_tiny_scores_stay_finite(keep):
    leaves, targets = inputs(6, 4, 9, torch.float32, False)
    with torch.no_grad():
        leaves[1].mul_(1e3)
    got = fused(leaves, targets, rows=4, keep=keep)
    torch.testing.assert_close(got, plain(leaves, targets), rtol=1e-5, atol=1e-3)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(got.sum(), leaves))


@pytest.mark.parametrize("keep", [True, False])
def test_half_precision_holds_a_large_flat_vocabulary(keep):
    """The sum of exponentials over 70,000 equal scores does not fit into float16; the gradient must not need it there."""
    hidden = torch.zeros(2, 2, dtype=torch.float16, requires_grad=True)
    weight = torch.ones(70_000, 2, dtype=torch.float16, requires_grad=True)
    got = linear_cross_entropy(hidden, weight, torch.tensor([0, 5]), keep=keep)
    torch.testing.assert_close(got, torch.full((2,), 70_000.0).log())
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(got.sum(), [hidden, weight]))


@pytest.mark.parametrize("keep", [True, False])
def test_two_backward_passes_through_one_graph(keep):
    """Forget and retain gradients are taken apart from one forward pass: rows without gradient contribute nothing."""
    leaves, targets = inputs(10, 4, 13, torch.float64, True)
    got = fused(leaves, targets, rows=3, keep=keep)
    first = torch.autograd.grad(got[:6].sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(got[6:].sum(), leaves)
    whole = torch.autograd.grad(plain(leaves, targets).sum(), leaves)
    for a, b, c in zip(first, second, whole, strict=True):
        torch.testing.assert_close(a + b, c, rtol=1e-10, atol=1e-12)
    assert (first[0][6:] == 0).all()
    assert (second[0][:6] == 0).all()


def test_a_frozen_weight_gets_no_gradient():
    leaves, targets = inputs(4, 3, 5, torch.float64, True)
    leaves[1].requires_grad_(False)
    fused(leaves, targets, keep=True).sum().backward()
    assert leaves[1].grad is None
    assert leaves[0].grad is not None


def test_nothing_of_size_rows_times_vocabulary_is_saved_unless_kept():
    leaves, targets = inputs(64, 4, 1000, torch.float32, False)

    def saved(**options):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            fused(leaves, targets, **options)
        return max(sizes)

    assert saved(keep=False) <= 4 * 1000
    assert saved(keep=True) == 64 * 1000
    assert saved() == 64 * 1000, "small softmax matrices are kept by default"


def test_large_matrices_are_not_kept_by_default(monkeypatch):
    monkeypatch.setattr(head, "KEEP_BYTES", 1000)
    leaves, targets = inputs(64, 4, 1000, torch.float32, False)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        got = linear_cross_entropy(leaves[0], leaves[1], targets)
    assert max(sizes) == 4000
    torch.testing.assert_close(got, plain(leaves, targets))


def test_autocast_uses_its_type_forth_and_back():
    layer = torch.nn.Linear(16, 50)
    rows = torch.randn(7, 16, requires_grad=True)
    targets = torch.randint(50, (7,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = functional.cross_entropy(layer(rows).float(), targets, reduction="none")
        got = head.linear_losses(layer, rows, targets)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    a = torch.autograd.grad(got.sum(), [rows, layer.weight, layer.bias])
    b = torch.autograd.grad(expected.sum(), [rows, layer.weight, layer.bias])
    for x, y in zip(a, b, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=5e-2, atol=5e-2)
