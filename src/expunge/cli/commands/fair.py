"""``expunge fair``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.output import Output

_HELP = """Make the error rates of an ensemble equal over groups, by post-processing its votes (FairSISA).

    Nothing is trained: the members of the ensemble stay as they are, and with them whatever was deleted. Three ways are fitted on
    one half of the holdout rows and judged on the other.

    \b
    Examples:
      expunge train clinic.py:problem --method sisa shards=5 --out runs/sisa
      expunge unlearn runs/sisa --id 17
      expunge fair runs/sisa --group sex

    \b
    The rule of the best way is left in RUN/fair.json.
    """


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("fair", help=_HELP)(fair)


def fair(
    run: Annotated[Path, typer.Argument(help="Folder of a run of `expunge train ENTRY --method sisa`.")],
    group: Annotated[str, typer.Option(help="Column of the holdout that names each row's group.", metavar="COLUMN")],
    seed: Annotated[int, typer.Option(help="Seed of the halves of the holdout.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Fit and judge."""
    from dataclasses import asdict

    from rich.table import Table

    from expunge.pipeline.fair import FILE, fairness

    output = Output(json)
    found = fairness(run, group, seed=seed)
    output.result(asdict(found))
    table = Table("answer", "accuracy ↑", "difference of error rates ↓", "difference of positive answers ↓")
    for way in found.ways:
        table.add_row(way.name, f"{way.accuracy:.3f}", f"{way.equalised_odds:.3f}", f"{way.parity:.3f}")
    output.say(table)
    output.say(
        f"{found.members} members, groups {', '.join(found.groups)}, positive {found.positive!r}; fitted on {found.fitted} rows, "
        f"judged on {found.judged} others. A fair answer is drawn with a probability; these are expectations."
    )
    output.say(f"Rule: {run / FILE}")
    return 0
