"""Directions taken out for good, from the command line: one request after another, audited, attacked, built upon, refused."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from tests.command import Server, Town

BRIEF = [
    "schedule=fixed", "schedule.lr=0.0125", "schedule.epochs=null", "schedule.steps=60", "schedule.warmup=0",
    "schedule.weight_decay=0", "schedule.decay=constant",
]  # fmt: skip
FINETUNE = ["schedule=fixed", "schedule.lr=0.0001", "schedule.epochs=null", "schedule.steps=2", "schedule.warmup=0"]
AUDIT = ["metrics=[loss,probability]", "draws=200"]


def ranks(run: Path) -> dict[str, int]:
    return {n: len(q) for n, q in load_file(run / "model" / "projections.safetensors").items()}


def losses(document: Path) -> dict[str, dict[str, float]]:
    models = json.loads(document.read_text())["models"]
    return {m["label"]: {k: n["value"] for k, n in m["numbers"].items()} for m in models}


def test_requests_follow_one_another_and_are_audited_with_attacks(server: Server, town: Town, tmp_path: Path) -> None:
    names = sorted({json.loads(line)["subject"] for line in town.forget.read_text().splitlines()})
    lines = [json.dumps({"id": f"r{n}", "subjects": names[2 * n : 2 * n + 2]}) for n in (0, 1)]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "all.jsonl").write_text(town.forget.read_text() + town.retain.read_text())
    done = server.run(
        "unlearn", town.target, "--requests", "requests.jsonl", "--retain", "all.jsonl", "--out", "runs", "--method", "mrp",
        *BRIEF, "audit.relearn.steps=[2]", "audit.quantise=[4]", "audit.metrics=[loss,probability]", "audit.draws=200",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    first, second = tmp_path / "runs" / "01-r0", tmp_path / "runs" / "02-r1"
    assert list(ranks(first).values()) == [2, 2]
    assert list(ranks(second).values()) == [4, 4]
    found = losses(first / "audit.json")
    assert found["after r0"]["forget.loss"] > found["target"]["forget.loss"] + 1
    assert found["after r1"]["forget.loss"] > 0.7 * found["after r0"]["forget.loss"]  # without a word of the first request
    later = losses(second / "audit.json")
    assert later["after r1"]["forget.loss"] > later["target"]["forget.loss"] + 1
    assert later["after r1"]["retain.loss"] < later["target"]["retain.loss"] + 0.5
    # other methods go on from there and keep it
    words = [second, *town.request("next")[1:], *FINETUNE]
    done = server.run("unlearn", *words, "--method", "graddiff", cwd=tmp_path)
    assert done.code == 0, done.err
    assert ranks(tmp_path / "next") == ranks(second)
    done = server.run("unlearn", second, *town.request("lora")[1:], *FINETUNE, "parameters=lora", "--method", "npo", cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "lora/model/adapter_config.json").is_file()
    done = server.run("audit", "lora", *AUDIT, "relearn=none", "quantise=[]", cwd=tmp_path)
    assert done.code == 0, done.err
    values = losses(tmp_path / "lora" / "audit.json")
    assert values["target"]["forget.loss"] > 1  # its target is the model after both requests
    done = server.run("merge", second, "next", "--out", "joined", cwd=tmp_path)
    assert done.code == 2


def test_one_request_its_audit_and_what_is_refused(server: Server, town: Town, tmp_path: Path) -> None:
    done = server.run("unlearn", *town.request("run"), "--method", "mrp", *BRIEF, cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "run/model/target/model.safetensors").is_file()
    again = server.run("unlearn", *town.request("run"), "--method", "mrp", *BRIEF, "--resume", cwd=tmp_path)
    assert "nothing was left to do" in again.out
    done = server.run("audit", "run", *AUDIT, "relearn.steps=[2]", "quantise=[4]", cwd=tmp_path)
    assert done.code == 0, done.err
    values = losses(tmp_path / "run" / "audit.json")
    assert values["mrp"]["forget.loss"] > values["target"]["forget.loss"] + 1
    assert values["mrp"]["retain.loss"] < values["target"]["retain.loss"] + 0.3
    other = server.run("unlearn", *town.request("other"), "--method", "graddiff", *FINETUNE, cwd=tmp_path)
    assert other.code == 0, other.err
    done = server.run("merge", "run", "other", "--out", "joined", cwd=tmp_path)
    assert done.code == 2
    assert "takes directions out of its states" in done.err
    done = server.run("unlearn", *town.request("wrong"), "--method", "mrp", "parameters.layers=[9]", cwd=tmp_path)
    assert done.code == 2
    assert "Layer 9 is out of range: the model has 2 blocks" in done.err
    (tmp_path / "run/model/projections.safetensors").unlink()
    done = server.run("unlearn", "run", *town.request("next")[1:], "--method", "graddiff", *FINETUNE, cwd=tmp_path)
    assert done.code == 2
    assert "is missing or does not hold the projections" in done.err
