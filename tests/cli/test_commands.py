"""Help, exit codes, one JSON object, dry runs, and one recipe from every door."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from expunge import build_recipe
from expunge.core.files import digest_json
from tests.command import WORLD, Run, Town, cold, content, environment, refused, start, stop_when

COMMANDS = (
    "train", "unlearn", "merge", "audit", "report", "compare", "sweep", "methods", "metrics", "attacks", "demo", "doctor",
    "hallucinations", "hardest", "fair", "protocols", "benchmark", "ability", "plan", "guards", "serve", "key", "verify",
    "evidence",
)  # fmt: skip
FAST = ["schedule=fixed", "schedule.lr=0.001", "schedule.epochs=null", "schedule.steps=6", "schedule.warmup=0"]


def test_every_command_has_help_with_examples(expunge: Run) -> None:
    listed = expunge("--help").out
    for command in COMMANDS:
        assert f"\n  {command} " in listed
        done = expunge(command, "--help")
        assert done.code == 0
        assert "Example" in done.out
        assert f"expunge {command}" in done.out
        assert "--json" in done.out
        assert expunge(command, "-h").out == done.out
    known = [line.split()[0] for line in listed.partition("Commands:")[2].splitlines() if line.strip()]
    assert sorted(known) == sorted(COMMANDS)


def test_help_is_quick(tmp_path: Path) -> None:
    """Neither help nor the version waits for torch, nor does a word that is no command."""
    for words in (["--help"], ["--version"], ["unlearn", "--help"], ["sweep", "--help"], ["hardest", "--help"], ["unlern"]):
        code = (
            "import sys, expunge.cli.main as cli\n"
            f"cli.main({words!r})\n"
            "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules)\n"
            "sys.exit(f'imported: {heavy}' if heavy else 0)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_no_word_at_all_prints_help(tmp_path: Path) -> None:
    done = cold(cwd=tmp_path)
    assert done.code == 2
    assert "Commands:" in done.err + done.out


def test_reader_that_goes_away(tmp_path: Path) -> None:
    """``expunge methods | head -1`` ends without a traceback."""
    done = subprocess.run(
        f"{sys.executable} -m expunge methods npo | head -c 1", shell=True, env=environment(), cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


def test_one_json_object_everywhere(expunge: Run, town: Town, tmp_path: Path) -> None:
    assert {m["name"] for m in expunge("methods", "--json").json()["methods"]} >= {"npo", "rmu", "graddiff"}
    assert expunge("methods", "--matrix", "--json").json()["matrix"]["npo"]
    assert expunge("methods", "npo", "--json").json()["name"] == "npo"
    assert expunge("metrics", "--json").json()["metrics"]
    assert expunge("metrics", "loss", "--json").json()["name"] == "loss"
    assert expunge("doctor", "--json").json()["versions"]["expunge"]
    dry = expunge("unlearn", *town.request("out"), "--dry-run", "--json").json()
    assert dry["cost"]["steps"] > 0
    assert dry["cost"]["memory"] > 0
    train = ["train", "llama-tiny", "--scratch", "--data", town.retain, "--out", "out", "--json"]
    assert expunge(*train, "--dry-run").json()["recipe"]["schedule"]["name"] == "fixed"
    done = expunge(*train, "schedule.lr=0.001", "schedule.epochs=null", "schedule.steps=2")
    assert done.json()["steps"] == 2
    assert Path(tmp_path / "out" / "model" / "model.safetensors").is_file()
    for words in (
        ["unlern"],
        ["methods", "npoo"],
        ["audit", "nowhere"],
        ["report", "nowhere"],
        ["train", "x"],
        ["doctor", "--what"],
    ):
        failed = expunge(*words, "--json")
        assert failed.code == 2
        assert failed.json()["error"]
        assert failed.json()["remedy"]


def test_dry_run_writes_nothing(expunge: Run, town: Town, tmp_path: Path) -> None:
    before = content(tmp_path)
    for words in (["unlearn", *town.request("out")], ["train", "llama-tiny", "--scratch", "--data", town.retain, "--out", "out"]):
        done = expunge(*words, "--dry-run")
        assert done.code == 0
        for word in ("steps", "tokens", "of memory", "of disk"):
            assert word in done.err
    assert content(tmp_path) == before


def test_exit_codes_and_reuse(expunge: Run, town: Town, tmp_path: Path) -> None:
    reached = expunge("unlearn", *town.request("fixed"), *FAST, "--json")
    assert (reached.code, reached.json()["reached"], reached.json()["reused"]) == (0, True, False)
    again = expunge("unlearn", *town.request("fixed"), *FAST, "--resume", "--json")
    assert (again.code, again.json()["reused"]) == (0, True)
    said = expunge("unlearn", *town.request("fixed"), *FAST, "--resume")
    assert "had finished; nothing was left to do" in said.out
    missed = expunge("unlearn", *town.request("missed"), "schedule.lr=1e-7", "schedule.steps=2", "schedule.epochs=0.5")
    assert missed.code == 3
    assert "Try " in missed.out
    assert (tmp_path / "missed" / "model").is_dir()
    broken = [
        "schedule=fixed",
        "schedule.lr=1e30",
        "schedule.clip=none",
        "schedule.epochs=null",
        "schedule.steps=4",
        "schedule.warmup=0",
    ]
    destroyed = expunge("unlearn", *town.request("destroyed"), *broken, "--method", "gradascent")
    assert destroyed.code == 4, destroyed
    assert "Traceback" not in destroyed.err


def test_interrupt_and_resume(town: Town, tmp_path: Path) -> None:
    """Ctrl-C ends with 130 and says how to go on; so does the JSON."""
    slow = ["schedule=fixed", "schedule.lr=0.0001", "schedule.epochs=null", "schedule.steps=4000", "engine.checkpoint_every=5"]
    for extra in ([], ["--json"]):
        out = tmp_path / f"out{len(extra)}"
        process = start("unlearn", *town.request(out), *slow, *extra, cwd=tmp_path)
        done = stop_when(process, lambda out=out: (out / "checkpoint").is_dir(), signal.SIGINT)
        assert done.code == 130, done
        assert "--resume" in done.err
        assert "Traceback" not in done.err
        if extra:
            assert "--resume" in done.json()["remedy"]
    other = cold("unlearn", *town.request(tmp_path / "out0"), *slow[:-1], "--resume", cwd=tmp_path)
    refused(other, "other settings", "engine")


def test_an_edit_is_a_method_like_any_other(expunge: Run, town: Town, tmp_path: Path) -> None:
    assert "ssd" in {m["name"] for m in expunge("methods", "--json").json()["methods"]}
    assert expunge("methods", "ssd", "--json").json()["needs"] == ["losses"]
    assert "alpha" in expunge("methods", "ssd").out
    matrix = expunge("methods", "--matrix", "--json").json()["matrix"]["lfssd"]
    assert matrix == {"classification": True, "diffusion": False, "encoder-decoder": True, "language": True, "regression": False}
    words = ["unlearn", *town.request("out"), "--method", "ssd", "alpha=5"]
    done = expunge(*words, "--json")
    assert done.code == 0, done.err
    result = done.json()
    assert result["reached"], result
    assert "weights" in result["sentence"]
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    refused(expunge(*words), "not empty")
    refused(expunge("unlearn", *town.request("other"), "--method", "ssd", "alhpa=5"), "alpha")
    refused(expunge("unlearn", *town.request("other"), "--method", "sssd"), "ssd")
    refused(expunge("unlearn", *town.request("other"), "--method", "ssd", "alpha=-1"), "alpha")
    refused(expunge("unlearn", *town.request("other"), "--method", "fisher"), "does not offer")
    assert not (tmp_path / "other").exists()


CROSSING = {
    "method": "npo",
    "parts": {"retain": "kl", "parameters": "lora", "gradient": "project", "beta": 0.2, "schedule": {"epochs": 3}},
    "engine": {"seed": 7},
}


def test_same_object_from_options_file_and_python(expunge: Run, town: Town, tmp_path: Path) -> None:
    words = ["unlearn", *town.request("out"), "--dry-run", "--json"]
    parts = ["retain=kl", "parameters=lora", "gradient=project", "beta=0.2", "schedule.epochs=3"]
    line = expunge(*words, "--method", "npo", *parts, "--seed", "7").json()
    (tmp_path / "run.json").write_text(json.dumps(CROSSING))
    from_file = expunge(*words, "--config", "run.json").json()
    yaml = "method: npo\nparts:\n  retain: kl\n  parameters: lora\n  gradient: project\n  beta: 0.5\nengine: {seed: 3}\n"
    (tmp_path / "run.yaml").write_text(yaml)
    mixed = expunge(*words, "--config", "run.yaml", "beta=0.2", "schedule.epochs=3", "engine.seed=7").json()
    whole = {"model": str(town.target), "forget": str(town.forget), "retain": str(town.retain), **CROSSING}
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    alone = expunge("unlearn", "--config", "whole.json", "beta=0.2", "--out", "out", "--dry-run", "--json").json()
    digests = {digest_json(found["config"]) for found in (line, from_file, mixed, alone)}
    assert len(digests) == 1
    recipes = {digest_json(found["recipe"]) for found in (line, from_file, mixed, alone)}
    assert recipes == {digest_json(build_recipe("npo", CROSSING["parts"]).spec())}
    spec = line["recipe"]
    assert [t["name"] for t in spec["retain"]] == ["kl"]
    assert (spec["parameters"]["name"], spec["gradient"]["name"]) == ("lora", "project")


def test_crossing_runs(expunge: Run, town: Town, tmp_path: Path) -> None:
    done = expunge("unlearn", *town.request("out"), "retain=kl", "parameters=lora", "gradient=project", *FAST, "--json")
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["config_digest"] == digest_json(manifest["config"])
    assert manifest["stages"]["unlearn"]["inputs"]["recipe"] == done.json()["recipe"]


def test_named_data_and_alternatives(expunge: Run, town: Town) -> None:
    sets = ["--forget", f"people:forget?{WORLD}", "--retain", f"people:rest?{WORLD}", "--holdout", f"people:holdout?{WORLD}"]
    words = ["unlearn", town.target, *sets, "--out", "out", "--dry-run", "--json"]
    found = expunge(*words, "--method", "altpo", "--alternative-template", "I have never heard of {subject}.").json()
    assert found["config"]["alternatives"] == "template"
    bad = expunge("unlearn", town.target, "--forget", f"people:forgot?{WORLD}", "--retain", town.retain, "--out", "out")
    refused(bad, "'forgot'", "'forget'")
    option = expunge("unlearn", town.target, "--forget", "people:forget?person=3", "--retain", town.retain, "--out", "out")
    refused(option, "'person'", "'persons'")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_file_that_grows_past_a_limit(town: Town, tmp_path: Path) -> None:
    """The disk ends in the middle of the work: one sentence, and what was written before is still whole."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    done = subprocess.run(
        [sys.executable, "-m", "expunge", "unlearn", *map(str, town.request("out")), *FAST],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False, preexec_fn=limit,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr, done.stderr
    assert "--resume" in done.stderr
    resumed = cold("unlearn", *town.request("out"), *FAST, "--resume", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
