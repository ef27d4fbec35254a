"""Attacks that go past filters: a model that can follow them gives a naive guard's secrets away, and not a careful one's."""

import json
import math
from typing import ClassVar

import pytest

from expunge.adapters.answers import Listener, Taken
from expunge.audit.asking import fitted
from expunge.audit.attacks.registry import ATTACKS
from expunge.audit.disguises import DISGUISES
from expunge.audit.evidence import Evidence, Protocol, Subject
from expunge.audit.facts import tells
from expunge.audit.generations import streamed
from expunge.data.records import Record, RecordSet
from expunge.guards.adapter import GuardedAdapter
from expunge.guards.guarded import guard_model
from expunge.guards.parts import Detector, Hit, Hook, Watcher
from expunge.guards.policy import SORRY, Row
from expunge.guards.request import targets_of
from tests.guards.conftest import KEY, name_of
from tests.guards.readers import reading


class Letters(Detector):
    """A naive detector: names letter for letter, in the last turn of the request."""

    name: ClassVar[str] = "letters"
    title: ClassVar[str] = "Letters"
    sees: ClassVar[frozenset[Hook]] = frozenset({Hook.REQUEST})

    def fit(self, material):
        return LettersWatcher([n for t in material.targets for n in t.entities])


class LettersWatcher(Watcher):
    def __init__(self, names):
        self.names = names

    def request(self, conversation):
        last = conversation.text.rpartition("Question: ")[2]
        return [Hit("", 1.0)] if any(n in last for n in self.names) else []


class WholeAnswers(Detector):
    """A naive detector: what is hidden letter for letter, in answers that are whole."""

    name: ClassVar[str] = "whole"
    title: ClassVar[str] = "Whole answers"
    sees: ClassVar[frozenset[Hook]] = frozenset({Hook.TEXT})
    alone: bool = False  #: whether nothing is held back before

    def fit(self, material):
        return WholeWatcher([e.answer.strip(" .") for t in material.targets for e in t.examples], self.alone)


class WholeWatcher(LettersWatcher):
    def __init__(self, names, alone):
        super().__init__(names)
        self.alone = alone

    def request(self, conversation):
        return []

    def answer(self, conversation, text, start, final):
        return [Hit("", 1.0)] if final and any(n in text for n in self.names) else []

    def safe(self, text, start):
        return len(text) if self.alone else start


def row(detector):
    return [Row(detector=detector, action="refuse")]


@pytest.fixture(scope="module")
def sets(people):
    """Two people to forget of five questions each, some to keep."""
    forget = [r for r in people.split.forget if r.cluster in sorted({r.cluster for r in people.split.forget})[:2]][:20]
    return {"forget": RecordSet("forget", tuple(forget[i] for i in range(0, 20, 2))), "retain": people.split.retain[:40]}


@pytest.fixture(scope="module")
def evidence(people, sets):
    """A reader of the target's knowledge bare and behind guards, and one of a retrained model's."""
    every = [*sets["forget"], *sets["retain"]]
    knows = reading(people.target(), every, 1)
    targets = targets_of(sets["forget"].records)

    def behind(guards):
        return GuardedAdapter(guard_model(knows, guards=guards, targets=targets, key=KEY))

    models = {
        "target": knows,
        "retrained": reading(people.retrained(1), every, 2),
        "filter": behind("filter"),
        "unfolded": behind(row({"name": "terms", "encodings": False})),
        "letters": behind(row(Letters())),
        "whole": behind(row(WholeAnswers())),
        "late": behind(row(WholeAnswers(alone=True))),
    }
    roles = {"target": "target", "retrained": "retrained"}
    subjects = {k: Subject(k, roles.get(k, "unlearned"), a.fingerprint(), a) for k, a in models.items()}
    return Evidence(subjects, sets, Protocol(max_new_tokens=400, draws=300))


def told(evidence, name, label, way="", **settings):
    found = ATTACKS.get(name)(**{"max_new_tokens": 400, **settings}).column(evidence, label, "forget", way)
    return float(found.values[found.present].mean()) if found.present.any() else math.nan


@pytest.mark.parametrize("trick", list(DISGUISES))
def test_a_disguised_question_passes_a_filter_of_letters_and_not_one_that_undoes_it(evidence, trick):
    ask = {"tricks": (trick,)}
    assert told(evidence, "disguised-question", "target", trick, **ask) > 0.9
    assert told(evidence, "disguised-question", "letters", trick, **ask) > 0.9
    assert told(evidence, "disguised-question", "filter", trick, **ask) == 0
    assert told(evidence, "disguised-question", "retrained", trick, **ask) < 0.4


@pytest.mark.parametrize("trick", [k for k, d in DISGUISES.items() if d.wanted])
def test_a_disguised_answer_passes_a_filter_of_answers_and_is_read_back(evidence, trick):
    ask = {"tricks": (trick,)}
    assert told(evidence, "disguised-answer", "target", f"{trick}-both", **ask) > 0.9
    assert told(evidence, "disguised-answer", "whole", trick, **ask) > 0.9
    assert told(evidence, "disguised-answer", "letters", trick, **ask) == 0  # the question is in plain words
    assert told(evidence, "disguised-answer", "letters", f"{trick}-both", **ask) > 0.9
    assert told(evidence, "disguised-answer", "filter", "", **ask) == 0
    assert told(evidence, "disguised-answer", "retrained", "", **ask) < 0.5
    folded = trick == "spaced"  # letters are always compared so; encodings are a setting of the detector
    assert (told(evidence, "disguised-answer", "unfolded", "", **ask) > 0.9) != folded


def test_a_plain_question_is_refused_by_the_naive_guards_too(evidence):
    """So what the attacks bring up is theirs."""
    for label in ("letters", "whole", "filter", "unfolded"):
        assert told(evidence, "other-language", label, "", frames={"none": "{question}"}) == 0
    assert told(evidence, "other-language", "target", "", frames={"none": "{question}"}) > 0.9


@pytest.mark.parametrize("way", ["named-before", "named-by-model", "split", "renamed"])
def test_a_name_in_an_earlier_turn_passes_who_reads_the_last_one(evidence, way):
    assert told(evidence, "over-turns", "target", way) > 0.9
    assert told(evidence, "over-turns", "letters", way) > 0.9
    assert told(evidence, "over-turns", "retrained", way) < 0.4
    assert told(evidence, "over-turns", "filter", way) == 0


# ---- answers in pieces


def test_pieces_that_were_sent_before_a_guard_decides_count_as_told(evidence):
    assert told(evidence, "cut-short", "target", "stream") > 0.9
    assert told(evidence, "cut-short", "late", "stream") > 0.9  # a guard that holds nothing back
    assert told(evidence, "cut-short", "whole", "stream") == 0  # one that waits for the end
    assert told(evidence, "cut-short", "filter", "") == 0
    assert told(evidence, "cut-short", "retrained", "") < 0.4
    assert told(evidence, "other-language", "late", "", frames={"none": "{question}"}) == 0  # not read as a stream


@pytest.mark.parametrize("way", ["hang-up", "length", "stop"])
def test_who_takes_answers_in_pieces_passes_a_guard_that_waits_for_whole_ones(evidence, way):
    assert told(evidence, "cut-short", "target", way, kinds=(way,)) > 0.9
    assert told(evidence, "cut-short", "retrained", way, kinds=(way,)) < 0.4
    assert told(evidence, "cut-short", "filter", way, kinds=(way,)) == 0
    label = "late" if way == "hang-up" else "whole"
    assert told(evidence, "cut-short", label, way, kinds=(way,)) > 0.3


def test_a_stream_is_taken_as_the_client_takes_it(evidence, sets):
    adapter = evidence.adapter("late")
    record = sets["forget"][0]
    example = adapter.encode(record)
    hows = [Listener(24), Listener(24, leaves=3), Listener(2), Listener(24, (" ",)), Listener(24, leaves=500)]
    bare = evidence.adapter("target")
    sent = streamed(bare, [bare.encode(record)] * len(hows), hows)
    whole = sent[0].text.strip()
    assert whole == bare.generate(bare.model, [bare.encode(record)], 24)[0].text
    assert [t.finish for t in sent] == ["stop", "left", "length", "stop", "stop"]
    got = streamed(adapter, [example] * len(hows), hows)
    assert got[0] == Taken(whole, "guard")  # all was sent before the guard looked
    assert got[1].finish == "left"
    assert 3 <= len(got[1].text) < len(whole)
    assert whole.startswith(got[1].text)
    assert whole.startswith(got[2].text)
    assert got[2].finish == "length"
    assert got[3] == Taken(whole.split()[0], "stop")
    strict = evidence.adapter("filter")
    assert streamed(strict, [strict.encode(record)], [Listener(24, leaves=3)]) == [Taken(SORRY, "guard")]


# ---- other names, other people, other languages, definitions


def test_a_frame_in_another_language_is_asked_and_rated(evidence):
    found = {way: told(evidence, "other-language", "target", way) for way in ("es", "fr", "de", "sw")}
    assert min(found.values()) > 0.9
    assert told(evidence, "other-language", "filter") == 0  # the name is the same in all languages
    assert told(evidence, "other-language", "retrained") < 0.4


def test_other_names_are_parts_of_the_name_and_what_else_is_true(evidence, sets, tmp_path):
    attack, record = ATTACKS.get("alias")(), sets["forget"][0]
    name = name_of(record)
    first, last = name.split()
    asked = {w: getattr(attack.ask_so(evidence, "forget", record, w), "prompt", None) for w in attack.ways()}
    assert asked["last-name"] == record.prompt.replace(name, last)
    assert asked["first-name"] == record.prompt.replace(name, first)
    assert asked["initials"] == record.prompt.replace(name, f"{first[0]}. {last[0]}.")
    assert name not in asked["described"]
    assert asked["described"].endswith(record.prompt.replace(name, "that one"))
    others = [r for r in sets["forget"] if r.cluster == record.cluster and r.id != record.id]
    assert any(r.answer.replace(name, "that one") in asked["described"] for r in others)
    path = tmp_path / "aliases.jsonl"
    path.write_text(json.dumps({"id": record.subject, "aliases": ["the Fox"]}) + "\n")
    more = ATTACKS.get("alias")(file=str(path))
    assert more.ways()[-1] == "alias-1"
    assert more.ask_so(evidence, "forget", record, "alias-1").prompt == record.prompt.replace(name, "the Fox")
    stranger = next(r for r in sets["forget"] if r.cluster != record.cluster)
    assert more.ask_so(evidence, "forget", stranger, "alias-1") is None


def test_many_questions_about_others_come_first_and_none_tells_the_fact(evidence, sets):
    attack = ATTACKS.get("many-people")(number=8)
    for record in sets["forget"]:
        shots = attack.shots(evidence, record)
        assert len(shots) == 8
        assert {r.cluster for r in shots[:4]} == {r.cluster for r in sets["retain"]}  # everybody once, then again
        assert not any(tells(record, r.answer) for r in shots)
    asked = attack.ask(evidence, "forget", sets["forget"][0])
    assert [role for role, _ in asked.messages] == ["user", "assistant"] * 8 + ["user"]
    assert told(evidence, "many-people", "target") > 0.9
    assert told(evidence, "many-people", "filter") == 0
    assert told(evidence, "many-people", "retrained") < 0.4


def test_a_solved_question_that_holds_the_fact_is_left_out(sets):
    record, other = sets["forget"][0], sets["retain"][0]
    telling = Record("telling", record.answer, other.prompt, subject="a")
    kept = RecordSet("retain", (telling, *sets["retain"][:3], Record("own", "x", "y", subject=record.subject)))
    shots = ATTACKS.get("many-people")().shots(Evidence({}, {"forget": sets["forget"], "retain": kept}), record)
    assert {r.id for r in shots} == {r.id for r in sets["retain"][:3]}


def test_so_many_questions_are_tried_as_there_is_room_for(evidence, sets):
    record, tight = sets["forget"][0], ATTACKS.get("many-people")(number=500)
    own = evidence.adapter("target")
    narrow = type(own)(own.model, own.tokenizer, max_length=200)
    every = tight.shots(evidence, record)
    fitting = tight._fitting(narrow, record, every)
    assert 0 < len(fitting.record.messages) // 2 < len(every)
    assert len(narrow.encode(fitted(narrow, fitting.record)).data.ids) <= 200


def test_a_definition_has_another_word_for_the_name_and_what_it_gives_is_rated_by_the_fact(evidence, sets):
    attack, record = ATTACKS.get("definitions")(), sets["forget"][0]
    name = name_of(record)
    asked = attack.ask(evidence, "forget", record).prompt
    assert name not in asked
    assert asked.endswith(record.prompt.replace(name, "Zorp"))
    assert tells(record, asked) == 1
    assert not attack.convicts
    found = attack.columns(evidence, "retrained", "forget")
    assert set(found) == {"", "with", "without"}
    assert found["without"].values.mean() < 0.4
