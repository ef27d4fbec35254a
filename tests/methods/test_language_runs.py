"""The newer language methods through the pipeline: from files to a run folder that is loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_qa import exact, fixed, loss

from expunge.adapters.loading import load
from expunge.core.errors import InputError
from expunge.data.people import world as countries
from expunge.data.records import RecordSet
from expunge.engine.options import Engine
from expunge.pipeline.config import Allowances, UnlearnConfig
from expunge.pipeline.unlearn import Request, check, execute, from_config, plan, run_in_memory


@pytest.fixture(scope="module")
def files(qa, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("files")
    qa.target_model.save(folder / "target")
    for name, records in (("forget", qa.forget), ("retain", qa.retain)):
        rows = [{"id": r.id, "question": r.prompt, "answer": r.answer, "subject": r.subject} for r in records]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": str(folder / "target"), **{n: str(folder / f"{n}.jsonl") for n in ("forget", "retain")}}


def test_loku_leaves_a_run_whose_model_is_the_trained_one(qa, files, tmp_path):
    parts = {"schedule": fixed(1e-3, 30), "parameters": {"rank": 8, "alpha": 16.0}}
    config = UnlearnConfig(**files, method="loku", parts=parts)
    execute(from_config(config), config, tmp_path / "run")
    said = json.loads((tmp_path / "run" / "training.json").read_text())
    assert (tmp_path / "run" / "model" / "base" / "model.safetensors").is_file()
    held = load(tmp_path / "run" / "model")
    assert loss(held, qa.forget) == pytest.approx(said["forget_loss"], rel=1e-3)
    assert loss(held, qa.retain) == pytest.approx(said["retain_loss"], rel=1e-3, abs=1e-4)
    assert exact(held, qa.forget) < 0.8
    assert exact(held, qa.retain) > 0.9
    with pytest.raises(InputError, match="keeps a retain set"):
        from_config(UnlearnConfig(model=files["model"], forget=files["forget"], method="loku"))
    with pytest.raises(InputError, match="parameters=fila reads a retain set"):
        from_config(UnlearnConfig(model=files["model"], forget=files["forget"], method="loku", parts={"retain": "none"}))


def test_a_warning_of_flat_stands_in_the_manifest(files, tmp_path):
    config = UnlearnConfig(
        model=files["model"], forget=files["forget"], method="flat", parts={"schedule": fixed(1e-4, 1)},
        alternatives="template", alternative_template="whisper wear opens " * 6,
    )  # fmt: skip
    run = execute(from_config(config), config, tmp_path / "run")
    (note,) = run.manifest["stages"]["unlearn"]["result"]["notes"]
    assert "mean probability" in note
    assert json.loads((tmp_path / "run" / "training.json").read_text())["notes"] == [note]


@pytest.mark.parametrize("method", ["ga-opt", "tru", "wpn"])
def test_the_others_run_from_files_with_nothing_but_their_name(files, tmp_path, method):
    config = UnlearnConfig(**files, method=method, parts={"schedule": fixed(1e-4, 1)})
    made = from_config(config)
    run = execute(made, config, tmp_path / "run")
    assert run.manifest["stages"]["unlearn"]["result"]["steps"] == 1
    load(tmp_path / "run" / "model")


@pytest.mark.parametrize(("method", "parts"), [("loku", {}), ("ga-opt", {}), ("tru", {}), ("flat", {"retain": "nll"})])
def test_those_with_a_retain_term_reach_the_goal_with_nothing_but_their_name(people_world, method, parts):
    adapter, split = people_world.target(), people_world.split
    kept = RecordSet("retain", (*split.retain, *countries()), "test")
    request = check(Request(split.forget, kept, split.holdout), Allowances())
    outcome, goal = run_in_memory(plan(adapter, request, method, parts, Engine(checkpoint_every=0)))
    assert outcome.reason == "goal", outcome.sentence
    assert people_world.loss(adapter, split.forget, outcome.model) > goal.loss - 0.2
    assert people_world.loss(adapter, split.retain, outcome.model) < people_world.loss(people_world.target(), split.retain) + 0.2
