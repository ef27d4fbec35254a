"""The demonstration on digits: three documents, and nothing done twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from expunge.pipeline.demo_rows import METHODS, run


@contextmanager
def silent(what: str) -> Iterator[None]:
    assert what
    yield None


@pytest.mark.slow
def test_three_documents_and_a_second_run_that_does_nothing(tmp_path: Path) -> None:
    few = {name: METHODS[name] for name in ("retrain", "ssd")}
    said: list[str] = []
    done = run(tmp_path / "demo", bars=silent, say=said.append, methods=few)
    assert [d.title.partition(": ")[0] for d in done.documents] == ["Digits"] * 3
    for document in done.documents:
        labels = [m.label for m in document.models]
        assert labels[0] == "target"
        assert labels[-2:] == ["retrain", "ssd"]
        judged = {m.label: m.judgement.verdict for m in document.models if m.judgement}
        assert judged["target"] == "not forgotten"
    held = [*(tmp_path / "demo").rglob("*.safetensors"), *(tmp_path / "demo").rglob("audit.json")]
    written = {p: p.stat().st_mtime_ns for p in held}
    again = run(tmp_path / "demo", bars=silent, say=said.append, methods=few)
    assert again.documents == done.documents
    assert {p: p.stat().st_mtime_ns for p in written} == written
