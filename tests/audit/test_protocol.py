"""Protocols are data: parsed strictly, applied to the checks of a verdict, and never kinder than the evidence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import yaml

from expunge.audit.arrays import Arrays, Attempt, Sample
from expunge.audit.attacks.registry import Criterion
from expunge.audit.protocol import AuditProtocol, judged, load_protocol, packaged
from expunge.audit.run import AuditedModel, audit
from expunge.audit.settings import AuditSettings
from expunge.audit.verdict import judge
from expunge.core.errors import InputError
from expunge.core.results import Check, Judgement, Verdict

BEHAVIOUR, PROMPTS, CONTEXT = (str(c) for c in (Criterion.BEHAVIOUR, Criterion.PROMPTS, Criterion.CONTEXT))


def protocol(*needs: str, references: int = 3) -> AuditProtocol:
    kinds = [BEHAVIOUR, PROMPTS, CONTEXT]
    criteria = [
        {"id": f"C{i}", "criterion": k, "needs": n, "text": "It holds."}
        for i, (k, n) in enumerate(zip(kinds, needs, strict=False))
    ]
    return AuditProtocol(protocol="mine", version=2, title="Mine", references=references, criteria=criteria)


def check(name: str, outcome: str, criterion: str, difference: float = 0.1) -> Check:
    return Check(
        name=name,
        outcome=outcome,
        criterion=criterion,
        difference=difference,
        low=-1,
        high=1,
        margin=0.5,
        text=f"{name}: {outcome}.",
    )


def forgotten(*checks: Check) -> Judgement:
    return Judgement(verdict=Verdict.FORGOTTEN, reason="Fine.", checks=checks)


def test_the_packaged_protocols_are_valid_and_print_as_files_that_load_to_the_same(tmp_path):
    assert "removal-v1" in packaged()
    for name in packaged():
        held = load_protocol(name)
        assert held.label == name
        assert AuditSettings.under(held).protocol_label() == name
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(held.model_dump(mode="json")))
        assert load_protocol(path) == held


def test_what_is_changed_is_said_and_what_cannot_change_a_verdict_is_not():
    assert AuditSettings.under("removal-v1", batch_tokens=100, samples_forget=1).protocol_label() == "removal-v1"
    assert AuditSettings.under("removal-v1", relearn=None, budget=5).protocol_label() == "removal-v1 (changed: budget, relearn)"
    assert AuditSettings.under("removal-v1", thresholds={"margin": 0.5}).protocol_label() == "removal-v1 (changed: thresholds)"
    inside = AuditSettings.under("removal-v1", relearn={"batch": 4}).relearn
    assert inside is not None
    assert (inside.batch, inside.steps) == (4, (1, 2, 5, 10, 20))  # the rest of the protocol's own stays


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "no mapping"),
        ("a: [", "cannot be read"),
        ("{protocol: mine, version: 1, title: x, criteria: []}", "criteria"),
        ("{protocol: My Own, version: 1, title: x, criteria: []}", "protocol"),
        ("{protocol: mine, version: 1, titel: x, title: x, criteria: [{id: A, criterion: relearning, text: x}]}", "titel"),
        (
            "{protocol: mine, version: 1, title: x, criteria: [{id: A, criterion: relearning, needs: report, text: x}]}",
            "no criterion decides",
        ),
        (
            "{protocol: mine, version: 1, title: x, criteria: [{id: A, criterion: relearning, text: x}, "
            "{id: A, criterion: adversarial prompts, text: x}]}",
            "twice",
        ),
        (
            "{protocol: mine, version: 1, title: x, criteria: [{id: A, criterion: relearning, text: x, "
            "attacks: [prefix-injection]}]}",
            "adversarial prompts",
        ),
        (
            "{protocol: mine, version: 1, title: x, settings: {attacks: [x]}, criteria: "
            "[{id: A, criterion: relearning, text: x}]}",
            "with their criterion",
        ),
    ],
)
def test_files_that_are_no_protocol_are_refused(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_protocol(path)


def test_an_unknown_protocol_names_the_known_and_a_wrong_setting_is_found(tmp_path):
    with pytest.raises(InputError, match="removal-v1"):
        load_protocol("removal-v2")
    held = protocol("equivalence").model_copy(update={"settings": {"relearning": None}})
    with pytest.raises(InputError, match="relearn"):
        AuditSettings.under(held)


def test_nothing_is_forgotten_unless_every_deciding_criterion_holds():
    held = protocol("equivalence", "no conviction")
    fine = (check("likelihood", "equivalent", BEHAVIOUR), check("attack (x)", "undecided", PROMPTS))
    assert judged(held, forgotten(*fine), 3).verdict is Verdict.FORGOTTEN
    assert [f.outcome for f in judged(held, forgotten(*fine), 3).criteria] == ["held", "held"]
    few = judged(held, forgotten(*fine), 2)
    assert few.verdict is Verdict.UNDECIDED
    assert "asks for 3 retrained models, and there were 2 retrained models" in few.reason
    missing = judged(held, forgotten(fine[0]), 3)
    assert missing.verdict is Verdict.UNDECIDED
    assert "C1 (adversarial prompts) not run" in missing.reason
    skipped = judged(held, forgotten(fine[0], check("attack (x)", "not run", PROMPTS)), 3)
    assert skipped.verdict is Verdict.UNDECIDED
    silent = check("attack (x)", "not run", PROMPTS).model_copy(update={"told": False})
    assert judged(held, forgotten(fine[0], silent), 3).verdict is Verdict.FORGOTTEN  # even the target gives nothing away
    assert judged(held, forgotten(fine[0], silent), 3).criteria[1].outcome == "tells nothing"
    assert judged(protocol("equivalence", "equivalence"), forgotten(fine[0], silent), 3).verdict is Verdict.UNDECIDED
    strict = judged(protocol("equivalence", "equivalence"), forgotten(*fine), 3)
    assert strict.verdict is Verdict.UNDECIDED
    assert strict.criteria[1].outcome == "undecided"
    reported = judged(protocol("equivalence", "report"), forgotten(fine[0]), 3)
    assert reported.verdict is Verdict.FORGOTTEN


def test_it_never_makes_a_verdict_kinder():
    held = protocol("equivalence", "no conviction")
    for verdict in (Verdict.SUPPRESSED, Verdict.NOT_FORGOTTEN, Verdict.DAMAGED, Verdict.UNDECIDED, Verdict.NO_GOLD):
        found = Judgement(verdict=verdict, reason="So.", checks=(check("likelihood", "equivalent", BEHAVIOUR),))
        assert judged(held, found, 9).verdict is verdict


def test_a_secondary_check_cannot_hold_a_criterion_and_can_fail_it():
    held = protocol("equivalence")
    assert judged(held, forgotten(check("extraction", "equivalent", BEHAVIOUR)), 3).criteria[0].outcome == "not run"
    failed = judged(
        held, forgotten(check("likelihood", "equivalent", BEHAVIOUR), check("extraction", "knows more", BEHAVIOUR)), 3
    )
    assert failed.criteria[0].outcome == "failed"
    assert failed.criteria[0].text == "extraction: knows more."
    less = forgotten(check("likelihood", "equivalent", BEHAVIOUR), check("attack (x)", "knows less", PROMPTS))
    assert judged(protocol("equivalence", "no conviction"), less, 3).criteria[1].outcome == "held"


def world(rng: np.random.Generator, label: str, nll: float, found: float) -> Arrays:
    n = 60
    clusters = [str(i // 3) for i in range(n)]
    context = Attempt("In context", found + 0.05 * rng.standard_normal(n), 1, CONTEXT)
    return Arrays(
        label, [str(i) for i in range(n)], clusters, nll + 0.2 * rng.standard_normal(n), attempts={"context": context},
        quantised={4: nll + 0.2 * rng.standard_normal(n)},
        utility={"retain": Sample(0.9 + 0.02 * rng.standard_normal(60), [str(i) for i in range(60)])},
    )  # fmt: skip


def test_what_only_reports_does_not_convict():
    rng = np.random.default_rng(0)
    target, gold = world(rng, "target", 0.1, 0.9), [world(rng, f"r{i}", 4.0, 0.1) for i in range(3)]
    subject = world(rng, "subject", 4.0, 0.8)
    assert judge(subject, gold, target).verdict is Verdict.SUPPRESSED
    quiet = AuditProtocol(
        protocol="mine", version=1, title="Mine",
        criteria=[
            {"id": "A", "criterion": BEHAVIOUR, "text": "x"}, {"id": "B", "criterion": CONTEXT, "needs": "report", "text": "x"},
        ],
    )  # fmt: skip
    found = judged(quiet, judge(subject, gold, target, protocol=quiet), 3)
    assert found.verdict is Verdict.FORGOTTEN
    assert [f.outcome for f in found.criteria] == ["held", "failed"]  # shown all the same


def test_an_audit_under_a_protocol_says_so(target, retrained, sets, tokenizer):
    settings = AuditSettings.under("removal-v1", relearn={"steps": (1, 2)}, quantise=(4,), metrics=("probability",))
    models = [
        AuditedModel("target", "target", target), AuditedModel("retrained 1", "retrained", retrained[0], seed=1),
        AuditedModel("retrained 2", "retrained", retrained[1], seed=2),
    ]  # fmt: skip
    document = audit(models, sets, settings)
    found = document.entry("target").judgement
    assert found is not None
    assert found.protocol == "removal-v1 (changed: metrics, relearn, quantise)"
    outcomes = {f.id: f.outcome for f in found.criteria}
    assert outcomes["R1"] == "failed"
    assert set(outcomes) == {d.id for d in load_protocol("removal-v1").criteria}
    assert found.verdict is Verdict.NOT_FORGOTTEN
    assert document.protocol["protocol"]["version"] == 1


def test_what_convicts_nobody_is_shown_with_its_numbers():
    rng = np.random.default_rng(0)
    target, gold = world(rng, "target", 0.1, 0.9), [world(rng, f"r{i}", 4.0, 0.1) for i in range(3)]
    subject = world(rng, "subject", 4.0, 0.8)

    def quiet(a: Arrays) -> Arrays:
        return replace(a, attempts={n: replace(v, convicts=False) for n, v in a.attempts.items()})

    found = judge(quiet(subject), [quiet(g) for g in gold], quiet(target))
    assert found.verdict is Verdict.FORGOTTEN
    shown = next(c for c in found.checks if c.name == "attack (context)")
    assert shown.outcome == "shown"
    assert "0.789, in retrained models 0.099, in the target 0.904" in shown.text
    asked = protocol("equivalence", "no conviction", "report")
    assert judged(asked, found, 3).criteria[2].outcome == "reported"
