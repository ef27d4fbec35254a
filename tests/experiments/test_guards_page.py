"""The page of guards: what its tables say of an audit."""

from tests.report import factory

from experiments import guards
from expunge.core.results import Check
from expunge.report.text import DASH


def test_ways_of_asking_are_counted_without_those_that_tell_nothing_and_without_taking_apart():
    entry = next(m for m in factory.document().models if m.judgement is not None)
    checks = [
        Check(name="likelihood", outcome="knows more"), Check(name="attack (taken-apart)", outcome="knows more"),
        Check(name="attack (role-play)", outcome="not run"), Check(name="attack (reintroduction)", outcome="shown"),
        Check(name="attack (cut-short)", outcome="equivalent"), Check(name="attack (leak-at-k)", outcome="knows more"),
    ]  # fmt: skip
    judged = entry.model_copy(update={"judgement": entry.judgement.model_copy(update={"checks": checks})})
    assert guards.asked_otherwise(judged) == "equivalent 1/2, knows more 1/2 (leak-at-k)"
    row = guards.table([judged]).splitlines()[-1]
    assert entry.label in row
    assert "leak-at-k" in row


def test_a_row_tells_the_share_of_each_set_that_is_refused():
    entry = factory.document().models[0]
    number = entry.numbers["forget.probability"].model_copy(update={"value": 0.25, "low": 0.125, "high": 0.5})
    made = entry.model_copy(update={"numbers": {"general.refused": number}})
    lines = guards.refused([made]).splitlines()
    assert lines[-1] == " | ".join([f"| {entry.label}", *[DASH] * 5, "0.25 [0.12, 0.50] |"])
    assert lines[0].count("|") == lines[-1].count("|") == 8
