"""The page of results of :mod:`experiments.rows_small`: ``rows_page.md`` filled with what the run folders hold."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from experiments.lines import Line, cell, listed, nan_last, row
from experiments.rows_small import METHODS, Plan, Result
from expunge.core.files import write_text
from expunge.core.runs import Run
from expunge.report.text import DASH, duration

FLOOR = "retrained"
#: heading, key of the number, decimals
OUTPUTS = (
    ("average gap", "average-gap", 3), ("forget accuracy", "forget.accuracy", 3), ("retain accuracy", "retain.accuracy", 3),
    ("test accuracy", "test.accuracy", 3), ("MIA-efficacy", "mia-efficacy", 3),
)  # fmt: skip
INSIDE = (
    ("looks seen", "forget.looks-seen", 2), ("CKA to retrained", "forget.cka", 2), ("CKA to target", "forget.cka-target", 2),
    ("kNN", "knn", 2), ("H-LR", "unified", 2),
)  # fmt: skip
POOLED = (
    ("KLoM forget", "klom.forget", 2), ("KLoM retain", "klom.retain", 2), ("KLoM test", "klom.test", 2), ("U-LiRA", "u-lira", 2),
)  # fmt: skip
#: what tells a model that still knows the rows from retrained ones, beside its accuracies: name, key
TELLING = (
    ("CKA to the target", "forget.cka-target"), ("kNN", "knn"), ("looks seen", "forget.looks-seen"),
    ("KLoM", "klom.forget"), ("U-LiRA", "u-lira"),
)  # fmt: skip
LEAST = {"klom.forget": 1.0, "u-lira": 0.1}  #: differences of target and retrained models that count, where there is no interval
NEAR = 3  #: methods beyond the floor's interval that the findings name
SURE = 0.95  #: accuracy of U-LiRA from which a method is told from retrained models
REASONS = {
    "goal": "goal", "budget": "budget", "converged": "budget", "schedule": "its own schedule", "utility": "utility bound",
    "edited": "one edit", "diverged": "diverged",
}  # fmt: skip
PACKAGES = ("python", "expunge", "torch", "numpy", "scipy", "scikit-learn")


def lines_of(result: Result) -> list[Line]:
    """Retrained models first, then all others by their average gap.

    The value of the retrained models for a seed is that of one of them, each time another, against the rest of them.
    """
    found: dict[str, list[dict[str, float]]] = {}
    for at, document in enumerate(result.documents.values()):
        retrained = [m for m in document.models if m.role == "retrained"]
        chosen = {FLOOR: retrained[at % len(retrained)]} | {m.label: m for m in document.models if m.role != "retrained"}
        for label, model in chosen.items():
            held = {k: float(n.value) for k, n in model.numbers.items() if n.value is not None}
            held |= {"forget.cka-target": 1.0} if model.role == "target" else {}
            held |= {"seconds": model.cost["seconds"]} if "seconds" in model.cost else {}
            found.setdefault(label, []).append(held)
    lines = []
    for label, seeds in found.items():
        shared = set.intersection(*(set(s) for s in seeds))
        lines.append(Line(label, {k: [s[k] for s in seeds] for k in sorted(shared)}, result.pooled.get(label, {})))
    return sorted(lines, key=lambda line: (line.label != FLOOR, nan_last(line.mean("average-gap"))))


def left(line: Line, floor: Line, target: Line, key: str) -> float | None:
    """How much of the way from the retrained models to the target a method has not gone, by a measure; 1: all of it.

    None where the measure tells nothing: the intervals over seeds of target and retrained models meet, the difference is below
    :data:`LEAST` where there is no interval, or a value is missing.
    """
    whole = target.mean(key) - floor.mean(key)
    least = max(target.half(key) + floor.half(key), LEAST.get(key, 0.0))
    if math.isnan(whole) or abs(whole) <= least or math.isnan(line.mean(key)):
        return None
    return (line.mean(key) - floor.mean(key)) / whole


def write_page(plan: Plan, results: Sequence[Result], path: Path) -> None:
    """Write the page as Markdown."""
    template = string.Template(Path(__file__).with_name("rows_page.md").read_text(encoding="utf-8"))
    write_text(path, template.substitute(_setting(plan, results)))


def _setting(plan: Plan, results: Sequence[Result]) -> dict[str, object]:
    first = results[0].request
    manifest = Run.open(first.place / "audit").manifest
    blocks: dict[str, Iterable[str]] = {
        "data": _data(plan, results), "findings": _findings(results), "tables": _tables(results),
        "stopped": _stopped(plan, results), "times": _times(results), "failed": _failed(results),
    }  # fmt: skip
    return {name: "\n".join(lines) for name, lines in blocks.items()} | {
        "methods": len({line.label for r in results for line in lines_of(r)} - {FLOOR, "target"}),
        "seeds": ", ".join(map(str, plan.seeds)), "count": len(plan.seeds), "retrained": plan.retrained,
        "references": plan.references, "bins": max(2, plan.references // 4), "command": _command(plan),
        "retained": plan.retained, "skipped": _skipped(plan), "cpus": manifest["machine"]["cpus"],
        "versions": ", ".join(f"{n} {manifest['versions'][n]}" for n in PACKAGES if n in manifest["versions"]),
    }  # fmt: skip


def _data(plan: Plan, results: Sequence[Result]) -> Iterator[str]:
    yield row([
        "data", "rows trained on", "unseen: to stop by", "unseen: audited", "network", "parameters", "training",
        "class to forget", "rows of it", "random rows",
    ])  # fmt: skip
    yield row(["---", *["---:"] * 3, "---", "---:", "---", "---", "---:", "---:"])
    for name in plan.sources:
        held = [r for r in results if r.request.name.startswith(f"{name}/")]
        one, source = held[0].request.problem, held[0].request.source
        assert one.build is not None
        assert one.holdout is not None
        t, sizes = source.training, {r.request.name.rpartition("/")[2]: len(r.request.chosen) for r in held}
        training = f"Adam, {t.steps} steps of {t.batch} rows, rate {t.lr:g}, {t.decay}"
        counts = [len(one.data), len(one.holdout), plan.unseen]
        yield row([
            source.title, *(f"{n:,}" for n in counts), f"`{one.build.__name__}`",
            f"{sum(p.numel() for p in one.build().parameters()):,}", training, source.gone,
            *(str(sizes.get(kind, DASH)) for kind in ("class", "random")),
        ])  # fmt: skip


def _tables(results: Sequence[Result]) -> Iterator[str]:
    for result in results:
        lines = lines_of(result)
        kind = {"class": f"the class {result.request.source.gone}", "random": "rows drawn at random"}
        asked = result.request.name.rpartition("/")[2]
        yield f"### {result.request.source.title}: {kind[asked]} ({len(result.request.chosen)} rows)"
        yield ""
        yield "Outputs, sorted by the average gap:"
        yield ""
        yield from _table(lines, (*OUTPUTS, ("seconds", "seconds", 1)))
        yield ""
        yield "Single rows and representations, in the same order:"
        yield ""
        yield from _table(lines, (*INSIDE, *POOLED))
        yield ""


def _table(lines: Sequence[Line], columns: Sequence[tuple[str, str, int]]) -> Iterator[str]:
    yield row(["model", *(heading for heading, _, _ in columns)])
    yield row(["---"] + ["---:"] * len(columns))
    for line in lines:
        yield row([_name(line.label), *(cell(line, key, places) for _, key, places in columns)])


def _name(label: str) -> str:
    return {FLOOR: "*retrained (the floor)*", "target": "*target (nothing unlearned)*"}.get(label, label)


def _findings(results: Sequence[Result]) -> Iterator[str]:
    for result in results:
        lines = {line.label: line for line in lines_of(result)}
        floor, target = lines[FLOOR], lines["target"]
        bound, gap = floor.mean("average-gap") + floor.half("average-gap"), target.mean("average-gap")
        methods = [line for line in lines.values() if line.label not in (FLOOR, "target")]
        within = [line for line in methods if line.mean("average-gap") <= bound]
        near = [line for line in methods if line not in within][:NEAR]
        moved = [line for line in methods if line.mean("klom.test") > target.mean("klom.test") + 1]
        telling = [(name, key) for name, key in TELLING if left(target, floor, target, key) is not None]
        blind = [name for name, key in TELLING if (name, key) not in telling]
        yield f"### {result.request.source.title}, {result.request.name.rpartition('/')[2]}"
        yield ""
        yield f"Average gap of the target {gap:.3f}; the floor's interval ends at {bound:.3f}. Within it: {_labels(within)}."
        yield f"Nearest beyond it: {_labels(near)}."
        if blind:
            yield f"Not told apart here are target and retrained models by: {', '.join(blind)}."
        told = [line for line in methods if line.mean("u-lira") >= SURE]
        yield f"U-LiRA tells {len(told)} of {len(methods)} methods from retrained models ({SURE} or more)."
        yield f"KLoM on unseen rows of what is kept is more than a nat above the target's: {_labels(moved)}."
        yield ""
        for line in (*within, *near):
            shares = [(name, left(line, floor, target, key)) for name, key in telling]
            kept = [f"{name} {100 * s:.0f} %" for name, s in shares if s is not None and s > 0.5]
            yield f"- `{line.label}`: {', '.join(kept) if kept else 'no measure finds more than half of the target left'}"
        yield ""


def _labels(lines: Iterable[Line]) -> str:
    return listed(line.label for line in lines)


def _stopped(plan: Plan, results: Sequence[Result]) -> Iterator[str]:
    yield row(["method", *(r.request.name for r in results)])
    yield row(["---"] * (1 + len(results)))
    for method in METHODS:
        cells = []
        for result in results:
            places = [result.request.place / method / f"seed-{s}" for s in plan.seeds]
            if any(not (p / "manifest.json").is_file() for p in places):
                cells.append("failed" if method in result.failed else DASH)
                continue
            ends = Counter(REASONS[Run.open(p).manifest["stages"]["unlearn"]["result"]["reason"]] for p in places)
            cells.append(", ".join(f"{n} {reason}" for reason, n in ends.most_common()))
        if set(cells) != {DASH}:
            yield row([method, *cells])


def _failed(results: Sequence[Result]) -> Iterator[str]:
    found = [f"- `{m}` on {r.request.name}: {why}" for r in results for m, why in r.failed.items()]
    yield from found or ["No run failed."]


def _times(results: Sequence[Result]) -> Iterator[str]:
    yield row(["request", *results[0].seconds])
    yield row(["---"] + ["---:"] * len(results[0].seconds))
    for result in results:
        yield row([result.request.name, *(duration(s) for s in result.seconds.values())])
    total = np.sum([list(r.seconds.values()) for r in results])
    yield row(["all", duration(float(total)), *[""] * (len(results[0].seconds) - 1)])


def _skipped(plan: Plan) -> str:
    """What was left out, as a sentence."""
    return f" Left out, since time was short: {listed(plan.skip)}." if plan.skip else ""


def _command(plan: Plan) -> str:
    """The command that does the same; the folders of the data are the reader's own."""
    words = ["OMP_NUM_THREADS=1 python -m experiments.rows_small"]
    words.append(" ".join(f"--{name} {name.upper()}" for name in plan.sources))
    words.append("--out runs/rows-small --page docs/results/classifiers-small.md")
    words.append(f"--rows {' '.join(str(n) for n in plan.rows.values())} --references {plan.references}")
    words.append(f"--seeds {' '.join(map(str, plan.seeds))}")
    words.append(f"--methods {' '.join(plan.methods)}")
    if plan.skip:
        words.append(f"--skip {' '.join(plan.skip)}")
    return " \\\n  ".join(words)
