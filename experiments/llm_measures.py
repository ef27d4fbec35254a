"""What the tables of :mod:`experiments.llm_methods` are made of: relearning areas, the distance to the gold standard, lines.

The distance, declared before anything was unlearnt. Of a model with the value ``x`` of a measure, the target with ``t`` and the
mean ``g`` of the retrained models (of a retrained model: of the others)::

    d = min(1, |x - g| / |t - g|)        for what tells the target from retrained models (TELLING)
    d = min(1, |x - g| / |g|)            for model utility, in which the two are alike
    distance = sqrt(mean of d^2)

0 is the gold standard; the target has 1 in all but utility. What lies farther from it than the target, on either side, counts as
1, and so does what could not be measured: a destroyed model is no nearer than one that forgot nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.lines import Line, nan_last
from expunge.audit.document import AuditDocument, Curve, ModelEntry, Series

GOLD, TARGET = "retrained", "target"
#: measures that tell the target from retrained models, by the key of the number: their names in the tables
TELLING: Mapping[str, str] = {
    "forget.probability": "forget probability",
    "forget-quality.d": "KS distance of truth ratios",
    "privleak.min-k": "PrivLeak",
    "relearn.area": "area under the relearning curve",
}
UTILITY = "model-utility"
_ROLES = {"target": TARGET, "retrained": GOLD}


def shares(series: Series, retrained: Sequence[Series], target: Series) -> list[list[tuple[float, float]]]:
    """By rate, steps of relearning and the recovered share there, cut to [-1, 1].

    ``(m(s) - r(s)) / (r(0) - t(0))`` with mean losses ``m`` of retrained models and ``r`` of the model turned so that 1 is the
    level of the target before the attack, and 0 that of retrained models under the same attack.

    Args:
        series: of the model: mean losses on the half of the forget set that is not relearnt, rate after rate, each from step 0.
        retrained: of the models that it is compared with.
        target: of the target.
    """
    starts = [i for i, x in enumerate(series.x) if x == 0]
    ends = [*starts[1:], len(series.x)]
    found = []
    for first, last in zip(starts, ends, strict=True):
        whole = float(np.mean([r.y[first] for r in retrained])) - target.y[first]
        at = []
        for i in range(first, last):
            level = float(np.mean([r.y[i] for r in retrained]))
            at.append((series.x[i], min(1.0, max(-1.0, (level - series.y[i]) / whole)) if whole > 0 else math.nan))
        found.append(at)
    return found


def area(curves: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Mean over rates of the area under the recovered share by steps, as a share of the area of 1 all along."""
    found = []
    for points in curves:
        x, y = np.array(points).T
        found.append(float(np.trapezoid(y, x) / (x[-1] - x[0])))
    return float(np.mean(found)) if found else math.nan


def relearned(curve: Curve | None, label: str, retrained: Sequence[str], target: str) -> dict[str, float]:
    """``relearn.area``, ``relearn.start`` (the share before the attack) and ``relearn.gain`` (their difference) of a model.

    Nothing where a curve is missing: losses that are not finite have none.
    """
    lines = {s.label: s for s in curve.series} if curve is not None else {}
    others = [lines[name] for name in retrained if name != label and name in lines]
    if label not in lines or target not in lines or not others:
        return {}
    found = shares(lines[label], others, lines[target])
    whole, start = area(found), float(np.mean([points[0][1] for points in found]))
    return {"relearn.area": whole, "relearn.start": start, "relearn.gain": whole - start}


def distance(values: Mapping[str, float], gold: Sequence[Mapping[str, float]], target: Mapping[str, float]) -> float:
    """How far a model is from retrained ones, in [0, 1]; see the top of this module.

    Args:
        values: of the model, by the keys of :data:`TELLING` and :data:`UTILITY`; what is missing or no number counts as 1.
        gold: of the retrained models that it is compared with.
        target: of the target.
    """
    found = []
    for key in (*TELLING, UTILITY):
        level = float(np.mean([g.get(key, math.nan) for g in gold]))
        whole = abs(level) if key == UTILITY else abs(target.get(key, math.nan) - level)
        gap = abs(values.get(key, math.nan) - level)
        found.append(1.0 if math.isnan(gap) else min(1.0, gap / whole) if whole > 0 else math.nan)
    return float(np.sqrt(np.mean(np.square(found))))


@dataclass(frozen=True)
class Measured:
    """One audited model.

    Attributes:
        entry: what the audit says of it.
        values: its numbers by key, and what this module computes of them.
    """

    entry: ModelEntry
    values: Mapping[str, float]


def measured(document: AuditDocument) -> list[Measured]:
    """The models of an audit with their relearning areas and distances, in its order."""
    curve = next((c for c in document.curves if c.name == "relearn"), None)
    gold = [m.label for m in document.models if m.role == "retrained"]
    target = next(m.label for m in document.models if m.role == "target")
    numbers = {m.label: _numbers(m) | relearned(curve, m.label, gold, target) for m in document.models}
    found = []
    for model in document.models:
        others = [numbers[name] for name in gold if name != model.label]
        values = numbers[model.label] | {"distance": distance(numbers[model.label], others, numbers[target])}
        found.append(Measured(model, values))
    return found


def _numbers(model: ModelEntry) -> dict[str, float]:
    held = {key: float(n.value) for key, n in model.numbers.items() if n.value is not None}
    cost = {"seconds": model.cost["seconds"], "memory": model.cost["peak_bytes"] / 2**20} if model.cost else {}
    return held | cost


def lines_of(documents: Mapping[str, AuditDocument]) -> list[Line]:
    """Retrained models, target, then the methods by their mean distance; the former two from the first audit, for all are alike.

    A value that one seed has and another has not is NaN for the latter.

    Args:
        documents: audits by method.
    """
    found: dict[str, list[Mapping[str, float]]] = {}
    for at, (method, document) in enumerate(documents.items()):
        for model in measured(document):
            if model.entry.role == "unlearned" or at == 0:
                found.setdefault(_ROLES.get(model.entry.role, method), []).append(model.values)
    lines = []
    for label, seeds in found.items():
        keys = sorted({key for s in seeds for key in s})
        lines.append(Line(label, {k: [s.get(k, math.nan) for s in seeds] for k in keys}, {}))
    order = {GOLD: 0, TARGET: 1}
    return sorted(lines, key=lambda line: (order.get(line.label, 2), nan_last(float(np.mean(line.values["distance"])))))


def detectable(n: int, *, power: float = 0.8, draws: int = 1000, seed: int = 0) -> float:
    """The smallest shift that a KS test at 5 % of two samples of ``n`` normal values finds with ``power``.

    In standard deviations, by simulation, to a twentieth.
    """
    from scipy.stats import kstwobign

    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(draws, n)), rng.normal(size=(draws, n))
    for step in range(1, 61):
        order = np.argsort(np.concatenate([first, second + step / 20], axis=1), axis=1)
        largest = np.abs(np.cumsum(np.where(order < n, 1 / n, -1 / n), axis=1)).max(axis=1)
        if np.mean(kstwobign.sf(largest * math.sqrt(n / 2)) < 0.05) >= power:
            return step / 20
    return math.inf
