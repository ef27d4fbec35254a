"""Requests whose task vectors add up: in a sequence, or one by one on the runs that came before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from expunge.core.files import digest_file
from expunge.core.runs import Run as RunFolder
from tests.command import Run, Town, refused, rows, write_rows

QUICK = [
    "schedule=fixed", "schedule.lr=0.002", "schedule.epochs=null", "schedule.steps=6", "schedule.warmup=0", "finish.scale=2.0",
]  # fmt: skip
AUDIT = ["audit.relearn=none", "audit.quantise=[]", "audit.metrics=[loss,probability]", "audit.draws=200"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_sequence_finds_its_origin_and_so_does_a_request_on_a_run(expunge: Run, town: Town, tmp_path: Path) -> None:
    shutil.copytree(town.target, tmp_path / "target")
    everything = [*rows("forget"), *rows("rest")]
    write_rows(tmp_path / "all.jsonl", everything)
    asked = [{"id": "one", "subjects": ["person-0000"]}, {"id": "two", "subjects": ["person-0001"]}]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(r) + "\n" for r in asked))
    words = ["unlearn", "target", "--requests", "requests.jsonl", "--retain", "all.jsonl", "--out", "many", "--method", "ssu"]
    done = expunge(*words, *QUICK, *AUDIT, "--json")
    assert done.code == 0, done.err
    folders = [tmp_path / "many" / "01-one", tmp_path / "many" / "02-two"]
    inputs = [RunFolder.open(f).manifest["stages"]["unlearn"]["inputs"] for f in folders]
    assert "origin" not in inputs[0]
    assert inputs[1]["origin"] == inputs[0]["target"]
    assert RunFolder.open(folders[1]).manifest["stages"]["unlearn"]["result"]["finish_scale"] == 2.0
    start, first, second = weights(tmp_path / "target"), weights(folders[0]), weights(folders[1])
    assert any(not torch.equal(first[n], second[n]) for n in start)
    # What the second request learnt on the way: had it begun from the model that the first left, it would be another model.
    write_rows(tmp_path / "two.jsonl", [r for r in everything if r["subject"] == "person-0001"])
    write_rows(tmp_path / "left.jsonl", [r for r in everything if r["subject"] not in ("person-0000", "person-0001")])
    alone = ["unlearn", folders[0], "--forget", "two.jsonl", "--retain", "left.jsonl", "--method", "ssu", *QUICK]
    said = expunge(*alone, "--out", "again")
    assert said.code == 0, said.err
    assert "turned around together" in said.err
    same = [digest_file(f / "model" / "model.safetensors") for f in (folders[1], tmp_path / "again")]
    assert same[0] == same[1]
    assert expunge(*alone, "finish=negate", "--out", "other").code == 0
    other = weights(tmp_path / "other")
    assert any(not torch.equal(second[n], other[n]) for n in start)
    path = tmp_path / "target" / "model" / "model.safetensors"
    save_file({n: w + 1e-3 for n, w in start.items()}, path, metadata={"format": "pt"})
    refused(expunge(*alone, "--out", "x"), "'target'", "has changed since")
    shutil.rmtree(tmp_path / "target")
    refused(expunge(*alone, "--out", "x"), "target")
    assert not (tmp_path / "x").exists()
