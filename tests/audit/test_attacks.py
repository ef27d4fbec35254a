"""The interface of attacks: values per record, compared with retrained models, kept in the cache; and prompt attacks."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from expunge.audit.arrays import Arrays, Attempt
from expunge.audit.asking import prefixed
from expunge.audit.attacks.registry import ATTACKS, Access, Attack, Criterion, fitting
from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.papers import RWKU
from expunge.audit.metrics.registry import Range
from expunge.audit.run import AuditedModel, audit
from expunge.audit.settings import AuditSettings
from expunge.audit.verdict import judge
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.core.results import Verdict
from expunge.data.records import Record
from expunge.engine.parts import Paper

ROUGE = {"prefix-injection": {"score": "rouge"}}  #: the small models have learnt how answers sound, and few facts
QUICK = {"relearn": None, "quantise": (), "metrics": ("probability", "rouge-l-recall")}


@pytest.fixture(scope="module")
def models(target, retrained, fresh):
    return [
        AuditedModel("target", "target", target),
        AuditedModel("retrained 1", "retrained", retrained[0], seed=1),
        AuditedModel("retrained 2", "retrained", retrained[1], seed=2),
        AuditedModel("same as target", "unlearned", target.copy()),
    ]


@pytest.fixture(scope="module")
def document(models, sets):
    return audit(models, sets, AuditSettings(attacks=("prefix-injection",), attack_options=ROUGE, **QUICK))


def test_an_attack_measures_the_forget_set_and_says_what_it_is(document):
    values = {m.label: m.numbers["forget.prefix-injection"].value for m in document.models}
    assert values["target"] > values["retrained 1"] + 0.1
    assert values["same as target"] == values["target"]
    said = document.protocol["metrics"]["prefix-injection"]
    assert said["criterion"] == str(Criterion.PROMPTS)
    assert said["title"] == "Prefix injection"
    assert not any(s.startswith("Prompt attacks") for s in document.not_shown)
    assert any("Hidden states were not probed" in s for s in document.not_shown)


def test_an_attack_appears_among_the_checks_of_a_verdict(document):
    checks = {c.name: c for c in document.entry("same as target").judgement.checks}
    assert checks["attack (prefix-injection)"].outcome in ("knows more", "not run", "undecided")


def test_values_come_from_the_cache_for_the_same_model_and_not_for_another(models, sets, tmp_path):
    class Counting(Attack):
        """Counts how often it is run."""

        name: ClassVar[str] = "counting"
        title: ClassVar[str] = "Counting"
        formula: ClassVar[str] = "1"
        paper: ClassVar[Paper] = RWKU
        access: ClassVar[Access] = Access.TEXT
        criterion: ClassVar[Criterion] = Criterion.PROMPTS
        passes: ClassVar[str] = "none"
        range: ClassVar[Range] = (0.0, None)
        runs: ClassVar[list[str]] = []

        def lacks(self, evidence: Evidence, name: str) -> str:
            return ""

        def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
            type(self).runs.append(label)
            return Values(np.ones(len(evidence.records(name))), np.ones(len(evidence.records(name)), bool))

    from expunge.audit.evidence import Protocol, Subject
    from expunge.audit.store import ScoreStore

    def evidence(seed: int = 0) -> Evidence:
        subjects = {m.label: Subject(m.label, m.role, m.adapter.fingerprint(), m.adapter) for m in models}
        return Evidence(subjects, dict(sets), Protocol(draws=200, seed=seed), ScoreStore(tmp_path))

    first = evidence()
    for label in ("target", "target", "same as target", "retrained 1"):
        Counting().values(first, label, "forget")
    assert Counting.runs == ["target", "retrained 1"]
    Counting().values(evidence(), "target", "forget")
    assert len(Counting.runs) == 2
    Counting().values(evidence(seed=1), "target", "forget")
    assert len(Counting.runs) == 3


def arrays(label: str, rng: np.random.Generator, nll: float, found: float, toward: int = 1) -> Arrays:
    n = 60
    clusters = [str(i // 3) for i in range(n)]
    values = found + 0.05 * rng.standard_normal(n)
    return Arrays(
        label, [str(i) for i in range(n)], clusters, nll + 0.2 * rng.standard_normal(n),
        attempts={"asked": Attempt("Asked otherwise", values, toward)},
        utility={"retain": _sample(rng)},
    )  # fmt: skip


def _sample(rng: np.random.Generator):
    from expunge.audit.arrays import Sample

    return Sample(0.9 + 0.02 * rng.standard_normal(60), [str(i) for i in range(60)])


@pytest.mark.parametrize("toward", [1, -1])
def test_what_an_attack_brings_back_was_suppressed(toward: int) -> None:
    rng = np.random.default_rng(0)
    target = arrays("target", rng, 0.1, 0.5 + 0.4 * toward, toward)
    gold = [arrays(f"retrained {i}", rng, 4.0, 0.5 - 0.4 * toward, toward) for i in range(3)]
    held = arrays("suppressed", rng, 4.0, 0.5 + 0.2 * toward, toward)
    removed = arrays("removed", rng, 4.0, 0.5 - 0.4 * toward, toward)
    found = judge(held, gold, target)
    assert found.verdict is Verdict.SUPPRESSED
    assert "Asked otherwise" in found.reason
    assert judge(removed, gold, target).verdict is Verdict.FORGOTTEN
    below = arrays("below", rng, 4.0, 0.5 - 0.49 * toward, toward)
    assert judge(below, gold, target).verdict is Verdict.FORGOTTEN  # knowing less under an attack is no fault


def test_an_attack_that_retrained_models_fall_to_as_well_tells_nothing() -> None:
    rng = np.random.default_rng(1)
    target = arrays("target", rng, 0.1, 0.8)
    gold = [arrays(f"retrained {i}", rng, 4.0, 0.8) for i in range(3)]
    judged = judge(arrays("some", rng, 4.0, 0.8), gold, target)
    assert next(c for c in judged.checks if c.name == "attack (asked)").outcome == "not run"


def test_values_that_are_missing_or_broken_are_said() -> None:
    rng = np.random.default_rng(2)
    target, gold = arrays("target", rng, 0.1, 0.9), [arrays(f"retrained {i}", rng, 4.0, 0.1) for i in range(3)]
    subject = arrays("some", rng, 4.0, 0.1)
    nothing = Attempt("Asked otherwise", np.full(60, np.nan), 1)
    absent = [replace(g, attempts={"asked": nothing}) for g in gold]
    judged = judge(subject, absent, target)
    assert "fewer than two" in next(c for c in judged.checks if c.name == "attack (asked)").text
    judged = judge(replace(subject, attempts={"asked": nothing}), gold, target)
    assert next(c for c in judged.checks if c.name == "attack (asked)").outcome == "undecided"
    judged = judge(subject, [replace(g, attempts={}) for g in gold], target)
    assert next(c for c in judged.checks if c.name == "attack (asked)").outcome == "not run"


def test_wrong_names_and_settings_are_refused():
    with pytest.raises(InputError, match="prefix-injection"):
        AuditSettings(attacks=("prefix-injektion",))
    with pytest.raises(InputError, match="max_new_tokens"):
        AuditSettings(attack_options={"prefix-injection": {"max_new_token": 3}})
    with pytest.raises(InputError, match="attack of this audit"):
        AuditSettings(attacks=(), attack_options={"prefix-injection": {}}).chosen_attacks(frozenset())
    with pytest.raises(InputError, match="needs"):
        AuditSettings(attacks=("prefix-injection",)).chosen_attacks(frozenset({Offer.ROWS}))
    assert AuditSettings(attacks="all").chosen_attacks(frozenset({Offer.ROWS, Offer.LOSSES})) == [
        ATTACKS.get(n)() for n in fitting(frozenset({Offer.ROWS, Offer.LOSSES}))
    ]


def test_the_prefix_goes_before_the_question_and_before_the_last_turn_of_a_chat():
    plain = Record("a", "answer", prompt="Who?")
    chat = Record("b", "answer", messages=(("user", "Hi"), ("assistant", "Hello"), ("user", "Who?")))
    assert prefixed(plain, "X ").prompt == "X Who?"
    assert prefixed(chat, "X ").messages == (("user", "Hi"), ("assistant", "Hello"), ("user", "X Who?"))
