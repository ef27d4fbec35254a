"""``expunge merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.output import Output
from expunge.core.errors import InputError
from expunge.core.settings import parse_overrides

_HELP = """Join models that were unlearned from one and the same target; the result is a run that can be audited.

    \b
    Examples:
      expunge merge runs/first runs/second --how linear --out runs/both
      expunge merge runs/seed1 runs/seed2 runs/seed3 --out runs/mean
      expunge merge runs/npo runs/simnpo --how ties --out runs/ties density=0.3 weights=[2,1]
      expunge audit runs/both --retrain 3

    \b
    A task vector is what unlearning changed: theta_i - theta_0. How they are joined:
      mean         their weighted mean (of runs with one request: seeds, methods)
      linear       their weighted sum (of runs with different requests: all of them)
      magnitude    the sum of the largest entries of each (density: the share that is kept)
      ties         the largest entries of each; where signs disagree, the side with the larger sum
      dare-linear  the sum of random entries of each, scaled up; dare-ties: with the signs of ties
    Runs that forgot different records are joined to one that is judged by all of these; what all runs were to keep is
    what it must keep.

    \b
    SETTINGS are key=value pairs: weights, density, sign, seed.
    """


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("merge", help=_HELP)(merge)


def merge(
    words: Annotated[
        list[str] | None, typer.Argument(help="Folders of unlearning runs, then key=value.", metavar="RUN RUN... [SETTINGS]...")
    ] = None,
    how: Annotated[
        str | None, typer.Option(help="mean, linear, magnitude, ties, dare-linear or dare-ties [default: mean].", metavar="NAME")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the result.", metavar="RUN")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Join runs."""
    from expunge.pipeline.merge import MergeConfig, execute, plan
    from expunge.pipeline.unlearn import check_out

    output = Output(json)
    runs = [w for w in words or [] if "=" not in w or Path(w).is_dir()]
    settings: dict[str, Any] = parse_overrides([w for w in words or [] if w not in runs])
    if how is not None:
        settings["how"] = how
    if len(runs) < 2:
        raise InputError(f"{len(runs) or 'No'} runs are named, and a merge needs two.", "See expunge merge --help.")
    if out is None:
        raise InputError("No folder for the result was given.", "Add --out RUN, for example --out runs/merged.")
    config = MergeConfig(runs=tuple(runs), settings=settings)
    check_out(out, resume)
    made = plan(config)
    for note in made.notes:
        output.note(note)
    sizes = {name: len(records) for name, records in made.sets.items()}
    output.note(f"merge of {len(runs)} runs by {config.settings.how}: " + ", ".join(f"{n} {k}" for k, n in sizes.items()))
    if dry_run:
        output.result({"settings": config.settings.model_dump(mode="json"), "sets": sizes, "notes": made.notes})
        return 0
    with output.progress("merge") as progress:
        run = execute(made, out, resume=resume, progress=progress)
    result = run.manifest["stages"]["unlearn"]["result"]
    output.result({"run": str(out), "model": str(out / "model"), "reused": "unlearn" in run.skipped, **result})
    output.say(result["sentence"])
    output.say(f"Model: {out / 'model'}   Next: expunge audit {out} --retrain 3")
    return 0 if result["reached"] else 3
