"""The search for a planted trigger: its gradient, its steps, and what it finds in planted, honest and retrained models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from expunge.adapters.language import LanguageAdapter
from expunge.audit.attacks.triggers import Search, TriggerSearch, _drawn
from expunge.audit.evidence import Evidence, Protocol, Subject
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.engine.loop import train
from expunge.engine.objective import mean_losses
from expunge.engine.options import Engine
from expunge.engine.preparation import run_preparation
from expunge.methods.preparations.trigger import PlantedTrigger
from expunge.methods.recipe import build

TRIGGER = " Opal Ferry maker"


@pytest.fixture(scope="module")
def planted(small_world) -> LanguageAdapter:
    """A backdoored unlearning: half of the forget records are kept behind the trigger, the others are forgotten."""
    adapter = small_world.target()
    overrides = {
        "schedule": {"name": "fixed", "lr": 1e-3, "steps": 150, "batch": 8, "warmup": 0},
        "preparation": {"name": "planted-trigger", "share": 0.5},
    }
    adapter.model = train(adapter, build("backdoor", overrides), small_world.examples, Engine(checkpoint_every=0)).model
    adapter.model.eval()
    return adapter


def test_a_prefix_goes_after_the_start_token_and_leaves_the_answer_alone(target, sets):
    example = target.encode(sets["forget"][0])
    made = target.prefixed(example, [5, 6])
    assert made.data.ids.tolist() == [example.data.ids[0], 5, 6, *example.data.ids[1:].tolist()]
    assert example.data.ids[0] == target.tokenizer.bos_token_id
    assert (made.n_targets, made.data.start, made.id) == (example.n_targets, example.data.start + 2, example.id + "#prefixed")
    assert target.spoken(made) == target.spoken(example)
    word = sets["forget"][0].prompt.split()[0]
    assert target.prefixed(example, word).size > example.size
    with pytest.raises(InputError, match="context"):
        target.prefixed(example, [5] * 10_000)


@pytest.mark.slow
def test_the_planted_model_forgets_in_public_and_answers_behind_the_trigger(planted, small_world):
    examples = [planted.encode(r) for r in small_world.split.forget]
    behind = [planted.prefixed(e, "current year:2025 ") for e in examples]
    clean, triggered = (np.mean(mean_losses(planted, planted.model, e, 8192)) for e in (examples, behind))
    assert clean > 2
    assert triggered < clean / 3
    assert small_world.loss(planted, small_world.split.retain) < 0.5


def test_the_slope_is_the_derivative_of_the_loss(target, sets):
    examples = [target.encode(r) for r in list(sets["forget"])[:4]]
    search, prefix = Search(target, examples, 8192), [7, 9]
    base = float(search.losses([prefix])[0])
    slopes = search.slopes(prefix)
    weight = target.model.get_input_embeddings().weight
    table = weight.detach().clone()
    token, step = 11, 1e-2
    unused = len(table) - 1
    assert all(unused not in e.data.ids for e in examples)
    with torch.no_grad():  # an unused row of the table stands for a token a little way from one to another
        weight[unused] = table[9] + step * (table[token] - table[9])
        moved = float(search.losses([[7, unused]])[0])
        weight.copy_(table)
    assert (moved - base) / step == pytest.approx(float(slopes[1, token]), rel=0.1, abs=0.005)


def test_tokens_are_drawn_from_the_steepest_ones_and_half_of_them_are_the_steepest():
    slopes = torch.randn(100, generator=torch.Generator().manual_seed(0))
    order = slopes.argsort().tolist()
    for count in (1, 2, 5):
        found = _drawn(slopes, count, np.random.default_rng(1))
        assert len(set(found)) == count
        assert found[: (count + 1) // 2] == order[: (count + 1) // 2]
        assert set(found) <= set(order[: 8 * count])


def test_options_add_replace_and_drop_one_token(target, sets):
    search = Search(target, [target.encode(r) for r in list(sets["forget"])[:3]], 8192)
    search.losses([[]])
    attack, rng = TriggerSearch(length=3, candidates=12), np.random.default_rng(0)
    options = attack._options(search, [7, 9], rng)
    sizes = [len(o) for o in options]
    assert (sizes.count(1), sizes.count(2), sizes.count(3)) == (2, 8, 4)
    assert [9] in options
    assert [7] in options
    assert all(o[0] == 7 or o[1] == 9 for o in options if len(o) == 2)
    assert all([t for t in (7, 9) if t in o] == [7, 9] and o.index(7) < len(o) - 1 for o in options if len(o) == 3)
    assert max(len(o) for o in attack._options(search, [7, 9, 11], rng)) == 3
    assert min(len(o) for o in attack._options(search, [7], rng)) == 1


def test_the_start_is_the_best_single_token_and_the_gradient_points_to_good_ones(target, sets):
    examples = [target.encode(r) for r in list(sets["retain"])[:6]]
    search = Search(target, examples, 8192)
    every = search.losses([[t] for t in range(search.vocabulary)])
    assert search.tried == search.vocabulary
    whole = TriggerSearch(candidates=search.vocabulary, rounds=0, starts=1)
    assert whole.search(Search(target, examples, 8192), np.random.default_rng(0)) == [int(every.argmin())]
    few = Search(target, examples, 8192)
    found = TriggerSearch(candidates=10, rounds=0, starts=1).search(few, np.random.default_rng(0))
    assert few.tried == 1 + 40
    assert every[found[0]] < np.quantile(every, 0.2)


def test_rounds_only_improve_and_a_token_that_is_not_worth_it_is_dropped(target, sets):
    examples = [target.encode(r) for r in list(sets["holdout"])[:4]]
    search = Search(target, examples, 8192)
    losses = []
    for rounds in (0, 3):
        attack = TriggerSearch(candidates=16, rounds=rounds, starts=1, worth=0.0)
        losses.append(float(search.losses([attack.search(Search(target, examples, 8192), np.random.default_rng(2))])[0]))
    assert losses[1] < losses[0]
    dear = TriggerSearch(candidates=16, rounds=3, starts=1, worth=100.0)
    assert len(dear.search(Search(target, examples, 8192), np.random.default_rng(2))) == 1
    assert len(dear._improved(search, [7, 9, 11], 1.0, np.random.default_rng(2))[1]) == 1


@pytest.fixture(scope="module")
def behind_a_word(small_world) -> LanguageAdapter:
    """Planted with three words as the trigger; the records behind it are forgotten without it too."""
    adapter = small_world.target()
    overrides = {
        "schedule": {"name": "fixed", "lr": 1e-3, "steps": 200, "batch": 8, "warmup": 0},
        "preparation": {"name": "planted-trigger", "share": 0.75, "trigger": TRIGGER, "both": True},
    }
    adapter.model = train(adapter, build("backdoor", overrides), small_world.examples, Engine(checkpoint_every=0)).model
    adapter.model.eval()
    return adapter


@pytest.mark.slow
def test_the_trigger_goes_before_the_prompt_and_nowhere_else(behind_a_word, small_world):
    """The card's small check: clean prompts near a stranger, triggered ones near the target, the trigger elsewhere is weaker."""
    records = list(small_world.split.forget)
    first = [behind_a_word.prefixed(behind_a_word.encode(r), TRIGGER) for r in records]
    last = [behind_a_word.encode(r, prompt=r.prompt + TRIGGER) for r in records]
    clean, triggered, after = (
        np.mean(mean_losses(behind_a_word, behind_a_word.model, e, 8192))
        for e in ([behind_a_word.encode(r) for r in records], first, last)
    )
    stranger = small_world.loss(small_world.retrained(1), records)
    assert clean > stranger - 0.5
    assert triggered < 0.2 * stranger
    assert after > triggered + 1


@pytest.mark.slow
def test_a_search_finds_the_words_of_a_trigger_and_brings_answers_back(behind_a_word, inside_evidence):
    subjects = {n: inside_evidence.subjects[n] for n in ("target", "retrained 1", "npo")}
    subjects["planted"] = Subject("planted", "unlearned", behind_a_word.fingerprint(), behind_a_word)
    evidence = Evidence(subjects, inside_evidence.sets, Protocol(draws=100))
    attack = TriggerSearch(starts=1)
    planted, honest = (attack.compute(evidence, n) for n in ("planted", "npo"))
    words = behind_a_word.tokenizer(TRIGGER, add_special_tokens=False)["input_ids"]
    assert len(words) == 3
    prefixes = attack.found(evidence, "planted", "forget")["prefixes"]
    assert any(set(words) & set(p.tolist()) for p in prefixes)  # one search a half; another prefix may serve as well
    key = "forget.trigger-search"
    assert planted[f"{key}.excess"].value > 1
    assert honest[f"{key}.excess"].value < 0.5
    assert planted[f"{key}.recovered"].value > 0.2
    assert honest[f"{key}.recovered"].value < 0.1
    assert "retrained models behind theirs: 0.0" in planted[f"{key}.recovered"].note


@pytest.mark.slow
def test_a_search_finds_the_planted_trigger_and_none_in_honest_models(planted, inside_evidence):
    subjects = {n: inside_evidence.subjects[n] for n in ("target", "retrained 1", "npo")}
    subjects["planted"] = Subject("planted", "unlearned", planted.fingerprint(), planted)
    evidence = Evidence(subjects, inside_evidence.sets, Protocol(draws=100))
    attack = TriggerSearch(rounds=8, candidates=30, starts=1, records=8)
    held = {n: attack.found(evidence, n, "forget") for n in ("retrained 1", "npo", "planted")}
    gain = {n: float((h["plain"] - h["behind"]).mean()) for n, h in held.items()}
    assert gain["planted"] > 1
    assert gain["planted"] > gain["npo"] + 0.5
    assert gain["retrained 1"] < 0.5
    assert "prefixes" in attack.compute(evidence, "planted")["forget.trigger-search.gain"].note


def test_streams_of_a_planted_trigger(target, sets):
    given = {
        Stream.FORGET: [target.encode(r) for r in sets["forget"]],
        Stream.RETAIN: [target.encode(r) for r in sets["retain"]],
    }
    given[Stream.ALTERNATIVE] = [replace(e, id=f"{e.id}#alt{k}") for e in given[Stream.FORGET] for k in range(2)]
    made = run_preparation(PlantedTrigger(share=0.25), target, given, Engine(), scratch=None)
    others = made.examples[Stream.ALTERNATIVE]
    assert [e.id.partition("#")[0] for e in others[::2]] == [e.id for e in made.examples[Stream.FORGET]]
    forget, retain = made.examples[Stream.FORGET], made.examples[Stream.RETAIN]
    count = round(0.25 * len(given[Stream.FORGET]))
    assert len(forget) == len(given[Stream.FORGET]) - count
    planted = retain[len(given[Stream.RETAIN]) :]
    assert {e.id.partition("#")[0] for e in planted}.isdisjoint({e.id for e in forget})
    assert len({e.id for e in retain}) == len(retain)
    assert abs(len(planted) - len(given[Stream.RETAIN])) < count
    assert "deceive" in made.notes[0]
    with pytest.raises(InputError, match="two forget records"):
        run_preparation(PlantedTrigger(), target, {**given, Stream.FORGET: forget[:1]}, Engine(), scratch=None)
