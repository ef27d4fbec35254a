"""What every prepared method owes, whatever it does: documents, folders, reports, and a model that an audit can read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests.methods.prepared.small import blobs, perceptron
from tests.methods.prepared.test_s3t import Blocks

import expunge
from expunge.adapters.supervised import ClassifierAdapter
from expunge.core.errors import InputError
from expunge.engine.members import Training
from expunge.engine.record import Record
from expunge.engine.source import Source
from expunge.methods.catalogue import describe_prepared, known, serves
from expunge.methods.prepared.registry import PREPARED, stored

SGD = Training(steps=24, batch=8, lr=0.1, optimizer="sgd")
SETTINGS = {"s3t": {"layers": ("0",), "shards": 2, "slices": 2, "chains": 2}, "sisa": {"shards": 3, "slices": 2}}


def blocks() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 8), Blocks(), torch.nn.Linear(4, 3))


def made(name: str):
    build = blocks if name == "s3t" else perceptron
    return PREPARED.get(name)(**SETTINGS.get(name, {})), Source(blobs(), build, SGD)


@pytest.fixture(scope="module", params=PREPARED.names())
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    method, given = made(request.param)
    folder = tmp_path_factory.mktemp(request.param) / "run"
    method.train(given, folder)
    return method, given, folder


def scores(method, given: Source, folder: Path) -> torch.Tensor:
    adapter = ClassifierAdapter(method.load(given, folder), given.table.classes)
    batch = adapter.collate([adapter.encode(r) for r in given.table.rows()])
    with torch.no_grad():
        out = adapter.forward(adapter.model, batch, frozenset({"losses", "logits"}))
    assert bool(torch.isfinite(out.losses).all())
    assert out.logits.shape == (60, 3)
    return out.logits


@pytest.mark.parametrize("name", PREPARED.names())
def test_every_prepared_method_is_documented(name: str) -> None:
    found = describe_prepared(name)
    assert len(found.text) > 200
    assert found.title
    assert found.formula
    assert found.guarantee.startswith(("Exact", "Certified", "Approximate"))
    assert found.caveats
    assert all(c.endswith(".") for c in found.caveats)
    assert found.paper.url.startswith("https://arxiv.org/")
    assert all(p.text for p in found.parameters)
    assert known()[name] is PREPARED.get(name)
    assert serves(name, ClassifierAdapter.offers)[0]


def test_a_deletion_changes_the_answers_and_is_reported(trained, tmp_path: Path) -> None:
    method, given, folder = trained
    folder = Path(shutil.copytree(folder, tmp_path / "run"))
    before = scores(method, given, folder)
    assert torch.equal(before, scores(method, given, folder))
    report = method.delete(given, folder, ["row1", "row20"])
    assert not torch.equal(before, scores(method, given, folder))
    assert report.ids == ("row1", "row20")
    assert report.redone
    assert report.guarantee.startswith(("Exact", "Certified", "Approximate"))
    assert report.row_visits >= 0
    assert report.full_row_visits > 0
    assert report.remaining == 58
    with pytest.raises(InputError, match="'row20' was deleted already"):
        method.delete(given, folder, ["row20"])
    log = Record.open(folder).requests
    assert [r.done for r in log] == [True, True]
    assert log[1].row_visits == report.row_visits


def test_rows_left_out_from_the_start_are_never_read(trained, tmp_path: Path) -> None:
    method, given, folder = trained
    gone = [f"row{i}" for i in (3, 4)]
    method.train(given, tmp_path / "one", without=gone)
    spoilt = blobs()
    spoilt.inputs[[3, 4]] = 1e6
    method.train(Source(spoilt, given.build, SGD), tmp_path / "two", without=gone)
    assert torch.equal(scores(method, given, tmp_path / "one"), scores(method, given, tmp_path / "two"))
    assert not torch.equal(scores(method, given, tmp_path / "one"), scores(method, given, folder))


def test_nothing_is_begun_that_cannot_be_done(trained, tmp_path: Path) -> None:
    method, given, folder = trained
    log = (folder / "state.json").read_text()
    for ids, said in ((["row77"], "no row 'row77'"), ([], "No row is named"), (["row1", "row1"], "twice")):
        with pytest.raises(InputError, match=said):
            method.delete(given, folder, ids)
    with pytest.raises(InputError):
        method.delete(given, folder, list(given.table.ids))
    with pytest.raises(InputError, match="finished training"):
        method.train(given, folder)
    with pytest.raises(InputError, match="no folder of a prepared method"):
        method.load(given, tmp_path)
    with pytest.raises(InputError, match="no row 'row77'"):
        method.train(given, tmp_path / "new", without=["row77"])
    assert not (tmp_path / "new").exists()
    assert (folder / "state.json").read_text() == log
    assert stored(folder) == (method, SGD)


@pytest.mark.parametrize("name", [n for n in PREPARED.names() if PREPARED.get(n).builds])
def test_what_is_missing_is_said_before_a_folder_is_made(name: str, tmp_path: Path) -> None:
    method, given = made(name)
    for less, said in ((Source(given.table, None, SGD), "which model"), (Source(given.table, given.build), "how the model")):
        with pytest.raises(InputError, match=said):
            method.train(less, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_belongs_to_its_method(trained) -> None:
    _, given, folder = trained
    mine = stored(folder)[0].name
    for name in PREPARED.names():
        if name != mine:
            with pytest.raises(InputError, match=f"made by '{mine}', not by '{name}'"):
                made(name)[0].load(given, folder)


def test_a_model_that_it_has_not_trained_is_refused() -> None:
    with pytest.raises(InputError, match="Train with it first"):
        expunge.unlearn_rows(perceptron(), blobs(), ids=["row1"], method="sisa")
