"""Audit runs: gather the models that a verdict needs, measure, judge, write ``audit.json`` into the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from expunge.adapters.base import Adapter
from expunge.audit.document import AuditDocument, Role
from expunge.audit.run import AuditedModel, access_of, audit
from expunge.audit.settings import AuditSettings
from expunge.core.errors import InputError
from expunge.core.files import digest_file, write_text
from expunge.core.runs import Run, cache_folder
from expunge.core.settings import Settings
from expunge.data.named import companions, is_named
from expunge.data.records import RecordSet
from expunge.engine.outcome import Progress
from expunge.pipeline.audit_cost import AuditCost, audit_cost
from expunge.pipeline.config import TextConfig, UnlearnConfig
from expunge.pipeline.guarding import is_guarded
from expunge.pipeline.models import check_source, load_set, open_adapter, resolve
from expunge.pipeline.train import finished, retrained, retraining_of
from expunge.pipeline.tuned import unseen
from expunge.pipeline.unlearn import Request, load_request, split_holdout

DOCUMENT = "audit.json"
SERVED = "served-v1"  #: protocol of models that can only be asked
_AUDITED = ("unlearn", "unlearn-rows", "prepared")  #: kinds of runs that an audit can be asked of


class AuditConfig(Settings):
    """What an audit compares with."""

    name: ClassVar[str] = "audit"

    retrained: tuple[str, ...] = Field((), description="models trained without the forget set: hub ids, folders or run folders")
    retrain: int = Field(0, ge=0, le=50, description="models to retrain here, with seeds 1, 2, ...")
    base: str | None = Field(None, description="the untrained base, if the target was not trained by `expunge train`")
    utility: dict[str, str] = Field(default_factory=dict, description="further sets that must stay known, by name")
    all_records: bool = Field(False, description="judge on records too that the settings were chosen on")
    leave_out: str | None = Field(None, description="a sweep whose records are left out, as they are for runs of its settings")
    settings: AuditSettings = Field(default_factory=AuditSettings, description="what is measured, and how sure it must be")


def sets_of(config: UnlearnConfig, request: Request, utility: Mapping[str, str]) -> dict[str, RecordSet]:
    """The sets that are scored: the request's own, of the holdout the half that training never looked at, and utility sets.

    A published data set brings its own versions with paraphrased and wrong answers, and its utility sets.
    """
    found: dict[str, RecordSet] = {"forget": request.forget}
    if request.retain is not None:
        found["retain"] = request.retain
    if request.holdout is not None:
        found["holdout"] = split_holdout(request.holdout, config.engine.seed)[1]
    published = companions(config.forget) if is_named(config.forget) else None
    for name, source in {**(published.audit if published else {}), **utility}.items():
        found[name] = load_set(source, name, config.text.columns)
    return found


def lazily(source: str, text: TextConfig) -> Callable[[], Adapter]:
    """A function that loads a model when it is needed."""
    return lambda: open_adapter(source, text)


def retrained_models(
    config: UnlearnConfig, audit_config: AuditConfig, forget: RecordSet, progress: Progress | None, say: Callable[[str], None]
) -> list[AuditedModel]:
    """The gold standard: given models, and models retrained here (or found in the cache)."""
    given = [
        AuditedModel(f"retrained {i + 1}", "retrained", lazily(m, config.text), path=m)
        for i, m in enumerate(audit_config.retrained)
    ]
    for seed in range(1, audit_config.retrain + 1):
        say(f"retraining without the forget set, seed {seed} of {audit_config.retrain}")
        folder = retrained(
            config.model, forget, seed, base=audit_config.base or config.base, retain=config.retain, progress=progress, say=say
        )
        given.append(entry_of(f"retrained seed {seed}", "retrained", folder, config.text, seed=seed, stage="train"))
    return given


def entry_of(
    label: str, role: Role, folder: Path, text: TextConfig, *, seed: int, stage: str, method: str = "", **more: str
) -> AuditedModel:
    """A model that a finished run holds, with what making it cost; ``more`` joins its settings."""
    entry = Run.open(folder).manifest["stages"][stage]
    result = entry["result"]
    cost = {k: float(result[k]) for k in ("seconds", "peak_bytes", "steps", "tokens")}
    settings = {
        "recipe": result.get("recipe", entry["inputs"].get("recipe", {})),
        "engine": entry["inputs"].get("engine", {}),
        **more,
    }
    return AuditedModel(
        label, role, lazily(str(folder), text), path=str(folder), method=method, seed=seed, cost=cost, settings=settings,
        stopped=result["sentence"], asked=is_guarded(folder / "model"),
    )  # fmt: skip


def target_model(config: UnlearnConfig) -> AuditedModel:
    """The model before unlearning."""
    return AuditedModel("target", "target", lazily(config.model, config.text), path=config.model, seed=None)


def unlearned_model(run: Path, label: str | None = None) -> AuditedModel:
    """The result of an unlearning run.

    Raises:
        InputError: the run has not finished.
    """
    held = Run.open(run)
    config = UnlearnConfig(**held.manifest["config"])
    if held.manifest["stages"].get("unlearn", {}).get("state") != "done":
        raise InputError(f"The run {str(run)!r} has not finished.", f"Go on: expunge unlearn ... --out {run} --resume.")
    return entry_of(
        label or config.method, "unlearned", run, config.text, seed=config.engine.seed, stage="unlearn", method=config.method
    )


@dataclass
class AuditPlan:
    """An audit of a run that has passed every check and has not begun."""

    run: Run
    config: AuditConfig
    unlearning: UnlearnConfig
    request: Request
    unlearned: AuditedModel
    sets: dict[str, RecordSet]
    cost: AuditCost
    notes: list[str]


def plan(folder: Path, config: AuditConfig) -> AuditPlan:
    """Check that a run can be audited, and say what it will cost; nothing is trained, scored or written.

    Raises:
        InputError: no unlearning run, data that have changed since, a model or set that is not there, or nothing that says how
            to retrain, or an access that the run's model does not give.
    """
    run = Run.open(folder)
    _check_kind(run)
    settings = UnlearnConfig(**run.manifest["config"])
    unlearned = unlearned_model(folder)
    if unlearned.asked:
        config = config.model_copy(update={"settings": of_served(config.settings)})
    measured = config.settings.within(access_of([unlearned], config.settings.access))
    request = load_request(settings)
    for name, records in (("forget", request.forget), ("retain", request.retain), ("holdout", request.holdout)):
        recorded = run.manifest["inputs"].get(name, {}).get("digest")
        if records is not None and recorded not in (None, records.digest):
            raise InputError(
                f"The {name} data have changed since the run {str(folder)!r}.", "Put the file back, or unlearn again."
            )
    for source in (settings.model, *config.retrained):
        check_source(source)
    found = sets_of(settings, request, config.utility)
    sets, notes = unseen(folder, settings.tuned, found, everything=config.all_records, leave_out=config.leave_out)
    missing, steps = 0, 0
    for seed in range(1, config.retrain + 1):
        made = retraining_of(settings.model, request.forget, seed, base=config.base or settings.base, retain=settings.retain)
        missing += not finished(made[1])
    manifest = Path(settings.model) / "manifest.json"
    if missing and manifest.is_file():
        steps = int(Run.open(manifest.parent).manifest["stages"]["train"]["result"]["steps"])
    models = 2 + len(config.retrained) + config.retrain
    cost = audit_cost(folder, sets, measured, models=models, retrain=missing, retrain_steps=steps)
    return AuditPlan(run, config, settings, request, unlearned, sets, cost, notes)


def of_served(settings: AuditSettings) -> AuditSettings:
    """The settings with which a guard is audited: under ``served-v1``, unless a protocol or attacks were named."""
    if settings.protocol is not None or settings.attacks:
        return settings
    return AuditSettings.under(SERVED, **{name: getattr(settings, name) for name in settings.model_fields_set - {"attacks"}})


def _check_kind(run: Run, kinds: Sequence[str] = ("unlearn",)) -> None:
    kind, folder = run.manifest["kind"], run.folder
    whole = (folder if kind == "sequence" else folder.parent) / "manifest.json"
    if whole.is_file() and Run.open(whole.parent).manifest["kind"] == "sequence":
        raise InputError(
            f"{str(folder)!r} belongs to a sequence of requests, which is audited when it is done, as a whole.",
            f"Repeat its command with --resume --retrain 3: expunge unlearn MODEL --requests FILE ... --out {whole.parent}.",
        )
    if kind not in kinds:
        raise InputError(
            f"{str(folder)!r} is a run of kind {kind!r}, not of `expunge unlearn`.", "Give the folder that its --out named."
        )


def audit_run(made: AuditPlan, *, progress: Progress | None = None, say: Callable[[str], None] = lambda _: None) -> AuditDocument:
    """Audit one unlearning run, and leave ``audit.json`` in it; done again only if something has changed.

    Args:
        made: the checked audit.
        progress: of the work.
        say: told what is being done, and if nothing had to be.
    """
    gold = retrained_models(made.unlearning, made.config, made.request.forget, progress, say)
    models = [target_model(made.unlearning), *gold, made.unlearned]
    title = f"{made.unlearned.method} on {made.unlearning.model}"
    if not audit_stage(made.run, models, made.sets, made.config.settings, progress=progress, title=title, notes=made.notes):
        say("audit: from an earlier run, nothing has changed since")
    return read(made.run.folder)


def audit_stage(
    run: Run, models: Sequence[AuditedModel], sets: Mapping[str, RecordSet], settings: AuditSettings, *,
    progress: Progress | None, title: str, notes: Sequence[str] = (), after: Callable[[], Sequence[str]] = tuple,
) -> bool:  # fmt: skip
    """Leave ``audit.json`` in a run; False if what is there is of the same models, sets and settings.

    ``notes`` are what the report must say first of what it does not show; ``after`` is asked for more when all is measured.
    """
    inputs = {
        "models": [[m.label, resolve(m.path), weights_of(m.path)] for m in models],
        "sets": {k: v.digest for k, v in sets.items()}, "settings": settings.model_dump(mode="json"),
        **({"notes": list(notes)} if notes else {}),
    }  # fmt: skip

    def work() -> dict[str, Any]:
        document = measure(models, sets, settings, progress=progress, title=title)
        document.not_shown[:0] = [*notes, *after()]
        write_text(run.folder / DOCUMENT, document.model_dump_json(indent=2) + "\n")
        return {"verdicts": {m.label: m.judgement.verdict for m in document.models if m.judgement}}

    if run.done("audit", inputs):
        return False
    run.stage("audit", inputs, work, [DOCUMENT])
    return True


def measure(
    models: Sequence[AuditedModel],
    sets: Mapping[str, RecordSet],
    settings: AuditSettings,
    *,
    progress: Progress | None,
    title: str,
) -> AuditDocument:
    """Audit models with the scores cached by content."""
    tell = None if progress is None else (lambda text, done, total: progress(done, total, text))
    return audit(models, sets, settings, cache=cache_folder() / "scores", progress=tell, title=title)


def read(folder: Path) -> AuditDocument:
    """The audit of a run.

    Raises:
        InputError: it has none.
    """
    path = folder / DOCUMENT
    if not path.is_file():
        _check_kind(Run.open(folder), _AUDITED)
    if not path.is_file():
        raise InputError(f"The run {str(folder)!r} has not been audited.", f"Do it: expunge audit {folder} --retrain 3.")
    return AuditDocument.model_validate_json(path.read_text(encoding="utf-8"))


def read_all(folders: Sequence[Path]) -> list[AuditDocument]:
    """The audits of runs; of a sequence of requests, one for each request.

    Raises:
        InputError: a run has none.
    """
    found: list[AuditDocument] = []
    for folder in folders:
        parts = requests_of(folder)
        found += [read(part) for part in parts or [folder]]
    return found


def by_request(documents: Sequence[AuditDocument]) -> list[list[AuditDocument]]:
    """Audits grouped by what was to be forgotten, in order: only these can be compared."""
    groups: dict[str, list[AuditDocument]] = {}
    for document in documents:
        groups.setdefault(str(document.data.get("forget", {}).get("digest")), []).append(document)
    return list(groups.values())


def requests_of(folder: Path) -> list[Path]:
    """The runs of a sequence of requests, in order; none for any other folder."""
    if not (folder / "manifest.json").is_file() or Run.open(folder).manifest["kind"] != "sequence":
        return []
    return sorted(p.parent for p in folder.glob("*/manifest.json"))


def weights_of(source: str) -> dict[str, str]:
    """Digests of a local model's weights as they lie there now; nothing for a hub id."""
    place = Path(resolve(source))
    return {p.name: digest_file(p) for p in sorted(place.glob("*.safetensors"))} if place.is_dir() else {}
