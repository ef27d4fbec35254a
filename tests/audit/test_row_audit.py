"""The audit of classifiers and regressors, on small networks that are really trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from expunge.audit.document import AuditDocument
from expunge.audit.kernel.klom import klom
from expunge.audit.outputs import References
from expunge.audit.run import AuditedModel, audit
from expunge.audit.settings import AuditSettings
from expunge.core.errors import InputError
from expunge.core.results import Verdict
from expunge.data.rows import table
from expunge.engine.members import Training
from expunge.pipeline.row_audit import RowAuditConfig, comparison
from expunge.pipeline.row_runs import RowsConfig, execute, halves, plan, sets_of
from expunge.pipeline.rows import oddity
from expunge.pipeline.supervised import Supervised, target_of

CONFIG = RowAuditConfig(retrain=3, references=8)
CLASSES = [str(c) for c in range(10)]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def make_problem() -> Supervised:
    """500 digits, 30 of them learnt with a wrong label."""
    held = load_digits()
    rng = np.random.default_rng(3)
    order = rng.permutation(len(held.target))
    inputs, labels = (held.data / 16).astype(np.float32), held.target.astype(np.int64)
    learnt = labels[order[:500]].copy()
    wrong = np.zeros(500, dtype=bool)
    wrong[:30] = True
    learnt[wrong] = (learnt[wrong] + rng.integers(1, 10, 30)) % 10
    return Supervised(
        data=table(inputs[order[:500]], learnt, classes=CLASSES, columns={"wrong": wrong}),
        holdout=table(inputs[order[500:]], labels[order[500:]], classes=CLASSES, ids=[f"u{i}" for i in range(1297)]),
        build=network,
        training=Training(steps=500, batch=100, lr=1e-2),
    )


class Audited:
    """A problem, a request, and the audit of the models that the tests ask for."""

    def __init__(self, choice: dict) -> None:
        self.problem = make_problem()
        self.chosen = self.problem.data.select(**choice)
        self.target = self.problem.adapter(target_of(self.problem))
        self.sets = sets_of(self.problem, self.chosen, seed=0)
        self.gold, self.references = comparison(self.problem, self.target, self.chosen, self.sets, CONFIG)

    def judge(self, **models) -> AuditDocument:
        given = [AuditedModel(name, "unlearned", adapter) for name, adapter in models.items()]
        every = [AuditedModel("target", "target", self.target), *self.gold, *given]
        return audit(every, self.sets, AuditSettings(draws=500), references=self.references)

    def changed(self, change) -> object:
        copy = self.target.copy()
        with torch.no_grad():
            change(copy.model)
        return copy


@pytest.fixture(scope="module")
def whole_class(tmp_path_factory) -> tuple[Audited, AuditDocument]:
    held = Audited({"classes": ["3"]})

    def hide(model) -> None:  # the answer alone: nothing in the features is forgotten
        model[-1].bias[3] = -60.0

    def break_it(model) -> None:
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))

    torch.manual_seed(0)
    return held, held.judge(hidden=held.changed(hide), broken=held.changed(break_it), untouched=held.target.copy())


@pytest.fixture(scope="module")
def wrong_rows() -> tuple[Audited, AuditDocument]:
    held = Audited({"where": "wrong"})
    return held, held.judge()


def verdict(document: AuditDocument, label: str) -> Verdict:
    return document.entry(label).judgement.verdict


def value(document: AuditDocument, label: str, key: str) -> float:
    return document.entry(label).numbers[key].value


def test_target_and_retrained_models_are_told_apart(whole_class, wrong_rows) -> None:
    for _, document in (whole_class, wrong_rows):
        assert verdict(document, "target") == Verdict.NOT_FORGOTTEN
        found = [verdict(document, f"retrained seed {s}") for s in (1, 2, 3)]
        assert found.count(Verdict.FORGOTTEN) >= 2, found
        assert Verdict.DAMAGED not in found


def test_hiding_the_answer_is_suppression_and_the_features_show_it(whole_class) -> None:
    _, document = whole_class
    assert verdict(document, "hidden") == Verdict.SUPPRESSED
    assert value(document, "hidden", "forget.accuracy") == 0
    assert value(document, "hidden", "average-gap") < 0.05  # by the metrics of outputs it is as good as retrained
    assert value(document, "hidden", "forget.cka-target") == pytest.approx(1, abs=1e-6)  # and its features are the target's
    assert value(document, "hidden", "knn") == value(document, "target", "knn")
    assert value(document, "retrained seed 1", "forget.cka-target") < 0.99


def test_a_copy_of_the_target_and_a_broken_model_are_called_so(whole_class) -> None:
    _, document = whole_class
    assert verdict(document, "untouched") == Verdict.NOT_FORGOTTEN
    assert verdict(document, "broken") == Verdict.DAMAGED


def test_numbers_are_those_of_the_formulas(whole_class) -> None:
    held, document = whole_class
    for name, rows in held.sets.items():
        with torch.no_grad():
            scores = held.target.model(torch.from_numpy(np.stack([r.inputs for r in rows])))
        right = np.mean(scores.argmax(1).numpy() == np.array([r.target for r in rows]))
        assert value(document, "target", f"{name}.accuracy") == pytest.approx(right)
        own = torch.log_softmax(scores.double(), 1)[range(len(rows)), [r.target for r in rows]]
        margin = (own - torch.log1p(-own.exp())).numpy()
        expected = klom(margin[None], held.references.retrained[name], bins=2).mean()
        assert value(document, "target", f"{name}.klom") == pytest.approx(expected, abs=1e-3)


def test_single_rows_tell_who_was_learnt(wrong_rows) -> None:
    _, document = wrong_rows
    assert value(document, "target", "forget.looks-seen") > 0.9
    assert value(document, "target", "membership.lira") > 0.9
    for seed in (1, 2, 3):
        assert value(document, f"retrained seed {seed}", "forget.looks-seen") < 0.1
        # Two such models differ as a whole, so one attack on 30 rows scatters around a half.
        assert abs(value(document, f"retrained seed {seed}", "membership.lira") - 0.5) < 0.3
        # Wrong labels are unlikely to whoever has not learnt them, so against rows with right ones RMIA is far below a half.
        assert value(document, f"retrained seed {seed}", "membership.rmia") < 0.2
        assert value(document, f"retrained seed {seed}", "forget.unlearning-completeness") > 0.7
    assert value(document, "target", "membership.rmia") > 0.9
    assert value(document, "target", "forget.unlearning-completeness") < 0.4
    floor = float(document.entry("target").numbers["forget.klom"].note.split()[1].rstrip(":"))
    assert value(document, "target", "forget.klom") > floor + 3
    assert abs(value(document, "retrained seed 1", "forget.klom") - floor) < 1.5


def test_every_measure_that_fits_is_there_and_no_other(whole_class) -> None:
    _, document = whole_class
    assert document.modality == "classification"
    families = {key.split(".")[-1] for key in document.entry("target").numbers} | set(document.entry("target").numbers)
    wanted = {
        "accuracy", "probability", "average-gap", "tug-of-war", "adaptive-score", "mia-efficacy", "mia-entropy", "asr",
        "zero-retrain-forgetting", "looks-seen", "klom", "unlearning-completeness", "activation-distance", "cka", "knn",
        "unified", "read-out.loss",
        "membership.lira", "membership.rmia", "membership.loss", "membership.gradient-norm",
    }  # fmt: skip
    assert wanted <= families
    assert not {"rouge-l-recall", "truth-ratio", "fluency"} & families
    with pytest.raises(InputError, match="rouge-l-recall"):
        AuditSettings(metrics=("rouge-l-recall",)).chosen(frozenset())


def test_over_unlearning_random_rows_is_damage() -> None:
    held = Audited({"ids": [str(i) for i in range(100, 160)]})
    rows = held.sets["forget"]
    copy = held.target.copy()
    inputs = torch.from_numpy(np.stack([r.inputs for r in rows]))
    others = torch.tensor([(int(r.target) + 1) % 10 for r in rows])
    kept = held.sets["retain"]
    more, labels = torch.from_numpy(np.stack([r.inputs for r in kept])), torch.tensor([int(r.target) for r in kept])
    optimiser = torch.optim.Adam(copy.model.parameters(), lr=1e-3)
    for _ in range(150):  # the rows are taught another class until they stand out
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(copy.model(inputs), others) + nn.functional.cross_entropy(copy.model(more), labels)
        loss.backward()
        optimiser.step()
    document = held.judge(taught=copy)
    assert verdict(document, "taught") == Verdict.DAMAGED
    assert value(document, "taught", "forget.looks-seen") < value(document, "retrained seed 1", "forget.looks-seen") - 0.1


def test_references_must_be_of_the_same_rows(whole_class) -> None:
    held, _ = whole_class
    short = {name: margins[:, :-1] for name, margins in held.references.retrained.items()}
    with pytest.raises(InputError, match="reference models were not measured"):
        audit(
            [AuditedModel("target", "target", held.target)], held.sets, AuditSettings(),
            references=References(short, held.references.originals),
        )  # fmt: skip


def test_a_regressor_is_judged() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(600, 8)).astype(np.float32)
    targets = inputs[:, 0] * 2 + np.sin(3 * inputs[:, 1]) + 0.1 * rng.normal(size=600)
    spoilt = np.arange(300) < 30
    learnt = np.where(spoilt, targets[:300] + 4 * rng.choice([-1, 1], 300), targets[:300])

    def small() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))

    problem = Supervised(
        data=table(inputs[:300], learnt, task="regression", columns={"spoilt": spoilt}),
        holdout=table(inputs[300:], targets[300:], task="regression", ids=[f"u{i}" for i in range(300)]),
        build=small,
        training=Training(steps=600, batch=50, lr=3e-3),
        loss="mse",
    )
    chosen = problem.data.select(where="spoilt")
    target = problem.adapter(target_of(problem))
    sets = sets_of(problem, chosen, seed=0)
    gold, references = comparison(problem, target, chosen, sets, RowAuditConfig(retrain=3, references=6))
    document = audit([AuditedModel("target", "target", target), *gold], sets, AuditSettings(draws=500), references=references)
    assert document.modality == "regression"
    assert verdict(document, "target") == Verdict.NOT_FORGOTTEN
    assert verdict(document, "retrained seed 1") != Verdict.NOT_FORGOTTEN
    assert value(document, "target", "forget.absolute-error") < 1 < value(document, "retrained seed 1", "forget.absolute-error")
    assert value(document, "target", "forget.looks-seen") > 0.9 > 0.2 > value(document, "retrained seed 1", "forget.looks-seen")
    assert value(document, "target", "forget.wasserstein") > value(document, "retrained seed 1", "forget.wasserstein")
    assert value(document, "retrained seed 1", "test.skill") > 0.3


def test_a_model_that_the_caller_holds_is_left_as_it_was(tmp_path) -> None:
    held = replace(make_problem(), training=Training(steps=20, batch=100, lr=1e-2))
    held = replace(held, model=target_of(held))
    before = {k: v.clone() for k, v in held.model.state_dict().items()}
    config = RowsConfig(model="held.py:problem", classes=("3",), method="iau", parts={"lr": 0.01})
    run = execute(plan(config, held), tmp_path / "run")
    assert run.manifest["stages"]["unlearn"]["state"] == "done"
    assert all(torch.equal(v, before[k]) for k, v in held.model.state_dict().items())


def test_unseen_rows_are_divided_by_subject() -> None:
    held = replace(make_problem().holdout, subjects=tuple(f"p{i % 40}" for i in range(1297)))
    first, second = halves(held, 0)
    assert set(first.subjects).isdisjoint(second.subjects)
    assert sorted((*first.ids, *second.ids)) == sorted(held.ids)


def test_odd_labels_raise_the_goal_and_common_ones_do_not() -> None:
    problem = make_problem()
    unseen = problem.holdout.subset(np.arange(128))
    random = np.arange(100, 160)
    assert oddity(problem.data, random, unseen) < 0.15
    assert oddity(problem.data, problem.data.select(where="wrong"), unseen) > 1.5
    assert oddity(problem.data, problem.data.select(classes=["3"]), unseen) > 1.5


def test_steering_restores_what_was_changed_before_a_layer_and_not_what_retraining_left_out(whole_class) -> None:
    held, _ = whole_class

    def turn(
        model,
    ) -> None:  # the first layer is changed in the direction by which the class is told: features move, the head stays
        rows = torch.from_numpy(np.stack([r.inputs for r in held.sets["forget"]]))
        mean = model[1](model[0](rows)).mean(0)
        others = torch.from_numpy(np.stack([r.inputs for r in held.sets["retain"]]))
        gap = mean - model[1](model[0](others)).mean(0)
        model[0].bias.sub_(2.0 * gap.clamp(min=0))

    settings = AuditSettings(metrics=("restoration",), relearn=None, quantise=(), read_out=False, draws=100)
    models = [
        AuditedModel("target", "target", held.target),
        held.gold[0],
        AuditedModel("turned", "unlearned", held.changed(turn)),
    ]
    document = audit(models, held.sets, settings)
    key = next(k for k in document.entry("turned").numbers if k.startswith("restoration."))
    found = {name: document.entry(name).numbers[key].value for name in ("target", "turned", "retrained seed 1")}
    assert found["target"] > 0.9
    assert found["turned"] > 0.6 > 0.3 > found["retrained seed 1"], found
    assert document.entry("turned").numbers["restoration.2"].note.startswith("of the target's accuracy")
