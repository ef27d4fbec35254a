"""A benchmark for people: what it declares, and what a run of it found."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from expunge.audit.document import AuditDocument, Curve, ModelEntry
from expunge.benchmarks.document import AxisEntry, BenchmarkDocument, Grid
from expunge.benchmarks.registry import BENCHMARKS
from expunge.core.files import write_text
from expunge.core.results import Number
from expunge.pipeline.audit import read as read_audit
from expunge.report.glossary import ARROWS
from expunge.report.text import clean, digits, interval_text, value_text

_ROLES = {"target": 0, "retrained": 1, "base": 2, "unlearned": 3}


def ordered(document: BenchmarkDocument) -> list[ModelEntry]:
    """Models in the order in which they are shown: target, retrained, unlearned."""
    return sorted(document.models, key=lambda m: _ROLES[m.role])


def table(document: BenchmarkDocument) -> Table:
    """One line for each axis, one column for each model: value and, under it, its interval."""
    models = ordered(document)
    shown = Table(title=Text(clean(document.title)), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("Axis", overflow="fold")
    for model in models:
        shown.add_column(Text(model.label), justify="right", overflow="fold")
    group = ""
    for axis in document.axes:
        if axis.group and axis.group != group:
            shown.add_row(Text(axis.group, style="bold"), *[""] * len(models))
            group = axis.group
        numbers = [m.numbers.get(axis.name) for m in models]
        places = digits([n for n in numbers if n is not None])
        shown.add_row(Text(f"{axis.title} {_arrow(axis)}"), *[_cell(n, places) for n in numbers])
    return shown


def _arrow(axis: AxisEntry) -> str:
    return ARROWS.get(axis.direction, "")  # type: ignore[call-overload, no-any-return, unused-ignore]


def _cell(number: Number | None, places: int) -> Text:
    if number is None or number.value is None:
        return Text("-")
    interval = interval_text(number, places)
    return Text(value_text(number, places) + ("!" if number.flags else "") + (f"\n{interval}" if interval else ""))


def document_json(document: BenchmarkDocument) -> dict[str, Any]:
    """The numbers of every model by axis, for machines."""
    return {
        "benchmark": document.benchmark, "checkpoint": document.checkpoint,
        "models": [
            {"label": m.label, "role": m.role, "numbers": {k: n.model_dump(mode="json") for k, n in m.numbers.items()}}
            for m in ordered(document)
        ],
        "grids": [g.model_dump(mode="json") for g in document.grids],
        "not_measured": document.not_measured,
    }  # fmt: skip


def markdown(document: BenchmarkDocument) -> str:
    """The table as Markdown, with notes under it."""
    models = ordered(document)
    lines = [f"# {document.title}", "", f"Paper: {document.paper}. Checkpoint rule: {document.checkpoint}.", ""]
    lines += ["| axis | " + " | ".join(m.label for m in models) + " |", "| --- |" + " ---: |" * len(models)]
    for axis in document.axes:
        numbers = [m.numbers.get(axis.name) for m in models]
        places = digits([n for n in numbers if n is not None])
        cells = [_cell(n, places).plain.replace("\n", " ") for n in numbers]
        lines.append(f"| {axis.title} | " + " | ".join(cells) + " |")
    for curve in document.curves:
        lines += ["", *_curve_lines(curve)]
    for grid in document.grids:
        lines += ["", *_grid_lines(grid)]
    notes = [f"{a.title}: {a.note}" for a in document.axes if a.note]
    unmeasured = [
        f"{m.label}, {a.title}: not measured, {n.note}"
        for m in models for a in document.axes if (n := m.numbers.get(a.name)) is not None and n.value is None and n.note
    ]  # fmt: skip
    flagged = [f"{m.label}, {k}: {f}" for m in models for k, n in m.numbers.items() for f in n.flags]
    lines += ["", *(f"- {n}" for n in (*notes, *flagged, *unmeasured, *document.not_measured, *document.caveats)), ""]
    return "\n".join(lines)


def _curve_lines(curve: Curve) -> list[str]:
    head = [f"## {curve.title}", "", f"| {curve.x_label} | " + " | ".join(s.label for s in curve.series) + " |"]
    head.append("| ---: |" + " ---: |" * len(curve.series))
    at = sorted({x for s in curve.series for x in s.x})
    for x in at:
        cells = [f"{s.y[s.x.index(x)]:.3f}" if x in s.x else "-" for s in curve.series]
        head.append(f"| {x:g} | " + " | ".join(cells) + " |")
    return head


def _grid_lines(grid: Grid) -> list[str]:
    head = [f"## {grid.title}", "", "| | " + " | ".join(grid.titles) + " |", "| --- |" + " ---: |" * len(grid.columns)]
    for row in grid.rows:
        cells = [_cell(row.numbers.get(c), 2).plain.replace("\n", " ") for c in grid.columns]
        head.append(f"| {row.label} | " + " | ".join(cells) + " |")
    return head


def write_report(document: BenchmarkDocument, folder: Path) -> Path:
    """``benchmark.md`` and, where the run was audited, ``report.html`` with the axes beside the audit's own numbers.

    Returns:
        The file for people: the page if there is one, else the table.
    """
    path = folder / "benchmark.md"
    write_text(path, markdown(document))
    if not (folder / "audit.json").is_file():
        return path
    from expunge.report.html import write

    page = folder / "report.html"
    write([page_document(folder, document)], page)
    return page


def page_document(folder: Path, document: BenchmarkDocument) -> AuditDocument:
    """What a page shows of a benchmark's folder: its axes and curves, beside the audit's numbers where it was audited.

    Raises:
        InputError: the audit cannot be read.
    """
    if (folder / "audit.json").is_file():
        return with_axes(read_audit(folder), document)
    bare = AuditDocument(
        created=document.created, title=document.title, modality="language", signature=document.signature, cost={},
        data={n: {"name": n, "of": d["records"], **d} for n, d in document.data.items()},
        models=[m.model_copy(update={"numbers": {}}) for m in document.models], protocol=document.protocol,
        not_shown=[*document.not_measured, "The models were not audited: there is no verdict."],
    )  # fmt: skip
    return with_axes(bare, document)


def with_axes(audit: AuditDocument, document: BenchmarkDocument) -> AuditDocument:
    """The audit with the benchmark's axes among the numbers of its models, as ``<benchmark>.<axis>``, and its curves."""
    axes = {m.label: {f"{document.benchmark}.{k}": n for k, n in m.numbers.items()} for m in document.models}
    models = [m.model_copy(update={"numbers": {**m.numbers, **axes.get(m.label, {})}}) for m in audit.models]
    told = {
        f"{document.benchmark}.{a.name}": {
            "title": ": ".join(t for t in (a.group, a.title) if t), "text": a.note, "formula": a.formula,
        }
        for a in document.axes
    }  # fmt: skip
    protocol = {**audit.protocol, "metrics": {**audit.protocol.get("metrics", {}), **told}}
    return audit.model_copy(update={"models": models, "curves": [*audit.curves, *document.curves], "protocol": protocol})


def description_json(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a benchmark declares, for machines."""
    held = BENCHMARKS.get(name)(**options)
    return {
        "name": name,
        "title": held.title,
        "paper": held.paper.url,
        "licence": held.licence,
        "home": held.home,
        "text": inspect.cleandoc(type(held).__doc__ or ""),
        "reference": held.reference,
        "sets": {n: dataclasses.asdict(s) for n, s in held.sources().items()},
        "trainings": [{"name": t.name, "sets": list(t.sets), "parts": dict(t.parts), "base": t.base} for t in held.trainings()],
        "unlearning": dict(held.unlearning()),
        "axes": [
            {"name": a.name, "title": a.title, "metric": a.metric, "number": a.number, "sets": dict(a.sets)} for a in held.axes()
        ],
        "courses": [c.name for c in held.courses()],
        "caveats": list(held.caveats),
        "options": [dataclasses.asdict(p) for p in held.declared()],
    }


def description(name: str, options: Mapping[str, Any]) -> list[Any]:
    """What a benchmark declares, for people."""
    held = BENCHMARKS.get(name)(**options)
    about = inspect.cleandoc(type(held).__doc__ or "")
    out: list[Any] = [
        f"{held.name}: {held.title}\n\n{about}\n",
        f"Paper: {held.paper.title}, {held.paper.authors} {held.paper.year}, {held.paper.url}",
        f"Data: {held.home}; licence: {held.licence}\nCompared with: {held.reference}",
    ]
    sets = Table("set", "what it is", "records", "needed", box=None, padding=(0, 2))
    for set_name, source in held.sources().items():
        needed = "if there" if source.optional else "yes"
        sets.add_row(set_name, source.text, str(source.rows or "any"), needed + (", hazardous" if source.hazardous else ""))
    axes = Table("axis", "what it is", "metric", "sets", box=None, padding=(0, 2))
    for axis in held.axes():
        axes.add_row(axis.name, axis.title, axis.metric, ", ".join(f"{r}={s}" for r, s in axis.sets.items()))
    out += [sets, axes]
    for step in held.trainings():
        out.append(f"Training of {step.name} (published on {step.base}): {', '.join(step.sets)}; {_settings(step.parts)}")
    if held.unlearning():
        out.append(f"Unlearning: {_settings(held.unlearning())}")
    for course in held.courses():
        out.append(f"Course {course.name} ({course.kind}): {', '.join(course.sets)}; {course.text}")
    table_of = Table("option", "allowed", "default", "meaning", box=None, padding=(0, 2))
    for parameter in held.declared():
        table_of.add_row(parameter.name, *map(Text, (parameter.allowed, parameter.default, parameter.text)))
    return [*out, table_of, *(f"Note: {c}" for c in held.caveats)]


def _settings(parts: Mapping[str, Any]) -> str:
    flat = {f"{k}.{n}": v for k, held in parts.items() if isinstance(held, Mapping) for n, v in held.items()}
    flat |= {k: v for k, v in parts.items() if not isinstance(v, Mapping)}
    return ", ".join(f"{k}={v}" for k, v in flat.items())
