from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from kernel_models import TRAIN, Ensemble, digits, train
from torch import Tensor

from expunge.audit.kernel.restoration import Restoration, expert_latents, restoration, steer
from expunge.core.errors import InputError
from expunge.engine.autoencoder import SparseAutoencoder, explained_variance, fit_autoencoder

CLASS = 3


@dataclass(frozen=True)
class Case:
    """The original, a model that only suppresses the class before the hidden layer's end, one retrained without the class."""

    x: Tensor
    y: np.ndarray
    original: Ensemble
    suppressed: Ensemble
    retrained: Ensemble
    autoencoder: SparseAutoencoder
    experts: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        return np.flatnonzero(self.y == CLASS)

    def restore(self, model: Ensemble, **options):
        at = self.x[self.rows]
        return restoration(
            self.autoencoder, model.hidden(at)[0], self.original.hidden(at)[0], self.y[self.rows], self.experts,
            finish=lambda h: model.head(h[None])[0], finish_original=lambda h: self.original.head(h[None])[0], **options,
        )  # fmt: skip


def suppress(model: Ensemble, x: Tensor, y: Tensor) -> Ensemble:
    """Random labels for the class, the right ones for all others; only the first layer moves."""
    first = [p.clone().requires_grad_() for p in model.parameters[:2]]
    net = Ensemble([*first, *model.parameters[2:]])
    optimiser = torch.optim.Adam(first, lr=1e-3)
    wrong = (CLASS + torch.randint(1, 10, y.shape, generator=torch.Generator().manual_seed(0))) % 10
    targets = torch.where(y == CLASS, wrong, y)
    for _ in range(120):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(net.head(net.hidden(x))[0], targets).backward()
        optimiser.step()
    return Ensemble([p.detach() for p in net.parameters])


@pytest.fixture(scope="module")
def case() -> Case:
    task = digits()
    keep = slice(100, TRAIN)  # without the mislabelled
    everything = np.zeros((2, TRAIN))
    everything[:, keep] = 1
    everything[1, task.y.numpy() == CLASS] = 0
    both = train(task, everything, steps=400, seed=11)
    original, retrained = (Ensemble([p[i : i + 1] for p in both.parameters]) for i in (0, 1))
    x, y = task.x[keep], task.y[keep]
    autoencoder = fit_autoencoder(original.hidden(x)[0], k=16, steps=1500)
    experts = expert_latents(autoencoder, original.hidden(x)[0], y, CLASS)
    return Case(task.test_x, task.test_y.numpy(), original, suppress(original, x, y), retrained, autoencoder, experts)


def test_the_autoencoder_is_sparse_and_explains_the_layer(case):
    hidden = case.original.hidden(case.x)[0]
    z = case.autoencoder.encode(hidden)
    assert (z >= 0).all()
    assert ((z > 0).sum(dim=-1) <= 16).all()
    assert explained_variance(case.autoencoder, hidden) > 0.6
    untrained = SparseAutoencoder(case.autoencoder.mean, case.autoencoder.deviation, 128, 16)
    assert explained_variance(untrained, hidden) < explained_variance(case.autoencoder, hidden) - 0.3
    frequency = (z[:, case.experts] > 0).double()
    assert frequency[case.rows].mean() > 3 * frequency[np.flatnonzero(case.y != CLASS)].mean()


def test_steering_keeps_the_residual(case):
    ours, theirs = case.suppressed.hidden(case.x)[0], case.original.hidden(case.x)[0]
    assert torch.equal(steer(case.autoencoder, ours, theirs, case.experts, 0.0), ours)
    assert torch.equal(steer(case.autoencoder, theirs, theirs, case.experts, 5.0), theirs)
    z, target = case.autoencoder.encode(ours), case.autoencoder.encode(theirs)
    moved = z.clone()
    moved[:, case.experts] += 2.0 * (target - z)[:, case.experts]
    want = ours + case.autoencoder.decode(moved) - case.autoencoder.decode(z)
    torch.testing.assert_close(steer(case.autoencoder, ours, theirs, case.experts, 2.0), want, atol=1e-4, rtol=1e-4)
    tokens = steer(case.autoencoder, ours.reshape(-1, 1, 128), theirs.reshape(-1, 1, 128), case.experts, 2.0)
    torch.testing.assert_close(tokens[:, 0], want, atol=1e-4, rtol=1e-4)


def test_suppression_is_restored_and_deletion_is_not(case):
    suppressed, retrained = case.restore(case.suppressed), case.restore(case.retrained)
    assert suppressed[0].original > 0.85
    assert suppressed[0].unlearned < 0.15
    assert retrained[0].unlearned == 0
    best = max(suppressed, key=lambda r: r.rate)
    assert best.rate > 0.9
    assert best.random < best.experts - 0.4  # other latents do not do it
    assert max(r.rate for r in retrained) < 0.3
    assert suppressed[0].whole > 0.9 * suppressed[0].original
    assert case.restore(case.suppressed, strengths=[0.0])[0].experts == suppressed[0].unlearned


def test_a_change_after_the_layer_is_not_seen(case):
    """The control says so: even the original's whole activation does not bring the class back."""
    parameters = [p.clone() for p in case.original.parameters]
    parameters[3][..., CLASS] = -100
    found = case.restore(Ensemble(parameters))
    assert all(r.experts == r.whole == 0 for r in found)
    assert found[0].rate == 0


def test_undefined_and_bad_input(case):
    assert math.isnan(Restoration(1, 0, 0, 0, 0, 0).rate)
    hidden = case.original.hidden(case.x)[0]
    with pytest.raises(InputError, match="examples of it and of another"):
        expert_latents(case.autoencoder, hidden, case.y, 77)
    with pytest.raises(InputError, match="one label per example"):
        expert_latents(case.autoencoder, hidden, case.y[1:], CLASS)
    with pytest.raises(InputError, match="all finite"):
        fit_autoencoder(hidden * math.nan)
    with pytest.raises(InputError, match=r"in \[1, 128\]"):
        fit_autoencoder(hidden, k=129)
    with pytest.raises(InputError, match="same shape"):
        steer(case.autoencoder, hidden, hidden[1:], [0], 1.0)
    with pytest.raises(InputError, match="from 0 to 127"):
        steer(case.autoencoder, hidden, hidden, [128], 1.0)
    destroyed = case.restore(Ensemble([p * math.nan for p in case.original.parameters]))
    assert destroyed[0].unlearned == 0
    assert all(math.isnan(r.experts) and math.isnan(r.rate) for r in destroyed)
    assert math.isnan(explained_variance(case.autoencoder, hidden[:1].expand(5, -1)))
