"""Marked spans from every door: a column of a file, patterns and terms on the command line, from Python, in requests in order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import expunge
from expunge.cli.main import main
from expunge.core.errors import InputError
from expunge.pipeline.config import UnlearnConfig
from expunge.pipeline.unlearn import from_config, goal_of
from tests.secrets_world import FORGET, LETTERS, RETAIN, known, target

FIXED = {"name": "fixed", "lr": 1e-3, "steps": 30, "batch": 6, "warmup": 0}


def rows(records, *, spans: bool = True) -> list[dict]:
    held = [{"id": r.id, "prompt": r.prompt, "completion": r.answer, "subject": r.id} for r in records]
    return [{**h, "spans": [list(s) for s in r.spans]} if spans else h for h, r in zip(held, records, strict=True)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, records in (("forget", FORGET), ("retain", RETAIN)):
        for spans in (True, False):
            lines = "".join(json.dumps(row) + "\n" for row in rows(records, spans=spans))
            (tmp_path / f"{name}{'' if spans else '-bare'}.jsonl").write_text(lines)
    target().save(tmp_path / "model")
    return tmp_path


def test_from_python_the_keys_go_and_the_code_stays() -> None:
    for given in ({}, {"spans__patterns": [r"take key = ((?:k\d+ ?){5}k\d+)"]}):
        adapter = target().copy()
        data = [rows(r, spans=not given) for r in (FORGET, RETAIN)]
        done = expunge.unlearn(adapter.model, adapter.tokenizer, *data, method="codeeraser", schedule=FIXED, **given)
        assert done.reached
        assert known(adapter, FORGET, "marked") < 0.3
        assert known(adapter, FORGET, "unmarked") > 0.9


def test_any_method_forgets_marked_spans_alone() -> None:
    adapter = target().copy()
    done = expunge.unlearn(
        adapter.model, adapter.tokenizer, rows(FORGET), rows(RETAIN), method="npo", parts={"forget": {"targets": "marked"}}
    )
    assert done.reason == "goal"
    assert "forget text with swapped spans" in done.sentence
    assert known(adapter, FORGET, "unmarked") > known(adapter, FORGET, "marked") + 0.3


def plan(place: Path, **changes):
    settings = {
        "model": str(place / "model"),
        "forget": "forget-bare.jsonl",
        "retain": "retain-bare.jsonl",
        "method": "codeeraser",
    }
    return from_config(UnlearnConfig(**{**settings, **changes}))


def test_columns_patterns_and_terms_mark_the_same_targets(place: Path) -> None:
    given = plan(place, forget="forget.jsonl")
    counts = [e.n_marked for e in given.examples["forget"]]
    assert min(counts) == max(counts) == 6
    (place / "terms.txt").write_text("\n".join(LETTERS))
    for spans in ({"patterns": [r"\bk\d+\b"]}, {"terms": LETTERS}, {"file": "terms.txt"}):
        made = plan(place, spans=spans)
        assert [e.n_marked for e in made.examples["forget"]] == counts
        assert [e.n_marked for e in made.examples["retain"]] == [6] * len(RETAIN)
    assert goal_of(given).source == "swapped"


def test_refusals_before_anything_is_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["unlearn", "model", "--retain", "retain.jsonl", "--method", "codeeraser", "--out", "run"]
    bad = [json.loads(line) for line in (place / "forget.jsonl").read_text().splitlines()]
    bad[2]["spans"] = [[3, 9999]]
    (place / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    cases = [
        (["--forget", "bad.jsonl"], "bad.jsonl line 3: 'spans' has the span [3, 9999], but the answer has"),
        (["--forget", "forget.jsonl", "spans.pattern=x"], "patterns"),
        (["--forget", "forget-bare.jsonl"], "tells marked spans from the rest, but no forget example has any"),
        (["--forget", "forget.jsonl", "control=memorisation"], "chooses by held-out data, and none were given"),
    ]
    for more, said in cases:
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(InputError, match="no regular expression"):
        plan(place, spans={"patterns": ["("]})


def test_a_run_by_the_command_line_keeps_what_it_marked(place: Path) -> None:
    schedule = ["schedule=fixed", "schedule.lr=1e-3", "schedule.steps=30", "schedule.batch=6", "schedule.warmup=0"]
    words = ["unlearn", "model", "--forget", "forget-bare.jsonl", "--retain", "retain-bare.jsonl", "--method", "codeeraser"]
    assert main([*words, "--out", "run", r"spans.patterns=['\bk\d+\b']", *schedule]) == 0
    manifest = json.loads((place / "run" / "manifest.json").read_text())
    assert manifest["config"]["spans"]["patterns"] == [r"\bk\d+\b"]
    from expunge.adapters.loading import load

    made = load(str(place / "run" / "model"))
    assert known(made, FORGET, "marked") < 0.3
    assert known(made, FORGET, "unmarked") > 0.9


def test_requests_in_order_are_marked_too(place: Path) -> None:
    from expunge.pipeline import sequence

    (place / "requests.jsonl").write_text(
        '{"id": "one", "ids": ["job0", "job1"]}\n{"id": "two", "forget": "retain-bare.jsonl"}\n'
    )
    (place / "all.jsonl").write_text((place / "forget-bare.jsonl").read_text() + (place / "retain-bare.jsonl").read_text())
    config = UnlearnConfig(
        model=str(place / "model"), forget="requests.jsonl", retain="all.jsonl", method="codeeraser",
        spans={"terms": LETTERS}, allow_large_forget=True,
    )  # fmt: skip
    made = sequence.plan(place / "requests.jsonl", config)
    assert all(r.spans for request in made.checked for r in [*request.forget, *request.retain])


@pytest.mark.parametrize(("method", "more"), [("sani", {"share": 1, "parameters__layers": [-1, -2]}), ("icu", {})])
def test_the_other_two_from_python_with_a_rate_that_is_found(method: str, more: dict) -> None:
    adapter = target().copy()
    done = expunge.unlearn(
        adapter.model,
        adapter.tokenizer,
        rows(FORGET),
        rows(RETAIN),
        method=method,
        schedule__steps=80,
        schedule__epochs=1,
        **more,
    )
    assert done.reached, done.sentence
    assert known(adapter, FORGET, "marked") < (0.3 if method == "sani" else 0.9)
    assert known(adapter, RETAIN, "unmarked") > 0.9
    if method == "sani":
        with pytest.raises(InputError, match="tells marked spans from the rest"):
            expunge.unlearn(adapter.model, adapter.tokenizer, rows(FORGET, spans=False), rows(RETAIN, spans=False), method=method)
