"""An encoder-decoder from its training to its audit, by real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import WORLD, Run, Town, refused, write_rows

TRAIN = ["--data", f"people:all?{WORLD}", "--scratch", "schedule.lr=0.005", "schedule.epochs=25"]
QUICK = ["schedule=fixed", "schedule.lr=0.001", "schedule.epochs=null", "schedule.steps=20", "schedule.warmup=0"]


@pytest.mark.slow
def test_a_t5_is_trained_unlearned_audited_and_merged(expunge: Run, town: Town, tmp_path: Path) -> None:
    done = expunge("train", "t5-tiny", *TRAIN, "--out", "target")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "target" / "model" / "config.json").read_text())["model_type"] == "t5"
    for name in ("npo", "graddiff"):
        words = ["target", "--forget", town.forget, "--retain", town.retain, "--method", name, *QUICK, "--out", name]
        done = expunge("unlearn", *words)
        assert done.code == 0, done.err
    audited = expunge("audit", "graddiff", "relearn=none", "budget=10", "draws=200", "--json")
    assert audited.code == 0, audited.err
    document = json.loads((tmp_path / "graddiff" / "audit.json").read_text())
    assert document["modality"] == "encoder-decoder"
    target, last = document["models"][0]["numbers"], document["models"][-1]["numbers"]
    assert last["forget.loss"]["value"] > target["forget.loss"]["value"] + 1
    assert last["retain.loss"]["value"] < last["forget.loss"]["value"]
    assert expunge("merge", "npo", "graddiff", "--out", "both").code == 0
    write_rows(tmp_path / "book.jsonl", [{"text": "A long text without any prompt."}])
    words = ["target", "--forget", "book.jsonl", "--retain", town.retain, "--out", "x"]
    refused(expunge("unlearn", *words), "plain text", "prompt and completion")
