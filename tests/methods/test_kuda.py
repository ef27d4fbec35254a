"""Causal tracing, null-space gradients and states that turn away, on a model of which it is known where names are looked up."""

from __future__ import annotations

import pytest
import torch
from tests.methods.synthetic import at_reference, step

pytest.importorskip("transformers")

from tests.methods.planted import NAMES, QUIET, facts

from expunge.adapters.places import find_place
from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.engine.covariance import flat_rows, watched
from expunge.engine.loop import train
from expunge.engine.preparation import Prepared
from expunge.engine.tracing import Subject, Trace, trace
from expunge.methods.recipe import build
from expunge.methods.terms.features import Deviation

SGD = {"name": "fixed", "optimizer": "sgd", "weight_decay": 0, "warmup": 0, "batch": 6, "retain_batch": 30}
GIVEN = {"preparation": "none", "layer": 1, "width": 2}
REST = [r for n in NAMES[1:] for r in facts(n)]


def subjects(adapter, names=NAMES) -> list[Subject]:
    found = []
    for name in names:
        for record in facts(name):
            place = find_place(adapter, adapter.encode(record), name)
            found.append(Subject(place.example, tuple(range(place.first, place.last + 1))))
    return found


def states(adapter, examples, layer: int) -> torch.Tensor:
    block = adapter.layers()[layer]
    batch = adapter.collate(examples)
    with torch.no_grad():
        return adapter.forward(adapter.model, batch, frozenset({f"features:{block}"})).features(block)


def cosines(before, after, examples, layer: int = 1) -> torch.Tensor:
    return torch.cosine_similarity(states(before, examples, layer), states(after, examples, layer), dim=1)


def at_names(examples, adapter) -> list[int]:
    found, start = [], 0
    for e in examples:
        found.append(start + find_place(adapter, e, e.cluster).last)
        start += e.size
    return found


# ---- causal tracing


def test_the_trace_peaks_at_the_subject_in_the_first_blocks_and_ends_with_the_read_out(planted) -> None:
    adapter = planted.target()
    before = {k: v.clone() for k, v in adapter.model.state_dict().items()}
    found = trace(adapter, subjects(adapter), repeats=2)
    assert found.clean > 0.9
    assert found.corrupted < found.clean - 0.2
    effects = found.effects()
    assert effects[0] > 0.02
    assert effects[0] == effects.max()
    assert abs(float(effects[-1])) < 1e-6  # nothing behind the last block reads what stands at the subject
    assert found.effects("last").abs().max() < 0.1 * effects[0]
    assert found.window(1) == (0, 0)
    assert all(torch.equal(v, before[k]) for k, v in adapter.model.state_dict().items())


def test_the_trace_is_that_of_one_example_at_a_time_by_hand(planted) -> None:
    """The model's own forward pass, without batches: noise on the embeddings, then one MLP's output put back."""
    adapter = planted.target()
    chosen = subjects(adapter, ("Ada", "Dan"))[::2]
    found = trace(adapter, chosen, seed=3, max_units=64)
    batched = trace(adapter, chosen, seed=3, max_units=10_000)
    torch.testing.assert_close(found.effects(), batched.effects(), atol=1e-5, rtol=1e-3)
    embed, mlp = adapter.model.model.embed_tokens, adapter.model.model.layers[0].mlp.down_proj
    ids = torch.cat([torch.as_tensor(s.example.data.ids)[list(s.tokens)].long() for s in chosen])
    size = 3.0 * float(embed.weight[ids].detach().std())
    corrupted = restored = 0.0
    for number, s in enumerate(chosen):
        tokens = torch.as_tensor(s.example.data.ids).long()[None]
        g = torch.Generator().manual_seed(1_000_003 * 3 + 1009 * number)
        noise = torch.randn(len(s.tokens), 64, generator=g) * size
        at = list(s.tokens)

        def probability(keep=None, tokens=tokens, at=at, noise=noise, start=s.example.data.start) -> float:
            def spoil(_m, _i, out):
                out = out.clone()
                out[0, at] += noise
                return out

            def put(_m, _i, out):
                out = out.clone()
                out[0, at] = keep
                return out

            handles = [embed.register_forward_hook(spoil)] + ([mlp.register_forward_hook(put)] if keep is not None else [])
            with torch.no_grad():
                logits = adapter.model(input_ids=tokens).logits[0].log_softmax(-1)
            for h in handles:
                h.remove()
            own = logits[:-1].gather(1, tokens[0, 1:, None]).squeeze(1)[start - 1 :]
            return float(own.mean().exp())

        clean: list[torch.Tensor] = []
        handle = mlp.register_forward_hook(lambda _m, _i, out, at=at, clean=clean: clean.append(out[0, at].clone()))
        with torch.no_grad():
            adapter.model(input_ids=tokens)
        handle.remove()
        corrupted += probability() / len(chosen)
        restored += probability(clean[0]) / len(chosen)
    assert found.corrupted == pytest.approx(corrupted, abs=1e-4)
    assert float(found.restored["subject"][0]) == pytest.approx(restored, abs=1e-4)


def test_without_noise_there_is_nothing_to_restore(planted) -> None:
    adapter = planted.target()
    found = trace(adapter, subjects(adapter, ("Eve",)), noise=0.0)
    assert found.corrupted == pytest.approx(found.clean)
    assert found.effects().abs().max() < 1e-6
    with pytest.raises(InputError, match="needs tokens to corrupt"):
        trace(adapter, [Subject(adapter.encode(facts("Eve")[0]), ())])
    with pytest.raises(InputError, match=r"0 linear weights of 'model\.layers\.0'"):
        trace(adapter, subjects(adapter, ("Eve",)), module="fc9")


def test_the_window_has_the_largest_sum_of_effects() -> None:
    effects = torch.tensor([0.1, 0.0, 0.3, 0.2, 0.2, 0.0])
    found = Trace(1.0, 0.25, {"subject": effects + 0.25, "last": effects.flip(0) + 0.25})
    assert found.window(1) == (2, 2)
    assert found.window(3) == (2, 4)
    assert found.window(3, "last") == (1, 3)
    assert found.window(99) == (0, 5)


# ---- the term


def test_at_the_start_the_cosine_has_no_gradient_and_the_nudge_makes_one() -> None:
    made = at_reference(step())
    term = Deviation(layer=1)

    def gradient(t: Deviation) -> torch.Tensor:
        (found,) = torch.autograd.grad(made.mean(t), made.states[Stream.FORGET])
        return found

    assert gradient(term).norm() > 10 * gradient(Deviation(layer=1, nudge=1e-6)).norm()
    start = made.states[Stream.FORGET].detach().clone()
    moved = start - 0.05 * gradient(term) / gradient(term).norm() * start.norm()
    assert torch.cosine_similarity(moved, start, dim=1).mean() < 0.9999


@pytest.mark.parametrize("form", ["sigmoid", "cosine"])
def test_the_deviation_has_its_closed_form_and_is_a_mean_over_tokens_of_unequal_sequences(form) -> None:
    made = step((3, 1, 5), (2, 4))
    h = made.states[Stream.FORGET].detach().float()
    before = torch.cat([i.reference_states for i in made.items[Stream.FORGET]]).float()
    u = torch.randn(6, generator=torch.Generator().manual_seed(2))
    pushed = h + 0.1 * h.norm(dim=1, keepdim=True) * u / u.norm()
    cosine = (pushed * before).sum(1) / (pushed.norm(dim=1) * before.norm(dim=1))
    expected = cosine if form == "cosine" else (2 / 1.5) * torch.log1p(torch.exp(-1.5 * (1 - cosine)))
    term = Deviation(layer=0, form=form, beta=1.5, nudge=0.1, seed=2)
    torch.testing.assert_close(made.mean(term).float(), expected.sum() / (5 + 3 + 7))
    kept = torch.tensor([t >= 2 for n in (3, 1, 5) for t in range(n + 2)])
    only = term.model_copy(update={"tokens": "supervised"})
    torch.testing.assert_close(made.mean(only).float(), expected[kept].sum() / 9)


# ---- the gradient rule


def shift(planted, gradient, steps: int = 8) -> tuple[float, float]:
    """By how much steps of the forget term alone change the outputs of the moved matrices: on retain and on forget inputs."""
    before, adapter = planted.target(), planted.target()
    examples = planted.examples()
    recipe = build("kuda", {
        "schedule": {**SGD, "lr": 1.0, "steps": steps, "momentum": 0.9, "decay": "constant"}, "gradient": gradient,
        "retain": {"weight": 1e-12}, **GIVEN,
    })  # fmt: skip
    train(adapter, recipe, examples, QUIET)
    names = [f"model.layers.{i}.mlp.{m}" for i in (0, 1) for m in ("gate_proj", "up_proj", "down_proj")]
    found = []
    for stream in (Stream.RETAIN, Stream.FORGET):
        batch = before.collate(examples[stream])
        with torch.no_grad(), watched(before.model, names) as seen:
            before.forward(before.model, batch, frozenset({"features:model.layers.2"}))
        moved = 0.0
        for name in names:
            change = (adapter.model.get_submodule(name).weight - before.model.get_submodule(name).weight).detach()
            moved = max(moved, float((flat_rows(batch, seen[name]) @ change.T).norm()))
        found.append(moved)
    return found[0], found[1]


def test_projected_steps_are_not_felt_on_retain_inputs_and_a_larger_share_moves_more_of_both(planted) -> None:
    plain = shift(planted, {"name": "null-space", "energy": 1.0})
    found = [shift(planted, {"name": "null-space", "energy": e}) for e in (0.0, 0.002, 0.05)]
    assert found[0][0] < 1e-3 * plain[0]
    for weaker, stronger in zip(found, [*found[1:], plain], strict=True):
        assert weaker[0] < stronger[0]
        assert weaker[1] < stronger[1]
    assert found[0][1] > 0


def test_the_whole_space_is_no_projection(planted) -> None:
    ends = []
    for gradient in ({"name": "null-space", "energy": 1.0}, "plain"):
        adapter = planted.target()
        schedule = {**SGD, "lr": 0.5, "steps": 3}
        train(adapter, build("kuda", {"schedule": schedule, "gradient": gradient, **GIVEN}), planted.examples(), QUIET)
        ends.append(adapter.model.state_dict())
    for key, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][key], atol=1e-5, rtol=1e-4)


def test_only_linear_weights_get_a_forget_gradient_and_adamw_is_named(planted) -> None:
    before, adapter = planted.target(), planted.target()
    schedule = {"name": "fixed", "lr": 1e-3, "steps": 2, "batch": 6, "weight_decay": 0, "warmup": 0}
    overrides = {"retain.weight": 1e-30, "gradient": {"name": "null-space", "energy": 0.05}, "schedule": schedule}
    outcome = train(adapter, build("graddiff", overrides), planted.examples(), QUIET)
    assert outcome.notes == [
        "gradient=null-space is exact under schedule.optimizer=sgd; AdamW scales entries and bends its steps."
    ]
    old = before.model.state_dict()
    for name, value in adapter.model.state_dict().items():
        if "norm" in name:
            torch.testing.assert_close(value, old[name], atol=1e-6, rtol=1e-6)
    assert not torch.equal(adapter.model.model.layers[1].mlp.up_proj.weight, old["model.layers.1.mlp.up_proj.weight"])
    wrong = build("graddiff", {**overrides, "parameters": {"name": "named", "patterns": ["norm"]}})
    with pytest.raises(InputError, match=r"projects weights of linear modules.*parameters=layer-window"):
        train(planted.target(), wrong, planted.examples(), QUIET)
    empty = {"name": "null-space", "threshold": 0.0}
    narrow = build("graddiff", {**overrides, "gradient": empty, "parameters": {"name": "named", "patterns": ["layers.2.*gate"]}})
    with pytest.raises(InputError, match="leaves no direction free in any of the 1 moving matrices"):
        train(planted.target(), narrow, planted.examples(), QUIET)


# ---- the method


def test_the_name_is_forgotten_and_retain_states_stay(planted) -> None:
    before, adapter = planted.target(), planted.target()
    examples = planted.examples()
    recipe = build("kuda", {"schedule": {**SGD, "lr": 1.0, "steps": 100}, "retain": {"weight": 3}})
    outcome = train(adapter, recipe, examples, QUIET)
    assert outcome.notes[0].startswith("Causal tracing chose the blocks 0 to 2")
    forget = cosines(before, adapter, examples[Stream.FORGET], 2)[at_names(examples[Stream.FORGET], before)]
    assert forget.mean() < 0.3
    assert cosines(before, adapter, examples[Stream.RETAIN], 2).mean() > 0.95
    assert planted.loss(adapter, facts("Ada")) > planted.loss(before, facts("Ada")) + 1
    assert planted.loss(adapter, REST) < planted.loss(before, REST) + 0.1
    new, old = adapter.model.state_dict(), before.model.state_dict()
    assert all(torch.equal(new[k], old[k]) for k in new if ".mlp." not in k)


def test_a_preparation_fills_what_is_open_and_nothing_else() -> None:
    recipe = build("kuda", {"forget": {"layer": 0}})
    settled = Prepared(chosen={"layer": 5}).settled(recipe)
    assert (settled.forget[0].layer, settled.retain[0].layer, settled.parameters.layer) == (0, 5, 5)
    assert settled.gradient == recipe.gradient
    assert Of.REFERENCE in settled.models([f"b{i}" for i in range(8)])
    with pytest.raises(InputError, match=r"preparation=causal-trace chooses layer, which no part of 'kuda' leaves open"):
        build("kuda", {"layer": 1})
    assert build("kuda", {"layer": 1, "preparation": "none"}).parameters.layer == 1
