"""Gradients of every row from what goes into and out of the layers, against a loop over rows in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from expunge.engine.functional import class_loss, plain
from expunge.engine.importance import per_example_gradients
from expunge.engine.layer_gradients import is_stack, layer_gradients

STACKS = {
    "perceptron": lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 7), nn.Tanh(), nn.Linear(7, 4, bias=False)),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Sequential(nn.Conv2d(5, 4, 1), nn.GELU()), nn.Flatten(),
        nn.Linear(16, 4),
    ),
    "strides": lambda: nn.Sequential(
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ),
    "places": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 4)), nn.Flatten(), nn.Linear(12, 4)),
}  # fmt: skip


def rows() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(9, 3, 4, 4, dtype=torch.float64), torch.randint(4, (9,))


@pytest.mark.parametrize("name", STACKS)
def test_they_equal_one_backward_pass_for_each_row(name: str) -> None:
    torch.manual_seed(1)
    model, (x, y) = STACKS[name]().double().eval(), rows()
    assert is_stack(model)
    found = layer_gradients(model, plain, class_loss, x, y)
    assert list(found) == [n for n, _ in model.named_parameters()]
    for i in range(len(x)):
        loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        for (parameter, own), g in zip(found.items(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            torch.testing.assert_close(own[i], g, rtol=1e-10, atol=1e-12, msg=parameter)


def test_frozen_weights_have_none_and_nothing_is_left_behind() -> None:
    model, (x, y) = STACKS["convolutions"]().double().eval(), rows()
    model[0].requires_grad_(False)
    model[-1].bias.requires_grad_(False)
    found = layer_gradients(model, plain, class_loss, x, y)
    assert list(found) == ["3.0.weight", "3.0.bias", "5.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_other_models_are_vectorised_and_give_the_same() -> None:
    class Own(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model, (x, y) = STACKS["convolutions"]().double().eval(), rows()
    assert not is_stack(Own(model))
    ours, other = per_example_gradients(model, x, y), per_example_gradients(Own(model), x, y)
    for name, value in ours.items():
        torch.testing.assert_close(value, other[f"inner.{name}"], rtol=1e-10, atol=1e-12)


def test_what_might_mix_rows_or_use_a_weight_twice_is_no_stack() -> None:
    layer = nn.Linear(4, 4)
    assert not is_stack(nn.Sequential(layer, nn.ReLU(), layer))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert not is_stack(tied)
    hooked = nn.Sequential(nn.Linear(4, 4))
    hooked[0].register_forward_hook(lambda _m, _i, out: out * 2)
    assert not is_stack(hooked)

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(2 * input)

    for part in (
        nn.BatchNorm1d(4), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding_mode="circular", padding=1),
        nn.Conv2d(4, 4, 3, padding="same"), nn.Flatten(0), Doubled(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    ):  # fmt: skip
        assert not is_stack(nn.Sequential(nn.Linear(4, 4), part)), part
    assert not is_stack(nn.Linear(4, 4))
