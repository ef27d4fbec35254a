"""How the scores of several models become those of one: ``a z_1 + b f(z_2 - z_3)``, with an optional filter."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from expunge.core.errors import InputError
from expunge.core.settings import Settings


class Combination(Settings):
    """``z = a z_1 + b f(z_2 - z_3)`` for the scores ``z_1`` of the target, ``z_2`` of an assistant and ``z_3`` of a baseline.

    With ``f`` the identity and no baseline it is ULD's subtraction (Ji et al. 2024, arXiv 2406.08607), with ``f = relu`` and the
    target as its own baseline the generic scores of Who's Harry Potter (Eldan and Russinovich 2023, arXiv 2310.02238). With a
    third model as the baseline, the assistant before it was trained, it is offset unlearning (Huang et al. 2024, arXiv
    2404.11045).

    The *relative top filter* keeps the tokens that the target gives at least ``tau`` times its highest probability, and at least
    the ``tau V`` highest. Outside of them the assistant has no say; where tokens are generated they are excluded. With the
    filter on, a constant added to all of the assistant's scores would change the result, although it changes no
    probability; ``centred`` takes their mean out first, so an assistant that finds all tokens equally likely changes nothing.
    """

    name: ClassVar[str] = "combination"

    target_weight: float = Field(1.0, description="a: weight of the target's scores")
    weight: float = Field(-0.8, description="b: weight of the assistant's scores; negative: what it has learnt is taken away")
    link: Literal["identity", "relu"] = Field("identity", description="f: relu takes scores that rose and leaves the rest alone")
    against: Literal["none", "target", "baseline"] = Field(
        "none", description="z_3: nothing, the target's own scores, or those of a third model"
    )
    centred: bool = Field(True, description="take the mean over the vocabulary out of the assistant's (and z_3's) scores")
    filter: float | None = Field(None, gt=0, lt=1, description="tau of the relative top filter; none: all tokens are combined")

    def scores(self, target: Tensor, assistant: Tensor, baseline: Tensor | None = None, *, exclude: bool = False) -> Tensor:
        """The combined scores, in float32 or wider.

        Args:
            target: ``z_1``, ``[..., V]``.
            assistant: ``z_2``, of the same shape.
            baseline: ``z_3``, of the same shape, where a third model is the baseline.
            exclude: give ``-inf`` to what the filter drops, as generation does, instead of the target's own score.

        Raises:
            InputError: the shapes differ, or there is no baseline where one is asked for, or the other way round.
        """
        if (baseline is not None) != (self.against == "baseline"):
            raise InputError(f"against={self.against}, and {'no' if baseline is None else 'a'} third model is there.")
        others = [assistant] if baseline is None else [assistant, baseline]
        for other in others:
            if target.shape[-1] != other.shape[-1]:
                raise different_vocabularies(target.shape[-1], other.shape[-1])
        wide = torch.promote_types(target.dtype, torch.float32)
        z1 = target.to(wide)
        out = self.target_weight * z1 + self.weight * self._said(z1, *(z.to(wide) for z in others))
        if self.filter is not None:
            dropped = torch.full_like(out, -math.inf) if exclude else self.target_weight * z1
            out = torch.where(self.kept(z1), out, dropped)
        # A generation setting may have excluded a token already (the end token, before the shortest answer is reached).
        return torch.where(z1.isneginf(), z1, out)

    def _said(self, z1: Tensor, z2: Tensor, z3: Tensor | None = None) -> Tensor:
        """``f(z_2 - z_3)``."""
        base = z1 if self.against == "target" else z3
        if self.centred:
            z2, base = _centred(z2), None if base is None else _centred(base)
        rest = z2 if base is None else z2 - base
        return rest.relu() if self.link == "relu" else rest

    def kept(self, target: Tensor) -> Tensor:
        """Which tokens the filter keeps, bool ``[..., V]``; all without a filter."""
        if self.filter is None:
            return torch.ones_like(target, dtype=torch.bool)
        least = max(1, int(self.filter * target.shape[-1]))
        lowest = target.topk(least, dim=-1).values[..., -1:]
        return target >= torch.minimum(lowest, target.amax(-1, keepdim=True) + math.log(self.filter))


def _centred(z: Tensor) -> Tensor:
    return z - torch.where(z.isfinite(), z, 0.0).sum(-1, keepdim=True) / z.isfinite().sum(-1, keepdim=True)


def different_vocabularies(target: int, assistant: int) -> InputError:
    """The error for two models whose scores cannot be combined."""
    return InputError(
        f"The target has scores for {target} tokens, the assistant for {assistant}: their vocabularies differ.",
        "Use an assistant with the target's own tokenizer, such as its first blocks.",
    )
