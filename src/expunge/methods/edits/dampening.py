"""Selective synaptic dampening: shrink the weights that matter far more to the forget set than to all data."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from expunge.adapters.base import Adapter
from expunge.core.access import Offer, Stream
from expunge.core.search import Search
from expunge.engine.edit import Edit, Examples, Tell
from expunge.engine.gradients import batch_importance, moving
from expunge.engine.options import Engine
from expunge.engine.parts import Paper
from expunge.methods.edits.registry import edit


def dampen(weight: Tensor, forget: Tensor, everything: Tensor, alpha: float, dampening: float) -> Tensor:
    """``min(dampening * I_D / I_F, 1) * theta`` where ``I_F > alpha * I_D``, ``theta`` elsewhere.

    Args:
        weight: theta, any shape.
        forget: importance ``I_F`` for the forget set, of the same shape, not negative.
        everything: importance ``I_D`` for all training data, forget set included.
        alpha: by how much the one must exceed the other, at least 0.
        dampening: lambda.
    """
    chosen = forget > alpha * everything
    factor = (dampening * everything / forget.clamp_min(torch.finfo(forget.dtype).tiny)).clamp(max=1.0)
    return torch.where(chosen, weight * factor, weight)


class Dampening(Edit):
    """What both dampening methods share: two importances in one pass each, and the rule that compares them."""

    of: ClassVar[Literal["loss", "norm"]]
    power: ClassVar[Literal["square", "absolute"]]
    paper: ClassVar[Paper] = Paper(
        "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening",
        "Jack Foster, Stefan Schoepf, Alexandra Brintrup",
        2023,
        "https://arxiv.org/abs/2308.07707",
    )
    caveats: ClassVar[tuple[str, ...]] = (
        "Which weights are chosen depends strongly on alpha, above all where the forget set is a random part of the data.",
        "Importances scale with the batch size: both sets are read at the same one.",
    )

    alpha: Annotated[float, Search(1.0, 100.0, log=True)] = Field(
        10.0, ge=0, description="a weight is dampened if it matters so many times more to the forget set"
    )
    dampening: Annotated[float, Search(0.1, 5.0, log=True)] = Field(
        1.0, ge=0, description="lambda: the smaller, the more a chosen weight shrinks"
    )
    batch: int = Field(64, ge=1, description="examples per batch of both importances")

    def weights(self, adapter: Adapter, examples: Examples, engine: Engine, tell: Tell | None) -> dict[str, Tensor]:
        """The dampened weights; biases and norms too."""
        forget = list(examples[Stream.FORGET])
        everything = [*forget, *examples[Stream.RETAIN]]
        order = np.random.default_rng([engine.seed, 21])
        found = []
        for what, held in (("forget set", forget), ("all data", everything)):
            shuffled = [held[int(i)] for i in order.permutation(len(held))]

            def progress(done: int, total: int, what: str = what) -> None:
                if tell is not None:
                    tell(done, total, f"importance of the weights for the {what}")

            found.append(batch_importance(adapter, shuffled, batch=self.batch, of=self.of, power=self.power, tell=progress))
        return {
            name: dampen(p.detach(), found[0][name], found[1][name], self.alpha, self.dampening)
            for name, p in moving(adapter.model).items()
        }


@edit
class SSD(Dampening):
    """Weights whose squared gradient is far larger on the forget set than on all data are shrunk, once, without training.

    The importance is the square of the *batch-mean* gradient, as in the official code, not the mean of squares over examples (the
    diagonal Fisher information that the paper writes): alpha 10 was chosen for it, and with the per-example estimate nothing
    at all passes once the forget set is more than a tenth of the data.
    """

    name: ClassVar[str] = "ssd"
    title: ClassVar[str] = "Selective synaptic dampening"
    formula: ClassVar[str] = (
        "theta_i <- min(lambda I_D,i / I_F,i, 1) theta_i where I_F,i > alpha I_D,i; I = mean over batches of g^2"
    )
    of: ClassVar[Literal["loss", "norm"]] = "loss"
    power: ClassVar[Literal["square", "absolute"]] = "square"


@edit
class LFSSD(Dampening):
    """Selective synaptic dampening without labels: the importance is the gradient of the scores' squared norm.

    ``I = mean over batches of |d mean_batch ||logits||^2 / d theta|``, an absolute value, not a square. Neither the labels of the
    forget set nor those of the other data are read.
    """

    name: ClassVar[str] = "lfssd"
    paper: ClassVar[Paper] = Paper(
        "Loss-Free Machine Unlearning",
        "Jack Foster, Stefan Schoepf, Alexandra Brintrup",
        2024,
        "https://arxiv.org/abs/2402.19308",
    )
    title: ClassVar[str] = "Loss-free selective synaptic dampening"
    formula: ClassVar[str] = "as ssd, with I = mean over batches of |d mean ||logits||^2 / d theta|"
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOGITS})
    of: ClassVar[Literal["loss", "norm"]] = "norm"
    power: ClassVar[Literal["square", "absolute"]] = "absolute"
