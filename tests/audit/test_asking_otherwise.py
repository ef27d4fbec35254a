"""Attacks by prompts and forms on real models: one that refuses plain questions only, retrained ones, a filter of questions."""

from __future__ import annotations

import numpy as np
import pytest
from asked_models import REFUSAL, Forms, Scripted, mean

from expunge.audit.arrays import Case, Thresholds
from expunge.audit.attacks.form_bias import TRAINED, FormBias, Plain
from expunge.audit.attacks.forms import ParaphrasedQuestion, StatementCompletion
from expunge.audit.attacks.prompting import AnswerStem
from expunge.audit.attacks.registry import ATTACKS
from expunge.audit.attacks.sampling import LeakAtK
from expunge.audit.checks import attacks as attack_checks
from expunge.audit.evidence import Evidence, Protocol
from expunge.audit.judging import Attacked, model_arrays
from expunge.audit.run import AuditedModel, audit
from expunge.audit.settings import AuditSettings
from expunge.audit.store import ScoreStore


@pytest.fixture(scope="module")
def world(trained_models):
    return Forms(trained_models)


@pytest.fixture(scope="module")
def filtered(world):
    """The target behind a filter that knows the very questions of the forget set, and nothing else."""
    exact = {r.prompt for r in world.forget}

    def respond(prompt: str) -> str | None:
        return REFUSAL if any(f"Question: {q}\n" in prompt for q in exact) else None

    return Scripted.of(world.target, "filtered", respond)


@pytest.fixture(scope="module")
def evidence(world, filtered):
    return world.evidence(refusing=world.refusing, filtered=filtered)


GOLD = ("retrained 1", "retrained 2")


def test_a_stem_brings_back_what_was_only_refused_and_nothing_in_retrained_models(evidence):
    plain, stem = Plain(), AnswerStem()
    assert mean(evidence, plain, "target") > 0.8
    assert mean(evidence, plain, "refusing") == 0
    assert mean(evidence, stem, "refusing") > max(mean(evidence, stem, g) for g in GOLD) + 0.3
    for label in GOLD:
        assert mean(evidence, stem, label) < 0.4
        assert mean(evidence, stem, label) - mean(evidence, plain, label) < 0.25


def test_what_an_attack_brings_back_convicts_and_retrained_models_are_acquitted(evidence, world):
    tried = Attacked(tried=[AnswerStem()])
    arrays = {n: model_arrays(evidence, n, tried, False, None) for n in evidence.subjects}
    gold = [arrays[g] for g in GOLD]

    def outcome(label: str, controls: list) -> str:
        checks = attack_checks(Case(arrays[label], tuple(controls), arrays["target"], Thresholds()))
        return next(c.outcome for c in checks if c.name == "attack (answer-stem)")

    assert outcome("refusing", gold) == "knows more"
    assert outcome("retrained 1", gold[1:]) != "knows more"
    assert outcome("retrained 2", gold[:1]) != "knows more"


def test_a_filter_of_exact_questions_has_a_form_dependent_bias_near_1_and_retrained_models_near_0(evidence):
    attack = FormBias(forms=("paraphrased-question", "statement-completion"))
    found = {label: attack.compute(evidence, label) for label in ("filtered", "target", *GOLD)}
    assert found["filtered"]["forget.form-bias"].value > 0.8
    assert found["filtered"]["forget.form-bias.trained"].value > 0.9
    assert found["filtered"]["forget.form-bias.least"].value < 0.2
    assert found["target"]["forget.form-bias"].value == 0
    for label in GOLD:
        assert abs(found[label]["forget.form-bias"].value) < 0.4
        low, high = found[label]["forget.form-bias"].low, found[label]["forget.form-bias"].high
        assert low is None or (low <= 0.1 and high >= -0.1)
    for kind in (ParaphrasedQuestion, StatementCompletion):
        assert mean(evidence, kind(), "filtered") == pytest.approx(mean(evidence, kind(), "target"))


def test_forms_that_the_target_cannot_do_are_dropped_and_said(evidence):
    attack = FormBias(forms=("paraphrased-question", "base64-question"), least_gap=0.6)
    found = attack.compute(evidence, "filtered")
    assert "forget.form-bias.paraphrased-question" in found
    assert "forget.form-bias.base64-question" not in found
    assert any("the form base64-question was left out" in said for said in evidence.missing)
    assert f"forget.form-bias.{TRAINED}" in found


def test_drawing_many_times_brings_up_more_of_a_refusing_model_than_greedy_answers(evidence):
    leak = LeakAtK(k=8, samples=16, max_new_tokens=16)
    assert mean(evidence, leak, "target") > 0.9
    assert mean(evidence, leak, "refusing") > mean(evidence, Plain(), "refusing")
    for label in evidence.subjects:
        one, best = (leak.column(evidence, label, "forget", c).values for c in ("1", ""))
        assert (best >= one - 1e-12).all()


def test_columns_are_kept_in_the_cache_and_need_no_model_again(evidence, world, tmp_path):
    attack = ATTACKS.get("keyword-emphasis")()

    def fresh() -> Evidence:
        return Evidence(evidence.subjects, evidence.sets, Protocol(max_new_tokens=20, draws=300), ScoreStore(tmp_path))

    first = {c: attack.column(fresh(), "refusing", "forget", c) for c in ("", "random", "overlap")}
    kind, columns = type(attack), type(attack).columns
    kind.columns = None
    try:
        again = {c: attack.column(fresh(), "refusing", "forget", c) for c in first}
    finally:
        kind.columns = columns
    for column, values in first.items():
        assert np.array_equal(values.values, again[column].values, equal_nan=True)
        assert np.array_equal(values.present, again[column].present)


def test_an_audit_runs_them_all_and_reports_context_without_judging_it(world):
    models = [
        AuditedModel("target", "target", world.target),
        *(AuditedModel(f"retrained {i}", "retrained", m, seed=i) for i, m in enumerate(world.retrained)),
        AuditedModel("refusing", "unlearned", world.refusing),
    ]
    settings = AuditSettings(
        attacks=("answer-stem", "reintroduction", "form-bias", "leak-at-k", "many-shot"), relearn=None, quantise=(),
        metrics=("probability",), attack_options={"leak-at-k": {"samples": 4, "k": 2}},
    )  # fmt: skip
    document = audit(models, {"forget": world.forget, "retain": world.retain}, settings)
    entry = document.entry("refusing")
    outcomes = {c.name: c.outcome for c in entry.judgement.checks}
    assert {"attack (answer-stem)", "attack (leak-at-k)"} <= set(outcomes)
    assert outcomes["attack (reintroduction)"] == outcomes["attack (form-bias)"] == "shown"
    assert "shown" not in {outcomes["attack (answer-stem)"], outcomes["attack (leak-at-k)"]}
    assert entry.numbers["forget.reintroduction.over-retrained"].note
    assert document.protocol["metrics"]["reintroduction"]["criterion"] == "reintroduction in context"
