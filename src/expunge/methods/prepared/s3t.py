"""S3T: slices are learnt by adapters in layers from the top, so that a deletion switches adapters off and trains nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from expunge.adapters.supervised import ClassifierAdapter
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.engine.functional import Tensors
from expunge.engine.parts import Paper
from expunge.engine.prepared import Job, Prepared, Work
from expunge.engine.record import missing, stale
from expunge.engine.source import Source
from expunge.engine.tasks import spread
from expunge.methods.prepared import sequences
from expunge.methods.prepared.aggregate import Aggregate
from expunge.methods.prepared.dealing import Stage, deal, derived, digest_rows, train_stage, without_rows
from expunge.methods.prepared.lora import Adapted, base, grouped
from expunge.methods.prepared.registry import prepared

Part = tuple[int, ...]  #: (shard, slice, slice, ...): the beginning of a chain, counted from 0


@prepared
class S3T(Prepared):
    """Each slice is learnt by the adapters of other layers, from the top down; a deletion switches off those that came after.

    The rows are dealt into ``shards`` of ``slices``, and the blocks of a transformer, with low-rank adapters on all, into as many
    groups. A *chain* is an order of the slices: its stage j trains group j, counted from the output, and the head, while all
    else is frozen; the weights are kept after each stage. As group j has no influence on the groups before it, a deletion in
    the slice of stage j cuts the chain there: later adapters are switched off, and the head is that of stage j - 1, because it
    moves in every stage. Nothing is trained and no data are read. Every shard has ``chains`` orders; beginnings that they share
    are trained once. A shard answers by its longest chain, and is out once none is left; the answer is the mean of the
    scores over the shards.

    ``reads=union`` trains stage j on all slices of the chain so far, as the published code does, ``reads=slice`` on its own
    alone, as the paper writes; both are exact. ``training`` is that of one chain, over all its stages; optimiser and course of
    the step size begin anew at each. Orders are cyclic rotations, or, with the name of a column of deletion risks, rows of
    like risk share a slice and the orders are matched to the slices' risks. The base model is what ``build`` makes
    from ``seed``: it must not have been trained on rows that may be deleted.
    """

    name: ClassVar[str] = "s3t"
    title: ClassVar[str] = "Sequence-aware sharded sliced training"
    paper: ClassVar[Paper] = Paper(
        "Towards Scalable Exact Machine Unlearning Using Parameter-Efficient Fine-Tuning",
        "Somnath Basu Roy Chowdhury, Krzysztof Choromanski, Arijit Sehanobish, Avinava Dubey, Snigdha Chaturvedi",
        2024,
        "https://arxiv.org/abs/2406.16257",
    )
    formula: ClassVar[str] = (
        "stage j of chain pi: train (adapters of group j, head) on pi_1 ... pi_j; a deletion in pi_j keeps stages 1 to j - 1"
    )
    guarantee: ClassVar[str] = (
        "Exact: every stage that is left equals, bit by bit on the same kind of machine, that of a training in which the slices "
        "of the deleted rows never existed."
    )
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOSSES, Offer.LOGITS, Offer.CLASSES, Offer.ROWS})
    caveats: ClassVar[tuple[str, ...]] = (
        "Every deletion costs accuracy, because other rows of the slice are forgotten too; after many, train anew.",
        "The base model must not know the rows: only what the adapters and the head learnt is taken out.",
        "Adapters must not be merged into the base: merged ones cannot be switched off.",
    )

    shards: int = Field(5, ge=1, description="models trained apart")
    slices: int = Field(4, ge=1, description="parts of a shard, and groups of blocks")
    chains: int = Field(4, ge=1, description="orders of the slices that each shard is trained in")
    reads: Literal["union", "slice"] = Field("union", description="a stage trains on all slices so far, or on its own")
    rank: int = Field(16, ge=1, description="of the adapters")
    alpha: int = Field(32, ge=1, description="scale of the adapters")
    dropout: float = Field(0.01, ge=0, lt=1, description="of the adapters' inputs in training")
    rslora: bool = Field(True, description="divide alpha by the root of the rank, not by the rank")
    layers: tuple[str, ...] = Field(
        ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin"), description="last names of the linear layers that get adapters"
    )
    risk: str | None = Field(None, description="column of how likely each row is to be deleted; none: all alike")
    deletions: int = Field(100, ge=1, description="with risk: how many deletions the orders look ahead")
    seed: int = Field(0, ge=0, description="seed of the dealing, of the base where it draws weights, and of the adapters")
    threads: int = Field(1, ge=1, description="threads in which a chain is trained: a part of the promise of equal bits")

    def plan(self, source: Source) -> dict[str, Any]:
        """Rows with shard and slice, the orders, the groups of layers and the head."""
        table = source.table
        if table.task != "classification":
            raise InputError("The chains of shards answer by scores of classes.", "Choose another method for numbers.")
        model, risk = base(source.model, self.seed), self._risk(source)
        place = deal(len(table), self.shards, self.slices, self.seed, risk)
        source.part(self.slices, 0, 0, growing=self.reads == "union")
        if risk is None:
            chains = sequences.cyclic(range(self.slices), self.chains)
        else:
            held = np.array([risk[place[:, 1] == r].sum() for r in range(self.slices)])
            chains = sequences.matched((held / max(held.sum(), 1e-300)).tolist(), self.chains, self.deletions)
        return {
            "rows": [[name, *at] for name, at in zip(table.ids, place.tolist(), strict=True)],
            "chains": [list(chain) for chain in chains],
            "groups": [list(group) for group in grouped(model, self.slices, self.layers)],
            "head": ClassifierAdapter(model, table.classes).layers()[-1],
        }

    def verify(self, job: Job, gone: Sequence[str]) -> None:
        """In training, whatever is there was made of these rows; later, all stages that stay are there and some will be left."""
        record, held = job.record, self._slices(job)
        keys = self._keys(job, held)
        if not record.trained:
            for part, key in keys.items():
                found = record.stamp(_file(part))
                if found is not None and found != (key, digest_rows(job.source, held[part[0], part[-1]])):
                    raise stale(record.folder / _file(part))
            return
        hit = self._hit(job) | {(s, r) for name, s, r in record.plan["rows"] if name in set(gone)}
        if not any(self._living(job, s, hit) for s in range(self.shards)):
            raise InputError("No chain of any shard would be left.", "Train anew without the rows.")
        due = hit if record.pending is not None else self._hit(job)
        for part, key in keys.items():
            if not _dead(part, due):
                found = record.stamp(_file(part))
                if found is None:
                    raise missing(record.folder / _file(part))
                if found[0] != key:
                    raise stale(record.folder / _file(part))

    def work(self, job: Job) -> Work:
        """Row visits of the training; of a deletion none."""
        if job.record.pending is None:
            left = sequences.expected_deletions(self.shards, self.slices, self.chains)
            return Work(
                self.full_visits(job), (), (f"About {left:.0f} deletions of rows that are alike until no chain is left.",)
            )
        before, after = self._hit(job, pending=False), self._hit(job)
        redone, alive = [], []
        for s in range(self.shards):
            chains = job.record.plan["chains"]
            old, new = ([sequences.length(c, {r for at, r in hit if at == s}) for c in chains] for hit in (before, after))
            if old != new:
                ended = sum(b == 0 < a for a, b in zip(old, new, strict=True))
                cut = sum(0 < b < a for a, b in zip(old, new, strict=True))
                redone.append(f"shard {s + 1}: {cut} chains cut, {ended} ended, {max(new)} of {self.slices} stages left")
            alive.append(max(new) > 0)
        return Work(0, tuple(redone), (f"{sum(alive)} of {self.shards} shards are left.",))

    def bring(self, job: Job) -> None:
        """Train what is missing, or remove the stages that are cut off."""
        record, held = job.record, self._slices(job)
        keys = self._keys(job, held)
        if record.trained:
            for part in keys:
                if _dead(part, self._hit(job)):
                    (record.folder / _file(part)).unlink(missing_ok=True)
            return
        todo = [part for part in keys if record.stamp(_file(part)) is None]
        if todo and job.workers == "local":
            with job.uncounted():
                job.source.warm()
        total, done = sum(self._visits(job, held, part) for part in todo), 0
        for stage in range(self.slices):
            wave = [part for part in todo if len(part) == stage + 2]
            for part, found in self._train(job, wave, held, keys):
                record.save(_file(part), keys[part], found, data=digest_rows(job.source, held[part[0], part[-1]]))
                job.lap()
                done += self._visits(job, held, part)
                job.tell(done, total, f"shard {part[0] + 1}, slices {', '.join(str(r + 1) for r in part[1:])}")

    def module(self, job: Job) -> nn.Module:
        """The longest chain of each shard that has one, joined."""
        keys, hit = self._keys(job, self._slices(job)), self._hit(job)
        chains = [found for s in range(self.shards) if (found := self._living(job, s, hit))]
        members = []
        for part in chains:
            model = self._adapted(job, None)()
            held = dict(model.named_parameters())
            with torch.no_grad():
                for name, value in self._state(job, part, keys).items():
                    held[name].copy_(value)
            members.append(model.to(job.source.device))
        return Aggregate(members, "logits", job.source.forward).eval()

    def full_visits(self, job: Job) -> int:
        """All stages of all chains, those that they share once, on the rows that are left."""
        held = self._slices(job, job.record.deleted)
        return sum(self._visits(job, held, part) for part in self._parts(job))

    def _train(
        self, job: Job, wave: Sequence[Part], held: dict[tuple[int, int], list[str]], keys: dict[Part, str]
    ) -> Iterator[tuple[Part, Tensors]]:
        bare = without_rows(job.source)

        def stages() -> Iterator[tuple[Part, Stage]]:
            for part in wave:
                if ids := self._reads(held, part):
                    source = dataclasses.replace(bare, build=self._adapted(job, len(part) - 2))
                    training = self._stage_training(job, part)
                    start = self._state(job, part[:-1], keys)
                    yield part, Stage(source, *job.source.rows(ids), training, derived(self.seed, *part), start)

        idle = [part for part in wave if not self._reads(held, part)]
        for part in idle:
            adapted = self._adapted(job, len(part) - 2)
            names = adapted.moving(adapted())
            fresh = dataclasses.replace(bare, build=adapted).fresh(derived(self.seed, *part))
            yield part, {name: value for name, value in {**fresh, **self._state(job, part[:-1], keys)}.items() if name in names}
        if len(idle) < len(wave):
            adapted = self._adapted(job, len(wave[0]) - 2)
            names = adapted.moving(adapted())
            for part, found in spread(train_stage, self.threads, stages(), workers=job.workers, address=job.address):
                yield part, {name: value for name, value in found.items() if name in names}

    def _state(self, job: Job, part: Part, keys: dict[Part, str]) -> Tensors:
        """What the stages of the beginning of a chain have made: the adapters of each, the head of the last."""
        out: Tensors = {}
        for end in range(2, len(part) + 1):
            out |= job.record.load(_file(part[:end]), keys[part[:end]])
        return out

    def _adapted(self, job: Job, stage: int | None) -> Adapted:
        plan = job.record.plan
        groups = tuple(tuple(group) for group in plan["groups"])
        return Adapted(
            job.source.model, self.seed, groups, plan["head"], self.rank, self.alpha, self.dropout, self.rslora, stage
        )  # fmt: skip

    def _parts(self, job: Job) -> list[Part]:
        """Beginnings of all chains of all shards, the shorter ones first."""
        chains = [tuple(chain) for chain in job.record.plan["chains"]]
        starts = sorted({chain[:end] for chain in chains for end in range(1, self.slices + 1)}, key=lambda c: (len(c), c))
        return [(s, *start) for start in starts for s in range(self.shards)]

    def _keys(self, job: Job, held: dict[tuple[int, int], list[str]]) -> dict[Part, str]:
        keys: dict[Part, str] = {}
        for part in self._parts(job):
            keys[part] = job.record.key(list(part), held[part[0], part[-1]], keys.get(part[:-1], ""))
        return keys

    def _slices(self, job: Job, gone: Sequence[str] | None = None) -> dict[tuple[int, int], list[str]]:
        """Ids in each slice, without those that the training left out (or those that are ``gone``)."""
        out = set(job.record.without if gone is None else gone)
        held: dict[tuple[int, int], list[str]] = {(s, r): [] for s in range(self.shards) for r in range(self.slices)}
        for name, s, r in job.record.plan["rows"]:
            if name not in out:
                held[s, r].append(name)
        return held

    def _hit(self, job: Job, *, pending: bool = True) -> set[tuple[int, int]]:
        """Slices in which a row was deleted after the training."""
        gone = set(job.record.deleted if pending else job.record.before) - set(job.record.without)
        return {(s, r) for name, s, r in job.record.plan["rows"] if name in gone}

    def _living(self, job: Job, shard: int, hit: set[tuple[int, int]]) -> Part:
        """The longest beginning of a chain of a shard without a hit slice; empty if there is none."""
        inside = {r for s, r in hit if s == shard}
        chain = max(job.record.plan["chains"], key=lambda c: sequences.length(c, inside))
        left = sequences.length(chain, inside)
        return (shard, *chain[:left]) if left else ()

    def _reads(self, held: dict[tuple[int, int], list[str]], part: Part) -> list[str]:
        read = part[1:] if self.reads == "union" else part[-1:]
        return [name for r in read for name in held[part[0], r]]

    def _stage_training(self, job: Job, part: Part) -> Any:
        seed = derived(job.source.plan.seed, *part)
        return job.source.part(self.slices, len(part) - 2, seed, growing=self.reads == "union")

    def _visits(self, job: Job, held: dict[tuple[int, int], list[str]], part: Part) -> int:
        return job.source.visits(self._stage_training(job, part), len(self._reads(held, part)))

    def _risk(self, source: Source) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        if self.risk is None:
            return None
        if self.risk not in source.table.columns:
            known = ", ".join(source.table.columns) or "none"
            raise InputError(f"The data have no column {self.risk!r}.", f"They have: {known}.")
        found = np.asarray(source.table.columns[self.risk], dtype=np.float64)
        if not np.isfinite(found).all() or (found < 0).any():
            raise InputError(f"The risks in {self.risk!r} must be finite and not negative.", "Give rates or probabilities.")
        return found


def _dead(part: Part, hit: set[tuple[int, int]]) -> bool:
    return any((part[0], r) in hit for r in part[1:])


def _file(part: Part) -> str:
    return f"shards/{part[0] + 1:03}/{'-'.join(str(r + 1) for r in part[1:])}.safetensors"
