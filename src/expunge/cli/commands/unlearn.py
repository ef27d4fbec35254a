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
      expunge unlearn --config run.yaml --out runs/y
      expunge unlearn MODEL --requests requests.jsonl --retain all.jsonl --out runs/many

    \b
    PARTS are key=value pairs: parameters of the method (beta=0.2) or parts of it (retain=kl, parameters=lora,
    gradient=project, schedule.epochs=20, engine.seed=3). `expunge methods NAME` lists them.
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
    requests: Annotated[
        Path | None, typer.Option(help="Several requests in order, one JSON object a line.", metavar="FILE")
    ] = None,
    retrain: Annotated[int, typer.Option(help="With --requests: retrained models to compare with.", metavar="N")] = 0,
    method: Annotated[str | None, typer.Option(help="Name of the method [default: npo].")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.", metavar="RUN")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with the same settings; options win over it.", metavar="FILE")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The untrained base, for methods that start from it.", metavar="MODEL")] = None,
    alternatives: Annotated[
        str | None, typer.Option(help="Answers to put in place: auto, refusals, given, others, template.", metavar="KIND")
    ] = None,
    alternative_template: Annotated[
        str | None,
        typer.Option(help="Their text, with {subject} or {prompt} filled in; implies --alternatives template.", metavar="TEXT"),
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
    from expunge.pipeline import sequence
    from expunge.pipeline import unlearn as stage
    from expunge.pipeline.config import UnlearnConfig, from_file, merge
    from expunge.report.terminal import print_summary, summary_json

    output = Output(json)
    if model is not None and "=" in model and config is not None:
        parts, model = [model, *(parts or [])], None
    overrides = parse_overrides(parts or [])
    engine = {**overrides.pop("engine", {}), **({"seed": seed} if seed is not None else {})}
    text = {**overrides.pop("text", {}), **({"columns": _columns(column)} if column else {})}
    if alternative_template is not None and alternatives is None:
        alternatives = "template"
    given: dict[str, Any] = {
        "model": model, "forget": forget, "retain": retain, "holdout": holdout, "method": method, "base": base,
        "alternatives": alternatives, "allow_overlap": allow_overlap or None, "drop_overlap": drop_overlap or None,
        "allow_large_forget": allow_large_forget or None, "alternative_template": alternative_template,
        "parts": overrides or None, "engine": engine or None, "text": text or None,
    }  # fmt: skip
    merged = merge(from_file(config) if config else {}, given)
    if out is None:
        raise InputError("No folder for the run was given.", "Add --out RUN, for example --out runs/first.")
    if requests is not None:
        merged.setdefault("forget", str(requests))
        documents = sequence.run(
            requests, UnlearnConfig(**merged), out, retrain=retrain, resume=resume, bars=output.progress, say=output.note
        )
        output.result(summary_json(documents))
        if not json:
            print_summary(documents)
            output.say(f"Next: expunge report {out}")
        return 0
    for name, option in (("model", "MODEL"), ("forget", "--forget DATA")):
        if name not in merged:
            raise InputError(f"The {name} is missing.", f"Give {option}; see expunge unlearn --help.")
    settings = UnlearnConfig(**merged)
    stage.check_out(out, resume)
    made = stage.from_config(settings)
    for note in made.notes:
        output.note(note)
    output.note(f"{settings.method}: {made.cost.text()}")
    if dry_run:
        output.result({"cost": made.cost.json(), "recipe": made.recipe.spec(), "notes": made.notes})
        return 0
    with output.progress(settings.method) as progress:
        run = stage.execute(made, settings, out, resume=resume, progress=progress)
    result = run.manifest["stages"]["unlearn"]["result"]
    output.result({"run": str(out), "model": str(out / "model"), **result})
    output.say(result["sentence"])
    output.say(f"Model: {out / 'model'}   Next: expunge audit {out} --retrain 3")
    return 0 if result["reached"] else 3


def _columns(words: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        role, eq, name = word.partition("=")
        if not eq:
            raise InputError(f"{word!r} names no column.", "Write --column ROLE=NAME, for example --column prompt=question_text.")
        found[role] = name
    return found
