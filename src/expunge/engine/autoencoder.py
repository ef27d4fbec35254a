"""A sparse autoencoder of hidden states: a dictionary of directions, of which each state uses a few.

``s' = D z + b``, ``z = select(W (s - b) + c)`` on standardised states ``s``. Two selections of the family are here: TopK keeps
the ``k`` largest positive pre-activations (Gao et al. 2024, arXiv 2406.04093); AbsTopK (2025, arXiv 2510.00404) keeps the ``k``
largest by magnitude with their sign, the projection on ``|z|_0 <= k``: one direction may carry a concept and its opposite.

Training follows the recipe that these share: mean squared error, a decoder whose columns have unit norm, and an auxiliary loss
by which latents that never fire reconstruct what the others leave. Here the columns are made unit norm after every step (widely
used code does it before the step, so that they drift). It knows no modality: audits look for what was hidden with it, and what
acts at inference may clamp its latents.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from expunge.core.errors import InputError

AUXILIARY = 1 / 32  #: weight of the auxiliary loss, as published
AUXILIARY_LATENTS = 512  #: latents that it revives at once, as published


def select(values: Tensor, k: int, *, signed: bool = False) -> Tensor:
    """All but the ``k`` largest of each row set to 0.

    Args:
        values: pre-activations ``[..., P]``.
        k: entries kept, at most.
        signed: largest by magnitude, with their sign; without, largest of what is positive: the rest is 0.

    Returns:
        the same shape, at most ``k`` of a row not 0.
    """
    kept = values if signed else torch.relu(values)
    top = (kept.abs() if signed else kept).topk(k, dim=-1).indices
    return torch.zeros_like(kept).scatter(-1, top, kept.gather(-1, top))


class SparseAutoencoder(nn.Module):
    """See the module.

    Args:
        mean, deviation: of the states it will read ``[d]``.
        latents: number of latents P.
        k: latents that may be active for one state.
        signed: AbsTopK instead of TopK.
        seed: of the initial weights: decoder columns of unit norm, the encoder its transpose.

    Raises:
        InputError: ``k`` is not in [1, P].
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor, latents: int, k: int, *, signed: bool = False, seed: int = 0) -> None:
        super().__init__()
        if not 1 <= k <= latents:
            raise InputError(f"The number of active latents must be in [1, {latents}]; got {k}.")
        width = len(mean)
        directions = torch.randn(width, latents, generator=torch.Generator().manual_seed(seed))
        directions = directions / directions.norm(dim=0, keepdim=True)
        self.register_buffer("mean", mean.detach().float().clone())
        self.register_buffer("deviation", deviation.detach().float().clone())
        self.decoder = nn.Parameter(directions)
        self.encoder = nn.Parameter(directions.T.clone())
        self.before = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(latents))
        self.k, self.signed = k, signed

    def pre(self, states: Tensor) -> Tensor:
        """How much each latent is called for, before any is selected: ``[..., P]`` of states ``[..., d]``."""
        standard = (states - self.mean) / self.deviation
        return (standard - self.before) @ self.encoder.T + self.bias

    def encode(self, states: Tensor) -> Tensor:
        """Latents ``[..., P]`` of states ``[..., d]``; at most k are not 0, and none is negative unless signed."""
        return select(self.pre(states), self.k, signed=self.signed)

    def decode(self, latents: Tensor) -> Tensor:
        """States ``[..., d]`` of latents."""
        return (latents @ self.decoder.T + self.before) * self.deviation + self.mean

    def shift(self, change: Tensor, chosen: Tensor) -> Tensor:
        """What a change ``[..., c]`` of latents ``chosen`` ``[c]`` adds to states ``[..., d]``: ``dec(z + change) - dec(z)``."""
        return (change @ self.decoder[:, chosen].T) * self.deviation


def fit_autoencoder(
    states: Tensor,
    *,
    latents: int | None = None,
    k: int = 16,
    steps: int = 2000,
    batch: int = 256,
    rate: float = 1e-3,
    signed: bool = False,
    idle: int = 100,
    seed: int = 0,
) -> SparseAutoencoder:
    """Train an autoencoder on a model's states by mean squared error (Adam).

    Args:
        states: ``[..., d]`` of one layer; not of the forget set alone.
        latents: number of latents; as many as the layer is wide if not given.
        k: active at once.
        steps, batch, rate: of the optimiser.
        signed: AbsTopK instead of TopK.
        idle: steps without firing after which a latent counts as dead and is taught by the auxiliary loss.
        seed: of initialisation and batches; it decides everything that is drawn.

    Raises:
        InputError: there are fewer than two states, or one is not finite.
    """
    rows = states.detach().reshape(-1, states.shape[-1]).float()
    if len(rows) < 2 or not bool(torch.isfinite(rows).all()):
        raise InputError("An autoencoder needs several activations, all finite.", "A destroyed model cannot be analysed.")
    deviation = rows.std(dim=0)
    # A unit that never changes carries nothing; dividing by its spread would only blow up rounding.
    deviation = torch.where(deviation > 1e-6 * rows.abs().amax(dim=0).clamp(min=1e-30), deviation, torch.ones_like(deviation))
    model = SparseAutoencoder(rows.mean(dim=0), deviation, latents or rows.shape[1], k, signed=signed, seed=seed).to(rows.device)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    quiet = torch.zeros(len(model.bias), device=rows.device)
    for _ in range(steps):
        x = rows[torch.randint(0, len(rows), (min(batch, len(rows)),), generator=generator).to(rows.device)]
        optimiser.zero_grad()
        loss, fired = _loss(model, x, quiet >= idle)
        loss.backward()  # type: ignore[no-untyped-call]
        # What would only lengthen a column is taken out of its gradient, and the column put back to length 1.
        held, grad = model.decoder.data, model.decoder.grad
        if grad is not None:
            grad -= held * (grad * held).sum(dim=0, keepdim=True)
        optimiser.step()
        held /= held.norm(dim=0, keepdim=True).clamp(min=1e-12)
        quiet = torch.where(fired, 0.0, quiet + 1)
    return model.requires_grad_(False).eval()


def _loss(model: SparseAutoencoder, x: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error on standardised states with the auxiliary loss, and which latents fired ``[P]``."""
    u = model.pre(x)
    z = select(u, model.k, signed=model.signed)
    left = (x - model.decode(z)) / model.deviation
    loss = left.square().mean()
    count = int(dead.sum())
    if count:
        few = min(AUXILIARY_LATENTS, count)
        spare = select(u[:, dead], few, signed=model.signed)
        loss = loss + AUXILIARY * (spare @ model.decoder[:, dead].T - left.detach()).square().mean()
    return loss, (z != 0).any(dim=0)


@torch.no_grad()
def explained_variance(model: SparseAutoencoder, states: Tensor) -> float:
    """Share of the variance of standardised states that the autoencoder reconstructs; at most 1, higher is better.

    Far below 1 its latents say little about the layer. NaN if the states do not vary.
    """
    x = states.reshape(-1, states.shape[-1]).float()
    if bool((x == x[:1]).all()):
        return math.nan
    lost = ((model.decode(model.encode(x)) - x) / model.deviation).square().sum()
    total = ((x - x.mean(dim=0)) / model.deviation).square().sum()
    return 1 - float(lost / total)
