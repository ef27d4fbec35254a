"""ROCR from the command line: names in files, a saved model, a run folder, its audit; and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from expunge.adapters.loading import load
from tests.command import Run, refused, write_rows
from tests.methods.conftest import planted
from tests.methods.planted import NAMES, Planted, facts

__all__ = ["planted"]
WELL = ["l2=0.001", "threshold=0.0001", "layers=[0]"]


def rows(*names: str) -> list[dict[str, str]]:
    return [{"id": r.id, "question": r.prompt, "answer": r.answer, "subject": r.subject} for n in names for r in facts(n)]


@pytest.fixture
def request_words(planted: Planted, tmp_path: Path) -> list[object]:
    planted.target().save(tmp_path / "target")
    write_rows(tmp_path / "forget.jsonl", rows("Ada"))
    write_rows(tmp_path / "retain.jsonl", rows(*(n for n in NAMES if n != "Ada")))
    return ["unlearn", "target", "--forget", "forget.jsonl", "--retain", "retain.jsonl", "--method", "rocr"]


def answers(folder: Path, name: str) -> list[str]:
    adapter = load(folder / "model")
    return [g.text for g in adapter.generate(adapter.model, [adapter.encode(r) for r in facts(name)], 8)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["substitute=Ben"], [r.answer for r in facts("Ada", of="Ben")]),
        (["substitute=Ben", "contexts=records"], [r.answer for r in facts("Ada", of="Ben")]),
        (["target=reject", "refusal=In Jena", "contexts=records", "subjects=[Ada]"], ["In Jena by the sea."] * 2),
        (["target=noise"], None),
    ],
)
def test_a_name_is_redirected_and_the_run_is_audited(
    expunge: Run, request_words: list[object], tmp_path: Path, options: list[str], expected: list[str] | None
) -> None:
    done = expunge(*request_words, *options, *WELL, "--out", "run", "--json")
    assert done.code == 0, done.err
    found = done.json()
    assert found["reached"]
    before = [r.answer for r in facts("Ada")]
    said = answers(tmp_path / "run", "Ada")
    assert said[: len(expected)] == expected if expected is not None else said != before
    assert answers(tmp_path / "run", "Cleo") == [r.answer for r in facts("Cleo")]
    audited = expunge("audit", "run", "relearn=none", "quantise=[]", "metrics=[loss]", "draws=200")
    assert audited.code == 0, audited.err


def test_a_second_request_keeps_the_first(expunge: Run, request_words: list[object], tmp_path: Path) -> None:
    assert expunge(*request_words, "substitute=Ben", *WELL, "--out", "one").code == 0
    write_rows(tmp_path / "forget.jsonl", rows("Cleo"))
    write_rows(tmp_path / "retain.jsonl", rows(*(n for n in NAMES if n not in ("Ada", "Cleo"))))
    words = ["one" if w == "target" else w for w in request_words]
    done = expunge(*words, "substitute=Ben", "earlier=Ada", *WELL, "--out", "two")
    assert done.code == 0, done.err
    for name in ("Ada", "Cleo"):
        assert answers(tmp_path / "two", name) == [r.answer for r in facts(name, of="Ben")]


def test_bad_input_is_refused_before_anything_is_written(expunge: Run, request_words: list[object], tmp_path: Path) -> None:
    for options, said in (
        ([], "needs the name of a harmless concept"),
        (["substitute=Ada"], "is itself to be forgotten"),
        (["substitute=Ben", "layers=[5]"], "Layer 5 is out of range: the model has 3 blocks"),
        (["substitute=Ben", "target=refuse"], "target"),
        (["target=reject", "refusal="], "refusal"),
        (["substitute=Ben", "contexts=records", "subjects=Zoe"], "occurs in none of the 6 forget records"),
    ):
        refused(expunge(*request_words, *options, "--out", "run"), said)
        assert not (tmp_path / "run").exists()
