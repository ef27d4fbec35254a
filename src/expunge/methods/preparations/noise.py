"""Noise that a model is surest is no row of a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from expunge.adapters.base import Adapter, Example
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError
from expunge.engine.options import Engine
from expunge.engine.preparation import Examples, Preparation, Prepared, Tell
from expunge.methods.preparations.registry import preparation


@preparation
class Noise(Preparation):
    """In place of the forget rows, noise of their classes that maximises the error (Tarun et al. 2021, arXiv 2111.08947).

    For each class of the forget set a batch of inputs begins as normal noise and minimises ``-CE(target(noise), class) + shrink
    * mean_i ||noise_i||^2`` by Adam. Each forget row is replaced by one of its class in turn; of the rows themselves only the
    class and the shape are read.
    """

    name: ClassVar[str] = "noise"
    reads: ClassVar[tuple[Stream, ...]] = (Stream.FORGET,)
    makes: ClassVar[frozenset[str]] = frozenset({Stream.ALTERNATIVE})
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ROWS, Offer.CLASSES})

    inputs: int = Field(256, ge=1, description="noisy inputs for each class")
    steps: int = Field(40, ge=1, description="steps of Adam")
    lr: float = Field(0.1, gt=0, description="learning rate of Adam")
    shrink: float = Field(0.1, ge=0, description="weight of the squared size of the noise")

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """Learn the noise of each class.

        Raises:
            InputError: the inputs are no real numbers.
        """
        forget = examples[Stream.FORGET]
        classes = adapter.collate(forget).targets.tolist()
        known = sorted(set(classes))
        noise: dict[int, Tensor] = {}
        for at, which in enumerate(known):
            like = forget[classes.index(which)]
            noise[which] = self._learn(adapter, [like] * min(self.inputs, classes.count(which)))
            if tell is not None:
                tell(at + 1, len(known), "learning noise that is no row of a class")
        seen = dict.fromkeys(known, 0)
        made = []
        for example, which in zip(forget, classes, strict=True):
            row = noise[which][seen[which] % len(noise[which])]
            seen[which] += 1
            made.append(adapter.replace(example, inputs=row.numpy(), suffix="#noise"))
        return Prepared({Stream.ALTERNATIVE: made})

    def _learn(self, adapter: Adapter, like: Sequence[Example]) -> Tensor:
        """The noise ``[inputs, ...]`` in main memory, for the class of the examples whose shape it takes."""
        device = next(adapter.model.parameters()).device
        batch = adapter.collate(like).to(device)
        if len(batch.tensors) != 1 or not next(iter(batch.tensors.values())).is_floating_point():
            raise InputError("The inputs are no single array of real numbers, so noise cannot be learnt.", "Use another method.")
        ((name, value),) = batch.tensors.items()
        noise = torch.randn(value.shape, dtype=value.dtype).to(device).requires_grad_()
        optimizer = torch.optim.Adam([noise], lr=self.lr)
        with torch.enable_grad():
            for _ in range(self.steps):
                error = adapter.row_losses(adapter.scores(adapter.model, {name: noise}), batch.targets).mean()
                loss = -error + self.shrink * noise.square().flatten(1).sum(1).mean()
                (noise.grad,) = torch.autograd.grad(loss, [noise])
                optimizer.step()
        return noise.detach().cpu()
