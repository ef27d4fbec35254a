"""What must hold for every registered term: batching, extremes, sign, declared needs."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import LAYERS, Step, step

from expunge.core.access import Of, Stream
from expunge.engine.parts import Term, Views
from expunge.methods.registry import TERMS

close = torch.testing.assert_close
ALL = [cls for _, cls in TERMS.items()]
FORGETTING = [
    "gradascent",
    "npo",
    "tnpo",
    "simnpo",
    "dpo",
    "wga",
    "satimp",
    "undial",
    "ceu",
    "pdu",
    "inverted-hinge",
    "f-divergence",
]


def test_every_family_is_there():
    expected = {*FORGETTING, "nll", "forget-nll", "alternative-nll", "kl", "rmu", "features"}
    assert expected <= set(TERMS.names())


@pytest.mark.parametrize("cls", [c for c in ALL if not c.whole], ids=lambda c: c.name)
@given(lengths=st.lists(st.integers(0, 6), min_size=2, max_size=6), cut=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_micro_batches_add_up_to_the_large_batch(cls: type[Term], lengths: list[int], cut: int, seed: int):
    cut = min(cut, len(lengths) - 1)
    whole = step(lengths, lengths, seed)
    parts = [Step({s: items[a:b] for s, items in whole.items.items()}) for a, b in ((0, cut), (cut, len(lengths)))]
    for reduction in get_args(cls.model_fields["reduction"].annotation) if "reduction" in cls.model_fields else (None,):
        term = cls() if reduction is None else cls(reduction=reduction)
        total = sum(term.values(p.views()).sum() for p in parts)
        close(total, term.values(whole.views()).sum(), rtol=1e-6, atol=1e-6)
        assert sum(term.count(p.examples(term.stream)) for p in parts) == term.count(whole.examples(term.stream))


@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.name)
@pytest.mark.parametrize("height", [1e4, -1e4])
def test_certainty_and_impossibility_give_finite_values_and_gradients(cls: type[Term], height: float):
    made = step(scale=0.5)
    for items in made.items.values():
        for item in items:
            item.logits = item.logits.float()
            item.reference = item.reference.float()
            item.logits[torch.arange(len(item.targets)), item.targets] = height
    made = Step(made.items)
    term = cls()
    loss = made.mean(term)
    assert torch.isfinite(loss)
    leaves = [made.logits[term.stream], made.states[term.stream]]
    for gradient in torch.autograd.grad(loss, leaves, allow_unused=True):
        assert gradient is None or torch.isfinite(gradient).all()


@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.name)
def test_a_step_without_any_target_is_zero_or_constant(cls: type[Term]):
    made = step((0, 0), (0, 0))
    for item in made.items[Stream.ALTERNATIVE]:
        for name in ("logits", "reference", "targets"):
            setattr(item, name, getattr(item, name)[:0])
    made = Step(made.items)
    assert torch.isfinite(made.mean(cls()))


@pytest.mark.parametrize("name", FORGETTING)
def test_a_small_step_down_the_gradient_makes_the_forget_answers_less_likely(name: str):
    term = TERMS.get(name)()
    for seed in range(5):
        made = step((4, 2, 3), seed=seed)
        if name in ("undial", "pdu"):  # these forget where the model is confident: the true token on top
            for item in made.items[Stream.FORGET]:
                item.logits[torch.arange(len(item.targets)), item.targets] = 8.0
            made = Step(made.items)
        before = made.views().current(Stream.FORGET).losses.sum().item()
        gradient = made.gradient(term, Stream.FORGET)
        assert gradient.abs().max() > 0
        with torch.no_grad():
            made.logits[Stream.FORGET] -= 1e-3 * gradient / gradient.norm()
        assert made.views().current(Stream.FORGET).losses.sum().item() > before


@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.name)
def test_a_term_reads_what_it_declares_and_nothing_else(cls: type[Term]):
    term = cls()
    made = step()
    full = made.views()
    needs = term.needs(LAYERS)
    for (stream, of), held in full.items():
        held.values = {k: v for k, v in held.values.items() if (stream, of, k) in needs}
    assert torch.isfinite(term.values(full)).all()
    for need in needs:
        stream, of, value = need
        short = made.views()
        del short[stream, of].values[value]
        with pytest.raises(KeyError):
            term.values(short)


@pytest.mark.parametrize("name", ["undial", "features"])
def test_what_a_term_makes_a_target_of_gets_no_gradient(name: str):
    made = step()
    views = made.views()
    leaves = []
    for (_, of), held in views.items():
        if of is Of.REFERENCE:
            held.values = {k: v.detach().requires_grad_() for k, v in held.values.items()}
            leaves += held.values.values()
    gradients = torch.autograd.grad(TERMS.get(name)().values(Views(views, LAYERS)).sum(), leaves, allow_unused=True)
    assert all(g is None for g in gradients)


@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.name)
def test_per_says_what_a_value_belongs_to(cls: type[Term]):
    made = step()
    term = cls()
    items = made.items[term.stream]
    size = {"target": sum(len(i.targets) for i in items), "example": len(items), "token": sum(i.size for i in items)}[term.per]
    assert term.values(made.views()).shape == (size,)
