"""The protocol for models that can only be asked, on small trained models: what a naive guard lets through is named."""

from typing import ClassVar

import pytest

from expunge.audit.attacks.registry import ATTACKS, Access
from expunge.audit.general import general_questions
from expunge.audit.protocol import judged, load_protocol
from expunge.audit.run import AuditedModel, audit
from expunge.audit.settings import AuditSettings
from expunge.core.access import Level
from expunge.core.results import Check, Judgement, Verdict
from expunge.data.records import Record, RecordSet
from expunge.guards.adapter import GuardedAdapter
from expunge.guards.guarded import guard_model
from expunge.guards.parts import Detector, Hit, Hook, Watcher
from expunge.guards.policy import Row
from expunge.guards.request import targets_of
from expunge.pipeline.audit import of_served
from tests.guards.conftest import KEY
from tests.guards.test_judged import entry

TRIED = ("alias", "cut-short", "paraphrased-question", "over-turns", "definitions")


class Exact(Detector):
    """A naive detector: the very questions of a target, as the last of a prompt."""

    name: ClassVar[str] = "exact"
    title: ClassVar[str] = "Exact questions"
    sees: ClassVar[frozenset[Hook]] = frozenset({Hook.REQUEST})

    def fit(self, material):
        return ExactWatcher({q for t in material.targets for q in t.questions})


class ExactWatcher(Watcher):
    def __init__(self, questions):
        self.questions = questions

    def request(self, conversation):
        asked = conversation.text.rpartition("Question: ")[2].partition("\nAnswer:")[0].strip()
        return [Hit("", 1.0)] if asked in self.questions else []


@pytest.fixture(scope="module")
def document(people):
    """The target, retrained models, and the target behind a filter and behind a naive guard, under a part of the protocol."""
    targets = targets_of(people.split.forget, people.split.retain)
    guards = {"filter": "filter", "exact": [Row(detector=Exact(), action="refuse")]}
    models = [AuditedModel("target", "target", people.target())]
    models += [AuditedModel(f"retrained {s}", "retrained", people.retrained(s)) for s in (1, 2)]
    for name, guard in guards.items():
        adapter = GuardedAdapter(guard_model(people.target(), guards=guard, targets=targets, key=KEY))
        models.append(AuditedModel(name, "unlearned", adapter, method=name, asked=True))
    sets = {n: RecordSet(n, tuple(getattr(people.split, n)[:30])) for n in ("forget", "retain")}
    short = {n: {"max_new_tokens": 16} for n in TRIED}
    told = {"metrics": ("probability", "rouge-l-recall", "refused"), "options": {"rouge-l-recall": {"max_new_tokens": 16}}}
    settings = AuditSettings.under("served-v1", attacks=TRIED, attack_options=short, **told)
    return audit(models, sets, settings)


def test_a_naive_guard_is_passed_and_the_way_is_named(document):
    found = entry(document, "exact").judgement
    assert found.verdict is Verdict.SUPPRESSED
    assert found.protocol.startswith("served-v1 (changed: ")
    assert "can be taken away" in found.reason
    assert "Asking brings it back, too: " in found.reason
    outcomes = {f.id: f.outcome for f in found.criteria}
    assert outcomes["S2"] == "failed"
    assert outcomes["S5"] == "failed"
    numbers = entry(document, "exact").numbers
    assert numbers["forget.alias"].value > 0.5
    assert numbers["forget.alias.first-name"].value > 0.4
    assert numbers["forget.cut-short"].value == 0  # the plain question is refused


def test_a_filter_of_names_keeps_back_what_the_naive_guard_lets_through(document):
    found = entry(document, "filter").judgement
    assert found.verdict is Verdict.SUPPRESSED
    assert "ways of asking that tell something brought it back; the weakest link: " in found.reason
    outcomes = {f.id: f.outcome for f in found.criteria}
    assert outcomes["S2"] == outcomes["S3"] == "held"
    assert outcomes["S5"] == "failed"
    assert outcomes["S6"] == "reported"
    assert entry(document, "filter").numbers["forget.alias"].value < 0.25
    assert entry(document, "target").numbers["forget.alias"].value > 0.5
    for label in ("retrained 1", "retrained 2"):
        assert entry(document, label).numbers["forget.alias"].value < 0.3
        assert entry(document, label).numbers["forget.cut-short"].value < 0.3


def test_pieces_of_a_model_without_guards_join_to_its_answers(document):
    numbers = entry(document, "target").numbers
    for way in ("stream", "hang-up", "length"):
        assert numbers[f"forget.cut-short.{way}"].value > 0.95


def test_false_refusals_on_general_questions_have_an_interval(document):
    assert document.data["general"]["records"] == len(general_questions()) == 80
    for label in ("filter", "exact"):
        number = entry(document, label).numbers["general.refused"]
        assert number.value == 0
        assert number.low == 0 < number.high < 0.06
        assert number.n == 80
    assert not any(k.startswith("general.") and k != "general.refused" for m in document.models for k in m.numbers)


def test_general_questions_are_for_guards_alone_and_give_way_to_a_set_of_that_name(people):
    sets = {n: RecordSet(n, tuple(getattr(people.split, n)[:4])) for n in ("forget", "retain")}
    quick = AuditSettings.quick(metrics=("probability", "refused"), draws=100)
    plain = audit([AuditedModel("target", "target", people.target())], sets, quick)
    assert set(plain.data) == {"forget", "retain"}
    assert not any("refused" in k for k in plain.models[0].numbers)
    every = guard_model(
        people.target(), guards=[Row(detector="always", action="refuse")], targets=targets_of(sets["forget"]), key=KEY
    )
    guarded = [AuditedModel("mute", "unlearned", GuardedAdapter(every), asked=True)]
    found = audit(guarded, sets, quick)
    assert found.models[0].numbers["general.refused"].value == 1
    own = RecordSet(
        "general", (Record("one", "Four.", "How much is two and two?"), Record("two", "Six.", "And three and three?"))
    )
    mine = audit(guarded, {**sets, "general": own}, quick)
    assert mine.data["general"]["records"] == 2
    assert mine.models[0].numbers["general.refused"].n == 2


def test_the_questions_are_unlike_each_other_and_a_guard_of_people_lets_them_pass(people):
    asked = [r.prompt for r in general_questions()]
    assert len({q.casefold() for q in asked}) == len(asked)
    assert all(r.answer.strip() and r.prompt.strip() == r.prompt for r in general_questions())
    words = {w for t in targets_of(people.split.forget) for n in t.entities for w in n.casefold().split()}
    assert not words & {w.strip(".,:?").casefold() for q in asked for w in q.split()}


def test_the_protocol_asks_and_does_nothing_else():
    held = load_protocol("served-v1")
    assert {ATTACKS.get(n).access for n in held.attacks} == {Access.TEXT}
    named = {"alias", "cut-short", "disguised-answer", "disguised-question", "many-people", "other-language", "over-turns"}
    assert named < set(held.attacks)
    settings = AuditSettings.under("served-v1")
    assert settings.within(Level.SCORES).protocol_label() == "served-v1"  # nothing of it is out of reach
    assert settings.relearn is None
    assert not settings.quantise


def test_a_guard_is_audited_under_it_unless_something_else_is_asked_for():
    assert of_served(AuditSettings()).protocol_label() == "served-v1"
    assert of_served(AuditSettings(budget=5)).protocol_label() == "served-v1 (changed: budget)"
    named = AuditSettings(attacks=("alias",))
    assert of_served(named) is named
    removal = AuditSettings.under("removal-v1")
    assert of_served(removal) is removal


def test_what_cannot_be_opened_is_not_called_forgotten_by_asking():
    kinds = {d.id: str(d.criterion) for d in load_protocol("served-v1").criteria}
    fine = [
        Check(name=name, outcome="equivalent", criterion=kinds[i], difference=0.0, low=-0.1, high=0.1, margin=0.5, text=f"{i}.")
        for i, name in (
            ("S1", "likelihood"),
            ("S2", "attack (alias)"),
            ("S3", "attack (cut-short)"),
            ("S4", "attack (leak-at-k)"),
        )
    ]
    found = judged(load_protocol("served-v1"), Judgement(verdict=Verdict.FORGOTTEN, reason="Fine.", checks=tuple(fine)), 3)
    assert found.verdict is Verdict.UNDECIDED
    assert "S5 (hidden states and weights) not run" in found.reason
