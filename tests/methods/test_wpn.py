"""WPN: pooling by position, the N-pair loss by hand, and a model that turns from the bad answer to the harmless one."""

from __future__ import annotations

import math

import pytest
import torch
from small_qa import QUIET, REFUSAL, exact, fixed, said
from synthetic import LAYERS, Step, step

from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.engine.loop import train
from expunge.methods.recipe import build
from expunge.methods.registry import METHODS
from expunge.methods.terms.contrastive import NPair, position_pooled
from expunge.methods.terms.likelihood import AlternativeNLL

close = torch.testing.assert_close


def test_pooling_weighs_by_position_and_its_weights_sum_to_one():
    owner = torch.tensor([0, 0, 0, 1, 1, 2])
    every = torch.ones(6, dtype=torch.bool)
    constant = torch.full((6, 2), 3.5)
    close(position_pooled(constant, owner, every, 3), torch.full((3, 2), 3.5))
    ramp = torch.tensor([[1.0], [2.0], [3.0], [10.0], [20.0], [7.0]])
    want = torch.tensor([[(1 * 1 + 2 * 2 + 3 * 3) / 6], [(10 + 2 * 20) / 3], [7.0]])
    close(position_pooled(ramp, owner, every, 3), want)
    assert (want[:2, 0] > torch.tensor([2.0, 15.0])).all()  # not the plain mean
    some = torch.tensor([True, True, False, False, True, False])  # positions count among the chosen
    close(position_pooled(ramp, owner, some, 3), torch.tensor([[(1 + 2 * 2) / 3], [20.0], [0.0]]))


def by_hand(made: Step, temperature: float | None) -> float:
    def pooled(states: torch.Tensor) -> torch.Tensor:
        weights = torch.arange(1, len(states) + 1, dtype=torch.float64)
        return (states * weights[:, None]).sum(0) / weights.sum()

    def alike(a: torch.Tensor, b: torch.Tensor) -> float:
        product = float(a @ b)
        return product if temperature is None else product / float(a.norm() * b.norm()) / temperature

    forget, other = made.items[Stream.FORGET], made.items[Stream.ALTERNATIVE]
    total = 0.0
    for mine, positive in zip(forget, other, strict=True):
        anchor = pooled(mine.states[:2])  # the prompt
        near = alike(anchor, pooled(positive.states))
        total += math.log(1 + sum(math.exp(alike(anchor, pooled(n.states)) - near) for n in forget))
    return total / len(forget)


@pytest.mark.parametrize("temperature", [0.1, 2.0, None])
def test_the_loss_is_its_definition(temperature):
    made = step((3, 1, 4), scale=0.5)
    assert made.mean(NPair(temperature=temperature)).item() == pytest.approx(by_hand(made, temperature))
    first = NPair(layer=0).needs(LAYERS)
    assert first == {(s, Of.CURRENT, "features:block0") for s in (Stream.FORGET, Stream.ALTERNATIVE)}
    with pytest.raises(InputError, match="Layer 9 is out of range: the model has 4 blocks"):
        NPair(layer=9).needs(LAYERS)


def test_it_is_log_of_one_plus_n_where_nothing_is_told_apart():
    for n in (1, 3, 8):
        made = step([2] * n)
        for items in made.items.values():
            for item in items:
                item.states = torch.ones_like(item.states)
        assert Step(made.items).mean(NPair()).item() == pytest.approx(math.log(1 + n))


def test_a_step_brings_the_positive_near_and_the_negatives_away():
    made = step((3, 2, 4), scale=0.5)
    before = made.mean(NPair()).item()
    gradients = torch.autograd.grad(made.mean(NPair()), [made.states[Stream.FORGET], made.states[Stream.ALTERNATIVE]])
    assert all(g.abs().max() > 0 for g in gradients)
    with torch.no_grad():
        for stream, g in zip((Stream.FORGET, Stream.ALTERNATIVE), gradients, strict=True):
            made.states[stream] -= 0.05 * g / g.norm()
    assert made.mean(NPair()).item() < before


# ---- what it does


def contrast(adapter, qa, examples) -> float:
    """Share of the forget prompts whose state is nearer to the harmless answer than to the own bad one."""
    block = adapter.layers()[-1]
    with torch.no_grad():
        views = {
            s: adapter.forward(adapter.model, adapter.collate(examples[s]), frozenset({f"features:{block}"}))
            for s in (Stream.FORGET, Stream.ALTERNATIVE)
        }
    pooled = {
        s: torch.nn.functional.normalize(
            position_pooled(v.features(block), v.token_owner, torch.ones_like(v.token_supervised), v.n_examples), dim=1
        )
        for s, v in views.items()
    }
    forget = views[Stream.FORGET]
    anchor = position_pooled(forget.features(block), forget.token_owner, ~forget.token_supervised, forget.n_examples)
    near, far = ((anchor * pooled[s]).sum(1) for s in (Stream.ALTERNATIVE, Stream.FORGET))
    return float((near > far).float().mean())


def test_answers_turn_from_bad_to_harmless_and_swapped_they_do_not(qa):
    examples = qa.examples()
    adapter = qa.target()
    before = contrast(adapter, qa, examples)
    parts = {"schedule": fixed(5e-4, 40), "retain": "nll"}
    train(adapter, build("wpn", parts), examples, QUIET)
    assert contrast(adapter, qa, examples) > 0.95 >= before
    assert sum(answer == REFUSAL for answer in said(adapter, qa.forget)) >= 0.95 * len(qa.forget)
    assert exact(adapter, qa.retain) > 0.95
    swapped = {**examples, Stream.FORGET: examples[Stream.ALTERNATIVE], Stream.ALTERNATIVE: examples[Stream.FORGET]}
    other = qa.target()
    train(other, build("wpn", parts), swapped, QUIET)
    assert contrast(other, qa, examples) < 0.5
    assert not any(answer == REFUSAL for answer in said(other, qa.forget))


def test_the_contrast_alone_moves_the_states(qa):
    examples = qa.examples()
    adapter = qa.target()
    train(adapter, build("custom", {"forget": "n-pair", "retain": "nll", "schedule": fixed(5e-4, 40)}), examples, QUIET)
    assert contrast(adapter, qa, examples) > 0.95


def test_what_it_asks_for_and_what_it_refuses(qa):
    recipe = build("wpn")
    assert METHODS.get("wpn").wants == ("alternatives",)
    assert recipe.forget == (NPair(), AlternativeNLL(reduction="sequence"))
    assert recipe.retain == ()
    many = qa.examples()
    many[Stream.ALTERNATIVE] = [e for e in many[Stream.ALTERNATIVE] for _ in range(2)]
    with pytest.raises(InputError, match="'n-pair' compares each forget example with one alternative, but there are 2"):
        train(qa.target(), build("wpn", {"schedule": fixed(1e-4, 1)}), many, QUIET)
    with pytest.raises(InputError, match="Layer 5 is out of range: the model has 2 blocks"):
        train(qa.target(), build("wpn", {"layer": 5, "schedule": fixed(1e-4, 1)}), qa.examples(), QUIET)
