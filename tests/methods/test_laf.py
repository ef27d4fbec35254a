"""Label-agnostic forgetting on handwritten digits: it forgets, reads no label, and each of its two losses does its part."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.digits import QUIET, accuracy, encoded
from tests.methods.synthetic import step
from torch import nn

from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.preparation import run_preparation
from expunge.engine.schedule import Alternate
from expunge.methods.compose import compose
from expunge.methods.preparations.autoencoders import Autoencoder, Autoencoders
from expunge.methods.recipe import build
from expunge.methods.registry import METHODS
from expunge.methods.terms.unlabelled import LafKeep, LafLeave, LafPart, LafStay

GROUPS = (("laf-leave", "laf-keep"), ("laf-part", "laf-stay"))
FAST = {"lr": 3e-3, "steps": 200, "rates": [1, 1]}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def all_four(digits, adapter) -> list[float]:
    """Accuracy on forget rows, unseen rows of their class, retain rows, unseen others."""
    (forget, retain), (unseen_forget, unseen_retain) = digits.split(), digits.split(1)
    return [accuracy(adapter, rows) for rows in (forget, unseen_forget, retain, unseen_retain)]


def unlabelled(digits, adapter) -> dict[Stream, list]:
    return {s: e for s, e in digits.examples(adapter).items() if s is not Stream.ALTERNATIVE}


def test_it_forgets_a_class_and_leaves_the_last_layer_alone(digits) -> None:
    adapter, before = digits.target(), digits.target()
    train(adapter, build("laf", {"schedule": FAST, "tau": 5}), unlabelled(digits, adapter), QUIET)
    found = all_four(digits, adapter)
    assert max(found[:2]) < 0.4
    assert found[2] > 0.93
    assert found[3] > 0.88
    assert torch.equal(adapter.model[2].weight, before.model[2].weight)
    assert torch.equal(adapter.model[2].bias, before.model[2].bias)
    assert not torch.equal(adapter.model[0].weight, before.model[0].weight)
    forget, retain = digits.split()
    assert cosine(adapter, before, retain) > 0.9
    assert cosine(adapter, before, forget) < 0.6


def cosine(one, other, rows) -> float:
    batch = one.collate(encoded(one, rows))
    with torch.no_grad():
        a, b = (m.forward(m.model, batch, frozenset({"features:2"})).features("2") for m in (one, other))
    return float(torch.cosine_similarity(a, b, dim=1).mean())


def test_no_label_is_read(digits) -> None:
    """Every label of both sides replaced by garbage: the same weights, bit for bit."""
    found = []
    for garbage in (False, True):
        adapter = digits.target()
        rng = np.random.default_rng(0)
        examples = {
            s: [replace(e, data=(e.data[0], int(rng.integers(10)))) if garbage else e for e in held]
            for s, held in unlabelled(digits, adapter).items()
        }
        train(adapter, build("laf", {"schedule": {**FAST, "steps": 60}}), examples, QUIET)
        found.append(weights(adapter.model))
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())


class Swapped(LafLeave):
    """Drives forget rows out of what the *other* autoencoder knows."""

    def values(self, views):
        views.made["autoencoders"] = {
            Stream.FORGET: views.made["autoencoders"][Stream.RETAIN],
            Stream.RETAIN: views.made["autoencoders"][Stream.FORGET],
        }
        return super().values(views)


def alone(digits, forget, retain, preparation=None) -> list[float]:
    adapter = digits.target()
    schedule = Alternate(groups=((forget.name, retain.name),), lr=3e-3, steps=200, batch=32, weight_decay=0, clip=None)
    recipe = compose(forget=[forget], retain=[retain], preparation=preparation, schedule=schedule)
    train(adapter, recipe, unlabelled(digits, adapter), QUIET)
    return all_four(digits, adapter)


def test_the_first_loss_alone_needs_its_autoencoders_the_right_way_round(digits) -> None:
    right = alone(digits, LafLeave(), LafKeep(), Autoencoders())
    wrong = alone(digits, Swapped(), LafKeep(), Autoencoders())
    assert max(right[:2]) < 0.6
    assert max(wrong[2:]) < 0.2
    assert min(wrong[:2]) > 0.9
    assert min(right[2:]) > max(wrong[2:]) + 0.2


class Stayed(LafPart):
    """The alignment of the forget rows turned round."""

    def values(self, views):
        return -super().values(views)


class Moved(LafStay):
    """The alignment of the retain rows turned round."""

    def values(self, views):
        return -super().values(views)


def test_the_second_loss_alone_forgets_and_turned_round_ruins(digits) -> None:
    right = alone(digits, LafPart(tau=5), LafStay())
    wrong = alone(digits, Stayed(tau=5), Moved())
    assert max(right[:2]) < 0.2
    assert min(right[2:]) > 0.88
    assert max(wrong[2:]) < 0.3
    assert min(wrong[:2]) > 0.6


def test_its_terms_are_the_published_formulas() -> None:
    made = step((3, 1, 5), (2, 4))
    views = made.views()
    block = "block3"
    e, o, kept, kept_o = (
        views[s, of].features(block).float() for s in (Stream.FORGET, Stream.RETAIN) for of in (Of.CURRENT, Of.REFERENCE)
    )
    away, stay = 1 - torch.cosine_similarity(e, o), 1 - torch.cosine_similarity(kept, kept_o)
    want = (stay.exp() / (away / 5).exp().sum()).log().mean()
    torch.testing.assert_close(made.mean(LafPart(tau=5)) + made.mean(LafStay()), want.float())
    for term, features in ((LafKeep(), kept), (LafLeave(), e)):
        h = views.made["autoencoders"][term.stream]
        m = (h(features) - features).square().sum(1)
        sign = 1 if isinstance(term, LafKeep) else -1
        torch.testing.assert_close(term.values(views), sign * torch.exp(m / (m + 1)))


def test_an_autoencoder_knows_what_it_was_trained_on(digits) -> None:
    adapter = digits.target()
    examples = unlabelled(digits, adapter)
    made = run_preparation(Autoencoders(latent=8, epochs=20), adapter, examples, QUIET, scratch=None).made["autoencoders"]
    again = run_preparation(Autoencoders(latent=8, epochs=20), adapter, examples, QUIET, scratch=None).made["autoencoders"]
    errors = {}
    for stream, held in examples.items():
        batch = adapter.collate(held)
        with torch.no_grad():
            features = adapter.forward(adapter.model, batch, frozenset({"features:2"})).features("2")
            for which, model in made.items():
                errors[which, stream] = float(model.error(features).mean())
                assert torch.equal(model(features), again[which](features))
    assert errors[Stream.RETAIN, Stream.RETAIN] < 0.7 * errors[Stream.FORGET, Stream.RETAIN]
    assert all(p.requires_grad for p in adapter.model.parameters())
    assert not any(p.requires_grad for m in made.values() for p in m.parameters())


def test_a_sigmoid_cannot_reach_large_features() -> None:
    features = torch.full((4, 3), 5.0)
    assert Autoencoder(3, 2, "sigmoid").error(features).min() > 3 * 16
    batch = torch.randn(20, 3)
    model = Autoencoder(3, 2, "linear")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = model.loss(batch, 0.0)
        torch.manual_seed(0)
        assert model.loss(batch, 1.0) > plain  # the divergence is not negative


def test_a_step_must_fit_into_one_pass(digits) -> None:
    adapter = digits.target()
    engine = Engine(checkpoint_every=0, max_tokens=64)
    recipe = build("laf", {"schedule": {**FAST, "batch": 60, "steps": 1}})
    with pytest.raises(InputError, match=r"all examples of a step in one forward pass.*max_tokens=120"):
        train(adapter, recipe, unlabelled(digits, adapter), engine)


@pytest.mark.parametrize(
    ("groups", "rates", "said"),
    [
        ([["laf-leave", "laf-keep"], ["laf-part"]], [1, 1], "names 'laf-stay' 0 times"),
        ([["laf-leave", "laf-keep", "nll"], ["laf-part", "laf-stay"]], [1, 1], "names 'nll' 1 times"),
        ([*GROUPS, ["laf-part"]], [1, 1, 1], "names 'laf-part' 2 times"),
        (GROUPS, [1], "has 2 groups and the rates"),
    ],
)
def test_groups_that_do_not_fit_are_refused(digits, groups, rates, said) -> None:
    adapter = digits.target()
    with pytest.raises(InputError, match=said):
        train(adapter, build("laf", {"schedule": {"groups": groups, "rates": rates}}), unlabelled(digits, adapter), QUIET)


def test_groups_take_separate_steps_with_separate_memories_and_survive_a_kill(digits, tmp_path) -> None:
    recipe = build("laf", {"schedule": {**FAST, "steps": 12, "rates": [1, 2]}})
    engine = Engine(checkpoint_every=4)

    class Killed(Exception):
        pass

    def kill(number: int, model: nn.Module) -> None:
        if number == 10:
            raise Killed

    whole, part, again, joint = (digits.target() for _ in range(4))
    outcome = train(whole, recipe, unlabelled(digits, whole), engine, folder=tmp_path / "whole")
    assert set(outcome.history[0]) >= {"forget.laf-leave", "forget.laf-part", "retain.laf-keep", "retain.laf-stay"}
    with pytest.raises(Killed):
        train(part, recipe, unlabelled(digits, part), engine, folder=tmp_path / "part", observe=kill)
    train(again, recipe, unlabelled(digits, again), engine, folder=tmp_path / "part", resume=True)
    assert all(torch.equal(v, weights(again.model)[k]) for k, v in weights(whole.model).items())
    together = {**FAST, "steps": 12, "groups": [[n for g in GROUPS for n in g]], "rates": [1]}
    train(joint, build("laf", {"schedule": together}), unlabelled(digits, joint), engine)
    assert not torch.allclose(joint.model[0].weight, whole.model[0].weight, atol=1e-3)
    assert METHODS.get("laf").wants == ("retain",)
