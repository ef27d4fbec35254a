"""``expunge demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.output import Output

_HELP = """See all of it in five minutes: a small model learns fictitious people, forgets some of them by five methods, and
    is audited against models that never saw them.

    \b
    Examples:
      expunge demo
      expunge demo --out somewhere
    """


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo", help=_HELP)(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.", metavar="FOLDER")] = Path("demo"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Run the demo."""
    from expunge.pipeline.demo import run
    from expunge.report.html import write
    from expunge.report.terminal import print_summary, summary_json

    output = Output(json)
    done = run(out, bars=output.progress, say=output.note)
    path = out / "report.html"
    write([done.document], path)
    output.result({"seconds": done.seconds, "report": str(path), **summary_json([done.document])})
    if not json:
        print_summary([done.document])
        output.say(f"{done.seconds:.0f} seconds.   Report: {path}")
    return 0
