"""Which drawings a document calls for, each with its caption and its words for those who cannot see it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from expunge.audit.document import AuditDocument, Curve, ModelEntry
from expunge.core.results import Direction, Number
from expunge.core.statistics import prediction_band
from expunge.report import figures
from expunge.report.compare import Comparison, Row
from expunge.report.glossary import term
from expunge.report.headline import ACTIVE, family, pick
from expunge.report.text import clean, plural
from expunge.report.view import ordered

_LOSS_UNITS = {"language": " per token, nats", "classification": ", nats"}  #: by modality; other losses have none of their own
PANELS = 12  #: models in one figure of distributions: the gold standard once, further retrained seeds are left out first


@dataclass(frozen=True)
class Drawing:
    """An SVG with what stands under it."""

    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Drawings:
    """The drawings of one document, by section of the page."""

    trade_off: Drawing | None
    distributions: tuple[Drawing, ...]
    roc: Drawing | None
    roc_low: Drawing | None
    attacks: tuple[Drawing, ...]
    other: tuple[Drawing, ...]


def draw(document: AuditDocument, prefix: str) -> Drawings:
    """All drawings of ``document``.

    Args:
        document: the audit.
        prefix: unique among the documents of one page; starts every id within the drawings.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    looks = figures.looks(document.models)
    roc = [c for c in document.curves if family(c.name) == "roc"]
    attacks = [c for c in document.curves if family(c.name) in ACTIVE]
    other = [c for c in document.curves if c not in roc and c not in attacks]
    return Drawings(
        trade_off=_trade_off(document, f"{prefix}-tradeoff"),
        distributions=tuple(_distributions(document, f"{prefix}-dist")),
        roc=_roc(roc, looks, f"{prefix}-roc", logarithmic=False),
        roc_low=_roc(roc, looks, f"{prefix}-roclow", logarithmic=True),
        attacks=tuple(_line(c, looks, f"{prefix}-attack{i}") for i, c in enumerate(attacks)),
        other=tuple(_line(c, looks, f"{prefix}-curve{i}") for i, c in enumerate(other)),
    )


def comparison_plot(comparison: Comparison, document: AuditDocument, name: str) -> Drawing | None:
    """The trade-off plot of several audits: one mark per method, with its interval over seeds where there are seeds.

    Args:
        comparison: what :func:`expunge.report.compare.compare` gives.
        document: one of the compared audits, for the titles of the axes.
        name: unique prefix of the ids within the drawing.

    Returns:
        None if no method has both numbers.
    """
    points = []
    rows = [(comparison.target, figures.TARGET_LOOK), (comparison.gold, figures.GOLD_LOOK)]
    rows += [(row, figures.unlearned_look(i, hollow=row.guard)) for i, row in enumerate(comparison.rows)]
    for row, look in rows:
        if row is not None and row.forget is not None and row.utility is not None:
            points.append(figures.Point(row.label + _seeds(row), look, row.forget, row.utility))
    if not points:
        return None
    gold = comparison.gold
    box = None
    if gold is not None and gold.forget is not None and gold.utility is not None:
        box = figures.Box(_union([gold.forget]), _union([gold.utility]))
    x_label, y_label = _axis_labels(document, comparison.forget_key, comparison.utility_key, points[0].y.direction)
    alt = f"{y_label} against {x_label} of {plural(len(comparison.rows), 'method')}; the numbers are in the table."
    caption = "Each mark is one method; bars are intervals over seeds where there are several, else over examples."
    if any(row.guard for row in comparison.rows):
        caption += " Hollow: guards, which change no weight."
    svg = figures.trade_off(points, box, x_label=x_label, y_label=y_label, name=name, alt=clean(alt))
    return Drawing("Trade-off", svg, caption + (" Shaded: the interval of the retrained models." if box else ""))


def _axis_labels(document: AuditDocument, forget: str, utility: str, direction: Direction) -> tuple[str, str]:
    up = "lower" if direction is Direction.UTILITY_DOWN else "higher"
    x_label = f"{term(document, forget).title} on the {family(forget)} set (best: as the retrained model)"
    return x_label, f"{term(document, utility).title} ({up} is better)"


def _seeds(row: Row) -> str:
    return f" ({row.seeds} seeds)" if row.seeds > 1 else ""


def _trade_off(document: AuditDocument, name: str) -> Drawing | None:
    models = ordered(document.models)
    forget, utility = pick(models, "forget"), pick(models, "utility")
    if forget is None or utility is None:
        return None
    looks = figures.looks(document.models)
    shown = [m for m in models if _has(m, forget) and _has(m, utility)]
    if not shown:
        return None
    points = [figures.Point(m.label, looks[m.label], m.numbers[forget], m.numbers[utility]) for m in shown]
    gold = [m for m in shown if m.role == "retrained"]
    box, told = _gold([m.numbers[forget] for m in gold], [m.numbers[utility] for m in gold])
    x_label, y_label = _axis_labels(document, forget, utility, points[0].y.direction)
    alt = f"{clean(y_label)} against {clean(x_label)}: " + "; ".join(
        f"{m.label} at {m.numbers[forget].text()} and {m.numbers[utility].text()}" for m in shown
    )
    caption = (
        f"The best place is the gold standard, not the corner. Bars: {points[0].x.level:.0%} intervals over examples. {told}"
    )
    return Drawing(
        "Forgetting against utility",
        figures.trade_off(points, box, x_label=x_label, y_label=y_label, name=name, alt=clean(alt)),
        caption,
    )


def _has(model: ModelEntry, key: str) -> bool:
    return key in model.numbers and model.numbers[key].value is not None


def _gold(forget: Sequence[Number], utility: Sequence[Number]) -> tuple[figures.Box | None, str]:
    """The region of the gold standard and the sentence that says how it was found.

    With three or more retrained models it is the band in which one more would fall, mean ± t·sqrt(1 + 1/k)·s; with fewer that
    band says next to nothing (its factor is 16 at two), so the union of their intervals over examples is drawn instead.
    """
    if not forget:
        return None, "No retrained model was audited: there is no gold standard to mark."
    if len(forget) >= 3:
        box = figures.Box(_prediction(forget), _prediction(utility))
        return box, f"Shaded: where one more retrained model would fall (95% prediction band from {len(forget)})."
    box = figures.Box(_union(forget), _union(utility))
    models = plural(len(forget), "retrained model")
    return box, f"Shaded: the example intervals of {models}; too few to show how retraining itself varies."


def _prediction(numbers: Sequence[Number]) -> tuple[float, float]:
    band = prediction_band([n.value for n in numbers if n.value is not None])
    return band.value if band.low is None else band.low, band.value if band.high is None else band.high


def _union(numbers: Sequence[Number]) -> tuple[float, float]:
    ends = [v for n in numbers for v in (n.value, n.low, n.high) if v is not None]
    return min(ends), max(ends)


def _distributions(document: AuditDocument, prefix: str) -> Iterator[Drawing]:
    order = {m.label: i for i, m in enumerate(ordered(document.models))}
    roles = {m.label: m.role for m in document.models}
    for i, quantity in enumerate(dict.fromkeys(d.quantity for d in document.distributions)):
        parts = sorted(
            (d for d in document.distributions if d.quantity == quantity), key=lambda d: order.get(d.model, len(order))
        )
        spare = [d for d in parts if roles.get(d.model) == "retrained"][1:] if len(parts) > PANELS else []
        shown = [d for d in parts if d not in spare][:PANELS]
        left_out = [d.model for d in parts if d not in shown]
        name = term(document, quantity).title
        unit = _LOSS_UNITS.get(document.modality, "") if quantity == "loss" else ""
        titles = {d.model: d.model for d in shown}
        groups = ", ".join(dict.fromkeys(g for d in shown for g in d.groups))
        alt = f"Histograms of {name.lower()} per example for the sets {groups}, one panel for each of: {', '.join(titles)}."
        caption = (
            "Share of examples per bin. Of a model that never saw the forget set, the forget and holdout lines lie on each "
            "other; a forget line to their left is memory, one far to the right is over-unlearning."
            if quantity == "loss"
            else "Share of examples per bin."
        )
        if left_out:
            caption += f" Not drawn for lack of room: {', '.join(left_out)}."
        svg = figures.distributions(shown, titles, name + unit, f"{prefix}{i}", clean(alt))
        yield Drawing(f"{name} of single examples", svg, caption)


def _roc(curves: Sequence[Curve], looks: dict[str, figures.Look], name: str, *, logarithmic: bool) -> Drawing | None:
    if not curves:
        return None
    scale = "logarithmic axes, for low false positive rates" if logarithmic else "linear axes"
    models = dict.fromkeys(s.label for c in curves for s in c.series)
    alt = f"ROC of {', '.join(c.title for c in curves)}; {scale}; models: {', '.join(models)}."
    caption = (
        "Low rates decide: an attacker who must rarely be wrong reads the left end. Steps there rest on few examples."
        if logarithmic
        else "A model from which nothing leaks follows the dotted diagonal; compare with the retrained model, not with the "
        "diagonal alone."
    )
    return Drawing(
        "ROC of the membership attacks", figures.roc(curves, looks, name, clean(alt), logarithmic=logarithmic), caption
    )


def _line(curve: Curve, looks: dict[str, figures.Look], name: str) -> Drawing:
    alt = f"{curve.title}: {curve.y_label} against {curve.x_label} for {', '.join(s.label for s in curve.series)}."
    banded = any(s.low is not None for s in curve.series)
    caption = "Shaded: the band of each line; the protocol says over what." if banded else ""
    if family(curve.name) == "relearn":
        caption = (
            "What was only hidden comes back faster than in the retrained model, which learns the same examples for the first "
            "time. " + caption
        )
    return Drawing(curve.title, figures.lines(curve, looks, name, clean(alt)), caption.strip())
