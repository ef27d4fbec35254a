"""Datamodels: what a model would say had some rows not been there, predicted from many models trained on parts of the data.

The output for an input ``x`` of a model trained on a subset ``S`` of the rows is taken to be linear in the membership of the
rows, ``f(x; S) ~ b(x) + sum_{i in S} beta_i(x)`` for each score by itself (Ilyas et al. 2022, arXiv 2202.00622). Without the
rows ``F`` a model that says ``f(x)`` would then say ``f(x) - sum_{i in F} beta_i(x)`` (Georgiev et al. 2024, arXiv 2410.23232);
the intercept cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.core.errors import InputError
from expunge.engine.ensemble import Ensemble, Progress, train_ensemble
from expunge.engine.functional import count_rows, each
from expunge.engine.members import Members, Spec
from expunge.engine.tasks import Workers


@dataclass(frozen=True)
class Datamodel:
    """Models of random parts of the data.

    Args:
        ensemble: the trained models.
        members: which rows each was trained on, bool ``[models, n]``.
    """

    ensemble: Ensemble
    members: Tensor

    def effect(self, inputs: Any, rows: Sequence[int], *, block: int = 1024) -> Tensor:
        """``sum_{i in rows} beta_i(x)`` for each input and score, float32 ``[inputs, ...]``; see :func:`coefficients`.

        Args:
            inputs: as the models were trained on.
            rows: indices of rows of the data.
            block: inputs per forward pass; memory holds the outputs of all models on so many.
        """
        weights = coefficients(self.members, rows)
        found = []
        for start in range(0, count_rows(inputs), block):
            outputs = self.ensemble.logits(each(inputs, lambda t, at=start: t[at : at + block]), rows=block)  # type: ignore[misc]
            found.append(torch.einsum("m,m...->...", weights, outputs.double()).float())
        return torch.cat(found)

    def without(self, outputs: Tensor, inputs: Any, rows: Sequence[int]) -> Tensor:
        """Predicted outputs of a model trained without ``rows``, of one that says ``outputs``: ``f(x) - sum beta_i(x)``.

        Subtracted at every query this is the diagnostic that the paper calls DM-Direct: no model changes.

        Args:
            outputs: of the model at hand on ``inputs``, ``[inputs, ...]``.
            inputs: as the models were trained on.
            rows: indices of the rows that are to be gone.
        """
        return outputs - self.effect(inputs, rows).to(outputs)


def coefficients(members: Tensor, rows: Sequence[int]) -> Tensor:
    """How much each model counts in ``sum_{i in rows} beta_i``, float64 ``[models]``; the sum over all models is 0.

    ``beta_i`` is the difference of the means of the models with and without row i, so the sum is one weighted mean of the models'
    outputs, and no datamodel has to be held. With M models of half of the data its standard deviation is about
    ``2 sqrt(rows / M)`` times that of a model between trainings: it takes many more models than rows to be forgotten.

    Args:
        members: which rows each model was trained on, bool ``[models, n]``.
        rows: indices of rows.

    Raises:
        InputError: there are no rows, or one is in no model or in all.
    """
    if not len(rows):
        raise InputError("There are no rows whose effect could be computed.")
    chosen = members[:, torch.as_tensor(rows, dtype=torch.int64)].double()
    inside = chosen.sum(0)
    outside = len(members) - inside
    if bool((inside == 0).any() or (outside == 0).any()):
        raise InputError("A row is in none of the models, or in all.", "Train more models.")
    return (chosen / inside - (1 - chosen) / outside).sum(1)


def fit_datamodel(
    spec: Spec,
    models: int,
    *,
    share: float = 0.5,
    seed: int = 0,
    chunk: int = 32,
    folder: Path | None = None,
    workers: Workers = "local",
    progress: Progress | None = None,
) -> Datamodel:
    """Train models on random subsets of the rows.

    Args:
        spec: model, data and training, see :class:`~expunge.engine.members.Spec`.
        models: how many, at least 2.
        share: part of the rows that each is trained on, in (0, 1); the subsets are of equal size.
        seed: of the subsets and of the models.
        chunk, folder, workers, progress: see :func:`~expunge.engine.ensemble.train_ensemble`.

    Raises:
        InputError: a number out of range; see also there.
    """
    rows = count_rows(spec.inputs)
    size = round(share * rows)
    if models < 2 or not 0 < size < rows:
        raise InputError(
            f"A datamodel needs at least 2 models of some of the rows; got {models} of {size} of {rows}.",
            "Choose a share like 0.5.",
        )
    generator = torch.Generator().manual_seed(seed)
    members = torch.zeros(models, rows, dtype=torch.bool)
    for held in members:
        held[torch.randperm(rows, generator=generator)[:size]] = True
    seeds = torch.randint(2**31, (models,), generator=generator).tolist()
    trained = train_ensemble(spec, Members(members, seeds), chunk=chunk, folder=folder, workers=workers, progress=progress)
    return Datamodel(trained, members)
