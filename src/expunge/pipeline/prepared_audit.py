"""Audits of prepared runs: what is left after deletions, beside trainings by the same method that never saw the rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expunge.adapters.base import Adapter
from expunge.adapters.supervised import SupervisedAdapter
from expunge.audit.document import AuditDocument
from expunge.audit.run import AuditedModel, limited
from expunge.audit.settings import AuditSettings
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.core.files import write_text
from expunge.core.runs import Run, cache_folder
from expunge.data.records import RecordSet
from expunge.data.rows import Indices
from expunge.engine.outcome import Progress
from expunge.engine.prepared import Prepared
from expunge.engine.record import Record
from expunge.engine.source import Source
from expunge.methods.prepared.aggregate import Aggregate
from expunge.pipeline.audit import DOCUMENT
from expunge.pipeline.audit import measure as measure_texts
from expunge.pipeline.models import load_set
from expunge.pipeline.prepared_runs import DELETIONS, STORE, PreparedConfig, Problem, noun_of, problem_of, source_of, write_model
from expunge.pipeline.row_audit import RowAuditConfig, measure
from expunge.pipeline.row_runs import sets_of
from expunge.pipeline.supervised import Supervised
from expunge.pipeline.texts import Texts
from expunge.pipeline.texts import notes as text_notes


@dataclass
class PreparedAuditPlan:
    """An audit that has passed every check and has not begun.

    Attributes:
        run: of the prepared method.
        config: what is compared with.
        method: with its settings.
        source: model and data.
        problem: the same, as the user's function gave it.
        deleted: ids of all rows that were deleted, by whatever request.
        sets: what is measured.
    """

    run: Run
    config: RowAuditConfig
    method: Prepared
    source: Source
    problem: Problem
    deleted: tuple[str, ...]
    sets: dict[str, RecordSet[Any]]

    def text(self) -> str:
        """One line on what it costs, for people."""
        rows = sum(len(s) for s in self.sets.values())
        trainings = 1 + self.config.retrain
        noun = noun_of(self.source)
        return f"{2 + self.config.retrain} models, {trainings} of them trained by {self.method.name}; {rows:,} {noun}s for each"


def plan(folder: Path, config: RowAuditConfig, utility: Mapping[str, str] | None = None) -> PreparedAuditPlan:
    """Check that a run can be audited; nothing is trained or written.

    Args:
        folder: of the run.
        config: what is compared with.
        utility: of a language model, further sets that must stay known, by name.

    Raises:
        InputError: nothing was deleted yet, a deletion was interrupted, a deleted row is no longer in the data, the data are
            others, or reference models were asked for.
    """
    run = Run.open(folder)
    if config.references:
        raise InputError(
            "Reference models are trained many at once, which a prepared method does not do.", "Leave --references out."
        )
    if run.manifest["stages"].get("train", {}).get("state") != "done":
        raise InputError(f"The training in {str(folder)!r} has not finished.", "Go on: expunge train ... --resume.")
    record = Record.open(folder / STORE)
    if record.pending is not None:
        raise InputError("A deletion in this run was interrupted.", f"Ask for it again: expunge unlearn {folder} --id ID.")
    if not record.deleted:
        raise InputError("Nothing was deleted from this run, so there is nothing to audit.", f"expunge unlearn {folder} --id ID")
    settings = PreparedConfig(**run.manifest["config"])
    problem = problem_of(settings, folder)
    there = {name: i for i, name in enumerate(problem.data.ids)}
    for name in record.deleted:
        if name not in there:
            raise InputError(
                f"The deleted row {name!r} is no longer in the data, so nothing can be measured on it.",
                "Audit where the rows are still at hand.",
            )
    if run.manifest["stages"]["train"]["inputs"]["data"] != problem.data.rows().digest:
        raise InputError(f"The data have changed since the run {str(folder)!r}.", "Put them back, or train again.")
    chosen: Indices = np.sort(np.array([there[name] for name in record.deleted], dtype=np.int64))
    every: Mapping[str, RecordSet[Any]] = problem.sets(chosen) if isinstance(problem, Texts) else sets_of(problem, chosen, seed=0)
    if isinstance(problem, Texts):
        every = {**every, **{name: load_set(s, name, problem.config.text.columns) for name, s in (utility or {}).items()}}
    sets = {name: limited(rows, config.settings) for name, rows in every.items()}
    deleted = tuple(record.deleted)
    return PreparedAuditPlan(run, config, settings.build(), source_of(problem), problem, deleted, sets)


def audit_prepared(
    made: PreparedAuditPlan, *, progress: Progress | None = None, say: Callable[[str], None] = lambda _: None
) -> AuditDocument:
    """Audit one run, and leave ``audit.json`` in it; done again only if something has changed.

    The target is the same training with all rows, the retrained models are trainings without the deleted ones by the same
    method with further seeds. All are kept in the cache.
    """
    log = made.run.folder / DELETIONS
    deletions: list[dict[str, Any]] = json.loads(log.read_text(encoding="utf-8")) if log.is_file() else []
    inputs = {
        "deleted": list(made.deleted), "sets": {k: v.digest for k, v in made.sets.items()}, "deletions": deletions,
        "config": made.config.model_dump(mode="json", exclude={"workers"}),
    }  # fmt: skip

    write_model(made.method, made.source, made.run.folder)  # in case a deletion was killed when it had just ended

    def work() -> dict[str, Any]:
        models = _models(made, deletions, progress)
        title = f"{made.method.name} on {made.run.manifest['config']['model']}"
        said = list(dict.fromkeys(note for d in deletions for note in d["notes"]))
        if isinstance(made.problem, Texts):
            document = measure_texts(models, made.sets, made.config.settings, progress=progress, title=title)
            said += text_notes(made.problem)
        else:
            settings = _possible(made.config.settings, models)
            document = measure(models, made.sets, settings, None, progress=progress, title=title)
        document.not_shown[:0] = said
        write_text(made.run.folder / DOCUMENT, document.model_dump_json(indent=2) + "\n")
        return {"verdicts": {m.label: m.judgement.verdict for m in document.models if m.judgement}}

    made.run.stage("audit", inputs, work, [DOCUMENT])
    if "audit" in made.run.skipped:
        say("audit: from an earlier run, nothing has changed since")
    return AuditDocument.model_validate_json((made.run.folder / DOCUMENT).read_text(encoding="utf-8"))


def _models(made: PreparedAuditPlan, deletions: Sequence[dict[str, Any]], progress: Progress | None) -> list[AuditedModel]:
    """The target, the retrained models, and what the run holds now."""
    held = [AuditedModel("target", "target", _trained(made, made.method, (), progress), path=str(made.run.folder))]
    first = int(getattr(made.method, "seed", 0))
    for i in range(1, made.config.retrain + 1):
        other = made.method.model_copy(update={"seed": first + i})
        adapter = _trained(made, other, made.deleted, progress)
        held.append(AuditedModel(f"retrained seed {i}", "retrained", adapter, seed=first + i))
    last = deletions[-1]["guarantee"] if deletions and deletions[-1].get("guarantee") else made.method.guarantee
    seconds = float(sum(d.get("seconds", 0.0) for d in deletions))
    unlearned = AuditedModel(
        made.method.name, "unlearned", _held(made, made.method, made.run.folder / STORE), path=str(made.run.folder),
        method=made.method.name, seed=first, cost={"seconds": seconds},
        settings={"method": made.method.model_dump(mode="json")}, stopped=last,
    )  # fmt: skip
    return [*held, unlearned]


def _trained(
    made: PreparedAuditPlan, method: Prepared, without: Sequence[str], progress: Progress | None
) -> Adapter | Callable[[], Adapter]:
    """A training by a method, from the cache if it was done before."""
    key = {
        "method": method.name, "settings": method.model_dump(mode="json"), "data": made.problem.data.rows().digest,
        "training": made.source.described(), "without": sorted(without),
        "model": made.source.signature() if method.builds else None,
    }  # fmt: skip
    folder = cache_folder() / "prepared" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    if not (folder.exists() and Record.found(folder) and Record.open(folder).trained):
        method.train(made.source, folder, without=list(without), workers=made.config.workers, progress=progress)
    return _held(made, method, folder)


def _held(made: PreparedAuditPlan, method: Prepared, folder: Path) -> Adapter | Callable[[], Adapter]:
    """The model in a folder; of language models one at a time is in memory."""
    problem = made.problem
    if isinstance(problem, Texts):
        return lambda: problem.source.adapter(method.load(made.source, folder))
    return _adapter(problem, method.load(made.source, folder))


def _adapter(problem: Supervised, model: Any) -> SupervisedAdapter:
    """The adapter of a model that a prepared method has left.

    Several models that answer together have no layer whose output were the features of a row, so they offer none.
    """
    adapter = problem.adapter(model)
    if isinstance(model, Aggregate) and len(model.members) > 1:
        vars(adapter)["offers"] = adapter.offers - {Offer.FEATURES, Offer.MAPS}  # of this object alone
    return adapter


def _possible(settings: AuditSettings, models: Sequence[AuditedModel]) -> AuditSettings:
    """Without attacks on weights, where a model has none (a forest)."""
    adapters = [m.adapter for m in models]
    if all(any(p.numel() for p in a.model.parameters()) for a in adapters if isinstance(a, SupervisedAdapter)):
        return settings
    return settings.model_copy(update={"relearn": None, "quantise": ()})
