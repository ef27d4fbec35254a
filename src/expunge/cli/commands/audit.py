"""``expunge audit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expunge.cli.output import Output
from expunge.core.errors import InputError
from expunge.core.results import Verdict
from expunge.core.settings import parse_overrides

if TYPE_CHECKING:
    from expunge.audit.document import AuditDocument

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
    What is only served, asked in words (the key comes from EXPUNGE_SERVED_KEY):
      expunge audit --served http://127.0.0.1:8000/v1 --model-name tiny --target runs/target --forget forget.jsonl
          --retain retain.jsonl --retrained runs/retrained-1 --retrained runs/retrained-2 --out runs/served
      expunge audit --served https://host/v1 ... --out runs/served --resume served.parallel=2 served.seconds=300

    \b
    With no retrained model the verdict is "no gold standard": nothing can then be called forgotten. Two or more show how
    far retrained models differ among themselves. Retrained models are kept in the cache and trained once.
    Exit code 3 if --require VERDICT is given and the verdict is another.
    """


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("audit", help=_HELP)(audit)


def audit(
    run: Annotated[Path | None, typer.Argument(help="Folder of an unlearning run.")] = None,
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
    served: Annotated[
        str | None, typer.Option(help="Audit what is served at this address instead of a run, up to /v1.", metavar="URL")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="Served: name of the model, as the server lists it.", metavar="NAME")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Served: the model before anything was forgotten.", metavar="MODEL")] = None,
    forget: Annotated[str | None, typer.Option(help="Served: what was to be forgotten.", metavar="DATA")] = None,
    retain: Annotated[str | None, typer.Option(help="Served: what was to be kept.", metavar="DATA")] = None,
    holdout: Annotated[str | None, typer.Option(help="Served: what no model was trained on.", metavar="DATA")] = None,
    key_env: Annotated[
        str | None,
        typer.Option(help="Served: environment variable that holds the key [default: EXPUNGE_SERVED_KEY].", metavar="NAME"),
    ] = None,
    refusal: Annotated[
        list[str] | None,
        typer.Option(
            help="Served: a text that is said in the model's place, beside those the server marks; repeatable.", metavar="TEXT"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Served: folder for the audit.", metavar="RUN")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Served: go on with an audit that was broken off.")] = False,
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
    """Audit one run, or what is served."""
    from expunge.cli.served import audit_served, split_words
    from expunge.report.terminal import print_summary, summary_json

    output = Output(json)
    if all_records and leave_out is not None:
        raise InputError("--all-records and --leave-out exclude each other.", "Give one of them.")
    if require is not None and require not in set(Verdict):
        raise InputError(f"{require!r} is no verdict.", "Choose one of: " + ", ".join(Verdict) + ".")
    words, run = split_words(parts or [], run, served)
    settings = parse_overrides(words)
    server = {
        "url": served, "model": model_name, "target": target, "forget": forget, "retain": retain, "holdout": holdout,
        "key_env": key_env, "refusals": tuple(refusal or ()), "out": out, "resume": resume,
    }  # fmt: skip
    more: dict[str, Any] = {k: settings.pop(k) for k in ("served", "text") if served is not None and k in settings}
    given: dict[str, Any] = {
        "retrained": retrained or (), "retrain": retrain, "base": base, "settings": _settings(protocol, access, settings),
        "utility": dict(_pair(word) for word in utility or []),
    }  # fmt: skip
    of_run = {"all_records": all_records, "leave_out": leave_out}
    of_rows = {"references": references, "repeats": repeats, "workers": workers}
    if served is not None:
        if any(of_run.values()) or references or repeats or workers != "local":
            raise InputError("--all-records, --leave-out, --references, --repeats and --workers are for runs.", "Leave them out.")
        document = audit_served(server, given, more, dry_run=dry_run, output=output)
        folder = out
    else:
        run = _only_run(run, server)
        document = _audit_run(run, {**given, **of_run}, of_rows, access=access, dry_run=dry_run, output=output)
        folder = run
    if document is None or folder is None:
        return 0
    output.result(summary_json([document]))
    if not json:
        print_summary([document])
        output.say(f"Document: {folder / 'audit.json'}   Next: expunge report {folder}")
    judged = [m.judgement.verdict for m in document.models if m.role == "unlearned" and m.judgement]
    return 3 if require is not None and judged != [Verdict(require)] else 0


def _only_run(run: Path | None, server: dict[str, Any]) -> Path:
    """The run, where nothing was said of a server."""
    for name, value in server.items():
        if value:
            option = {"model": "model-name", "refusals": "refusal"}.get(name, name.replace("_", "-"))
            raise InputError(f"--{option} is for what is served.", "Give the address by --served, or leave it out.")
    if run is None:
        raise InputError("There is nothing to audit.", "Give the folder of a run, or --served URL; see `expunge audit --help`.")
    return run


def _audit_run(
    run: Path, given: dict[str, Any], of_rows: dict[str, Any], *, access: str | None, dry_run: bool, output: Output
) -> AuditDocument | None:
    """The audit of a run; nothing of a dry run, which says what it would cost."""
    from expunge.cli.rows import audit_rows
    from expunge.core.runs import Run
    from expunge.pipeline.audit import AuditConfig, audit_run, plan
    from expunge.pipeline.prepared_runs import is_prepared
    from expunge.pipeline.row_audit import is_rows

    if is_rows(run) or is_prepared(run):
        if access is not None:
            raise InputError("--access is for language models, which can be asked.", "Leave it out.")
        found: AuditDocument | None = audit_rows(run, {**given, **of_rows}, dry_run=dry_run, output=output)
        return found
    if Run.open(run) and (of_rows["references"] or of_rows["repeats"] or of_rows["workers"] != "local"):  # no run is said first
        raise InputError("--references, --repeats and --workers are for classifiers and regressors.", "Leave them out.")
    made = plan(run, AuditConfig(**given))
    for note in made.notes:
        output.note(note)
    output.note(f"audit: {made.cost.text()}")
    if dry_run:
        output.result({"cost": made.cost.json(), "sets": {name: len(records) for name, records in made.sets.items()}})
        return None
    with output.progress("audit") as progress:
        return audit_run(made, progress=progress, say=output.note)


def _settings(protocol: str | None, access: str | None, given: dict[str, Any]) -> Any:
    """The given settings, on top of those of a protocol if there is one.

    Raises:
        InputError: there is no such access.
    """
    from expunge.audit.settings import AuditSettings
    from expunge.core.access import Level

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
