"""The report of a sweep: the whole trade-off front and the choice, as a page, for the terminal and for machines."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from expunge.core.files import write_text
from expunge.core.settings import describe_value
from expunge.core.version import __version__
from expunge.pipeline.sweep_document import MethodSweep, SweepDocument, Trial
from expunge.report.figures import GOLD_LOOK, TARGET_LOOK, Look, unlearned_look
from expunge.report.html import asset, environment
from expunge.report.svg import INK, QUIET, canvas, drawing, place, render
from expunge.report.text import DASH, clean, duration, plural

CHOSEN, FRONT = "★", "◆"  #: mark the chosen trial, and trials that no other beats on both axes
_WIDTH, _LEGEND = 1056, 232
_HIGHEST = 3.0  #: distances beyond are drawn at the edge of the plot


def label(trial: Trial) -> str:
    """A trial's setting in words: its values, or that it is the method's own."""
    if not trial.values:
        return "own setting"
    return ", ".join(f"{path}={describe_value(value)}" for path, value in trial.values.items())


def marks(sweep: MethodSweep, trial: Trial) -> str:
    """Whether a trial is the chosen one, and whether it is on the front of its method."""
    return (CHOSEN if trial.index == sweep.chosen else "") + (FRONT if trial.front else "")


def ordered(sweep: MethodSweep) -> list[Trial]:
    """Trials by distance; those without a result last."""
    return sorted(sweep.trials, key=lambda t: (t.distance is None, t.distance or 0.0, t.lost or 0.0, t.index))


def verdict_text(document: SweepDocument) -> str:
    """The outcome in a sentence."""
    found = next((m for m in document.methods if m.method == document.best), None)
    if found is None or found.chosen is None:
        return f"No trial lost at most {document.bound:.0%} of the usefulness: nothing is chosen."
    trial = found.trials[found.chosen]
    return (
        f"Chosen: {found.method}, trial {trial.index} ({label(trial)}): distance {_figure(trial.distance)}, "
        f"{_share(trial.lost)} of the usefulness lost, on validation records."
    )


def rule_text(document: SweepDocument) -> str:
    """The rule, with its bound where it has one."""
    bound = f" (bound: {document.bound:.0%})" if document.rule == "nearest" else ""
    return f"Rule {document.rule!r}: {document.rule_text}{bound}."


def sweep_json(document: SweepDocument) -> dict[str, Any]:
    """The sweep for machines: everything that the document holds, without the versions."""
    return document.model_dump(mode="json", exclude={"versions"})


def front_table(document: SweepDocument) -> list[RenderableType]:
    """For the terminal: of every method its own setting, its front and the chosen trial; the rule, the notes."""
    out: list[RenderableType] = []
    for sweep in document.methods:
        shown = [t for t in ordered(sweep) if t.front or t.index in (0, sweep.chosen)]
        table = Table(title=Text(sweep.method), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
        for name in ("", "trial"):
            table.add_column(name, no_wrap=True)
        for name in ("distance", "90 % interval", "lost", "loss"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("setting", overflow="fold")
        for t in shown:
            said = label(t) if t.state == "done" else f"{label(t)}: {clean(t.sentence)}"
            span = DASH if t.low is None else f"{_figure(t.low)} to {_figure(t.high)}"
            table.add_row(marks(sweep, t), str(t.index), _figure(t.distance), span, _share(t.lost), _figure(t.loss), Text(said))
        hidden = len(sweep.trials) - len(shown)
        table.caption = f"{plural(hidden, 'further trial')} in sweep.json and sweep.html." if hidden else None
        out.append(table)
    reference = document.reference
    out.append(
        f"{CHOSEN} chosen, {FRONT} on the front. Distance 0: losses as of unseen records ({reference['of']}, mean "
        f"{_figure(reference['loss'])}), 1: as the target's ({_figure(reference['target_loss'])})."
    )
    out.append(rule_text(document))
    out += [f"Note: {note}" for note in document.notes]
    out.append(verdict_text(document))
    return out


def write(document: SweepDocument, path: Path) -> None:
    """Write the page in one step."""
    write_text(path, html(document))


def html(document: SweepDocument) -> str:
    """The page, one offline file; the same document gives the same text.

    Raises:
        MissingExtra: matplotlib or Jinja is not installed.
    """
    script = asset("page.js")
    return (
        environment()
        .get_template("sweep.html")
        .render(
            d=document, plot=front_plot(document), style=asset("page.css"), script=script, version=__version__, label=label,
            marks=marks, ordered=ordered, outcome=verdict_text(document), rule=rule_text(document), figure=_figure, share=_share,
            used=used_lines(document.used),
            seconds=lambda t: duration(t.cost["seconds"]) if "seconds" in t.cost else DASH, dash=DASH,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
        + "\n"
    )  # fmt: skip


def front_plot(document: SweepDocument) -> str:
    """Every trial: distance of its forgetting to the right, lost usefulness upwards; fronts joined, chosen trials ringed."""
    with drawing():
        figure = canvas(_WIDTH, 460)
        axes = place(figure, 64, 16, _WIDTH - 64 - _LEGEND - 24, 460 - 16 - 56)
        handles, names = [], []
        for i, sweep in enumerate(document.methods):
            look = unlearned_look(i)
            handles.append(_trials(axes, sweep, look))
            names.append(sweep.method)
        for at, look, name in (((0.0, 0.0), GOLD_LOOK, "unseen records"), ((1.0, 0.0), TARGET_LOOK, "target")):
            axes.plot([at[0]], [at[1]], marker=look.marker, color=look.colour, markersize=11, linestyle="none", zorder=6)
            handles.append(axes.plot([], [], marker=look.marker, color=look.colour, linestyle="none")[0])
            names.append(name)
        if document.rule == "nearest":
            handles.append(axes.axhline(document.bound, color=QUIET, linewidth=1.1, linestyle=(0, (5, 3)), zorder=1))
            names.append("bound")
        handles.append(axes.plot([], [], "o", markersize=13, markerfacecolor="none", markeredgecolor=INK)[0])
        names.append("chosen")
        axes.set_xlabel("distance of forgetting: 0 as unseen records, 1 as the target")
        axes.set_ylabel("share of usefulness lost (lower is better)")
        axes.margins(0.06)
        axes.legend(handles, names, loc="upper left", bbox_to_anchor=(1.03, 1.0))
        counts = plural(sum(len(m.trials) for m in document.methods), "trial")
        return render(
            figure, "front", f"Lost usefulness against distance of forgetting of {counts}; the numbers are in the tables."
        )


def _trials(axes: Any, sweep: MethodSweep, look: Look) -> Any:
    done = [(min(t.distance, _HIGHEST), t.lost, t) for t in sweep.trials if t.distance is not None and t.lost is not None]
    style = {"color": look.colour, "marker": look.marker, "markeredgecolor": "white", "markeredgewidth": 0.8}
    axes.plot([x for x, _, _ in done], [y for _, y, _ in done], linestyle="none", alpha=0.9, zorder=3, **style)
    best = sorted((x, y) for x, y, t in done if t.front)
    axes.step([x for x, _ in best], [y for _, y in best], where="post", color=look.colour, linewidth=1.2, alpha=0.7, zorder=2)
    for x, y, t in done:
        if t.index == sweep.chosen:
            axes.plot([x], [y], "o", markersize=15, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.6, zorder=5)
    return axes.plot([], [], linestyle="none", **style)[0]


def _figure(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f} %"


def used_lines(used: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """What the choice rests on, one line for each set."""
    return [f"{name}: {plural(held['records'], 'record')}, digest {held['digest']}" for name, held in used.items()]
