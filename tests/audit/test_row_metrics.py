"""Measures of the audit of rows that other files do not look at: against brute force, and with the sign that they must have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from expunge.adapters.supervised import ClassifierAdapter
from expunge.audit.document import AuditDocument
from expunge.audit.kernel.gaps import zero_retrain_forgetting
from expunge.audit.kernel.membership import entropy_attack, logistic_attack, sorted_softmax_attack, svc_efficacy
from expunge.audit.kernel.regression import l1_attack
from expunge.audit.kernel.representation import knn_transfer, linear_cka
from expunge.audit.run import AuditedModel, audit
from expunge.audit.settings import AuditSettings
from expunge.data.rows import table
from expunge.engine.members import Training
from expunge.engine.reference import IncompetentReference
from expunge.pipeline.row_audit import RowAuditConfig, comparison
from expunge.pipeline.row_runs import sets_of
from expunge.pipeline.supervised import Supervised, target_of

NAMES = (
    "nomus", "tug-of-war-mia", "retrain-free-divergence", "relearn-time", "mia-efficacy", "mia-entropy", "asr", "accuracy",
    "average-gap", "tug-of-war", "adaptive-score", "zero-retrain-forgetting", "activation-distance", "representation",
)  # fmt: skip
GOLD = ("retrained seed 1", "retrained seed 2")


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
        broken.model[0].weight[3:] = 0.0  # three features are left: neighbours in them are not of one class
        broken.model[0].bias[3:] = 0.0
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
    for label in ("target", *GOLD):
        scores, y = outputs(held[label], sets["forget"])
        assert value(document, label, "forget.accuracy") == float((scores.argmax(1) == y).double().mean())
    assert value(document, GOLD[0], "forget.accuracy") == 0, "else nothing would show that it was trained"


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


class Said:
    """What a model says of a set, computed here and not by the audit."""

    def __init__(self, model: nn.Module, rows) -> None:
        scores, y = outputs(model, rows)
        self.p, self.y = scores.softmax(1).numpy(), y.numpy()
        self.hit = self.p.argmax(1) == self.y
        self.own = self.p[np.arange(len(y)), self.y]
        self.entropy = -(self.p * np.log(self.p)).sum(1)
        with torch.no_grad():
            self.features = model[:2](torch.from_numpy(np.stack([r.inputs for r in rows]))).numpy()


@pytest.fixture(scope="module", params=["class", "rows"])
def said(request, of_class, of_rows):
    document, held, sets = of_class if request.param == "class" else of_rows
    return document, {(m, n): Said(model, rows) for m, model in held.items() for n, rows in sets.items()}, request.param, sets


def test_attackers_read_what_they_say_they_read(said) -> None:
    document, of, _, _ = said
    for label in ("target", "same", "broken", *GOLD):
        retain, test, forget = (of[label, n] for n in ("retain", "test", "forget"))
        assert value(document, label, "mia-efficacy") == pytest.approx(svc_efficacy(retain.own, test.own, forget.own), abs=0.02)
        expected = entropy_attack(retain.entropy, test.entropy, forget.entropy)
        assert value(document, label, "mia-entropy") == pytest.approx(expected, abs=0.02)
        assert value(document, label, "asr") == pytest.approx(sorted_softmax_attack(retain.p, test.p, forget.p, seed=0), abs=0.03)


def test_gaps_are_to_the_other_retrained_models(said) -> None:
    document, of, which, _ = said

    def rates(label: str) -> np.ndarray:
        return np.array([of[label, n].hit.mean() for n in ("forget", "retain", "test")])

    def mia(label: str) -> float:
        return svc_efficacy(*(of[label, n].own for n in ("retain", "test", "forget")))

    for label, others in (("target", GOLD), ("broken", GOLD), (GOLD[0], GOLD[1:])):
        gold = np.mean([rates(o) for o in others], axis=0)
        gaps = np.abs(rates(label) - gold)
        assert value(document, label, "tug-of-war") == pytest.approx(float(np.prod(1 - gaps)), abs=1e-6)
        efficacy = abs(mia(label) - np.mean([mia(o) for o in others]))
        assert value(document, label, "average-gap") == pytest.approx(float(np.mean([*gaps, efficacy])), abs=0.01)
        found = np.mean([np.linalg.norm(of[label, "forget"].p - of[o, "forget"].p, axis=1).mean() for o in others])
        assert value(document, label, "forget.activation-distance") == pytest.approx(float(found), abs=1e-5)
    forget, _, test = rates("broken")
    delta = forget if which == "class" else abs(forget - test)
    expected = (1 - (rates("target")[2] - test)) / (1 + delta)
    assert value(document, "broken", "adaptive-score") == pytest.approx(expected, abs=1e-6)


def test_answers_are_compared_with_those_of_a_random_network(said) -> None:
    document, of, _, sets = said
    # Its weights depend on its shape and the seed of the protocol alone.
    adapter = ClassifierAdapter(network(), [str(c) for c in range(10)])
    random = IncompetentReference(adapter, torch.device("cpu"), 0).adapter.model
    q = Said(random, sets["forget"]).p
    for label in ("target", "broken"):
        expected = zero_retrain_forgetting(of[label, "forget"].p, q)
        assert value(document, label, "zero-retrain-forgetting") == pytest.approx(expected, abs=1e-4)


def test_features_are_the_last_ones_and_compared_on_the_right_sets(said) -> None:
    document, of, _, _ = said

    def knn(label: str) -> float:
        train = [of[label, n] for n in ("forget", "retain")]
        unseen = of[label, "holdout"]
        x, y = np.concatenate([t.features for t in train]), np.concatenate([t.y for t in train])
        return knn_transfer(x, y, unseen.features, unseen.y)

    def cka(a: str, b: str, name: str) -> float:
        x, y = of[a, name].features, of[b, name].features
        return linear_cka(x, y, unbiased=len(x) < 4 * x.shape[1])

    for label, others in (("target", GOLD), ("broken", GOLD), (GOLD[0], GOLD[1:])):
        for name in ("forget", "holdout"):
            expected = np.mean([cka(label, o, name) for o in others])
            assert value(document, label, f"{name}.cka") == pytest.approx(float(expected), abs=1e-3)
        assert value(document, label, "knn") == pytest.approx(knn(label), abs=0.02)
        each = []
        for o in others:
            agl = np.prod([1 - abs(of[label, n].hit.mean() - of[o, n].hit.mean()) for n in ("forget", "retain", "test")])
            agr = (1 - abs(knn(label) - knn(o))) * max(0.0, cka(label, o, "holdout"))
            each.append(2 * agl * agr / (agl + agr) if agl + agr else 0.0)
        assert value(document, label, "unified") == pytest.approx(float(np.mean(each)), abs=2e-3)
    assert value(document, "same", "forget.cka-target") > 0.999
    assert value(document, "broken", "forget.cka-target") < 0.99


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
