"""``expunge hardest``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.output import Output
from expunge.core.errors import InputError
from expunge.core.settings import parse_overrides

_HELP = """Choose the rows of a classifier or regressor that are hardest to forget: a worst-case forget set.

    A random forget set is mild. The hardest rows are those that a model still answers after it was trained on all others alone.

    \b
    Examples:
      expunge hardest digits.py:problem 100 --out worst.txt
      expunge unlearn digits.py:problem --id @worst.txt --method scrub --out runs/worst
      expunge hardest digits.py:problem 1 --by class outer=20 epochs=1 lr=5e-5 step=1e-4 penalty=1e-4
      expunge hardest digits.py:problem 100 goal=easiest --out easy.txt

    \b
    SETTINGS are those of the search: outer, epochs, batch, lr, step, penalty, goal, seed.
    """


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("hardest", help=_HELP)(hardest)


def hardest(
    model: Annotated[str, typer.Argument(help="A function that returns expunge.Supervised: file.py:function.")],
    count: Annotated[int, typer.Argument(help="How many rows, classes or subjects to choose.")],
    parts: Annotated[list[str] | None, typer.Argument(help="key=value settings of the search.", metavar="[SETTINGS]...")] = None,
    by: Annotated[str, typer.Option(help="What is chosen as a whole: row, class or subject.")] = "row",
    out: Annotated[Path | None, typer.Option(help="File for the ids, one on each line.", metavar="FILE")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Choose rows, and write their ids."""
    from expunge.core.files import write_text
    from expunge.pipeline.problems import load_problem
    from expunge.pipeline.supervised import target_of
    from expunge.pipeline.worst_case import check_by, worst_rows

    output = Output(json)
    if out is not None and out.exists():
        raise InputError(f"{str(out)!r} exists.", "Choose another file, or remove it.")
    problem, how = load_problem(model), parse_overrides(parts or [])
    unit = check_by(problem.data, by, count, how)
    with output.progress("target") as progress:
        held = target_of(problem, progress=progress)
    with output.progress("upper steps") as progress:
        tell = None if progress is None else (lambda done, total: progress(done, total, "upper steps"))
        found = worst_rows(held, problem.data, count, by=unit, loss=problem.loss, layers=problem.layers, progress=tell, **how)
    last = found.curve[-1]
    if out is not None:
        write_text(out, "".join(f"{name}\n" for name in found.ids))
    output.result({
        "ids": list(found.ids), "rows": len(found.ids), "of": len(problem.data), "by": by,
        "curve": [{"objective": s.objective, "loss": s.loss, "kept": None if s.kept != s.kept else s.kept} for s in found.curve],
    })  # fmt: skip
    output.say(f"{len(found.ids)} of {len(problem.data)} rows. After unlearning their mean loss was {last.loss:.3f}.")
    if out is not None:
        output.say(f"Ids: {out}   Next: expunge unlearn {model} --id @{out} --out RUN")
    elif not json:
        output.say("\n".join(found.ids))
    return 0
