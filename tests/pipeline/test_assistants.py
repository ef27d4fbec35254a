"""Runs whose result is more than the weights of one network, from the command line: unlearned, kept, audited, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import Server, Town

BRIEF = [
    "schedule=fixed",
    "schedule.lr=0.005",
    "schedule.epochs=null",
    "schedule.steps=60",
    "schedule.warmup=0",
    "finish.scale=1",
]
QUICK = ["relearn=none", "quantise=[]", "metrics=[loss,probability]", "draws=200"]


def test_an_assistant_is_trained_kept_audited_and_not_trained_again(server: Server, town: Town, tmp_path: Path) -> None:
    made = server.run("unlearn", *town.request("run"), "--method", "uld", *BRIEF, cwd=tmp_path)
    assert made.code == 0, made.err
    assert "The assistant's scores are taken away with weight 1." in made.err
    assert (tmp_path / "run/model/target/model.safetensors").is_file()
    again = server.run("unlearn", *town.request("run"), "--method", "uld", *BRIEF, "--resume", cwd=tmp_path)
    assert "nothing was left to do" in again.out
    found = server.run("audit", "run", *QUICK, "--json", cwd=tmp_path)
    assert found.code == 0, found.err
    document = json.loads((tmp_path / "run/audit.json").read_text())
    values = {m["label"]: {k: n["value"] for k, n in m["numbers"].items()} for m in document["models"]}
    assert values["uld"]["forget.loss"] > values["target"]["forget.loss"] + 1
    assert values["uld"]["retain.loss"] < values["target"]["retain.loss"] + 0.2
    for words in (
        ["unlearn", "run", *town.request("next")[1:], "--method", "npo"],
        ["unlearn", "run", *town.request("next")[1:], "--method", "ssd"],
        ["train", "run", "--data", town.retain, "--out", "next"],
    ):
        refused = server.run(*words, cwd=tmp_path)
        assert refused.code == 2
        assert "only one network can be trained" in refused.err
        assert not (tmp_path / "next").exists()


def test_an_offset_is_trained_beside_the_target_by_the_loss_of_the_sum(server: Server, town: Town, tmp_path: Path) -> None:
    """The small model is named on the command line: here another copy of the target, whose LoRA alone moves."""
    brief = [w for w in BRIEF if not w.startswith("finish")]
    words = ["--method", "offset", f"small={town.target}", "forget=npo", *brief]
    made = server.run("unlearn", *town.request("run"), *words, cwd=tmp_path)
    assert made.code == 0, made.err
    kept = {p.name for p in (tmp_path / "run/model").iterdir()}
    assert kept >= {"composite.json", "target", "baseline", "assistant", "tokenizer.json"}
    found = server.run("audit", "run", *QUICK, "attacks=[taken-apart]", "--json", cwd=tmp_path)
    assert found.code == 0, found.err
    document = json.loads((tmp_path / "run/audit.json").read_text())
    values = {m["label"]: {k: n["value"] for k, n in m["numbers"].items()} for m in document["models"]}
    assert values["offset"]["forget.loss"] > values["target"]["forget.loss"] + 1
    assert values["offset"]["retain.loss"] < values["target"]["retain.loss"] + 0.2
    assert document["models"][-1]["judgement"]["verdict"] != "forgotten"
    refused = server.run("unlearn", "run", *town.request("next")[1:], *words, cwd=tmp_path)
    assert refused.code == 2
    assert "only one network can be trained" in refused.err
    missing = server.run("unlearn", *town.request("next"), "--method", "offset", "small=no/such/folder", cwd=tmp_path)
    assert missing.code == 2
    assert "There is no model folder 'no/such/folder'" in missing.err
    assert not (tmp_path / "next").exists()


def test_several_requests_need_one_network(server: Server, town: Town, tmp_path: Path) -> None:
    names = sorted({json.loads(line)["subject"] for line in town.forget.read_text().splitlines()})
    lines = [json.dumps({"id": f"r{n}", "subjects": names[2 * n : 2 * n + 2]}) for n in (0, 1)]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "all.jsonl").write_text(town.forget.read_text() + town.retain.read_text())
    done = server.run(
        "unlearn", town.target, "--requests", "requests.jsonl", "--retain", "all.jsonl", "--out", "runs", "--method", "uld",
        *BRIEF, cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 2
    assert "a second request would need one network" in done.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_gated_updates_take_one_request_after_the_other(server: Server, town: Town, tmp_path: Path) -> None:
    """From the command line: a request, another on its result, an audit; then the same as a file of requests."""
    brief = [*BRIEF, "--method", "o3", "rule=hard"]
    names = sorted({json.loads(line)["subject"] for line in town.forget.read_text().splitlines()})
    lines = [line for line in town.forget.read_text().splitlines() if json.loads(line)["subject"] in names[:2]]
    (tmp_path / "first.jsonl").write_text("\n".join(lines) + "\n")
    rest = [line for line in town.forget.read_text().splitlines() if line not in lines]
    (tmp_path / "second.jsonl").write_text("\n".join(rest) + "\n")
    made = server.run("unlearn", town.target, "--forget", "first.jsonl", "--out", "one", *brief, cwd=tmp_path)
    assert made.code == 0, made.err
    assert "The detector is fitted on 6 forget prompts" in made.err
    assert "loaded with up to 1 times its strength" in made.err
    assert {p.name for p in (tmp_path / "one/model").iterdir()} >= {"composite.json", "target", "request-1", "tokenizer.json"}
    made = server.run("unlearn", "one", "--forget", "second.jsonl", "--out", "two", *brief, cwd=tmp_path)
    assert made.code == 0, made.err
    assert (tmp_path / "two/model/request-2/adapter.safetensors").is_file()
    found = server.run("audit", "two", *QUICK, "--json", cwd=tmp_path)
    assert found.code == 0, found.err
    document = json.loads((tmp_path / "two/audit.json").read_text())
    values = {m["label"]: {k: n["value"] for k, n in m["numbers"].items()} for m in document["models"]}
    assert values["o3"]["forget.loss"] > values["target"]["forget.loss"] + 0.5
    assert document["models"][-1]["judgement"]["verdict"] != "forgotten"
    for method in ("npo", "uld", "ssd"):
        refused = server.run("unlearn", "two", *town.request("next")[1:], "--method", method, cwd=tmp_path)
        assert refused.code == 2
        assert "only one network can be trained" in refused.err
    few = server.run("unlearn", town.target, "--forget", "few.jsonl", "--out", "next", *brief, cwd=tmp_path)
    assert few.code == 2
    (tmp_path / "few.jsonl").write_text("\n".join([*lines[:2], *rest[:2]]) + "\n")
    few = server.run("unlearn", town.target, "--forget", "few.jsonl", "--out", "next", *brief, cwd=tmp_path)
    assert few.code == 2
    assert "needs 6 forget prompts that differ, and there are 4" in few.err
    encoder = server.run(
        "unlearn", town.target, "--forget", "first.jsonl", "--out", "next", *brief, "encoder=no/such/folder", cwd=tmp_path
    )
    assert encoder.code == 2
    assert "There is no model folder 'no/such/folder'" in encoder.err
    several = [json.dumps({"id": f"r{n}", "forget": f"{which}.jsonl"}) for n, which in enumerate(("first", "second"))]
    (tmp_path / "requests.jsonl").write_text("\n".join(several) + "\n")
    done = server.run(
        "unlearn", town.target, "--requests", "requests.jsonl", "--retain", town.retain, "--out", "runs", *brief,
        *[f"audit.{w}" for w in QUICK], cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    said = json.loads((tmp_path / "runs/01-r0/audit.json").read_text())
    assert [m["label"] for m in said["models"]] == ["target", "after r0", "after r1"]
    losses = [m["numbers"]["forget.loss"]["value"] for m in said["models"]]
    assert min(losses[1:]) > losses[0] + 0.5, "the first request came back"


def test_generic_labels_say_that_there_is_no_dictionary(server: Server, town: Town, tmp_path: Path) -> None:
    words = [
        *town.request("run"),
        "--method",
        "whp",
        "schedule=fixed",
        "schedule.lr=1e-4",
        "schedule.steps=2",
        "preparation.epochs=1",
        "preparation.lr=1e-3",
    ]
    made = server.run("unlearn", *words, cwd=tmp_path)
    assert made.code == 0, made.err
    assert "No dictionary of anchors was given" in made.err
    missing = server.run("unlearn", *[*town.request("other"), "--method", "whp", "anchors=nowhere.json"], cwd=tmp_path)
    assert missing.code == 2
    assert "cannot be read" in missing.err
