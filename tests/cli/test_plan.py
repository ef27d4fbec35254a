"""``expunge plan``: tables, JSON, the file, and what it refuses."""

from __future__ import annotations

import json

from tests.command import Run, Town, refused


def test_a_plan_is_printed_and_written_and_changes_nothing(expunge: Run, town: Town) -> None:
    words = [town.target, "--forget", town.forget, "--retain", town.retain, "--holdout", town.holdout]
    before = sorted(p.stat().st_mtime_ns for p in town.target.rglob("*") if p.is_file())
    done = expunge("plan", *words, "--method", "npo", "--method", "sisa", "--method", "ssd", "--out", "plan.json", COLUMNS="180")
    assert done.code == 0
    for text in ("How hard it is", "npo", "Methods that cannot run", "extraction strength", "normalised CHES", "Plan: plan.json"):
        assert text in done.out
    assert done.out.index("npo") < done.out.index("ssd") < done.out.index("sisa")
    assert sorted(p.stat().st_mtime_ns for p in town.target.rglob("*") if p.is_file()) == before
    refused(expunge("plan", *words, "--method", "npo", "--out", "plan.json"), "exists", "--force")
    again = expunge(
        "plan", *words, "--method", "npo", "--method", "sisa", "--method", "ssd", "--out", "plan.json", "--force", "--json"
    )
    value = again.json()
    assert [m["name"] for m in value["methods"]] == ["npo", "ssd", "sisa"]
    assert [m["runs"] for m in value["methods"]] == [True, True, False]
    assert value["methods"][0]["cost"]["steps"] > 0
    assert len(value["difficulty"]["records"]) == 16


def test_parts_change_the_cost_of_one_method(expunge: Run, town: Town) -> None:
    words = [town.target, "--forget", town.forget, "--retain", town.retain, "--json"]
    parts = ["schedule=fixed", "schedule.lr=0.001", "schedule.epochs=null", "schedule.steps=6", "schedule.warmup=0"]
    assert expunge("plan", *words, "--method", "npo", *parts).json()["methods"][0]["cost"]["steps"] == 6


def test_bad_input_is_refused_before_anything_is_loaded(expunge: Run, town: Town) -> None:
    refused(expunge("plan", "no-model"), "forget", "--forget")
    refused(expunge("plan", "digits.py:problem", "--forget", town.forget), "language models", "--dry-run")
    refused(expunge("plan", "no-model", "--forget", town.forget, "--method", "npoo"), "npoo", "npo")
    refused(expunge("plan", "no-model", "--forget", town.forget, "beta=0.2"), "one method", "--method")


def test_the_plan_is_one_json_file(expunge: Run, town: Town, tmp_path) -> None:
    expunge("plan", town.target, "--forget", town.forget, "--method", "gradascent", "--out", "p.json")
    held = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert held["format"] == 1
    assert held["difficulty"]["total"]["unseen"]["source"] == "none"
