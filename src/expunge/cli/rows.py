"""What ``expunge unlearn`` and ``expunge audit`` do for classifiers and regressors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.cli.output import Output
from expunge.core.errors import InputError

_CHOICE = ("ids", "classes", "where", "subjects")
_TEXT_ONLY = {
    "forget": "--forget", "retain": "--retain", "alternative_template": "--alternative-template",
    "drop_overlap": "--drop-overlap", "text": "--column, or text.KEY=VALUE,", "requests": "--requests",
}  # fmt: skip


def is_rows(merged: Mapping[str, Any], choice: Mapping[str, Any]) -> bool:
    """Whether the settings are about rows: rows are chosen, rows are given, or the model is a function of the user's."""
    from expunge.pipeline.prepared_runs import is_prepared

    model = str(merged.get("model") or "")
    _, colon, name = model.rpartition(":")
    entry = bool(colon) and name.isidentifier() and not Path(model).exists()
    named = any(merged.get(k) is not None for k in (*_CHOICE, "data"))
    return entry or named or any(v is not None for v in choice.values()) or is_prepared(Path(model))


def rows_given(merged: Mapping[str, Any], choice: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a request on rows, from what was given; a file of names is read.

    Raises:
        InputError: something is for language models, or the model is missing.
    """
    from expunge.pipeline.prepared_runs import is_prepared

    given = {k: v for k, v in {**merged, **{k: v for k, v in choice.items() if v is not None}}.items() if v is not None}
    prepared = is_prepared(Path(str(given.get("model") or "")))
    for name, option in _TEXT_ONLY.items():
        if name == "forget" and prepared:
            continue
        if given.pop(name, None):
            raise InputError(
                f"{option} is for language models; rows are chosen from the model's own data.",
                "Choose them by --id, --class, --where or --subject.",
            )
    if "model" not in given:
        raise InputError("The model is missing.", "Give package.module:function or file.py:function; see expunge unlearn --help.")
    for name in ("ids", "classes", "subjects"):
        if name in given:
            several = given[name] if isinstance(given[name], (list, tuple)) else [given[name]]  # a file may give one alone
            given[name] = tuple(n for word in several for n in _listed(str(word)))
    parts = dict(given.get("parts") or {})
    if not prepared:
        given |= {name: parts.pop(name) for name in ("reading", "training") if name in parts}
        given["parts"] = parts
    return given


def unlearn_rows(
    merged: dict[str, Any], choice: Mapping[str, Any], out: Path | None, *, resume: bool, dry_run: bool, output: Output
) -> int:
    """Forget rows of a model, or delete them from a run of a prepared method."""
    from expunge.pipeline import row_runs
    from expunge.pipeline.prepared_runs import is_prepared
    from expunge.pipeline.unlearn import check_out

    given = rows_given(merged, choice)
    if is_prepared(Path(given["model"])):
        return _delete(given, out, dry_run=dry_run, output=output)
    if out is None:
        raise InputError("No folder for the run was given.", "Add --out RUN, for example --out runs/first.")
    settings = row_runs.RowsConfig(**given)
    check_out(out, resume)
    with output.progress("target") as progress:
        made = row_runs.plan(settings, dry=dry_run, progress=progress)
    for note in made.made.notes:
        output.note(note)
    kept = len(made.problem.data) - len(made.chosen)
    output.note(f"{settings.method}: {len(made.chosen)} rows to forget, {kept} to keep; {made.cost.text('rows')}")
    if dry_run:
        counts = {"forget": len(made.chosen), "retain": kept}
        output.result(
            {"cost": made.cost.json(), "rows": counts, "config": settings.model_dump(mode="json"), "notes": made.made.notes}
        )
        return 0
    with output.progress(settings.method) as progress:
        run = row_runs.execute(made, out, resume=resume, progress=progress)
    result = run.manifest["stages"]["unlearn"]["result"]
    reused = "unlearn" in run.skipped
    output.result({"run": str(out), "model": str(out / "model"), "reused": reused, **result})
    if reused:
        output.say("This run had finished; nothing was left to do.")
    output.say(result["sentence"])
    output.say(f"Model: {out / 'model'}   Next: expunge audit {out} --retrain 3 --references 16")
    return 0 if result["reached"] else 3


def _delete(given: dict[str, Any], out: Path | None, *, dry_run: bool, output: Output) -> int:
    from dataclasses import asdict

    from expunge.pipeline import prepared_runs as runs

    folder = Path(given.pop("model"))
    choice = {name: given.pop(name, None) for name in (*_CHOICE, "forget")}
    extra = sorted(k for k, v in given.items() if v)
    if extra or out is not None:
        named = {"parts": "KEY=VALUE", "engine": "--seed, or engine.KEY=VALUE,"}
        what = "--out" if out is not None else named.get(extra[0], f"--{extra[0].replace('_', '-')}")
        raise InputError(
            f"{what} does not go with a run of a prepared method: rows are deleted from it in place, by its own method.",
            f"Write: expunge unlearn {folder} --id ID.",
        )
    made = runs.plan_deletion(folder, choice)
    for note in made.notes:
        output.note(note)
    noun = runs.noun_of(made.source)
    output.note(f"{made.method.name}: {len(made.ids)} {noun}s are taken out of {folder}")
    if dry_run:
        output.result({"run": str(folder), "method": made.method.name, "ids": list(made.ids), "notes": list(made.notes)})
        return 0
    with output.progress("deleting") as progress:
        report = runs.delete(made, progress=progress)
    output.result({"run": str(folder), **asdict(report), "share": report.share})
    for sentence in runs.report_text(report, noun):
        output.say(sentence)
    return 0


def train_prepared(given: dict[str, Any], method: str | None, out: Path, *, resume: bool, dry_run: bool, output: Output) -> int:
    """Train a model of rows by a prepared method."""
    from expunge.methods.prepared.registry import PREPARED
    from expunge.pipeline import prepared_runs as runs

    if method is None:
        raise InputError(
            "The function says itself how its model is trained; `expunge unlearn` and `expunge audit` do it when it is needed.",
            f"Name a method that prepares for deletions: --method {', '.join(PREPARED.names())}.",
        )
    extra = sorted(k for k in given if k not in ("model", "parts") and given[k])
    if extra:
        raise InputError(f"{extra[0]!r} is for language models; the function brings its own data.", "Leave it out.")
    config = runs.PreparedConfig(model=given["model"], method=method, parts=given.get("parts") or {})
    return _train(config, out, resume=resume, dry_run=dry_run, output=output)


def train_texts(
    given: dict[str, Any], method: str, holdout: str | None, out: Path, *, resume: bool, dry_run: bool, output: Output
) -> int:
    """Train a language model by a prepared method."""
    from expunge.core.errors import unknown
    from expunge.methods.prepared.registry import PREPARED
    from expunge.pipeline import prepared_runs as runs
    from expunge.pipeline.config import TrainConfig
    from expunge.pipeline.texts import check_serves

    fields = PREPARED.get(method).model_fields
    check_serves(method)
    if not given.get("data"):
        raise InputError("No data to train on were given.", "Add --data DATA.")
    parts = dict(given.get("parts") or {})
    for key in parts:
        if key not in fields and key != "schedule":
            raise unknown(f"{method} parameter", key, [*fields, "schedule"])
    rest = {name: parts.pop(name) for name in ("schedule",) if name in parts}
    texts = TrainConfig(**{**given, "parts": rest})
    config = runs.PreparedConfig(model=given["model"], method=method, parts=parts, texts=texts, holdout=holdout)
    return _train(config, out, resume=resume, dry_run=dry_run, output=output)


def _train(config: Any, out: Path, *, resume: bool, dry_run: bool, output: Output) -> int:
    from expunge.pipeline import prepared_runs as runs
    from expunge.pipeline.unlearn import check_out

    check_out(out, resume)
    made = runs.plan(config, out if resume else None)
    noun = runs.noun_of(made.source)
    output.note(f"{config.method}: {len(made.problem.data)} {noun}s")
    if dry_run:
        output.result({f"{noun}s": len(made.problem.data), "config": config.model_dump(mode="json")})
        return 0
    with output.progress("training") as progress:
        run = runs.train(made, out, resume=resume, progress=progress)
    result = run.manifest["stages"]["train"]["result"]
    reused = "train" in run.skipped
    output.result({"run": str(out), "reused": reused, **result})
    if reused:
        output.say("This run had finished; nothing was left to do.")
    output.say(f"Trained on {result['rows']:,} {noun}s ({result['row_visits']:,} {noun} visits, {result['seconds']:.1f} s).")
    for note in result["notes"]:
        output.say(note)
    output.say(f"Next: expunge unlearn {out} --id ID")
    return 0


def audit_rows(run: Path, given: dict[str, Any], *, dry_run: bool, output: Output) -> Any:
    """The audit document of a run on rows, or of a prepared one; None after a dry run."""
    from expunge.pipeline import prepared_audit, row_audit
    from expunge.pipeline.prepared_runs import is_prepared, is_texts

    texts = is_texts(run)
    utility: dict[str, str] = given.pop("utility", {}) if texts else {}
    for name in ("retrained", "base", "utility"):
        if given.pop(name, None):
            if texts:
                raise InputError(
                    f"--{name} does not go with a run of a prepared method.", "It is compared with its own kind: --retrain 3."
                )
            raise InputError(
                f"--{name} is for language models.", "Models of rows are retrained here: --retrain 3 --references 16."
            )
    config = row_audit.RowAuditConfig(**given)
    made = prepared_audit.plan(run, config, utility) if is_prepared(run) else row_audit.plan(run, config)
    for note in getattr(made, "notes", ()):
        output.note(note)
    output.note(f"audit: {made.text()}")
    if dry_run:
        output.result({"cost": made.text(), "sets": {name: len(rows) for name, rows in made.sets.items()}})
        return None
    with output.progress("audit") as progress:
        if isinstance(made, prepared_audit.PreparedAuditPlan):
            return prepared_audit.audit_prepared(made, progress=progress, say=output.note)
        return row_audit.audit_rows_run(made, progress=progress, say=output.note)


def _listed(word: str) -> list[str]:
    """The word itself, or the lines of the file that ``@file`` names."""
    if not word.startswith("@"):
        return [word]
    path = Path(word[1:])
    if not path.is_file():
        raise InputError(f"There is no file {str(path)!r}.", "Write @FILE for a file with one name on each line.")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [name for name in names if name]
