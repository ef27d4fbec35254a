"""FLAT: every divergence against a brute-force conjugate, the directions, the scalings, and a model that learns its template."""

from __future__ import annotations

import math

import pytest
import torch
from small_qa import QUIET, REFUSAL, exact, fixed, said
from synthetic import Step, step

from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.methods.recipe import build
from expunge.methods.registry import METHODS
from expunge.methods.terms.divergence import DIVERGENCES, FDivergence, mean_probability

close = torch.testing.assert_close

#: f of the divergence, on (0, inf), f(1) = 0.
F = {
    "total-variation": lambda u: (u - 1).abs() / 2,
    "kl": lambda u: u * u.log(),
    "jensen-shannon": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "pearson": lambda u: (u - 1).square(),
    "reverse-kl": lambda u: -u.log(),
    "squared-hellinger": lambda u: (u.sqrt() - 1).square(),
    "neyman": lambda u: (1 - u).square() / u,
    "jeffrey": lambda u: (u - 1) * u.log(),
}
ALL = sorted(DIVERGENCES)


def answers(p_e: list[float], p_f: list[float]) -> Step:
    """One forget example and one template whose targets have these probabilities (two classes, in logits)."""
    made = step((len(p_f),))
    for stream, values in ((Stream.FORGET, p_f), (Stream.ALTERNATIVE, p_e)):
        item = made.items[stream][0]
        p = torch.tensor(values, dtype=torch.float64)
        item.logits = torch.full((len(p), 11), -1e9, dtype=torch.float64)
        item.targets = torch.zeros(len(p), dtype=torch.int64)
        item.logits[:, 0], item.logits[:, 1] = p.clamp_min(1e-99).log(), (1 - p).clamp_min(1e-99).log()
        item.reference = item.logits
    return Step(made.items)


def test_every_divergence_has_a_test():
    assert set(F) == set(ALL) == set(FDivergence.model_fields["divergence"].annotation.__args__)


@pytest.mark.parametrize("name", ALL)
def test_the_conjugate_is_the_largest_gap_to_the_divergence(name):
    """``f*(t) = sup_u (u t - f(u))``, by trying many u, at ``t = g(v)``; the two columns of the table must agree."""
    rises, conjugate = DIVERGENCES[name]
    u = torch.logspace(-6, 4, 400_001, dtype=torch.float64)
    for v in (0.05, 0.3, 0.7, 1.0):
        at = torch.tensor(v, dtype=torch.float64)
        brute = (u * rises(at) - F[name](u)).max()
        tolerance = 0.05 if name == "jeffrey" else 1e-6  # of which the code has a series
        assert conjugate(at).item() == pytest.approx(brute.item(), abs=tolerance)


@pytest.mark.parametrize("name", ALL)
def test_the_loss_is_its_definition_and_prefers_the_template(name):
    rises, conjugate = DIVERGENCES[name]
    made = step((3, 1, 5))
    p = {
        s: torch.cat([i.logits.softmax(-1)[torch.arange(len(i.targets)), i.targets] for i in made.items[s]]).mean()
        for s in (Stream.FORGET, Stream.ALTERNATIVE)
    }
    want = -rises(p[Stream.ALTERNATIVE]) + conjugate(p[Stream.FORGET])
    close(made.mean(FDivergence(divergence=name)), want)
    for stream, rises_with in ((Stream.FORGET, 1.0), (Stream.ALTERNATIVE, -1.0)):
        gradient = made.gradient(FDivergence(divergence=name), stream)
        targets = torch.cat([i.targets for i in made.items[stream]])
        assert (gradient[torch.arange(len(targets)), targets] * rises_with > 0).all()
    for p_e, p_f in ((0.0, 1.0), (1.0, 0.0), (0.5, 0.5)):  # bounded
        assert torch.isfinite(answers([p_e], [p_f]).mean(FDivergence(divergence=name)))


def test_total_variation_is_bounded_and_half_a_difference_where_probabilities_are_small():
    assert answers([1.0], [0.0]).mean(FDivergence()).item() == pytest.approx(-math.tanh(1) / 2)
    assert answers([0.0], [1.0]).mean(FDivergence()).item() == pytest.approx(math.tanh(1) / 2)
    made = answers([0.01, 0.03], [0.002, 0.004])
    assert made.mean(FDivergence()).item() == pytest.approx(0.003 / 2 - 0.02 / 2, rel=1e-3)
    (slope,) = torch.autograd.grad(made.mean(FDivergence()), made.logits[Stream.FORGET])
    difference = -(-made.views().current(Stream.FORGET).losses).exp().mean() / 2
    (want,) = torch.autograd.grad(-difference, made.logits[Stream.FORGET])
    close(slope, want, rtol=1e-4, atol=1e-9)


def test_the_gradient_carries_the_probability():
    for p in (0.4, 1e-2, 1e-6):
        made = answers([p], [0.5])
        (g,) = torch.autograd.grad(made.mean(FDivergence(divergence="kl")), made.logits[Stream.ALTERNATIVE])
        assert g[0, 0].item() == pytest.approx(-p * (1 - p), rel=1e-3)


def test_what_probabilities_are_averaged_over():
    made = step((3, 1))
    sums = {}
    for stream in (Stream.FORGET, Stream.ALTERNATIVE):
        view = made.views().current(stream)
        sums[stream] = (view.per_example((-view.losses).exp()), view.lengths().double(), max(view.token_counts))
    tv = DIVERGENCES["total-variation"][0]
    (f, nf, wide_f), (e, ne, wide_e) = sums[Stream.FORGET], sums[Stream.ALTERNATIVE]
    close(made.mean(FDivergence()), tv(f.sum() / nf.sum()) - tv(e.sum() / ne.sum()))
    close(made.mean(FDivergence(mean="example")), (tv(f / nf) - tv(e / ne)).mean())
    close(made.mean(FDivergence(mean="padded")), tv(f.sum() / (2 * (wide_f - 1))) - tv(e.sum() / (2 * (wide_e - 1))))
    close(made.mean(FDivergence(mean="padded", length=50)), tv(f.sum() / 100) - tv(e.sum() / 100))
    # Two alternatives of each: the template's probability of a pair is the mean over both.
    both = Step({**made.items, Stream.ALTERNATIVE: [made.items[Stream.ALTERNATIVE][i] for i in (0, 1, 1, 0)]})
    pairs = torch.stack([e[:2] / ne[:2], (e / ne).flip(0)], 0).sum(0) / 2
    close(both.mean(FDivergence(mean="example")), (tv(f / nf) - tv(pairs)).mean())


def test_pairs_by_themselves_may_be_split_and_a_whole_step_may_not(qa):
    examples = qa.examples()
    small = Engine(checkpoint_every=0, max_tokens=64)
    with pytest.raises(InputError, match="needs all examples of a step in one forward pass"):
        train(qa.target(), build("flat", {"schedule": fixed(1e-4, 1)}), examples, small)
    found = []
    for engine in (small, QUIET):
        recipe = build("flat", {"schedule": fixed(1e-4, 2), "mean": "example"})
        found.append(train(qa.target(), recipe, examples, engine).model.state_dict())
    for key, value in found[0].items():
        close(value, found[1][key], rtol=1e-3, atol=1e-5)


def test_the_template_takes_the_place_of_the_answer_and_the_loss_falls(qa):
    adapter, examples = qa.target(), qa.examples()

    def first(stream: Stream) -> float:
        """Mean probability of the first token of the answers."""
        batch = adapter.collate(examples[stream])
        with torch.no_grad():
            losses = adapter.forward(adapter.model, batch, frozenset({"losses"})).losses
        return float((-losses[batch.position == 0]).exp().mean())

    assert first(Stream.ALTERNATIVE) < 0.01 < 0.9 < first(Stream.FORGET)
    known = mean_probability(adapter, examples[Stream.FORGET], 8192)
    outcome = train(adapter, build("flat", {"schedule": fixed(3e-4, 40)}), examples, QUIET)
    assert first(Stream.ALTERNATIVE) > 0.7 > 0.1 > first(Stream.FORGET)
    assert mean_probability(adapter, examples[Stream.FORGET], 8192) < known - 0.5
    values = [row["forget.f-divergence"] for row in outcome.history]
    assert values[-1] < values[len(values) // 2] < values[0]
    assert all(abs(v) <= math.tanh(1) / 2 + 1e-6 for v in values)
    assert sum(answer.startswith(REFUSAL) for answer in said(adapter, qa.forget)) >= 0.95 * len(qa.forget)
    assert outcome.notes == []


def test_a_template_that_the_target_would_never_say_is_warned_of(qa):
    nonsense = "whisper wear opens " * 8
    outcome = train(qa.target(), build("flat", {"schedule": fixed(3e-4, 1)}), qa.examples([nonsense] * len(qa.forget)), QUIET)
    assert len(outcome.notes) == 1
    assert "mean probability of" in outcome.notes[0]
    assert "may drive both answers to 0" in outcome.notes[0]


def test_without_the_template_the_old_answer_just_falls_and_with_its_sign_turned_it_stays(qa):
    """The same steps up the loss leave what was known as it is."""
    adapter = qa.target()
    recipe = build("flat", {"schedule": fixed(3e-4, 10)})
    examples = qa.examples()
    turned = {**examples, Stream.FORGET: examples[Stream.ALTERNATIVE], Stream.ALTERNATIVE: examples[Stream.FORGET]}
    train(adapter, recipe, turned, QUIET)
    assert exact(adapter, qa.forget) == 1.0


def test_the_published_setting():
    made = build("flat", {"schedule": "paper"})
    assert (made.schedule.lr, made.schedule.epochs, made.schedule.batch, made.schedule.weight_decay) == (1e-5, 5, 64, 0.01)
    assert made.retain == ()
    assert METHODS.get("flat").wants == ("alternatives",)
