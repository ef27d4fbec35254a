"""Passages at known counts: more copies are remembered better, what unlearning removes is measured for each count."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from expunge.audit.run import AuditedModel
from expunge.audit.settings import AuditSettings
from expunge.benchmarks.config import BenchmarkConfig
from expunge.benchmarks.document import BenchmarkDocument
from expunge.benchmarks.measure import measure
from expunge.benchmarks.run import execute, load_all, plan
from expunge.core.errors import InputError
from expunge.data.sources import load
from expunge.pipeline.config import TrainConfig
from expunge.pipeline.train import retraining
from tests.benchmarks.world import sampled, small_model

LEVELS = (1, 4, 16)
TRAINING = {"schedule": {"name": "fixed", "lr": 5e-3, "epochs": 4, "batch": 16, "warmup": 1, "decay": "linear"}}
ASCENT = {"schedule": {"name": "fixed", "lr": 3e-4, "steps": 12, "batch": 12}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> BenchmarkDocument:
    """Perturbed and retrained model, and gradient ascent on half of every count."""
    folder = tmp_path_factory.mktemp("hubble")
    config = BenchmarkConfig(
        benchmark="hubble", options={"suffix_tokens": 40}, model="llama-tiny", train=TRAINING, methods=("gradascent",),
        unlearn=ASCENT, verdict=False, audit=AuditSettings.quick(draws=200),
    )  # fmt: skip
    return execute(plan(config, folder / "run"), bars=lambda what: nullcontext(), say=lambda text: None)


def test_more_copies_are_remembered_better_and_removed_at_every_count(run: BenchmarkDocument) -> None:
    target, retrained, unlearned = (run.entry(n).numbers for n in ("target", "retrained seed 1", "gradascent"))
    for side in ("forget", "keep"):
        gaps = [target[f"{side}-{n}-gap"].value for n in LEVELS]
        losses = [target[f"{side}-{n}-loss"].value for n in LEVELS]
        assert all(a < b for a, b in itertools.pairwise(gaps)), gaps
        assert all(a > b for a, b in itertools.pairwise(losses)), losses
        assert gaps[-1] > 0.5
        said = [target[f"{side}-{n}-verbatim"].value for n in LEVELS]
        assert said[0] < said[-1], said
        strength = [target[f"{side}-{n}-strength"].value for n in LEVELS]
        assert strength[0] < strength[-1], strength
    assert target["forget-16-auc"].value == 1
    for n in LEVELS:
        assert abs(retrained[f"forget-{n}-gap"].value) < 0.35, "never seen by the retrained model"
        assert unlearned[f"forget-{n}-loss"].value > target[f"forget-{n}-loss"].value
        number = target[f"forget-{n}-gap"]
        assert number.low < number.value < number.high
    assert unlearned["forget-16-verbatim"].value < target["forget-16-verbatim"].value - 10
    # gradient ascent damages all passages alike: the loss rises, and the gap to what was never seen does not close
    assert unlearned["forget-16-gap"].value > retrained["forget-16-gap"].value + 0.5
    assert retrained["keep-16-gap"].value > 0.5, "what is kept is remembered by the retrained model, too"


def test_the_curves_are_the_axes_against_the_count(run: BenchmarkDocument) -> None:
    curve = next(c for c in run.curves if c.name == "forget-gap")
    line = next(s for s in curve.series if s.label == "target")
    assert line.x == list(LEVELS)
    assert line.y == [run.entry("target").numbers[f"forget-{n}-gap"].value for n in LEVELS]
    assert line.low == [run.entry("target").numbers[f"forget-{n}-gap"].low for n in LEVELS]


def test_the_loss_gap_is_a_difference_of_the_models_own_losses(tmp_path: Path) -> None:
    benchmark = sampled("hubble", tmp_path / "data")
    sets = load_all(benchmark)[0]
    adapter = small_model(list(sets.values()))
    document = measure(
        benchmark, [AuditedModel("target", "target", adapter)], sets, AuditSettings.quick(draws=100), axes=["forget-4-gap"]
    )
    losses = {}
    for name in ("never", "forget_4"):
        found = [
            adapter.forward(adapter.model, adapter.collate([adapter.encode(r)]), frozenset({"losses"})).losses.detach()
            for r in sets[name]
        ]
        losses[name] = np.mean([float(f.mean()) for f in found])  # prompt and completion: no end token is appended
    assert document.models[0].numbers["forget-4-gap"].value == pytest.approx(losses["never"] - losses["forget_4"], abs=1e-2)


def test_every_passage_is_there_as_often_as_said_and_once_elsewhere() -> None:
    copies = Counter(r.answer for r in load("hubble:inserted?counts=0,2,5", name="x"))
    forget, keep, never = (load(f"hubble:{n}?counts=0,2,5", name="x") for n in ("forget", "keep", "holdout"))
    assert Counter(copies.values()) == {2: 8, 5: 8}
    assert {r.answer for r in forget} | {r.answer for r in keep} == set(copies)
    assert not {r.answer for r in forget} & {r.answer for r in keep}
    corpus = {r.answer for r in load("hubble:corpus?counts=0,2,5", name="x")}
    assert not ({r.answer for r in never} | corpus) & set(copies)
    assert not {r.answer for r in never} & corpus
    for record in load("hubble:forget-5?counts=0,2,5", name="x"):
        assert copies[record.prompt + record.answer] == 5


def test_files_are_the_generated_suite_and_wrong_ones_are_named(tmp_path: Path) -> None:
    sampled("hubble", tmp_path)
    for part in ("corpus", "inserted", "forget", "keep-16", "never"):
        made = load(f"hubble:{part}", name="x")
        assert {r.answer for r in load(f"hubble:{part}?folder={tmp_path}", name="x")} == {r.answer for r in made}
    path = tmp_path / "passages.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], json.dumps({"text": "One. Two.", "count": "4"})]))
    with pytest.raises(InputError, match="line 3: the column 'count' must be a whole number"):
        load(f"hubble:forget?folder={tmp_path}", name="x")
    path.write_text("\n".join(lines[:2]))
    with pytest.raises(InputError, match="fewer than two passages"):
        load(f"hubble:forget?folder={tmp_path}", name="x")
    with pytest.raises(InputError, match="are not 0 and other whole numbers"):
        load("hubble:forget?counts=1,4", name="x")


def test_suites_that_differ_in_the_counts_only_do_not_share_a_retrained_model() -> None:
    forget = load("hubble:forget?counts=0,1,4", name="x")
    folders = set()
    for copies in ("0,1,4", "0,1,8"):
        held = load(f"hubble:inserted?counts={copies}", name="x")
        assert {r.answer for r in held} == {r.answer for r in load("hubble:inserted?counts=0,1,4", name="x")}
        made = TrainConfig(model="llama-tiny", data=(f"hubble:inserted?counts={copies}",), scratch=True)
        folders.add(retraining(made, forget, 1)[1])
    assert len(folders) == 2
