"""One page per metric, and their overview."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import expunge
from docgen.text import cite, code, markdown, page, parameters, table
from expunge.audit.evaluate import evaluate_metric
from expunge.audit.metrics.registry import METRICS, Metric
from expunge.core.results import Direction

_DIRECTION = {
    Direction.FORGET_DOWN: "lower means more forgotten, down to the value of the retrained model",
    Direction.UTILITY_UP: "higher means more useful",
    Direction.UTILITY_DOWN: "lower means more useful",
    Direction.REFERENCE: "best where it equals the value of the retrained model",
    Direction.ZERO: "best at zero; either side is a trace",
}

_HOME = "expunge" if "evaluate_metric" in getattr(expunge, "__all__", ()) else evaluate_metric.__module__


def built_in() -> list[type[Metric]]:
    """The metrics that Expunge brings itself, by name."""
    return [m for name, m in METRICS.items() if METRICS.origin(name) == "expunge"]


def pages() -> dict[str, str]:
    """All pages about metrics."""
    out = {f"metrics/{m.name}.md": _page(m) for m in built_in()}
    out["metrics/index.md"] = _overview()
    return out


def _range(m: type[Metric]) -> str:
    low, high = m.range
    left = "(-inf" if low is None else f"[{low:g}"
    return f"{left}, inf)" if high is None else f"{left}, {high:g}]"


def _needs(m: type[Metric]) -> str:
    return "; ".join(n.value for n in m.needs) or "nothing more than the models"


def _overview() -> str:
    rows = [[f"[`{m.name}`]({m.name}.md)", m.title, _DIRECTION[m.direction], _range(m), _needs(m)] for m in built_in()]
    return page(
        "Metrics",
        "Every number carries a confidence interval over independent subjects, its direction and its range; an impossible value "
        "is flagged and never printed bare. Every example is scored once per model; all metrics are computed from that one pass.",
        table(["metric", "title", "on the forget set", "range", "needs"], rows),
        "See [what a verdict rests on](../concepts/verdict.md) and [where the intervals come from](../concepts/statistics.md).",
    )


def _page(m: type[Metric]) -> str:
    doc = inspect.cleandoc(m.__doc__ or "")
    return page(
        f"{m.title} (`{m.name}`)",
        code(m.formula),
        markdown(doc),
        table(
            ["", ""],
            [
                ["on the forget set", _DIRECTION[m.direction]],
                ["range", _range(m)],
                ["needs", _needs(m)],
                ["source", cite(m.paper)],
            ],
        ),
        "## Parameters",
        parameters(m),
        "## The formula on your own numbers",
        *_evaluate(m),
    )


def _evaluate(m: type[Metric]) -> Iterator[str]:
    function: Callable[..., Any] = m.evaluate
    given = ", ".join(f"{p.name}=..." for p in inspect.signature(function).parameters.values() if p.default is p.empty)
    yield code(f'from {_HOME} import evaluate_metric\n\nevaluate_metric("{m.name}", {given})', "python")
    yield code(f"{function.__name__}{signature(function)}", "python")
    yield markdown(inspect.cleandoc(function.__doc__ or ""))


def signature(function: Callable[..., Any]) -> str:
    """The signature as it is written, without the module paths of evaluated annotations."""
    held = inspect.signature(function)
    shown = [_argument(p) for p in held.parameters.values()]
    keyword = next((i for i, p in enumerate(held.parameters.values()) if p.kind is p.KEYWORD_ONLY), None)
    if keyword is not None and not any(p.kind is p.VAR_POSITIONAL for p in held.parameters.values()):
        shown.insert(keyword, "*")
    result = "" if held.return_annotation is held.empty else f" -> {_annotation(held.return_annotation)}"
    flat = f"({', '.join(shown)}){result}"
    return flat if len(flat) < 110 else "(\n    " + ",\n    ".join(shown) + f",\n){result}"


def _argument(p: inspect.Parameter) -> str:
    star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    text = star + p.name + ("" if p.annotation is p.empty else f": {_annotation(p.annotation)}")
    return text if p.default is p.empty else f"{text} = {p.default!r}"


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
