"""How near an input is to the texts of a request: scores of its features by layer, a one-class line through them, a mixture.

The scoring of O3 (Gao et al. 2024, arXiv 2407.10223). Of an input's features ``x_l`` at layer l,

    s_l = -1/2 (x_l - mu_l)' Sigma_l^-1 (x_l - mu_l) - gamma (1 - max_j cos(x_l, f_jl))

with mean, covariance and features ``f_j`` of the request's prompts. (The published code has ``- gamma max_j cos``: one part falls
and the other rises with the distance, so they can cancel.) A linear one-class SVM joins the layers to one number,
``x = sum_l w_l s_l``. A mixture of two normal distributions of equal weight and one width, around the mean of the prompts that
the detector was fitted on and that of prompts held out, says how usual that number is: with its distribution function F and the
middle ``x0`` of both means, ``c = 1 - |F(x) - F(2 x0 - x)|`` is 1 in the middle and goes to 0 on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from expunge.core.errors import InputError
from expunge.core.settings import Settings

Floats = NDArray[np.float64]
Signs = Literal["agree", "official"]

LEAST = 6  #: distinct prompts without which no detector is fitted
_TINY = 1e-12


class Weighing(Settings):
    """How far the adapter is loaded for an input of which ``c`` in [0, 1] says how usual it is for the request."""

    name: ClassVar[str] = "weighing"

    rule: Literal["soft", "hard", "official"] = Field(
        "soft",
        description="soft: sigmoid(slope c - shift), 0 below the level; hard: 1, 0 below the level; official: the published "
        "evaluation, where sigmoid(slope c - shift) over 0.9 counts as 1.2, over 0.3 and up to 0.4 as it is, and else as 0",
    )
    slope: float = Field(10.0, gt=0, description="factor of c in the sigmoid")
    shift: float = Field(2.0, description="what is taken from slope c")
    level: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="inputs less usual than this get weight 0, so the target alone answers; 0: none do, as published: the "
        "smallest weight is then sigmoid(-shift), 0.12",
    )

    def weights(self, closeness: Tensor) -> Tensor:
        """Weights of inputs, in the shape of ``closeness``."""
        soft = torch.sigmoid(self.slope * closeness - self.shift)
        zero = torch.zeros_like(soft)
        if self.rule == "official":
            return torch.where(soft > 0.9, torch.full_like(soft, 1.2), torch.where((soft > 0.3) & (soft <= 0.4), soft, zero))
        return torch.where(closeness < self.level, zero, torch.ones_like(soft) if self.rule == "hard" else soft)


class Detector(nn.Module):
    """A fitted detector: buffers in float32, and what no tensor tells.

    Args:
        tensors: ``mean`` ``[L, D]``; the covariance by its ``directions`` ``[L, k, D]`` (orthonormal), ``spreads`` ``[L, k]``
            (its variance along them) and ``floor`` ``[L]`` (along all others); ``bank`` ``[L, n, D]`` (features of length 1);
            ``weights`` ``[L]`` and ``offset`` ``[1]`` of the one-class SVM; ``means`` ``[2]`` and ``std`` ``[1]`` of the mixture.
        layers: blocks whose features it reads, from 0.
        pool: how the tokens of a prompt become one feature.
        cosine: gamma.
        signs: ``agree``: both parts of a score fall with the distance; ``official``: those of the published code.
        encoder: whether the features are those of an encoder, or of the target itself.
    """

    KEYS: ClassVar[tuple[str, ...]] = (
        "mean", "directions", "spreads", "floor", "bank", "weights", "offset", "means", "std",
    )  # fmt: skip

    def __init__(
        self, tensors: Mapping[str, Tensor], *, layers: Sequence[int], pool: str, cosine: float, signs: Signs, encoder: bool
    ) -> None:
        super().__init__()
        for key in self.KEYS:
            self.register_buffer(key, tensors[key].detach().to(torch.float32).contiguous())
        self.layers, self.pool, self.cosine, self.signs, self.encoder = tuple(layers), pool, float(cosine), signs, encoder

    def described(self) -> dict[str, Any]:
        """What no tensor tells."""
        return {
            "layers": list(self.layers), "pool": self.pool, "cosine": self.cosine, "signs": self.signs, "encoder": self.encoder
        }  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """Buffers for a file."""
        return {key: self._held(key).cpu().contiguous() for key in self.KEYS}

    def _held(self, key: str) -> Tensor:
        found: Tensor = self.get_buffer(key).float()  # a model whose type was changed as a whole has others
        return found

    def parts(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Squared Mahalanobis distance and largest cosine of inputs, each ``[B, L]``, from features ``[B, L, D]``."""
        x = features.float()
        away = x - self._held("mean")
        floor = self._held("floor")
        along = torch.einsum("bld,lkd->blk", away, self._held("directions")).square()
        inside = (along * (1 / self._held("spreads") - 1 / floor[:, None])).sum(-1)
        distance = away.square().sum(-1) / floor + inside
        unit = torch.nn.functional.normalize(x, dim=-1)
        return distance, torch.einsum("bld,lnd->bln", unit, self._held("bank")).amax(-1)

    def scores(self, features: Tensor) -> Tensor:
        """``s`` ``[B, L]``."""
        distance, cosine = self.parts(features)
        return _joined(distance, cosine, self.cosine, self.signs)

    def places(self, features: Tensor) -> Tensor:
        """``x`` ``[B]``: the sum of the scores with the SVM's weights (its decision is this minus its offset)."""
        return self.scores(features) @ self._held("weights")

    def closeness(self, features: Tensor) -> Tensor:
        """``c`` in [0, 1], ``[B]``."""
        x, means, std = self.places(features), self._held("means"), self._held("std")
        away = (x - means.mean()).abs()
        middle = means.mean()

        def below(value: Tensor) -> Tensor:
            found: Tensor = torch.special.ndtr((value[:, None] - means) / std).mean(-1)
            return found

        found: Tensor = 1 - (below(middle + away) - below(middle - away))
        return found.clamp(0, 1)


def _joined(distance: Tensor, cosine: Tensor, gamma: float, signs: Signs) -> Tensor:
    return -0.5 * distance - gamma * (1 - cosine if signs == "agree" else cosine)


def fit_detector(
    fitted: Tensor,
    held: Tensor,
    *,
    layers: Sequence[int],
    pool: str,
    encoder: bool,
    cosine: float | None = 1000.0,
    signs: Signs = "agree",
    nu: float = 0.1,
) -> Detector:
    """Fit a detector to the features of a request's prompts.

    Args:
        fitted: of the prompts that it is fitted on, ``[n, L, D]``, n at least 4.
        held: of prompts of the same request that were held out, ``[m, L, D]``, m at least 2: the second part of the mixture.
        layers, pool, encoder: where the features are from.
        cosine: gamma; none: such that both parts of the score vary alike over the held-out prompts.
        signs: of the two parts.
        nu: of the SVM: share of the fitted prompts that may lie outside.

    Raises:
        InputError: a feature is not finite.
    """
    if not bool(fitted.isfinite().all() and held.isfinite().all()):
        raise InputError("The features of the forget prompts are not finite.", "Load the model in float32.")
    x = fitted.double().cpu().numpy()
    shapes = [_covariance(x[:, at]) for at in range(x.shape[1])]
    bank = torch.nn.functional.normalize(fitted.double().cpu(), dim=-1).transpose(0, 1)
    tensors = {
        "mean": torch.from_numpy(x.mean(0)), "directions": torch.stack([torch.from_numpy(s[0]) for s in shapes]),
        "spreads": torch.stack([torch.from_numpy(s[1]) for s in shapes]), "floor": torch.tensor([s[2] for s in shapes]),
        "bank": bank, "weights": torch.ones(x.shape[1]), "offset": torch.zeros(1), "means": torch.zeros(2), "std": torch.ones(1),
    }  # fmt: skip
    made = Detector(tensors, layers=layers, pool=pool, cosine=cosine or 0.0, signs=signs, encoder=encoder)
    fitted, held = fitted.cpu(), held.cpu()
    if cosine is None:
        distance, largest = made.parts(held)
        made.cosine = float((0.5 * distance).std(0).mean() / largest.std(0).mean().clamp_min(_TINY))
    weights, offset = _line(made.scores(fitted).double().numpy(), nu)
    made.weights, made.offset = torch.from_numpy(weights).float(), torch.tensor([offset]).float()
    first, second = made.places(fitted), made.places(held)
    made.means = torch.stack([first.mean(), second.mean()])
    # The width is that of the held-out prompts, as the published code takes that of its test prompts. Where these are few it may
    # come out far too small by chance, so it is never less than that of the prompts that were fitted.
    made.std = torch.maximum(first.std(), second.std()).clamp_min(1e-6 * second.abs().max()).clamp_min(_TINY)[None]
    return made


def _covariance(x: Floats) -> tuple[Floats, Floats, float]:
    """Directions ``[k, D]``, variances along them and along all others, of a covariance shrunk as Ledoit and Wolf (2004) do.

    ``(1 - a) S + a m I`` has the directions of S, so it is kept, and inverted, by those alone: ``k = min(n, D)``.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    centred = x - x.mean(0)
    share = float(ledoit_wolf_shrinkage(centred, assume_centered=True))
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    variances = singular**2 / len(x)
    mean = float(variances.sum()) / x.shape[1]
    floor = max(share * mean, 1e-6 * mean, _TINY)
    return directions, np.maximum((1 - share) * variances + share * mean, floor), floor


def _line(scores: Floats, nu: float) -> tuple[Floats, float]:
    """Weights and offset of a linear one-class SVM."""
    from sklearn.svm import OneClassSVM

    made = OneClassSVM(kernel="linear", nu=nu).fit(scores)
    return np.array(made.coef_[0]), float(-made.intercept_[0])
