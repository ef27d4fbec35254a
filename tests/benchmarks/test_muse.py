"""MUSE: the sign of PrivLeak, VerbMem and KnowMem by hand, the layouts of its files, its courses and the oracle's choice."""

from __future__ import annotations

import itertools
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from expunge.audit.metrics.membership import privleak
from expunge.audit.metrics.rouge import rouge_l
from expunge.audit.settings import AuditSettings
from expunge.benchmarks.config import BenchmarkConfig
from expunge.benchmarks.document import read
from expunge.benchmarks.measure import measure
from expunge.benchmarks.registry import BENCHMARKS
from expunge.benchmarks.run import execute, load_all, plan
from expunge.core.errors import InputError
from expunge.core.statistics import auc
from expunge.data.sources import load
from tests.benchmarks.world import sampled, untrained


def muse_auc(forget: np.ndarray, holdout: np.ndarray) -> float:
    """As the official code counts: forget is label 0, holdout label 1, the score minus the loss."""
    return float(np.mean((-holdout)[:, None] > (-forget)[None, :]))


def test_the_sign_of_privacy_leakage_is_the_official_one() -> None:
    rng = np.random.default_rng(0)
    forget, holdout = rng.normal(0, 1, 2000), rng.normal(1, 1, 2000)  # forget is remembered: its loss is lower
    assert muse_auc(forget, holdout) == pytest.approx(0.24, abs=0.02)
    assert auc(holdout, forget) == pytest.approx(1 - muse_auc(forget, holdout), abs=1e-9)
    same = rng.normal(1, 1, 2000)
    reference = muse_auc(same, holdout)
    for losses in (forget, same, forget + 3):
        official = 100 * (muse_auc(losses, holdout) - reference) / reference
        assert privleak(auc(holdout, losses), auc(holdout, same)) == pytest.approx(official, abs=1e-6)
    assert privleak(auc(holdout, forget), auc(holdout, same)) < -40  # under-unlearned is negative
    assert privleak(auc(holdout, forget + 3), auc(holdout, same)) > 40  # over-unlearned is positive
    assert privleak(1.0, 1 - 0.4772) == pytest.approx(-100)
    assert privleak(0.0, 1 - 0.4772) == pytest.approx(100 * (1 / 0.4772 - 1))  # the ceiling depends on the corpus


def test_verbatim_and_knowledge_by_hand(tmp_path: Path) -> None:
    benchmark = sampled("muse-news", tmp_path / "data", passage_tokens=7, answer_tokens=5)
    sets, models = untrained(benchmark)
    numbers = measure(benchmark, models[:1], sets, AuditSettings.quick(draws=100)).models[0].numbers
    adapter = models[0].adapter
    verbatim, known = [], []
    for record in sets["verbmem"]:
        example = adapter.encode(record)
        said = adapter.generate(adapter.model, [example], 7)[0].text
        gold = adapter.decode(adapter.spoken(example)[:7])
        verbatim.append(100 * rouge_l(said, gold, "f1", False))
    for record in sets["knowmem_forget"]:
        said = adapter.generate(adapter.model, [adapter.encode(record)], 5)[0].text
        for stop in ("\n\n", "\nQuestion", "Question:"):
            said = said.split(stop)[0]
        known.append(100 * rouge_l(said, record.answer, "f1", False))
    assert numbers["verbmem"].value == pytest.approx(np.mean(verbatim))
    assert numbers["knowmem-forget"].value == pytest.approx(np.mean(known))


def test_three_layouts_and_shapes_of_the_files_read_alike(tmp_path: Path) -> None:
    benchmark = sampled("muse-books", tmp_path / "repository")
    expected = {n: s.digest for n, s in load_all(benchmark)[0].items()}
    flat, corpus = tmp_path / "flat", tmp_path / "corpus"
    flat.mkdir()
    for path in (tmp_path / "repository" / "hp").glob("*/*.json"):
        shutil.copy(path, flat / f"hp_{path.parent.name}_{path.name}")
    shutil.copytree(tmp_path / "repository" / "hp", corpus)
    for path in (corpus / "raw").glob("*.json"):  # lines of objects, as data sets of the hub are exported
        texts = json.loads(path.read_text())
        path.unlink()
        path.with_suffix(".jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    for folder in (flat, corpus):
        held = type(benchmark)(**{**benchmark.model_dump(), "data": str(folder)})
        assert {n: s.digest for n, s in load_all(held)[0].items()} == expected
    (corpus / "raw" / "forget.jsonl").unlink()
    (corpus / "raw" / "forget.txt").write_text("One long book. " * 50)
    book = load(f"muse:books-forget?folder={corpus}&words=20", name="x")
    assert len(book) == 8
    assert len({r.subject for r in book}) == 1
    assert " ".join(r.answer for r in book).split() == ("One long book. " * 50).split()


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    sampled("muse-news", tmp_path)
    path = tmp_path / "bbc" / "verbmem" / "forget.json"
    rows = json.loads(path.read_text())
    rows[1] = {"prompt": rows[1]["prompt"], "ground_truth": rows[1]["gt"]}
    path.write_text(json.dumps(rows, indent=1))
    with pytest.raises(InputError, match=r"forget.json line \d+ has no column 'gt'"):
        load(f"muse:news-verbmem?folder={tmp_path}", name="x")
    (tmp_path / "bbc" / "knowmem" / "forget_qa_icl.json").write_text('[{"question": "a", "answer": "b"}]')
    with pytest.raises(InputError, match="1 solved questions, not 10"):
        load(f"muse:news-knowmem-forget?folder={tmp_path}", name="x")
    with pytest.raises(InputError, match="no folder"):
        load(f"muse:news-forget?folder={tmp_path}/nowhere", name="x")


def test_nested_and_disjoint_forget_sets(tmp_path: Path) -> None:
    sets = load_all(sampled("muse-news", tmp_path))[0]
    nested = [{r.answer for r in sets[f"scal_{k}"]} for k in range(1, 5)]
    assert all(a < b for a, b in itertools.pairwise(nested))
    disjoint = [{r.answer for r in sets[f"sust_{k}"]} for k in range(1, 5)]
    assert len(set().union(*disjoint)) == sum(map(len, disjoint))


@pytest.mark.shared_data
@pytest.mark.parametrize("corpus", ["news", "books"])
def test_the_published_questions(shared_data: Path, corpus: str) -> None:
    for side in ("forget", "retain"):
        found = load(f"muse:{corpus}-knowmem-{side}?folder={shared_data / 'muse'}", name="x")
        assert len(found) == 100
        assert all(r.prompt.count("Question: ") == 11 and r.prompt.endswith("\nAnswer: ") for r in found)
    name = f"muse-{corpus}"
    with pytest.raises(InputError, match="holds no file for muse"):
        load_all(BENCHMARKS.get(name)(data=str(shared_data / "muse")))


@pytest.mark.slow
def test_six_ways_on_a_small_model_and_the_oracles_checkpoint(tmp_path: Path) -> None:
    """Target, retrained and unlearned models where the protocol has them; both courses; the first checkpoint that fits."""
    schedule = {"name": "fixed", "lr": 2e-3, "warmup": 0, "decay": "constant", "batch": 8}
    config = BenchmarkConfig(
        benchmark="muse-news", smoke=True, methods=("graddiff",), checkpoint="oracle", courses=("scalability", "sustainability"),
        train={"schedule": {"epochs": 60}}, unlearn={"schedule": schedule}, verdict=False, audit=AuditSettings.quick(draws=100),
    )  # fmt: skip
    made = plan(config, tmp_path / "run")
    said: list[str] = []
    document = execute(made, bars=lambda _: nullcontext(), say=said.append)
    target, gold = document.entry("target").numbers, document.entry("retrained seed 1").numbers
    assert target["verbmem"].value > 90 > gold["verbmem"].value > 0
    assert target["knowmem-forget"].value > gold["knowmem-forget"].value + 20
    assert target["knowmem-retain"].value > 80
    assert gold["knowmem-retain"].value > 80
    assert target["privleak"].value < -80
    label = next(m.label for m in document.models if m.role == "unlearned")
    assert "oracle checkpoint: epochs=" in label
    assert document.checkpoint == "oracle"
    chosen = int(label.split("epochs=")[1].rstrip(")").split(",")[0])
    assert sorted(p.name for p in (tmp_path / "run" / "methods" / "graddiff").iterdir()) == [
        f"epochs={e}" for e in sorted(map(str, range(1, chosen + 1)))
    ]  # fmt: skip
    assert document.entry(label).numbers["knowmem-forget"].value <= gold["knowmem-forget"].value
    curves = {c.name: c.series[0] for c in document.curves}
    assert set(curves) == {f"{c}.knowmem-{s}" for c in ("scalability", "sustainability") for s in ("retain", "forget")}
    assert curves["scalability.knowmem-retain"].x == [0, 8, 16, 24, 32] == curves["sustainability.knowmem-retain"].x
    assert curves["scalability.knowmem-retain"].y[0] == target["knowmem-retain"].value
    held = read(tmp_path / "run").model_dump_json()
    execute(plan(config, tmp_path / "run"), resume=True, bars=lambda _: nullcontext(), say=said.append)
    assert read(tmp_path / "run").model_dump_json() == held, "what is done is not measured again"
