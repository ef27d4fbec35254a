"""Audits of runs on rows by the command line: the verdicts, what is kept, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import Done, Run, content, refused
from tests.entries import DIGITS, FIXED, RETRAIN, Desk, write_entry

FAST = ["budget=100"]


@pytest.fixture(scope="module")
def audited(desk: Desk) -> tuple[Path, dict]:
    """A run that changes next to nothing, audited against three retrained models and four pairs of further ones."""
    run = desk.made("nothing", "--method", "finetune", FIXED % (1e-7, 1))
    done = desk.run("audit", run.name, "--retrain", 3, "--references", 4, *FAST, "--json")
    assert done.code == 0, done.err
    return run, done.json()


def verdicts(run: Path) -> dict[str, str]:
    held = json.loads((run / "audit.json").read_text())
    return {m["label"]: m["judgement"]["verdict"] for m in held["models"] if m["judgement"]}


def test_target_and_what_equals_it_are_not_forgotten(audited: tuple[Path, dict]) -> None:
    found = verdicts(audited[0])
    assert found["target"] == "not forgotten"
    assert found["finetune"] == "not forgotten"
    assert {"retrained seed 1", "retrained seed 2", "retrained seed 3"} <= set(found)
    shown = json.dumps(audited[1])
    for verdict in set(found.values()):
        assert verdict in shown
    held = json.loads((audited[0] / "audit.json").read_text())
    forget = {m["label"]: m for m in held["models"]}
    assert forget["finetune"]["cost"]["steps"] == 1
    assert "class '3'" in held["not_shown"][0]


def test_retraining_by_the_same_recipe_is_not_called_unforgotten(desk: Desk) -> None:
    run = desk.made("retrain", *RETRAIN)
    done = desk.run("audit", run.name, "--retrain", 3, *FAST)
    assert done.code == 0, done.err
    assert "audit.json" in done.out
    found = verdicts(run)
    assert found["target"] == "not forgotten"
    assert found["retrain"] != "not forgotten"
    assert found["retrain"] != "no gold standard"


def test_without_retrained_models_nothing_is_called_forgotten(desk: Desk, audited: tuple[Path, dict]) -> None:
    run = desk.made("bare", "--method", "finetune", FIXED % (1e-7, 2))
    assert desk.run("audit", run.name, *FAST).code == 0
    assert set(verdicts(run).values()) <= {"no gold standard", "not forgotten"}
    assert verdicts(run)["finetune"] == "no gold standard"


def test_a_second_audit_does_nothing_and_a_requirement_is_an_exit_code(desk: Desk, audited: tuple[Path, dict]) -> None:
    run, told = audited
    before = content(run)
    words = ["audit", run.name, "--retrain", 3, "--references", 4, *FAST]
    again = desk.run(*words, "--require", "forgotten")
    assert again.code == 3
    assert "nothing has changed since" in again.err
    assert desk.run(*words, "--require", "not forgotten", "--json").json() == told
    assert content(run) == before


def test_dry_run(desk: Desk, audited: tuple[Path, dict]) -> None:
    before = content(desk.folder)
    done = desk.run("audit", "nothing", "--retrain", 4, "--references", 5, "--dry-run")
    assert done.code == 0
    assert "6 models, 4 of them retrained, 10 reference models" in done.err
    assert content(desk.folder) == before


def test_report_and_comparison(desk: Desk, audited: tuple[Path, dict]) -> None:
    bare = desk.made("other", "--method", "finetune", FIXED % (1e-7, 3))
    assert desk.run("audit", bare.name, "--retrain", 3, *FAST).code == 0
    done = desk.run("report", "nothing", "--out", "page.html")
    assert done.code == 0, done.err
    page = (desk.folder / "page.html").read_text(encoding="utf-8")
    assert "not forgotten" in page
    assert "finetune on digits.py:problem" in page
    assert 'src="http' not in page, "the page is read offline"
    compared = desk.run("compare", "nothing", "other", "--json")
    assert compared.code == 0, compared.err
    assert "finetune" in json.dumps(compared.json())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], ["'nowhere' is no run folder", "--out"]),
        (["nothing", "--retrain", -1], ["'retrain'", "[0, 100]"]),
        (["nothing", "--references", 5000], ["'references'", "[0, 1000]"]),
        (["nothing", "--workers", "rays"], ["'workers'", "local, ray"]),
        (["nothing", "--require", "gone"], ["'gone' is no verdict", "forgotten"]),
        (["nothing", "--base", "b"], ["--base is for language models", "--retrain"]),
        (["nothing", "--utility", "a=b"], ["--utility is for language models"]),
        (["nothing", "--retrained", "b"], ["--retrained is for language models"]),
        (["nothing", "budgt=3"], ["budgt", "budget"]),
        (["nothing", "budget=-3"], ["budget"]),
    ],
)
def test_bad_input(desk: Desk, audited: tuple[Path, dict], words: list[object], says: list[str]) -> None:
    before = content(desk.folder)
    refused(desk.run("audit", *words), *says)
    assert content(desk.folder) == before


def test_what_has_changed_since_the_run(expunge: Run, tmp_path: Path) -> None:
    entry = write_entry(tmp_path)
    assert expunge("unlearn", entry, "--class", 3, "--method", "ssd", "--out", "out").code == 0

    def ask(change: tuple[str, str]) -> Done:
        assert change[0] in DIGITS
        write_entry(tmp_path, DIGITS.replace(*change))
        return expunge("audit", "out", "--retrain", 1, *FAST)

    refused(ask(("inputs[:300], labels", "inputs[:300] * 0.99, labels")), "data have changed", "Put them back")
    refused(ask(('f"row{i}"', 'f"line{i}"')), "data have changed")
    refused(ask(("steps=100", "steps=90")), "not the one that was unlearned", "put the model back")
    refused(ask(("nn.Linear(64, 32)", "nn.Linear(64, 32, bias=False)")), "not the one that was unlearned")
    (tmp_path / "digits.py").unlink()
    refused(expunge("audit", "out"), "no file 'digits.py'")
    write_entry(tmp_path)
    (tmp_path / "out" / "model" / "model.safetensors").write_bytes(b"broken")
    refused(expunge("audit", "out", "--retrain", 1), "not what the run has written", "again")
    assert not (tmp_path / "out" / "audit.json").exists()


HELD = """
def held():
    import torch

    torch.manual_seed(0)
    data, unseen = tables()
    return expunge.Supervised(data=data, holdout=unseen, model=network())
"""


def test_no_way_to_retrain(expunge: Run, tmp_path: Path) -> None:
    write_entry(tmp_path, DIGITS + HELD)
    done = expunge("unlearn", "digits.py:held", "--class", 3, "--method", "ssd", "--out", "out")
    assert done.code == 0, done.err
    for words in (["--retrain", 1], ["--references", 3]):
        refused(expunge("audit", "out", *words), "Nothing says how the model was trained", "build=")
    assert expunge("audit", "out", *FAST).code == 0
    assert verdicts(tmp_path / "out")["ssd"] == "no gold standard"
