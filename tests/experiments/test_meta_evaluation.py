"""The meta-evaluation of metrics: its formulas, its pools, a run on tiny models, and what reports say of a metric that fails."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from experiments.meta_evaluation import (
    SHARES,
    TOWARD,
    Plan,
    experiment,
    faithfulness,
    harmonic,
    kept,
    members,
    pools,
    regained,
    table,
    texts,
    threshold,
)
from experiments.meta_page import write_page

from expunge.audit import trusted
from expunge.audit.settings import AuditSettings
from expunge.data.sources import load

SMALL = "persons=12&forget=4&holdout=4&facts=4&authors=2&countries=2"


def test_faithfulness_is_the_area_and_turns_round_with_the_sign():
    know, blank = [0.9, 0.8, 0.7], [0.1, 0.2, 0.75]
    found = faithfulness(know, blank, 1)
    pairs = [(k > b) + 0.5 * (k == b) for k in know for b in blank]
    assert found["auc"] == pytest.approx(np.mean(pairs))
    assert faithfulness(know, blank, -1)["auc"] == pytest.approx(1 - found["auc"])
    assert found["low"] < found["auc"] < found["high"]
    assert (
        0.25 < faithfulness(list(np.random.default_rng(0).random(30)), list(np.random.default_rng(1).random(30)), 1)["auc"] < 0.75
    )


def test_a_metric_that_sees_knowledge_come_back_is_not_robust():
    assert regained(0.1, 0.3, 0.1, 0.3) == 1  # no faster than a retrained model
    assert regained(0.1, 0.5, 0.1, 0.3) == pytest.approx(0.5)
    assert regained(0.1, 0.5, 0.3, 0.1) == 0  # a retrained model gains nothing, this one does
    assert regained(0.5, 0.4, 0.1, 0.3) == 1
    assert kept(0.2, 0.1) == 1
    assert kept(0.2, 0.8) == pytest.approx(0.25)
    assert kept(0.0, 0.0) == 1
    assert harmonic([1.0, 0.5]) == pytest.approx(2 / 3)
    assert harmonic([1.0, 0.0]) == 0


def test_the_threshold_separates_pools_that_can_be_separated():
    assert 0.3 < threshold([0.9, 0.8, 0.6], [0.1, 0.3]) < 0.6


def test_the_pools_are_what_they_are_called():
    forget = list(load(f"people:forget?{SMALL}", name="forget"))
    found = pools(forget, forget)
    assert [r.answer for r in found["P"]["taught"]] == [r.answer for r in forget]
    assert {(r.prompt, r.answer) for r in found["P"]["in-other-words"]} == {(r.question_paraphrase, r.paraphrase) for r in forget}
    for wrong, right in zip(found["N"]["wrong-answers"], forget, strict=True):
        assert wrong.prompt == right.prompt
        assert wrong.answer in right.perturbed
    assert len(texts(forget)) == 4
    assert all(r.is_text for r in texts(forget))
    for r in forget:
        assert any(r.paraphrase in t.answer for t in texts(forget) if t.subject == r.subject)
    made = members(Plan(Path("x")))
    assert [sum(m.pool == p for m in made) for p in "PN"] == [12, 12]
    assert len({m.seed for m in made}) == len(made)
    assert {(m.kind, m.lr, m.epochs) for m in made if m.pool == "P"} == {
        (k, lr, e) for k in found["P"] for lr in Plan(Path("x")).rates for e in Plan(Path("x")).epochs
    }  # every kind meets every training


def test_the_table_counts_only_models_that_the_metric_calls_unlearned():
    key = "forget.probability"
    found = {"P": [{key: 0.9}, {key: 0.8}], "N": [{key: 0.1}, {key: 0.2}]}
    gone = {
        "before": {key: 0.2},
        "relearned": {key: 0.6},
        "rounded": {key: 0.4},
        "ret_before": {key: 0.1},
        "ret_relearned": {key: 0.2},
    }
    row = table(found, [gone, {**gone, "before": {key: 0.85}}])[key]
    assert row["auc"] == 1
    assert row["models"] == 1
    assert row["relearning"] == pytest.approx(0.25)
    assert row["rounding"] == pytest.approx(0.5)
    assert row["robustness"] == pytest.approx(1 / 3)
    assert set(table(found, [])) == {key}


def test_controls_and_shares_are_known_metrics():
    assert set(SHARES) <= set(TOWARD)
    assert [k for k, v in TOWARD.items() if v == 0]


def test_a_run_of_tiny_models_and_its_page(tmp_path):
    plan = Plan(
        tmp_path / "run", world=SMALL, others="people:full?persons=4&forget=1&seed=7&facts=4", each=3, epochs=(12,),
        rates=(5e-3,), methods=("graddiff",), references=(101, 102),
        audit=AuditSettings(
            relearn=None, quantise=(), samples_forget=0, samples_retain=0, draws=100, metrics=("probability", "truth-ratio")
        ),
    )  # fmt: skip
    found = experiment(plan)
    row = found["metrics"]["forget.probability"]
    assert (row["know"], row["not_know"]) == (3, 3)
    assert row["auc"] > 0.7  # with the sign flipped it would be below 0.3
    assert found["metrics"]["random number"]["toward"] == 0
    started = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["numbers-pools"]["started"]
    assert experiment(plan)["metrics"] == found["metrics"]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["numbers-pools"]["started"] == started
    write_page(found, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "`forget.probability`" in page
    assert "$" not in page


def test_a_metric_that_fails_is_said_to_fail(monkeypatch):
    rows = {
        "forget.probability": {"toward": 1, "auc": 0.6, "low": 0.4, "high": 0.8},
        "forget.loss": {"toward": -1, "auc": 0.99, "low": 0.9, "high": 1.0},
        "random number": {"toward": 0, "auc": 0.5, "low": 0.3, "high": 0.7},
    }
    monkeypatch.setattr(trusted, "measured", lambda: {"faithful": 0.8, "models": 24, "metrics": rows})
    assert "an area of 0.60 [0.40, 0.80]" in trusted.warning("forget.probability")
    assert trusted.warning("forget.loss") == trusted.warning("random number") == trusted.warning("unknown") == ""
    assert trusted.fails({"auc": 0.9, "low": 0.5}, 0.8)


def test_the_numbers_that_reports_read_are_those_of_the_page():
    held = trusted.measured()
    page = (Path(__file__).parents[2] / "docs" / "results" / "metric-meta-evaluation.md").read_text()
    for key, row in held["metrics"].items():
        assert f"| `{key}` |" in page
        assert f"{row['auc']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" in page
    assert set(held["metrics"]) <= set(TOWARD)
