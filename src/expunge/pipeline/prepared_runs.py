"""Runs of prepared methods: ``expunge train ENTRY --method sisa --out RUN``, or of a language model, and deletions from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor

from expunge.adapters.estimators import is_estimator
from expunge.core.errors import InputError
from expunge.core.files import atomic_path, write_json
from expunge.core.runs import Run
from expunge.core.settings import Settings, nest
from expunge.engine.outcome import Progress
from expunge.engine.prepared import DeletionReport, Prepared, TrainingReport
from expunge.engine.record import Record
from expunge.engine.source import Source
from expunge.engine.tasks import Workers
from expunge.methods.prepared.estimator_source import EstimatorSource
from expunge.methods.prepared.registry import PREPARED
from expunge.methods.prepared.text_source import TextSource
from expunge.pipeline.config import TrainConfig
from expunge.pipeline.supervised import Supervised, load_entry
from expunge.pipeline.texts import Texts, check_serves, keep_tokenizer, notes, open_texts

KIND = "prepared"
STORE = "prepared"  #: folder of the method within the run
DELETIONS = "deletions.json"
MODEL = "model"  #: of a language model: the model in use, in the layout of transformers
Problem = Supervised | Texts


class PreparedConfig(Settings):
    """Everything that a training by a prepared method depends on."""

    name: ClassVar[str] = "prepared"

    model: str = Field(
        description="package.module:function or file.py:function that returns expunge.Supervised; or a language model"
    )
    method: str = Field(description="name of a prepared method, such as sisa")
    parts: dict[str, Any] = Field(default_factory=dict, description="settings of the method")
    texts: TrainConfig | None = Field(None, description="how a language model is trained, and on what")
    holdout: str | None = Field(None, description="records that a language model is never trained on, for the audit")

    def build(self) -> Prepared:
        """The method with its settings.

        Raises:
            InputError: no such method or setting, or a value out of range.
        """
        return PREPARED.get(self.method)(**nest(dict(self.parts)))


@dataclass
class PreparedPlan:
    """A training that has passed every check and has not begun."""

    config: PreparedConfig
    method: Prepared
    problem: Problem
    source: Source


def _l1(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.reshape(len(outputs)) - targets).abs()


def problem_of(config: PreparedConfig, folder: Path | None = None) -> Problem:
    """Model and data that a configuration names; ``folder`` is that of its run, if it has begun.

    Raises:
        InputError: they do not fit.
    """
    if config.texts is None:
        return load_entry(config.model)
    check_serves(config.method)
    return open_texts(config.texts, config.holdout, folder)


def source_of(problem: Problem) -> Source:
    """Model and rows as prepared methods take them."""
    if isinstance(problem, Texts):
        return problem.source
    if problem.build is not None and is_estimator(problem.build()):
        return EstimatorSource(problem.data, problem.build)
    l1 = problem.data.task == "regression" and problem.loss == "l1"
    return Source(problem.data, problem.build, problem.training, loss=_l1 if l1 else None)


def plan(config: PreparedConfig, folder: Path | None = None) -> PreparedPlan:
    """Load what a configuration names and check that it fits; nothing is trained or written.

    Args:
        config: what is trained, on what, how.
        folder: of its run, if it has begun.

    Raises:
        InputError: anything does not fit.
    """
    method = config.build()
    problem = problem_of(config, folder)
    source = source_of(problem)
    method.plan(source)
    return PreparedPlan(config, method, problem, source)


def is_prepared(folder: Path) -> bool:
    """Whether a folder is a run of a prepared method."""
    return (folder / "manifest.json").is_file() and Run.open(folder).manifest["kind"] == KIND


def is_texts(folder: Path) -> bool:
    """Whether a folder is a run of a prepared method on texts."""
    return is_prepared(folder) and Run.open(folder).manifest["config"].get("texts") is not None


def train(
    made: PreparedPlan, out: Path, *, resume: bool = False, workers: Workers = "local", progress: Progress | None = None
) -> Run:
    """Train, and keep what a deletion needs in the run."""
    run = Run.start(out, KIND, made.config.model_dump(mode="json"), resume=resume)
    data = made.problem.data
    run.note_inputs(data={"rows": len(data), "digest": data.rows().digest, "source": made.config.model})
    inputs = {"data": data.rows().digest, "method": made.config.method, "settings": made.method.model_dump(mode="json")}
    run.check_same("train", inputs)

    def work() -> dict[str, Any]:
        store = out / STORE
        if isinstance(made.problem, Texts):
            keep_tokenizer(made.problem, out)
        if (
            store.exists() and Record.found(store) and Record.open(store).trained
        ):  # killed after the last file, before the manifest
            record = Record.open(store)
            done = TrainingReport(len(record.remaining), 0, record.training_seconds)
        else:
            done = made.method.train(made.source, store, workers=workers, progress=progress)
        write_model(made.method, made.source, out)
        told = asdict(done)
        if isinstance(made.problem, Texts):
            told["notes"] = [*told["notes"], *notes(made.problem)]
        return told

    run.stage("train", inputs, work, [])
    return run


def write_model(method: Prepared, source: Source, folder: Path) -> None:
    """Write the language model in use into a run, unless it is there; of rows nothing.

    What is there is always the model in use: a deletion removes it before anything else.
    """
    place = folder / MODEL
    if isinstance(source, TextSource) and not place.is_dir():
        with atomic_path(place) as temporary:
            source.adapter(method.load(source, folder / STORE)).save(temporary)


@dataclass(frozen=True)
class Deletion:
    """A request on a prepared run that has passed every check and has not begun."""

    run: Run
    method: Prepared
    source: Source
    ids: tuple[str, ...]
    notes: tuple[str, ...]


def plan_deletion(folder: Path, choice: dict[str, Any]) -> Deletion:
    """Check a request against a run; nothing is changed.

    Args:
        folder: of the run.
        choice: ids, classes, where, subjects; see :meth:`expunge.data.rows.Table.select`. Of a language model also forget, a
            file of records.

    Raises:
        InputError: the training has not finished, or the request names no rows that are left.
    """
    run = Run.open(folder)
    if run.manifest["stages"].get("train", {}).get("state") != "done":
        raise InputError(
            f"The training in {str(folder)!r} has not finished.", f"Go on: expunge train ... --out {folder} --resume."
        )
    config = PreparedConfig(**run.manifest["config"])
    problem = problem_of(config, folder)
    if all(value is None for value in choice.values()):
        raise InputError("Nothing says which rows to delete.", "Give --id, --class, --where or --subject.")
    record = Record.open(folder / STORE)
    choice = _read(choice, problem, record)
    absent = _absent(choice, problem, record)
    left = tuple(name for name in choice.get("ids") or () if name not in absent)
    chosen = (
        np.zeros(0, dtype=np.int64) if absent and not left else problem.data.select(**choice | ({"ids": left} if absent else {}))
    )
    pending = set(record.pending.ids) if record.pending is not None else set()
    gone = set(record.deleted) - pending
    named = [*absent, *(problem.data.ids[int(i)] for i in chosen)]
    if choice.get("ids") is None:
        # A class or a person may hold rows that an earlier request has taken out; rows named one by one must be there.
        named = [name for name in named if name not in gone]
        if not named:
            raise InputError("All rows of this choice were deleted already.", "Nothing is left to do.")
    there = {name: i for i, name in enumerate(problem.data.ids)}
    lost = np.array(sorted({*map(int, chosen), *(there[name] for name in gone if name in there)}), dtype=np.int64)
    emptied = problem.data.emptied(lost)  # by this deletion and those before it together
    notes = tuple(f"Of the class {c!r} no row is left: it is forgotten as a whole." for c in emptied)
    return Deletion(run, config.build(), source_of(problem), tuple(named), notes)


def _read(choice: dict[str, Any], problem: Problem, record: Record) -> dict[str, Any]:
    """A choice without a file of records: what it names is named by ids."""
    file = choice.get("forget")
    held = {name: value for name, value in choice.items() if name != "forget"}
    if file is None:
        return held
    if not isinstance(problem, Texts):
        raise InputError("--forget is for language models; rows are chosen from the model's own data.", "Choose them by --id.")
    if any(value is not None for value in held.values()):
        raise InputError("Records are named by a file and by a condition.", "Give --forget alone, or --id, --where or --subject.")
    return {**held, "ids": problem.requested(file, record)}


def _absent(choice: dict[str, Any], problem: Problem, record: Record) -> list[str]:
    """Ids that were trained on and are no longer in the data: who must forget a row may have taken it out there first."""
    if any(value is not None for name, value in choice.items() if name != "ids"):
        return []
    there, trained = set(problem.data.ids), {str(row[0]) for row in record.plan["rows"]}
    return [name for name in dict.fromkeys(choice.get("ids") or ()) if name in trained and name not in there]


def noun_of(source: Source) -> str:
    """What its data are counted in."""
    return "record" if source.table.task == "text" else "row"


def delete(made: Deletion, *, workers: Workers = "local", progress: Progress | None = None) -> DeletionReport:
    """Take the rows out, and write down what it cost; asked for again after a kill, it goes on."""
    path = made.run.folder / DELETIONS
    held = _accounted(path, Record.open(made.run.folder / STORE))
    if (made.run.folder / MODEL).is_dir():
        shutil.rmtree(made.run.folder / MODEL)  # it knows what is deleted
    try:
        report = made.method.delete(made.source, made.run.folder / STORE, made.ids, workers=workers, progress=progress)
    finally:
        if Record.open(made.run.folder / STORE).pending is None:  # refused, or done before a kill
            write_model(made.method, made.source, made.run.folder)
    write_json(path, [*held, {**asdict(report), "share": report.share, "notes": [*made.notes, *report.notes]}])
    return report


def _accounted(path: Path, record: Record) -> list[Any]:
    """The deletions that are written down, and those that ended just before a kill, as far as the method's own log knows them."""
    held: list[Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    for request in [r for r in record.requests[1:] if r.done][len(held) :]:
        note = "Written down later, from the log: the process was killed when this deletion had just ended."
        held.append({**asdict(request), "notes": [note]})
    return held


def report_text(report: DeletionReport, noun: str = "row") -> Sequence[str]:
    """What a deletion did, one sentence each."""
    part = f"{report.row_visits:,} of {report.full_row_visits:,} {noun} visits of a full retrain ({report.share:.1%})"
    return (
        f"Deleted {len(report.ids)} {noun}s; {report.remaining:,} are left. Redone: {'; '.join(report.redone) or 'nothing'}.",
        f"Cost: {part}, {report.seconds:.1f} s; the whole training took {report.full_seconds:.1f} s.",
        report.guarantee,
    )
