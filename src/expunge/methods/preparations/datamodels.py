"""Predictions of what a retrained model would say, from many models of parts of the data."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from expunge.adapters.base import Adapter, Example
from expunge.core.access import Of, Offer, Stream
from expunge.core.errors import InputError
from expunge.engine.datamodel import fit_datamodel
from expunge.engine.members import Spec, Training
from expunge.engine.options import Engine
from expunge.engine.preparation import Examples, Preparation, Prepared, Tell
from expunge.engine.reference import TableReference, reset_weights
from expunge.methods.preparations.registry import preparation


@preparation
class Datamodels(Preparation):
    """Predicts what a model would say that was never trained on the forget set (Georgiev et al. 2024, arXiv 2410.23232).

    Models of the target's shape are trained from new random weights on random parts of all rows; the effect of a row is the
    difference of the mean scores with and without it. What is predicted is the target's scores less the effects of all forget
    rows, on these and on a random subset of the retain rows, which takes the place of the retain set. The published work used
    1,000 to 20,000 models. The error of the prediction falls with their number and grows with that of the forget rows, as ``2
    sqrt(forget rows / models)`` times the spread between trainings.
    """

    name: ClassVar[str] = "datamodels"
    reads: ClassVar[tuple[Stream, ...]] = (Stream.FORGET, Stream.RETAIN)
    makes: ClassVar[frozenset[str]] = frozenset({Of.ORACLE, Stream.RETAIN})
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOGITS, Offer.ROWS})

    models: int = Field(1000, ge=2, description="models that are trained")
    share: float = Field(0.5, gt=0, lt=1, description="part of the rows that each is trained on")
    training: Training = Field(
        Training(steps=500, batch=128, lr=1e-3), description="how each is trained: as the target was, for them to be alike"
    )
    retain_multiplier: int = Field(20, ge=1, description="size of the retain subset, in forget sets")
    chunk: int = Field(32, ge=1, description="models trained at once")
    workers: Literal["local", "ray"] = Field("local", description="where they are trained")

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """Train the models, or read those that are in ``scratch``, and predict.

        Raises:
            InputError: the rows have different shapes, or a part of the model cannot be set back to random weights.
        """
        forget = list(examples[Stream.FORGET])
        retain = list(examples[Stream.RETAIN])
        device = next(adapter.model.parameters()).device
        both = adapter.collate([*forget, *retain])
        spec = Spec(
            partial(_fresh, adapter.model), dict(both.tensors), both.targets, self.training, adapter.row_losses, adapter.scores,
            str(device),
        )  # fmt: skip
        report = None if tell is None else lambda done, total: tell(done, total, f"training {self.models} models of parts")
        fitted = fit_datamodel(
            spec, self.models, share=self.share, seed=engine.seed, chunk=self.chunk, folder=scratch, workers=self.workers,
            progress=report,
        )  # fmt: skip
        kept = [retain[i] for i in sorted(torch.randperm(len(retain))[: self.retain_multiplier * len(forget)].tolist())]
        targets = [*forget, *kept]
        inputs = dict(adapter.collate(targets).tensors)
        predicted = fitted.without(_scores(adapter, targets, engine.max_tokens), inputs, range(len(forget)))
        if not bool(torch.isfinite(predicted).all()):
            raise InputError("The predicted scores are not finite.", "Lower preparation.training.lr.")
        table = {e.id: row[None] for e, row in zip(targets, predicted, strict=True)}
        return Prepared({Stream.RETAIN: kept}, {Of.ORACLE: TableReference(table, "The predictions of the datamodel")})


def _fresh(model: nn.Module) -> nn.Module:
    """The same network with new random weights, from torch's global generator."""
    made = copy.deepcopy(model).cpu()
    reset_weights(made)
    return made


@torch.no_grad()
def _scores(adapter: Adapter, examples: list[Example], max_units: int) -> torch.Tensor:
    """The target's scores, in order, ``[n, C]`` in main memory."""
    device = next(adapter.model.parameters()).device
    found = []
    size = max(1, max_units // max(e.units for e in examples))
    for start in range(0, len(examples), size):
        batch = adapter.collate(examples[start : start + size]).to(device)
        found.append(adapter.forward(adapter.model, batch, frozenset({"logits"})).logits.cpu())
    return torch.cat(found)
