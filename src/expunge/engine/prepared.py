"""Prepared methods: they shape the training, so that what a row did can be taken out later, exactly or within a stated bound.

A prepared method trains into a folder and deletes rows from it. The folder is written so that a process may be killed at any
moment: what was asked for is written down before any work, every file is written whole or not at all, and calling the same
function again goes on where it stopped, to the same bits.
"""

from __future__ import annotations

import abc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from expunge.core.access import Offer
from expunge.core.errors import InputError, unknown
from expunge.core.files import alone
from expunge.core.settings import Settings
from expunge.engine.parts import Paper
from expunge.engine.record import Record
from expunge.engine.source import Source
from expunge.engine.tasks import Workers

Tell = Callable[[int, int, str], None]  #: (row visits done, of how many, what is being done)


@dataclass(frozen=True)
class TrainingReport:
    """What a training cost.

    Attributes:
        rows: rows trained on.
        row_visits: rows read, each as often as it was.
        seconds: of all calls together, if it was interrupted.
        notes: what a report must say, one sentence each.
    """

    rows: int
    row_visits: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DeletionReport:
    """What a deletion did and cost, beside training anew without the rows.

    Attributes:
        ids: the rows deleted.
        redone: what was trained again or undone, in words ("shard 3: slices 2 to 4").
        guarantee: what is promised about the result, in words.
        row_visits: rows read for it, each as often as it was.
        full_row_visits: those of training anew on the rows that are left.
        seconds: of all calls together, if it was interrupted.
        full_seconds: those that the training took on this or another machine.
        remaining: rows left.
        notes: what a report must say, one sentence each.
    """

    ids: tuple[str, ...]
    redone: tuple[str, ...]
    guarantee: str
    row_visits: int
    full_row_visits: int
    seconds: float
    full_seconds: float
    remaining: int
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Row visits as a share of those of training anew."""
        return self.row_visits / max(1, self.full_row_visits)


@dataclass(frozen=True)
class Work:
    """What bringing a folder up to date takes.

    Attributes:
        row_visits: rows read.
        redone: what is trained or undone, in words.
        notes: what a report must say.
    """

    row_visits: int
    redone: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class Job:
    """A folder that is being worked on.

    Attributes:
        source: model and data.
        record: the folder's plan and log.
        workers: where independent pieces are done.
        progress: told about row visits.
        address: of a Ray cluster.
    """

    source: Source
    record: Record
    workers: Workers = "local"
    progress: Tell | None = None
    address: str | None = None
    _spent: float = field(default_factory=time.perf_counter)

    def tell(self, done: int, total: int, what: str) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress(done, total, what)

    def lap(self) -> None:
        """Write down the seconds since the last lap."""
        now = time.perf_counter()
        self.record.spend(now - self._spent)
        self._spent = now

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Time that is no part of the cost: a process's first look at a library."""
        begun = time.perf_counter()
        yield
        self._spent += time.perf_counter() - begun


class Prepared(Settings, abc.ABC):
    """One prepared method and its parameters; registered by :func:`expunge.methods.prepared.registry.prepared`."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[Paper]
    formula: ClassVar[str]
    guarantee: ClassVar[str]  #: what is promised about a model after a deletion, in words
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOSSES, Offer.ROWS})  #: what its modality must have
    caveats: ClassVar[tuple[str, ...]] = ()
    builds: ClassVar[bool] = True  #: whether the source's builder makes its models

    def train(
        self,
        source: Source,
        folder: Path,
        *,
        without: Sequence[str] = (),
        workers: Workers = "local",
        address: str | None = None,
        progress: Tell | None = None,
    ) -> TrainingReport:
        """Train into a folder; a training that was interrupted there goes on.

        Args:
            source: model and data.
            folder: is made; what it needs later is kept in it.
            without: rows that take part in the plan and are not learnt: what a deletion of them must equal.
            workers: "local" or "ray": where independent pieces are trained.
            address: of a Ray cluster.
            progress: called with row visits done and to do.

        Raises:
            InputError: the data do not fit the settings; the folder holds something else, or is trained already.
        """
        folder = Path(folder)
        plan = {**self._common(source), **self.plan(source)}
        gone = self._known(list(without), plan["rows"])
        self.check_removal(plan, gone)
        if folder.exists() and Record.found(folder):
            record = self._record(source, folder)
            if record.trained:
                raise InputError(f"The folder {str(folder)!r} holds a finished training.", "Choose another, or delete from it.")
            if record.plan["rows"] != json.loads(json.dumps(plan["rows"])):
                raise InputError("The interrupted training was of other rows.", "Give the same, or choose another folder.")
            if record.without != gone:
                raise InputError("The interrupted training left other rows out.", "Leave out the same, or choose another folder.")
        else:
            record = Record.new(folder, plan, gone)
        with alone(folder):
            record.sweep()
            job = Job(source, record, workers, progress, address)
            self.verify(job, gone)
            self.bring(job)
            job.lap()
            work = self.work(job)
            record.end(work.row_visits, work.redone)
        return TrainingReport(len(record.remaining), work.row_visits, record.training_seconds, work.notes)

    def delete(
        self,
        source: Source,
        folder: Path,
        ids: Sequence[str],
        *,
        workers: Workers = "local",
        address: str | None = None,
        progress: Tell | None = None,
    ) -> DeletionReport:
        """Take rows out of what was trained in a folder; all of ``ids`` together cost what the dearest parts of each cost once.

        A deletion that was interrupted is finished by asking for it again, and nothing else can be asked for before.

        Args:
            source: as in training; the deleted rows need not be in its table.
            folder: of a finished training.
            ids: rows to delete.
            workers, address, progress: see :meth:`train`.

        Raises:
            InputError: a row is unknown or was deleted already; too little would be left; the folder is damaged, unfinished, of
                another method, or of other data or settings.
        """
        folder = Path(folder)
        record = self._record(source, folder)
        with alone(folder):
            record.read()
            record.sweep()
            self._finished(record)
            wanted = self._known(list(ids), record.plan["rows"])
            if not wanted:
                raise InputError("No row is named.", "Give the ids of the rows to delete.")
            pending = record.pending
            if pending is not None and sorted(pending.ids) != sorted(wanted):
                shown = ", ".join(pending.ids[:5])
                raise InputError(f"The deletion of {len(pending.ids)} rows ({shown}) was interrupted.", "Ask for it again first.")
            again = sorted(set(wanted) & set(record.deleted if pending is None else record.before))
            if again:
                raise InputError(f"The row {again[0]!r} was deleted already.", f"Leave it out ({len(again)} such rows).")
            self.check_removal(record.plan, [*record.deleted, *wanted])
            job = Job(source, record, workers, progress, address)
            self.verify(job, wanted)
            if pending is None:
                record.begin(wanted)
            self.bring(job)
            job.lap()
            work = self.work(job)
            done = record.end(work.row_visits, work.redone)
        return DeletionReport(
            done.ids,
            work.redone,
            self.promise(job),
            work.row_visits, self.full_visits(job), done.seconds, record.training_seconds,
            len(record.remaining), work.notes,
        )  # fmt: skip

    def load(self, source: Source, folder: Path) -> nn.Module:
        """The model in a folder as one module, in evaluation mode: inputs of rows -> scores.

        Raises:
            InputError: the folder is damaged, unfinished, of another method, or of other data or settings.
        """
        record = self._record(source, Path(folder))
        self._finished(record)
        if record.pending is not None:
            raise InputError("A deletion in this folder was interrupted.", "Ask for it again, then load.")
        return self.module(Job(source, record))

    # ---- what a method says ------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def plan(self, source: Source) -> dict[str, Any]:
        """What is fixed at the start: JSON, with ``rows``, the list of rows, each a list that begins with its id.

        Raises:
            InputError: the data do not fit the settings.
        """

    def check_removal(self, plan: dict[str, Any], gone: Sequence[str]) -> None:
        """Whether the rows that are left without ``gone`` are enough.

        Raises:
            InputError: they are not.
        """
        if len(gone) >= len(plan["rows"]):
            raise InputError("No row would be left.", "Keep at least one, or remove the folder.")

    @abc.abstractmethod
    def verify(self, job: Job, gone: Sequence[str]) -> None:
        """Whether the files are good that a training without ``gone``, or a deletion of them, starts from; called before work.

        Raises:
            InputError: one is damaged, missing, or of other data.
        """

    @abc.abstractmethod
    def work(self, job: Job) -> Work:
        """What the training or the open request, which is done by now, took in all, over however many calls."""

    @abc.abstractmethod
    def bring(self, job: Job) -> None:
        """Bring the files up to date with the rows that are left; what is up to date is not done again."""

    @abc.abstractmethod
    def module(self, job: Job) -> nn.Module:
        """The model of an up-to-date folder.

        Raises:
            InputError: a file is damaged, missing or stale.
        """

    def promise(self, job: Job) -> str:
        """What is promised about the model in an up-to-date folder, in words."""
        return self.guarantee

    @abc.abstractmethod
    def full_visits(self, job: Job) -> int:
        """Row visits of a training on the rows that are left."""

    # ---- common ------------------------------------------------------------------------------------------------------

    def _common(self, source: Source) -> dict[str, Any]:
        table = source.table
        return {
            "format": 1,
            "method": self.name,
            "settings": self.model_dump(mode="json"),
            "training": source.described(),
            "model": source.signature() if self.builds else None,
            "task": table.task,
            "classes": list(table.classes),
        }

    def _record(self, source: Source, folder: Path) -> Record:
        """The folder's record, after a look whether it belongs to this method, model and kind of data."""
        record = Record.open(folder)
        _same(record.plan, self._common(source))
        return record

    def _known(self, ids: list[str], rows: Sequence[Sequence[Any]]) -> list[str]:
        held = {str(row[0]) for row in rows}
        for name in ids:
            if name not in held:
                raise unknown("row", name, held)
        if len(set(ids)) < len(ids):
            raise InputError("A row is named twice.", "Name each once.")
        return ids

    @staticmethod
    def _finished(record: Record) -> None:
        if not record.trained:
            raise InputError(
                f"The training in {str(record.folder)!r} is unfinished.", "Train into the same folder again to go on."
            )


def _same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    words = {"model": "another model", "task": "another task", "classes": "other classes", "format": "another version"}
    if found.get("method") != wanted["method"]:
        raise InputError(f"The folder was made by {found.get('method')!r}, not by {wanted['method']!r}.", "Name its own method.")
    for key, value in wanted.items():
        if found.get(key) == value:
            continue
        if key in words:
            raise InputError(f"The folder was made with {words[key]}.", "Give the one of the training.")
        ours, theirs = value or {}, found.get(key) or {}
        name = next(k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k))
        raise InputError(
            f"The folder was made with {name}={theirs.get(name)}, not {ours.get(name)}.", "Give that of the training."
        )
