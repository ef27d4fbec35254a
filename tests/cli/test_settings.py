"""``--settings``: what sweeps found, by name, from the command line to the audit."""

from __future__ import annotations

import json
from pathlib import Path

from expunge import load
from expunge.methods.tuned import chosen, folder, names, shipped
from expunge.pipeline.tuned import COPY, USED, key_of, used_text
from tests.command import Run, Town, refused

METHOD = next(m for m, c in shipped("demo").methods.items() if m == "simnpo" or "utility_bound" in c.parts.get("schedule", {}))
FAST = ["schedule.lr=0.001", "schedule.steps=2", "schedule.epochs=0.1"]


def test_they_are_put_beneath_ones_own_and_the_run_says_where_they_come_from(expunge: Run, town: Town, tmp_path: Path) -> None:
    words = ["unlearn", *town.request(tmp_path / "out"), "--method", METHOD, "--settings", "demo"]
    found = expunge(*words, "schedule.steps=9", "--dry-run", "--json").json()
    for slot, held in chosen("demo", METHOD).parts.items():
        for key, value in held.items():
            assert found["config"]["parts"][slot][key] == value
    assert found["config"]["parts"]["schedule"]["steps"] == 9
    done = expunge(*words, *FAST)
    assert done.code in (0, 3), done.err
    assert "Settings demo" in done.err
    copy = json.loads((tmp_path / "out" / COPY).read_text(encoding="utf-8"))
    assert copy == json.loads((folder("demo") / USED).read_text(encoding="utf-8"))
    file = tmp_path / "run.yaml"
    file.write_text(f"settings: demo\nmethod: {METHOD}\n", encoding="utf-8")
    other = expunge("unlearn", *town.request(tmp_path / "other"), "--config", file, "schedule.steps=9", "--dry-run", "--json")
    assert other.json()["recipe"] == found["recipe"]


def test_an_audit_leaves_out_what_they_were_chosen_on(town: Town) -> None:
    from expunge.pipeline.config import UnlearnConfig
    from expunge.pipeline.tuned import unseen

    config = UnlearnConfig(model="m", forget="f", method=METHOD, settings="demo")
    listed = json.loads((folder("demo") / USED).read_text(encoding="utf-8"))["sets"]
    records = load(town.forget, name="forget")
    mine = json.loads(used_text({"forget": records}))["sets"]["forget"]["keys"]
    assert not set(mine) & {k for held in listed.values() for k in held["keys"]}, "other people than those of the sweep"
    place = Path(config.tuned.sweep) if config.tuned else Path()
    sets, notes = unseen(place, None, {"forget": records}, leave_out=str(place))
    assert len(sets["forget"]) == len(records)
    assert notes == []
    assert all(key_of(r) in mine for r in records)


def test_what_is_not_there_is_said_with_what_is(expunge: Run, town: Town, tmp_path: Path) -> None:
    request = ["unlearn", *town.request(tmp_path / "out")]
    refused(expunge(*request, "--settings", "large"), "no set of settings 'large'", *names())
    refused(expunge(*request, "--settings", "demo", "--method", "retrain"), "hold nothing for the method 'retrain'", "npo")
    refused(expunge("unlearn", "digits.py:problem", "--class", "3", "--settings", "demo", "--out", "o"), "for language models")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("settings: demo\n", encoding="utf-8")
    words = ["sweep", town.target, "--forget", town.forget, "--retain", town.retain, "--method", "npo", "--retrain", 1]
    refused(expunge(*words, "--config", sweep, "--out", "s"), "chooses 'settings' itself")
    assert not (tmp_path / "out").exists()
