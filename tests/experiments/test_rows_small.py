"""The experiment on classifiers: all stages on a little made data, a second run that does nothing, the page, and real data."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments.lines import Line
from experiments.rows_data import SOURCES, Source, convolutional, problem, residual, unpack
from experiments.rows_page import left, lines_of, write_page
from experiments.rows_small import CLASS_ONLY, METHODS, SHARES, Plan, Result, experiment, parse
from torch import nn

from expunge.core.errors import InputError
from expunge.core.runs import Run
from expunge.data.rows import Table, table
from expunge.engine.members import Training
from expunge.methods.catalogue import known


def spots(folder: Path, scratch: Path, rows: tuple[int, int]) -> tuple[Table, Table]:
    """Three overlapping clouds in eight dimensions: easy to learn, and to be known by heart."""
    rng = np.random.default_rng(5)
    centres = 1.5 * rng.normal(size=(3, 8))
    made = []
    for n in rows:
        labels = np.arange(n) % 3
        inputs = (centres[labels] + rng.normal(size=(n, 8))).astype(np.float32)
        made.append(table(inputs, labels, classes=["a", "b", "c"], source="spots"))
    return made[0], made[1]


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))


SPOTS = Source("Spots", spots, small, Training(steps=80, batch=20, lr=1e-2), "b")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, list[Result]]:
    out = tmp_path_factory.mktemp("rows")
    plan = Plan(
        out / "runs", {"spots": out}, rows={"spots": 90}, unseen=90, retained=40, seeds=(7, 8, 9), retrained=3, references=3,
        methods=("retrain", "ssd", "altpo"), known={"spots": SPOTS},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPUNGE_CACHE", str(out / "cache"))
        return plan, experiment(plan)


def test_every_stage_leaves_what_the_next_one_reads(made: tuple[Plan, list[Result]]) -> None:
    results = made[1]
    assert [r.request.name for r in results] == ["spots/class", "spots/random"]
    for result in results:
        assert set(result.failed) == {"altpo"}, "a method that cannot run here is reported, and stops nothing"
        assert set(result.pooled) == {"retrained", "target", "retrain", "ssd"}
        for seed, document in result.documents.items():
            labels = [m.label for m in document.models]
            assert labels == ["target", *(f"retrained seed {i}" for i in (1, 2, 3)), "retrain", "ssd"]
            assert document.models[0].fingerprint == result.request.targets[seed].fingerprint()
            run = Run.open(result.request.place / "ssd" / f"seed-{seed}")
            assert run.manifest["stages"]["unlearn"]["inputs"]["target"] == document.models[0].fingerprint
    assert len({t.fingerprint() for t in results[0].request.targets.values()}) == 3
    assert len(results[0].request.chosen) == 30
    assert len(results[1].request.chosen) == 9


def test_no_row_of_the_audit_told_a_method_when_to_stop(made: tuple[Plan, list[Result]]) -> None:
    for result in made[1]:
        held, sets = result.request.problem, result.request.sets
        assert held.holdout is not None
        assert len(held.holdout) == 300
        audited = {r.id for name in ("holdout", "test") for r in sets[name]}
        assert len(audited) == 90
        assert not audited & set(held.holdout.ids)
        assert not {r.id for r in sets["retain"]} & {r.id for r in sets["forget"]}
        assert len(sets["retain"]) == 40
    assert {r.target for r in made[1][0].request.sets["holdout"]} == {1}, "unseen rows of the forgotten class"
    assert 1 not in {r.target for r in made[1][0].request.sets["test"]}


def test_the_numbers_tell_the_target_from_retrained_models(made: tuple[Plan, list[Result]]) -> None:
    lines = {line.label: line for line in lines_of(made[1][0])}
    assert lines_of(made[1][0])[0].label == "retrained"
    assert lines["target"].mean("forget.accuracy") > 0.8
    for label in ("retrained", "retrain"):
        assert lines[label].mean("forget.accuracy") == 0, "a class that was never seen"
    assert lines["retrain"].mean("average-gap") < 0.1 < lines["target"].mean("average-gap")
    assert lines["target"].mean("klom.forget") > lines["retrained"].mean("klom.forget") + 1
    assert lines["target"].mean("u-lira") > 0.9
    assert left(lines["target"], lines["retrained"], lines["target"], "forget.accuracy") == 1
    share = left(lines["retrain"], lines["retrained"], lines["target"], "forget.accuracy")
    assert share == 0
    assert len(lines["ssd"].values["seconds"]) == 3


def test_a_measure_that_cannot_tell_says_nothing() -> None:
    floor, target = Line("retrained", {"x": [0.0, 0.2, 0.1]}, {"y": 1.0}), Line("target", {"x": [0.2, 0.1, 0.3]}, {"y": 3.0})
    method = Line("m", {"x": [0.1, 0.1, 0.1]}, {"y": 1.5})
    assert left(method, floor, target, "x") is None
    assert left(method, floor, target, "y") == 0.25
    assert left(method, floor, target, "z") is None
    sure = Line("target", {"x": [1.1, 1.1, 1.1]}, {})
    assert left(method, floor, sure, "x") == pytest.approx(0.0, abs=1e-9)
    assert left(sure, floor, sure, "x") == 1
    near = Line("target", {}, {"u-lira": 0.58})
    assert left(near, Line("retrained", {}, {"u-lira": 0.52}), near, "u-lira") is None, "no interval, and hardly a difference"


def test_the_page_names_what_ran_and_what_failed(made: tuple[Plan, list[Result]], tmp_path: Path) -> None:
    plan, results = made
    write_page(plan, results, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert str(plan.out) not in text
    assert "$" not in text
    assert "- `altpo` on spots/class: " in text
    for name in ("*retrained (the floor)*", "*target (nothing unlearned)*", "retrain", "ssd"):
        assert text.count(f"\n| {name} | ") >= 4
    gaps = [line.mean("average-gap") for line in lines_of(results[0])[1:]]
    assert gaps == sorted(gaps)


def test_what_is_done_is_not_done_again(made: tuple[Plan, list[Result]], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, results = made
    monkeypatch.setenv("EXPUNGE_CACHE", str(plan.out.parent / "cache"))
    before = {p: p.stat().st_mtime_ns for p in plan.out.rglob("*.safetensors")}
    assert len(before) == 12
    again = experiment(plan)
    assert {p: p.stat().st_mtime_ns for p in plan.out.rglob("*.safetensors")} == before
    assert [r.documents for r in again] == [r.documents for r in results]
    assert [r.pooled for r in again] == [r.pooled for r in results]


def archive(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as held:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 2
            held.addfile(info, io.BytesIO(b"ok"))
    return path


def test_an_archive_is_unpacked_in_part_and_never_leaves_its_folder(tmp_path: Path) -> None:
    fine = archive(tmp_path / "fine.tar.gz", ["train/dog/2.jpg", "train/dog/0.jpg", "train/dog/1.jpg", "train/cat/5.jpg"])
    folder = unpack(fine, tmp_path / "new", 2)
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.jpg"))
    assert files == ["train/cat/5.jpg", "train/dog/0.jpg", "train/dog/1.jpg"]
    for at, bad in enumerate(("../outside.jpg", "train/../../outside.jpg")):
        place = tmp_path / f"bad{at}"
        with pytest.raises(InputError, match="cannot be unpacked"):
            unpack(archive(tmp_path / "bad.tar.gz", [bad]), place, 2)
        assert not place.exists()
        assert not list(tmp_path.rglob("outside.jpg"))
    rooted = unpack(archive(tmp_path / "rooted.tar.gz", ["/elsewhere/x.jpg"]), tmp_path / "rooted", 2)
    assert (rooted / "elsewhere" / "x.jpg").is_file(), "the leading slash is dropped"


def test_the_networks_and_the_plan(tmp_path: Path) -> None:
    for build, shape, size in ((convolutional, (2, 1, 28, 28), 26698), (residual, (2, 3, 32, 32), 25082)):
        assert build()(torch.zeros(shape)).shape == (2, 10)
        assert sum(p.numel() for p in build().parameters()) == size
    plan, page = parse(["--mnist", "here", "--page", "p.md", "--seeds", "1", "2", "--rows", "50", "60"])
    assert (page, plan.seeds, plan.sources, plan.rows["mnist"]) == (Path("p.md"), (1, 2), {"mnist": Path("here")}, 50)
    assert set(METHODS) <= set(known())
    assert len(METHODS) >= 12
    assert set(SHARES) | set(CLASS_ONLY) < set(METHODS)
    assert plan.asked("mnist/class") == METHODS
    assert not set(plan.asked("mnist/random")) & set(CLASS_ONLY)
    plan, _ = parse(["--mnist", "here", "--skip", "mnist/random/ssd"])
    assert set(plan.asked("mnist/class")) - set(plan.asked("mnist/random")) == {"ssd", *CLASS_ONLY}
    with pytest.raises(InputError, match="holds neither"):
        problem(SOURCES["cifar10"], tmp_path, tmp_path, 10, 10)


@pytest.mark.shared_data
@pytest.mark.parametrize(("name", "folder", "shape"), [("mnist", "mnist", (1, 28, 28)), ("cifar10", "cifar10-jpeg", (3, 32, 32))])
def test_a_few_rows_of_real_data(tmp_path: Path, shared_data: Path, name: str, folder: str, shape: tuple[int, ...]) -> None:
    source = dataclasses.replace(SOURCES[name], training=Training(steps=60, batch=20, lr=3e-3))
    held = problem(source, shared_data / folder, tmp_path, 40, 30)
    assert held.data.inputs.shape == (40, *shape)
    assert held.holdout is not None
    assert len(held.holdout) == 30
    assert len(held.data.classes) == 10
    assert source.gone in held.data.classes
    assert 0 <= held.data.inputs.min() < held.data.inputs.max() <= 1
    trained = held.trained(None, [1])
    batch = torch.from_numpy(held.data.inputs)
    losses = trained.losses({"inputs": batch}, torch.from_numpy(held.data.targets))  # type: ignore[union-attr]
    assert losses.mean() < 1.5, "sixty steps on forty rows are enough to learn some of them"
