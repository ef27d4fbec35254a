"""The drawings of a report: trade-off, loss distributions, ROC, curves with bands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from expunge.audit.document import Curve, Distribution, ModelEntry, Series
from expunge.core.results import Number
from expunge.report.svg import DPI, INK, QUIET, at, canvas, drawing, place, render
from expunge.report.text import clean, shorten

WIDTH = 1056
_LEGEND = 268  #: pixels kept for a legend on the right
_GOLD, _GOLD_MARKER = "#0063a6", "*"
_COLOURS = ("#c8501e", "#00806a", "#9a4f96", "#b7791f", "#3f9cc7", "#7a5b3a", "#c2417c", "#5f7f1d")
_MARKERS = ("o", "s", "^", "v", "P", "X", "h", "<", ">")
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)), (0, (3, 1.2)))
_SETS = {"forget": ("#c8501e", "solid"), "holdout": ("#0063a6", (0, (5, 2))), "retain": ("#6b7280", (0, (1.2, 1.6)))}
_FLOOR = 1e-3  #: smallest loss drawn on a logarithmic axis


@dataclass(frozen=True)
class Look:
    """How one model is drawn, the same in every figure."""

    colour: str
    marker: str
    dash: Any = "solid"
    order: int = 3
    hollow: bool = False  #: guards stand before the target: nothing was changed


@dataclass(frozen=True)
class Point:
    """One mark of the trade-off plot."""

    label: str
    look: Look
    x: Number
    y: Number


@dataclass(frozen=True)
class Box:
    """The region of the gold standard: (low, high) on either axis."""

    x: tuple[float, float]
    y: tuple[float, float]


def looks(models: Sequence[ModelEntry]) -> dict[str, Look]:
    """A look per model label: target dark, retrained blue, each unlearned model its own colour and mark."""
    out: dict[str, Look] = {}
    counts = dict.fromkeys(("target", "retrained", "base", "unlearned"), 0)
    for model in models:
        n = counts[model.role]
        counts[model.role] += 1
        if model.role == "target":
            out[model.label] = Look(INK, "D", _DASHES[n % len(_DASHES)], 4)
        elif model.role == "retrained":
            out[model.label] = Look(_GOLD, _GOLD_MARKER, _DASHES[(n + 1) % len(_DASHES)], 5)
        elif model.role == "base":
            out[model.label] = Look("#8a93a0", "d", _DASHES[2], 2)
        else:
            out[model.label] = unlearned_look(n, hollow=model.guarded)
    return out


def unlearned_look(n: int, *, hollow: bool = False) -> Look:
    """The look of the ``n``-th unlearned model: 72 differ in colour or mark. The mark of a guarded one is hollow."""
    dash = _DASHES[n // len(_COLOURS) % len(_DASHES)]
    return Look(_COLOURS[n % len(_COLOURS)], _MARKERS[n % len(_MARKERS)], dash, hollow=hollow)


GOLD_LOOK = Look(_GOLD, _GOLD_MARKER, _DASHES[1], 5)
TARGET_LOOK = Look(INK, "D", "solid", 4)


def trade_off(points: Sequence[Point], gold: Box | None, *, x_label: str, y_label: str, name: str, alt: str) -> str:
    """Forgetting against utility: a mark with both intervals per model, the gold standard's region shaded.

    Where models crowd around the gold standard beside others far away, a second panel shows its surroundings.
    """
    with drawing():
        near = _surroundings(points, gold)
        height = max(400, 96 + 23 * (len(points) + 1))
        figure = canvas(WIDTH, height)
        width = WIDTH - 64 - _LEGEND - 24
        axes = place(figure, 64, 16, width if near is None else 0.55 * width, height - 16 - 56)
        handles = [_mark(axes, point) for point in points]
        if gold is not None:
            handles.append(_region(axes, points, gold))
        axes.set_ylabel(clean(y_label))
        axes.margins(0.07)
        _from_zero(axes, points)
        if near is not None:
            _close_up(figure, axes, points, near, 0.45 * width - 44)
        figure.supxlabel(clean(x_label), x=(64 + width / 2) / WIDTH, y=14 / height, size=12.5, va="bottom")
        _legend(figure, handles, [p.label for p in points] + ["gold standard: retrained"] * (gold is not None))
        return render(figure, name, alt)


def distributions(parts: Sequence[Distribution], titles: Mapping[str, str], x_label: str, name: str, alt: str) -> str:
    """One panel per model: the per-example values of each set, on common axes."""
    with drawing():
        columns = min(len(parts), 4 if len(parts) > 3 else 3)
        rows = math.ceil(len(parts) / columns)
        gap, left, top, panel = 22, 12, 58, 150
        width = (WIDTH - 2 * left - gap * (columns - 1)) / columns
        if len(parts) == 1:
            width = 480.0
        figure = canvas(WIDTH, top + rows * (panel + 56) - 2)
        edges, logarithmic = _bins(parts)
        axes: list[Any] = []
        handles: dict[str, Any] = {}
        tallest = 0.0
        for i, part in enumerate(parts):
            row, column = divmod(i, columns)
            ax = place(figure, left + column * (width + gap), top + row * (panel + 56), width, panel)
            tallest = max(tallest, _histograms(ax, part, edges, logarithmic, handles))
            ax.set_title(shorten(clean(titles[part.model]), int(width / 8.6)))
            if i + columns >= len(parts):
                ax.set_xlabel(x_label + (", log scale" if logarithmic else ""))
            axes.append(ax)
        for ax in axes:
            _density_axis(ax, edges, logarithmic, tallest)
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="upper left",
            bbox_to_anchor=at(figure, left, 4),
            ncols=len(handles),
            columnspacing=2.2,
        )
        return render(figure, name, alt)


def roc(curves: Sequence[Curve], looks_of: Mapping[str, Look], name: str, alt: str, *, logarithmic: bool = False) -> str:
    """One square panel per attack, a line per model, the diagonal of guessing; both axes logarithmic for low rates."""
    with drawing():
        labels = list(dict.fromkeys(s.label for c in curves for s in c.series))
        titles = _without_common_start([c.title for c in curves])
        below = len(curves) == 4 or len(curves) > 6
        columns = 4 if below else min(len(curves), 3)
        side, gap, left, top = (208, 40, 56, 28) if below else (214, 40, 56, 28)
        rows = math.ceil(len(curves) / columns)
        panels = top + rows * (side + 72) - 14
        legend_rows = math.ceil((len(labels) + 1) / 4)
        figure = canvas(WIDTH, panels + 16 + 23 * legend_rows if below else max(panels, 40 + 23 * (len(labels) + 1)))
        drawn: dict[str, Any] = {}
        for i, curve in enumerate(curves):
            row, column = divmod(i, columns)
            ax = place(figure, left + column * (side + gap), top + row * (side + 72), side, side)
            _roc_panel(ax, curve, looks_of, drawn, logarithmic)
            ax.set_title(shorten(clean(titles[i]), 27))
            ax.set_xlabel(clean(curve.x_label))
            if column == 0:
                ax.set_ylabel(clean(curve.y_label))
        if below:
            _legend(figure, list(drawn.values()), list(drawn), left=left, top=panels + 2, columns=4)
        else:
            _legend(figure, list(drawn.values()), list(drawn), left=left + columns * (side + gap) - 6)
        return render(figure, name, alt)


def lines(curve: Curve, looks_of: Mapping[str, Look], name: str, alt: str) -> str:
    """A family of lines with their bands."""
    with drawing():
        height = max(380, 96 + 23 * len(curve.series))
        figure = canvas(WIDTH, height)
        axes = place(figure, 64, 16, WIDTH - 64 - _LEGEND - 24, height - 16 - 56)
        handles = [_line(axes, series, looks_of.get(series.label, unlearned_look(i))) for i, series in enumerate(curve.series)]
        axes.set_xlabel(clean(curve.x_label))
        axes.set_ylabel(clean(curve.y_label))
        axes.margins(x=0.02, y=0.06)
        ends = _positive_span(curve.series)
        if ends is not None:
            axes.set_ylabel(clean(curve.y_label) + ", log scale")
            axes.set_ylim(0.8 * ends[0], 1.25 * ends[1])
            _log_axis(axes, "y", ends[0], ends[1])
        _legend(figure, handles, [s.label for s in curve.series])
        return render(figure, name, alt)


def _surroundings(points: Sequence[Point], gold: Box | None) -> Box | None:
    """The gold standard's region widened to thrice its size, if it holds other models too and is a small part of the plot."""
    if gold is None:
        return None
    spans, shares = [], []
    for (low, high), numbers in ((gold.x, [p.x for p in points]), (gold.y, [p.y for p in points])):
        values = [n.value for n in numbers if n.value is not None]
        whole = max(values) - min(values)
        middle, half = (low + high) / 2, max(1.5 * (high - low), 0.02 * whole)
        floor = 0.0 if all(n.range[0] == 0 for n in numbers) else -math.inf
        spans.append((max(floor, middle - half), middle + half))
        shares.append(min(1.0, 2 * half / whole) if whole else 1.0)
    box = Box(spans[0], spans[1])
    inside = [p for p in points if _within(p.x, box.x) and _within(p.y, box.y)]
    judged = any(p.look.marker != _GOLD_MARKER for p in inside)
    return box if judged and len(inside) < len(points) and shares[0] * shares[1] < 0.3 else None


def _within(number: Number, span: tuple[float, float]) -> bool:
    return number.value is not None and span[0] <= number.value <= span[1]


def _close_up(figure: Any, axes: Any, points: Sequence[Point], near: Box, width: float) -> None:
    """The panel beside ``axes`` that shows ``near``, and its frame within ``axes``."""
    from matplotlib.patches import Rectangle

    axes.set_xlim(right=max(axes.get_xlim()[1], near.x[1]))
    axes.set_ylim(top=max(axes.get_ylim()[1], near.y[1]))
    frame: dict[str, Any] = {"fill": False, "edgecolor": QUIET, "linewidth": 1, "linestyle": (0, (3, 2)), "zorder": 2}
    axes.add_patch(Rectangle((near.x[0], near.y[0]), near.x[1] - near.x[0], near.y[1] - near.y[0], **frame))
    full = figure.get_size_inches() * DPI
    box = axes.get_position()
    inset = place(figure, box.x1 * full[0] + 60, 40, width - 16, box.height * full[1] - 24)
    gold = [p for p in axes.patches if p.get_fill()]
    for patch in gold:
        inset.add_patch(
            Rectangle(patch.get_xy(), patch.get_width(), patch.get_height(), facecolor=_GOLD, alpha=0.13, edgecolor=_GOLD)
        )
    for point in points:
        if _within(point.x, near.x) and _within(point.y, near.y):
            _mark(inset, point)
    inset.set_xlim(*near.x)
    inset.set_ylim(*near.y)
    inset.locator_params(nbins=5)
    inset.set_title("close-up around the gold standard", fontweight="normal", color=QUIET)
    for spine in inset.spines.values():
        spine.set(visible=True, linestyle=(0, (3, 2)), color=QUIET)


def _from_zero(axes: Any, points: Sequence[Point]) -> None:
    """Let an axis whose values cannot be negative start at zero, so that small differences look small."""
    for which, numbers in (("x", [p.x for p in points]), ("y", [p.y for p in points])):
        if all(n.range[0] == 0 for n in numbers) and any(n.value for n in numbers):
            high = 1.06 * max(v for n in numbers for v in (n.value, n.high) if v is not None)
            getattr(axes, f"set_{which}lim")(-0.03 * high, high)


def _without_common_start(titles: Sequence[str]) -> list[str]:
    """The titles without the words that all of them begin with."""
    words = [title.split() for title in titles]
    common = 0
    while all(len(w) > common + 1 for w in words) and len(words) > 1 and len({w[common] for w in words}) == 1:
        common += 1
    return [" ".join(w[common:]) for w in words]


def _mark(axes: Any, point: Point) -> Any:
    look, errors = point.look, []
    for number in (point.x, point.y):
        value = number.value or 0.0
        ends = (value if number.low is None else number.low, value if number.high is None else number.high)
        errors.append([[max(0.0, value - ends[0])], [max(0.0, ends[1] - value)]])
    size = 13 if look.marker == _GOLD_MARKER else 8
    edge = {"markerfacecolor": "white", "markeredgecolor": look.colour, "markeredgewidth": 1.6}
    filled = {"markeredgecolor": "white", "markeredgewidth": 0.8}
    style = {"color": look.colour, "marker": look.marker, "markersize": size, **(edge if look.hollow else filled)}
    axes.errorbar(
        [point.x.value],
        [point.y.value],
        xerr=errors[0],
        yerr=errors[1],
        elinewidth=1.1,
        alpha=0.95,
        zorder=look.order,
        linestyle="none",
        **style,
    )
    (handle,) = axes.plot([], [], linestyle="none", **style)
    return handle


def _region(axes: Any, points: Sequence[Point], gold: Box) -> Any:
    """The gold standard's region, cut to where there are points: a wide band must not flatten the picture."""
    from matplotlib.patches import Rectangle

    spans = []
    for low, high, values in ((*gold.x, [p.x for p in points]), (*gold.y, [p.y for p in points])):
        ends = [v for n in values for v in (n.value, n.low, n.high) if v is not None]
        reach = 0.12 * max(max(ends) - min(ends), 1e-6)
        spans.append((max(low, min(ends) - reach), min(high, max(ends) + reach)))
    (left, right), (bottom, top) = spans
    patch = Rectangle(
        (left, bottom), right - left, top - bottom, facecolor=_GOLD, alpha=0.13, edgecolor=_GOLD, linewidth=1, zorder=1
    )
    return axes.add_patch(patch)


def _legend(
    figure: Any,
    handles: Sequence[Any],
    labels: Sequence[str],
    *,
    left: float = WIDTH - _LEGEND,
    top: float = 18,
    columns: int = 1,
) -> None:
    room = max(12, int(((WIDTH - left) / columns - 40) / 7.6))
    names = ["\u200a" + shorten(clean(label), room) for label in labels]  # a leading underscore would hide an entry
    anchor = at(figure, left, top)
    figure.legend(
        list(handles), names, loc="upper left", bbox_to_anchor=anchor, labelspacing=0.55, ncols=columns, columnspacing=1.6
    )


def _bins(parts: Sequence[Distribution]) -> tuple[np.ndarray, bool]:
    """Common bin edges of all panels; logarithmic where the values span orders of magnitude."""
    values = np.asarray([v for p in parts for g in p.groups.values() for v in g if math.isfinite(v)], dtype=float)
    if not len(values):
        return np.linspace(0.0, 1.0, 31), False
    low, high = float(values.min()), float(values.max())
    middle = float(np.quantile(values, 0.25))
    if low >= 0 and high > 30 * max(middle, _FLOOR):
        start = math.log10(max(low, _FLOOR))
        return np.logspace(start, math.log10(high) + 1e-9, 41), True
    span = max(high - low, 1e-6)
    return np.linspace(low - 0.01 * span, high + 0.01 * span, 41), False


def _histograms(ax: Any, part: Distribution, edges: np.ndarray, logarithmic: bool, handles: dict[str, Any]) -> float:
    """Draw the groups of one panel as shares per bin; returns the largest share."""
    tallest = 0.0
    for i, (group, raw) in enumerate(part.groups.items()):
        values = np.asarray([v for v in raw if math.isfinite(v)], dtype=float)
        if not len(values):
            continue
        if logarithmic:
            values = np.maximum(values, edges[0])
        shares = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)[0] / len(values)
        colour, dash = _SETS.get(group, (_COLOURS[(i + 1) % len(_COLOURS)], _DASHES[i % len(_DASHES)]))
        ax.stairs(shares, edges, fill=True, color=colour, alpha=0.16, linewidth=0)
        handle = ax.stairs(shares, edges, color=colour, linestyle=dash, linewidth=1.5)
        handles.setdefault("\u200a" + clean(group), handle)
        tallest = max(tallest, float(shares.max()))
    return tallest


def _density_axis(ax: Any, edges: np.ndarray, logarithmic: bool, tallest: float) -> None:
    if logarithmic:
        _log_axis(ax, "x", float(edges[0]), float(edges[-1]))
    ax.set_xlim(edges[0], edges[-1])
    ax.set_ylim(0, 1.06 * tallest if tallest else 1)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.grid(False, axis="y")


def _log_axis(ax: Any, which: str, low: float, high: float) -> None:
    """Powers of ten in plain digits, never more than six of them; thrice the powers too where there are fewer than three."""
    from matplotlib.ticker import NullFormatter, NullLocator

    getattr(ax, f"set_{which}scale")("log")
    axis = getattr(ax, f"{which}axis")
    powers = list(range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1))
    powers = powers[:: max(1, math.ceil(len(powers) / 6))]
    ticks = [10.0**p for p in powers]
    if len(powers) < 3:
        ticks = sorted(t for p in range(math.floor(math.log10(low)), math.ceil(math.log10(high))) for t in (10.0**p, 3 * 10.0**p))
        ticks = [t for t in ticks if low <= t <= high] + [10.0**p for p in powers if 10.0**p == high]
    axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _roc_panel(ax: Any, curve: Curve, looks_of: Mapping[str, Look], lines: dict[str, Any], logarithmic: bool) -> None:
    smallest = min((x for s in curve.series for x in s.x if x > 0), default=1e-2)
    floor = min(max(smallest, 1e-4), 0.1)
    grid = np.geomspace(floor, 1, 60) if logarithmic else np.array([0.0, 1.0])
    (diagonal,) = ax.plot(grid, grid, color=QUIET, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    for i, series in enumerate(curve.series):
        look = looks_of.get(series.label, unlearned_look(i))
        x, y = np.asarray(series.x), np.asarray(series.y)
        if logarithmic:
            x, y = np.maximum(x, floor), np.maximum(y, floor)
        (line,) = ax.plot(x, y, color=look.colour, linestyle=look.dash, linewidth=1.5, zorder=look.order)
        lines.setdefault(series.label, line)
    lines.setdefault("guessing", diagonal)
    if logarithmic:
        _log_axis(ax, "x", floor, 1.0)
        _log_axis(ax, "y", floor, 1.0)
        ax.set_xlim(floor, 1.0)
        ax.set_ylim(floor, 1.15)
    else:
        ticks = [0, 0.25, 0.5, 0.75, 1]
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
        ax.set_xlim(-0.01, 1.01)
        ax.set_ylim(-0.01, 1.02)


def _positive_span(series: Sequence[Series]) -> tuple[float, float] | None:
    """Smallest and largest value if one line would flatten the others on a linear axis and all are positive, else None."""
    values = sorted(v for s in series for v in s.y)
    if not values or values[0] <= 0 or values[-1] < 30 * values[0] or values[-1] < 6 * values[len(values) // 2]:
        return None
    return values[0], values[-1]


def _line(axes: Any, series: Series, look: Look) -> Any:
    if series.low is not None and series.high is not None:
        axes.fill_between(series.x, series.low, series.high, color=look.colour, alpha=0.12, linewidth=0, zorder=1)
    (line,) = axes.plot(
        series.x,
        series.y,
        color=look.colour,
        linestyle=look.dash,
        marker=look.marker,
        markersize=6 if look.marker != _GOLD_MARKER else 9,
        markeredgecolor="white",
        markeredgewidth=0.6,
        zorder=look.order,
    )
    return line
