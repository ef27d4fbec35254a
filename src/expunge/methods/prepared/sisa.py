"""SISA: shards that are trained apart and slice by slice, so that a deletion trains a part of one shard again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from expunge.core.errors import InputError
from expunge.engine.functional import Tensors
from expunge.engine.parts import Paper
from expunge.engine.prepared import Job, Prepared, Work
from expunge.engine.record import missing, stale
from expunge.engine.source import Source
from expunge.engine.tasks import spread
from expunge.methods.prepared.aggregate import Aggregate, Rule
from expunge.methods.prepared.dealing import Stage, deal, derived, digest_rows, train_stage, without_rows
from expunge.methods.prepared.registry import prepared

Place = tuple[int, int]  #: (shard, slice), counted from 0
Keys = dict[Place, str]


@prepared
class SISA(Prepared):
    """Shards are trained apart, each slice by slice with a checkpoint after each; a deletion goes back to the slice of the row.

    The rows are dealt at random into ``shards`` of ``slices``. Stage r of a shard trains on slices 1 to r, from the weights of
    stage r - 1. A deletion drops the row, throws away the checkpoints from its slice on, and trains those stages again: of this
    shard alone, and once for all rows that are deleted together. The shards' answers are joined by ``aggregate``.

    ``training`` is that of one shard, over all its slices: stage r gets ``2 r / (slices (slices + 1))`` of the steps, so that
    every stage makes equally many passes over what it reads, and the shard as many as without slices (the published code
    rounds passes in the same proportion). No part of the plan changes by a deletion, and rows are never dealt anew.

    Optimiser and course of the step size begin anew at each slice. The published code carries the optimiser on in one run and
    loses it in a restart, so that a shard trained again differs; with the reset the two are one, and a checkpoint holds weights
    alone. The order of the rows in a stage depends on the seeds, its shard, its number and how many rows slices 1 to r hold, and
    on no later slice. Every shard is trained by itself with ``threads`` threads, here or on a worker: trained together as one
    ensemble they would be faster and differ in the last bits. On one kind of machine the bits are equal; another processor or
    version of the libraries may round otherwise.
    """

    name: ClassVar[str] = "sisa"
    title: ClassVar[str] = "Sharded, isolated, sliced and aggregated training"
    paper: ClassVar[Paper] = Paper(
        "Machine Unlearning",
        "Lucas Bourtoule, Varun Chandrasekaran, Christopher A. Choquette-Choo, Hengrui Jia, Adelin Travers, Baiwu Zhang, "
        "David Lie, Nicolas Papernot",
        2021,
        "https://arxiv.org/abs/1912.03817",
    )
    formula: ClassVar[str] = (
        "theta_s,r = train(theta_s,r-1, D_s,1 + ... + D_s,r); a deletion in D_s,r trains theta_s,r to theta_s,R anew"
    )
    guarantee: ClassVar[str] = (
        "Exact: every checkpoint equals, bit by bit on the same kind of machine, that of a training on the same plan that never "
        "saw the deleted rows."
    )
    caveats: ClassVar[tuple[str, ...]] = (
        "Small shards learn less, and less the harder the task: compare the accuracy with that of one shard.",
        "Exact holds for deletions that were not chosen by looking at the model; the plan still names the deleted ids.",
    )

    shards: int = Field(5, ge=1, description="models trained apart")
    slices: int = Field(4, ge=1, description="parts of a shard, with a checkpoint after each")
    aggregate: Rule | None = Field(
        None, description="joint answer: mean of probabilities, vote, or mean of logits; none: probabilities, of numbers the mean"
    )
    seed: int = Field(0, ge=0, description="seed of the dealing of the rows and of the initial weights")
    threads: int = Field(1, ge=1, description="threads in which a shard is trained: a part of the promise of equal bits")

    def plan(self, source: Source) -> dict[str, Any]:
        """Rows with their shard and slice."""
        if source.table.task == "regression" and self.aggregate not in (None, "logits"):
            raise InputError(f"Numbers cannot be joined by aggregate={self.aggregate}.", "Choose aggregate=logits: their mean.")
        place = deal(len(source.table), self.shards, self.slices, self.seed).tolist()
        self.stage_training(source, (0, 0))
        return {"rows": [[name, *at] for name, at in zip(source.table.ids, place, strict=True)]}

    def check_removal(self, plan: dict[str, Any], gone: Sequence[str]) -> None:
        """Every shard must keep a row."""
        out = set(gone)
        kept = {shard for name, shard, _ in plan["rows"] if name not in out}
        for shard in range(self.shards):
            if shard not in kept:
                raise InputError(f"Shard {shard + 1} would have no row left.", "Train anew with fewer shards.")

    def verify(self, job: Job, gone: Sequence[str]) -> None:
        """Look at the files of the shards that are touched: all of them in training."""
        record, out = job.record, set(gone)
        new = record.trained and record.pending is None
        shards = {row[1] for row in record.plan["rows"] if not record.trained or row[0] in out}
        before = self._keys(job, record.before)
        after = self._keys(job, [*record.before, *gone] if record.trained else record.before)
        held = self._slices(job, [*record.before, *gone])
        for place in sorted(p for p in before if p[0] in shards):
            found, path = record.stamp(_file(place)), record.folder / _file(place)
            kept = record.trained and before[place] == after[place]
            if found is None:
                if kept or new:
                    raise missing(path)
                continue
            allowed = {before[place], after[place]} if not new else {before[place]}
            if found[0] not in allowed or (found[0] == after[place] and found[1] != digest_rows(job.source, held[place])):
                raise stale(path)

    def work(self, job: Job) -> Work:
        """The stages whose rows change."""
        record = job.record
        after = self._keys(job, record.deleted)
        before = {} if record.pending is None and not record.trained else self._keys(job, record.before)
        held = self._slices(job, record.deleted)
        changed = sorted(place for place in after if before.get(place) != after[place])
        first = {s: min(r for at, r in changed if at == s) + 1 for s in sorted({s for s, _ in changed})}
        last = f" to {self.slices}"
        redone = [f"shard {s + 1}: {f'slices {r}{last}' if r < self.slices else f'slice {r}'}" for s, r in first.items()]
        return Work(sum(self._visits(job, held, place) for place in changed), tuple(redone))

    def bring(self, job: Job) -> None:
        """Train what is missing, one stage of all shards after the other; stale checkpoints are removed first."""
        record, keys = job.record, self._keys(job, job.record.deleted)
        held = self._slices(job, record.deleted)
        todo = {place for place in keys if (record.stamp(_file(place)) or ("",))[0] != keys[place]}
        todo |= {(s, r) for s, r in keys if any((s, early) in todo for early in range(r))}
        for place in todo:
            (record.folder / _file(place)).unlink(missing_ok=True)
        if todo and job.workers == "local":
            with job.uncounted():
                job.source.warm()
        total, done = sum(self._visits(job, held, place) for place in todo), 0
        for r in range(self.slices):
            wave = sorted(place for place in todo if place[1] == r)
            for place, found in self._train(job, wave, held, keys):
                record.save(_file(place), keys[place], found, data=digest_rows(job.source, held[place]))
                job.lap()
                done += self._visits(job, held, place)
                job.tell(done, total, f"shard {place[0] + 1}, slice {r + 1}")

    def module(self, job: Job) -> nn.Module:
        """The last checkpoints of all shards, joined."""
        keys = self._keys(job, job.record.deleted)
        last = [(s, self.slices - 1) for s in range(self.shards)]
        members = [job.source.module(job.record.load(_file(place), keys[place])) for place in last]
        numbers = job.source.table.task == "regression"
        return Aggregate(members, self.aggregate or ("logits" if numbers else "probabilities"), job.source.forward).eval()

    def full_visits(self, job: Job) -> int:
        """All stages of all shards."""
        held = self._slices(job, job.record.deleted)
        return sum(self._visits(job, held, place) for place in held)

    def stage_training(self, source: Source, place: Place) -> Any:
        """How a stage is trained: its part of the steps, and an order of the rows of its own."""
        seed = 0 if source.training is None else source.training.seed
        return source.part(self.slices, place[1], derived(seed, *place), growing=True)

    def _train(
        self, job: Job, wave: Sequence[Place], held: dict[Place, list[str]], keys: Keys
    ) -> Iterator[tuple[Place, Tensors]]:
        """Some stages of different shards, wherever the workers are; a stage without rows leaves the weights as they are."""
        source, record = job.source, job.record
        bare = without_rows(source)

        def stages() -> Iterator[tuple[Place, Stage]]:
            for s, r in wave:
                ids = [name for early in range(r + 1) for name in held[s, early]]
                if ids:
                    start = record.load(_file((s, r - 1)), keys[s, r - 1]) if r else {}
                    training = self.stage_training(source, (s, r))
                    yield (s, r), Stage(bare, *source.rows(ids), training, derived(self.seed, s, 0), start)

        idle = [(s, r) for s, r in wave if not any(held[s, early] for early in range(r + 1))]
        yield from ((place, source.fresh(derived(self.seed, place[0], 0))) for place in idle)
        if len(idle) < len(wave):
            yield from spread(train_stage, self.threads, stages(), workers=job.workers, address=job.address)

    def _visits(self, job: Job, held: dict[Place, list[str]], place: Place) -> int:
        s, r = place
        rows = sum(len(held[s, early]) for early in range(r + 1))
        return job.source.visits(self.stage_training(job.source, place), rows)

    def _slices(self, job: Job, gone: Sequence[str]) -> dict[Place, list[str]]:
        """Ids in each slice without those that are gone, in the order of the plan."""
        out = set(gone)
        held: dict[Place, list[str]] = {(s, r): [] for s in range(self.shards) for r in range(self.slices)}
        for name, s, r in job.record.plan["rows"]:
            if name not in out:
                held[s, r].append(name)
        return held

    def _keys(self, job: Job, gone: Sequence[str]) -> Keys:
        """What made each checkpoint, by the ids of its rows and those of the stages before."""
        keys: Keys = {}
        for (s, r), ids in sorted(self._slices(job, gone).items()):
            keys[s, r] = job.record.key(s, r, ids, keys.get((s, r - 1), ""))
        return keys


def _file(place: Place) -> str:
    return f"shards/{place[0] + 1:03}/slice-{place[1] + 1:03}.safetensors"
