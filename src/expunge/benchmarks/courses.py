"""What takes more than one unlearning: nested and sequential forget sets, and the oracle's choice of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.audit.document import Curve, Series
from expunge.audit.metrics.registry import METRICS
from expunge.audit.run import AuditedModel
from expunge.audit.settings import AuditSettings
from expunge.benchmarks.document import BenchmarkDocument, Grid, GridRow
from expunge.benchmarks.registry import Axis, Benchmark, Course
from expunge.core.errors import InputError
from expunge.core.files import write_text
from expunge.core.results import Number
from expunge.engine.outcome import Progress
from expunge.methods.edits.registry import EDITS
from expunge.methods.recipe import build as build_recipe
from expunge.pipeline import sequence
from expunge.pipeline.audit import unlearned_model
from expunge.pipeline.config import UnlearnConfig
from expunge.pipeline.workers import Job, run_jobs

if TYPE_CHECKING:
    from expunge.benchmarks.run import Plan

Bars = Callable[[str], AbstractContextManager[Progress | None]]
_NATS = ("loss", "loss-gap", "log-probability", "log-probability-gap")  #: metrics in nats per token


def course_of(made: Plan, name: str) -> Course:
    """The course called ``name``, of the forget sets that are there."""
    course = next(c for c in made.benchmark.courses() if c.name == name)
    missing = [s for s in course.sets if s not in made.sets]
    if missing:
        raise InputError(
            f"The course {name} needs the sets {', '.join(missing)}, which are not there.", "Leave it out, or fetch them."
        )
    return course


def describe(made: Plan, name: str) -> str:
    """One line about a course."""
    course = course_of(made, name)
    sizes = ", ".join(f"{len(made.sets[s]):,}" for s in course.sets)
    return f"{course.kind} forget sets of {sizes} records for each of {len(made.config.methods)} methods"


def follow(made: Plan, name: str, models: Sequence[AuditedModel], *, bars: Bars, say: Callable[[str], None]) -> list[Curve]:
    """The axes of a course against the records forgotten so far, one line for each method; the target is the point at 0."""
    from expunge.benchmarks.run import measured

    course = course_of(made, name)
    if course.kind == "each":
        return []
    run = _nested if course.kind == "nested" else _sequence
    chains = {m: run(made, course, m, bars, say) for m in made.config.methods}
    together = [m for chain in chains.values() for m in chain]
    target = next(m for m in models if m.role == "target")
    gold = [m for m in models if m.role == "retrained"]
    with bars(f"{name}: measuring") as bar:
        document = measured(made, [target, *gold, *together], bar, axes=course.axes)
    steps = [len(made.sets[s]) for s in course.sets]
    at = steps if course.kind == "nested" else [sum(steps[: i + 1]) for i in range(len(steps))]
    return [_curve(made, document, course, axis, at=[0, *at], chains=chains) for axis in course.axes]


def tables(made: Plan, name: str, models: Sequence[AuditedModel], *, bars: Bars, say: Callable[[str], None]) -> list[Grid]:
    """A course whose forget sets have no order as one table for each method: a row for each set, a column for each axis."""
    from expunge.benchmarks.run import measured

    course = course_of(made, name)
    if course.kind != "each":
        return []
    compared = [m for m in models if m.role in ("target", "retrained")]
    labels, options = course.labels or course.sets, course.options or ({},) * len(course.sets)
    out = []
    for method in made.config.methods:
        rows = []
        for label, model, changed in zip(labels, _nested(made, course, method, bars, say), options, strict=True):
            held = type(made.benchmark)(**{**made.benchmark.model_dump(), **changed})
            with bars(f"{name}: measuring {label}") as bar:
                document = measured(replace(made, benchmark=held), [*compared, model], bar, axes=course.axes)
            found = document.entry(model.label).numbers
            rows.append(GridRow(label=label, numbers={a: found[a] for a in course.axes if a in found}))
        titles = [made.benchmark.axis(a).title for a in course.axes]
        title = f"{name}: {method}, {course.text}"
        out.append(Grid(name=f"{name}.{method}", title=title, columns=list(course.axes), titles=titles, rows=rows))
    return out


def _curve(
    made: Plan,
    document: BenchmarkDocument,
    course: Course,
    axis: str,
    *,
    at: Sequence[int],
    chains: Mapping[str, list[AuditedModel]],
) -> Curve:
    lines = []
    for method, chain in chains.items():
        labels = ["target", *(m.label for m in chain)]
        found = [(x, document.entry(label).numbers.get(axis)) for x, label in zip(at, labels, strict=True)]
        lines.append(_line(method, found))
    title = f"{course.name}: {made.benchmark.axis(axis).title}"
    return Curve(
        name=f"{course.name}.{axis}",
        title=title,
        x_label="records forgotten",
        y_label=axis_label(made.benchmark.axis(axis)),
        series=lines,
    )


def _line(label: str, found: Sequence[tuple[float, Number | None]]) -> Series:
    """Numbers at places as a line with its band; places without a number are left out."""
    known = [(float(x), n) for x, n in found if n is not None and n.value is not None]
    lows, highs = [n.low for _, n in known], [n.high for _, n in known]
    bounded = None not in lows and None not in highs
    return Series(
        label=label, x=[x for x, _ in known], y=[float(n.value or 0.0) for _, n in known],
        low=[float(v or 0.0) for v in lows] if bounded else None,
        high=[float(v or 0.0) for v in highs] if bounded else None,
    )  # fmt: skip


def axis_label(axis: Axis) -> str:
    """What an axis is called beside a figure, with its unit: ``Loss gap (nats per token)``."""
    most = METRICS.get(axis.metric).range
    most = (most[0], None if most[1] is None else most[1] * axis.scale)
    if most in ((0.0, 1.0), (0.0, 100.0)):
        unit = "%" if most[1] == 100 else "share, 0 to 1"
    else:
        unit = "nats per token" if axis.metric in _NATS else ""
    return f"{axis.title} ({unit})" if unit else axis.title


def profiles(benchmark: Benchmark, document: BenchmarkDocument) -> list[Curve]:
    """The curves that a benchmark declares over its axes, of the models that were measured."""
    out = []
    for profile in benchmark.profiles():
        lines = [
            _line(m.label, [(x, m.numbers.get(a)) for x, a in zip(profile.at, profile.axes, strict=True)])
            for m in document.models
        ]
        shown = [line for line in lines if line.x]
        if shown:
            y_label = axis_label(benchmark.axis(profile.axes[0]))
            out.append(Curve(name=profile.name, title=profile.title, x_label=profile.x_label, y_label=y_label, series=shown))
    return out


def _nested(made: Plan, course: Course, method: str, bars: Bars, say: Callable[[str], None]) -> list[AuditedModel]:
    from expunge.benchmarks.run import finished, unlearn_config

    out = made.out / "courses" / course.name / method
    wanted = {s: (unlearn_config(made, method, s, made.target), out / s) for s in course.sets}
    left = [Job("unlearn", c.model_dump(mode="json"), str(f)) for c, f in wanted.values() if not finished(f)]
    if left:
        say(f"{course.name}: {method} on {len(left)} forget sets")
        with bars(f"{course.name}: {method}") as bar:
            run_jobs(left, bar)
    return [unlearned_model(f, f"{method} on {s} ({course.name})") for s, (_, f) in wanted.items()]


def _sequence(made: Plan, course: Course, method: str, bars: Bars, say: Callable[[str], None]) -> list[AuditedModel]:
    from expunge.benchmarks.run import unlearn_config

    out = made.out / "courses" / course.name / method
    sources = made.benchmark.sources()
    requests = made.out / "courses" / course.name / "requests.jsonl"
    lines = [json.dumps({"id": s.replace("_", "-"), "forget": sources[s].reference}) for s in course.sets]
    if not requests.is_file():
        requests.parent.mkdir(parents=True, exist_ok=True)
        write_text(requests, "\n".join(lines) + "\n")
    config = unlearn_config(made, method, course.sets[0], made.target)
    say(f"{course.name}: {method}, {len(lines)} requests in turn")
    quick = AuditSettings.quick(metrics=("loss",), draws=100, budget=made.config.audit.budget)
    resume = (out / "manifest.json").is_file()
    _, done = sequence.run(sequence.plan(requests, config), out, settings=quick, resume=resume, bars=bars, say=say)
    return [unlearned_model(d.folder, f"{method} after {d.id} ({course.name})") for d in done]


def oracle(
    made: Plan, method: str, models: Sequence[AuditedModel], *, bars: Bars, say: Callable[[str], None]
) -> tuple[Path, str]:
    """The run of a method that its benchmark's rule takes, and what was chosen ("epochs=3").

    Each value is a run of its own from the target with the same seed, so with a constant rate the run of three epochs is the
    third checkpoint of a longer one. Where no value reaches the reference, the last one is taken, and that is said.

    Raises:
        InputError: there is no reference model, or the method has none of the settings.
    """
    from expunge.benchmarks.run import finished, measured, unlearn_config

    rule, roles = made.benchmark.oracle(), made.benchmark.roles()
    gold = [m for m in models if m.role == "retrained"]
    if rule is None or roles is None or not gold:
        raise InputError("The oracle's choice needs a reference model.", "Add --retrain 1, or leave --checkpoint out.")
    path, values = _setting(made, method, rule.values)
    target = next(m for m in models if m.role == "target")
    folder, said = made.out, ""
    for value in values:
        said = f"{path.rpartition('.')[2]}={value:g}"
        folder = made.out / "methods" / method / said
        config = unlearn_config(made, method, roles.forget, made.target, _nested_key(path, value))
        if not finished(folder):
            with bars(f"{method}, {said}") as bar:
                run_jobs([Job("unlearn", config.model_dump(mode="json"), str(folder))], bar, 1)
        with bars("measuring") as bar:
            document = measured(made, [target, *gold, unlearned_model(folder, "candidate")], bar, axes=[rule.axis])
        found = document.entry("candidate").numbers[rule.axis].value
        known = [n.value for m in gold if (n := document.entry(m.label).numbers.get(rule.axis)) and n.value is not None]
        if found is not None and known and found <= sum(known) / len(known):
            say(f"{method}: the oracle takes {said} ({rule.axis} {found:.3g}, reference {sum(known) / len(known):.3g})")
            return folder, said
    say(f"{method}: no checkpoint came down to the reference; the last one, {said}, is taken")
    return folder, f"{said}, none reached the reference"


def _setting(made: Plan, method: str, values: Mapping[str, tuple[float, ...]]) -> tuple[str, tuple[float, ...]]:
    """The first of the rule's settings that the method has."""
    from expunge.benchmarks.run import unlearn_config

    roles = made.benchmark.roles()
    for path, tried in values.items():
        if roles is None or method in EDITS.names():
            break
        try:
            config: UnlearnConfig = unlearn_config(made, method, roles.forget, made.target, _nested_key(path, tried[0]))
            build_recipe(method, config.parts)
        except InputError:
            continue
        return path, tried
    raise InputError(
        f"The oracle of {made.benchmark.name} chooses by {', '.join(values)}, which {method!r} has not.",
        "Leave --checkpoint out.",
    )


def _nested_key(path: str, value: float) -> dict[str, Any]:
    out: dict[str, Any] = {}
    at = out
    *heads, last = path.split(".")
    for head in heads:
        at = at.setdefault(head, {})
    at[last] = int(value) if float(value).is_integer() else value
    return out
