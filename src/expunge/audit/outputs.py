"""What models of rows say: scores and last features of each row, once per model; and margins under many retrained models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from expunge.adapters.base import Adapter
from expunge.adapters.passes import evaluating
from expunge.audit.kernel.quantities import Quantities, quantities
from expunge.audit.store import ScoreStore, compute_signature, device_of, examples_digest
from expunge.core.errors import InputError
from expunge.data.records import RecordSet
from expunge.data.rows import Row

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RowOutputs:
    """What one model says about n rows.

    Attributes:
        scores: ``[n, C]`` over the classes, or ``[n, 1]``, the predicted number; float32.
        features: input of the layer that makes the scores, ``[n, D]``, float32.
        targets: classes or numbers ``[n]``.
    """

    scores: npt.NDArray[np.float32]
    features: npt.NDArray[np.float32]
    targets: npt.NDArray[np.float64]

    @cached_property
    def kernel(self) -> Quantities:
        """Loss, margin, confidence, entropies and hits of a classifier, ``[n]`` each."""
        return quantities(self.scores, self.targets)

    @property
    def margins(self) -> Floats:
        """The statistic by which models are compared row by row: the logit margin; of a regressor the predicted number."""
        if self.scores.shape[1] > 1:
            return self.kernel.margin
        return self.scores[:, 0].astype(np.float64)


@dataclass(frozen=True)
class References:
    """Margins of the rows of every set under many models of the same architecture and training.

    They serve to estimate how margins scatter; the retrained models that are judged beside the unlearned one must not be among
    them. Every model needs an order of rows of its own, or they are more alike than independent trainings are.

    Attributes:
        retrained: by set, margins ``[models, n]`` under models trained without the forget rows.
        originals: the same under models trained on everything.
        unlearned: by audited model, the same under originals that were unlearned as it was.
    """

    retrained: Mapping[str, Floats]
    originals: Mapping[str, Floats]
    unlearned: Mapping[str, Mapping[str, Floats]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for held in self.populations:
            if len({len(m) for m in held.values()}) > 1:
                raise InputError("Reference margins of different sets come from different numbers of models.")

    @property
    def populations(self) -> tuple[Mapping[str, Floats], ...]:
        """Margins by set of every kind of models."""
        return (self.retrained, self.originals, *self.unlearned.values())

    @property
    def count(self) -> tuple[int, int]:
        """Retrained and original models."""
        return len(next(iter(self.retrained.values()))), len(next(iter(self.originals.values())))


@dataclass
class _Parts:
    scores: list[npt.NDArray[np.float32]] = field(default_factory=list)
    features: list[npt.NDArray[np.float32]] = field(default_factory=list)


@torch.no_grad()
def row_outputs(
    adapter: Adapter, rows: RecordSet[Row], *, store: ScoreStore | None, fingerprint: str, batch_tokens: int
) -> RowOutputs:
    """One forward pass over the rows of a set, or none where the store has it."""
    examples = [adapter.encode(r) for r in rows]
    targets = np.array([float(e.data[1]) for e in examples])
    key = ""
    if store is not None:
        signature = compute_signature(adapter, batch_tokens)
        key = store.key("rows", fingerprint, signature, examples_digest(adapter, examples))
        held = store.load_arrays(key)
        if held is not None:
            return RowOutputs(held["scores"], held["features"], targets)
    layer = adapter.layers()[-1]
    made = _Parts()
    per = max(1, batch_tokens // max(e.units for e in examples))
    device = device_of(adapter.model)
    with evaluating(adapter.model):
        for start in range(0, len(examples), per):
            batch = adapter.collate(examples[start : start + per]).to(device)
            out = adapter.forward(adapter.model, batch, frozenset({"logits", f"features:{layer}"}))
            made.scores.append(out.logits.float().cpu().numpy())
            made.features.append(out.features(layer).float().cpu().numpy())
    found = RowOutputs(np.concatenate(made.scores), np.concatenate(made.features), targets)
    if store is not None:
        store.save_arrays(key, {"scores": found.scores, "features": found.features})
    return found
