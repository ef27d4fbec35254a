"""What is made of the trained module at the end: other weights, or a model that holds the target too."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.adapters.combination import Combination
from expunge.core.errors import InputError
from expunge.core.registry import Registry
from expunge.engine.parts import Finish, Join, Recipe, Reweigh

FINISHES: Registry[type[Finish]] = Registry("finish", None, "expunge.finishes")


class Negate(Reweigh):
    """Task-vector negation: ``theta - scale * (theta_trained - theta)`` (Ilharco et al. 2022, arXiv 2212.04089).

    At scale 0 it is the identity, at scale -1 the trained weights.
    """

    name: ClassVar[str] = "negate"

    scale: float | None = Field(None, ge=-1, le=64, description="coefficient of the task vector; none: the schedule finds it")

    def weights(self, before: Tensor, after: Tensor, scale: float) -> Tensor:
        """``before - scale * (after - before)``, computed in float32 or wider and returned in the type of ``before``."""
        wide = torch.promote_types(before.dtype, torch.float32)
        start = before.to(wide)
        return (start - scale * (after.to(wide) - start)).to(before.dtype)


class Subtract(Join):
    """The scores of the trained assistant are taken from the target's: ``z_target - scale f(z_assistant - z_baseline)``.

    The result is both models as one (:class:`expunge.adapters.combined.Combined`). The scale is found by halving, as the smallest
    with which the loss on the forget set reaches the goal while the loss on the retain set stays within the schedule's bound.
    """

    name: ClassVar[str] = "subtract"

    scale: float | None = Field(None, ge=0, le=64, description="weight that is taken away; none: the schedule finds it")
    link: Literal["identity", "relu"] = Field("identity", description="f: relu takes scores that rose and leaves the rest alone")
    against: Literal["none", "target"] = Field("none", description="z_baseline: none, or the target's own scores")
    centred: bool = Field(True, description="take the mean over the vocabulary out of the assistant's scores")
    filter: float | None = Field(
        None, gt=0, lt=1, description="only tokens at least so likely as this share of the target's likeliest; none: all"
    )
    keep_target: bool = Field(True, description="save the target's weights with the result, or its name and their hash")

    def join(self, target: nn.Module, trained: nn.Module) -> nn.Module:
        """Both as one, with nothing taken away yet."""
        from expunge.adapters.combined import Combined

        blocks = getattr(trained, "expunge_blocks", None)
        return Combined(target, trained, self.combination(0.0), blocks=blocks, keep_target=self.keep_target)

    def place(self, joined: Any, scale: float) -> str:
        """Take ``scale`` times the assistant's scores away."""
        joined.combination = self.combination(scale)
        return f"The assistant's scores are taken away with weight {scale:.4g}."

    def combination(self, scale: float) -> Combination:
        """The formula at a strength."""
        return Combination(
            weight=-scale, link=self.link, against=self.against, centred=self.centred, filter=self.filter
        )  # fmt: skip


def joined(recipe: Recipe, target: nn.Module, trained: nn.Module, *, sharded: bool) -> nn.Module | None:
    """The model that holds the target and what a recipe trains beside it; none if it trains the target itself.

    Raises:
        InputError: the two do not fit together, or the trained one is sharded.
    """
    if not isinstance(recipe.finish, Join):
        return None
    if sharded:
        raise InputError(f"The method {recipe.name!r} trains a model beside the target.", "Run it without sharding (FSDP).")
    return recipe.finish.join(target, trained)


FINISHES.add(Negate.name, Negate)
FINISHES.add(Subtract.name, Subtract)
