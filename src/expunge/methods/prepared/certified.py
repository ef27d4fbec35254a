"""Certified removal: a Newton step takes a row out of a linear model, and noise hides what the step leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.core.errors import InputError
from expunge.engine.parts import Paper
from expunge.engine.prepared import Job, Prepared, Work
from expunge.engine.record import missing, stale
from expunge.engine.source import Source
from expunge.methods.prepared.dealing import digest_rows
from expunge.methods.prepared.linear import Floats, Logistic, Loss, Squares, fit, gradient, step
from expunge.methods.prepared.registry import prepared

_FILE = "model.safetensors"


class Linear(nn.Linear):
    """Scores ``[rows, classes]``, or one number a row, of a linear model on rows that were scaled as in its training.

    Of two classes there is one weight vector, and the scores are 0 and ``w . x``; of more, one against the rest each.

    Args:
        weight: ``[d]`` or ``[classes, d]`` as ``[models, d]``, float64.
        intercept: append a constant to each row.
        unit: divide each row by its length.
        numbers: a regression.
    """

    def __init__(self, weight: Tensor, *, intercept: bool, unit: bool, numbers: bool) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        self.weight = nn.Parameter(weight)
        self.intercept, self.unit, self.numbers = intercept, unit, numbers

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores."""
        z = super().forward(scaled(inputs, intercept=self.intercept, unit=self.unit).to(self.weight))
        return z if self.numbers or len(self.weight) > 1 else torch.cat([torch.zeros_like(z), z], dim=1)


def scaled(inputs: Tensor, *, intercept: bool, unit: bool) -> Tensor:
    """Rows ``[n, d]`` in float64, of length 1 where asked for (a row of zeros stays)."""
    x = inputs.double().flatten(1)
    if intercept:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    return nn.functional.normalize(x, dim=1) if unit else x


@prepared
class CertifiedRemoval(Prepared):
    """A linear model trained with a random linear term, from which rows are taken by a Newton step, with a certificate.

    Training minimises ``sum_i l(w . x_i, y_i) + (lambda n / 2) |w|^2 + b . w`` with ``b ~ N(0, sigma^2 I)``: logistic loss for
    classes (one model for two classes, one against the rest for more), squares for numbers. Removing rows moves w by
    ``H^-1 sum over them of (lambda w + grad l)``, H the Hessian on the rows that are left. The gradient that this leaves is
    bounded from the data; the bounds of all removals add up, beginning with what the optimiser left. While their sum is at most
    ``sigma epsilon / c`` with ``delta = 1.5 exp(-c^2 / 2)``, the model is within (epsilon, delta) of one that was trained without
    the rows. The removal that would exceed it trains anew, with new noise. For squares the step is exact.

    The weight vectors of several classes are one vector here: the norms of their residuals join as the root of the sum of
    squares, and the certificate holds for the whole model; the published code certifies each class alone. Each row is divided
    by its own length, as in that code, so that no other row takes part in how it is read.
    """

    name: ClassVar[str] = "certified-removal"
    title: ClassVar[str] = "Certified removal from linear models"
    paper: ClassVar[Paper] = Paper(
        "Certified Data Removal from Machine Learning Models",
        "Chuan Guo, Tom Goldstein, Awni Hannun, Laurens van der Maaten",
        2020,
        "https://arxiv.org/abs/1911.03030",
    )
    formula: ClassVar[str] = "w <- w + H^-1 sum_F (lambda w + grad l(w; x)), while sum of bounds <= sigma epsilon / c"
    guarantee: ClassVar[str] = "Certified: within (epsilon, delta) of a training without the deleted rows."
    caveats: ClassVar[tuple[str, ...]] = (
        "Certified is the linear model alone: features that a network learnt from the deleted rows are not.",
        "The noise b must stay secret; it is kept beside the weights, in float64.",
        "A little noise certifies few removals and much noise costs accuracy: choose sigma by the accuracy that is left.",
    )

    builds: ClassVar[bool] = False

    ridge: float = Field(1e-2, gt=0, description="lambda: strength of the ridge for each row")
    sigma: float = Field(1.0, ge=0, description="standard deviation of the noise in the objective; 0 certifies nothing")
    epsilon: float = Field(1.0, gt=0, description="how far apart the models may be")
    delta: float = Field(1e-4, gt=0, lt=1, description="probability with which they may be farther")
    intercept: bool = Field(True, description="append a constant to each row before it is scaled")
    unit: bool = Field(True, description="divide each row by its own length")
    seed: int = Field(0, ge=0, description="seed of the noise; whoever knows it can undo it")

    @property
    def budget(self) -> float:
        """Largest norm of a gradient that the noise hides: ``sigma epsilon / c``."""
        return self.sigma * self.epsilon / math.sqrt(2 * math.log(1.5 / self.delta))

    def plan(self, source: Source) -> dict[str, Any]:
        """The rows."""
        if not np.issubdtype(source.table.inputs.dtype, np.floating):
            raise InputError("A linear model reads numbers, not token ids.", "Give features.")
        x, _ = self._rows(source, source.table.ids)
        if self._loss(source).lipschitz and (longest := float(np.linalg.norm(x, axis=1).max())) > 1 + 1e-9:
            raise InputError(
                f"The certificate needs rows of length 1 at most; the longest has {longest:.3g}.", "Choose unit=true."
            )
        return {"rows": [[name] for name in source.table.ids]}

    def verify(self, job: Job, gone: Sequence[str]) -> None:
        """The model's file is there, and all rows that it was made of are at hand, those that go included."""
        record = job.record
        if record.trained:
            found = record.stamp(_FILE)
            if found is None:
                raise missing(record.folder / _FILE)
            done = len(record.requests) - (record.pending is not None)
            kept = [row[0] for row in record.plan["rows"] if row[0] not in set(record.before)]
            allowed = [(self._key(job, done), digest_rows(job.source, kept))]
            if record.pending is not None:
                allowed.append((self._key(job, done + 1), digest_rows(job.source, record.remaining)))
            if found not in allowed:
                raise stale(record.folder / _FILE)

    def bring(self, job: Job) -> None:
        """Train, or take one Newton step; the model, the noise and the budget spent are one file."""
        record = job.record
        key = self._key(job, len(record.requests))
        if (record.stamp(_FILE) or ("",))[0] == key:
            return
        held = None
        if record.trained:
            held = self._removed(job, record.load(_FILE, self._key(job, len(record.requests) - 1)))
        if held is None:
            held = self._fit(job, len(record.requests))
        record.save(_FILE, key, held, data=digest_rows(job.source, record.remaining))

    def work(self, job: Job) -> Work:
        """Two passes over the rows that are left for each weight vector, or a training."""
        held = self._held(job)
        passes = int(held["passes"])
        anew = int(held["trained"]) == len(job.record.requests)
        words = "trained anew with new noise" if anew else "one Newton step"
        notes = ("The budget was spent: the model was trained anew, and the certificate begins again.",) if anew else ()
        if not job.record.pending:
            return Work(passes * len(job.record.remaining))
        return Work((passes if anew else 2 * len(held["bound"])) * len(job.record.remaining), (words,), notes)

    def full_visits(self, job: Job) -> int:
        """As many passes as the last training made."""
        return int(self._held(job)["passes"]) * len(job.record.remaining)

    def promise(self, job: Job) -> str:
        """The certificate, with the budget that is spent."""
        spent = self.spent(job)
        if job.source.table.task == "regression":
            return "Exact up to rounding: for squares the step ends at the optimum without the deleted rows."
        if not self.sigma:
            return f"Not certified: without noise nothing hides the gradient that is left (of a norm of {spent:.2e} at most)."
        return (
            f"Certified: (epsilon, delta) = ({self.epsilon:g}, {self.delta:g}) against training without the deleted rows; "
            f"{100 * spent / self.budget:.1f} % of what the noise hides is spent ({spent:.2e} of {self.budget:.2e})."
        )

    def spent(self, job: Job) -> float:
        """Bound of the gradient that is left, of all models together."""
        return float(torch.linalg.vector_norm(self._held(job)["bound"]))

    def module(self, job: Job) -> nn.Module:
        """The linear model."""
        numbers = job.source.table.task == "regression"
        return Linear(self._held(job)["weights"], intercept=self.intercept, unit=self.unit, numbers=numbers).eval()

    def _removed(self, job: Job, held: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """After the Newton step of the open request; None if the budget does not allow it."""
        record, loss = job.record, self._loss(job.source)
        kept, _ = self._rows(job.source, record.remaining)
        x, labels = self._rows(job.source, record.requests[-1].ids)
        weights, bounds = held["weights"].numpy().copy(), held["bound"].numpy().copy()
        for k, y in enumerate(self._targets(job.source, labels)):
            made = step(loss, weights[k], (x, y), kept, self.ridge)
            weights[k], bounds[k] = made.weights, bounds[k] + made.bound
        if self.sigma and loss.lipschitz and float(np.linalg.norm(bounds)) > self.budget:
            return None
        return {**held, "weights": torch.from_numpy(weights), "bound": torch.from_numpy(bounds)}

    def _fit(self, job: Job, number: int) -> dict[str, Tensor]:
        """The optimum on the rows that are left, under noise drawn for this request."""
        loss = self._loss(job.source)
        x, labels = self._rows(job.source, job.record.remaining)
        targets = self._targets(job.source, labels)
        draw = np.random.default_rng([self.seed, 37, number])
        noise = draw.normal(scale=self.sigma, size=(len(targets), x.shape[1])) if loss.lipschitz else np.zeros((1, x.shape[1]))
        fits = [fit(loss, x, y, self.ridge, b) for y, b in zip(targets, noise, strict=True)]
        left = [
            float(np.linalg.norm(gradient(loss, w, (x, y), self.ridge, b)))
            for (w, _), y, b in zip(fits, targets, noise, strict=True)
        ]
        job.tell(len(x), len(x), "optimum of the linear model")
        return {
            "weights": torch.from_numpy(np.stack([w for w, _ in fits])),
            "noise": torch.from_numpy(noise),
            "bound": torch.tensor(left, dtype=torch.float64),
            "passes": torch.tensor(sum(n for _, n in fits)),
            "trained": torch.tensor(number),
        }

    def _held(self, job: Job) -> dict[str, Tensor]:
        return job.record.load(_FILE, self._key(job, len(job.record.requests)))

    def _key(self, job: Job, requests: int) -> str:
        return job.record.key([list(r.ids) for r in job.record.requests[:requests]])

    def _rows(self, source: Source, ids: Sequence[str]) -> tuple[Floats, Floats]:
        inputs, targets = source.rows(ids)
        return scaled(inputs, intercept=self.intercept, unit=self.unit).numpy(), targets.double().numpy()

    @staticmethod
    def _loss(source: Source) -> Loss:
        return Logistic() if source.table.task == "classification" else Squares()

    @staticmethod
    def _targets(source: Source, labels: Floats) -> list[Floats]:
        """What each model learns: signs, one vector for two classes, else one per class; or the numbers."""
        if source.table.task == "regression":
            return [labels]
        classes = len(source.table.classes)
        return [np.where(labels == k, 1.0, -1.0) for k in ([1] if classes == 2 else range(classes))]
