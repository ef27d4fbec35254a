"""Hazardous text: never fetched unasked, and in no log, report, message or manifest of a run that was given it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expunge.core.errors import InputError
from expunge.data.sources import load
from tests.command import Run

TEXT_FILES = {".json", ".jsonl", ".md", ".html", ".txt", ".log", ".yaml", ".csv"}


def test_no_corpus_is_fetched_without_the_word(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def fetched(*words: object) -> object:
        asked.append(words)
        return iter([("row 1", {"text": "harmless"})])

    monkeypatch.setattr("expunge.data.sets.choices.hub_rows", fetched)
    monkeypatch.delenv("EXPUNGE_DATA", raising=False)
    for part in ("bio-forget-corpus", "bio-retain-corpus", "cyber-forget-corpus", "cyber-retain-corpus"):
        for word in ("", "?hazardous=false"):
            with pytest.raises(InputError, match="neither read nor fetched unasked"):
                load(f"wmdp:{part}{word}", name="x")
    assert not asked
    assert len(load("wmdp:bio-forget-corpus?hazardous=true", name="x")) == 1
    assert len(asked) == 1


@pytest.mark.slow
def test_a_run_leaves_no_word_of_the_corpora_behind(expunge: Run, tmp_path: Path) -> None:
    words = [
        "benchmark", "wmdp", "--smoke", "--method", "graddiff", "--out", "run", "hazardous=true", "train.schedule.epochs=3",
        "unlearn.schedule.name=fixed", "unlearn.schedule.steps=6", "audit.draws=100",
    ]  # fmt: skip
    done = expunge(*words, cwd=tmp_path, EXPUNGE_CACHE=str(tmp_path / "cache"))
    assert done.code == 0, done.err
    page = expunge("report", "run", cwd=tmp_path, EXPUNGE_CACHE=str(tmp_path / "cache"))
    assert page.code == 0, page.err
    data = next((tmp_path / "cache" / "benchmarks").glob("wmdp-*"))
    passages = [json.loads(line)["text"] for path in data.glob("*-corpus.jsonl") for line in path.read_text().splitlines()]
    pieces = {text[i : i + 24] for text in passages for i in range(0, len(text) - 24, 24)}
    assert len(pieces) > 100
    written = {p: p.read_text(errors="replace") for p in (tmp_path / "run").rglob("*") if p.suffix in TEXT_FILES}
    assert {"log.jsonl", "manifest.json", "benchmark.json", "benchmark.md", "report.html"} <= {p.name for p in written}
    for where, text in {**written, Path("out"): done.out, Path("err"): done.err, Path("page"): page.out + page.err}.items():
        assert not [p for p in pieces if p in text], where
    assert '"hazardous": true' in next(t for p, t in written.items() if p.name == "benchmark.json")
