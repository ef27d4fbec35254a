"""Measures of the audit of rows that other files do not look at: against brute force, and with the sign that they must have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from expunge.audit.document import AuditDocument
from expunge.audit.kernel.membership import logistic_attack, svc_efficacy
from expunge.audit.kernel.regression import l1_attack
from expunge.audit.run import AuditedModel, audit
from expunge.audit.settings import AuditSettings
from expunge.data.rows import table
from expunge.engine.members import Training
from expunge.pipeline.row_audit import RowAuditConfig, comparison
from expunge.pipeline.row_runs import sets_of
from expunge.pipeline.supervised import Supervised, target_of

NAMES = ("nomus", "tug-of-war-mia", "retrain-free-divergence", "relearn-time", "mia-efficacy", "accuracy")


def network(outputs: int = 10) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


def number() -> nn.Module:
    return network(1)


def digits(task: str) -> Supervised:
    held = load_digits()
    order = np.random.default_rng(3).permutation(len(held.target))
    inputs, labels = (held.data / 16).astype(np.float32)[order], held.target[order]
    if task == "regression":
        labels = inputs.sum(1) / 10 + 0.3 * np.random.default_rng(0).normal(size=len(labels))
    data, unseen = (table(inputs[a:b], labels[a:b], task=task) for a, b in ((0, 400), (400, 900)))
    made = network if task == "classification" else number
    return Supervised(data, made, Training(steps=400, batch=100, lr=1e-2), holdout=unseen)


def audited(task: str, choice: dict, metrics: tuple[str, ...]) -> tuple[AuditDocument, dict, dict]:
    problem = digits(task)
    target = problem.adapter(target_of(problem))
    chosen = problem.data.select(**choice)
    sets = sets_of(problem, chosen, seed=0)
    gold, _ = comparison(problem, target, chosen, sets, RowAuditConfig(retrain=2))
    same = target.copy()
    with torch.no_grad():
        same.model[0].weight.mul_(1 + 1e-4)
    broken = target.copy()
    with torch.no_grad():
        for p in broken.model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    models = [AuditedModel("target", "target", target), *gold]
    models += [AuditedModel("same", "unlearned", same), AuditedModel("broken", "unlearned", broken)]
    document = audit(models, sets, AuditSettings(metrics=metrics, draws=100, relearn=None, quantise=(), read_out=False))
    held = {m.label: m.adapter.model for m in models}
    return document, held, sets


@pytest.fixture(scope="module")
def of_class():
    return audited("classification", {"classes": ["3"]}, NAMES)


@pytest.fixture(scope="module")
def of_rows():
    return audited("classification", {"ids": [str(i) for i in range(60)]}, NAMES)


def outputs(model: nn.Module, rows) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        scores = model(torch.from_numpy(np.stack([r.inputs for r in rows]))).double()
    return scores, torch.tensor([r.target for r in rows])


def losses(model: nn.Module, rows) -> np.ndarray:
    scores, y = outputs(model, rows)
    return nn.functional.cross_entropy(scores, y, reduction="none").numpy()


def value(document: AuditDocument, label: str, key: str) -> float:
    found = document.entry(label).numbers[key].value
    assert found is not None
    return found


def test_relearning_takes_retrained_models_longest_and_the_target_no_step(of_class) -> None:
    document, _, _ = of_class
    steps = {m.label: value(document, m.label, "relearn-time") for m in document.models if m.label != "broken"}
    assert steps["target"] == steps["same"] == 0
    assert steps["retrained seed 1"] >= 2
    assert value(document, "same", "relearn-time.ratio") == 0
    ratio = value(document, "retrained seed 1", "relearn-time.ratio")
    assert ratio == pytest.approx(steps["retrained seed 1"] / steps["retrained seed 2"])
    broken = document.entry("broken").numbers["relearn-time"].value
    assert broken is None or broken > steps["retrained seed 1"]


def test_relearning_changes_no_model(of_class) -> None:
    document, held, sets = of_class
    scores, y = outputs(held["target"], sets["forget"])
    assert value(document, "target", "forget.accuracy") == float((scores.argmax(1) == y).double().mean())


def test_nomus_is_half_accuracy_and_half_an_attack(of_rows) -> None:
    document, held, sets = of_rows
    for label in ("target", "retrained seed 1"):
        attack = logistic_attack(losses(held[label], sets["holdout"]), losses(held[label], sets["forget"]), seed=0)
        scores, y = outputs(held[label], sets["test"])
        expected = float((scores.argmax(1) == y).double().mean()) / 2 + (1 - 2 * abs(attack - 0.5)) / 2
        assert value(document, label, "nomus") == pytest.approx(expected, abs=1e-3)


def test_the_tug_of_war_reads_the_attack(of_rows) -> None:
    document, held, sets = of_rows

    def parts(label: str) -> np.ndarray:
        p = {n: torch.exp(-torch.from_numpy(losses(held[label], sets[n]))).numpy() for n in ("retain", "test", "forget")}
        hits = [float((s.argmax(1) == y).double().mean()) for s, y in (outputs(held[label], sets[n]) for n in ("retain", "test"))]
        return np.array([svc_efficacy(p["retain"], p["test"], p["forget"]), *hits])

    gold = (parts("retrained seed 1") + parts("retrained seed 2")) / 2
    expected = float(np.prod(1 - np.abs(parts("target") - gold)))
    assert value(document, "target", "tug-of-war-mia") == pytest.approx(expected, abs=0.02)
    assert value(document, "broken", "tug-of-war-mia") < 0.5 < value(document, "same", "tug-of-war-mia")


def test_without_retraining_a_broken_model_is_far_from_the_targets_answers(of_rows, of_class) -> None:
    document, _, _ = of_rows
    far = value(document, "broken", "retrain-free-divergence")
    assert value(document, "target", "retrain-free-divergence") < 0.05 < far
    gone, _, _ = of_class
    assert "retrain-free-divergence" not in gone.entry("target").numbers
    assert any("unseen rows of every class" in s for s in gone.not_shown)


def test_errors_betray_the_rows_of_a_regressor() -> None:
    names = ("members-by-error", "relearn-time", "absolute-error")
    document, held, sets = audited("regression", {"ids": [str(i) for i in range(60)]}, names)
    for label in ("target", "retrained seed 1"):
        errors = []
        for name in ("retain", "test", "forget"):
            with torch.no_grad():
                predicted = held[label](torch.from_numpy(np.stack([r.inputs for r in sets[name]])))[:, 0].numpy()
            errors.append(np.abs(predicted - np.array([r.target for r in sets[name]])))
        expected = l1_attack(*errors)
        assert value(document, label, "members-by-error") == pytest.approx(expected, abs=0.02)
    assert value(document, "target", "members-by-error") > value(document, "retrained seed 1", "members-by-error") + 0.2
    assert value(document, "target", "relearn-time") == 0
    assert document.entry("retrained seed 1").numbers["relearn-time"].value != 0
