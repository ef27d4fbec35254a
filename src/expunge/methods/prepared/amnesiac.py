"""Amnesiac unlearning: what single batches did to the weights is kept, and taken back when a row of theirs is deleted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.core.errors import InputError
from expunge.core.files import check_room, size
from expunge.engine.functional import Tensors
from expunge.engine.members import Members, Spec, batches, train_members, visits
from expunge.engine.parts import Paper
from expunge.engine.prepared import Job, Prepared, Work
from expunge.engine.record import missing, stale
from expunge.engine.source import Source
from expunge.engine.tasks import threads
from expunge.methods.prepared.registry import prepared

_FILE = "model.safetensors"


@prepared
class Amnesiac(Prepared):
    """What every batch with a sensitive row did to the weights is kept; deleting a row subtracts what its batches did.

    ``theta <- theta - sum of delta_b`` over the batches b that held a deleted row, each subtracted once. Later batches were
    computed from weights that those batches had moved, which no subtraction undoes: after a deletion in the last step alone the
    model is the one before that step, and otherwise near it as long as few batches are taken back. The record is one set of
    weights for each batch with a sensitive row; ``sensitive`` names the column that says which rows may be deleted. The
    published fine-tuning afterwards is not part of it.
    """

    name: ClassVar[str] = "amnesiac"
    title: ClassVar[str] = "Amnesiac unlearning (updates taken back)"
    paper: ClassVar[Paper] = Paper(
        "Amnesiac Machine Learning", "Laura Graves, Vineel Nagisetty, Vijay Ganesh", 2021, "https://arxiv.org/abs/2010.10981"
    )
    formula: ClassVar[str] = "theta <- theta - sum over batches b with a deleted row of delta_b"
    guarantee: ClassVar[str] = (
        "Approximate, without a bound: the updates of the batches that held the rows are taken back, their influence on later "
        "updates is not. Audit the model."
    )
    caveats: ClassVar[tuple[str, ...]] = (
        "A row is in one batch of every pass: many passes, or many rows, take most of the training back.",
        "With momentum or Adam a batch moves the weights in later steps too, and that part stays.",
    )

    sensitive: str | None = Field(None, description="column that is true for rows that may be deleted; none: all may")
    room: float = Field(4.0, gt=0, description="GiB on disk that the updates may take")
    seed: int = Field(0, ge=0, description="seed of the initial weights")
    threads: int = Field(1, ge=1, description="threads in which the model is trained")

    def plan(self, source: Source) -> dict[str, Any]:
        """Rows, and whether each may be deleted."""
        table = source.table
        kept = np.ones(len(table), dtype=bool)
        if self.sensitive is not None:
            if self.sensitive not in table.columns:
                raise InputError(
                    f"The data have no column {self.sensitive!r}.", f"They have: {', '.join(table.columns) or 'none'}."
                )
            kept = np.asarray(table.columns[self.sensitive]).astype(bool)
        if not kept.any():
            raise InputError("No row is sensitive.", "Mark those that may be deleted.")
        weights = sum(p.numel() * p.element_size() for p in source.fresh(0).values())
        steps = len(self._steps(source, len(table), np.flatnonzero(kept)))
        if steps * weights > self.room * 2**30:
            raise InputError(
                f"The updates of {steps} batches need {size(steps * weights)} on disk.",
                f"Raise room (now {self.room:g} GiB), mark fewer rows as sensitive, or train in fewer steps.",
            )
        return {"rows": [[name, bool(k)] for name, k in zip(table.ids, kept, strict=True)], "bytes": steps * weights}

    def verify(self, job: Job, gone: Sequence[str]) -> None:
        """The model and the updates that are going to be taken back are there, and the rows were sensitive."""
        record = job.record
        if not record.trained:
            check_room(record.folder, record.plan["bytes"], "The record of the updates")
            return
        closed = {name for name, sensitive in record.plan["rows"] if not sensitive} & set(gone)
        if closed:
            raise InputError(f"Nothing was recorded of the row {min(closed)!r}: it was not sensitive.", "Train anew without it.")
        done = len(record.requests) - (record.pending is not None)
        found = record.stamp(_FILE)
        if found is None:
            raise missing(record.folder / _FILE)
        if record.pending is not None and found[0] == self._key(job, done + 1):
            return
        if found[0] != self._key(job, done):
            raise stale(record.folder / _FILE)
        for step in self._new(job, record.before, gone):
            if record.stamp(_update(step)) is None:
                raise missing(record.folder / _update(step))

    def bring(self, job: Job) -> None:
        """Train and record, or take updates back; an interrupted training begins again."""
        record = job.record
        if not record.trained:
            record.save(_FILE, self._key(job, 1), self._train(job))
            return
        gone = list(record.requests[-1].ids)
        taken, now = self._new(job, record.before, gone), len(record.requests)
        found = record.stamp(_FILE)
        if found is None or found[0] != self._key(job, now):
            held = record.load(_FILE, self._key(job, now - 1))
            total: dict[str, Tensor] = {}
            for step in taken:
                for name, value in record.load(_update(step), self._update_key(job, step)).items():
                    total[name] = total.get(name, 0) + value.double()
            after = {name: (v.double() - total[name]).to(v.dtype) if name in total else v for name, v in held.items()}
            record.save(_FILE, self._key(job, now), after)
        for step in taken:
            (record.folder / _update(step)).unlink(missing_ok=True)

    def work(self, job: Job) -> Work:
        """Nothing is read but updates."""
        record, steps = job.record, job.source.plan.steps
        if record.pending is None:
            return Work(self.full_visits(job), (), (f"The updates take {size(record.plan['bytes'])} on disk.",))
        taken = len(self._new(job, record.before, record.requests[-1].ids))
        every = len(self._new(job, [], record.deleted))
        notes = (f"{every} of {steps} steps of the training are taken back in all.",)
        return Work(0, (f"{taken} of {steps} updates taken back",), notes)

    def module(self, job: Job) -> nn.Module:
        """The model."""
        return job.source.module(job.record.load(_FILE, self._key(job, len(job.record.requests))))

    def full_visits(self, job: Job) -> int:
        """The steps of a training."""
        return visits(job.source.plan, len(job.record.remaining))

    def _train(self, job: Job) -> Tensors:
        record, source = job.record, job.source
        learnt = record.remaining
        sensitive = torch.tensor([s for name, s in record.plan["rows"] if name in set(learnt)])
        inputs, targets = source.rows(learnt)
        spec = Spec(source.model, inputs, targets, source.plan, source.row_loss, source.forward, source.device)
        before = {name: value.to(source.device) for name, value in source.fresh(self.seed).items()}

        def watch(step: int, rows: Tensor, now: Tensors) -> None:
            if sensitive[rows.reshape(-1)].any():
                change = {name: value.detach()[0] - before[name] for name, value in now.items()}
                record.save(_update(step), self._update_key(job, step), change)
            before.update({name: value.detach()[0].clone() for name, value in now.items()})
            job.tell(step, source.plan.steps, "training, with a record of updates")

        with threads(self.threads):
            found = train_members(spec, Members(torch.ones(1, len(learnt)), (self.seed,)), watch=watch)
        return {name: value[0] for name, value in found.items()}

    def _new(self, job: Job, before: Sequence[str], gone: Sequence[str]) -> list[int]:
        """Steps whose batches held a row of ``gone`` and that were not taken back for ``before``."""
        learnt = [row[0] for row in job.record.plan["rows"] if row[0] not in set(job.record.without)]
        place = {name: k for k, name in enumerate(learnt)}
        old, new = (np.array([place[n] for n in ids if n in place], dtype=np.int64) for ids in (before, gone))
        return sorted(self._steps(job.source, len(learnt), new) - self._steps(job.source, len(learnt), old))

    def _steps(self, source: Source, rows: int, chosen: np.ndarray[Any, np.dtype[np.int64]]) -> set[int]:
        """Steps, counted from 1, whose batch holds one of the ``chosen`` rows of the ``rows`` that are learnt."""
        inside = torch.zeros(rows, dtype=torch.bool)
        inside[torch.from_numpy(chosen)] = True
        members = Members(torch.ones(1, rows), (self.seed,))
        return {step for step, index in enumerate(batches(source.plan, members), start=1) if inside[index.reshape(-1)].any()}

    def _key(self, job: Job, requests: int) -> str:
        return job.record.key([list(r.ids) for r in job.record.requests[:requests]])

    def _update_key(self, job: Job, step: int) -> str:
        return job.record.key("update", step, job.record.without)


def _update(step: int) -> str:
    return f"updates/{step:07}.safetensors"
