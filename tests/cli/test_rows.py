"""Rows are forgotten by the command line: the request, what a run leaves, and going on after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command import Run, Server, content, refused
from tests.entries import FIXED, Desk, weights, write_entry

QUICK = ["--method", "finetune", FIXED % (0.01, 5)]


@pytest.mark.parametrize(
    ("choice", "rows"),
    [
        (["--class", 3], 29),
        (["--class", 3, "--class", 5], 61),
        (["--id", "row4", "--id", "row9"], 2),
        (["--where", "page == 2 and target != '3'"], 47),
        (["--subject", "writer7"], 10),
        (["--subject", "writer7", "--class", "0"], 3),
    ],
)
def test_what_is_chosen(desk: Desk, choice: list[object], rows: int) -> None:
    held = desk.run("unlearn", "digits.py:problem", *choice, *QUICK, "--out", "dry", "--dry-run", "--json").json()
    assert held["rows"] == {"forget": rows, "retain": 300 - rows}
    assert held["cost"]["parameters"] == 64 * 32 + 32 + 32 * 10 + 10
    assert not (desk.folder / "dry").exists()


def test_ids_from_a_file(desk: Desk) -> None:
    (desk.folder / "ids.txt").write_text("row4\n\nrow9 \n", encoding="utf-8")
    words = ["unlearn", "digits.py:problem", *QUICK, "--out", "dry", "--dry-run", "--json"]
    held = desk.run(*words, "--id", "@ids.txt", "--id", "row12").json()
    assert held["rows"]["forget"] == 3
    assert held["config"]["ids"] == ["row4", "row9", "row12"]
    refused(desk.run(*words[:-1], "--id", "@names.txt"), "names.txt", "one name on each line")


def test_settings_from_a_file(desk: Desk) -> None:
    text = "model: digits.py:problem\nclasses: 3\nids: row3\nmethod: ssd\nparts: {alpha: 5}\n"
    (desk.folder / "run.yaml").write_text(text, encoding="utf-8")
    held = desk.run("unlearn", "--config", "run.yaml", "--out", "dry", "--dry-run", "--json").json()
    assert held["rows"]["forget"] == 1
    assert (held["config"]["classes"], held["config"]["method"], held["config"]["parts"]) == (["3"], "ssd", {"alpha": 5})


def test_dry_run_trains_and_writes_nothing(expunge: Run, tmp_path: Path) -> None:
    entry = write_entry(tmp_path)
    before = content(tmp_path)
    done = expunge("unlearn", entry, "--class", 3, "--out", "out", "--dry-run")
    assert done.code == 0, done.err
    assert "29 rows to forget, 271 to keep" in done.err
    assert "steps" in done.err
    assert "memory" in done.err
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert content(tmp_path) == before


def test_a_run_and_what_it_leaves(desk: Desk) -> None:
    out = desk.folder / "run"
    done = desk.run("unlearn", "digits.py:problem", "--class", 3, "--method", "npo", "--out", "run", "--json")
    held = done.json()
    assert done.code == 0, done.err
    assert held["reached"] is True
    assert held["reused"] is False
    assert held["goal"]["source"] == "holdout"
    assert held["notes"] == ["Of the class '3' no row is left: it is forgotten as a whole."]
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert names == ["log.jsonl", "manifest.json", "model/model.json", "model/model.safetensors", "training.json"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["stages"]["unlearn"]["outputs"]["model/model.safetensors"] == weights(out)
    assert manifest["inputs"]["forget"]["rows"] == 29
    last = json.loads((out / "training.json").read_text())
    assert last["steps"] == held["steps"] > 0
    assert last["sentence"] == held["sentence"]
    assert measured(out, "3") < 0.2
    assert measured(out, *"012456789") > 0.8


def measured(run: Path, *classes: str) -> float:
    """Accuracy of the weights of a run on the rows of some classes, without a line of ours that loads them."""
    scope: dict = {}
    exec(compile((run.parent / "digits.py").read_text(), "digits", "exec"), scope)
    model = scope["network"]()
    model.load_state_dict(load_file(run / "model" / "model.safetensors"))
    data = scope["tables"]()[0]
    rows = data.select(classes=classes)
    with torch.no_grad():
        return float((model(torch.from_numpy(data.inputs[rows])).argmax(1).numpy() == data.targets[rows]).mean())


def test_goal_not_reached_is_exit_code_3(desk: Desk) -> None:
    words = ["unlearn", "digits.py:problem", "--class", 3, "--method", "npo", "schedule.steps=1", "schedule.epochs=1"]
    done = desk.run(*words, "schedule.lr=1e-6", "--out", "far", "--json")
    assert done.code == 3, done.err
    assert done.json()["reached"] is False
    assert measured(desk.folder / "far", "3") == 1


def test_finished_run_is_left_alone(desk: Desk) -> None:
    out = desk.made("finished", *QUICK)
    before = content(out)
    words = ["unlearn", "digits.py:problem", "--class", 3, *QUICK, "--out", "finished"]
    refused(desk.run(*words), "not empty", "--resume")
    again = desk.run(*words, "--resume")
    assert again.code == 0
    assert "nothing was left to do" in again.out
    assert desk.run(*words, "--resume", "--json").json()["reused"] is True
    assert content(out) == before
    refused(desk.run(*words, "--seed", 3, "--resume"), "other settings", "engine")
    refused(desk.run(*words, "--id", "row3", "--resume"), "other settings", "ids")
    assert content(out) == before


LONG = ["--method", "finetune", FIXED % (0.002, 1500), "engine.checkpoint_every=25"]


def step_of(folder: Path) -> int:
    try:
        return int(json.loads((folder / "checkpoint" / "process-0" / "state.json").read_text())["step"])
    except (OSError, ValueError):
        return 0


@pytest.mark.parametrize("at", [0, 25, 400])
def test_killed_run_ends_in_the_same_bits(desk: Desk, at: int) -> None:
    whole, out = desk.made("whole", *LONG), desk.folder / f"killed{at}"
    words = ["unlearn", "digits.py:problem", "--class", 3, *LONG, "--out", out.name]
    desk.kill_when(lambda: out.exists() and step_of(out) >= at, *words)
    assert not (out / "model").exists()
    if at:
        refused(desk.run("audit", out), "has not finished", "--resume")
    done = desk.run(*words, "--resume", "--json")
    assert done.code == 0, done.err
    assert weights(out) == weights(whole)
    assert [json.loads(a)["loss"] for a in (out / "log.jsonl").read_text().splitlines()] == [
        json.loads(a)["loss"] for a in (whole / "log.jsonl").read_text().splitlines()
    ]
    assert not (out / "checkpoint").exists()


def test_changed_rows_are_refused_on_resume(server: Server, expunge: Run, tmp_path: Path) -> None:
    entry = write_entry(tmp_path)
    words = ["unlearn", entry, "--class", 3, *LONG, "--out", "out"]
    out = tmp_path / "out"
    server.kill_when(lambda: step_of(out) >= 25, *words, cwd=tmp_path)
    text = (tmp_path / "digits.py").read_text()
    write_entry(tmp_path, text.replace("    return data,", "    data.inputs[0, 20] = 0.3\n    return data,"))
    refused(expunge(*words, "--resume"), "has changed", "data")
    write_entry(tmp_path, text)
    assert expunge(*words, "--resume").code == 0
