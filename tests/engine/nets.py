"""Small models that the tests of ensembles and gradients share; functions of a module, so that workers find them."""

from __future__ import annotations

import torch
from torch import nn


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


class Activated(nn.Module):
    """Layers and weights of the perceptron, and its printed form; the activation is in the forward pass alone."""

    def __init__(self, activation) -> None:
        super().__init__()
        self.first, self.last, self.activation = nn.Linear(5, 7).double(), nn.Linear(7, 3).double(), activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.activation(self.first(x)))


def one_activation() -> nn.Module:
    return Activated(torch.tanh)


def other_activation() -> nn.Module:
    return Activated(torch.relu)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ).double()


def logistic() -> nn.Module:
    return nn.Linear(5, 3).double()


def scalar() -> nn.Module:
    return nn.Linear(5, 1).double()


def scaled(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(inputs["x"]) * inputs["scale"]


def digit_perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class Attention(nn.Module):
    """One head over five places, by torch's fused attention; ``look`` makes the forward pass decide by values."""

    def __init__(self, look: bool) -> None:
        super().__init__()
        self.project, self.last, self.look = nn.Linear(1, 12).double(), nn.Linear(4, 3).double(), look

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x.unsqueeze(-1)).chunk(3, -1)
        if self.look and bool((x > 100).any()):
            q = -q
        return self.last(nn.functional.scaled_dot_product_attention(q, k, v).mean(1))


def attention() -> nn.Module:
    return Attention(look=False)


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.ReLU(), nn.Linear(7, 3)).double()


def with_batch_norm(tracked: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7, track_running_stats=tracked), nn.ReLU(), nn.Linear(7, 3)).double()


def tracked_norm() -> nn.Module:
    return with_batch_norm(True)


def untracked_norm() -> nn.Module:
    return with_batch_norm(False)


def rows(n: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs ``[n, 5]`` in float64 and classes in [0, 3) that depend on them."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=draw, dtype=torch.float64)
    return x, (x @ torch.randn(5, 3, generator=draw, dtype=torch.float64)).argmax(1)


def images(n: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 4, 4, generator=draw, dtype=torch.float64), torch.randint(3, (n,), generator=draw)
