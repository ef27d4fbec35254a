"""SISA: a deletion leaves, bit by bit, what a training without the rows would have made."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.digits import network
from tests.methods.prepared.small import TRAINING, accuracy, blobs, files, line, perceptron, slope, source, without

from expunge.adapters.supervised import ClassifierAdapter
from expunge.core.errors import InputError
from expunge.engine.ensemble import train_ensemble
from expunge.engine.members import Members, Spec, Training
from expunge.engine.record import Record
from expunge.engine.source import scores
from expunge.methods.prepared.registry import PREPARED, stored
from expunge.methods.prepared.sisa import SISA

ROOT = Path(__file__).resolve().parents[3]
METHOD = SISA(shards=3, slices=4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sisa") / "run"
    METHOD.train(source(), folder)
    return folder


def copied(trained: Path, to: Path) -> Path:
    return Path(shutil.copytree(trained, to))


def rows_of(folder: Path, shard: int, part: int | None = None) -> list[str]:
    return [name for name, s, r in Record.open(folder).plan["rows"] if s == shard and part in (None, r)]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(st.sets(st.integers(0, 59), min_size=1, max_size=5), min_size=1, max_size=4))
def test_after_any_deletions_every_checkpoint_is_that_of_a_training_without_the_rows(
    trained: Path, tmp_path_factory: pytest.TempPathFactory, requests: list[set[int]]
) -> None:
    base = tmp_path_factory.mktemp("any")
    folder, gone = copied(trained, base / "run"), set()
    for asked in requests:
        ids = [f"row{i}" for i in sorted(asked - gone)]
        if not ids:
            continue
        before = files(folder)
        report = METHOD.delete(source(without(blobs(), ids)), folder, ids)  # the rows are gone from the data already
        gone |= asked
        touched = {f"shards/{s + 1:03}" for s in range(3) if set(rows_of(folder, s)) & set(ids)}
        for name, content in files(folder).items():
            assert content == before[name] or name.rpartition("/")[0] in touched
        assert len(report.redone) == len(touched), "each shard is trained again once"
        assert 0 < report.row_visits <= report.full_row_visits
    METHOD.train(source(), base / "never", without=[f"row{i}" for i in sorted(gone)])
    assert files(folder) == files(base / "never")


def test_one_deletion_touches_one_shard_from_its_slice_on(trained: Path, tmp_path: Path) -> None:
    folder = copied(trained, tmp_path / "run")
    before = files(folder)
    name = rows_of(folder, 1, 2)[0]
    report = METHOD.delete(source(), folder, [name])
    changed = {n for n, content in files(folder).items() if content != before[n]}
    assert changed == {"shards/002/slice-003.safetensors", "shards/002/slice-004.safetensors"}
    assert report.redone == ("shard 2: slices 3 to 4",)
    # Steps of a shard's stages are 2, 5, 7 and 10 of 24; the last two read 14 and 19 rows in batches of 8.
    assert report.row_visits == (3 * 14 + 8) + (3 * 19 + 8)
    assert report.share == pytest.approx(report.row_visits / report.full_row_visits)
    assert report.seconds > 0
    assert report.full_seconds > 0
    assert "Exact" in report.guarantee
    assert report.remaining == 59


def test_one_shard_of_one_slice_is_retraining(tmp_path: Path) -> None:
    held, method = blobs(), SISA(shards=1, slices=1, seed=5)
    method.train(source(held), tmp_path / "run")
    report = method.delete(source(held), tmp_path / "run", ["row7"])
    assert report.share == 1
    kept = without(held, ["row7"])
    spec = Spec(perceptron, torch.from_numpy(kept.inputs), torch.from_numpy(kept.targets), TRAINING)
    retrained = train_ensemble(spec, Members(torch.ones(1, 59), [5])).member(0)
    model = method.load(source(held), tmp_path / "run")
    for name, value in model.members[0].state_dict().items():
        assert torch.equal(value, retrained[name])


def test_the_vote_knows_more_than_a_shard(digits, tmp_path: Path) -> None:
    seen, unseen = digits.tables
    given = source(seen, Training(steps=120, batch=32, lr=3e-3), network_of_digits)
    method = SISA(shards=5, slices=4, aggregate="vote")
    method.train(given, tmp_path / "run")
    model = method.load(given, tmp_path / "run")
    single = np.mean([accuracy(member, unseen) for member in model.members])
    together = accuracy(model, unseen)
    assert 0.75 < single < together
    adapter = ClassifierAdapter(model, seen.classes)
    batch = adapter.collate([adapter.encode(r) for r in unseen.rows(range(20))])
    out = adapter.forward(model, batch, frozenset({"losses", "logits"}))
    assert bool(torch.isfinite(out.losses).all())
    assert model.votes(torch.from_numpy(unseen.inputs)).shape == (797, 5)
    for rule in ("probabilities", "logits"):
        model.rule = rule
        assert accuracy(model, unseen) > single
    model.rule = "probabilities"
    x = torch.from_numpy(unseen.inputs[:30])
    torch.testing.assert_close(model(x).exp(), torch.stack([m(x).softmax(-1) for m in model.members]).mean(0))


def network_of_digits() -> torch.nn.Module:
    return network(int(torch.randint(1 << 30, ())))  # its seed is drawn from the generator that the member's seed sets


def test_numbers_are_averaged(tmp_path: Path) -> None:
    held = slope()
    given = source(held, Training(steps=300, batch=8, lr=0.05), line)
    SISA(shards=2, slices=2).train(given, tmp_path / "run")
    model = SISA(shards=2, slices=2).load(given, tmp_path / "run")
    with torch.no_grad():
        error = (model(torch.from_numpy(held.inputs))[:, 0] - torch.from_numpy(held.targets)).square().mean()
    assert error < 0.05
    with pytest.raises(InputError, match="aggregate=logits"):
        SISA(shards=2, slices=2, aggregate="vote").train(given, tmp_path / "vote")


def times(folder: Path) -> dict[str, int]:
    """When each checkpoint was written, while another process writes and removes some."""
    found = {}
    for path in folder.glob("shards/*/slice-*.safetensors"):
        with suppress(FileNotFoundError):
            found[path.name + path.parent.name] = path.stat().st_mtime_ns
    return found


def killed(folder: Path, *names: str, after: int) -> bool:
    """Run a process on a folder and kill it once ``after`` checkpoints were written anew; whether it was killed in its work."""
    start = times(folder)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    command = [sys.executable, "-m", "tests.methods.prepared.small", str(folder), *names]
    process = subprocess.Popen(command, env=environment, cwd=ROOT)
    try:
        while process.poll() is None:
            if sum(start.get(k) != t for k, t in times(folder).items()) >= after:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        return process.wait(timeout=60) == -signal.SIGKILL
    finally:
        process.kill()


def test_a_killed_training_and_a_killed_deletion_go_on_to_the_same_bits(tmp_path: Path) -> None:
    long = Training(steps=300, batch=8, lr=0.05)
    given = source(training=long)
    METHOD.train(given, tmp_path / "whole")
    folder = tmp_path / "killed"
    record = Record.open(tmp_path / "whole")
    Record.new(folder, record.plan, [])
    assert killed(folder, after=4)
    assert 4 <= len(files(folder)) < 12
    with pytest.raises(InputError, match="unfinished"):
        METHOD.load(given, folder)
    with pytest.raises(InputError, match="unfinished"):
        METHOD.delete(given, folder, ["row1"])
    done = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    METHOD.train(given, folder)
    assert files(folder) == files(tmp_path / "whole")
    assert all(p.stat().st_mtime_ns == t for p, t in done.items()), "what was done is not done again"

    names = [rows_of(folder, 0, 0)[0], rows_of(folder, 2, 0)[0]]
    METHOD.delete(given, tmp_path / "whole", names)
    assert killed(folder, *names, after=2)
    with pytest.raises(InputError, match="interrupted"):
        METHOD.load(given, folder)
    with pytest.raises(InputError, match="Ask for it again first"):
        METHOD.delete(given, folder, [rows_of(folder, 1)[0]])
    report = METHOD.delete(given, folder, names)
    assert files(folder) == files(tmp_path / "whole")
    assert report.row_visits == Record.open(tmp_path / "whole").requests[-1].row_visits


@pytest.mark.distributed
def test_ray_workers_make_the_same_bits(trained: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    try:
        METHOD.train(source(), tmp_path / "far", workers="ray")
        METHOD.delete(source(), tmp_path / "far", ["row3", "row4"], workers="ray")
    finally:
        ray.shutdown()
    near = copied(trained, tmp_path / "near")
    METHOD.delete(source(), near, ["row3", "row4"])
    assert files(tmp_path / "far") == files(near)


def test_the_settings_are_found_in_the_folder(trained: Path) -> None:
    assert stored(trained) == (METHOD, TRAINING)
    assert "sisa" in PREPARED.names()


def test_a_folder_is_not_overwritten_and_belongs_to_what_made_it(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="finished training"):
        METHOD.train(source(), trained)
    with pytest.raises(InputError, match="shards=3, not 2"):
        SISA(shards=2).delete(source(), trained, ["row1"])
    with pytest.raises(InputError, match="steps=24, not 30"):
        METHOD.delete(source(training=Training(steps=30, batch=8, lr=0.05)), trained, ["row1"])
    with pytest.raises(InputError, match="another model"):
        METHOD.load(source(build=line), trained)
    with pytest.raises(InputError, match="no folder of a prepared method"):
        METHOD.load(source(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        METHOD.train(source(), tmp_path)
    other = copied(trained, tmp_path / "other")
    plan = (other / "plan.json").read_text()
    (other / "plan.json").write_text(plan.replace('"method": "sisa"', '"method": "s3t"'))
    with pytest.raises(InputError, match="made by 's3t'"):
        METHOD.load(source(), other)


def test_an_interrupted_training_goes_on_with_the_same_rows_alone(tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        METHOD.train(source(), tmp_path, without=["row9"], progress=stop)
    with pytest.raises(InputError, match="was of other rows"):
        METHOD.train(source(blobs(61)), tmp_path, without=["row9"])
    with pytest.raises(InputError, match="left other rows out"):
        METHOD.train(source(), tmp_path)
    changed = blobs()
    changed.inputs[int(rows_of(tmp_path, 0, 0)[0][3:])] += 1
    with pytest.raises(InputError, match="not trained on these rows"):
        METHOD.train(source(changed), tmp_path, without=["row9"])
    METHOD.train(source(), tmp_path, without=["row9"])


def test_requests_that_cannot_be_met_change_nothing(trained: Path) -> None:
    before = files(trained)
    for ids, said in (
        (["row99"], "no row 'row99'"),
        ([], "No row is named"),
        (["row1", "row1"], "named twice"),
        (rows_of(trained, 2), "Shard 3 would have no row left"),
    ):
        with pytest.raises(InputError, match=said):
            METHOD.delete(source(), trained, ids)
    assert files(trained) == before
    assert Record.open(trained).pending is None


def test_a_row_is_deleted_once(trained: Path, tmp_path: Path) -> None:
    folder = copied(trained, tmp_path / "run")
    METHOD.delete(source(), folder, ["row5"])
    with pytest.raises(InputError, match="'row5' was deleted already"):
        METHOD.delete(source(), folder, ["row6", "row5"])


@pytest.mark.parametrize(
    ("method", "n", "steps", "said"),
    [
        (SISA(shards=5, slices=4), 19, 24, "19 rows cannot be dealt into 5 shards of 4 slices"),
        (SISA(shards=1, slices=4), 19, 9, "Give 10 steps"),
    ],
)
def test_too_little_is_said_before_any_work(method: SISA, n: int, steps: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        method.train(source(blobs(n), Training(steps=steps, batch=8, lr=0.05)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_damage_and_other_data_are_found_before_any_work(trained: Path, tmp_path: Path) -> None:
    name = rows_of(trained, 0, 1)[0]
    good = copied(trained, tmp_path / "good")
    for at, change, said in (
        ("slice-001", None, "is missing"),
        ("slice-004", None, "is missing"),
        ("slice-001", lambda b: b[:100], "is damaged"),
        ("slice-001", lambda b: files(good)["shards/002/slice-001.safetensors"], "not trained on these rows"),
    ):
        folder = copied(good, tmp_path / f"{at}-{said}")
        path = folder / "shards" / "001" / f"{at}.safetensors"
        path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
        with pytest.raises(InputError, match=said):
            METHOD.delete(source(), folder, [name])
        assert Record.open(folder).pending is None
    other = blobs()
    first = other.ids.index(rows_of(trained, 0, 0)[0])
    other.inputs[first] += 1
    with pytest.raises(InputError, match="not trained on these rows"):
        METHOD.delete(source(other), good, [name])
    flipped = copied(good, tmp_path / "flipped")
    path = flipped / "shards" / "001" / "slice-004.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        METHOD.load(source(), flipped)
    (good / "state.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        METHOD.load(source(), good)


def test_two_processes_do_not_work_in_one_folder(trained: Path, tmp_path: Path) -> None:
    from expunge.core.files import alone

    folder = copied(trained, tmp_path / "run")
    with alone(folder), pytest.raises(InputError, match="Another process"):
        METHOD.delete(source(), folder, ["row1"])
    METHOD.delete(source(), folder, ["row1"])


def test_a_first_slice_may_lose_all_its_rows(trained: Path, tmp_path: Path) -> None:
    folder = copied(trained, tmp_path / "run")
    METHOD.delete(source(), folder, rows_of(folder, 0, 0))
    METHOD.train(source(), tmp_path / "never", without=rows_of(folder, 0, 0))
    assert files(folder) == files(tmp_path / "never")
    assert scores(METHOD.load(source(), folder), torch.zeros(2, 4)).shape == (2, 3)
