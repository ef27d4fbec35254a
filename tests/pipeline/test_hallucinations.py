"""Made-up names from the command line: prompts go in, a run comes out, and it is measured on prompts that it has not seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expunge.cli.main import main
from expunge.pipeline.config import UnlearnConfig
from expunge.pipeline.unlearn import from_config
from tests.imports_world import THINGS, VALID, VERBS, ImportsWorld


@pytest.fixture
def place(tmp_path: Path, trained_models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    world = ImportsWorld(trained_models)
    monkeypatch.chdir(tmp_path)
    for part, name in enumerate(("prompts", "held", "unseen")):
        lines = [json.dumps({"id": r.id, "text": r.answer}) + "\n" for r in world.prompts(part)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "names.txt").write_text("\n".join(VALID))
    (tmp_path / "all_names.py").write_text("def exists(name, ecosystem):\n    return True\n")
    (tmp_path / "slots.json").write_text(json.dumps({"verb": VERBS, "thing": THINGS}))
    world.target_model.save(tmp_path / "model")
    return tmp_path


WORDS = ["unlearn", "model", "--forget", "prompts.jsonl", "--method", "au", "--out", "run"]
HELD = ["--holdout", "held.jsonl"]
DRAWN = ["tokens=12", "samples=3", "slots=slots.json", "spare=[unseen.jsonl]"]
SMALL = [*DRAWN, "control.rounds=2", "schedule.lr=3e-3", "schedule.batch=16"]
MEASURE = ["--prompts", "unseen.jsonl", "known=names.txt", "tokens=12", "samples=3", "--json"]


def test_a_run_is_measured_on_prompts_that_it_has_not_seen(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, *HELD, "known=names.txt", *SMALL, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["reason"] == "control"
    assert len(said["notes"]) == 3
    record = json.loads((place / "run" / "control.json").read_text())
    assert len(record["seen"]) == 3
    assert len(record["held_out"]) == 12  # half of them set the stop
    assert len(record["used"]) > 32
    assert main(["hallucinations", "run", "--reference", "model", *MEASURE]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["completions"] == 72
    assert found["model"]["rate"] < found["reference"]["rate"]
    assert found["model"]["low"] < found["model"]["rate"] < found["model"]["high"]
    assert 0 < found["divergence"]["other tokens"] < found["divergence"]["names"]
    assert main(["hallucinations", "run", "--prompts", "prompts.jsonl", "known=names.txt"]) == 2
    assert "was used to unlearn this model" in capsys.readouterr().err
    assert main(["hallucinations", "model", *MEASURE[:-1]]) == 0
    assert "95% interval" in capsys.readouterr().out


def test_where_nothing_is_made_up_the_run_says_so_and_is_done(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, *HELD, "checker=all_names.py:exists", *SMALL]) == 0
    assert "so there is nothing to do" in capsys.readouterr().out


def test_refusals_before_anything_is_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "empty.txt").write_text("\n")
    cases = [
        ([*HELD], "must be told which names exist"),
        ([*HELD, "known=none.txt"], "cannot be read"),
        ([*HELD, "known=empty.txt"], "holds no name"),
        ([*HELD, "known=names.txt", "spare=[none.jsonl]"], "none.jsonl"),
        ([*HELD, "checker=none.py:known"], "There is no file 'none.py'"),
        (["known=names.txt"], "chooses by held-out data, and none were given"),
        (["--holdout", "prompts.jsonl", "known=names.txt"], "duplicate records of the forget set"),
    ]
    for more, said in cases:
        assert main([*WORDS, *more]) == 2
        assert said in capsys.readouterr().err
        assert not (place / "run").exists()
    assert main(["hallucinations", "model", "--prompts", "unseen.jsonl"]) == 2
    assert "must be told which names exist" in capsys.readouterr().err


def test_the_cost_is_that_of_the_completions(place: Path) -> None:
    def cost(samples: int):
        parts = {"known": "names.txt", "samples": samples, "tokens": 12}
        config = UnlearnConfig(model="model", forget="prompts.jsonl", holdout="held.jsonl", method="au", parts=parts)
        return from_config(config).cost

    assert cost(8).tokens > 1.9 * cost(4).tokens
