"""Unlearned models joined to one, by real processes; the result is audited like any other run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from expunge.core.runs import Run as RunFolder
from expunge.data.records import Record
from expunge.data.shapes import records_of, row_of
from tests.command import Run, Town, content, refused, rows, write_rows

QUICK = ["schedule=fixed", "schedule.lr=0.002", "schedule.epochs=null", "schedule.steps=8", "schedule.warmup=0"]
AUDIT = ["relearn=none", "quantise=[]", "metrics=[loss,probability]", "draws=200"]


def two_runs(expunge: Run, town: Town, folder: Path) -> None:
    """Two requests on one target, each with everything else to keep; and one of another method on the first."""
    everything = [*rows("forget"), *rows("rest")]
    for name, people in (("a", {"person-0000"}), ("b", {"person-0001", "person-0002"})):
        write_rows(folder / f"{name}.jsonl", [r for r in everything if r["subject"] in people])
        write_rows(folder / f"{name}-rest.jsonl", [r for r in everything if r["subject"] not in people])
        words = ["--forget", f"{name}.jsonl", "--retain", f"{name}-rest.jsonl", "--holdout", town.holdout]
        done = expunge("unlearn", town.target, *words, "--method", "graddiff", "--out", f"run-{name}", *QUICK)
        assert done.code == 0, done.err


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_runs_of_different_requests_are_joined_and_audited(expunge: Run, town: Town, tmp_path: Path) -> None:
    two_runs(expunge, town, tmp_path)
    before = content(tmp_path)
    dry = expunge("merge", "run-a", "run-b", "--how", "linear", "--out", "both", "--dry-run", "--json").json()
    assert dry["sets"] == {"forget": 12, "retain": 68, "holdout": len(rows("holdout"))}
    assert content(tmp_path) == before
    done = expunge("merge", "run-a", "run-b", "--how", "linear", "--out", "both", "weights=[1.0,0.5]", "--json")
    assert done.code == 0, done.err
    assert done.json()["steps"] == 16
    start, a, b, both = (weights(f) for f in (town.target, tmp_path / "run-a", tmp_path / "run-b", tmp_path / "both"))
    for name, value in both.items():
        wanted = start[name] + (a[name] - start[name]) + 0.5 * (b[name] - start[name])
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)
    assert any(not torch.equal(both[n], start[n]) for n in both)
    forgotten = [json.loads(line) for line in (tmp_path / "both" / "forget.jsonl").read_text().splitlines()]
    assert {r["subject"] for r in forgotten} == {"person-0000", "person-0001", "person-0002"}
    assert forgotten[0]["perturbed_answer"]
    audited = expunge("audit", "both", *AUDIT, "--json")
    assert audited.code == 0, audited.err
    document = json.loads((tmp_path / "both" / "audit.json").read_text())
    last = document["models"][-1]
    assert (last["label"], last["role"]) == ("merge-linear", "unlearned")
    assert last["cost"]["steps"] == 16
    assert document["data"]["forget"]["records"] == 12
    assert expunge("report", "both").code == 0
    again = expunge("merge", "run-a", "run-b", "--how", "linear", "--out", "both", "weights=[1.0,0.5]", "--resume", "--json")
    assert again.json()["reused"] is True
    ties = expunge("merge", "run-a", "run-b", "--how", "ties", "--out", "ties", "density=0.5")
    assert ties.code == 0, ties.err
    assert RunFolder.open(tmp_path / "ties").manifest["stages"]["unlearn"]["result"]["recipe"]["merge"]["density"] == 0.5
    assert any(not torch.equal(weights(tmp_path / "ties")[n], both[n]) for n in both)
    refused_runs(expunge, town, tmp_path)


def refused_runs(expunge: Run, town: Town, folder: Path) -> None:
    refused(expunge("merge", "run-a", "--out", "x"), "1 runs", "needs two")
    refused(expunge("merge", "run-a", "run-b"), "--out RUN")
    refused(expunge("merge", "run-a", "run-a", "--out", "x"), "named twice")
    refused(expunge("merge", "run-a", "nowhere", "--out", "x"), "nowhere")
    refused(expunge("merge", "run-a", town.target, "--out", "x"), "'train'")
    refused(expunge("merge", "run-a", "run-b", "--how", "tise", "--out", "x"), "how")
    refused(expunge("merge", "run-a", "run-b", "--out", "x", "weights=[1,2,3]"), "3 weights for 2 models")
    refused(expunge("merge", "run-a", "run-b", "--out", "x", "densty=1"), "densty", "density")
    refused(expunge("merge", "run-a", "run-b", "--out", "both"), "not empty")
    after = ["--forget", "b.jsonl", "--retain", "b-rest.jsonl", "--method", "graddiff", "--out", "later", *QUICK]
    assert expunge("unlearn", "run-a", *after).code == 0
    refused(expunge("merge", "run-b", "later", "--out", "x"), "'run-a'", "one and the same model")
    write_rows(folder / "b.jsonl", [r for r in [*rows("forget"), *rows("rest")] if r["subject"] == "person-0001"])
    refused(expunge("merge", "run-a", "run-b", "--out", "x"), "forget data have changed")
    assert not (folder / "x").exists()


def test_a_record_written_as_a_row_is_read_as_it_was() -> None:
    records = [
        Record(
            "r1", "A.", "Q?", subject="s", paraphrase="B.", perturbed=("x", "y"), question_paraphrase="P?", alternatives=("z",)
        ),
        Record("r2", " B", "A", verbatim=True),
        Record("r3", "Long text."),
        Record("r4", "Yes.", messages=(("system", "Be brief."), ("user", "Well?"))),
    ]
    for record in records:
        assert records_of([("line 1", row_of(record))], "f") == [record]
