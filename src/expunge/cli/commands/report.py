"""``expunge report`` and ``expunge compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.cli.output import Output
from expunge.core.errors import InputError

if TYPE_CHECKING:
    from expunge.audit.document import AuditDocument

_REPORT = """Write the evidence of one or more audited runs as one offline HTML file.

    \b
    Examples:
      expunge report runs/npo
      expunge report runs/npo runs/simnpo runs/rmu --out compare.html
      expunge report runs/sweep
      expunge report runs/tofu                             (a benchmark: its axes and curves, and the verdict)
    """

_COMPARE = """Compare audited runs: trade-off table, sorted by distance to the retrained models, and a plot.

    \b
    Examples:
      expunge compare runs/npo runs/simnpo runs/rmu
      expunge compare runs/* --out compare.html --json
      expunge compare runs/requests-by-npo runs/requests-by-rmu

    \b
    Sequences of requests are compared request by request.
    """


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("report", help=_REPORT)(report)
    app.command("compare", help=_COMPARE)(compare)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of audited runs.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file [default: report.html in the run].", metavar="FILE")] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file given by --out.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Write the report."""
    from expunge.pipeline.sweep_result import is_sweep
    from expunge.report.html import write

    output = Output(json)
    if out is None and len(runs) > 1:
        raise InputError("Several runs need a file for their report.", "Add --out FILE.html.")
    path = out or runs[0] / "report.html"
    if out is not None and out.exists() and not force:
        raise InputError(f"The file {str(out)!r} exists.", "Add --force to replace it.")
    if any(is_sweep(run) for run in runs):
        path = out or runs[0] / "sweep.html"
        _sweep(runs, path, output)
    else:
        write(_documents(runs), path, title=title)
    output.result({"report": str(path)})
    output.say(f"Report: {path}")
    return 0


def _documents(runs: list[Path]) -> list[AuditDocument]:
    """What is known of the runs; of a benchmark's folder its axes and curves, too."""
    from expunge.benchmarks.document import DOCUMENT, read
    from expunge.pipeline.audit import read_all
    from expunge.report.benchmark import page_document

    out = []
    for run in runs:
        out += [page_document(run, read(run))] if (run / DOCUMENT).is_file() else read_all([run])
    return out


def _sweep(runs: list[Path], path: Path, output: Output) -> None:
    from expunge.pipeline.sweep_result import read
    from expunge.report.sweep import front_table, write

    if len(runs) > 1:
        raise InputError("A sweep is reported by itself.", f"Name one folder: expunge report {runs[0]}.")
    document = read(runs[0])
    write(document, path)
    for renderable in front_table(document):
        output.say(renderable)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of audited runs.")],
    out: Annotated[Path | None, typer.Option(help="Also write an HTML page with the plot.", metavar="FILE")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file given by --out.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Compare runs."""
    from expunge.pipeline.audit import by_request, read_all, requests_of
    from expunge.report.compare import compare as comparison
    from expunge.report.html import write
    from expunge.report.terminal import comparison_json, trade_off

    output = Output(json)
    if out is not None and out.exists() and not force:
        raise InputError(f"The file {str(out)!r} exists.", "Add --force to replace it.")
    documents = read_all(runs)
    if any(requests_of(run) for run in runs):
        found = [(group[0].title, comparison(group)) for group in by_request(documents)]
        output.result({"requests": [{"title": title, **comparison_json(table)} for title, table in found]})
        for title, table in found:
            output.say(title)
            output.say(trade_off(table))
    else:
        single = comparison(documents)
        output.result(comparison_json(single))
        output.say(trade_off(single))
    if out is not None:
        write(documents, out)
        output.say(f"Page: {out}")
    return 0
