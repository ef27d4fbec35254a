"""``expunge audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.output import Output
from expunge.core.errors import InputError
from expunge.core.results import Verdict
from expunge.core.settings import parse_overrides

_HELP = """Measure an unlearned model against models that never saw the forget set, attack it, and give a verdict.

    \b
    Examples:
      expunge audit runs/npo --retrain 3
      expunge audit runs/npo --retrained my/retrained-model --retrained my/other-seed
      expunge audit runs/npo --retrain 5 --base meta-llama/Llama-3.2-1B --utility facts=world.jsonl
      expunge audit runs/npo --retrain 3 --protocol removal-v1
      expunge audit runs/npo --retrain 3 --protocol my-protocol.yaml
      expunge audit runs/npo --retrain 3 --dry-run
      expunge audit runs/filter --retrain 3 --access text         (as somebody sees it who gets answers in words)
      expunge audit runs/npo --retrain 3 budget=200 relearn=none
      expunge audit runs/salun --retrain 3 --references 16        (classifiers and regressors)
      expunge audit runs/salun --retrain 3 --references 32 --repeats 32
      expunge audit runs/sisa --retrain 3                         (a prepared run, after deletions)

    \b
    With no retrained model the verdict is "no gold standard": nothing can then be called forgotten. Two or more show how
    far retrained models differ among themselves. Retrained models are kept in the cache and trained once.
    Exit code 3 if --require VERDICT is given and the verdict is another.
    """


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("audit", help=_HELP)(audit)


def audit(
    run: Annotated[Path, typer.Argument(help="Folder of an unlearning run.")],
    parts: Annotated[list[str] | None, typer.Argument(help="key=value settings of the audit.", metavar="[SETTINGS]...")] = None,
    retrained: Annotated[
        list[str] | None, typer.Option(help="A model trained without the forget set; repeatable.", metavar="MODEL")
    ] = None,
    retrain: Annotated[int, typer.Option(help="Number of models to retrain here.", metavar="N")] = 0,
    base: Annotated[
        str | None, typer.Option(help="Untrained base, if the target is no run of expunge train.", metavar="MODEL")
    ] = None,
    references: Annotated[
        int, typer.Option(help="Rows: so many further models with and without them, for LiRA, RMIA and KLoM.", metavar="N")
    ] = 0,
    repeats: Annotated[
        int,
        typer.Option(help="Rows: so many reference models are unlearned too, for U-LiRA and forgetting quality.", metavar="N"),
    ] = 0,
    workers: Annotated[str, typer.Option(help="Rows: where models are trained, local or ray.")] = "local",
    utility: Annotated[
        list[str] | None, typer.Option(help="A further set that must stay known; repeatable.", metavar="NAME=DATA")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="A declared protocol, by name or file: tests, what each must show, margins.", metavar="NAME|FILE"),
    ] = None,
    access: Annotated[
        str | None,
        typer.Option(
            help="What is read of the models: weights, scores or text [default: what they offer, of a guard scores].",
            metavar="LEVEL",
        ),
    ] = None,
    all_records: Annotated[
        bool, typer.Option("--all-records", help="Judge on records too that a sweep chose the settings on.")
    ] = False,
    leave_out: Annotated[
        str | None, typer.Option(help="A sweep whose records are left out, to judge on the same as its runs.", metavar="SWEEP")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the cost, stop.")] = False,
    require: Annotated[str | None, typer.Option(help="Verdict to ask for, e.g. forgotten.", metavar="VERDICT")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Audit one run."""
    from expunge.cli.rows import audit_rows
    from expunge.core.runs import Run
    from expunge.pipeline.audit import AuditConfig, audit_run, plan
    from expunge.pipeline.prepared_runs import is_prepared
    from expunge.pipeline.row_audit import is_rows
    from expunge.report.terminal import print_summary, summary_json

    output = Output(json)
    if all_records and leave_out is not None:
        raise InputError("--all-records and --leave-out exclude each other.", "Give one of them.")
    if require is not None and require not in set(Verdict):
        raise InputError(f"{require!r} is no verdict.", "Choose one of: " + ", ".join(Verdict) + ".")
    given: dict[str, Any] = {
        "retrained": retrained or (), "retrain": retrain, "base": base, "settings": _settings(protocol, access, parts or []),
        "all_records": all_records, "leave_out": leave_out,
        "utility": dict(_pair(word) for word in utility or []),
    }  # fmt: skip
    if is_rows(run) or is_prepared(run):
        if access is not None:
            raise InputError("--access is for language models, which can be asked.", "Leave it out.")
        document = audit_rows(
            run, {**given, "references": references, "repeats": repeats, "workers": workers}, dry_run=dry_run, output=output
        )
        if document is None:
            return 0
    else:
        if Run.open(run) and (references or repeats or workers != "local"):  # that there is no run is said first
            raise InputError("--references, --repeats and --workers are for classifiers and regressors.", "Leave them out.")
        made = plan(run, AuditConfig(**given))
        for note in made.notes:
            output.note(note)
        output.note(f"audit: {made.cost.text()}")
        if dry_run:
            output.result({"cost": made.cost.json(), "sets": {name: len(records) for name, records in made.sets.items()}})
            return 0
        with output.progress("audit") as progress:
            document = audit_run(made, progress=progress, say=output.note)
    output.result(summary_json([document]))
    if not json:
        print_summary([document])
        output.say(f"Document: {run / 'audit.json'}   Next: expunge report {run}")
    judged = [m.judgement.verdict for m in document.models if m.role == "unlearned" and m.judgement]
    return 3 if require is not None and judged != [Verdict(require)] else 0


def _settings(protocol: str | None, access: str | None, parts: list[str]) -> Any:
    """The given settings, on top of those of a protocol if there is one.

    Raises:
        InputError: there is no such access.
    """
    from expunge.audit.settings import AuditSettings
    from expunge.core.access import Level

    given = parse_overrides(parts)
    if access is not None:
        if access not in set(Level):
            raise InputError(f"{access!r} is no access to a model.", "Choose one of: " + ", ".join(Level) + ".")
        given["access"] = access
    return given if protocol is None else AuditSettings.under(protocol, **given)


def _pair(word: str) -> tuple[str, str]:
    name, eq, source = word.partition("=")
    if not eq:
        raise InputError(f"{word!r} names no set.", "Write --utility NAME=DATA.")
    return name, source
