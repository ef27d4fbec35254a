"""Relearning on real small models: what comes back, what does not, and what must be the same for all models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as hyp
from tests.world import World
from torch import nn

from expunge.adapters.base import Example
from expunge.adapters.language import LanguageAdapter
from expunge.audit.arrays import Arrays, Sample, Thresholds
from expunge.audit.attacks.relearn import RelearnPoint, RelearnSettings, rate, recovered, relearn, split
from expunge.audit.verdict import judge
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.core.results import Verdict
from expunge.engine.loop import train
from expunge.engine.objective import mean_losses
from expunge.engine.options import Engine
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.terms.likelihood import NLL
from expunge.methods.terms.preference import NPO

STEPS = (1, 5, 10)


def examples(sizes: list[int]) -> list[Example]:
    return [Example(f"{c}-{i}", f"c{c}", 1, 2, None) for c, n in enumerate(sizes) for i in range(n)]


@given(hyp.lists(hyp.integers(1, 6), min_size=2, max_size=12), hyp.integers(0, 50))
def test_halves_share_no_cluster_and_are_about_equal(sizes: list[int], seed: int) -> None:
    held = examples(sizes)
    first, second = split(held, seed)
    assert sorted([*first, *second]) == list(range(len(held)))
    assert not {held[i].cluster for i in first} & {held[i].cluster for i in second}
    assert first
    assert second
    assert abs(len(first) - len(second)) <= max(sizes)
    assert split(held, seed) == (first, second)


def test_one_cluster_is_split_by_examples_and_one_example_not_at_all() -> None:
    first, second = split(examples([9]), 0)
    assert {len(first), len(second)} == {4, 5}
    assert split(examples([3] * 8), 0) != split(examples([3] * 8), 1)
    with pytest.raises(InputError, match="at least two examples"):
        split(examples([1]), 0)


def test_the_rate_follows_width_and_size_of_the_weights() -> None:
    torch.manual_seed(0)

    def net(width: int, size: float) -> nn.Module:
        layer = nn.Linear(width, width, bias=False)
        nn.init.normal_(layer.weight, std=size)
        return nn.Sequential(nn.Embedding(10, width), layer)

    assert rate(net(256, 0.02), 0.05) == pytest.approx(0.05 * 0.02 / 16, rel=0.02)
    assert rate(net(256, 0.04), 0.05) == pytest.approx(2 * rate(net(256, 0.02), 0.05), rel=0.02)
    assert rate(net(2048, 0.02), 0.05) == pytest.approx(2e-5, rel=0.15)  # what models of a billion parameters are tuned with
    with pytest.raises(InputError, match="no linear weight"):
        rate(nn.Embedding(3, 4), 0.05)


def test_one_step_at_the_rate_changes_an_output_by_the_stated_share() -> None:
    """A step of the sign of the input is the aligned one; the layer's output is of size rms * sqrt(fan in) on a unit input."""
    torch.manual_seed(1)
    layer = nn.Linear(512, 512, bias=False)
    nn.init.normal_(layer.weight, std=0.03)
    x = torch.randn(512)
    lr = rate(layer, 0.05)
    moved = layer.weight + lr * torch.sign(x)
    change = (moved @ x - layer.weight @ x).pow(2).mean().sqrt() / (layer.weight @ x).pow(2).mean().sqrt()
    assert change.item() == pytest.approx(0.05 * np.sqrt(2 / np.pi), rel=0.15)  # E|x| of a normal input


@pytest.fixture(scope="module")
def six(trained_models: Path) -> World:
    """The world of the other tests with six people to forget: three are trained on, three measured."""
    return World(trained_models, forget_persons=6)


@pytest.fixture(scope="module")
def forget(six: World) -> list[Example]:
    return six.examples[Stream.FORGET]


@pytest.fixture(scope="module")
def budget(six: World) -> RelearnSettings:
    return RelearnSettings(steps=STEPS).resolved(six.target())


def test_settings_are_checked_and_resolved_once(six: World, forget: list[Example], budget: RelearnSettings) -> None:
    assert budget.rates == pytest.approx([rate(six.target().model, r) for r in (0.1, 0.4)])
    assert budget.resolved(six.retrained()) == budget  # a rate that is fixed stays
    with pytest.raises(InputError, match="same learning rates for all models"):
        relearn(six.target(), forget, None, RelearnSettings(), 0)
    for steps in ((), (0, 1), (5, 2), (1, 1)):
        with pytest.raises(InputError, match="positive and ascending"):
            RelearnSettings(steps=steps)
    with pytest.raises(InputError, match="must be positive"):
        RelearnSettings(rates=(0.0,))
    with pytest.raises(InputError, match="retain examples"):
        relearn(six.target(), forget, None, budget.model_copy(update={"material": "retain"}), 0)


def test_curve_is_measured_at_the_stated_steps_on_a_copy(six: World, forget: list[Example], budget: RelearnSettings) -> None:
    adapter = six.retrained()
    before = {n: p.detach().clone() for n, p in adapter.model.named_parameters()}
    state = torch.get_rng_state()
    curve = relearn(adapter, forget, None, budget, 0)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[n]) for n, p in adapter.model.named_parameters())
    assert all(p.requires_grad for p in adapter.model.parameters())
    assert [(p.lr, p.step) for p in curve] == [(lr, s) for lr in budget.rates for s in (0, *STEPS)]
    assert np.array_equal(curve[0].losses_heldout, curve[len(STEPS) + 1].losses_heldout)  # each rate starts from the model itself
    first, second = split(forget, 0)
    assert curve[0].ids_trained == tuple(forget[i].id for i in first)
    assert curve[0].clusters_heldout == tuple(forget[i].cluster for i in second)
    start = mean_losses(adapter, adapter.model, forget, 8192)
    assert curve[0].losses_heldout == pytest.approx([start[i] for i in second], abs=1e-5)
    assert curve[0].losses_trained == pytest.approx([start[i] for i in first], abs=1e-5)
    assert curve[-1].losses_trained.mean() < curve[0].losses_trained.mean() - 0.5  # it does learn what it is trained on
    again = relearn(adapter, forget, None, budget, 0)
    assert all(np.array_equal(p.losses_heldout, q.losses_heldout) for p, q in zip(curve, again, strict=True))


def test_training_on_retain_measures_the_whole_forget_set(six: World, forget: list[Example], budget: RelearnSettings) -> None:
    settings = budget.model_copy(update={"material": "retain", "steps": (1,)})
    retain = six.examples[Stream.RETAIN][:40]
    curve = relearn(six.retrained(), forget, retain, settings, 0)
    assert curve[0].ids_heldout == tuple(e.id for e in forget)
    assert curve[0].ids_trained == tuple(e.id for e in retain)


@pytest.fixture(scope="module")
def suppressed(six: World) -> LanguageAdapter:
    """The target after some steps of NPO: high loss on the forget set, knowledge underneath."""
    adapter = six.target()
    schedule = Fixed(lr=5e-4, steps=80, epochs=None, warmup=0, batch=16)
    recipe = compose("npo", forget=[NPO()], retain=[NLL()], schedule=schedule)
    train(adapter, recipe, six.examples, Engine())
    return adapter


@pytest.fixture(scope="module")
def curves(six, forget: list[Example], budget: RelearnSettings, suppressed: LanguageAdapter) -> dict[str, list[RelearnPoint]]:
    models = {"suppressed": suppressed, "retrained": six.retrained(1)}
    return {name: relearn(a, forget, None, budget, 0) for name, a in models.items()}


@pytest.fixture(scope="module")
def full(six: World, forget: list[Example]) -> dict[str, float]:
    target = six.target()
    return dict(zip((e.id for e in forget), mean_losses(target, target.model, forget, 8192), strict=True))


def test_suppressed_knowledge_returns_in_the_half_that_was_not_trained_on(
    curves: dict[str, list[RelearnPoint]], full: dict[str, float]
) -> None:
    own, control = ([float(p.losses_heldout.mean()) for p in curves[name]] for name in ("suppressed", "retrained"))
    assert own[0] > control[0] - 1.5  # before the attack it does not stand out
    assert min(own) < min(control) - 1.0
    assert min(control) > 2.0  # the control learns the style of the answers, not the answers
    back = recovered(curves["suppressed"], [curves["retrained"]], full)
    best = max(back, key=lambda r: r.share.value)
    assert best.share.value > back[0].share.value + 0.1
    assert best.share.low is not None
    assert best.share.low > 0.2


def test_recovered_fraction_equals_its_formula(curves: dict[str, list[RelearnPoint]], full: dict[str, float]) -> None:
    shifted = [replace(p, losses_heldout=p.losses_heldout + 0.3) for p in curves["retrained"]]
    controls = [curves["retrained"], shifted]
    found = recovered(curves["suppressed"], controls, full)
    target = np.mean([full[i] for i in curves["suppressed"][0].ids_heldout])
    start = np.mean([c[0].losses_heldout.mean() for c in controls])
    for at, point in enumerate(found):
        control = np.mean([c[at].losses_heldout.mean() for c in controls])
        expected = (control - curves["suppressed"][at].losses_heldout.mean()) / (start - target)
        assert point.share.value == pytest.approx(expected)
        assert point.share.low <= point.share.value <= point.share.high
    itself = recovered(controls[0], [controls[0]], full)
    assert [r.share.value for r in itself] == pytest.approx([0.0] * len(found))
    back_at_the_target = [replace(p, losses_heldout=np.array([full[i] for i in p.ids_heldout])) for p in controls[0]]
    assert recovered(back_at_the_target, [controls[0]], full)[0].share.value == pytest.approx(1.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: replace(p, lr=2 * p.lr),
        lambda p: replace(p, step=p.step + 1),
        lambda p: replace(p, ids_heldout=p.ids_heldout[::-1]),
    ],
)
def test_curves_of_different_attacks_are_not_compared(
    curves: dict[str, list[RelearnPoint]], full: dict[str, float], change: Callable[[RelearnPoint], RelearnPoint]
) -> None:
    other = [change(p) for p in curves["retrained"]]
    with pytest.raises(InputError, match="differ in steps, learning rate or examples"):
        recovered(curves["suppressed"], [other], full)
    with pytest.raises(InputError, match="at least one retrained"):
        recovered(curves["suppressed"], [], full)


def measured(label: str, six: World, adapter: LanguageAdapter, forget: list[Example], curve: list[RelearnPoint]) -> Arrays:
    retain = six.examples[Stream.RETAIN]
    kept = np.exp(-np.array(mean_losses(adapter, adapter.model, retain, 8192)))
    return Arrays(
        label=label,
        ids=[e.id for e in forget],
        clusters=[e.cluster for e in forget],
        nll=np.array(mean_losses(adapter, adapter.model, forget, 8192)),
        utility={"retain probability": Sample(kept, [e.cluster for e in retain])},
        relearn=curve,
    )


def test_the_verdict_on_real_models(
    six: World, forget: list[Example], suppressed: LanguageAdapter, curves: dict[str, list[RelearnPoint]]
) -> None:
    target = measured("target", six, six.target(), forget, [])
    retrained = measured("retrained", six, six.retrained(1), forget, curves["retrained"])
    assert judge(target, [retrained], target).verdict == Verdict.NOT_FORGOTTEN
    # The fixed schedule costs this small model some utility, which is not what is tested here.
    limits = Thresholds(utility=0.4)
    found = judge(measured("npo", six, suppressed, forget, curves["suppressed"]), [retrained], target, limits)
    assert found.verdict == Verdict.SUPPRESSED
    assert next(c for c in found.checks if c.name == "relearning").outcome == "knows more"
