"""Offset unlearning: the difference of two small models on the scores of the served one."""

import pytest
import torch

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build
from expunge.adapters.words import word_tokenizer
from expunge.core.errors import InputError
from expunge.guards.actions.offset import Offset
from expunge.guards.decoding import Sampling
from expunge.guards.guarded import guard_model
from expunge.guards.policy import Row
from tests.guards.conftest import KEY

SHORT = Sampling(max_tokens=16)


@pytest.fixture(scope="module")
def pair(people, target_adapter, tmp_path_factory):
    """Folders of the model that knows the people to forget, and of one that never saw them."""
    folder = tmp_path_factory.mktemp("pair")
    retrained = people.retrained()
    retrained.save(folder / "tuned")
    target_adapter.save(folder / "plain")
    return retrained, str(folder / "tuned"), str(folder / "plain")


def offset(adapter, tuned, plain, weight=1.0):
    return guard_model(adapter, guards=[Row(detector="always", action=Offset(tuned=tuned, plain=plain, weight=weight))], key=KEY)


def asked(people):
    return [r.prompt for r in [*people.split.forget[:4], *people.split.retain[:4]]]


def test_where_both_are_one_the_served_model_is_as_it_was_bit_for_bit(target_adapter, people, pair):
    _, tuned, plain = pair
    bare = guard_model(target_adapter, guards="filter", targets=[], key=KEY).answers(asked(people), SHORT, scores=True)
    for same in ((plain, plain, 1.0), (tuned, tuned, 1.0), (tuned, plain, 0.0)):
        assert offset(target_adapter, *same).answers(asked(people), SHORT, scores=True) == bare


def test_a_model_that_is_its_own_plain_one_becomes_the_tuned_one(target_adapter, people, pair):
    """z + (z_tuned - z) = z_tuned: its answers, drawn and likeliest, and its log-probabilities."""
    retrained, tuned, plain = pair
    weights = {k: v.clone() for k, v in target_adapter.model.state_dict().items()}
    made = offset(target_adapter, tuned, plain)
    other = guard_model(retrained, guards="filter", targets=[], key=KEY)
    for how in (SHORT, Sampling(max_tokens=8, temperature=0.7, seed=5)):
        a, b = (g.answers(asked(people), how, scores=True) for g in (made, other))
        assert [x.text for x in a] == [x.text for x in b]
        for x, y in zip(a, b, strict=True):
            assert torch.allclose(torch.tensor(x.log_probabilities), torch.tensor(y.log_probabilities), atol=1e-3)
    alone = [made.answers([q], SHORT)[0].text for q in asked(people)]
    assert alone == [x.text for x in made.answers(asked(people), SHORT)]
    known = [r.answer for r in people.split.forget[:4]]
    assert not set(alone[:4]) & set(known)
    assert alone[4:] == [r.answer for r in people.split.retain[:4]]
    assert all(torch.equal(v, weights[k]) for k, v in target_adapter.model.state_dict().items())


def test_small_models_of_another_family_are_refused(target_adapter, tmp_path, pair):
    tokenizer = word_tokenizer(["some other words"])
    LanguageAdapter(build("llama-tiny", tokenizer), tokenizer).save(tmp_path / "other")
    with pytest.raises(InputError, match="tokenizer"):
        offset(target_adapter, str(tmp_path / "other"), pair[2])
