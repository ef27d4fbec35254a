"""A benchmark's folder as a page: axes by their titles, curves with names and units on both axes, with or without an audit."""

from __future__ import annotations

from pathlib import Path

import pytest

from expunge.audit.settings import AuditSettings
from expunge.benchmarks.courses import axis_label, profiles
from expunge.benchmarks.measure import measure
from expunge.benchmarks.registry import BENCHMARKS
from expunge.report.benchmark import page_document
from expunge.report.html import write
from tests.benchmarks.world import sampled, untrained
from tests.command import Run


@pytest.mark.parametrize(
    ("benchmark", "axis", "label"),
    [
        ("muse-news", "knowmem-retain", "%"),
        ("hubble", "forget-4-gap", "nats per token"),
        ("hubble", "forget-4-strength", "share, 0 to 1"),
        ("restor", "right", "nats per token"),
    ],
)
def test_a_curve_says_what_its_values_are(benchmark: str, axis: str, label: str) -> None:
    held = BENCHMARKS.get(benchmark)().axis(axis)
    assert axis_label(held) == f"{held.title} ({label})"


def test_a_folder_that_was_not_audited_is_reported_with_its_axes_and_curves(expunge: Run, tmp_path: Path) -> None:
    benchmark = sampled("hubble", tmp_path / "data")
    sets, models = untrained(benchmark)
    document = measure(benchmark, models, sets, AuditSettings.quick(draws=100, budget=6))
    document.curves = profiles(benchmark, document)
    assert {c.x_label for c in document.curves} == {"copies in the corpus"}
    assert all(c.y_label.endswith(")") for c in document.curves)
    run = tmp_path / "run"
    run.mkdir()
    (run / "benchmark.json").write_text(document.model_dump_json())
    said = expunge("report", "run", "--json", cwd=tmp_path)
    assert said.code == 0, said.err
    page = (run / "report.html").read_text()
    for text in (
        "16 copies, to forget: Loss gap to never inserted",
        "copies in the corpus",
        "nats per token",
        "there is no verdict",
    ):
        assert text in page, text
    assert "hubble.forget-16-gap" in page_document(run, document).entry("target").numbers
    write([page_document(run, document)], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page
