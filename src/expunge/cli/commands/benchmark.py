"""``expunge benchmark``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expunge.cli.output import Output
from expunge.core.errors import InputError
from expunge.core.settings import parse_overrides

if TYPE_CHECKING:
    from expunge.benchmarks.run import Plan, Stage

_HELP = """Run a published benchmark: train the target and models without the forget set, unlearn, measure every axis.

    \b
    Examples:
      expunge benchmark                                     (all benchmarks)
      expunge benchmark tofu                                (one: data, settings, axes)
      expunge benchmark tofu --smoke --method npo --out runs/smoke
      expunge benchmark tofu --data tofu --model meta-llama/Llama-3.2-1B-Instruct --method npo --method simnpo --out runs/tofu
      expunge benchmark tofu --data tofu --target open-unlearning/tofu_Llama-3.2-1B-Instruct_full --method npo \\
          --retrained open-unlearning/tofu_Llama-3.2-1B-Instruct_retain90 --out runs/tofu10 split=forget10
      expunge benchmark muse-news --data muse --model llama-small --method npo --out runs/news --course scalability
      expunge benchmark tofu --data tofu --model llama-small --method npo --out runs/tofu --dry-run

    \b
    key=value pairs are the benchmark's options (split=forget05); train.KEY=VALUE changes the training of the target,
    unlearn.KEY=VALUE all methods, audit.KEY=VALUE the audit, engine.KEY and text.KEY as elsewhere. A preset such as
    llama-tiny is trained from random weights, with settings for small models. The same command with --resume goes on.
    """


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("benchmark", help=_HELP)(benchmark)


def benchmark(
    name: Annotated[str | None, typer.Argument(help="A benchmark; none: list them.")] = None,
    parts: Annotated[list[str] | None, typer.Argument(help="key=value options.", metavar="[OPTIONS]...")] = None,
    data: Annotated[str | None, typer.Option(help="Folder with the benchmark's files.", metavar="FOLDER")] = None,
    model: Annotated[str | None, typer.Option(help="Base model to train the target from, or a preset.", metavar="MODEL")] = None,
    target: Annotated[str | None, typer.Option(help="A target that is trained already.", metavar="MODEL")] = None,
    retrained: Annotated[
        list[str] | None, typer.Option(help="A model trained without the forget set; repeatable.", metavar="MODEL")
    ] = None,
    retrain: Annotated[int | None, typer.Option(help="Models to retrain here [default: 1].", metavar="N")] = None,
    method: Annotated[list[str] | None, typer.Option(help="A method to run; repeatable.", metavar="NAME")] = None,
    course: Annotated[
        list[str] | None, typer.Option(help="Follow axes over several requests, e.g. scalability; repeatable.", metavar="NAME")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="last, or oracle (by a test metric).", metavar="RULE")] = None,
    settings: Annotated[
        str | None, typer.Option(help="Schedule of methods: published, own, or auto (own for presets).", metavar="WHICH")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.", metavar="RUN")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and generated data.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Generated data of the published schema, a tiny model.")] = False,
    protocol: Annotated[
        str | None, typer.Option(help="A declared protocol for the verdict, by name or file.", metavar="NAME|FILE")
    ] = None,
    verdict: Annotated[bool, typer.Option("--verdict/--no-verdict", help="Also audit the models, for the verdict.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print stages and costs, stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """List, show or run benchmarks."""
    output = Output(json)
    if name is None:
        return _list(output)
    given = parse_overrides(parts or [])
    if model is None and target is None and not smoke:
        if out is not None or dry_run or method:
            raise InputError("No model was given.", "Add --model BASE, --target MODEL, or --smoke.")
        return _show(name, {**given, **({"data": data} if data else {})}, output)
    from expunge.benchmarks.config import BenchmarkConfig
    from expunge.benchmarks.run import plan, stages

    if out is None:
        raise InputError("No folder for the run was given.", f"Add --out RUN, for example --out runs/{name}.")
    held = {k: given.pop(k, {}) for k in ("train", "unlearn", "audit", "engine", "text")}
    if seed is not None:
        held["engine"] = {**held["engine"], "seed": seed}
    plain = {
        "model": model, "target": target, "retrained": retrained, "retrain": retrain, "methods": method, "courses": course,
        "checkpoint": checkpoint, "settings": settings,
    }  # fmt: skip
    config = BenchmarkConfig(
        benchmark=name,
        options={**given, **({"data": data} if data else {})},
        smoke=smoke,
        verdict=verdict,
        train=held["train"],
        unlearn=held["unlearn"],
        audit=_audit(held["audit"], smoke, protocol),
        engine=held["engine"],
        text=held["text"],
        **{k: v for k, v in plain.items() if v},
        **({"retrain": 0} if retrain == 0 else {}),
    )
    _check_out(out, resume)
    made = plan(config, out)
    for note in made.notes:
        output.note(note)
    steps = stages(made)
    for stage in steps:
        output.note(f"{stage.name}{' (done)' if stage.done else ''}: {stage.cost or stage.folder}")
    if dry_run:
        output.result({"stages": [_stage(s) for s in steps], "notes": made.notes, "config": config.model_dump(mode="json")})
        return 0
    return _run(made, resume=resume, output=output)


def _audit(given: dict[str, Any], smoke: bool, protocol: str | None) -> Any:
    from expunge.audit.settings import AuditSettings

    if protocol is not None:
        return AuditSettings.under(protocol, **given)
    return AuditSettings.quick(**given) if smoke else AuditSettings(**given)


def _check_out(out: Path, resume: bool) -> None:
    from expunge.pipeline.unlearn import check_out

    check_out(out, resume)


def _stage(stage: Stage) -> dict[str, Any]:
    return {"name": stage.name, "folder": str(stage.folder), "done": stage.done, "cost": stage.cost}


def _run(made: Plan, *, resume: bool, output: Output) -> int:
    from expunge.benchmarks.run import execute
    from expunge.report.benchmark import document_json, table, write_report

    document = execute(made, resume=resume, bars=output.progress, say=output.note)
    report = write_report(document, made.out)
    output.result({"run": str(made.out), "report": str(report), **document_json(document)})
    output.say(table(document))
    for line in (*document.not_measured, *document.caveats):
        output.say(f"Note: {line}")
    output.say(f"Report: {report}")
    return 0


def _list(output: Output) -> int:
    from rich.table import Table

    from expunge.benchmarks.registry import BENCHMARKS

    found = dict(BENCHMARKS.items())
    output.result(
        {"benchmarks": [{"name": n, "title": k.title, "paper": k.paper.url, "licence": k.licence} for n, k in found.items()]}
    )
    shown = Table("benchmark", "what it is", "axes", "compared with", "licence")
    for name, kind in found.items():
        shown.add_row(name, kind.title, str(len(kind().axes())), kind.reference, kind.licence)
    output.say(shown)
    for broken, why in BENCHMARKS.broken().items():
        output.note(f"The plug-in {broken!r} could not be loaded: {why}")
    return 0


def _show(name: str, options: dict[str, Any], output: Output) -> int:
    from expunge.report.benchmark import description, description_json

    output.result(description_json(name, options))
    for part in description(name, options):
        output.say(part)
    return 0
