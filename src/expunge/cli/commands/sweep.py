"""``expunge sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.output import Output
from expunge.core.errors import InputError
from expunge.core.settings import parse_overrides

_HELP = """Find settings of methods on a part of the request that the final audit never sees, all with the same budget.

    \b
    The records to forget are divided by subject: trials forget one part and are measured on it; the other is left to the audit.
    So are the records to keep. It leaves the whole trade-off of forgetting and usefulness (sweep.html, sweep.json), and the
    chosen setting of each method (settings/METHOD.yaml, the best in chosen.yaml).

    \b
    Examples:
      expunge sweep runs/target --forget people.jsonl --retain rest.jsonl --holdout unseen.jsonl --method npo --method simnpo \\
          --trials 20 --out runs/sweep
      expunge sweep digits.py:problem --class 3 --method salun --method ssd --trials 20 --out runs/sweep
      expunge sweep runs/target --forget F --retain R --retrain 1 --method npo schedule=paper \\
          --search beta=0.05..0.5:log --search schedule.lr=1e-5..1e-3:log --sampler tpe --workers 4 --out runs/sweep
    Then:
      expunge unlearn --config runs/sweep/chosen.yaml --out runs/final
      expunge audit runs/final --retrain 3

    \b
    PARTS are key=value pairs as for expunge unlearn: they hold in every trial, and what they fix is not searched.
    METHOD:key=value is for one method alone, and so is --search METHOD:KEY=RANGE. A range is LOW..HIGH, LOW..HIGH:log or A|B|C.
    Exit code 3 if for some method no trial was within the bound.
    """


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("sweep", help=_HELP)(sweep)


def sweep(
    model: Annotated[str | None, typer.Argument(help="The target model, as for expunge unlearn.")] = None,
    parts: Annotated[list[str] | None, typer.Argument(help="key=value pairs for every trial.", metavar="[PARTS]...")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A method whose settings are searched; repeatable.", metavar="NAME")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Trials of each method; the first is its own setting [default: 20].")] = None,
    search: Annotated[list[str] | None, typer.Option(help="A range of a parameter; repeatable.", metavar="KEY=RANGE")] = None,
    only_given: Annotated[bool, typer.Option("--only-given", help="Search nothing but what --search names.")] = False,
    sampler: Annotated[str | None, typer.Option(help="random, or tpe, which learns as it goes [default: random].")] = None,
    at_once: Annotated[int | None, typer.Option(help="Of tpe: trials drawn before any of them has ended [default: 5].")] = None,
    forget_share: Annotated[
        float | None, typer.Option(help="Share of the subjects to forget that trials forget; 1: all [default: 0.5].")
    ] = None,
    retain_share: Annotated[
        float | None, typer.Option(help="Share of the subjects to keep that trials are measured on [default: 0.3].")
    ] = None,
    rule: Annotated[str | None, typer.Option(help="How a trial is chosen: nearest or balanced [default: nearest].")] = None,
    bound: Annotated[
        float | None, typer.Option(help="Largest share of usefulness that a chosen trial may lose [default: 0.05].")
    ] = None,
    retrain: Annotated[int | None, typer.Option(help="Models to retrain here, to compare with.", metavar="N")] = None,
    retrained: Annotated[
        list[str] | None, typer.Option(help="A model trained without the forget set; repeatable.", metavar="MODEL")
    ] = None,
    workers: Annotated[
        str | None, typer.Option(help="Trials at a time in processes of this machine, or ray.", metavar="N|ray")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster; none: one on this machine.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of each trial [default: 1].")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep.", metavar="RUN")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with the same settings; options win over it.", metavar="FILE")
    ] = None,
    forget: Annotated[str | None, typer.Option(help="What to forget.", metavar="DATA")] = None,
    retain: Annotated[str | None, typer.Option(help="What to keep.", metavar="DATA")] = None,
    holdout: Annotated[str | None, typer.Option(help="Records that the model was never trained on.", metavar="DATA")] = None,
    data: Annotated[str | None, typer.Option(help="Rows that a transformers classifier was trained on.", metavar="DATA")] = None,
    ids: Annotated[list[str] | None, typer.Option("--id", help="Rows: id of one to forget; repeatable.", metavar="ID")] = None,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Rows: a class to forget as a whole; repeatable.", metavar="NAME")
    ] = None,
    where: Annotated[str | None, typer.Option(help="Rows: a condition on the columns.", metavar="CONDITION")] = None,
    subjects: Annotated[
        list[str] | None, typer.Option("--subject", help="Rows: forget all of this subject; repeatable.", metavar="NAME")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The untrained base, for methods that start from it.", metavar="MODEL")] = None,
    alternatives: Annotated[str | None, typer.Option(help="Answers to put in place.", metavar="KIND")] = None,
    column: Annotated[list[str] | None, typer.Option(help="role=name of your column; repeatable.", metavar="ROLE=NAME")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the division and of the settings drawn [default: 0].")] = None,
    allow_overlap: Annotated[bool, typer.Option("--allow-overlap", help="Go on although sets share records.")] = False,
    drop_overlap: Annotated[bool, typer.Option("--drop-overlap", help="Leave shared records out of retain and holdout.")] = False,
    allow_large_forget: Annotated[
        bool, typer.Option("--allow-large-forget", help="Go on although there is more to forget than to keep.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print ranges and cost, stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Search settings."""
    from expunge.cli.commands.unlearn import columns_of, no_options
    from expunge.pipeline.config import from_file, merge
    from expunge.pipeline.sweep import SweepConfig
    from expunge.pipeline.unlearn import check_out

    output = Output(json)
    if model is not None and "=" in model and config is not None:
        parts, model = [model, *(parts or [])], None
    common, own = _by_method(parts or [])
    no_options(common)
    held = from_file(config) if config else {}
    fields = set(SweepConfig.model_fields) - {"request", "rows"}
    share = {"forget_share": forget_share, "retain_share": retain_share, "seed": seed}
    settings = merge(
        {k: v for k, v in held.items() if k in fields},
        {
            "methods": method or None, "trials": trials, "search": _searches(search or []) or None,
            "own_ranges": False if only_given else None, "sampler": sampler, "at_once": at_once, "rule": rule, "bound": bound,
            "retrain": retrain, "retrained": retrained or None, "threads": threads, "seed": seed, "own": own or None,
            "split": {k: v for k, v in share.items() if v is not None} or None,
        },
    )  # fmt: skip
    engine, text = common.pop("engine", None), {**common.pop("text", {}), **({"columns": columns_of(column)} if column else {})}
    request = merge(
        {"parts": {}}, {k: v for k, v in held.items() if k not in fields},
        {
            "model": model, "forget": forget, "retain": retain, "holdout": holdout, "base": base, "alternatives": alternatives,
            "allow_overlap": allow_overlap or None, "drop_overlap": drop_overlap or None,
            "allow_large_forget": allow_large_forget or None, "parts": common or None, "engine": engine, "text": text or None,
            "data": data,
        },
    )  # fmt: skip
    choice = {"ids": ids, "classes": classes, "where": where, "subjects": subjects}
    made = _config(settings, request, choice)
    if out is None:
        raise InputError("No folder for the sweep was given.", "Add --out RUN, for example --out runs/sweep.")
    check_out(out, resume)
    return _run(made, out, workers, address, resume=resume, dry_run=dry_run, output=output)


def _config(settings: dict[str, Any], request: dict[str, Any], choice: dict[str, Any]) -> Any:
    from expunge.cli.rows import is_rows, rows_given
    from expunge.pipeline.config import UnlearnConfig
    from expunge.pipeline.prepared_runs import is_prepared
    from expunge.pipeline.row_runs import RowsConfig
    from expunge.pipeline.sweep import SweepConfig

    if not settings.get("methods"):
        raise InputError("No method was named.", "Add --method NAME; `expunge methods` lists them.")
    rows = is_rows(request, choice)
    if is_prepared(Path(str(request.get("model", "")))):
        raise InputError(
            f"{request['model']!r} is a run of a prepared method: it gives rows up exactly, and there is nothing to choose.",
            "Name the function that brings the model: file.py:function.",
        )
    if rows:
        request = rows_given(request, choice)
    for name, option in (("model", "MODEL"), *(() if rows else (("forget", "--forget DATA"),))):
        if name not in request:
            raise InputError(f"The {name} is missing.", f"Give {option}; see expunge sweep --help.")
    checked = (RowsConfig if rows else UnlearnConfig)(**request)
    plain = checked.model_dump(mode="json", exclude_unset=True)
    return SweepConfig(request=plain, rows=rows, **settings)


def _run(config: Any, out: Path, workers: str | None, address: str | None, *, resume: bool, dry_run: bool, output: Output) -> int:
    from expunge.core.files import size
    from expunge.pipeline.sweep import plan
    from expunge.pipeline.sweep_run import execute
    from expunge.report.sweep import front_table, sweep_json, write

    hands = _hands(workers, address)
    with output.progress("target") as progress:
        made = plan(config, dry=dry_run, progress=progress)
    cost = made.cost()
    counts = ", ".join(f"{n} {name}" for name, n in made.ground.counts().items())
    output.note(f"records: {counts}")
    for study in made.studies:
        at_most = cost["methods"][study.method]
        output.note(
            f"{study.method}: {config.trials} trials of {study.cost.steps:,} steps and {study.cost.tokens:,} tokens at most, "
            f"{at_most['steps']:,} steps together"
        )
        for dimension in study.dimensions:
            output.note(f"  {dimension.text()}")
    output.note(
        f"{cost['trials']} trials, {cost['steps']:,} steps together, about {size(cost['memory'])} of memory for each at a time"
    )
    if config.retrain or config.retrained:
        output.note(
            f"compared with {config.retrain + len(config.retrained)} retrained models, {config.retrain} of them trained here"
        )
    if dry_run:
        ranges = {s.method: {d.path: d.range.text() for d in s.dimensions} for s in made.studies}
        dump = config.model_dump(mode="json")
        output.result({"cost": cost, "records": made.ground.counts(), "ranges": ranges, "config": dump})
        return 0
    with output.progress("sweep") as progress:
        document = execute(made, out, resume=resume, progress=progress, hands=hands)
    write(document, out / "sweep.html")
    output.result({"run": str(out), **sweep_json(document)})
    for renderable in front_table(document):
        output.say(renderable)
    output.say(f"Page: {out / 'sweep.html'}")
    if document.best is not None:
        output.say(f"Next: expunge unlearn --config {out / document.settings} --out RUN")
    return 0 if all(m.chosen is not None for m in document.methods) else 3


def _hands(workers: str | None, address: str | None) -> Any:
    from expunge.pipeline.sweep_run import Hands

    if workers == "ray":
        return Hands(None, "ray", address)
    if address is not None:
        raise InputError("An address is given, but trials are done on this machine.", "Add --workers ray.")
    if workers is not None and not (workers.isdigit() and int(workers) > 0):
        raise InputError(f"{workers!r} is no number of workers.", "Give a number, or ray.")
    return Hands(int(workers) if workers is not None else None)


def _by_method(words: list[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Parts for all methods, and those of one alone (METHOD:key=value)."""
    common: list[str] = []
    own: dict[str, list[str]] = {}
    for word in words:
        method, colon, rest = word.partition("=")[0].partition(":")
        if colon:
            own.setdefault(method, []).append(word[len(method) + 1 :] if rest else word)
        else:
            common.append(word)
    return parse_overrides(common), {m: parse_overrides(held) for m, held in own.items()}


def _searches(words: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        key, eq, text = word.partition("=")
        if not eq or not key or not text:
            raise InputError(f"{word!r} names no range.", "Write --search KEY=LOW..HIGH, such as --search beta=0.05..0.5:log.")
        if key in found:
            raise InputError(f"The parameter {key!r} is searched twice.", "Give one range.")
        found[key] = text
    return found
