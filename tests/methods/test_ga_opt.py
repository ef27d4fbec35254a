"""The LLMU recipe: its loss by hand, several random answers of each prompt, and what each of its three parts is for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from small_qa import QUIET, exact, fixed, loss
from synthetic import step

from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.engine.loop import train
from expunge.engine.objective import Objective
from expunge.engine.options import Engine
from expunge.engine.preparation import run_preparation
from expunge.methods.evaluate import combine, loss_on
from expunge.methods.preparations.mismatched import RandomAnswers
from expunge.methods.recipe import build
from expunge.methods.registry import METHODS
from expunge.methods.terms.distribution import KL
from expunge.methods.terms.likelihood import AlternativeNLL, ForgetNLL

close = torch.testing.assert_close


def prepared(qa, answers: int = 5, seed: int = 0) -> dict[Stream, list]:
    engine = Engine(checkpoint_every=0, seed=seed)
    examples = {s: e for s, e in qa.examples().items() if s is not Stream.ALTERNATIVE}
    return dict(run_preparation(RandomAnswers(answers=answers), qa.target_model, examples, engine, scratch=None).examples)


# ---- the answers


def test_each_prompt_gets_so_many_answers_of_others(qa):
    examples = prepared(qa)
    forget, random = examples[Stream.FORGET], examples[Stream.ALTERNATIVE]
    assert len(random) == 5 * len(forget)
    retained = {tuple(e.data.ids[e.data.start :].tolist()) for e in examples[Stream.RETAIN]}
    for i, example in enumerate(forget):
        own = random[5 * i : 5 * i + 5]
        assert all(e.data.ids[: e.data.start].tolist() == example.data.ids[: example.data.start].tolist() for e in own)
        assert all(tuple(e.data.ids[e.data.start :].tolist()) in retained for e in own)
        assert all(e.n_targets == len(e.data.ids) - e.data.start and e.data.ends for e in own)
        assert len({e.id for e in own}) == 5
    again, other = prepared(qa), prepared(qa, seed=1)
    assert [e.data.ids.tolist() for e in again[Stream.ALTERNATIVE]] == [e.data.ids.tolist() for e in random]
    assert [e.data.ids.tolist() for e in other[Stream.ALTERNATIVE]] != [e.data.ids.tolist() for e in random]


def test_too_few_answers_are_refused(qa):
    examples = {s: e[:3] for s, e in qa.examples().items() if s is not Stream.ALTERNATIVE}
    with pytest.raises(InputError, match="fewer than 5 retain examples"):
        run_preparation(RandomAnswers(), qa.target_model, examples, QUIET, scratch=None)


def test_several_alternatives_stay_with_their_example_and_are_counted(qa):
    examples = prepared(qa, answers=3)
    objective = Objective(qa.target_model, build("ga-opt"), examples, {Of.REFERENCE: None})
    plan = {Stream.FORGET: [4, 1], Stream.RETAIN: [0]}
    assert objective.counts(plan) == [2, 6, examples[Stream.RETAIN][0].n_targets]
    for tokens in (64, 8192):
        micros = objective.micro_batches(plan, tokens)
        assert (len(micros) > 1) == (tokens == 64)
        for micro in micros:
            forget = [e.id for e in micro.examples.get(Stream.FORGET, ())]
            random = [e.id for e in micro.examples.get(Stream.ALTERNATIVE, ())]
            assert random == [f"{name}#random{k}" for name in forget for k in range(3)]
        assert sorted(e.id for m in micros for e in m.examples.get(Stream.FORGET, ())) == sorted(
            examples[Stream.FORGET][i].id for i in (4, 1)
        )
    filler = objective.filler()
    assert len(filler.examples[Stream.ALTERNATIVE]) == 3
    with pytest.raises(InputError, match="'dpo' compares each forget example with one alternative, but there are 3"):
        Objective(qa.target_model, build("dpo"), examples, {Of.REFERENCE: None})
    torn = {**examples, Stream.ALTERNATIVE: examples[Stream.ALTERNATIVE][:-1]}
    with pytest.raises(InputError, match="or equally many of each"):
        Objective(qa.target_model, build("ga-opt"), torn, {Of.REFERENCE: None})


# ---- the loss


def test_it_is_gradient_difference_with_a_divergence_and_random_targets():
    """GA-OPT = GradDiff(KL) + supervised random answers, with means over sequences."""
    made = step((3, 1, 5))
    examples = {s: made.examples(s) for s in made.items}
    recipe = build("ga-opt", {"preparation": "none"})
    got = combine(recipe, made.views(), examples)["total"]
    plain = build("graddiff-kl", {"forget.reduction": "sequence", "forget.weight": 0.5})
    want = combine(plain, made.views(), examples)["total"] + made.mean(AlternativeNLL(reduction="sequence"))
    close(got, want)
    ascent = [torch.nn.functional.cross_entropy(i.logits, i.targets).item() for i in made.items[Stream.FORGET]]
    random = [torch.nn.functional.cross_entropy(i.logits, i.targets).item() for i in made.items[Stream.ALTERNATIVE]]
    by_hand = -0.5 * sum(ascent) / 3 + sum(random) / 3 + made.mean(KL()).item()
    assert got.item() == pytest.approx(by_hand)


def test_the_loss_of_five_random_answers_by_hand(qa):
    adapter, examples = qa.target(), prepared(qa)
    terms = loss_on(build("ga-opt"), adapter, adapter, qa.forget, qa.retain)
    means = []
    for e in examples[Stream.ALTERNATIVE]:
        with torch.no_grad():
            means.append(float(adapter.forward(adapter.model, adapter.collate([e]), frozenset({"losses"})).losses.mean()))
    assert terms["forget.alternative-nll"].item() == pytest.approx(sum(means) / len(means), rel=1e-4)
    assert abs(terms["retain.kl"].item()) < 1e-6
    gradient = torch.autograd.grad(terms["retain.kl"], list(adapter.model.parameters()))
    assert max(g.abs().max() for g in gradient) < 1e-5  # the target is the reference


# ---- what it does


def run(qa, steps: int, **parts):
    adapter = qa.target()
    seen: list[tuple[float, float]] = []

    def observe(_: int, model) -> None:
        seen.append((loss(adapter, qa.forget, model), exact(adapter, qa.retain)))

    train(adapter, build("ga-opt", {"schedule": fixed(3e-4, steps), **parts}), prepared(qa), QUIET, observe=observe)
    return adapter, seen


def test_the_forget_loss_rises_and_without_the_divergence_more_is_lost(qa):
    _, seen = run(qa, 25)
    rises = [f for f, _ in seen]
    assert all(b > a for a, b in itertools.pairwise(rises[:11]))
    _, bare = run(qa, 25, retain="none")
    wanted = min(rises[-1], bare[-1][0])
    kept, lost = (next(r for f, r in x if f >= wanted - 1e-9) for x in (seen, bare))
    assert kept > lost + 0.1
    assert kept > 0.9


def test_with_the_sign_of_its_ascent_turned_next_to_nothing_is_forgotten(qa):
    """What is left of the weight 0.5 outweighs each of the five random answers."""
    made = build("ga-opt", {"schedule": fixed(3e-4, 25)})
    turned = made.model_copy(update={"forget": (ForgetNLL(weight=0.5, reduction="sequence"), made.forget[1])})
    known = []
    for recipe in (turned, made):
        adapter = qa.target()
        train(adapter, recipe, prepared(qa), QUIET)
        known.append(exact(adapter, qa.forget))
    assert known[0] > 0.9
    assert known[1] < 0.7


def test_it_ends_once_the_forget_loss_is_over_the_limit(qa):
    """Twenty forget examples, twelve a step: looked at after every second step, and no earlier than it is passed."""
    _, seen = run(qa, 25)
    limit = (seen[5][0] + seen[6][0]) / 2
    assert seen[4][0] < limit < seen[6][0]
    adapter = qa.target()
    recipe = build("ga-opt", {"schedule": fixed(3e-4, 25, limit=limit)})
    outcome = train(adapter, recipe, prepared(qa), QUIET)
    assert (outcome.reason, outcome.steps, outcome.reached) == ("limit", 6, True)
    assert outcome.forget_loss > limit
    assert f"over the limit of {limit:.3f}" in outcome.sentence
    assert [("forget_loss" in row) for row in outcome.history] == [False, True] * 3
    with pytest.raises(InputError, match="limit"):
        build("scrub", {"schedule": {"name": "turns", "limit": 3.0}})


def test_the_published_setting_and_what_it_asks_for():
    made = build("ga-opt", {"schedule": "paper"})
    schedule = made.schedule
    assert (schedule.lr, schedule.steps, schedule.batch, schedule.warmup, schedule.decay) == (2e-6, 1000, 2, 0.0, "linear")
    assert schedule.limit == 100
    assert [t.weight for t in made.terms()] == [0.5, 1.0, 1.0]
    assert made.preparation == RandomAnswers(answers=5)
    assert METHODS.get("ga-opt").wants == ("retain",)
    lora = build("ga-opt", {"parameters": {"name": "lora", "rank": 16, "alpha": 32}, "schedule": {"name": "paper", "lr": 1e-3}})
    assert lora.schedule.lr == 1e-3
    assert math.isclose(lora.parameters.alpha / lora.parameters.rank, 2)
