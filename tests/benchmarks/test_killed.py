"""``expunge benchmark`` killed in the middle: the same command goes on, does nothing twice, and ends with the same numbers."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from expunge.core.files import digest_folder
from tests.command import Run, start, stop_when

WORDS = [
    "benchmark", "knowundo", "--smoke", "--method", "graddiff", "--retrain", "0", "--no-verdict", "--out", "run",
    "train.schedule.epochs=60", "unlearn.schedule.steps=200", "unlearn.schedule.name=fixed", "audit.draws=100", "--json",
]  # fmt: skip


def stages(folder: Path) -> dict[str, Any]:
    """What the manifest of a folder holds; nothing while it is being made."""
    path = folder / "manifest.json"
    held: dict[str, Any] = json.loads(path.read_text())["stages"] if path.is_file() else {}
    return held


def running(folder: Path, stage: str) -> bool:
    """Whether a stage has been begun, and has written something."""
    return stages(folder).get(stage, {}).get("state") == "running" and (folder / "log.jsonl").is_file()


def numbers(folder: Path) -> dict[str, Any]:
    held = json.loads((folder / "benchmark.json").read_text())
    return {m["label"]: m["numbers"] for m in held["models"]}


@pytest.mark.slow
def test_a_killed_benchmark_goes_on_and_ends_alike(expunge: Run, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    done = expunge(*WORDS, cwd=whole)
    assert done.code == 0, done.err
    run = cut / "run"
    killed = stop_when(start(*WORDS, cwd=cut), lambda: running(run / "target", "train"), signal.SIGKILL)
    assert killed.code == -signal.SIGKILL
    assert not (run / "benchmark.json").exists()
    stop_when(start(*WORDS, "--resume", cwd=cut), lambda: running(run / "methods" / "graddiff", "unlearn"), signal.SIGKILL)
    target = digest_folder(run / "target")
    trained = stages(run / "target")["train"]
    assert trained["state"] == "done"
    again = expunge(*WORDS, "--resume", cwd=cut)
    assert again.code == 0, again.err
    assert digest_folder(run / "target") == target, "the target was trained again"
    assert stages(run / "target")["train"]["started"] == trained["started"]
    assert numbers(run) == numbers(whole / "run")
    first = (run / "benchmark.json").read_text()
    once = expunge(*WORDS, "--resume", cwd=cut)
    assert once.code == 0, once.err
    assert (run / "benchmark.json").read_text() == first, "measured again"
