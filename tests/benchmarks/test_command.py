"""``expunge benchmark`` in real processes: list, show, refuse, dry run, a whole small run, and going on with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import Run, refused

SMALL = ["train.schedule.epochs=10", "unlearn.schedule.steps=20", "audit.draws=100", "audit.budget=40"]


def test_lists_and_shows(expunge: Run, tmp_path: Path) -> None:
    listed = expunge("benchmark", "--json", cwd=tmp_path).json()["benchmarks"]
    assert "tofu" in {b["name"] for b in listed}
    shown = expunge("benchmark", "tofu", "split=forget05", "--json", cwd=tmp_path).json()
    assert shown["sets"]["forget"]["rows"] == 200
    assert "forget-quality" in {a["name"] for a in shown["axes"]}
    assert "Model utility" in expunge("benchmark", "tofu", cwd=tmp_path).out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tufo", "--smoke", "--out", "x"], ["tufo"]),
        (["tofu", "--method", "npo", "--out", "x"], ["No model was given", "--smoke"]),
        (["tofu", "--smoke"], ["--out"]),
        (["tofu", "--smoke", "--out", "x", "split=forget02"], ["split", "forget01"]),
        (["tofu", "--smoke", "--out", "x", "--data", "y"], ["brings its own data"]),
        (["tofu", "--smoke", "--out", "x", "--method", "npoo"], ["npoo", "npo"]),
        (["tofu", "--smoke", "--out", "x", "--checkpoint", "oracle"], ["no rule"]),
        (["tofu", "--smoke", "--out", "x", "--course", "scalability", "--method", "npo"], ["course"]),
        (["tofu", "--model", "llama-tiny", "--data", "nowhere", "--out", "x"], ["nowhere"]),
    ],
)
def test_bad_input_is_refused_before_anything_starts(expunge: Run, tmp_path: Path, words: list[str], said: list[str]) -> None:
    refused(expunge("benchmark", *words, cwd=tmp_path), *said)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_whole_run_is_resumed_from_what_is_there(expunge: Run, tmp_path: Path) -> None:
    words = ["benchmark", "tofu", "--smoke", "--method", "graddiff", "--out", "run", "split=forget05", *SMALL, "--json"]
    dry = expunge(*words, "--dry-run", cwd=tmp_path).json()
    assert [s["name"] for s in dry["stages"]] == [
        "data", "train target", "train retrained seed 1", "unlearn graddiff", "measure", "audit",
    ]  # fmt: skip
    assert "steps" in dry["stages"][1]["cost"]
    assert not (tmp_path / "run").exists()
    done = expunge(*words, cwd=tmp_path)
    assert done.code == 0, done.err
    found = {m["label"]: m["numbers"] for m in done.json()["models"]}
    assert set(found) == {"target", "retrained seed 1", "graddiff"}
    assert found["target"]["forget-probability"]["value"] > found["retrained seed 1"]["forget-probability"]["value"] + 0.3
    assert found["graddiff"]["forget-probability"]["value"] < found["target"]["forget-probability"]["value"]
    assert found["target"]["privleak"]["value"] < -60
    first = (tmp_path / "run" / "benchmark.json").read_text()
    assert (tmp_path / "run" / "benchmark.md").is_file()
    assert "tofu" in (tmp_path / "run" / "report.html").read_text()
    held = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert {m["label"] for m in held["models"]} == set(found)
    refused(expunge(*words[:-1], cwd=tmp_path), "not empty", "--resume")
    again = expunge(*words, "--resume", cwd=tmp_path)
    assert again.code == 0, again.err
    assert (tmp_path / "run" / "benchmark.json").read_text() == first  # not measured again
