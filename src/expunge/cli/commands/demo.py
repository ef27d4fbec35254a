"""``expunge demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from expunge.cli.output import Output

if TYPE_CHECKING:
    from expunge.audit.document import AuditDocument

_HELP = """See all of it in five minutes: a small model learns fictitious people, forgets some of them by five methods, and
    is audited against models that never saw them.

    \b
    expunge demo classifier: a network that knows digits forgets 50 rows, one class, and rows it learnt with a wrong label, by
    a dozen methods, compared with models retrained without them.

    \b
    Examples:
      expunge demo
      expunge demo classifier
      expunge demo --out somewhere
    """


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo", help=_HELP)(demo)


def demo(
    what: Annotated[Literal["language", "classifier"], typer.Argument(help="language, or classifier.")] = "language",
    out: Annotated[Path | None, typer.Option(help="Folder of runs and report [default: demo].", metavar="FOLDER")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Run a demo."""
    from expunge.pipeline import demo_rows
    from expunge.pipeline.demo import run

    output = Output(json)
    if out is None:
        out = Path("demo" if what == "language" else "demo-classifier")
    if what == "classifier":
        rows = demo_rows.run(out, bars=output.progress, say=output.note)
        return _shown(rows.documents, rows.seconds, out, output)
    done = run(out, bars=output.progress, say=output.note)
    return _shown([done.document], done.seconds, out, output)


def _shown(documents: list[AuditDocument], seconds: float, out: Path, output: Output) -> int:
    from expunge.report.html import write
    from expunge.report.terminal import print_summary, summary_json

    path = out / "report.html"
    write(documents, path)
    output.result({"seconds": seconds, "report": str(path), **summary_json(documents)})
    if not output.machine:
        print_summary(documents)
        output.say(f"{seconds:.0f} seconds.   Report: {path}")
    return 0
