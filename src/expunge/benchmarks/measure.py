"""The axes of a benchmark on several models: registered metrics on the benchmark's own sets, each model loaded once.

Nothing is computed here: an axis names a metric of :mod:`expunge.audit.metrics`, and that metric reads the same cached scores and
generations as an audit does. Axes that see the same sets share one pass over them.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from expunge.adapters.base import Adapter
from expunge.audit.document import ModelEntry
from expunge.audit.evidence import Evidence, Protocol, Subject
from expunge.audit.metrics.registry import METRICS, Metric, RecordMetric
from expunge.audit.run import AuditedModel, limited, visit
from expunge.audit.scores import Progress
from expunge.audit.settings import AuditSettings
from expunge.audit.store import ScoreStore, compute_signature
from expunge.benchmarks.document import AxisEntry, BenchmarkDocument
from expunge.benchmarks.registry import Axis, Benchmark
from expunge.core.errors import InputError
from expunge.core.results import Number
from expunge.data.records import RecordSet

_ORDER = {"base": 0, "target": 1, "retrained": 2, "unlearned": 3}


@dataclass
class _Group:
    """Axes that see the same sets in the same roles, and the evidence that they share."""

    sets: tuple[tuple[str, str], ...]
    axes: list[Axis] = field(default_factory=list)
    metrics: dict[str, Metric] = field(default_factory=dict)
    evidence: Evidence | None = None

    @property
    def longest(self) -> int:
        """Longest continuation that a metric of the group reads."""
        limits = [int(m.max_new_tokens) for m in self.metrics.values() if "max_new_tokens" in type(m).model_fields]  # type: ignore[attr-defined]
        return max(limits, default=1)


class _Shelf:
    """Holds the one model that is in memory, for all groups."""

    def __init__(self, models: Sequence[AuditedModel]) -> None:
        self.models = {m.label: m for m in models}
        self.open: tuple[str, Adapter] | None = None

    def get(self, label: str) -> Adapter:
        """The adapter of a model; lets go of the one before."""
        source = self.models[label].adapter
        if isinstance(source, Adapter):
            return source
        if self.open is None or self.open[0] != label:
            self.open = None
            self.open = (label, source())
        return self.open[1]


def measure(
    benchmark: Benchmark,
    models: Sequence[AuditedModel],
    sets: Mapping[str, RecordSet[Any]],
    settings: AuditSettings | None = None,
    *,
    axes: Sequence[str] | None = None,
    store: ScoreStore | None = None,
    progress: Progress | None = None,
    checkpoint: str = "last",
) -> BenchmarkDocument:
    """Every axis of every model.

    Args:
        benchmark: the declaration.
        models: with unique labels; retrained models are what others are compared with.
        sets: the benchmark's sets by name; an axis whose set is missing is left out, and said to be.
        settings: budget, batch, bootstrap; what they say of metrics does not count here.
        axes: names of those to be measured; none: all.
        store: cache of scores and generations; none keeps them in memory.
        progress: told what is being done, how far, of how much.
        checkpoint: the rule by which the models were chosen, for the document.

    Raises:
        InputError: no model, or an axis that names a metric or a setting that there is not.
    """
    if not models:
        raise InputError("There is no model to measure.")
    settings = settings or AuditSettings()
    missing: list[str] = []
    groups = _groups(benchmark, sets, axes, missing)
    ordered = sorted(models, key=lambda m: _ORDER[m.role])
    shelf = _Shelf(ordered)
    for group in groups:
        used = {role: limited(sets[name], settings) for role, name in group.sets}
        at = Protocol(
            batch_tokens=settings.batch_tokens, shard_examples=settings.shard_examples, max_new_tokens=group.longest,
            draws=settings.draws, level=settings.level, seed=settings.seed,
        )  # fmt: skip
        group.evidence = Evidence({}, used, at, store, progress)
    signature: dict[str, str] = {}
    for model in ordered:
        adapter = shelf.get(model.label)
        signature = signature or compute_signature(adapter, settings.batch_tokens)
        fingerprint = adapter.fingerprint()
        del adapter
        for group in groups:
            _gather(group, model, fingerprint, shelf)
    found: dict[str, dict[str, Number]] = {m.label: {} for m in ordered}
    for group in groups:
        for model in ordered:
            found[model.label] |= _numbers(group, model, missing)
    return BenchmarkDocument(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        benchmark=benchmark.name, title=benchmark.title, paper=benchmark.paper.url, licence=benchmark.licence,
        options=benchmark.model_dump(mode="json"), reference=benchmark.reference, checkpoint=checkpoint,
        data={name: _described(benchmark, name, held) for name, held in sets.items()},
        axes=_entries(benchmark, groups, found),
        models=[_model(m, found[m.label], groups) for m in models],
        not_measured=list(dict.fromkeys(missing)), caveats=list(benchmark.caveats),
        protocol=settings.model_dump(mode="json", include={"budget", "batch_tokens", "draws", "level", "seed"}),
        signature=signature,
    )  # fmt: skip


def _groups(
    benchmark: Benchmark, sets: Mapping[str, RecordSet[Any]], axes: Sequence[str] | None, missing: list[str]
) -> list[_Group]:
    """Groups with the longest generations first: shorter ones are then views of what is stored."""
    chosen = [benchmark.axis(name) for name in axes] if axes is not None else list(benchmark.axes())
    groups: dict[tuple[tuple[str, str], ...], _Group] = {}
    for axis in chosen:
        lacking = [name for name in axis.sets.values() if name not in sets]
        if lacking:
            missing.append(f"{axis.title} was not measured: the set {', '.join(lacking)} is not there.")
            continue
        key = tuple(sorted(axis.sets.items()))
        group = groups.setdefault(key, _Group(key))
        group.axes.append(axis)
        group.metrics[metric_key(axis)] = METRICS.get(axis.metric)(**axis.options)
    return sorted(groups.values(), key=lambda g: -g.longest)


def metric_key(axis: Axis) -> str:
    """What tells apart two metrics of a group: name and settings."""
    return f"{axis.metric} {sorted(axis.options.items())}"


def _gather(group: _Group, model: AuditedModel, fingerprint: str, shelf: _Shelf) -> None:
    """Everything that the group reads of a model, while it is in memory."""
    evidence = group.evidence
    if evidence is None:
        return
    label = model.label
    evidence.subjects[label] = Subject(label, model.role, fingerprint, lambda: shelf.get(label))
    adapter = shelf.get(label)
    evidence.of_modality(adapter)
    metrics = [m for m in group.metrics.values() if m.offers <= adapter.offers]
    del adapter
    visit(evidence, label, metrics)
    for metric in metrics:
        if isinstance(metric, RecordMetric):
            for name in evidence.sets:
                if (metric.sets is None or name in metric.sets) and not metric.lacks(evidence, name):
                    metric.values(evidence, label, name)
    evidence.release()


def _numbers(group: _Group, model: AuditedModel, missing: list[str]) -> dict[str, Number]:
    """The axes of one model; what could not be measured is said, but for a reference that has no other one to compare with."""
    evidence, label = group.evidence, model.label
    if evidence is None:
        return {}
    out: dict[str, Number] = {}
    before = dict(evidence.missing)
    made = {key: metric.compute(evidence, label) for key, metric in group.metrics.items()}
    said = [s for s in evidence.missing if s not in before]
    for axis in group.axes:
        number = made[metric_key(axis)].get(axis.number)
        if number is None and model.role == "retrained":
            continue
        if number is None:
            metric = group.metrics[metric_key(axis)]
            why = [s for s in evidence.missing if metric.title.split(" (")[0] in s] or said
            missing.append(f"{axis.title}: {why[0]}" if why else f"{axis.title} was not measured for {label!r}.")
            continue
        out[axis.name] = scaled(number, axis)
    return out


def scaled(number: Number, axis: Axis) -> Number:
    """A metric's number in the unit and the direction of the axis."""
    by = axis.scale
    update: dict[str, Any] = {"direction": axis.direction or number.direction}
    if by != 1:
        update |= {k: None if v is None else v * by for k in ("value", "low", "high") for v in (getattr(number, k),)}
        update["range"] = tuple(None if bound is None else bound * by for bound in number.range)
    return number.model_copy(update=update)


def _entries(benchmark: Benchmark, groups: Sequence[_Group], found: Mapping[str, Mapping[str, Number]]) -> list[AxisEntry]:
    """The measured axes in the order in which the benchmark declares them; their direction is that of their numbers."""
    held = {axis.name: (axis, group) for group in groups for axis in group.axes}
    out = []
    for axis, group in (held[a.name] for a in benchmark.axes() if a.name in held):
        metric = group.metrics[metric_key(axis)]
        directions = [numbers[axis.name].direction for numbers in found.values() if axis.name in numbers]
        out.append(
            AxisEntry(
                name=axis.name, title=axis.title, group=axis.group, metric=axis.metric, formula=metric.formula,
                settings=metric.model_dump(mode="json"), sets=dict(axis.sets), number=axis.number, scale=axis.scale,
                direction=str(directions[0] if directions else axis.direction or metric.direction), note=axis.note,
            )
        )  # fmt: skip
    return out


def _model(model: AuditedModel, numbers: dict[str, Number], groups: Sequence[_Group]) -> ModelEntry:
    evidence = next((g.evidence for g in groups if g.evidence is not None), None)
    return ModelEntry(
        label=model.label, role=model.role, path=model.path, method=model.method, seed=model.seed, numbers=numbers,
        fingerprint=evidence.subject(model.label).fingerprint if evidence is not None else "",
        cost=dict(model.cost), settings=dict(model.settings), stopped=model.stopped,
    )  # fmt: skip


def _described(benchmark: Benchmark, name: str, records: RecordSet[Any]) -> dict[str, Any]:
    source = benchmark.sources().get(name)
    out: dict[str, Any] = {"records": len(records), "clusters": len(set(records.clusters())), "digest": records.digest}
    if source is not None and source.hazardous:
        return {**out, "hazardous": True}
    return {**out, "source": records.source, **({"text": source.text} if source is not None else {})}
