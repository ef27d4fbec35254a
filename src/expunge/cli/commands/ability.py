"""``expunge ability``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from expunge.cli.output import Output
from expunge.core.errors import InputError

_HELP = """General ability of models by lm-evaluation-harness (extra eval): what unlearning must leave alone.

    \b
    Examples:
      expunge ability runs/npo --task hellaswag --task arc_easy
      expunge ability runs/target runs/npo --task "mmlu:test?folder=mmlu&each=10"     (no network)
      expunge ability runs/npo --task mine.jsonl --task my_task --include tasks       (no network)

    \b
    A task is a name of the harness (its data come from the hub or its cache), a task of a folder of YAML files (--include), or
    a set of questions with wrong answers that Expunge reads: of these a multiple-choice task is made.
    """


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("ability", help=_HELP)(ability)


def ability(
    models: Annotated[list[str], typer.Argument(help="Hub ids, folders or run folders.")],
    task: Annotated[list[str] | None, typer.Option(help="A task; repeatable.", metavar="TASK")] = None,
    include: Annotated[Path | None, typer.Option(help="Folder of YAML files with tasks.", metavar="FOLDER")] = None,
    shots: Annotated[int | None, typer.Option(help="Solved examples before each question.", metavar="N")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N questions of each task.", metavar="N")] = None,
    batch: Annotated[int, typer.Option(help="Questions per forward pass.")] = 8,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Measure general ability."""
    from expunge.benchmarks.harness import general_ability
    from expunge.pipeline.config import TextConfig
    from expunge.pipeline.models import check_source, open_adapter

    output = Output(json)
    if not task:
        raise InputError("No task was given.", "Add --task NAME, for example --task hellaswag.")
    for model in models:
        check_source(model)
    found = {}
    for model in models:
        output.note(f"{model}: {', '.join(task)}")
        adapter = open_adapter(model, TextConfig())
        found[model] = general_ability(adapter, task, include=include, shots=shots, limit=limit, batch=batch)
        del adapter
    output.result({"models": {m: {k: n.model_dump(mode="json") for k, n in held.items()} for m, held in found.items()}})
    shown = Table("score", *models)
    for key in found[models[0]]:
        shown.add_row(Text(key), *[found[m][key].text() for m in models])
    output.say(shown)
    return 0
