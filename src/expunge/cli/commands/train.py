"""``expunge train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.output import Output
from expunge.core.errors import InputError
from expunge.core.settings import parse_overrides

_HELP = """Train a model on records: the target of later unlearning, with its recipe on file so that it can be retrained.

    \b
    Examples:
      expunge train meta-llama/Llama-3.2-1B --data tofu:full --out runs/target schedule.epochs=5 schedule.lr=1e-5
      expunge train llama-tiny --scratch --data people:train --out runs/target schedule.epochs=30
      expunge train gpt2 --data mine.jsonl --out runs/target parameters=lora

    \b
    Classifiers and regressors that rows can be deleted from exactly; the function returns expunge.Supervised:
      expunge train digits.py:problem --method sisa --out runs/sisa shards=5 slices=4
      expunge unlearn runs/sisa --id 17

    \b
    A language model that records can be deleted from, with a certificate:
      expunge train gpt2 --data mine.jsonl --method dp2u --out runs/private epsilon=2 schedule.lr=1e-4
      expunge unlearn runs/private --subject "patient 7"

    \b
    Without schedule.lr a short range test finds the step size.
    """


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train", help=_HELP)(train)


def train(
    model: Annotated[str, typer.Argument(help="Base model: hub id or local folder; with --scratch a preset such as llama-tiny.")],
    parts: Annotated[list[str] | None, typer.Argument(help="key=value pairs.", metavar="[PARTS]...")] = None,
    data: Annotated[list[str] | None, typer.Option(help="What to train on; may be repeated.", metavar="DATA")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.", metavar="RUN")] = None,
    scratch: Annotated[bool, typer.Option("--scratch", help="Random weights; a word tokenizer made from the data.")] = False,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with the same settings; options win over it.", metavar="FILE")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="A method that prepares for deletions: of rows sisa, s3t...; of texts dp2u.", metavar="NAME"),
    ] = None,
    holdout: Annotated[
        str | None, typer.Option(help="With --method: records never trained on, for the audit.", metavar="DATA")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of initial weights and of the order of examples.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the cost, stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Train and leave a run folder."""
    from expunge.cli.rows import is_rows, train_prepared, train_texts
    from expunge.core.files import check_room
    from expunge.pipeline import train as stage
    from expunge.pipeline.config import TrainConfig, from_file, merge
    from expunge.pipeline.models import is_preset
    from expunge.pipeline.unlearn import check_out

    output = Output(json)
    overrides = parse_overrides(parts or [])
    engine = {**overrides.pop("engine", {}), **({"seed": seed} if seed is not None else {})}
    text = overrides.pop("text", None)
    given: dict[str, Any] = {
        "model": model, "data": data or None, "scratch": scratch or None, "parts": overrides or None,
        "engine": engine or None, "text": text,
    }  # fmt: skip
    merged = merge(from_file(config) if config else {}, given)
    if out is None:
        raise InputError("No folder for the run was given.", "Add --out RUN, for example --out runs/target.")
    if is_rows({**merged, "data": None}, {}):
        if seed is not None:
            raise InputError("--seed is for language models.", "Write seed=VALUE: it is a setting of the method.")
        if holdout is not None:
            raise InputError("--holdout is for language models; the function brings its own.", "Leave it out.")
        return train_prepared(merged, method, out, resume=resume, dry_run=dry_run, output=output)
    if method is not None:
        if seed is not None:
            raise InputError("--seed does not go with --method.", "Write seed=VALUE: it is a setting of the method.")
        return train_texts(merged, method, holdout, out, resume=resume, dry_run=dry_run, output=output)
    if holdout is not None:
        raise InputError(
            "--holdout belongs to --method.", "Name the holdout when the model is unlearned: expunge unlearn --holdout."
        )
    if not merged.get("data"):
        raise InputError("No data to train on were given.", "Add --data DATA.")
    check_out(out, resume)
    settings = TrainConfig(**merged)
    if not settings.scratch and is_preset(settings.model):
        raise InputError(
            f"{settings.model!r} is the shape of a small untrained model.", "Add --scratch to train it from the start."
        )
    made = stage.plan(settings)
    check_room(out, made.cost.disk, "Training")
    output.note(f"training: {made.cost.text()}")
    if dry_run:
        output.result({"cost": made.cost.json(), "recipe": made.recipe.spec(), "config": settings.model_dump(mode="json")})
        return 0
    with output.progress("training") as progress:
        run = stage.execute(made, out, resume=resume, progress=progress)
    result = run.manifest["stages"]["train"]["result"]
    reused = "train" in run.skipped
    output.result({"run": str(out), "model": str(out / "model"), "reused": reused, **result})
    if reused:
        output.say("This run had finished; nothing was left to do.")
    output.say(f"{result['sentence']}\nModel: {out / 'model'}")
    return 0
