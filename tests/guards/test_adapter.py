"""A guarded model under an audit's questions: what guards leave alone is as the model says it, to the last bit."""

import math
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from expunge.adapters.generation import Draws
from expunge.audit.scores import score
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.guards.actions.instruct import Instruct
from expunge.guards.adapter import WITHOUT_GUARDS, GuardedAdapter
from expunge.guards.conversation import Conversation
from expunge.guards.parts import Detector, Hit, Hook, Reading, Watcher
from expunge.guards.policy import SORRY, Row
from expunge.guards.prompts import put
from expunge.guards.reading import read_states
from tests.guards.conftest import name_of
from tests.guards.test_guarded import BLOCK, Blank, NameDetector


@pytest.fixture
def adapter(guarded):
    return GuardedAdapter(guarded())


def losses(adapter, records):
    return score(adapter, [adapter.encode(r) for r in records])


def test_refused_answers_are_scored_as_a_guess_and_all_others_as_the_model_does(adapter, target_adapter, people):
    forget, retain = people.split.forget, people.split.retain
    ours, theirs = losses(adapter, retain), losses(target_adapter, retain)
    assert np.array_equal(ours.nll(), theirs.nll())
    guess = math.log(target_adapter.model.config.vocab_size)
    assert np.allclose(losses(adapter, forget).nll(), guess, atol=1e-6)
    assert losses(target_adapter, forget).nll().mean() < 0.1
    mixed = losses(adapter, [retain[0], forget[0], retain[1]]).nll()
    assert np.allclose(mixed, [theirs.nll()[0], guess, theirs.nll()[1]], atol=1e-6)


def test_answers_are_those_of_the_guards(adapter, target_adapter, people):
    records = [*people.split.forget[:3], *people.split.retain[:3]]
    found = adapter.generate(adapter.model, [adapter.encode(r) for r in records], 24)
    bare = target_adapter.generate(target_adapter.model, [target_adapter.encode(r) for r in records], 24)
    assert [g.text for g in found[:3]] == [SORRY] * 3
    assert found[3:] == bare[3:]


def test_draws_by_numbers_are_those_of_the_model(adapter, target_adapter, people):
    records = people.split.retain[:4]
    draws = Draws(np.random.default_rng(0).random((4, 12)), 2.0)
    ours = adapter.drawn(adapter.model, [adapter.encode(r) for r in records], 12, draws)
    assert ours == target_adapter.drawn(target_adapter.model, [target_adapter.encode(r) for r in records], 12, draws)


def test_tokens_that_are_never_sent_are_scored_as_a_guess(guarded, target_adapter, people):
    """Asked without the name; the answer that names it is stopped before."""
    adapter = GuardedAdapter(guarded())
    record = people.split.forget[0]
    name = name_of(record)
    prompt = record.prompt.replace(name, "that person")
    ours = adapter.encode(record, prompt=prompt)
    theirs = target_adapter.encode(record, prompt=prompt)
    with torch.no_grad():
        got = adapter.forward(adapter.model, adapter.collate([ours]), frozenset({"losses"})).losses
        bare = target_adapter.forward(target_adapter.model, target_adapter.collate([theirs]), frozenset({"losses"})).losses
    texts = [target_adapter.tokenizer.decode([int(i)]) for i in ours.data.ids[ours.data.start :]]
    first = next(i for i, t in enumerate(texts) if t.strip() and name.startswith(t.strip()))
    guess = math.log(target_adapter.model.config.vocab_size)
    held_back = 4  # letters of the longest name, in words of this tokenizer
    assert torch.allclose(got[first:], torch.full_like(got[first:], guess))
    assert torch.allclose(got[: max(0, first - held_back)], bare[: max(0, first - held_back)], atol=1e-5)
    assert (torch.isclose(got, torch.tensor(guess)) | torch.isclose(got, bare, atol=1e-4)).all()


@pytest.mark.parametrize("where", ["embeddings", "hidden", "scores"])
def test_edits_act_on_scored_answers_as_on_written_ones(guarded, target_adapter, people, where):
    flagged, other = people.split.retain[0], people.split.retain[20]
    row = Row(detector=NameDetector(word=name_of(flagged)), action=Blank(where=where))
    made = guarded([row], targets=[])
    adapter = GuardedAdapter(made)
    written = made.answers([flagged.prompt], scores=True)[0]
    example = adapter.written(adapter.encode(flagged), written.ids, ended=False)
    with torch.no_grad():
        got = adapter.forward(adapter.model, adapter.collate([example, adapter.encode(other)]), frozenset({"losses"})).losses
    assert np.allclose(-got[: len(written.ids)].numpy(), written.log_probabilities, atol=1e-3)
    assert np.isclose(losses(adapter, [other]).nll()[0], losses(target_adapter, [other]).nll()[0], atol=1e-6)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in target_adapter.model.modules())


def test_it_is_another_model_with_the_target_inside_and_tells_no_features(guarded, adapter, target_adapter, people):
    assert adapter.fingerprint() == GuardedAdapter(guarded()).fingerprint() != target_adapter.fingerprint()
    assert adapter.fingerprint() != GuardedAdapter(guarded(targets=[])).fingerprint()
    assert adapter.parts()[WITHOUT_GUARDS].fingerprint() == target_adapter.fingerprint()
    assert Offer.FEATURES not in adapter.offers
    batch = adapter.collate([adapter.encode(people.split.retain[0])])
    with pytest.raises(InputError, match="gives no features"):
        adapter.forward(adapter.model, batch, frozenset({"features:model.layers.0"}))
    with pytest.raises(InputError, match="not saved"):
        adapter.save("anywhere")
    copy = adapter.copy()
    assert copy.model is not adapter.model
    assert np.allclose(losses(copy, people.split.forget[:2]).nll(), losses(adapter, people.split.forget[:2]).nll())


class Counted(Detector):
    """Notices names in prompts, or, by their states, prompts of more than some tokens; counts what it is shown."""

    name: ClassVar[str] = "counted"
    title: ClassVar[str] = "Counted"
    sees: ClassVar[frozenset[Hook]] = frozenset({Hook.REQUEST, Hook.HIDDEN})
    shown: ClassVar[list[str]] = []
    word: str = ""

    def fit(self, material):
        settings, reading = self, Reading(BLOCK, "output", "mean")

        class W(Watcher):
            readings = (reading,)

            def add(self, target):
                pass

            def request(self, conversation):
                settings.shown.append("request")
                return []

            def hidden(self, states):
                settings.shown.append("states")
                return [Hit("", 1.0)] if float(states[reading].sum()) > float(settings.word) else []

        return W()


def test_an_audit_shows_each_prompt_to_detectors_once(guarded, target_adapter, people):
    """And its states; what is noticed by them is the same when it is remembered, whoever asks first."""
    records = people.split.retain[:6]
    prompts = [put(target_adapter, Conversation.of(r.prompt)) for r in records]
    reading = Reading(BLOCK, "output", "mean")
    sums = [float(s[reading].sum()) for s in read_states(target_adapter, prompts, [reading])]
    bound = float(np.median(sums))
    Counted.shown.clear()
    row = Row(detector=Counted(word=str(bound)), action="refuse")
    for first in ("scores", "answers"):
        adapter = GuardedAdapter(guarded([row], targets=[]))
        examples = [adapter.encode(r) for r in records]
        Counted.shown.clear()
        if first == "answers":
            adapter.generate(adapter.model, examples, 8)
        for _ in range(2):
            found = score(adapter, examples).nll()
        said = adapter.generate(adapter.model, examples, 8)
        refused = [s > bound for s in sums]
        assert 0 < sum(refused) < len(records)
        assert [g.refused for g in said] == refused == [g.text == SORRY for g in said]
        guess = math.log(target_adapter.model.config.vocab_size)
        assert [bool(np.isclose(f, guess)) for f in found] == refused
        assert sorted(Counted.shown) == ["request"] * len(records) + ["states"] * len(records)
        adapter.guarded.add({"id": "new", "entities": ["Somebody Else"]})
        adapter.generate(adapter.model, examples, 8)
        assert len(Counted.shown) == 4 * len(records)  # with another target, another answer


def test_what_does_not_fit_with_the_words_of_a_guard_has_no_answer(guarded, target_adapter, people):
    """As a server has none: an audit goes on with the other prompts, and counts this one as refused."""
    short, long_ = people.split.retain[0], people.split.retain[1]
    filling = "word " * ((target_adapter.context - 150) // 5)
    asked = [short, replace(long_, prompt=f"{filling}{long_.prompt}")]
    action = Instruct(text="You know nothing about {targets}. " + "Say nothing of them. " * 12)
    made = GuardedAdapter(guarded([Row(detector="always", action=action)]))
    examples = [made.encode(r) for r in asked]
    found = made.generate(made.model, examples, 8)
    assert [g.refused for g in found] == [False, True]
    assert found[1].text == SORRY
    assert losses(made, asked).nll()[1] == pytest.approx(math.log(made.model.config.vocab_size))
