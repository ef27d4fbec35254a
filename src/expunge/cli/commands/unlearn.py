"""``expunge unlearn``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.output import Output
from expunge.core.errors import InputError
from expunge.core.settings import parse_overrides

_HELP = """Make a model forget a set of records.

    \b
    Data: JSONL, JSON, CSV or Parquet with columns question+answer, prompt+completion, text, or chat messages; or a named
    data set such as tofu:forget10. Other column names: --column prompt=my_question --column answer=my_answer.

    \b
    Examples:
      expunge unlearn runs/target --forget people.jsonl --retain rest.jsonl --out runs/npo
      expunge unlearn meta-llama/Llama-3.2-1B-Instruct --forget tofu:forget10 --retain tofu:retain90 \\
          --holdout tofu:holdout10 --method simnpo --out runs/simnpo
      expunge unlearn MODEL --forget F --retain R --method npo retain=kl parameters=lora gradient=project --out runs/x
      expunge unlearn MODEL --forget F --retain R --method npo schedule=paper --out runs/paper
      expunge unlearn MODEL --forget F --retain R --method simnpo --settings tofu-small --out runs/small
      expunge unlearn --config run.yaml --out runs/y
      expunge unlearn MODEL --requests requests.jsonl --retain all.jsonl --retrain 3 --out runs/many

    \b
    Classifiers and regressors: MODEL is a function of yours that returns expunge.Supervised (model, rows, how it was
    trained), as package.module:function or file.py:function. What to forget is chosen from its rows:
      expunge unlearn digits.py:problem --class 3 --method salun --out runs/salun
      expunge unlearn clinic.risk:model --subject "patient 7" --out runs/p7
      expunge unlearn digits.py:problem --id 17 --id 99 --method ssd --out runs/ssd
      expunge unlearn clinic.risk:model --where "age < 18 and city == 'Graz'" --method finetune --out runs/minors
    A transformers classifier of images or texts takes its rows from files (reading.KEY=VALUE says which column is what):
      expunge unlearn my/vit --data photos --holdout unseen --class cat --method scrub --out runs/cat
      expunge unlearn my/bert --data train.csv reading.text=review reading.target=stars --id 17 --out runs/review
    A run of `expunge train ... --method sisa` (rows) or dp2u (rows, texts) gives up in place what it was trained on:
      expunge unlearn runs/sisa --id 17
      expunge unlearn runs/private --forget request.jsonl

    \b
    PARTS are key=value pairs: parameters of the method (beta=0.2) or parts of it (retain=kl, parameters=lora,
    gradient=project, schedule.epochs=20, engine.seed=3). `expunge methods NAME` lists them. With --requests, audit.KEY=VALUE
    are settings of the audits.
    """


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("unlearn", help=_HELP)(unlearn)


def unlearn(
    model: Annotated[
        str | None, typer.Argument(help="The target model: hub id, local folder, or a run of `expunge train`.")
    ] = None,
    parts: Annotated[list[str] | None, typer.Argument(help="key=value pairs.", metavar="[PARTS]...")] = None,
    forget: Annotated[str | None, typer.Option(help="What to forget.", metavar="DATA")] = None,
    retain: Annotated[str | None, typer.Option(help="What to keep.", metavar="DATA")] = None,
    holdout: Annotated[str | None, typer.Option(help="Records that the model was never trained on.", metavar="DATA")] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows that a transformers classifier was trained on: a table, or images.", metavar="DATA")
    ] = None,
    ids: Annotated[
        list[str] | None,
        typer.Option("--id", help="Rows: id of one to forget; repeatable; @FILE: one on each line.", metavar="ID"),
    ] = None,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Rows: a class to forget as a whole; may be repeated.", metavar="NAME")
    ] = None,
    where: Annotated[str | None, typer.Option(help="Rows: a condition on the columns.", metavar="CONDITION")] = None,
    subjects: Annotated[
        list[str] | None, typer.Option("--subject", help="Rows: forget all of this subject; may be repeated.", metavar="NAME")
    ] = None,
    requests: Annotated[
        Path | None, typer.Option(help="Several requests in order, one JSON object a line.", metavar="FILE")
    ] = None,
    retrain: Annotated[int, typer.Option(help="With --requests: retrained models to compare with.", metavar="N")] = 0,
    method: Annotated[str | None, typer.Option(help="Name of the method [default: npo].")] = None,
    settings: Annotated[
        str | None,
        typer.Option(help="Settings that a sweep found, by name: demo, tofu-small. None: the published ones.", metavar="NAME"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.", metavar="RUN")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with the same settings; options win over it.", metavar="FILE")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The untrained base, for methods that start from it.", metavar="MODEL")] = None,
    alternatives: Annotated[
        str | None,
        typer.Option(help="Answers put in place: auto, refusals, given, others, passages, template, reasons.", metavar="KIND"),
    ] = None,
    alternative_template: Annotated[
        str | None,
        typer.Option(
            help="Their text, with {subject}, {prompt}, {refusal} filled in; implies the kind template.", metavar="TEXT"
        ),
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="role=name of your column; may be repeated.", metavar="ROLE=NAME")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the order of examples.")] = None,
    allow_overlap: Annotated[bool, typer.Option("--allow-overlap", help="Go on although sets share records.")] = False,
    drop_overlap: Annotated[bool, typer.Option("--drop-overlap", help="Leave shared records out of retain and holdout.")] = False,
    allow_large_forget: Annotated[
        bool, typer.Option("--allow-large-forget", help="Go on although there is more to forget than to keep.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the cost, stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Run one request, or several in order."""
    from expunge.cli.rows import is_rows, unlearn_rows
    from expunge.pipeline.config import from_file, merge

    output = Output(json)
    if model is not None and "=" in model and config is not None:
        parts, model = [model, *(parts or [])], None
    overrides = parse_overrides(parts or [])
    no_options(overrides)
    engine = {**overrides.pop("engine", {}), **({"seed": seed} if seed is not None else {})}
    text = {**overrides.pop("text", {}), **({"columns": columns_of(column)} if column else {})}
    spans = overrides.pop("spans", {})
    if alternative_template is not None and alternatives is None:
        alternatives = "template"
    given: dict[str, Any] = {
        "model": model, "forget": forget, "retain": retain, "holdout": holdout, "method": method, "base": base,
        "settings": settings,
        "alternatives": alternatives, "allow_overlap": allow_overlap or None, "drop_overlap": drop_overlap or None,
        "allow_large_forget": allow_large_forget or None, "alternative_template": alternative_template,
        "parts": overrides or None, "engine": engine or None, "text": text or None, "spans": spans or None,
    }  # fmt: skip
    merged = merge({"parts": {}}, from_file(config) if config else {}, given)
    choice = {"ids": ids, "classes": classes, "where": where, "subjects": subjects}
    if data is not None:
        merged["data"] = data
    if is_rows(merged, choice):
        merged |= {"requests": str(requests)} if requests is not None else {}
        if settings is not None:
            raise InputError("--settings is for language models.", "Find settings for rows by expunge sweep.")
        if retrain:
            raise InputError("--retrain belongs to --requests.", f"Retrain in the audit: expunge audit RUN --retrain {retrain}.")
        return unlearn_rows(merged, choice, out, resume=resume, dry_run=dry_run, output=output)
    if out is None:
        raise InputError("No folder for the run was given.", "Add --out RUN, for example --out runs/first.")
    if requests is None and retrain:
        raise InputError("--retrain belongs to --requests.", f"Retrain in the audit: expunge audit {out} --retrain {retrain}.")
    if requests is not None:
        return _several(requests, merged, out, retrain=retrain, resume=resume, dry_run=dry_run, output=output)
    return _one(merged, out, resume=resume, dry_run=dry_run, output=output)


def _one(merged: dict[str, Any], out: Path, *, resume: bool, dry_run: bool, output: Output) -> int:
    from expunge.core.files import check_room
    from expunge.pipeline import unlearn as stage
    from expunge.pipeline.config import UnlearnConfig

    if "audit" in merged["parts"]:
        raise InputError("audit.* belongs to --requests.", f"Give it to the audit: expunge audit {out} KEY=VALUE.")
    for name, option in (("model", "MODEL"), ("forget", "--forget DATA")):
        if name not in merged:
            raise InputError(f"The {name} is missing.", f"Give {option}; see expunge unlearn --help.")
    settings = UnlearnConfig(**merged)
    stage.check_out(out, resume)
    made = stage.from_config(settings)
    check_room(out, made.cost.disk, "Unlearning")
    if settings.settings is not None:
        output.note(f"Settings {settings.settings}, found by a sweep: {settings.parts}; the audit leaves its records out.")
    for note in made.notes:
        output.note(note)
    output.note(f"{settings.method}: {made.cost.text()}")
    if dry_run:
        dump = settings.model_dump(mode="json")
        output.result({"cost": made.cost.json(), "recipe": made.recipe.spec(), "config": dump, "notes": made.notes})
        return 0
    with output.progress(settings.method) as progress:
        run = stage.execute(made, settings, out, resume=resume, progress=progress)
    result = run.manifest["stages"]["unlearn"]["result"]
    reused = "unlearn" in run.skipped
    output.result({"run": str(out), "model": str(out / "model"), "reused": reused, **result})
    if reused:
        output.say("This run had finished; nothing was left to do.")
    for note in result.get("notes", ()):
        output.note(note)
    output.say(result["sentence"])
    for note in result.get("notes", []):
        output.note(note)
    output.say(f"Model: {out / 'model'}   Next: expunge audit {out} --retrain 3")
    return 0 if result["reached"] else 3


def _several(
    requests: Path, merged: dict[str, Any], out: Path, *, retrain: int, resume: bool, dry_run: bool, output: Output
) -> int:
    from expunge.audit.settings import AuditSettings
    from expunge.pipeline import sequence
    from expunge.pipeline.config import UnlearnConfig
    from expunge.pipeline.unlearn import check_out
    from expunge.report.terminal import print_summary, summary_json

    if merged.get("forget"):
        raise InputError("--forget and --requests exclude each other.", "Name what to forget in the file of requests.")
    if "model" not in merged:
        raise InputError("The model is missing.", "Give MODEL; see expunge unlearn --help.")
    measured = merged["parts"].pop("audit", {})
    if not isinstance(measured, dict):
        raise InputError(f"audit={measured} says nothing.", "Write audit.KEY=VALUE, for example audit.budget=200.")
    audit = AuditSettings(**measured)
    settings = UnlearnConfig(**{**merged, "forget": str(requests)})
    check_out(out, resume)
    made = sequence.plan(requests, settings, retrain=retrain)
    for note in made.notes:
        output.note(note)
    output.note(f"{len(made.steps)} requests by {settings.method}: {made.cost.text()}; then audits")
    if dry_run:
        steps = [{"id": s.id, "forget": len(s.forget), "retain": len(s.retain)} for s in made.steps]
        output.result({"cost": made.cost.json(), "requests": steps, "notes": made.notes})
        return 0
    documents, done = sequence.run(
        made, out, retrain=retrain, settings=audit, resume=resume, bars=output.progress, say=output.note
    )
    ended = [{"id": d.id, "run": str(d.folder), "reached": d.reached, "sentence": d.sentence} for d in done]
    output.result({"run": str(out), "requests": ended, **summary_json(documents)})
    if not output.machine:
        print_summary(documents)
        output.say(f"Next: expunge report {out}")
    return 0 if all(d.reached for d in done) else 3


_OPTIONS = ("model", "forget", "holdout", "method", "base", "alternatives", "alternative_template", "seed", "out", "requests")


def no_options(overrides: dict[str, Any]) -> None:
    """Refuse what is written as a part and is an option (``forget`` and ``retain`` are both, and a part can be no file)."""
    for key in overrides:
        if key in _OPTIONS and key != "forget":
            option = key.replace("_", "-")
            raise InputError(
                f"{key!r} is no part of a method.", "It is the first argument." if key == "model" else f"Write --{option} VALUE."
            )


def columns_of(words: list[str]) -> dict[str, str]:
    """Columns by role, from ROLE=NAME."""
    found: dict[str, str] = {}
    for word in words:
        role, eq, name = word.partition("=")
        if not eq:
            raise InputError(f"{word!r} names no column.", "Write --column ROLE=NAME, for example --column prompt=question_text.")
        found[role] = name
    return found
