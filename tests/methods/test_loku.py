"""The inverted hinge against its formula, and the LoRA that begins where the forget set matters (FILA)."""

from __future__ import annotations

import math

import pytest
import torch
from synthetic import CLASSES, Step, step
from torch import nn

from expunge.adapters.loading import load
from expunge.adapters.presets import build as preset
from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.engine import fila
from expunge.engine.gradients import batch_importance
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.parameters import Fila, Lora
from expunge.engine.reference import choose
from expunge.methods.catalogue import describe, serves
from expunge.methods.recipe import build
from expunge.methods.terms.hinge import InvertedHinge
from expunge.methods.terms.likelihood import GradientAscent

close = torch.testing.assert_close
QUIET = Engine(checkpoint_every=0)


# ---- the term


def test_the_hinge_is_its_definition_and_stays_between_0_and_2():
    made = step((3, 1, 5))
    values = []
    for item in made.items[Stream.FORGET]:
        for z, y in zip(item.logits.tolist(), item.targets.tolist(), strict=True):
            p = [math.exp(v) / sum(map(math.exp, z)) for v in z]
            values.append(1 + p[y] - max(p[:y] + p[y + 1 :]))
    assert made.mean(InvertedHinge()).item() == pytest.approx(sum(values) / len(values))
    for height, wanted in ((50.0, 2.0), (-50.0, None)):  # known by heart; forgotten
        for item in made.items[Stream.FORGET]:
            item.logits[torch.arange(len(item.targets)), item.targets] = height
        found = InvertedHinge().values(Step(made.items).views())
        assert (found >= 0).all()
        assert (found <= 2).all()
        if wanted is None:
            assert (found <= 1).all()
        else:
            close(found, torch.full_like(found, wanted))


def test_the_gradient_is_the_stated_one():
    made = step((4, 2))
    p = made.logits[Stream.FORGET].detach().softmax(-1)
    rows = torch.arange(len(p))
    true = torch.cat([i.targets for i in made.items[Stream.FORGET]])
    others = p.clone()
    others[rows, true] = 0
    rival = others.argmax(1)
    p_y, p_r = p[rows, true], p[rows, rival]
    want = p * (p_r - p_y)[:, None]
    want[rows, true] = p_y * (1 - p_y + p_r)
    want[rows, rival] = -p_r * (1 - p_r + p_y)
    close(made.gradient(InvertedHinge()) * len(p), want)


def test_a_step_raises_the_rival_and_spreads_less_than_ascent():
    """From a confident prediction both lower the true token by the same; ascent's distribution has the larger entropy."""
    z = torch.zeros(1, CLASSES, dtype=torch.float64)
    z[0, 3], z[0, 5] = 6.0, 2.0
    made = step((1,))
    item = made.items[Stream.FORGET][0]
    item.targets = torch.tensor([3])
    entropy, rivals = {}, {}
    for term in (InvertedHinge(), GradientAscent()):
        item.logits = z.clone()
        while float(item.logits.softmax(-1)[0, 3]) > 0.3:
            direction = Step(made.items).gradient(term)
            item.logits = item.logits - 0.1 * direction / direction.norm()
        p = item.logits.softmax(-1)
        entropy[term.name] = float(-(p * p.log()).sum())
        rivals[term.name] = float(p[0, 5])
    assert rivals["inverted-hinge"] > max(0.5, rivals["gradascent"])
    assert entropy["inverted-hinge"] < entropy["gradascent"] - 0.1


# ---- where the LoRA begins


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_factors_are_the_best_weighted_approximation(shape, monkeypatch):
    torch.manual_seed(1)
    weight, importance = torch.randn(shape), torch.rand(shape) + 0.1
    d = importance.sum(1).sqrt()
    a, b = fila.factors(weight, importance, 4, 2.0, 0)
    approximation = 2.0 * b @ a
    u, s, vh = torch.linalg.svd(d[:, None].double() * weight.double(), full_matrices=False)
    best = (u[:, :4] * s[:4] @ vh[:4]) / d[:, None]
    close(approximation, best.float(), rtol=1e-4, atol=1e-4)
    close(a @ a.T, torch.diag(s[:4].float() / 2), rtol=1e-4, atol=1e-4)  # A carries the square root of S / scale
    # Uniform importance: the plain truncated decomposition, which another weighting is not.
    plain = torch.linalg.svd(weight)
    uniform = fila.factors(weight, torch.ones(shape), 4, 2.0, 0)
    close(2.0 * uniform[1] @ uniform[0], plain[0][:, :4] * plain[1][:4] @ plain[2][:4], rtol=1e-4, atol=1e-4)
    assert (2.0 * uniform[1] @ uniform[0] - approximation).abs().max() > 1e-2
    # More than there is: the weight itself.
    a, b = fila.factors(weight, importance, 99, 2.0, 0)
    assert a.shape == (12, shape[1])
    close(2.0 * b @ a, weight, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(fila, "_EXACT", 0)  # large matrices
    for seed in (0, 1):
        random = fila.factors(weight, importance, 4, 2.0, seed)
        close(2.0 * random[1] @ random[0], approximation, rtol=1e-3, atol=1e-3)


def test_the_importance_weighs_batches_by_their_targets(people_world):
    adapter, examples = people_world.target(), people_world.examples[Stream.FORGET][:5]
    for name, parameter in adapter.model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    found = batch_importance(adapter, examples, batch=2, weigh="targets")
    total = sum(e.n_targets for e in examples)
    for name, parameter in adapter.model.named_parameters():
        if not parameter.requires_grad:
            assert name not in found
            continue
        want = torch.zeros_like(parameter)
        for held in (examples[:2], examples[2:4], examples[4:]):
            loss = adapter.forward(adapter.model, adapter.collate(held), frozenset({"losses"})).losses.mean()
            (g,) = torch.autograd.grad(loss, [parameter])
            want += g**2 * sum(e.n_targets for e in held) / total
        close(found[name], want, rtol=1e-4, atol=1e-10)
    retain = people_world.examples[Stream.RETAIN][:4]
    kept = batch_importance(adapter, retain, batch=2, weigh="targets")
    for name, value in fila.relative_importance(adapter, examples, retain, batch=2).items():
        close(value, found[name] / (1e-5 + kept[name]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
def test_the_function_is_unchanged_and_the_base_travels_with_the_adapter(people_world, tmp_path, name):
    adapter = people_world.fresh()
    adapter.model = preset(name, adapter.tokenizer, seed=2)
    examples = people_world.examples
    batch = adapter.collate(examples[Stream.FORGET][:6])

    def scores(held, model) -> torch.Tensor:
        with torch.no_grad():
            return held.forward(model, batch, frozenset({"logits"})).logits

    before = scores(adapter, adapter.model)
    weights = {n: p.detach().clone() for n, p in adapter.model.named_parameters()}
    wrapped = Fila(rank=4, alpha=8.0).begin(adapter, examples, QUIET, tmp_path)
    close(scores(adapter, wrapped), before, rtol=0, atol=1e-4)
    moving = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert moving
    assert all(".lora_A." in n or ".lora_B." in n for n in moving)
    adapted = 0
    for module_name, module in adapter.model.named_modules():
        if hasattr(module, "lora_A"):
            adapted += 1
            whole = module.base_layer.weight + module.get_delta_weight("default")
            close(whole, weights[f"{module_name}.weight"], rtol=0, atol=1e-5)
            assert module.get_delta_weight("default").abs().max() > 1e-3  # something was taken out
    assert adapted >= 8
    with wrapped.disable_adapter():
        assert (scores(adapter, wrapped) - before).abs().max() > 1e-2  # so the base alone is not the target
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    trained = scores(adapter, wrapped)
    adapter.save(tmp_path / "saved", wrapped)
    assert (tmp_path / "saved" / "base" / "model.safetensors").is_file()
    for merge in (True, False):
        again = load(tmp_path / "saved", merge=merge)
        close(scores(again, again.model), trained, rtol=0, atol=1e-4)
    again.save(tmp_path / "twice")  # one that was loaded with its own base keeps it
    final = load(tmp_path / "twice")
    close(scores(final, final.model), trained, rtol=0, atol=1e-4)
    again.save(tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged" / "base").exists()
    final = load(tmp_path / "merged")
    close(scores(final, final.model), trained, rtol=0, atol=1e-4)
    (tmp_path / "twice").rename(tmp_path / "moved")  # wherever the folder is
    final = load(tmp_path / "moved")
    close(scores(final, final.model), trained, rtol=0, atol=1e-4)


def test_a_terms_reference_is_the_target_and_not_the_base_without_the_adapter(people_world):
    recipe = build("loku", {"retain": "kl", "parameters": {"rank": 4}})
    assert choose(recipe, recipe.needs(("a", "b"))) == "copy"
    plain = build("loku", {"retain": "kl", "parameters": "lora"})
    assert choose(plain, plain.needs(("a", "b"))) == "adapter-off"
    with pytest.raises(InputError, match="adapter-off needs"):
        build("loku", {"retain": "kl", "reference": "adapter-off"})
    adapter = people_world.target()
    schedule = {"name": "fixed", "lr": 1e-5, "steps": 1, "batch": 8, "warmup": 0}
    outcome = train(adapter, build("loku", {"retain": "kl", "schedule": schedule}), people_world.examples, QUIET)
    assert outcome.history[0]["retain.kl"] < 1e-6


# ---- the method


def steps_to_forget(world, parameters) -> int:
    """Steps until the forget loss is half way to that of a model that never saw it."""
    adapter, examples = world.target(), world.examples
    schedule = {"name": "fixed", "lr": 1e-3, "steps": 40, "batch": 30, "warmup": 0, "decay": "constant", "weight_decay": 0.0}
    wanted = world.loss(world.retrained(), world.split.forget) / 2
    seen: list[float] = []

    def observe(_: int, model: nn.Module) -> None:
        if not seen or max(seen) < wanted:
            seen.append(world.loss(adapter, world.split.forget, model))

    train(adapter, build("loku", {"parameters": parameters, "schedule": schedule}), examples, QUIET, observe=observe)
    return len(seen)


def test_it_forgets_in_fewer_steps_than_from_a_fresh_lora(people_world):
    first = steps_to_forget(people_world, {"name": "fila", "rank": 4, "alpha": 8.0})
    fresh = steps_to_forget(people_world, {"name": "lora", "rank": 4, "alpha": 8.0})
    assert first <= 0.8 * fresh, (first, fresh)


def test_what_a_lora_cannot_adapt_is_said(people_world):
    adapter = people_world.fresh()
    with pytest.raises(InputError, match="no module 'query' that LoRA could adapt") as caught:
        Lora(modules=("query",)).prepare(adapter.model, adapter.layers())
    assert "q_proj" in str(caught.value)
    with pytest.raises(InputError, match="no linear module that LoRA could adapt; its weights are in Conv2d"):
        Lora().prepare(nn.Sequential(nn.Conv2d(1, 2, 3)), [])
    with pytest.raises(InputError, match=r"Name the modules; this model has 0: parameters.modules=\[0\]"):
        Lora().prepare(nn.Sequential(nn.Linear(1, 2)), [])
    with pytest.raises(InputError, match=r"The weight of 'lm_head' is that of 'model\.embed_tokens' too"):
        train(adapter, build("loku", {"parameters": {"modules": ["lm_head"]}}), people_world.examples, QUIET)
    adapter = people_world.fresh()
    forget = {Stream.FORGET: people_world.examples[Stream.FORGET]}
    with pytest.raises(InputError, match="parameters=fila reads retain examples"):
        train(adapter, build("loku", {"retain": "none"}), forget, QUIET)


def test_the_published_setting():
    made = build("loku", {"schedule": "paper"})
    assert made.parameters == Fila(rank=32, alpha=64.0)
    assert (made.schedule.lr, made.schedule.epochs, made.schedule.batch, made.schedule.weight_decay) == (1e-4, 5, 32, 0.01)
    assert describe("loku").wants == ("retain",)
    assert Of.REFERENCE not in made.models(("a",))
    assert not serves("loku", frozenset({"losses", "logits"}))[0]  # rows are not saved with adapters


def test_a_run_that_was_stopped_goes_on_from_the_same_split(people_world, tmp_path):
    schedule = {"name": "fixed", "lr": 1e-3, "steps": 4, "batch": 8, "warmup": 0}
    recipe, engine = build("loku", {"schedule": schedule, "parameters": {"rank": 4}}), Engine(checkpoint_every=2)

    def stop(step: int, _: nn.Module) -> None:
        if step == 3:
            raise KeyboardInterrupt

    whole = train(people_world.target(), recipe, people_world.examples, engine, folder=tmp_path / "whole").model.state_dict()
    with pytest.raises(KeyboardInterrupt):
        train(people_world.target(), recipe, people_world.examples, engine, folder=tmp_path / "run", observe=stop)
    outcome = train(people_world.target(), recipe, people_world.examples, engine, folder=tmp_path / "run", resume=True)
    for key, value in outcome.model.state_dict().items():
        close(value, whole[key], rtol=1e-5, atol=1e-6)
