"""Audits of unlearning runs on rows: retrained models, reference models for single rows, one document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from safetensors.numpy import load_file, save_file
from torch import nn

from expunge.adapters.supervised import SupervisedAdapter
from expunge.audit.document import AuditDocument
from expunge.audit.outputs import References, row_outputs
from expunge.audit.run import AuditedModel, audit, limited
from expunge.audit.settings import AuditSettings
from expunge.core.errors import InputError
from expunge.core.files import atomic_path, digest_file, digest_json, write_text
from expunge.core.runs import Run, cache_folder
from expunge.core.settings import Settings
from expunge.data.records import RecordSet
from expunge.data.rows import Indices, Row
from expunge.engine.ensemble import Ensemble
from expunge.engine.loop import Progress
from expunge.engine.tasks import Workers
from expunge.pipeline.audit import DOCUMENT
from expunge.pipeline.row_runs import KIND, RowsConfig, halves, load_weights, sets_of
from expunge.pipeline.rows import plan_rows, run_rows
from expunge.pipeline.supervised import Supervised, member, target_of

_SECOND = 1000  #: first seed of reference models, so that they share none with the retrained models that are judged

Sets = Mapping[str, RecordSet[Row]]
Floats = npt.NDArray[np.float64]


class RowAuditConfig(Settings):
    """What an audit of rows compares with."""

    name: ClassVar[str] = "audit-rows"

    retrain: int = Field(0, ge=0, le=100, description="models to retrain here, with seeds 1, 2, ...")
    references: int = Field(
        0, ge=0, le=1000, description="further models trained with and without the forget rows, of each so many, for single rows"
    )
    repeats: int = Field(
        0,
        ge=0,
        le=1000,
        description="so many of the reference models that know the rows are unlearned as the run was: measures on many models",
    )
    workers: Workers = Field("local", description="where models are trained: local, or ray")
    settings: AuditSettings = Field(default_factory=AuditSettings, description="what is measured, and how sure it must be")

    @model_validator(mode="after")
    def _repeats_are_references(self) -> RowAuditConfig:
        if self.repeats > self.references:
            raise InputError(
                f"{self.repeats} reference models cannot be unlearned: there are {self.references}.",
                f"Raise --references to {self.repeats}, or lower --repeats.",
            )
        return self


@dataclass
class RowAuditPlan:
    """An audit that has passed every check and has not begun."""

    run: Run
    config: RowAuditConfig
    unlearning: RowsConfig
    problem: Supervised
    chosen: Indices
    sets: dict[str, RecordSet[Row]]

    def text(self) -> str:
        """One line on what it costs, for people."""
        c = self.config
        further = f", {2 * c.references} reference models" if c.references else ""
        further += f", {c.repeats} of them unlearned too" if c.repeats else ""
        rows = sum(len(s) for s in self.sets.values())
        return f"{2 + c.retrain} models, {c.retrain} of them retrained{further}; {rows:,} rows for each"


def is_rows(folder: Path) -> bool:
    """Whether a folder is a run on rows."""
    return (folder / "manifest.json").is_file() and Run.open(folder).manifest["kind"] == KIND


def plan(folder: Path, config: RowAuditConfig, problem: Supervised | None = None) -> RowAuditPlan:
    """Check that a run can be audited; nothing is trained or written.

    Raises:
        InputError: the run has not finished, its data have changed since, or nothing says how to retrain.
    """
    run = Run.open(folder)
    entry = run.manifest["stages"].get("unlearn", {})
    if entry.get("state") != "done":
        raise InputError(f"The run {str(folder)!r} has not finished.", f"Go on: expunge unlearn ... --out {folder} --resume.")
    unlearning = RowsConfig(**run.manifest["config"])
    held = unlearning.load() if problem is None else problem
    chosen = unlearning.choose(held.data)
    now = {"rows": held.data.rows().digest, "forget": held.data.rows(chosen).digest}
    if entry["inputs"]["data"] != now:
        raise InputError(f"The data have changed since the run {str(folder)!r}.", "Put them back, or unlearn again.")
    if (config.retrain or config.references) and not held.retrainable:
        raise InputError(
            "Nothing says how the model was trained, so none can be retrained.",
            "Let the entry give build=... with training=... or fit=....",
        )
    sets = {name: limited(rows, config.settings) for name, rows in sets_of(held, chosen, unlearning.engine.seed).items()}
    return RowAuditPlan(run, config, unlearning, held, chosen, sets)


def audit_rows_run(
    made: RowAuditPlan, *, progress: Progress | None = None, say: Callable[[str], None] = lambda _: None
) -> AuditDocument:
    """Audit one run, and leave ``audit.json`` in it; done again only if something has changed."""
    target = made.problem.adapter(target_of(made.problem, progress=progress))
    entry = made.run.manifest["stages"]["unlearn"]
    digest = target.fingerprint()
    if digest != entry["inputs"]["target"]:
        raise InputError("The target model is not the one that was unlearned.", "Unlearn again, or put the model back.")
    unlearned = audited(made.run, target)
    inputs = {
        "target": digest, "unlearned": entry["outputs"], "sets": {k: v.digest for k, v in made.sets.items()},
        "config": made.config.model_dump(mode="json", exclude={"workers"}),
    }  # fmt: skip

    def work() -> dict[str, Any]:
        gold, references = comparison(made.problem, target, made.chosen, made.sets, made.config, progress=progress)
        if references is not None and made.config.repeats:
            references = replace(references, unlearned={unlearned.label: repeated(made, target, progress=progress)})
        models = [AuditedModel("target", "target", target, path=made.unlearning.model), *gold, unlearned]
        title = f"{made.unlearning.method} on {made.unlearning.model}"
        document = measure(models, made.sets, made.config.settings, references, progress=progress, title=title)
        document.not_shown[:0] = entry["result"]["notes"]
        write_text(made.run.folder / DOCUMENT, document.model_dump_json(indent=2) + "\n")
        return {"verdicts": {m.label: m.judgement.verdict for m in document.models if m.judgement}}

    made.run.stage("audit", inputs, work, [DOCUMENT])
    if "audit" in made.run.skipped:
        say("audit: from an earlier run, nothing has changed since")
    return AuditDocument.model_validate_json((made.run.folder / DOCUMENT).read_text(encoding="utf-8"))


def audited(run: Run, target: SupervisedAdapter, label: str = "") -> AuditedModel:
    """The result of an unlearning run, with what making it cost.

    Raises:
        InputError: the weights have changed since.
    """
    entry, config = run.manifest["stages"]["unlearn"], RowsConfig(**run.manifest["config"])
    for name, digest in entry["outputs"].items():
        path = run.folder / name
        if name.startswith("model/") and (not path.is_file() or digest_file(path) != digest):
            raise InputError(f"{str(path)!r} is not what the run has written.", "Put it back, or do the run again.")
    return AuditedModel(
        label or config.method, "unlearned", load_weights(target, run.folder / "model"), path=str(run.folder),
        method=config.method, seed=config.engine.seed, cost=_cost(entry["result"]),
        settings={"recipe": entry["result"]["recipe"], "engine": entry["inputs"]["engine"]}, stopped=entry["result"]["sentence"],
    )  # fmt: skip


def audit_together(
    out: Path, runs: Sequence[Path], config: RowAuditConfig, *, title: str, progress: Progress | None = None
) -> AuditDocument:
    """One document about several runs on the same rows, in the run ``out``; done again only if something has changed.

    Raises:
        InputError: no run, one that has not finished, or runs that differ in target or rows.
    """
    if not runs:
        raise InputError("There is no run to audit.", "Name at least one.")
    made = [plan(folder, config) for folder in runs]
    first = made[0]
    target = first.problem.adapter(target_of(first.problem, progress=progress))
    inputs = [p.run.manifest["stages"]["unlearn"]["inputs"] for p in made]
    for p, held in zip(made, inputs, strict=True):
        if held["target"] != target.fingerprint() or held["data"] != inputs[0]["data"]:
            raise InputError(f"{str(p.run.folder)!r} forgets other rows, or from another model.", "Audit it by itself.")
    outputs = {p.run.folder.name: p.run.manifest["stages"]["unlearn"]["outputs"] for p in made}
    inputs_all = {
        "target": inputs[0]["target"], "runs": outputs, "sets": {k: v.digest for k, v in first.sets.items()}, "title": title,
        "config": config.model_dump(mode="json", exclude={"workers"}),
    }  # fmt: skip

    def work() -> dict[str, Any]:
        gold, references = comparison(first.problem, target, first.chosen, first.sets, config, progress=progress)
        if references is not None and config.repeats:
            many = {p.run.folder.name: repeated(p, target, progress=progress) for p in made}
            references = replace(references, unlearned=many)
        models = [AuditedModel("target", "target", target, path=first.unlearning.model), *gold]
        models += [audited(p.run, target, label=p.run.folder.name) for p in made]
        document = measure(models, first.sets, config.settings, references, progress=progress, title=title)
        notes = list(dict.fromkeys(n for p in made for n in p.run.manifest["stages"]["unlearn"]["result"]["notes"]))
        document.not_shown[:0] = notes
        write_text(out / DOCUMENT, document.model_dump_json(indent=2) + "\n")
        return {"verdicts": {m.label: m.judgement.verdict for m in document.models if m.judgement}}

    Run.open(out).stage("audit", inputs_all, work, [DOCUMENT])
    return AuditDocument.model_validate_json((out / DOCUMENT).read_text(encoding="utf-8"))


def originals(
    problem: Supervised, count: int, *, workers: Workers = "local", progress: Progress | None = None
) -> Ensemble | list[nn.Module]:
    """Reference models trained on everything: the same for every request on a problem."""
    seeds = list(range(_SECOND, _SECOND + count))
    return problem.trained(None, seeds, workers=workers, progress=progress, what="reference models with all rows")


def measure(
    models: Sequence[AuditedModel], sets: Sets, settings: AuditSettings, references: References | None, *,
    progress: Progress | None, title: str,
) -> AuditDocument:  # fmt: skip
    """Audit models of rows with what they say cached by content."""
    tell = None if progress is None else (lambda text, done, total: progress(done, total, text))
    return audit(models, sets, settings, references=references, cache=cache_folder() / "scores", progress=tell, title=title)


def comparison(
    problem: Supervised, target: SupervisedAdapter, chosen: Indices, sets: Sets, config: RowAuditConfig,
    *, progress: Progress | None = None,
) -> tuple[list[AuditedModel], References | None]:  # fmt: skip
    """The retrained models that are judged beside the unlearned one, and margins of the rows under further models.

    All are trained at once, and kept in the cache: other methods on the same request find them there.
    """
    gold: list[AuditedModel] = []
    if config.retrain:
        seeds = list(range(1, config.retrain + 1))
        held = problem.trained(chosen, seeds, workers=config.workers, progress=progress, what="retraining")
        for i, seed in enumerate(seeds):
            adapter = like(target, member(problem, held, i))
            gold.append(AuditedModel(f"retrained seed {seed}", "retrained", adapter, seed=seed))
    if not config.references:
        return gold, None
    seeds = list(range(_SECOND, _SECOND + config.references))
    what = "reference models without the forget rows"
    without = problem.trained(chosen, seeds, workers=config.workers, progress=progress, what=what)
    held_all = originals(problem, config.references, workers=config.workers, progress=progress)
    margins = [margins_of(problem, target, held, sets) for held in (without, held_all)]
    return gold, References(margins[0], margins[1])


def repeated(made: RowAuditPlan, target: SupervisedAdapter, *, progress: Progress | None = None) -> dict[str, Floats]:
    """Margins ``[models, n]`` by set of reference models that know the forget rows, after each was unlearned as the run was.

    Each with a seed of its own; what is done is kept in the cache.
    """
    held = originals(made.problem, made.config.references, workers=made.config.workers, progress=progress)
    found = []
    for i in range(made.config.repeats):
        if progress is not None:
            progress(i, made.config.repeats, "unlearning reference models")
        found.append(_unlearned(made, like(target, member(made.problem, held, i)), _SECOND + i))
    return {name: np.stack([f[name] for f in found]) for name in made.sets}


def _unlearned(made: RowAuditPlan, adapter: SupervisedAdapter, seed: int) -> dict[str, Floats]:
    """Margins of the rows of each set under a model after it was unlearned."""
    config = made.unlearning
    engine = config.engine.model_copy(update={"seed": seed, "checkpoint_every": 0, "trackers": ()})
    key = digest_json([
        adapter.fingerprint(), config.model_dump(mode="json", exclude={"model", "engine"}), engine.model_dump(mode="json"),
        made.problem.data.rows(made.chosen).digest, {name: rows.digest for name, rows in made.sets.items()},
    ])  # fmt: skip
    path = cache_folder() / "repeats" / f"{key}.safetensors"
    if not path.is_file():
        goal = halves(made.problem.holdout, config.engine.seed)[0] if made.problem.holdout is not None else None
        ready = plan_rows(
            adapter, made.problem.data, made.chosen, config.method, parts=config.parts, engine=engine, holdout=goal,
            how=config.alternatives, allow_overlap=config.allow_overlap, allow_large_forget=config.allow_large_forget,
        )  # fmt: skip
        run_rows(ready)
        margins = {
            name: row_outputs(adapter, rows, store=None, fingerprint="", batch_tokens=8192).margins
            for name, rows in made.sets.items()
        }
        with atomic_path(path) as temporary:
            save_file({name: np.ascontiguousarray(value) for name, value in margins.items()}, temporary)
    return dict(load_file(path))


def like(adapter: SupervisedAdapter, model: nn.Module) -> SupervisedAdapter:
    """The same settings around another model of the same shape."""
    made = adapter.copy()
    made.model.load_state_dict(model.state_dict())
    return made


def margins_of(
    problem: Supervised, target: SupervisedAdapter, held: Ensemble | list[nn.Module], sets: Sets
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """Margins ``[models, n]`` of the rows of each set under many models."""
    if not isinstance(held, Ensemble):
        adapters = [like(target, m) for m in held]
        return {
            name: np.stack([
                row_outputs(a, rows, store=None, fingerprint="", batch_tokens=8192).margins for a in adapters
            ])
            for name, rows in sets.items()
        }  # fmt: skip
    out = {}
    for name, rows in sets.items():
        batch = target.collate([target.encode(r) for r in rows])
        if problem.data.task == "classification":
            out[name] = held.margins(dict(batch.tensors), batch.targets).numpy()
        else:
            scores = held.logits(dict(batch.tensors)).double()
            out[name] = scores.reshape(len(held), len(rows)).numpy()
    return out


def _cost(result: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(result[k]) for k in ("seconds", "peak_bytes", "steps", "tokens")}
