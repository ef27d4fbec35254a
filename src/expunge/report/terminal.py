"""The summary of an audit in the terminal, and the same for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from expunge.audit.document import AuditDocument, ModelEntry
from expunge.core.results import Number, Verdict
from expunge.report.compare import Comparison, Row
from expunge.report.glossary import ARROWS, term
from expunge.report.headline import Kind, family, pick
from expunge.report.text import DASH, clean, digits, duration, interval_text, plural, value_text
from expunge.report.view import column_places, ordered
from expunge.report.weakest import control_faults

KINDS: tuple[Kind, ...] = ("forget", "utility", "privacy", "relearn")
_WIDE, _NARROW = 150, 100  #: columns
_FRONT = "◆"  #: marks a method that no other beats on both axes
_PLAIN: dict[str, Any] = {"box": SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
_LOOKS = {
    Verdict.FORGOTTEN: ("✔", "bold green"),
    Verdict.SUPPRESSED: ("◐", "bold yellow"),
    Verdict.NOT_FORGOTTEN: ("✘", "bold red"),
    Verdict.DAMAGED: ("⚠", "bold magenta"),
    Verdict.NO_GOLD: ("?", "dim"),
    Verdict.UNDECIDED: ("≈", "cyan"),
}


def print_summary(documents: Sequence[AuditDocument], *, console: Console | None = None, as_json: bool = False) -> None:
    """Print the summary table of each document, the reasons, the flags and what was not shown.

    Args:
        documents: the audits.
        console: where to; None is standard output.
        as_json: print one JSON object (:func:`summary_json`) instead, for machines.
    """
    console = console or Console()
    if as_json:
        console.out(json.dumps(summary_json(documents), indent=2, ensure_ascii=False, allow_nan=False), highlight=False)
        return
    for document in documents:
        console.print(summary(document, width=console.width))


def summary(document: AuditDocument, *, width: int = 160) -> RenderableType:
    """The table of ``document`` (one line per model) with the reasons and footnotes under it.

    Args:
        document: the audit.
        width: columns of the terminal. From 150 on intervals stand beside their values, below that under them; under 100 the
            verdict stands below the model and the time is left out.
    """
    models = ordered(document.models)
    keys = [key for kind in KINDS if (key := pick(models, kind)) is not None]
    places = {key: digits([m.numbers[key] for m in models if key in m.numbers]) for key in keys}
    wide, narrow = width >= _WIDE, width < _NARROW
    table = Table(title=Text(clean(document.title)), title_justify="left", title_style="bold", header_style="bold", **_PLAIN)
    notes: list[str] = []
    rows = [[_cell(model.numbers.get(key), wide, notes, places[key]) for key in keys] for model in models]
    verdicts = max((len(_verdict(model)) for model in models), default=0)
    table.add_column("Model", overflow="fold", min_width=verdicts if narrow else None)
    if not narrow:
        table.add_column("Verdict", no_wrap=True)
    for at, key in enumerate(keys):
        # A heading may be wrapped, a number or an interval may not.
        needed = max((len(line) for row in rows for line in row[at].plain.splitlines()), default=0)
        table.add_column(Text(_heading(document, models, key)), justify="right", overflow="fold", min_width=needed)
    if not narrow:
        table.add_column("Time", justify="right", no_wrap=True)
    for model, cells in zip(models, rows, strict=True):
        if narrow:
            table.add_row(_name(model) + Text("\n") + _verdict(model), *cells)
            continue
        seconds = model.cost.get("seconds")
        table.add_row(_name(model), _verdict(model), *cells, Text(DASH if seconds is None else duration(seconds)))
    return Group(table, *_below(document, models, notes))


def trade_off(comparison: Comparison) -> Table:
    """The trade-off table: nearest to the gold standard first, target and gold standard above."""
    table = Table(
        title="Distance to the retrained gold standard", title_justify="left", title_style="bold", header_style="bold", **_PLAIN
    )
    notes: list[str] = []
    rows = [row for row in (comparison.target, comparison.gold, *comparison.rows) if row is not None]
    columns = list(column_places(comparison))
    held = [
        [_cell(n, False, notes, p) for n, p in zip((row.distance, row.forget, row.utility), columns, strict=True)] for row in rows
    ]
    table.add_column("Method", overflow="fold")
    table.add_column("Verdicts")
    for at, name in enumerate(("distance", comparison.forget_key, comparison.utility_key)):
        needed = max(len(line) for cells in held for line in cells[at].plain.splitlines())
        table.add_column(Text(name), justify="right", overflow="fold", min_width=needed)
    table.add_column("Seeds", justify="right")
    for row, cells in zip(rows, held, strict=True):
        verdicts = ", ".join(dict.fromkeys(v.value for v in row.verdicts)) or DASH
        table.add_row(Text(clean(row.label) + (f" {_FRONT}" if row.pareto else "")), Text(verdicts), *cells, str(row.seeds))
    marks = [f"({i}) {clean(note)}." for i, note in enumerate(notes, 1)]
    table.caption = Text(" ".join((comparison.definition, f"{_FRONT}: on the Pareto front.", *marks, *comparison.notes)))
    table.caption_justify = "left"
    return table


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """The trade-off table for machines."""
    rows = {"target": comparison.target, "gold": comparison.gold}

    def plain(row: Row | None) -> dict[str, Any] | None:
        if row is None:
            return None
        numbers = {k: getattr(row, k) for k in ("forget", "utility", "distance")}
        return {
            "label": row.label, "models": list(row.models), "seeds": row.seeds, "verdicts": [v.value for v in row.verdicts],
            "pareto": row.pareto, "guard": row.guard, **{k: n.model_dump(mode="json") if n else None for k, n in numbers.items()},
        }  # fmt: skip

    return {
        "forget": comparison.forget_key, "utility": comparison.utility_key, "definition": comparison.definition,
        "notes": list(comparison.notes), "rows": [plain(r) for r in comparison.rows], **{k: plain(r) for k, r in rows.items()},
    }  # fmt: skip


def summary_json(documents: Sequence[AuditDocument]) -> dict[str, Any]:
    """The summary for machines: per document its title, and per model the verdict, its reason and the headline numbers."""
    return {"documents": [_document_json(document) for document in documents]}


def _under(model: ModelEntry) -> dict[str, Any]:
    """The protocol and how its criteria came out, where there was one."""
    if model.judgement is None or not model.judgement.protocol:
        return {}
    return {"protocol": model.judgement.protocol, "criteria": {f.id: f.outcome for f in model.judgement.criteria}}


def _document_json(document: AuditDocument) -> dict[str, Any]:
    models = ordered(document.models)
    keys = {kind: pick(models, kind) for kind in KINDS}
    return {
        "title": document.title,
        "created": document.created,
        "headline": keys,
        "models": [
            {
                "label": model.label,
                "role": model.role,
                "method": model.method,
                "verdict": model.judgement.verdict.value if model.judgement else None,
                "reason": model.judgement.reason if model.judgement else "",
                **_under(model),
                "numbers": {
                    key: model.numbers[key].model_dump(mode="json")
                    for key in keys.values()
                    if key is not None and key in model.numbers
                },
                "seconds": model.cost.get("seconds"),
            }
            for model in models
        ],
        "control_faults": control_faults(document),
        "not_shown": document.not_shown,
    }


def _heading(document: AuditDocument, models: Sequence[ModelEntry], key: str) -> str:
    direction = next(m.numbers[key].direction for m in models if key in m.numbers)
    name = family(key) if family(key) in document.data else ""
    return f"{name}\n{term(document, key).title} {ARROWS[direction]}".strip()


def _name(model: ModelEntry) -> Text:
    role = "" if model.role == "unlearned" or model.role in model.label else f" ({model.role})"
    return Text(clean(model.label)) + Text(role, style="dim")


def _verdict(model: ModelEntry) -> Text:
    if model.judgement is None:
        return Text("not judged", style="dim")
    icon, style = _LOOKS[model.judgement.verdict]
    return Text(f"{icon} {model.judgement.verdict.value}", style=style)


def _cell(number: Number | None, wide: bool, notes: list[str], places: int | None = None) -> Text:
    if number is None:
        return Text(DASH)
    told = list(dict.fromkeys([*number.flags, *([number.note] if number.value is None and number.note else [])]))
    notes.extend(t for t in told if t not in notes)
    marks = ",".join(str(notes.index(t) + 1) for t in told)
    cell = Text(value_text(number, places, "-")) + Text(
        "!" * bool(number.flags) + (f"({marks})" if marks else ""), style="bold red"
    )
    interval = interval_text(number, places, "-")
    return cell + Text((" " if wide else "\n") + interval, style="dim") if interval else cell


def _below(document: AuditDocument, models: Sequence[ModelEntry], notes: Sequence[str]) -> list[RenderableType]:
    lines: list[RenderableType] = []
    levels = sorted({n.level for m in models for n in m.numbers.values() if n.low is not None})
    if levels:
        shown = " and ".join(f"{level:.0%}" for level in levels)
        lines.append(Text(f"[low, high]: {shown} confidence interval. ↓ ↑ = →0: which way is better.", style="dim"))
    lines += [Text(f"({i}) {clean(note)}", style="red") for i, note in enumerate(notes, 1)]
    lines += [Text(clean(fault), style="bold red") for fault in control_faults(document)]
    for model in models:
        if model.judgement is not None:
            label = Text(clean(model.label) + ": ", style="bold")
            lines.append(Padding(label + Text(clean(model.judgement.reason), style="not bold"), (0, 0, 0, 1)))
            if model.judgement.criteria:
                said = ", ".join(f"{f.id} {f.outcome}" for f in model.judgement.criteria)
                lines.append(Padding(Text(f"{model.judgement.protocol}: {said}."), (0, 0, 0, 3)))
    if document.not_shown:
        lines.append(Text(f"Not shown ({plural(len(document.not_shown), 'point')}):", style="bold"))
        lines += [Padding(Text("- " + clean(point)), (0, 0, 0, 1)) for point in document.not_shown]
    lines.append(Text())
    return lines
