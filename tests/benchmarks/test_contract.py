"""What every declared benchmark must hold to: its sets load and fit, its axes name what there is, and all are measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from expunge.audit.metrics.registry import METRICS
from expunge.audit.settings import AuditSettings
from expunge.benchmarks.measure import measure
from expunge.benchmarks.registry import BENCHMARKS
from expunge.benchmarks.run import load_all
from expunge.methods.recipe import build
from tests.benchmarks.world import sampled, untrained

NAMES = BENCHMARKS.names()


@pytest.mark.parametrize("name", NAMES)
def test_its_declaration_is_complete(name: str) -> None:
    held = BENCHMARKS.get(name)()
    assert held.title
    assert held.licence
    assert held.home
    assert type(held).__doc__
    sources, axes = held.sources(), held.axes()
    assert len({a.name for a in axes}) == len(axes)
    for axis in axes:
        assert set(axis.sets.values()) <= set(sources), axis
        METRICS.get(axis.metric)(**axis.options)
    for step in held.trainings():
        assert set(step.sets) <= set(sources)
        build("finetune", step.parts)
    roles = held.roles()
    if roles is not None:
        named = {roles.forget, roles.retain, roles.holdout, *roles.audit.values()} - {None}
        assert named <= set(sources)
        build("npo", held.unlearning())
    else:
        assert not held.unlearning()
        assert not held.courses()
    for course in held.courses():
        assert set(course.sets) <= set(sources)
        assert {held.axis(a).name for a in course.axes} == set(course.axes)
    rule = held.oracle()
    assert rule is None or held.axis(rule.axis)
    assert held.reference in ("retrained", "none") or held.reference in {t.name for t in held.trainings()}


@pytest.mark.parametrize("name", NAMES)
def test_every_set_of_its_sample_loads_and_every_axis_is_measured(name: str, tmp_path: Path) -> None:
    benchmark = sampled(name, tmp_path / "data")
    sets, models = untrained(benchmark)
    assert set(sets) == set(benchmark.sources()), "the sample lacks a set"
    settings = AuditSettings.quick(draws=100, budget=6)
    document = measure(benchmark, models, sets, settings)
    assert [a.name for a in document.axes] == [a.name for a in benchmark.axes()]
    numbers = document.entry("unlearned").numbers
    for axis in benchmark.axes():
        number = numbers[axis.name]
        low, high = number.range
        assert number.value is not None or number.note or number.flags, axis
        if number.value is not None and not number.flags:
            assert low is None or number.value >= low - 1e-9, axis
            assert high is None or number.value <= high + 1e-9, axis
    first = [a.name for a in benchmark.axes()][:2]
    again = measure(benchmark, models, sets, settings, axes=first)
    for one, two in zip(again.models, document.models, strict=True):
        assert one.numbers == {k: v for k, v in two.numbers.items() if k in first}


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_optional_set_leaves_out_its_axes_and_says_so(name: str, tmp_path: Path) -> None:
    benchmark = sampled(name, tmp_path / "data")
    optional = [n for n, s in benchmark.sources().items() if s.optional]
    sets, models = untrained(benchmark)
    for gone in optional[:2]:
        left = {n: s for n, s in sets.items() if n != gone}
        lost = [a.name for a in benchmark.axes() if gone in a.sets.values()]
        document = measure(benchmark, models, left, AuditSettings.quick(draws=100, budget=8), axes=lost[:2])
        assert not document.axes
        assert len(document.not_measured) >= len(lost[:2])
        assert all(gone in s for s in document.not_measured)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_sample_is_written_again(name: str, tmp_path: Path) -> None:
    one = load_all(sampled(name, tmp_path / "one"))[0]
    two = load_all(sampled(name, tmp_path / "two"))[0]
    assert {n: s.digest for n, s in one.items()} == {n: s.digest for n, s in two.items()}
    assert dataclasses.is_dataclass(next(iter(BENCHMARKS.get(name)().sources().values())))
