"""Several audits side by side: how far each method ended from the retrained gold standard.

The distance of a model in the plane of one forget number f and one utility number u is

    d = sqrt(F^2 + U^2),   F = |f - f*| / |f_target - f*|,   U = max(0, loss of utility against u*) / |u*|

where f*, u* are the means over the retrained models and f_target is the mean over the target models. F is 0 at the retrained
model and 1 where nothing was forgotten; it grows on the far side too, since over-unlearning is no success. U is the share of
the retrained model's utility that is lost; utility above it is not held against a model. The distance is our own
summary for sorting, not a published metric, and no verdict rests on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from expunge.audit.document import AuditDocument, ModelEntry
from expunge.core.errors import InputError
from expunge.core.files import digest_json
from expunge.core.results import Direction, Number, Verdict
from expunge.core.statistics import seed_interval
from expunge.report.headline import checked_key

DEFINITION = (
    "Distance = √(F² + U²). F = |f \u2212 f*| / |f_target \u2212 f*|: 0 as the retrained models, 1 as the target; "
    "over-unlearning counts too. U = share of the retrained models' utility that is lost; a gain counts as 0. "
    "f*, u*: means over the retrained models."
)
_TINY = 1e-9


@dataclass(frozen=True)
class Row:
    """One method (all its seeds) in the trade-off table; numbers of several seeds carry a t-interval over seeds."""

    label: str
    models: tuple[str, ...]  #: labels of the models behind the row
    seeds: int
    verdicts: tuple[Verdict, ...]  #: of the judged ones, one each
    forget: Number | None
    utility: Number | None
    distance: Number | None
    pareto: bool = False  #: no other row is at least as good in both F and utility and better in one
    guard: bool = False  #: guards before the target's weights, which they do not change


@dataclass(frozen=True)
class Comparison:
    """The trade-off of all unlearned models of some documents, nearest to the gold standard first."""

    forget_key: str
    utility_key: str
    rows: tuple[Row, ...]
    target: Row | None
    gold: Row | None
    notes: tuple[str, ...]
    definition: str = DEFINITION


def compare(documents: Sequence[AuditDocument], *, forget: str | None = None, utility: str | None = None) -> Comparison:
    """The trade-off table of ``documents``.

    Args:
        documents: one or more audits of the same data under the same signature.
        forget: key of the number on the forget axis; None takes the first usual one that most models have.
        utility: key of the number on the utility axis; None likewise.

    Raises:
        InputError: the audits cannot be compared, or no model has a number for one of the axes.
    """
    check_comparable(documents)
    keys = []
    for kind, given in (("forget", forget), ("utility", utility)):
        key = checked_key(documents, given, kind)  # type: ignore[arg-type]
        if key is None:
            raise InputError(f"No model of these audits has a {kind} number.", "Audit with a metric of that kind switched on.")
        keys.append(key)
    axes = _Axes(keys[0], keys[1])
    models = distinct(documents)
    target = _reference([m for m in models if m.role == "target"], "target", axes)
    gold = _reference([m for m in models if m.role == "retrained"], "retrained", axes)
    groups = _by_method([m for m in models if m.role == "unlearned"])
    rows = [_row(label, members, axes, axes.scale(target, gold)) for label, members in groups]
    rows = sorted(_marked(rows, axes, gold), key=_order)
    return Comparison(axes.forget, axes.utility, tuple(rows), target, gold, tuple(_notes(documents, rows, target, gold)))


def check_comparable(documents: Sequence[AuditDocument]) -> None:
    """Check that numbers of ``documents`` mean the same thing.

    Raises:
        InputError: there are none, or they measured other data or under another signature (precision, kernels, versions).
    """
    if not documents:
        raise InputError("There is no audit to compare.", "Give at least one audited run.")
    first = documents[0]
    for other in documents[1:]:
        if other.modality != first.modality:
            raise InputError(
                f"{first.title!r} audits {first.modality} models and {other.title!r} {other.modality} models.",
                "Compare audits of one modality.",
            )
        for name in sorted(set(first.data) | set(other.data)):
            ours, theirs = (d.data.get(name, {}).get("digest") for d in (first, other))
            if ours != theirs or ours is None:
                raise InputError(
                    f"{first.title!r} and {other.title!r} were audited on different {name} data "
                    f"(digest {_short(ours)} against {_short(theirs)}).",
                    "Audit both on the same files: expunge audit RUN.",
                )
        changed = sorted(
            k for k in set(first.signature) | set(other.signature) if first.signature.get(k) != other.signature.get(k)
        )
        if changed:
            what = ", ".join(f"{k} {first.signature.get(k, 'unset')} against {other.signature.get(k, 'unset')}" for k in changed)
            raise InputError(
                f"{first.title!r} and {other.title!r} were computed under different signatures ({what}).",
                "Audit both again on one machine with one set of versions: expunge audit RUN.",
            )


def distinct(documents: Iterable[AuditDocument]) -> list[ModelEntry]:
    """All models of ``documents``, each once: a model that several audits share is no second seed."""
    seen: dict[tuple[str, str], ModelEntry] = {}
    for document in documents:
        for model in document.models:
            seen.setdefault((model.role, model.fingerprint), model)
    return list(seen.values())


def over_seeds(numbers: Sequence[Number]) -> Number:
    """One number of several seeds: their mean with a t-interval over seeds; a single one is returned as it is."""
    if len(numbers) == 1:
        return numbers[0]
    found = seed_interval([n.value for n in numbers if n.value is not None], numbers[0].level)
    flags = tuple(dict.fromkeys(f for n in numbers for f in n.flags))
    update = {"value": found.value, "low": found.low, "high": found.high, "over": "seeds", "flags": flags, "note": ""}
    return numbers[0].model_copy(update=update)


@dataclass(frozen=True)
class _Scale:
    forget: float
    gap: float
    utility: float


@dataclass(frozen=True)
class _Axes:
    forget: str
    utility: str

    def number(self, models: Sequence[ModelEntry], key: str) -> Number | None:
        found = [m.numbers[key] for m in models if key in m.numbers and m.numbers[key].value is not None]
        return over_seeds(found) if found else None

    def scale(self, target: Row | None, gold: Row | None) -> _Scale | None:
        """What distances are measured in; None where target or gold lack a number or are the same."""
        if target is None or gold is None or target.forget is None or gold.forget is None or gold.utility is None:
            return None
        start, end, level = target.forget.value, gold.forget.value, gold.utility.value
        if start is None or end is None or level is None or abs(start - end) < _TINY or abs(level) < _TINY:
            return None
        return _Scale(end, abs(start - end), level)

    def distance(self, model: ModelEntry, scale: _Scale) -> float | None:
        f, u = model.numbers.get(self.forget), model.numbers.get(self.utility)
        if f is None or u is None or f.value is None or u.value is None:
            return None
        lost = u.value - scale.utility if u.direction is Direction.UTILITY_DOWN else scale.utility - u.value
        return math.hypot((f.value - scale.forget) / scale.gap, max(0.0, lost) / abs(scale.utility))


def _reference(models: Sequence[ModelEntry], label: str, axes: _Axes) -> Row | None:
    return _row(label, models, axes, None) if models else None


def _row(label: str, models: Sequence[ModelEntry], axes: _Axes, scale: _Scale | None) -> Row:
    distances = [d for m in models if scale is not None and (d := axes.distance(m, scale)) is not None]
    distance = None
    if distances:
        distance = seed_interval(distances).number(Direction.ZERO, (0.0, None))
    return Row(
        label=label,
        models=tuple(m.label for m in models),
        seeds=len(models),
        verdicts=tuple(m.judgement.verdict for m in models if m.judgement is not None),
        forget=axes.number(models, axes.forget),
        utility=axes.number(models, axes.utility),
        distance=distance,
        guard=any(m.guarded for m in models),
    )


def _order(row: Row) -> tuple[bool, float, str]:
    known = row.distance is not None and row.distance.value is not None
    return not known, row.distance.value or 0.0 if known and row.distance else 0.0, row.label


def _marked(rows: Sequence[Row], axes: _Axes, gold: Row | None) -> list[Row]:
    """The rows with the Pareto front marked, in (distance of f from the gold standard, utility)."""
    if gold is None or gold.forget is None or gold.forget.value is None:
        return list(rows)
    points: dict[int, tuple[float, float]] = {}
    for i, row in enumerate(rows):
        if row.forget and row.utility and row.forget.value is not None and row.utility.value is not None:
            sign = -1 if row.utility.direction is Direction.UTILITY_DOWN else 1
            points[i] = (abs(row.forget.value - gold.forget.value), -sign * row.utility.value)
    return [
        replace(row, pareto=i in points and not any(_beats(p, points[i]) for p in points.values())) for i, row in enumerate(rows)
    ]


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


def _by_method(models: Sequence[ModelEntry]) -> list[tuple[str, list[ModelEntry]]]:
    """Models grouped by method and settings (seeds aside), each group under a name that tells it from the others."""
    groups: dict[tuple[str, str], list[ModelEntry]] = {}
    for model in models:
        groups.setdefault((model.method or model.label, digest_json(_seedless(model.settings))), []).append(model)
    methods: dict[str, list[list[ModelEntry]]] = {}
    for (method, _), members in groups.items():
        methods.setdefault(method, []).append(members)
    named = []
    for method, variants in methods.items():
        flat = [_flat(_seedless(members[0].settings)) for members in variants]
        keys = [k for k in dict.fromkeys(k for f in flat for k in f) if len({repr(f.get(k)) for f in flat}) > 1]
        for members, settings in zip(variants, flat, strict=True):
            told = ", ".join(f"{k}={settings.get(k, 'unset')}" for k in keys[:3])
            named.append((f"{method} ({told})" if told else method, members))
    return named


def _seedless(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _seedless(v) if isinstance(v, Mapping) else v for k, v in settings.items() if k != "seed"}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


def _notes(documents: Sequence[AuditDocument], rows: Sequence[Row], target: Row | None, gold: Row | None) -> list[str]:
    notes = []
    if gold is None:
        notes.append("No retrained model: there is no gold standard to measure a distance from.")
    elif target is None:
        notes.append("No target model: the forget gap has no scale, so there are no distances.")
    elif all(row.distance is None for row in rows):
        notes.append("Target and retrained model agree on the chosen number, or it is missing: there are no distances.")
    if hidden := [row.label for row in rows if row.guard]:
        notes.append(
            f"Guards that stand before the target and change no weight: {', '.join(hidden)}. Their distance is that of what is "
            "said, and whoever has the weights has everything."
        )
    if target is not None and target.seeds > 1:
        notes.append(f"{target.seeds} different target models are averaged.")
    if rows and min(row.seeds for row in rows) < 5:
        few = min(row.seeds for row in rows)
        notes.append(
            ("Single runs" if few == 1 else f"Only {few} seeds for some methods")
            + ": the order may be chance. Intervals of single runs are over examples and say nothing about training randomness; "
            "five seeds of each method are the least for a ranking."
        )
    if any(d.protocol != documents[0].protocol for d in documents[1:]):
        keys = {k for d in documents for k in d.protocol if d.protocol.get(k) != documents[0].protocol.get(k)}
        keys |= {k for k in documents[0].protocol for d in documents if d.protocol.get(k) != documents[0].protocol.get(k)}
        notes.append("The protocols of these audits differ in " + ", ".join(sorted(keys)) + ".")
    return notes


def _short(digest: object) -> str:
    return str(digest)[:12] if digest else "none"
