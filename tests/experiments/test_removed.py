"""The page on removal: its tables on made judgements, and what is done where there is nothing to judge."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiments.llm_methods import Plan
from experiments.removed import PROTOCOL, Course, gaps, main, protocol_ids, table
from experiments.verdicts import link, ordered

from expunge.audit.document import AuditDocument, ModelEntry, Role
from expunge.audit.protocol import load_protocol
from expunge.core.results import Check, Finding, Judgement, Verdict
from expunge.report.text import DASH


def entry(label: str, verdict: Verdict, outcomes: str, role: Role = "unlearned") -> ModelEntry:
    names = {"+": "held", "-": "failed", "?": "undecided", "0": "tells nothing", "r": "reported"}
    criteria = tuple(
        Finding(id=d.id, title=str(d.criterion), needs=d.needs, outcome=names[o])  # type: ignore[arg-type]
        for d, o in zip(load_protocol(PROTOCOL).criteria, outcomes, strict=True)
    )
    check = Check(name="relearning", outcome="knows more", difference=2.0, margin=1.0, text="It | comes back.")
    judgement = Judgement(verdict=verdict, reason="So: It | comes back.", checks=(check,), criteria=criteria, protocol=PROTOCOL)
    return ModelEntry(label=label, role=role, fingerprint=label, numbers={}, judgement=judgement)


MADE = [
    entry("target", Verdict.NOT_FORGOTTEN, "-" * 8 + "rr", "target"),
    entry("retrained seed 1", Verdict.FORGOTTEN, "+" * 8 + "rr", "retrained"),
    entry("weak, seed 1", Verdict.NOT_FORGOTTEN, "-" * 8 + "rr"),
    entry("hidden, seed 1", Verdict.SUPPRESSED, "+++0+-?+rr"),
    entry("better hidden, seed 1", Verdict.SUPPRESSED, "++++++-+rr"),
    entry("gone, seed 1", Verdict.FORGOTTEN, "++0+++++rr"),
]


def document() -> AuditDocument:
    return AuditDocument(
        created="2026-01-01T00:00:00", title="made", modality="language", data={"forget": {"records": 7}}, models=MADE, curves=[],
        distributions=[], samples=[], not_shown=[], protocol={}, signature={}, cost={"seconds": 3.0},
    )  # fmt: skip


def test_the_best_verdict_comes_first_and_then_what_holds_more():
    found = [e.label for e in ordered([e for e in MADE if e.role == "unlearned"])]
    assert found == ["gone, seed 1", "better hidden, seed 1", "hidden, seed 1", "weak, seed 1"]


def test_a_row_says_every_criterion_and_the_weakest_link():
    ids = protocol_ids(Course(Plan(Path())))
    assert ids == [f"R{i}" for i in range(1, 11)]
    row = table([MADE[3]], ids).splitlines()[2]
    assert row == (
        "| hidden, seed 1 | suppressed | + | + | + | 0 | + | **no** | ? | + | (r) | (r) | relearning: It / comes back. |"
    )
    judgement = MADE[3].judgement
    assert judgement is not None
    assert link(judgement.model_copy(update={"checks": ()})) == DASH


def test_the_page_counts_verdicts_and_names_what_is_missing(tmp_path):
    for method in ("made", "late", "broken"):
        (tmp_path / "methods" / method).mkdir(parents=True)
    course = Course(Plan(tmp_path))
    object.__setattr__(course, "methods", lambda: ["made", "late", "broken"])
    out = gaps(course, {"made": document()}, {"broken": "It broke."})
    assert out["verdicts"] == "1 forgotten, 2 suppressed, 1 not forgotten"
    assert out["missing"] == "Not judged yet: late."
    assert "- `broken`: It broke." in out["failed"]
    assert out["controls"].count("\n") == 3
    assert "7 records in the forget set" in out["sets"]


def test_without_runs_it_says_how_to_make_them(tmp_path, capsys):
    assert main(["--out", str(tmp_path)]) == 2
    assert "experiments.llm_methods" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_it_judges_under_the_declared_protocol(seeds):
    assert Course(Plan(Path()), seeds).audit.protocol_label() == PROTOCOL
