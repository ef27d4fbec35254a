"""Runs whose result is more than the weights of one network, from the command line: unlearned, kept, audited, refused."""

from __future__ import annotations

import json
from pathlib import Path

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
