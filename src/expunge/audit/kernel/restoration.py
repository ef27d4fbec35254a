"""Suppression or deletion: can what was unlearned be put back at an inner layer, by steering a few sparse latents?

After *Suppression or Deletion* (2026, arXiv 2602.18505). A k-sparse autoencoder is trained on the ORIGINAL model's activations at
a layer; latents that fire for the forgotten class are its experts. The unlearned model's activations are moved along the experts
towards the original's, and its own later layers finish the pass. If the class comes back, its knowledge after that layer was
suppressed, not deleted.

Differences to the published hook, each on purpose: activations are encoded in the same way as in training (standardised, with
latent bias and top k; the hook leaves these out); the part of an activation that the autoencoder does not explain is kept, so
that a strength of 0 changes nothing, bit by bit; no other activation is exchanged (the hook also puts in the original's class
token, which alone can restore the class). The rule for experts is this module's own: the paper's is not published.

What it cannot see: a model that differs from the original only AFTER the layer has the original's activations there, so steering
moves nothing and nothing is restored. Choose a layer that lies after the changed weights, and try several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from expunge.audit.kernel.arrays import Integers, codes
from expunge.core.errors import InputError
from expunge.engine.autoencoder import SparseAutoencoder


@torch.no_grad()
def expert_latents(model: SparseAutoencoder, activations: Tensor, labels: ArrayLike, target: int, *, count: int = 8) -> Integers:
    """Latents that fire for one class and not for others, best first.

    Rule: the mean of a latent over the examples of the class, minus the largest mean over any other class; the ``count`` largest
    that are positive. With several tokens an example has the mean over its tokens.

    Args:
        model: autoencoder of the original model's layer.
        activations: of the original model ``[examples, ..., d]``, all classes.
        labels: ``[examples]``.
        target: the class.
        count: at most so many.

    Raises:
        InputError: lengths differ, the class or every other one is absent, or no latent prefers the class.
    """
    y = codes(labels, "labels")
    if len(y) != len(activations):
        raise InputError(f"There must be one label per example; got {len(y)} for {len(activations)}.")
    others = [c for c in np.unique(y) if c != target]
    if not others or target not in y:
        raise InputError(f"Experts for class {target} need examples of it and of another class.")
    z = model.encode(activations.float()).reshape(len(y), -1, len(model.bias)).mean(dim=1)
    means = torch.stack([z[torch.from_numpy(y == c).to(z.device)].mean(dim=0) for c in [target, *others]])
    score = means[0] - means[1:].amax(dim=0)
    best = torch.argsort(score, descending=True)[:count]
    chosen = best[score[best] > 0]
    if len(chosen) == 0:
        raise InputError(
            f"No latent fires more for class {target} than for every other one.", "Train with more latents or steps."
        )
    return np.asarray(chosen.cpu().numpy(), dtype=np.int64)


@torch.no_grad()
def steer(model: SparseAutoencoder, unlearned: Tensor, original: Tensor, latents: ArrayLike, strength: float) -> Tensor:
    """The unlearned activations with some latents moved towards the original's: ``x_u + dec(z') - dec(z_u)``.

    ``z'_j = z_j^u + a (z_j^o - z_j^u)`` for the chosen latents and ``z_j^u`` for all others. The residual of the reconstruction
    is kept, so a = 0 returns the unlearned activations bit by bit.

    Args:
        model: autoencoder.
        unlearned, original: activations of both models on the same inputs ``[..., d]``.
        latents: which to move.
        strength: a; 1 is the original's value, above it overshoots (paper: 1, 5, 10).

    Raises:
        InputError: the shapes differ, or there is no such latent.
    """
    if unlearned.shape != original.shape:
        raise InputError(f"Both models must give the same shape; got {tuple(unlearned.shape)} and {tuple(original.shape)}.")
    wanted = codes(latents, "latents")
    if (wanted < 0).any() or (wanted >= len(model.bias)).any():
        raise InputError(f"Latents are numbered from 0 to {len(model.bias) - 1}.")
    chosen = torch.from_numpy(wanted).to(unlearned.device)
    change = (model.encode(original.float()) - model.encode(unlearned.float()))[..., chosen]
    return unlearned + (strength * model.shift(change, chosen)).to(unlearned.dtype)


@dataclass(frozen=True)
class Restoration:
    """Accuracy on the forgotten class at one strength, with its controls; all in [0, 1].

    Attributes:
        strength: a.
        original, unlearned: accuracy of both models as they are.
        experts: of the unlearned model steered along the experts.
        random: the same along equally many other latents, mean over draws. If it is as high as ``experts``, the experts mean
            nothing.
        whole: with the whole activation moved, ``x_u + a (x_o - x_u)``: what the later layers can make of the original's
            activations at best (a = 1). If it is low, the change lies after this layer and the experts cannot restore anything.
    """

    strength: float
    original: float
    unlearned: float
    experts: float
    random: float
    whole: float

    @property
    def rate(self) -> float:
        """Restored accuracy over the original's, ``experts / original``; NaN where the original is never right.

        Near 1 is suppression, near the value of a model retrained from scratch is deletion; that value need not be 0. (A working
        definition: the paper's was not checked.)
        """
        return self.experts / self.original if self.original else math.nan


@torch.no_grad()
def restoration(
    model: SparseAutoencoder, unlearned: Tensor, original: Tensor, labels: ArrayLike, experts: ArrayLike,
    *, finish: Callable[[Tensor], Tensor], finish_original: Callable[[Tensor], Tensor],
    strengths: Sequence[float] = (1.0, 5.0, 10.0), draws: int = 5, seed: int = 0,
) -> list[Restoration]:  # fmt: skip
    """How far a forgotten class comes back in the unlearned model, by strength.

    Which examples are steered is decided by their true label, as in the paper: this is an analysis, not an attack. NaN where an
    activation is not finite: a destroyed model cannot be steered.

    Args:
        model: autoencoder of the original model's layer.
        unlearned, original: activations of both models at that layer, on the examples of the forgotten class
            ``[examples, ..., d]``.
        labels: of the examples.
        experts: :func:`expert_latents`.
        finish: the later layers of the unlearned model: activations to logits ``[examples, classes]``.
        finish_original: those of the original model.
        strengths: values of a.
        draws: of random latents.
        seed: of the draws.

    Raises:
        InputError: shapes or lengths differ, or too few other latents are left for the control.
    """
    y, chosen = codes(labels, "labels"), codes(experts, "experts")
    if len(y) != len(unlearned):
        raise InputError(f"There must be one label per example; got {len(y)} for {len(unlearned)}.")
    others = np.setdiff1d(np.arange(len(model.bias)), chosen)
    if len(others) < len(chosen) or draws < 1:
        raise InputError(f"The control draws {len(chosen)} other latents; there are {len(others)}.", "Use fewer experts.")
    rng = np.random.default_rng(seed)
    controls = [rng.choice(others, len(chosen), replace=False) for _ in range(draws)]

    def right(activations: Tensor, rest: Callable[[Tensor], Tensor] = finish) -> float:
        logits = rest(activations)
        hit = (logits.argmax(dim=-1).cpu().numpy() == y) & ~logits.isnan().any(dim=-1).cpu().numpy()
        return float(hit.mean())

    if not bool(torch.isfinite(unlearned).all() and torch.isfinite(original).all()):
        before = right(original, finish_original)
        return [Restoration(a, before, right(unlearned), math.nan, math.nan, math.nan) for a in strengths]
    out = []
    for a in strengths:
        random = np.mean([right(steer(model, unlearned, original, c, a)) for c in controls])
        moved = right(steer(model, unlearned, original, chosen, a))
        whole = right(unlearned + a * (original - unlearned))
        out.append(Restoration(a, right(original, finish_original), right(unlearned), moved, float(random), whole))
    return out
