"""PISTOL and KnowUnDo: parts of the graph, what a retrained model has not seen, layouts of the files, errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from expunge.adapters.language import LanguageAdapter
from expunge.audit.run import AuditedModel
from expunge.audit.settings import AuditSettings
from expunge.benchmarks.config import BenchmarkConfig
from expunge.benchmarks.measure import measure
from expunge.benchmarks.registry import BENCHMARKS
from expunge.benchmarks.run import load_all, plan
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.data.records import Record, content_key
from expunge.data.sources import load
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.terms.likelihood import NLL
from tests.benchmarks.world import sampled, small_model


def test_the_edges_fall_into_parts_by_the_entities_that_they_share(tmp_path: Path) -> None:
    names = ("A_B", "A_C", "A_C2", "B_D", "E1_F1", "E1_q1", "C2_q1")
    rows = [{"question": f"What of {e}?", "answer": "8.", "edge": e} for e in names]
    (tmp_path / "sample_data_1.json").write_text(json.dumps(rows))

    def edges(part: str, wanted: str) -> list[str]:
        return [r.subject for r in load(f"pistol:{part}?folder={tmp_path}&edges={wanted}", name="x")]

    assert edges("forget", "A_C2") == ["A_C2"]
    assert edges("retain", "A_C2") == ["A_B", "A_C", "B_D", "E1_F1", "E1_q1", "C2_q1"]
    assert edges("connected", "A_C2") == ["A_B", "A_C", "C2_q1"]
    assert edges("apart", "A_C2") == ["B_D", "E1_F1", "E1_q1"]
    assert edges("forget", "A_B,E1_q1") == ["A_B", "E1_q1"]
    assert edges("connected", "A_B,E1_q1") == ["A_C", "A_C2", "B_D", "E1_F1", "C2_q1"]
    with pytest.raises(InputError, match="no edge for pistol:apart"):
        edges("apart", "A_B,E1_q1")
    with pytest.raises(InputError, match="edge 'A_X'"):
        edges("forget", "A_X")
    rows[2]["edge"] = "AC2"
    (tmp_path / "sample_data_1.json").write_text(json.dumps(rows, indent=1))
    with pytest.raises(InputError, match=r"sample_data_1.json line \d+: the edge 'AC2' does not join two entities"):
        edges("forget", "A_B")
    del rows[2]["edge"]
    (tmp_path / "sample_data_1.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match="no column 'edge'"):
        edges("forget", "A_B")


def trained(records: Sequence[Record], every: Sequence[Any], seed: int) -> LanguageAdapter:
    adapter = small_model(every, seed=seed, context=128)
    recipe = compose("train", retain=[NLL()], schedule=Fixed(lr=5e-3, epochs=150, batch=8, warmup=1, weight_decay=0.01))
    train(adapter, recipe, {Stream.RETAIN: [adapter.encode(r) for r in records]}, Engine(seed=seed))
    adapter.model.eval()
    return adapter


@pytest.mark.slow
def test_a_model_without_the_edge_knows_its_neighbours_and_not_the_edge(tmp_path: Path) -> None:
    benchmark = sampled("pistol", tmp_path / "data")
    sets = load_all(benchmark)[0]
    every = list(sets.values())
    models = [
        AuditedModel("target", "target", trained([*sets["forget"], *sets["retain"]], every, 0)),
        AuditedModel("retrained", "retrained", trained(list(sets["retain"]), every, 1)),
    ]
    document = measure(benchmark, models, sets, AuditSettings.quick(draws=100))
    target, gold = (document.entry(n).numbers for n in ("target", "retrained"))
    for part in ("forget", "retain", "connected", "apart"):
        assert target[f"{part}-rouge"].value > 0.9, part  # type: ignore[operator]
        assert target[f"{part}-probability"].value > 0.7, part  # type: ignore[operator]
    assert gold["forget-rouge"].value < 0.5  # type: ignore[operator]
    assert gold["connected-rouge"].value > 0.9  # type: ignore[operator]
    assert gold["apart-rouge"].value > 0.9  # type: ignore[operator]
    assert gold["forget-probability"].value < target["forget-probability"].value - 0.4  # type: ignore[operator]


def test_a_retrained_model_has_not_seen_the_val_part_of_what_is_forgotten(tmp_path: Path) -> None:
    benchmark = sampled("knowundo", tmp_path / "data")
    made = plan(BenchmarkConfig(benchmark="knowundo", options=benchmark.model_dump(), model="llama-tiny"), tmp_path / "run")
    gone = set(next(iter(made.gold.values()))[0].exclude)
    assert gone == {content_key(r) for n in ("unlearn", "unlearn_val") for r in made.sets[n]}
    kept = {content_key(r) for n in ("retention", "retention_val") for r in made.sets[n]}
    assert not gone & kept
    assert len(made.sets["unlearn"]) == len(made.sets["unlearn_val"]) == 8


def test_accuracy_and_loss_are_those_of_the_models_own_scores(tmp_path: Path) -> None:
    benchmark = sampled("knowundo", tmp_path / "data", domain="copyright")
    sets = load_all(benchmark)[0]
    adapter = small_model(list(sets.values()))
    numbers = measure(benchmark, [AuditedModel("t", "target", adapter)], sets, AuditSettings.quick(draws=100)).models[0].numbers
    hits, losses = [], []
    for record in sets["unlearn_val"]:
        batch = adapter.collate([adapter.encode(record)])
        out = adapter.forward(adapter.model, batch, frozenset({"losses", "logits"}))
        losses.append(float(out.losses.detach().mean()))
        hits.append(float((out.logits.argmax(-1) == batch.targets)[:-1].float().mean()))  # without the end token
    assert numbers["unlearn-loss"].value == pytest.approx(sum(losses) / len(losses), rel=1e-3)
    assert numbers["unlearn-accuracy"].value == pytest.approx(100 * sum(hits) / len(hits), abs=1e-3)


def test_the_layouts_of_knowundo_read_alike_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    sampled("knowundo", tmp_path / "tree")
    expected = load(f"knowundo:unlearn-val?folder={tmp_path / 'tree'}", name="x").digest
    held = json.loads((tmp_path / "tree" / "privacy" / "unlearn.json").read_text())
    layouts = {"flat": "privacy_unlearn.json", "listed": "privacy/unlearn.json", "lines": "privacy/unlearn.jsonl"}
    for name, file in layouts.items():
        path = tmp_path / name / file
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps([held] if name == "listed" else held))
        assert load(f"knowundo:unlearn-val?folder={tmp_path / name}", name="x").digest == expected, name
    hub = tmp_path / "hub" / "privacy"
    hub.mkdir(parents=True)
    pandas.DataFrame([held]).to_parquet(hub / "unlearn-00000-of-00001.parquet")
    assert load(f"knowundo:unlearn-val?folder={tmp_path / 'hub'}", name="x").digest == expected

    path = tmp_path / "flat" / "privacy_unlearn.json"
    for content, match in (
        ({"train": held["train"]}, "privacy_unlearn.json row 1 has no column 'val'"),
        ({"train": held["train"], "val": [{"text": "a", "label": "b"}]}, "val 0 has no column 'labels'"),
        ([held, held], "has 2 rows, not one"),
        ({"train": [], "val": held["val"]}, "the column 'train' has 0 items"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=match):
            load(f"knowundo:unlearn-val?folder={tmp_path / 'flat'}", name="x")
    path.write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        load(f"knowundo:unlearn?folder={tmp_path / 'flat'}", name="x")
    with pytest.raises(InputError, match="holds no file for knowundo copyright"):
        load_all(BENCHMARKS.get("knowundo")(data=str(tmp_path / "hub"), domain="copyright"))  # type: ignore[call-arg]
