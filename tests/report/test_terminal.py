"""The summary table and its JSON."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from expunge.audit.document import AuditDocument
from expunge.report.compare import compare
from expunge.report.terminal import print_summary, summary_json, trade_off

from . import factory


def printed(*documents: AuditDocument, width: int = 160, as_json: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_summary(documents, console=console, as_json=as_json)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_one_line_per_model_with_verdict_numbers_and_intervals() -> None:
    document = factory.full()
    lines = printed(document).splitlines()
    for model in document.models:
        assert model.judgement is not None
        rows = {row[1:].split("  ")[0]: row for row in lines if row.count("[") >= 3}
        (line,) = [row for name, row in rows.items() if name == model.label or (len(name) > 30 and model.label.startswith(name))]
        assert model.judgement.verdict.value in line
    line = next(row for row in lines if row.lstrip().startswith("grad-diff") and "[" in row)
    assert "0.077 [0.042, 0.112]" in line
    assert line.rstrip().endswith("21 s")


@pytest.mark.parametrize("width", [80, 100, 160])
def test_nothing_is_cut_off(width: int) -> None:
    text = printed(factory.document(), width=width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert "not forgotten" in text
    assert "[0.044, 0.114]" in text


def test_reasons_flags_faults_and_limits_stand_below() -> None:
    wrong = factory.Character("target", "target", None, 0.06, 0.06)
    document = factory.document((wrong, factory.GOLD, factory.METHODS[2]))
    text = printed(document)
    assert "grad-diff: Answers look forgotten" in text
    assert "Not shown (3 points):" in text
    assert "not judged" in text
    number = document.models[2].numbers["model-utility"].model_copy(update={"flags": ("too few records",)})
    document.models[2].numbers["model-utility"] = number
    assert "(1) too few records" in printed(document)
    assert "!(1)" in printed(document)


def test_labels_are_no_markup_and_no_escape_codes() -> None:
    odd = factory.Character("[red]x[/red]\x1b[2J", "unlearned", None, 3.0, 0.1)
    text = printed(factory.document((factory.TARGET, factory.GOLD, odd)))
    assert "[red]x[/red]" in text
    assert "\x1b" not in text


def test_json_for_machines() -> None:
    document = factory.ungoverned()
    value = json.loads(printed(document, as_json=True, width=40))
    assert value == json.loads(json.dumps(summary_json([document])))
    (one,) = value["documents"]
    assert one["models"][1]["verdict"] == "no gold standard"
    key = one["headline"]["forget"]
    assert one["models"][1]["numbers"][key]["value"] == document.models[1].numbers[key].value
    assert one["not_shown"] == document.not_shown


def test_trade_off_table() -> None:
    console = Console(file=io.StringIO(), width=160)
    comparison = compare([factory.full()])
    console.print(trade_off(comparison))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    positions = [text.index(f" {row.label} ") for row in comparison.rows]
    assert positions == sorted(positions)
    assert "Distance = √(F² + U²)" in text
