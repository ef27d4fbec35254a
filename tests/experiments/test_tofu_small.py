"""The experiment on a part of TOFU: all stages on a tiny part, a second run that does nothing, and the page."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from experiments.tofu_page import write_page
from experiments.tofu_small import METHODS, TWICE, Plan, experiment, memorised, parse
from tests.world import World

from experiments import tofu_small
from expunge.audit.attacks.relearn import RelearnSettings
from expunge.audit.settings import AuditSettings
from expunge.core.runs import Run
from expunge.data.sources import load
from expunge.methods.registry import METHODS as KNOWN
from expunge.report.text import DASH


def test_memorised_tells_what_is_known_from_what_is_not(people_world: World) -> None:
    known = people_world.target()
    records = list(people_world.split.forget)
    found = memorised(known, records, batch=7)
    examples = [known.encode(r) for r in records]
    assert found["exact"] > 0.9
    assert found["records"] == len(records)
    assert found["tokens"] == sum(e.n_targets for e in examples)
    losses = [people_world.loss(known, [r]) for r in records]
    counts = np.array([e.n_targets for e in examples])
    assert found["loss_record"] == pytest.approx(np.mean(losses), abs=1e-4)
    assert found["loss_token"] == pytest.approx(np.average(losses, weights=counts), abs=1e-4)
    unseen = memorised(people_world.retrained(), records)
    assert unseen["exact"] < 0.5
    assert unseen["loss_token"] > 1.0


def test_the_command_line_makes_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPUNGE_DATA", raising=False)
    plan, page = parse([])
    assert page is None
    assert "EXPUNGE_DATA" not in os.environ
    assert plan.runs == (*((m, 1) for m in METHODS), *((m, 2) for m in METHODS if m in TWICE))
    assert set(METHODS) <= set(KNOWN.names())
    monkeypatch.setenv("EXPUNGE_DATA", "before")
    plan, page = parse(["--data", "here", "--page", "p.md", "--methods", "npo", "rmu", "--twice", "rmu", "--retain", "3"])
    assert os.environ["EXPUNGE_DATA"] == "here"
    assert (page, plan.runs, plan.retain) == (Path("p.md"), (("npo", 1), ("rmu", 1), ("rmu", 2)), 3)
    assert plan.data[0] == "tofu:retain90?authors=3"


@pytest.mark.shared_data
def test_a_tiny_part_from_start_to_end(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EXPUNGE_DATA", str(shared_data))
    short = {name: {"max_new_tokens": 8} for name in ("rouge-l-recall", "model-utility", "fluency")}
    audit = AuditSettings(
        metrics=("probability", "truth-ratio", "forget-quality", "privleak", *short),
        options={**short, "privleak": {"attacks": ("min-k",)}},
        draws=100,
        quantise=(),
        relearn=RelearnSettings(steps=(1,), relative=(0.1,)),
    )
    plan = Plan(
        tmp_path / "runs",
        retain=2,
        forget=2,
        goal=2,
        holdout=2,
        schedule={"name": "fixed", "lr": 5e-3, "epochs": 2, "batch": 16, "warmup": 1, "weight_decay": 0.01},
        retrained=(1, 2),
        runs=(("graddiff", 1), ("idkdpo", 2), ("retrain", 1)),
        parts={"schedule": {"name": "adaptive", "lr": 1e-3, "epochs": 1, "steps": 4}},
        audit=audit,
        longest=8,
    )
    result = experiment(plan)
    document = result.document
    labels = ["target", "retrained seed 1", "retrained seed 2", "graddiff, seed 1", "idkdpo, seed 2"]
    assert [m.label for m in document.models] == labels
    assert all(m.judgement for m in document.models)
    sizes = {name: (held["records"], held["clusters"]) for name, held in document.data.items()}
    assert sizes == {
        "forget": (40, 2), "retain": (40, 2), "holdout": (40, 2), "real_authors": (100, 100), "world_facts": (117, 117),
    }  # fmt: skip
    _check_sets(plan)
    assert {n: f["records"] for n, f in result.learnt.items()} == {"target": 297, "retrained-1": 257, "retrained-2": 257}
    assert "untrained base" in result.failed["retrain-1"]

    page = tmp_path / "page.md"
    write_page(result, page)
    text = page.read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert str(shared_data) not in text
    assert f"| retrain, seed 1 | {DASH} | **failed**: " in text
    assert all(f"\n| {label} | " in text for label in labels)
    assert "3 unlearning runs" in text
    assert "1 failed" in text
    assert "**Not reached by: target" in text, "two epochs are not enough, and the page must say so"
    assert text.count("\n| graddiff, seed 1 | ") == 3

    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in plan.out.rglob("model.safetensors")}
    again = experiment(plan)
    assert {p: p.stat().st_mtime_ns for p in plan.out.rglob("model.safetensors")} == before
    assert capsys.readouterr().err.count("from an earlier run") == len(before) + 1  # and the audit
    assert again.document == document


def _check_sets(plan: Plan) -> None:
    """No model but the target saw the forget set, nothing saw the holdout, and no author of the audit told when to stop."""
    trained = {r.prompt for source in plan.data for r in load(source, name="x")}
    forget = {r.prompt for r in load(plan.forget_source, name="x")}
    kept = {r.prompt for r in load(plan.out / "data" / "retain.jsonl", name="x")}
    assert forget <= trained
    assert kept == trained - forget
    twin = Run.open(plan.out / "retrained-1").manifest
    assert len(twin["config"]["exclude"]) == len(forget)
    assert twin["inputs"]["data"]["records"] == 257
    run = Run.open(plan.out / "graddiff-1").manifest
    assert run["inputs"]["forget"]["records"] == 40
    assert run["inputs"]["holdout"]["clusters"] == plan.goal
    goal = load(run["config"]["holdout"], name="goal")
    document = json.loads((plan.out / "audit.json").read_text(encoding="utf-8"))
    whole = load(f"tofu:holdout10?authors={plan.goal + plan.holdout}", name="holdout")
    left = [r for r in whole if r.cluster not in set(goal.clusters())]
    audited = type(whole)("holdout", tuple(left))
    assert document["data"]["holdout"]["digest"] == audited.digest
    assert not {r.prompt for r in audited} & trained
    assert len(load("tofu:retain_perturbed", name="x")) == tofu_small.PERTURBED_RETAIN * 20
