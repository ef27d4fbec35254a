"""What ``expunge unlearn`` and ``expunge audit`` do for classifiers and regressors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.cli.output import Output
from expunge.core.errors import InputError

_CHOICE = ("ids", "classes", "where", "subjects")
_TEXT_ONLY = ("forget", "retain", "holdout", "base", "alternative_template", "drop_overlap", "text")


def is_rows(merged: Mapping[str, Any], choice: Mapping[str, Any]) -> bool:
    """Whether the settings are about rows: rows are chosen, or the model is a function of the user's."""
    model = str(merged.get("model") or "")
    _, colon, name = model.rpartition(":")
    entry = bool(colon) and name.isidentifier() and not Path(model).exists()
    return entry or any(v is not None for v in choice.values()) or any(merged.get(k) is not None for k in _CHOICE)


def unlearn_rows(
    merged: dict[str, Any], choice: Mapping[str, Any], out: Path, *, resume: bool, dry_run: bool, output: Output
) -> int:
    """Forget rows of a model."""
    from expunge.pipeline import row_runs
    from expunge.pipeline.supervised import is_entry
    from expunge.pipeline.unlearn import check_out

    given = {k: v for k, v in {**merged, **{k: v for k, v in choice.items() if v is not None}}.items() if v is not None}
    for name in _TEXT_ONLY:
        if given.pop(name, None):
            raise InputError(
                f"--{name.replace('_', '-')} is for language models; rows are chosen from the model's own data.",
                "Choose them by --id, --class, --where or --subject; the entry brings the data and the holdout.",
            )
    if "model" not in given:
        raise InputError("The model is missing.", "Give package.module:function or file.py:function; see expunge unlearn --help.")
    if not is_entry(given["model"]):
        raise InputError(
            f"{given['model']!r} names no function.",
            "Write package.module:function or file.py:function; it returns expunge.Supervised.",
        )
    for name in ("ids", "classes", "subjects"):
        if name in given:
            given[name] = tuple(n for word in given[name] for n in _listed(str(word)))
    settings = row_runs.RowsConfig(**given)
    check_out(out, resume)
    with output.progress("target") as progress:
        made = row_runs.plan(settings, progress=progress)
    for note in made.made.notes:
        output.note(note)
    kept = len(made.problem.data) - len(made.chosen)
    output.note(f"{settings.method}: {len(made.chosen)} rows to forget, {kept} to keep; {made.cost.text()}")
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


def audit_rows(run: Path, given: dict[str, Any], *, dry_run: bool, output: Output) -> Any:
    """The audit document of a run on rows; None after a dry run."""
    from expunge.pipeline.row_audit import RowAuditConfig, audit_rows_run, plan

    for name in ("retrained", "base", "utility"):
        if given.pop(name, None):
            raise InputError(
                f"--{name} is for language models.", "Models of rows are retrained here: --retrain 3 --references 16."
            )
    made = plan(run, RowAuditConfig(**given))
    output.note(f"audit: {made.text()}")
    if dry_run:
        output.result({"cost": made.text(), "sets": {name: len(rows) for name, rows in made.sets.items()}})
        return None
    with output.progress("audit") as progress:
        return audit_rows_run(made, progress=progress, say=output.note)


def _listed(word: str) -> list[str]:
    """The word itself, or the lines of the file that ``@file`` names."""
    if not word.startswith("@"):
        return [word]
    path = Path(word[1:])
    if not path.is_file():
        raise InputError(f"There is no file {str(path)!r}.", "Write @FILE for a file with one name on each line.")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [name for name in names if name]
