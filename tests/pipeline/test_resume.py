"""A run that was killed goes on and ends in the same bits; one that is finished is left alone."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from expunge.core.files import digest_file
from tests.command import Run, Town, cold, content, refused, rows, start, stop_when, write_rows

# Adaptive with a given rate: checks, restarts and the goal belong to what must be restored; no holdout is so far away that
# all steps are done.
STEPS = ["schedule.lr=0.0002", "schedule.steps=40", "schedule.epochs=1", "schedule.utility_bound=50", "engine.checkpoint_every=3"]


def words(town: Town, out: str) -> list[object]:
    return ["unlearn", *town.request(out), "--holdout", town.holdout, "--method", "graddiff", *STEPS]


def weights(folder: Path) -> str:
    return digest_file(folder / "model" / "model.safetensors")


def step_of(folder: Path) -> int:
    """Steps of the last checkpoint."""
    try:
        return int(json.loads((folder / "checkpoint" / "process-0" / "state.json").read_text())["step"])
    except (OSError, ValueError):
        return 0


@pytest.fixture(scope="module")
def whole(server, town: Town, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    done = server.run(*words(town, "out"), cwd=folder)
    assert done.code in (0, 3), done.err
    return folder / "out"


@pytest.mark.parametrize("at", [1, 10, 22])
def test_killed_run_ends_in_the_same_bits(expunge: Run, town: Town, whole: Path, tmp_path: Path, at: int) -> None:
    out = tmp_path / "out"
    killed = stop_when(start(*words(town, "out"), cwd=tmp_path), lambda: step_of(out) >= at, signal.SIGKILL)
    assert killed.code == -signal.SIGKILL
    assert not (out / "model").exists()
    assert json.loads((out / "manifest.json").read_text())["stages"]["unlearn"]["state"] == "running"
    refused(expunge("audit", out), "has not finished", "--resume")
    refused(expunge(*words(town, "out")), "not empty", "--resume")
    resumed = expunge(*words(town, "out"), "--resume", "--json")
    assert resumed.code in (0, 3), resumed.err
    assert weights(out) == weights(whole)
    log, full = ((f / "log.jsonl").read_text().splitlines() for f in (out, whole))
    assert len(log) == len(full)
    assert [json.loads(a)["loss"] for a in log] == [json.loads(b)["loss"] for b in full]
    first, second = (json.loads((f / "training.json").read_text()) for f in (out, whole))
    for key in ("reason", "steps", "lr", "tokens", "forget_loss", "retain_loss"):
        assert first[key] == second[key], key
    assert not (out / "checkpoint").exists()


def test_killed_before_the_first_checkpoint(expunge: Run, town: Town, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_when(start(*words(town, "out"), cwd=tmp_path), out.exists, signal.SIGKILL)  # the manifest may not even be written
    resumed = expunge(*words(town, "out"), "--resume")
    assert resumed.code in (0, 3), resumed.err
    assert weights(out) == weights(whole)


def test_finished_run_is_left_alone(expunge: Run, town: Town, whole: Path, tmp_path: Path) -> None:
    before = content(whole)
    first = expunge(*words(town, "out"), "--resume", cwd=whole.parent)
    assert "nothing was left to do" in first.out
    assert json.loads((whole / "training.json").read_text())["sentence"] in first.out
    log = (whole / "log.jsonl").read_text()
    assert expunge(*words(town, "out"), "--resume", "--json", cwd=whole.parent).json()["reused"] is True
    assert (whole / "log.jsonl").read_text() == log
    assert content(whole) == before


def test_other_settings_are_refused(expunge: Run, town: Town, whole: Path) -> None:
    before = content(whole)
    for extra, says in (
        (["--seed", "3"], "engine"),
        (["schedule.clip=0.3"], "parts"),
        (["text.max_length=200"], "text"),
        (["--allow-large-forget"], "allow_large_forget"),
    ):
        refused(expunge(*words(town, "out"), *extra, "--resume", cwd=whole.parent), "other settings", says)
    other = expunge("unlearn", *town.request("out"), "--holdout", town.holdout, "--method", "npo", "--resume", cwd=whole.parent)
    refused(other, "other settings", "method")
    refused(expunge("train", "llama-tiny", "--scratch", "--data", town.retain, "--out", whole, "--resume"), "other settings")
    assert content(whole) == before


def test_data_that_changed_are_not_gone_on_with(expunge: Run, town: Town, tmp_path: Path) -> None:
    """A checkpoint of other data must not be continued, whether the run was killed or had finished."""
    forget = write_rows(tmp_path / "forget.jsonl", rows("forget"))
    mine = [
        "unlearn",
        town.target,
        "--forget",
        forget,
        "--retain",
        town.retain,
        "--out",
        "out",
        *STEPS,
        "schedule.utility_bound=9",
    ]
    mine.remove("schedule.utility_bound=50")
    out = tmp_path / "out"
    stop_when(start(*mine, cwd=tmp_path), lambda: step_of(out) >= 3, signal.SIGKILL)
    changed = rows("forget")
    changed[0]["answer"] = "Nobody knows."
    write_rows(forget, changed)
    before = content(out)
    refused(expunge(*mine, "--resume"), "has changed", "data")
    assert content(out) == before
    write_rows(forget, rows("forget"))
    assert expunge(*mine, "--resume").code in (0, 3)
    write_rows(forget, changed)
    before = content(out)
    refused(expunge(*mine, "--resume"), "has changed", "data")
    refused(expunge("audit", out), "forget data have changed")
    assert content(out) == before


def test_training_killed_and_resumed(expunge: Run, town: Town, tmp_path: Path) -> None:
    def train(out: str) -> list[object]:
        schedule = ["schedule.lr=0.005", "schedule.epochs=30", "engine.checkpoint_every=5"]
        return ["train", "llama-tiny", "--scratch", "--data", town.forget, "--out", out, *schedule]

    assert expunge(*train("whole")).code == 0
    out = tmp_path / "cut"
    stop_when(start(*train("cut"), cwd=tmp_path), lambda: step_of(out) >= 5, signal.SIGKILL)
    assert cold(*train("cut"), "--resume", cwd=tmp_path).code == 0
    assert weights(out) == weights(tmp_path / "whole")
    assert "nothing was left to do" in expunge(*train("cut"), "--resume").out
