"""Loss terms against closed forms, and the equivalences between published methods."""

from __future__ import annotations

import math

import pytest
import torch
from synthetic import CLASSES, LAYERS, at_reference, step

from expunge.core.access import Of, Stream
from expunge.methods.terms.distribution import CEU, KL, FlatLogits, Undial
from expunge.methods.terms.features import RMU, FeatureMatch
from expunge.methods.terms.functions import power_weight, preference_link
from expunge.methods.terms.generic import GenericNLL
from expunge.methods.terms.likelihood import NLL, AlternativeNLL, ForgetNLL, GradientAscent
from expunge.methods.terms.preference import DPO, NPO, TNPO, SimNPO
from expunge.methods.terms.uniform import AlternativeUniform, Uniform
from expunge.methods.terms.weighted import WGA, SatImp

close = torch.testing.assert_close
BETAS = (0.01, 0.1, 1.0, 4.5)


def nll(item) -> list[float]:
    """Losses of one example by the definition, with a plain loop."""
    return [
        -math.log(math.exp(z[y]) / sum(math.exp(v) for v in z)) for z, y in zip(item.logits.tolist(), item.targets, strict=True)
    ]


def nll_reference(item) -> list[float]:
    return [-math.log(math.exp(z[y]) / sum(map(math.exp, z))) for z, y in zip(item.reference.tolist(), item.targets, strict=True)]


# ---- likelihood


@pytest.mark.parametrize(
    ("cls", "stream", "sign"),
    [
        (NLL, Stream.RETAIN, 1),
        (ForgetNLL, Stream.FORGET, 1),
        (AlternativeNLL, Stream.ALTERNATIVE, 1),
        (GradientAscent, Stream.FORGET, -1),
    ],
)
def test_likelihood_reductions(cls, stream, sign):
    made = step()
    losses = [nll(i) for i in made.items[stream]]
    flat = [x for row in losses for x in row]
    want = {
        "token": sum(flat) / len(flat),
        "sequence": sum(sum(r) / len(r) for r in losses) / len(losses),
        "sum": sum(map(sum, losses)) / len(losses),
    }
    for reduction, value in want.items():
        assert made.mean(cls(reduction=reduction)).item() == pytest.approx(sign * value)


# ---- reversed objectives and labels that were made


@pytest.mark.parametrize(("cls", "stream"), [(Uniform, Stream.RETAIN), (AlternativeUniform, Stream.ALTERNATIVE)])
def test_uniform_is_the_divergence_from_no_preference(cls, stream):
    made = step()
    rows = [row.softmax(0).tolist() for item in made.items[stream] for row in item.logits]
    want = [sum((math.log(1 / CLASSES) - math.log(p)) / CLASSES for p in row) for row in rows]
    close(cls().values(made.views()), torch.tensor(want, dtype=torch.float64))
    gradient = made.gradient(cls(), stream) * len(rows)
    close(gradient, made.logits[stream].softmax(-1) - 1 / CLASSES)  # towards uniform, not away from it
    for item in made.items[stream]:
        item.logits = torch.full_like(item.logits, 3.0)
    assert cls().values(type(made)(made.items).views()).abs().max() < 1e-12


def test_generic_labels_take_the_place_of_the_targets_and_some_are_left_out():
    made = step((3, 1, 2))
    views = made.views()
    labels = {"0": torch.tensor([2, -100, 4]), "1": torch.tensor([0]), "2": torch.tensor([-100, 1])}
    views.made["generic-labels"] = labels
    flat = torch.cat([item.logits for item in made.items[Stream.FORGET]]).log_softmax(-1)
    want = [-flat[n, y].item() if y >= 0 else 0.0 for n, y in enumerate(torch.cat(list(labels.values())).tolist())]
    close(GenericNLL().values(views), torch.tensor(want, dtype=torch.float64))


# ---- the NPO family


def test_npo_is_its_definition():
    made = step()
    ratios = [sum(nll(i)) - sum(nll_reference(i)) for i in made.items[Stream.FORGET]]
    for beta in BETAS:
        want = sum(-(2 / beta) * math.log(1 / (1 + math.exp(-beta * r))) for r in ratios) / len(ratios)
        assert made.mean(NPO(beta=beta)).item() == pytest.approx(want)


@pytest.mark.parametrize("beta", BETAS)
def test_npo_at_the_reference_has_the_gradient_of_summed_ascent_and_a_known_value(beta):
    made = at_reference(step())
    assert made.mean(NPO(beta=beta)).item() == pytest.approx(2 / beta * math.log(2))
    close(made.gradient(NPO(beta=beta)), made.gradient(GradientAscent(reduction="sum")))


def test_npo_tends_to_summed_ascent_as_beta_vanishes():
    made = step()
    close(made.gradient(NPO(beta=1e-7)), made.gradient(GradientAscent(reduction="sum")), rtol=1e-4, atol=1e-6)


def test_npo_gradient_weight():
    made = step()
    weights = []
    for item in made.items[Stream.FORGET]:
        p, q = math.exp(-sum(nll(item))), math.exp(-sum(nll_reference(item)))
        weights += [2 * p**0.5 / (p**0.5 + q**0.5)] * len(item.targets)
    plain = made.gradient(GradientAscent(reduction="sum"))
    close(made.gradient(NPO(beta=0.5)), plain * torch.tensor(weights, dtype=torch.float64)[:, None])


def test_npo_is_dpo_without_a_winner():
    made = step()
    for item in made.items[Stream.ALTERNATIVE]:
        item.logits = item.reference.clone()
    made = type(made)(made.items)
    for beta in BETAS:
        close(made.mean(DPO(beta=beta)), made.mean(NPO(beta=beta)))
        close(made.gradient(DPO(beta=beta), Stream.FORGET), made.gradient(NPO(beta=beta)))


def test_dpo_is_its_definition_and_raises_the_alternative():
    made = step()
    beta, total = 0.3, 0.0
    for lost, won in zip(made.items[Stream.FORGET], made.items[Stream.ALTERNATIVE], strict=True):
        margin = (sum(nll_reference(won)) - sum(nll(won))) - (sum(nll_reference(lost)) - sum(nll(lost)))
        total += 2 / beta * math.log(1 + math.exp(-beta * margin))
    assert made.mean(DPO(beta=beta)).item() == pytest.approx(total / 3)
    gradient = made.gradient(DPO(beta=beta), Stream.ALTERNATIVE)
    targets = torch.cat([i.targets for i in made.items[Stream.ALTERNATIVE]])
    assert (gradient[torch.arange(len(targets)), targets] < 0).all()


def test_simnpo_is_npo_with_length_normalisation_and_a_constant_reference():
    made = step()
    view = made.views().current(Stream.FORGET)
    mean = view.per_example(view.losses) / view.lengths().double()
    for beta, delta in ((4.5, 0.0), (2.5, 0.7)):
        close(made.mean(SimNPO(beta=beta, delta=delta)), preference_link(mean - delta, beta).mean())


def test_simnpo_tends_to_length_normalised_ascent_and_weighs_answers_alike():
    made = step((2, 8), scale=0.5)
    gradient = made.gradient(SimNPO(beta=1e-7))
    close(gradient, made.gradient(GradientAscent(reduction="sequence")), rtol=1e-4, atol=1e-7)
    # With uniform predictions every token has the same gradient norm: an answer's total weight does not depend on its length.
    for item in made.items[Stream.FORGET]:
        item.logits = torch.zeros_like(item.logits)
    gradient = type(made)(made.items).gradient(SimNPO())
    close(gradient[:2].norm(dim=1).sum(), gradient[2:].norm(dim=1).sum())


def test_tnpo_is_ascent_with_a_weight_per_token():
    made = step()
    losses = made.views().current(Stream.FORGET).losses.detach()
    reference = made.views().reference(Stream.FORGET).losses
    p, q = torch.exp(-losses) ** 0.5, torch.exp(-reference) ** 0.5
    close(made.gradient(TNPO(beta=0.5)), made.gradient(GradientAscent()) * (2 * p / (p + q))[:, None])


def test_npo_stops_by_itself_and_ascent_does_not():
    score = torch.tensor([0.0, 50.0, 500.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(preference_link(score, 0.1).sum(), score)
    close(slope[0], torch.tensor(-1.0, dtype=torch.float64))
    assert -0.02 < slope[1] < 0
    assert slope[2].abs() < 1e-20


# ---- weighted ascent


def test_satimp_without_its_second_factor_is_wga_and_wga_at_zero_is_ascent():
    made = step()
    for beta in (0.5, 1.0, 5.0):
        close(made.gradient(SatImp(beta1=beta, beta2=0.0)), made.gradient(WGA(beta=beta)))
        close(made.mean(SatImp(beta1=beta, beta2=0.0)), made.mean(WGA(beta=beta)))
    close(made.gradient(WGA(beta=0.0)), made.gradient(GradientAscent()))
    close(made.mean(WGA(beta=0.0)), made.mean(GradientAscent()))


def test_wga_is_its_definition_with_a_detached_weight():
    made = step()
    rows = [x for i in made.items[Stream.FORGET] for x in nll(i)]
    assert made.mean(WGA(beta=2.0)).item() == pytest.approx(-sum(math.exp(-2 * x) * x for x in rows) / len(rows))
    weight = torch.tensor([math.exp(-2 * x) for x in rows], dtype=torch.float64)
    close(made.gradient(WGA(beta=2.0)), made.gradient(GradientAscent()) * weight[:, None])


@pytest.mark.parametrize(("first", "second"), [(5.0, 1.0), (2.0, 3.0)])
def test_satimp_weight_peaks_where_it_should_and_vanishes_at_both_ends(first, second):
    p = torch.linspace(1e-6, 1 - 1e-6, 200_001, dtype=torch.float64)
    weight = power_weight(-p.log(), first, second)
    assert p[weight.argmax()].item() == pytest.approx(first / (first + second), abs=1e-4)
    ends = power_weight(torch.tensor([0.0, 1e4]), first, second)
    assert ends.tolist() == [0.0, 0.0]


def test_weights_at_certainty_keep_their_limit():
    assert power_weight(torch.tensor([0.0, 1e4]), 0.0, 0.0).tolist() == [1.0, 1.0]
    assert power_weight(torch.tensor([0.0, 1e4]), 1.0, 0.0).tolist() == [1.0, 0.0]


# ---- edited distributions


def test_ceu_gradient_is_the_stated_one_and_skips_the_first_token():
    made = step()
    probabilities = made.logits[Stream.FORGET].detach().softmax(-1)
    targets = torch.cat([i.targets for i in made.items[Stream.FORGET]])
    rows = torch.arange(len(targets))
    true = probabilities[rows, targets]
    want = probabilities - probabilities / (1 - true)[:, None]
    want[rows, targets] = true
    close(made.gradient(CEU(skip=0)) * len(targets), want)
    close(want.sum(1), torch.zeros(len(targets), dtype=torch.float64), atol=1e-12, rtol=0)

    view = made.views().current(Stream.FORGET)
    left = (view.position == 0) & (view.lengths()[view.owner] > 1)  # an only target is not left out
    assert left.any()
    skipped = made.gradient(CEU())
    assert (skipped[left] == 0).all()
    close(skipped[~left] * int((~left).sum()), want[~left])
    assert CEU().count(made.examples(Stream.FORGET)) == int((~left).sum())


def test_ceu_is_undial_with_itself_as_reference_and_infinite_strength():
    made = step()
    for item in made.items[Stream.FORGET]:
        item.reference = item.logits.clone()
    made = type(made)(made.items)
    close(made.mean(CEU(skip=0)), made.mean(Undial(beta=60.0)))
    close(made.gradient(CEU(skip=0)), made.gradient(Undial(beta=60.0)))


def test_undial_with_zero_strength_leaves_the_reference_as_it_is():
    made = at_reference(step())
    close(made.gradient(Undial(beta=0.0)), torch.zeros(9, CLASSES, dtype=torch.float64), atol=1e-15, rtol=0)


def test_undial_has_its_minimum_at_the_edited_distribution():
    made = step()
    reference = torch.cat([i.reference for i in made.items[Stream.FORGET]])
    targets = torch.cat([i.targets for i in made.items[Stream.FORGET]])
    edited = reference.clone()
    edited[torch.arange(9), targets] -= 10.0
    with torch.no_grad():
        made.logits[Stream.FORGET].copy_(edited)
    close(made.gradient(Undial()), torch.zeros(9, CLASSES, dtype=torch.float64), atol=1e-14, rtol=0)
    p = edited.softmax(-1)[torch.arange(9), targets]
    raw = reference.softmax(-1)[torch.arange(9), targets] * math.exp(-10)
    close(p, raw / (1 - raw * math.exp(10) + raw))


def test_kl_is_zero_at_the_reference_and_its_gradient_is_the_difference_of_probabilities():
    made = step()
    p, q = (torch.cat([getattr(i, n) for i in made.items[Stream.RETAIN]]).softmax(-1) for n in ("logits", "reference"))
    assert made.mean(KL()).item() == pytest.approx((q * (q / p).log()).sum(-1).mean().item())
    close(made.gradient(KL()) * 6, p - q)
    same = at_reference(made)
    assert same.mean(KL()).item() == pytest.approx(0.0, abs=1e-14)
    close(same.gradient(KL()), torch.zeros(6, CLASSES, dtype=torch.float64), atol=1e-15, rtol=0)


def test_flat_logits_are_the_squared_margin_and_end_at_the_uniform_distribution():
    made = step()
    rows = torch.cat([i.logits for i in made.items[Stream.FORGET]]).tolist()
    want = sum((max(r) - sum(r) / len(r)) ** 2 for r in rows) / len(rows)
    assert made.mean(FlatLogits()).item() == pytest.approx(want)
    logits = made.logits[Stream.FORGET]
    for _ in range(500):
        gradient = made.gradient(FlatLogits())
        with torch.no_grad():
            logits -= 3.0 * gradient
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    assert entropy.min().item() > 0.99 * math.log(CLASSES)


# ---- features


def test_rmu_is_a_mean_over_tokens_also_for_unequal_lengths():
    made = step((1, 6))
    term = RMU(coefficient=3.0, seed=5, layer=1)
    goal = 3.0 * term.direction(6).double()
    rows = torch.cat([i.states for i in made.items[Stream.FORGET]])
    want = sum(float(((row - goal) ** 2).sum()) for row in rows) / len(rows)
    assert made.mean(term).item() == pytest.approx(want, rel=1e-5)
    assert made.mean(term.model_copy(update={"reduce": "mean"})).item() == pytest.approx(want / 6, rel=1e-5)
    only = RMU(coefficient=3.0, seed=5, layer=1, tokens="supervised")
    rows = torch.cat([i.states[2:] for i in made.items[Stream.FORGET]])
    want = sum(float(((row - goal) ** 2).sum()) for row in rows) / 7
    assert made.mean(only).item() == pytest.approx(want, rel=1e-5)


def test_rmu_direction_is_a_seeded_positive_unit_vector():
    u = RMU(seed=3).direction(512)
    assert u.norm().item() == pytest.approx(1.0)
    assert (u >= 0).all()
    assert torch.equal(u, RMU(seed=3).direction(512))
    assert not torch.equal(u, RMU(seed=4).direction(512))
    torch.rand(10)  # the global generator is neither read nor moved
    before = torch.get_rng_state()
    RMU(seed=3).direction(512)
    assert torch.equal(before, torch.get_rng_state())


def test_rmu_descends_to_its_vector():
    made = step((2, 3))
    states, term = made.states[Stream.FORGET], RMU(coefficient=6.5)
    for _ in range(500):
        (g,) = torch.autograd.grad(made.mean(term), states)
        with torch.no_grad():
            states -= 0.5 * g
    close(states.detach().float(), (6.5 * term.direction(6)).expand(9, 6), atol=1e-3, rtol=0)


def test_feature_match_is_zero_at_the_reference_and_has_no_gradient_to_it():
    made = step()
    current, frozen = (torch.cat([getattr(i, n) for i in made.items[Stream.RETAIN]]) for n in ("states", "reference_states"))
    assert made.mean(FeatureMatch()).item() == pytest.approx(((current - frozen) ** 2).sum(-1).mean().item(), rel=1e-5)
    assert at_reference(made).mean(FeatureMatch()).item() == 0.0


@pytest.mark.parametrize(("depth", "block"), [(1, 0), (2, 0), (4, 1), (12, 3), (32, 7)])
def test_the_default_layer_is_the_papers_share_of_the_depth(depth, block):
    layers = [f"b{i}" for i in range(depth)]
    assert RMU().needs(layers) == {(Stream.FORGET, Of.CURRENT, f"features:b{block}")}
    assert RMU(layer=-1).needs(LAYERS) == {(Stream.FORGET, Of.CURRENT, "features:block3")}
