"""Several requests in order: checked before the first, each from the model after the last, all audited, resumable."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from expunge.audit.document import AuditDocument
from expunge.core.files import digest_file
from expunge.core.runs import Run as RunFolder
from expunge.pipeline.audit import read_all
from tests.command import Run, Town, content, refused, rows, start, stop_when, write_rows

QUICK = [
    "schedule=fixed", "schedule.lr=0.002", "schedule.epochs=null", "schedule.steps=12", "schedule.warmup=0",
    "engine.checkpoint_every=2", "audit.relearn=none", "audit.quantise=[]", "audit.metrics=[loss,probability]", "audit.draws=200",
]  # fmt: skip


def subjects(*numbers: int) -> list[str]:
    return [f"person-{n:04d}" for n in numbers]


@pytest.fixture
def everything(tmp_path: Path) -> Path:
    """What the model was trained on, in one file."""
    return write_rows(tmp_path / "all.jsonl", [*rows("forget"), *rows("rest")])


def requests(folder: Path, *lines: object) -> Path:
    path = folder / "requests.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def three(town: Town, folder: Path) -> Path:
    third = [r for r in rows("rest") if r["subject"] == "person-0006"]
    assert third
    write_rows(folder / "third.jsonl", third)
    return requests(
        folder,
        {"id": "first", "subjects": subjects(0, 1)},
        {"id": "second", "subjects": subjects(2)},
        "",
        {"id": "third", "forget": str(folder / "third.jsonl")},
    )


def words(town: Town, path: Path, everything: Path) -> list[object]:
    sets = ["--requests", path, "--retain", everything, "--holdout", town.holdout, "--out", "many"]
    return ["unlearn", town.target, *sets, "--method", "graddiff", *QUICK]


def test_each_starts_from_the_last_and_is_audited_again(expunge: Run, town: Town, tmp_path: Path, everything: Path) -> None:
    """Killed in the middle of the second request, gone on with, and equal to a sequence that was not."""
    path = three(town, tmp_path)
    command = words(town, path, everything)
    out = tmp_path / "many"
    second = out / "02-second"
    stop_when(start(*command, cwd=tmp_path), (second / "checkpoint" / "process-0").is_dir, signal.SIGKILL)
    assert not (second / "model").exists()
    refused(expunge(*command), "not empty", "--resume")
    done = expunge(*command, "--resume", "--json")
    assert done.code == 0, done.err
    found = done.json()
    assert [r["id"] for r in found["requests"]] == ["first", "second", "third"]
    assert all(r["reached"] for r in found["requests"])
    folders = [out / f"0{n}-{name}" for n, name in enumerate(("first", "second", "third"), 1)]
    targets = [RunFolder.open(f).manifest["inputs"]["target"] for f in folders]
    assert [t["source"] for t in targets] == [str(town.target), *(str(Path("many") / f.name) for f in folders[:2])]
    assert len({t["digest"] for t in targets}) == 3
    sizes = [[RunFolder.open(f).manifest["inputs"][k]["records"] for k in ("forget", "retain")] for f in folders]
    assert sizes == [[8, 72], [4, 68], [4, 64]]  # what was forgotten leaves the retain set for good
    documents = read_all([out])
    assert [[m.label for m in d.models if m.role == "unlearned"] for d in documents] == [
        ["after first", "after second", "after third"], ["after second", "after third"], ["after third"],
    ]  # fmt: skip
    for folder, document in zip(folders, documents, strict=True):
        assert AuditDocument.model_validate_json((folder / "audit.json").read_text()) == document
    check_losses(documents)
    reads(expunge, out, tmp_path)
    # the same without a kill
    other = [*command, "--json"]
    other[other.index("many")] = "whole"
    assert expunge(*other).code == 0
    for folder in folders:
        twin = tmp_path / "whole" / folder.name
        assert digest_file(twin / "model" / "model.safetensors") == digest_file(folder / "model" / "model.safetensors")


def check_losses(documents: list[AuditDocument]) -> None:
    """The target knows what is asked for; the model right after a request does not."""
    for document in documents:
        target, after = document.models[0], next(m for m in document.models if m.role == "unlearned")
        key = next(k for k in target.numbers if k.startswith("forget.") and "loss" in k)
        before, later = target.numbers[key].value, after.numbers[key].value
        assert before is not None
        assert later is not None
        assert later > before + 1


def reads(expunge: Run, out: Path, folder: Path) -> None:
    """Report and comparison take the folder of the sequence; an audit of a part points to the whole."""
    assert expunge("report", out).code == 0
    page = (out / "report.html").read_text()
    assert all(f"Request {name}" in page for name in ("first", "second", "third"))
    tables = expunge("compare", out, "--json").json()["requests"]
    assert [len(t["rows"]) for t in tables] == [3, 2, 1]  # models after later requests are no seeds of the first
    assert "after=second" in tables[0]["rows"][1]["label"] + tables[0]["rows"][0]["label"] + tables[0]["rows"][2]["label"]
    refused(expunge("audit", out), "as a whole", "--resume --retrain 3")
    refused(expunge("audit", out / "01-first"), "as a whole", "--resume --retrain 3")


def test_goal_not_reached_is_exit_code_3_and_nothing_is_done_twice(
    expunge: Run, town: Town, tmp_path: Path, everything: Path
) -> None:
    path = requests(tmp_path, {"id": "one", "subjects": subjects(0)}, {"id": "two", "subjects": subjects(1)})
    command = words(town, path, everything)
    at = command.index("schedule=fixed")
    command[at : at + 5] = ["schedule.lr=1e-6", "schedule.steps=2", "schedule.epochs=0.5"]
    done = expunge(*command, "--json")
    assert done.code == 3, done.err
    assert [r["reached"] for r in done.json()["requests"]] == [False, False]
    again = expunge(*command, "--resume")
    assert again.code == 3
    for said in ("one: from an earlier run", "two: from an earlier run", "audit of request one: from an earlier run"):
        assert said in again.err
    refused(expunge(*command, "--seed", "5", "--resume"), "other settings", "engine")
    requests(tmp_path, {"id": "one", "subjects": subjects(0)}, {"id": "two", "subjects": subjects(2)})
    refused(expunge(*command, "--resume"), "other settings", "requests")


def test_dry_run_prices_all_requests(expunge: Run, town: Town, tmp_path: Path, everything: Path) -> None:
    path = three(town, tmp_path)
    before = content(tmp_path)
    done = expunge(*words(town, path, everything), "--dry-run", "--json").json()
    assert done["cost"]["steps"] == 36
    assert [r["forget"] for r in done["requests"]] == [8, 4, 4]
    assert content(tmp_path) == before


GOOD = {"id": "good", "subjects": subjects(0)}


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([GOOD, "{no json"], ["line 2", "no JSON"]),
        ([GOOD, "", [1]], ["line 3", "JSON object"]),
        ([GOOD, {"id": "b", "subject": subjects(1)}], ["line 2", "'subject'", "'subjects'"]),
        ([GOOD, {"id": "good", "subjects": subjects(1)}], ["line 2", "'good'", "earlier line"]),
        ([GOOD, {"id": "b", "subjects": ["person-00010"]}], ["line 2", "'person-00010'", "person-0010"]),
        ([GOOD, {"id": "b", "ids": ["person-0001-birthplac"]}], ["line 2", "'person-0001-birthplac'", "person-0001-birthplace"]),
        ([GOOD, {"id": "b", "subjects": subjects(0)}], ["line 2", "person-0000", "earlier request"]),
        ([GOOD, {"id": "b", "subjects": []}], ["line 2", "not empty"]),
        ([GOOD, {"id": "b"}], ["line 2", "exactly one"]),
        ([GOOD, {"id": "b/../c", "subjects": subjects(1)}], ["line 2", "'id'"]),
        ([GOOD, {"id": "b", "forget": "nowhere.jsonl"}], ["line 2", "nowhere.jsonl"]),
        ([], ["holds no request"]),
    ],
)
def test_wrong_requests_before_anything_starts(
    expunge: Run, town: Town, tmp_path: Path, everything: Path, lines: list[object], says: list[str]
) -> None:
    refused(expunge(*words(town, requests(tmp_path, *lines), everything)), *says)
    assert not (tmp_path / "many").exists()


def test_later_requests_are_checked_whole(expunge: Run, town: Town, tmp_path: Path, everything: Path) -> None:
    """A text that is too long in the last request, and what a sequence needs, are told before the first begins."""
    long = write_rows(tmp_path / "long.jsonl", [{"question": "Who?", "answer": "very " * 600}])
    path = requests(tmp_path, GOOD, {"id": "b", "forget": str(long)})
    refused(expunge(*words(town, path, everything)), "tokens", "text.truncate=true")
    good = requests(tmp_path, GOOD)
    refused(expunge("unlearn", town.target, "--requests", good, "--out", "many"), "--retain DATA")
    refused(expunge("unlearn", "--requests", good, "--retain", everything, "--out", "many"), "MODEL")
    refused(expunge(*words(town, good, everything), "--forget", town.forget), "exclude each other")
    refused(expunge(*words(town, tmp_path / "none.jsonl", everything)), "none.jsonl")
    refused(expunge(*words(town, good, everything), "audit.budgte=3"), "'budgte'", "'budget'")
    plain = ["unlearn", town.target / "model", "--requests", good, "--retain", everything, "--out", "many", "--retrain", "1"]
    refused(expunge(*plain), "was trained", "--base MODEL")
    used = tmp_path / "many"
    used.mkdir()
    (used / "letter.txt").write_text("dear diary")
    refused(expunge(*words(town, good, everything)), "not empty")
    assert [p.name for p in used.iterdir()] == ["letter.txt"]
