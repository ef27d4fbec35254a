"""A package outside of Expunge adds a method and a metric by entry point: the one under ``tests/plugin``, really installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
import json, math, torch
from expunge.adapters.registry import ADAPTERS
from expunge.audit.evaluate import evaluate_metric
from expunge.audit.metrics.registry import METRICS
from expunge.methods.catalogue import serves
from expunge.methods.evaluate import Given, loss_terms
from expunge.methods.recipe import build
from expunge.methods.registry import METHODS, TERMS

crossed = build("custom", {"forget": "maximum-entropy", "retain": "kl"})
torch.manual_seed(0)
logits = torch.randn(2, 5, 11, requires_grad=True)
labels = torch.tensor([[-100, -100, 3, 4, 5], [-100, 7, 8, -100, -100]])
terms = loss_terms("me", forget=Given(logits, labels), retain=Given(torch.randn(1, 3, 11), torch.tensor([[-100, 1, 2]])))
expected, places = [], []
for b, row in enumerate(labels.tolist()):
    for t, token in enumerate(row):
        if token != -100:
            p = logits[b, t - 1].softmax(-1).tolist()
            expected.append(math.log(11) + sum(v * math.log(v) for v in p))
            places.append((b, t - 1))
terms["forget.maximum-entropy"].backward()
with torch.no_grad():
    after = logits - logits.grad
print(json.dumps({
    "listed": "me" in METHODS.names() and "reciprocal-rank" in METRICS.names(),
    "origins": [METHODS.origin("me"), METRICS.origin("reciprocal-rank")],
    "broken": {**METHODS.broken(), **TERMS.broken(), **METRICS.broken()},
    "recipe": build("me", {"retain.weight": 2, "gradient": "project"}).spec(),
    "paper": build("me", {"schedule": "paper"}).spec(),
    "crossed": [t.name for t in crossed.terms()],
    "serves": serves("me", ADAPTERS.get("language").offers)[0],
    "value": terms["forget.maximum-entropy"].item(), "expected": sum(expected) / len(expected),
    "flatter": all(after[b, t].softmax(-1).max() < logits[b, t].softmax(-1).max() for b, t in places),
    "metric": evaluate_metric("reciprocal-rank", ranks=[0, 1, 3]),
}))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh interpreter finds once the package is installed beside Expunge."""
    source, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT / "tests" / "plugin", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, capture_output=True, text=True, timeout=120)
    paths = [str(ROOT / "src"), str(target)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_it_is_found_by_name(said: dict[str, Any]) -> None:
    assert said["listed"]
    assert said["broken"] == {}
    assert said["origins"] == ["expunge-example", "expunge-example"]


def test_its_method_is_a_recipe_like_any_other(said: dict[str, Any]) -> None:
    recipe = said["recipe"]
    assert [t["name"] for t in recipe["forget"]] == ["maximum-entropy"]
    assert recipe["retain"] == [{"name": "nll", "weight": 2.0, "targets": "all", "reduction": "token"}]
    assert recipe["gradient"]["name"] == "project"
    assert said["paper"]["schedule"]["lr"] == 1e-5
    assert said["paper"]["retain"] == [{"name": "nll", "weight": 1.0, "targets": "all", "reduction": "token"}]
    assert said["crossed"] == ["maximum-entropy", "kl"]
    assert said["serves"] is True


def test_its_term_is_what_its_formula_says(said: dict[str, Any]) -> None:
    assert said["value"] == pytest.approx(said["expected"], rel=1e-5)
    assert said["flatter"], "a step along its gradient must make the most likely tokens less likely"


def test_its_metric_can_be_evaluated(said: dict[str, Any]) -> None:
    assert said["metric"] == pytest.approx((1 + 1 / 2 + 1 / 4) / 3)
