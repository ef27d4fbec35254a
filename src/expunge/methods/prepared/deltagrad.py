"""DeltaGrad: training is run again without some rows, mostly from recorded gradients that are corrected by curvature."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import grad

from expunge.adapters.passes import evaluating
from expunge.core.errors import Destroyed, InputError
from expunge.core.files import check_room, size
from expunge.core.memory import freed_memory_kept
from expunge.engine.functional import Function, flatten, moving, open_attention, unflatten
from expunge.engine.members import Members, batches, course
from expunge.engine.parts import Paper
from expunge.engine.prepared import Job, Prepared, Work
from expunge.engine.record import missing, stale
from expunge.engine.source import Source
from expunge.engine.tasks import threads
from expunge.methods.prepared.dealing import digest_rows
from expunge.methods.prepared.quasi_newton import Curvature
from expunge.methods.prepared.registry import prepared

_CHUNK = 64  #: steps in one file of the record
Gradient = Callable[[Tensor, Tensor], Tensor]  #: (weights [p], places of rows) -> gradient of the sum of their losses [p]


@prepared
class DeltaGrad(Prepared):
    """Gradient descent is repeated without the deleted rows, step by step beside the recorded run.

    Weights ``w_t`` and batch gradients ``g_t`` of all steps are kept. In the run without the rows, at weights v_t, the first
    ``burn`` of the steps and every ``period``-th compute the gradient; each gives a pair of ``v_t - w_t`` and the change of the
    batch's gradient. Between, the gradient of the batch is ``g_t + B (v_t - w_t)``, B by L-BFGS from the last ``memory`` pairs,
    and only those of deleted rows are computed and taken out: with r of them in the batch b,
    ``v <- v - lr / (|b| - r) (|b| (g_t + B (v - w_t)) - sum of the deleted rows' gradients)``. A pair without positive curvature
    is not kept, and while there is none the gradient is computed. Batches are those of the training, less the deleted rows. The
    new run takes the place of the record, so that further deletions start from it.

    ``training`` must be sgd without momentum, whose step the formula is. The model is run without dropout. ``period=1`` is
    training anew on the same batches.
    """

    name: ClassVar[str] = "deltagrad"
    title: ClassVar[str] = "DeltaGrad"
    paper: ClassVar[Paper] = Paper(
        "DeltaGrad: Rapid Retraining of Machine Learning Models",
        "Yinjun Wu, Edgar Dobriban, Susan B. Davidson",
        2020,
        "https://arxiv.org/abs/2006.14755",
    )
    formula: ClassVar[str] = "v <- v - lr / (|b| - r) (|b| (g_t + B_t (v - w_t)) - sum over deleted rows of grad l(v))"
    guarantee: ClassVar[str] = (
        "Approximate: near a training without the rows on the same batches for strongly convex losses, with an error that "
        "vanishes faster than the share of deleted rows; without a bound for others. Audit the model."
    )
    caveats: ClassVar[tuple[str, ...]] = (
        "The record takes two sets of weights for each step.",
        "The pairs of one batch stand for the curvature of the next: the smaller the batches, the farther from retraining.",
        "On networks the curvature of a few pairs says little: shorten the period, or compare with training anew.",
    )

    period: int = Field(5, ge=1, description="every so many steps the gradient is computed")
    burn: float = Field(0.1, ge=0, le=1, description="share of the first steps whose gradient is computed")
    memory: int = Field(2, ge=1, description="pairs of which the curvature is made")
    room: float = Field(4.0, gt=0, description="GiB on disk that the record may take")
    seed: int = Field(0, ge=0, description="seed of the initial weights")
    threads: int = Field(1, ge=1, description="threads in which the model is trained")

    def plan(self, source: Source) -> dict[str, Any]:
        """Rows, and the size of the record."""
        training = source.plan
        if training.optimizer != "sgd" or training.momentum or training.clip is not None:
            raise InputError("The recorded steps must be plain gradient descent.", "Choose sgd, no momentum, no clip.")
        needed = 2 * training.steps * sum(p.numel() * p.element_size() for p in source.fresh(0).values())
        if needed > self.room * 2**30:
            raise InputError(
                f"The record of {training.steps} steps needs {size(needed)} on disk.",
                f"Raise room (now {self.room:g} GiB), or train in fewer steps.",
            )
        return {"rows": [[name] for name in source.table.ids], "bytes": needed}

    def verify(self, job: Job, gone: Sequence[str]) -> None:
        """The record that a deletion starts from is whole."""
        record = job.record
        if not record.trained:
            check_room(record.folder, record.plan["bytes"], "The record of the training")
            return
        number = len(record.requests)
        if record.pending is not None and (record.stamp(_chunk(number, self._chunks(job) - 1)) or ("",))[0] == self._key(
            job, number, self._chunks(job) - 1
        ):
            return
        before = number - (record.pending is not None)
        data = digest_rows(job.source, _left(job, record.before))
        for k in range(self._chunks(job)):
            found = record.stamp(_chunk(before, k))
            if found is None:
                raise missing(record.folder / _chunk(before, k))
            if found != (self._key(job, before, k), data):
                raise stale(record.folder / _chunk(before, k))

    def bring(self, job: Job) -> None:
        """Write the record of this request's run; an interrupted training goes on, an interrupted deletion begins again."""
        record, number, last = job.record, len(job.record.requests), self._chunks(job) - 1
        done = 0
        while done <= last and (record.stamp(_chunk(number, done)) or ("",))[0] == self._key(job, number, done):
            done += 1
        if done <= last:
            start = done if number == 1 else 0  # curvature pairs are not kept, so a repeated run begins again
            with threads(self.threads), freed_memory_kept(), open_attention():
                self._run(job, start)
        for old in range(1, number):
            shutil.rmtree(record.folder / _run_folder(old), ignore_errors=True)

    def work(self, job: Job) -> Work:
        """Rows read: those of the computed gradients, and the deleted ones in between."""
        record, number = job.record, len(job.record.requests)
        counts = [record.load(_chunk(number, k), self._key(job, number, k))["counts"] for k in range(self._chunks(job))]
        visits, exact = torch.cat(counts).sum(0).tolist()
        if number == 1:
            return Work(visits, (), (f"The record takes {size(record.plan['bytes'])} on disk.",))
        return Work(visits, (f"{exact} of {job.source.plan.steps} gradients computed, the others corrected",))

    def module(self, job: Job) -> nn.Module:
        """The model after the last step."""
        number, last = len(job.record.requests), self._chunks(job) - 1
        held = job.record.load(_chunk(number, last), self._key(job, number, last))
        state = job.source.fresh(self.seed)
        model = job.source.module(state)
        with torch.no_grad():
            for name, value in unflatten(held["end"], moving(model)).items():
                model.get_parameter(name).copy_(value)
        return model

    def full_visits(self, job: Job) -> int:
        """Every batch without the deleted rows."""
        kept = self._kept(job)
        return sum(int(kept[rows].sum()) for rows in self._batches(job))

    def _run(self, job: Job, first: int) -> None:
        """Train, or repeat the training beside its record, from chunk ``first`` on."""
        source, record, number = job.source, job.record, len(job.record.requests)
        training = source.plan
        v, gradient = self._begin(job)
        if first:
            v = record.load(_chunk(number, first - 1), self._key(job, number, first - 1))["end"]
        kept, before = self._kept(job), self._kept(job, record.before)
        curvature, made = Curvature(self.memory), _Chunk()
        data = digest_rows(source, record.remaining)
        recorded = self._recorded(job, number - 1) if number > 1 else None
        for step, rows in enumerate(self._batches(job)):
            old = next(recorded) if recorded is not None else None
            if step < first * _CHUNK:
                continue
            held, gone = rows[kept[rows]], rows[before[rows] & ~kept[rows]]
            exact = old is None or step < self.burn * training.steps or step % self.period == 0 or not len(curvature)
            total, visits = torch.zeros_like(v), 0
            out = gradient(v, gone) if len(gone) else torch.zeros_like(v)
            if exact and len(held):
                total, visits = gradient(v, held), len(held)
                if old is not None:
                    curvature.add(v - old[0], (total + out) / len(rows[before[rows]]) - old[1])
            elif old is not None and len(held):
                total = len(rows[before[rows]]) * (old[1] + curvature.times(v - old[0])) - out
            g = total / max(1, len(held))
            made.add(v, g, visits + len(gone), exact)
            if len(held):
                v = v - training.lr * course(training, step) * (g + training.weight_decay * v)
            if len(made) == _CHUNK or step + 1 == training.steps:
                if not bool(torch.isfinite(v).all()):
                    raise Destroyed("The weights became NaN or infinite.", "Choose a smaller lr or a shorter period.")
                k = step // _CHUNK
                record.save(_chunk(number, k), self._key(job, number, k), made.tensors(v), data=data)
                job.lap()
                made = _Chunk()
            job.tell(step + 1, training.steps, "gradient descent" if old is None else "gradient descent without the rows")

    def _begin(self, job: Job) -> tuple[Tensor, Gradient]:
        """Initial weights, and the gradient of summed losses as a function of weights and places in the plan."""
        source = job.source
        model = source.module(source.fresh(self.seed))
        function, like = Function(model, source.forward), moving(model)
        ids = [row[0] for row in job.record.plan["rows"]]
        at = {k: source.positions[name] for k, name in enumerate(ids) if name in source.positions}
        place = torch.tensor([at.get(k, -1) for k in range(len(ids))])

        def gradient(weights: Tensor, rows: Tensor) -> Tensor:
            index = place[rows].numpy()
            if index.min() < 0:
                source.at([ids[int(k)] for k in rows])  # says which row is missing
            inputs = torch.from_numpy(source.table.inputs[index]).to(source.device)
            targets = torch.from_numpy(source.table.targets[index]).to(source.device)

            def total(w: Tensor) -> Tensor:
                return source.row_loss(function.at(unflatten(w, like), inputs), targets).sum()

            with evaluating(model):
                found: Tensor = grad(total)(weights.to(source.device))
            return found.detach().cpu()

        return flatten(like).cpu(), gradient

    def _recorded(self, job: Job, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights and batch gradient of each step of the run of a request."""
        for k in range(self._chunks(job)):
            held = job.record.load(_chunk(number, k), self._key(job, number, k))
            yield from zip(held["weights"], held["gradients"], strict=True)

    def _batches(self, job: Job) -> Iterator[Tensor]:
        """Places in the plan of the rows of each batch of the training, deleted ones included."""
        rows = len(job.record.plan["rows"])
        return (index.reshape(-1) for index in batches(job.source.plan, Members(torch.ones(1, rows), (self.seed,))))

    def _kept(self, job: Job, gone: Sequence[str] | None = None) -> Tensor:
        out = set(job.record.deleted if gone is None else gone)
        return torch.tensor([row[0] not in out for row in job.record.plan["rows"]])

    def _chunks(self, job: Job) -> int:
        return -(-job.source.plan.steps // _CHUNK)

    def _key(self, job: Job, requests: int, chunk: int) -> str:
        return job.record.key([list(r.ids) for r in job.record.requests[:requests]], chunk)


def _left(job: Job, gone: Sequence[str]) -> list[str]:
    out = set(gone)
    return [row[0] for row in job.record.plan["rows"] if row[0] not in out]


class _Chunk:
    """Some steps of a run, to be written together."""

    def __init__(self) -> None:
        self._weights: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._counts: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._weights)

    def add(self, weights: Tensor, gradient: Tensor, visits: int, exact: bool) -> None:
        self._weights.append(weights)
        self._gradients.append(gradient)
        self._counts.append((visits, int(exact)))

    def tensors(self, end: Tensor) -> dict[str, Tensor]:
        weights, gradients = torch.stack(self._weights), torch.stack(self._gradients)
        return {"weights": weights, "gradients": gradients, "counts": torch.tensor(self._counts), "end": end}


def _run_folder(number: int) -> str:
    return f"run-{number:05}"


def _chunk(number: int, chunk: int) -> str:
    return f"{_run_folder(number)}/{chunk:05}.safetensors"
