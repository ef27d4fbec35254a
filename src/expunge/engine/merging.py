"""Several models that came from one, joined: arithmetic on their task vectors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from expunge.adapters.projection import block_of
from expunge.core.errors import InputError, MissingExtra
from expunge.core.settings import Settings

How = Literal["mean", "linear", "ties", "dare-linear", "dare-ties", "magnitude"]


class Merging(Settings):
    """How models ``theta_i`` that came from ``theta_0`` are joined, by their task vectors ``tau_i = theta_i - theta_0``.

    ============ ================================================================================================
    how          the joined model
    ============ ================================================================================================
    mean         ``theta_0 + sum_i w_i tau_i / sum_i w_i``, the weighted mean of the models
    linear       ``theta_0 + sum_i w_i tau_i`` (task arithmetic, Ilharco et al. 2022, arXiv 2212.04089)
    magnitude    as linear, of each task vector only the largest entries
    ties         of each task vector the largest entries; where signs disagree, the side with the larger sum; the mean of
                 what agrees (Yadav et al. 2023, arXiv 2306.01708)
    dare-linear  as linear, of each task vector random entries, scaled up by 1 / density (Yu et al. 2023, arXiv 2311.03099)
    dare-ties    random entries as in dare-linear, then the signs as in ties
    ============ ================================================================================================

    What is random or largest is chosen within each tensor (as peft does it, whose functions are used), not over the whole model
    as in the code of the TIES paper.
    """

    name: ClassVar[str] = "merge"

    how: How = Field("mean", description="mean, linear, magnitude, ties, dare-linear or dare-ties")
    weights: tuple[float, ...] | None = Field(None, description="coefficient of each model, in their order; none: 1 each")
    density: float = Field(0.2, gt=0, le=1, description="share of the entries that is kept; read by all but mean and linear")
    sign: Literal["total", "frequency"] = Field(
        "total", description="of ties and dare-ties: a sign is elected by the sum of the entries, or by their number"
    )
    seed: int = Field(0, ge=0, description="of the entries that dare-linear and dare-ties keep")

    def coefficients(self, models: int) -> list[float]:
        """One coefficient for each of so many models.

        Raises:
            InputError: another number of weights was given, or their sum is 0 where the models are averaged.
        """
        found = list(self.weights) if self.weights is not None else [1.0] * models
        if len(found) != models:
            raise InputError(f"There are {len(found)} weights for {models} models.", "Give one for each, in their order.")
        if self.how == "mean" and not sum(found):
            raise InputError("The weights of a mean sum to 0.", "Give others, or use how=linear.")
        return found


def check_alike(base: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> None:
    """Refuse models whose weights differ in name or shape.

    Args:
        base: weights of the model that they came from.
        others: of the models.
        names: what to call them.

    Raises:
        InputError: naming the first difference.
    """
    for name, held in zip(names, others, strict=True):
        for key in sorted({*base, *held}):
            mine, theirs = base.get(key), held.get(key)
            block = block_of(key)
            if block is not None and (mine is None or theirs is None or mine.shape != theirs.shape):
                raise InputError(
                    f"Of {name} and its target one takes directions out of its states that the other keeps (after {block!r}).",
                    "They cannot be merged: make one request after the other.",
                )
            if mine is None or theirs is None:
                where = "the target" if theirs is None else name
                raise InputError(f"{name} is of another architecture than its target: only {where} has {key!r}.", _SAME)
            if mine.shape != theirs.shape:
                raise InputError(
                    f"{name} is of another architecture than its target: {key!r} is {tuple(theirs.shape)} and not "
                    f"{tuple(mine.shape)}.",
                    _SAME,
                )


_SAME = "Merge models that were made from one and the same."


def merged(base: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]], settings: Merging) -> dict[str, Tensor]:
    """The joined weights, by name, in the type of ``base``; computed in float32 or wider.

    Args:
        base: ``theta_0``; tensors that are no floats are taken from it.
        others: ``theta_i``, with the same names and shapes.
        settings: how.

    Raises:
        InputError: weights that do not fit.
        MissingExtra: peft is not installed (for all but mean and linear).
    """
    coefficients = settings.coefficients(len(others))
    made: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(settings.seed)
        for name, start in base.items():
            if not start.is_floating_point():
                made[name] = start.clone()
                continue
            wide = torch.promote_types(start.dtype, torch.float32)
            first = start.to(wide)
            vectors = [held[name].to(first.device, wide) - first for held in others]
            made[name] = (first + _joined(vectors, coefficients, settings)).to(start.dtype)
    return made


def _joined(vectors: list[Tensor], coefficients: Sequence[float], settings: Merging) -> Tensor:
    if settings.how in ("mean", "linear"):
        total = sum((c * v for c, v in zip(coefficients, vectors, strict=True)), torch.zeros_like(vectors[0]))
        return total / sum(coefficients) if settings.how == "mean" else total
    try:
        from peft.utils import merge_utils as peft
    except ImportError:
        raise MissingExtra(f"Merging by {settings.how}", "llm") from None
    weights = torch.tensor(coefficients, dtype=vectors[0].dtype, device=vectors[0].device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft finds a density of 1 worth a warning
        return _by_peft(peft, vectors, weights, settings)


def _by_peft(peft: Any, vectors: list[Tensor], weights: Tensor, settings: Merging) -> Tensor:
    made: Tensor
    if settings.how in ("ties", "dare-ties"):
        join = peft.ties if settings.how == "ties" else peft.dare_ties
        made = join(vectors, weights, settings.density, settings.sign)
    else:
        join = peft.dare_linear if settings.how == "dare-linear" else peft.magnitude_prune
        made = join(vectors, weights, settings.density)
    return made
