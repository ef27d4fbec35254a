"""What goes wrong in other toolkits, each a test: silent references, results of other splits, shared objects, many passes."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest

from expunge.audit import scores
from expunge.audit.settings import AuditSettings
from expunge.audit.store import ScoreStore
from expunge.benchmarks.config import BenchmarkConfig
from expunge.benchmarks.measure import measure
from expunge.benchmarks.run import execute, plan
from expunge.core.errors import InputError
from expunge.core.runs import Run
from tests.benchmarks.world import sampled, untrained

QUICK = AuditSettings.quick(draws=100, budget=20)


def test_defect_07_without_a_reference_nothing_stands_in_for_it(tmp_path: Path) -> None:
    """PrivLeak is no AUC against 0.5, forget quality no empty number: they are absent, and said to be."""
    benchmark = sampled("tofu", tmp_path / "data", split="forget01")
    sets, models = untrained(benchmark)
    alone = [m for m in models if m.role != "retrained"]
    document = measure(benchmark, alone, sets, QUICK, axes=["forget-quality", "privleak", "auc-min-k"])
    for model in document.models:
        assert set(model.numbers) == {"auc-min-k"}
    said = " ".join(document.not_measured)
    assert "Forget quality" in said
    assert "PrivLeak" in said
    assert "retrained model" in said


def test_defect_08_what_was_measured_on_one_split_is_never_taken_for_another(tmp_path: Path) -> None:
    benchmark = sampled("tofu", tmp_path / "data", split="forget01")
    other = type(benchmark)(**{**benchmark.model_dump(), "split": "forget05"})
    store, (sets, models) = ScoreStore(tmp_path / "scores"), untrained(other)
    axes = ["forget-probability", "forget-quality"]
    first = measure(benchmark, models, {**sets, **untrained(benchmark)[0]}, QUICK, axes=axes, store=store)
    second = measure(other, models, sets, QUICK, axes=axes, store=store)
    assert first.data["forget_scored"]["digest"] != second.data["forget_scored"]["digest"]
    fresh = measure(other, models, sets, QUICK, axes=axes)
    assert [m.numbers for m in second.models] == [m.numbers for m in fresh.models]
    out = tmp_path / "run"
    Run.start(
        out, "benchmark", BenchmarkConfig(benchmark="tofu", smoke=True, options={"split": "forget01"}).model_dump(mode="json")
    )
    config = BenchmarkConfig(benchmark="tofu", smoke=True, options={"split": "forget05"})
    with pytest.raises(InputError, match=r"started with other settings: .*options"):
        execute(plan(config.checked(), out), resume=True, bars=lambda _: nullcontext(), say=lambda _: None)


def test_defect_10_settings_of_one_measurement_do_not_leak_into_the_next(tmp_path: Path) -> None:
    geometric = sampled("tofu", tmp_path / "data", split="forget01")
    arithmetic = type(geometric)(**{**geometric.model_dump(), "mean": "arithmetic"})
    sets, models = untrained(geometric)
    found = [
        measure(b, models[:1], sets, QUICK, axes=["forget-truth-ratio"]).models[0].numbers
        for b in (geometric, arithmetic, geometric)
    ]
    assert found[0] == found[2] != found[1]


def test_defect_11_all_attacks_and_metrics_of_a_text_share_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = sampled("muse-news", tmp_path / "data")
    sets, models = untrained(benchmark)
    seen: Counter[tuple[int, str]] = Counter()
    block = scores._score_block

    def counted(adapter, examples, *rest):
        seen.update((id(adapter), e.id) for e in examples)
        return block(adapter, examples, *rest)

    monkeypatch.setattr(scores, "_score_block", counted)
    document = measure(benchmark, models, sets, QUICK, axes=["privleak", "auc-min-k", "auc-loss", "auc-zlib"])
    assert {"auc-min-k", "auc-loss", "auc-zlib"} <= set(document.models[0].numbers)
    assert set(seen.values()) == {1}
    assert len(seen) == 3 * (len(sets["privleak_forget"]) + len(sets["privleak_holdout"]))


def test_a_destroyed_model_does_not_look_better(tmp_path: Path) -> None:
    """Losses that are no numbers stay in and make the number what it is; RWKU's own code leaves them out."""
    benchmark = sampled("rwku", tmp_path / "data")
    sets, models = untrained(benchmark)
    adapter = models[0].adapter
    embedding = adapter.model.get_input_embeddings().weight
    embedding.data[adapter.tokenizer.convert_tokens_to_ids(" birthplace")] = float("nan")
    number = measure(benchmark, models[:1], sets, QUICK, axes=["fm"]).models[0].numbers["fm"]
    assert number.value is None
    assert any("not a finite number" in flag for flag in number.flags)
