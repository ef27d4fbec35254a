"""Sweeps in real processes: killed, resumed and done by several workers they choose the same, to the bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from expunge import load
from expunge.core.files import digest_file
from expunge.pipeline.tuned import used_text
from tests.command import Run, Town, cold, refused, rows, start, stop_when, write_rows
from tests.entries import Desk, desk

__all__ = ["desk"]

FIXED = "npo:schedule={name: fixed, lr: 0.003, steps: 30, batch: 20, warmup: 0, decay: constant}"
WORDS = [
    "sweep", "digits.py:problem", "--where", "page < 2", "--method", "npo", "--method", "ssd", FIXED, "engine.checkpoint_every=5",
    "--trials", "4", "--bound", "0.4", "--search", "alpha=1..30:log",
]  # fmt: skip
SSD = ["sweep", "digits.py:problem", "--where", "page < 2", "--method", "ssd", "--trials", "9", "--bound", "1", "--workers", "1"]
TPE = [*SSD, "--sampler", "tpe", "--at-once", "2"]


def found(folder: Path) -> dict[str, Any]:
    """What a sweep found, without what it cost and the name of its folder."""
    held = json.loads((folder / "sweep.json").read_text())
    for method in held["methods"]:
        for trial in method["trials"]:
            assert trial.pop("cost") is not None
    files = {p.relative_to(folder).as_posix(): p.read_text() for p in [folder / "chosen.yaml", *(folder / "settings").iterdir()]}
    settings = {name: {**yaml.safe_load(text), "tuned": None} for name, text in files.items()}
    losses = {p.parent.name: {**json.loads(p.read_text()), "cost": None} for p in folder.glob("trials/*/trial.json")}
    return {**held, "files": settings, "raw": losses, "used": [held["used"], digest_file(folder / "used.json")]}


def ended(folder: Path) -> int:
    return len(list(folder.glob("trials/*/trial.json")))


def in_the_middle(folder: Path) -> bool:
    return any(folder.glob("trials/npo-*/checkpoint/process-0/state.json"))


@pytest.fixture(scope="module")
def whole(desk: Desk) -> dict[str, Any]:
    """A sweep without interruption, its trials one after the other."""
    done = desk.run(*WORDS, "--workers", 1, "--out", "whole")
    assert done.code == 0, done.err
    return found(desk.folder / "whole")


def test_every_method_has_the_same_budget_and_its_own_setting_first(whole: dict[str, Any]) -> None:
    assert [m["method"] for m in whole["methods"]] == ["npo", "ssd"]
    for method in whole["methods"]:
        assert [t["index"] for t in method["trials"]] == [0, 1, 2, 3]
        assert method["trials"][0]["values"] == {}
        assert [t["seed"] for t in method["trials"]] == [10000, 10001, 10002, 10003]
        assert len({json.dumps(t["values"]) for t in method["trials"]}) == 4
        assert all(set(t["values"]) == set(method["ranges"]) for t in method["trials"][1:])
    assert whole["methods"][1]["ranges"]["alpha"] == "1..30:log"
    assert whole["counts"]["forget"] + whole["counts"]["forget for the audit"] == 100
    assert "schedule.lr" not in whole["methods"][0]["ranges"]  # given


def test_the_choice_follows_the_rule(whole: dict[str, Any]) -> None:
    for method in whole["methods"]:
        allowed = [t for t in method["trials"] if t["lost"] is not None and t["lost"] <= 0.4]
        wanted = min(allowed, key=lambda t: t["distance"])["index"] if allowed else None
        assert method["chosen"] == wanted
    distances = {t["distance"] for m in whole["methods"] for t in m["trials"]}
    assert min(distances) < 0.4  # something was forgotten
    assert len(distances) > 4  # settings matter


def test_killed_sweep_resumes_to_the_same_result(desk: Desk, whole: dict[str, Any]) -> None:
    out = desk.folder / "killed"
    words = [*WORDS, "--workers", 1, "--out", "killed"]
    desk.kill_when(lambda: in_the_middle(out), *words)
    before = ended(out)
    assert before < 4
    refused(desk.run(*words), "not empty", "--resume")
    refused(desk.run("report", "killed"), "has not finished", "--resume")
    desk.kill_when(lambda: ended(out) >= before + 2, *words, "--resume")
    kept = {p: p.stat().st_mtime_ns for p in out.glob("trials/*/trial.json")}
    resumed = desk.run(*words, "--resume", "--json")
    assert resumed.code == 0, resumed.err
    assert found(out) == whole
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())  # what was done is not done again
    assert not list(out.glob("trials/*/checkpoint"))
    again = desk.run(*words, "--resume")
    assert again.code == 0
    assert found(out) == whole


@pytest.mark.distributed
def test_two_workers_find_the_same_and_die_with_their_parent(desk: Desk, whole: dict[str, Any]) -> None:
    out = desk.folder / "two"
    words = [*WORDS, "--workers", 2, "--out", "two"]
    process = start(*words, cwd=desk.folder, EXPUNGE_CACHE=str(desk.folder / "cache"))
    children: list[psutil.Process] = []

    def ready() -> bool:
        children[:] = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        return ended(out) >= 1

    assert stop_when(process, ready, signal.SIGKILL).code == -signal.SIGKILL
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    assert ended(out) < 8
    done = desk.run(*words, "--resume")
    assert done.code == 0, done.err
    assert found(out) == whole


@pytest.mark.slow
@pytest.mark.distributed
def test_ray_workers_find_the_same(desk: Desk, whole: dict[str, Any]) -> None:
    pytest.importorskip("ray")
    # A new interpreter: Ray does not work in a fork of a process that has threads.
    done = cold(*WORDS, "--workers", "ray", "--out", "ray", cwd=desk.folder, EXPUNGE_CACHE=str(desk.folder / "cache"))
    assert done.code == 0, done.err
    assert found(desk.folder / "ray") == whole


def test_tpe_resumes_to_the_same_settings(desk: Desk) -> None:
    pytest.importorskip("optuna")
    assert desk.run(*TPE, "--out", "tpe").code == 0
    out = desk.folder / "tpe-killed"
    desk.kill_when(lambda: ended(out) >= 6, *TPE, "--out", "tpe-killed")
    assert desk.run(*TPE, "--out", "tpe-killed", "--resume").code == 0
    held = found(out)
    assert held == found(desk.folder / "tpe")
    drawn = [t["values"] for t in held["methods"][0]["trials"]]
    random = desk.run(*SSD, "--out", "random", "--json").json()
    others = [t["values"] for t in random["methods"][0]["trials"]]
    assert drawn[:5] == others[:5]  # a start at random
    assert drawn[5:] != others[5:]


def test_chosen_settings_run_as_they_are_and_the_audit_judges_on_the_rest(desk: Desk, whole: dict[str, Any]) -> None:
    done = desk.run("unlearn", "--config", "whole/chosen.yaml", "--out", "final")
    assert done.code in (0, 3), done.err
    recipe = json.loads((desk.folder / "final" / "manifest.json").read_text())["stages"]["unlearn"]["result"]["recipe"]
    best = next(m for m in whole["methods"] if m["method"] == whole["best"])
    values = best["trials"][best["chosen"]]["values"]
    assert recipe["name"] == whole["best"]
    if whole["best"] == "ssd":
        assert {k: recipe[k] for k in values} == values
    quick = ["relearn=none", "quantise=[]", "metrics=[accuracy]", "read_out=false"]
    first = desk.run("audit", "final", *quick)
    assert first.code == 0, first.err
    held = json.loads((desk.folder / "final" / "audit.json").read_text())
    assert held["data"]["forget"]["records"] == whole["counts"]["forget for the audit"]
    assert held["data"]["retain"]["records"] == whole["counts"]["retain to train on"]
    assert held["not_shown"][0].startswith(
        f"The settings were chosen by a sweep on {whole['counts']['forget']} of 100 forget records"
    )
    every = desk.run("audit", "final", *quick, "--all-records")
    assert "look better than they are" in every.err
    held = json.loads((desk.folder / "final" / "audit.json").read_text())
    assert held["data"]["forget"]["records"] == 100
    assert "look better than they are" in held["not_shown"][0]


def test_the_page_and_the_terminal_show_the_front_and_the_rule(desk: Desk, whole: dict[str, Any]) -> None:
    page = (desk.folder / "whole" / "sweep.html").read_text()
    used = json.loads((desk.folder / "whole" / "sweep.json").read_text())["used"]
    for word in ("★", "◆", "nearest", "<svg", *(held["digest"] for held in used.values())):
        assert word in page
    assert page.count("<tr>") >= 8 + 2  # all trials, not the front alone
    assert "http://" not in page.replace("http://www.w3.org", "")
    told = desk.run("report", "whole", "--out", "again.html")
    assert told.code == 0, told.err
    assert (desk.folder / "again.html").read_text() == page


def test_dry_run_tells_ranges_and_cost_and_writes_nothing(desk: Desk) -> None:
    done = desk.run(*WORDS, "--trials", 7, "--out", "dry", "--dry-run", "--json").json()
    assert not (desk.folder / "dry").exists()
    assert done["cost"]["trials"] == 14
    assert done["cost"]["methods"]["npo"]["steps"] == 7 * 30
    assert done["ranges"]["ssd"] == {"alpha": "1..30:log", "dampening": "0.1..5:log"}


def test_a_file_says_the_same(desk: Desk, whole: dict[str, Any]) -> None:
    config = {
        "model": "digits.py:problem", "where": "page < 2", "engine": {"checkpoint_every": 5}, "methods": ["npo", "ssd"],
        "trials": 4, "bound": 0.4, "search": {"alpha": "1..30:log"},
        "own": {"npo": {"schedule": {"name": "fixed", "lr": 0.003, "steps": 30, "batch": 20, "warmup": 0, "decay": "constant"}}},
    }  # fmt: skip
    (desk.folder / "sweep.yaml").write_text(yaml.safe_dump(config))
    dry = [desk.run("sweep", *w, "--out", "dry", "--dry-run", "--json").json() for w in (["--config", "sweep.yaml"], WORDS[1:])]
    assert dry[0]["ranges"] == dry[1]["ranges"]
    assert dry[0]["cost"] == dry[1]["cost"]


BAD = [
    ((), ["--search", "bteta=1..2"], ["'bteta'", "Did you mean"]),
    ((), ["--search", "beta=0.5..0.1"], ["is empty"]),
    ((), ["--search", "beta"], ["names no range"]),
    ((), ["--search", "scrub:beta=0.1..1"], ["'scrub'", "Known: npo, ssd"]),
    ((), ["--search", "npo:beta=-1..1"], ["beta", "must be a float"]),
    ((), ["beta=0.2", "--search", "beta=0.1..1"], ["no ssd parameter"]),
    ((), ["npo:beta=0.2", "--search", "beta=0.1..1"], ["given and searched"]),
    (("--search", "alpha=1..30:log"), ["--only-given", "--search", "beta=0.1..1"], ["'ssd'", "nothing to search"]),
    ((), ["--method", "npo"], ["named twice"]),
    ((), ["--method", "sisa"], ["sisa"]),
    ((), ["--workers", "many"], ["no number of workers"]),
    ((), ["--address", "here:1"], ["--workers ray"]),
    ((), ["--rule", "best"], ["rule", "nearest"]),
    ((), ["--trials", "0"], ["trials"]),
    ((), ["--forget-share", "0"], ["forget_share"]),
    ((), ["--retrained", "runs/x"], ["--retrained is for language models"]),
    (("--where", "page < 2"), ["--id", "row17", "--id", "row18"], ["too small to be divided", "1 subject", "stand-in"]),
]  # fmt: skip


@pytest.mark.parametrize(("without", "words", "said"), BAD, ids=[" ".join(w) for _, w, _ in BAD])
def test_bad_input_is_refused_before_anything_starts(desk: Desk, without, words: list[str], said: list[str]) -> None:
    given = [w for w in WORDS if w not in without]
    refused(desk.run(*given, *words, "--out", "bad"), *said)
    assert not (desk.folder / "bad").exists()


def test_another_sweep_in_the_folder_is_refused(desk: Desk, whole: dict[str, Any]) -> None:
    refused(desk.run(*WORDS, "--seed", 1, "--out", "whole", "--resume"), "other settings")
    refused(desk.run(*WORDS), "No folder")
    refused(desk.run("sweep", "digits.py:problem", "--where", "page < 2", "--out", "x"), "No method")


# ---- language models


def test_people_are_forgotten_by_halves_and_audited_on_the_others(expunge: Run, town: Town, tmp_path: Path) -> None:
    words = [
        "sweep", *town.request("out"), "--holdout", town.holdout, "--method", "graddiff", "--method", "npo", "--trials", 2,
        "--workers", 1, "schedule.steps=60", "schedule.epochs=1", "schedule.lr=0.001", "--bound", "0.6", "--json",
    ]  # fmt: skip
    done = expunge(*words)
    assert done.code in (0, 3), done.err
    held = done.json()
    assert held["counts"]["forget"] == held["counts"]["forget for the audit"] == 8
    distances = [t["distance"] for m in held["methods"] for t in m["trials"]]
    assert max(distances) < 0.95, distances
    assert held["best"]
    final = expunge("unlearn", "--config", "out/chosen.yaml", "--out", "final")
    assert final.code in (0, 3), final.err
    quick = ["relearn=none", "quantise=[]", "metrics=[probability]"]
    assert expunge("audit", "final", *quick).code == 0
    data = json.loads((tmp_path / "final" / "audit.json").read_text())["data"]
    assert data["forget"]["records"] == 8
    assert data["forget"]["digest"] != digest_file(town.forget)
    plan = json.loads((tmp_path / "out" / "used.json").read_text())["sets"]
    assert plan["forget"]["records"] == 8


def test_requests_in_order_leave_out_what_was_chosen_on(expunge: Run, town: Town, tmp_path: Path) -> None:
    held = load(str(town.forget), name="forget")
    names = sorted(set(held.clusters()))
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "used.json").write_text(used_text({"forget": [r for r in held if r.subject == names[0]]}))
    tuned = {"sweep": "sweep", "digest": digest_file(tmp_path / "sweep" / "used.json")}
    (tmp_path / "chosen.json").write_text(json.dumps({"method": "graddiff", "tuned": tuned}))
    every = write_rows(tmp_path / "all.jsonl", [*rows("forget"), *rows("rest")])
    request = tmp_path / "requests.jsonl"
    words = [
        "unlearn", town.target, "--config", "chosen.json", "--requests", request, "--retain", every, "--out", "out",
        "schedule.steps=5", "schedule.epochs=1", "schedule.lr=0.001", "audit.relearn=none", "audit.quantise=[]",
        "audit.metrics=[probability]",
    ]  # fmt: skip
    request.write_text(json.dumps({"id": "one", "subjects": names[:1]}) + "\n")
    refused(expunge(*words, "--dry-run"), "none would be left to judge by", "'one'")
    request.write_text(json.dumps({"id": "both", "subjects": names[:2]}) + "\n")
    done = expunge(*words)
    assert done.code in (0, 3), done.err
    document = json.loads((tmp_path / "out" / "01-both" / "audit.json").read_text())
    assert document["data"]["forget"]["records"] == 4
    assert "4 of 8 forget records" in document["not_shown"][0]
