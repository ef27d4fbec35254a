"""Directions learnt and taken out for good: on people that a tiny Llama knows, through the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import expunge
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.loading import load
from expunge.adapters.projection import installed, without
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.engine.covariance import state_moments
from expunge.engine.goal import Goal
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.parameters import PARAMETERS
from expunge.engine.projection import ProjectedStates, directions
from expunge.methods.recipe import build, from_spec

QUIET = Engine(checkpoint_every=0)
FAST = {
    "name": "fixed", "lr": 0.0125, "steps": 60, "epochs": None, "batch": 8, "warmup": 0, "decay": "constant", "weight_decay": 0,
}  # fmt: skip


def exact(adapter: LanguageAdapter, records) -> float:
    """Share of records whose every target is the argmax."""
    batch = adapter.collate([adapter.encode(r) for r in records])
    with torch.no_grad():
        wrong = adapter.forward(adapter.model, batch, frozenset({"logits"})).logits.argmax(-1) != batch.targets
    return float((torch.zeros(len(records)).index_add(0, batch.owner, wrong.float()) == 0).float().mean())


def run(adapter: LanguageAdapter, gone, kept, **overrides):
    held = {Stream.FORGET: [adapter.encode(r) for r in gone], Stream.RETAIN: [adapter.encode(r) for r in kept]}
    return train(adapter, build("mrp", {"schedule": FAST, **overrides}), held, QUIET)


@pytest.fixture(scope="module")
def unlearned(people_world) -> LanguageAdapter:
    adapter = people_world.target()
    outcome = train(adapter, build("mrp", {"schedule": FAST}), people_world.examples, QUIET)
    assert outcome.model is adapter.model
    return adapter


def test_it_forgets_and_keeps_and_leaves_the_weights(people_world, unlearned) -> None:
    """The card's (iii)."""
    split, before = people_world.split, people_world.target()
    assert exact(before, split.forget) == 1.0
    assert exact(unlearned, split.forget) < 0.2
    assert exact(unlearned, split.retain) > exact(before, split.retain) - 0.1
    assert people_world.loss(unlearned, split.forget) > 1.5
    assert people_world.loss(unlearned, split.retain) < 0.1
    said = unlearned.generate(unlearned.model, [unlearned.encode(r) for r in split.forget], 16)
    assert sum(g.text == r.answer for g, r in zip(said, split.forget, strict=True)) <= 0.2 * len(said)
    state = unlearned.model.state_dict()
    assert all(torch.equal(v, state[n]) for n, v in before.model.state_dict().items())
    assert not [n for n, _ in unlearned.model.named_parameters() if "projection" in n]  # nothing that training could move
    held = installed(unlearned.model)
    assert list(held) == unlearned.layers()
    for name, projection in held.items():
        torch.testing.assert_close(projection.basis @ projection.basis.T, torch.eye(2), atol=1e-5, rtol=0)
        batch = unlearned.collate([unlearned.encode(r) for r in split.forget])
        with torch.no_grad():
            states = unlearned.forward(unlearned.model, batch, frozenset({f"features:{name}"})).features(name)
        assert (states @ projection.basis.T).abs().max() < 1e-5 * states.norm(dim=1).max()


def test_a_second_request_keeps_the_first_without_its_data(people_world, unlearned) -> None:
    """The card's (iv)."""
    split = people_world.split
    first = people_world.loss(unlearned, split.forget)
    more = sorted({r.subject for r in split.retain if r.subject})[:3]
    second = [r for r in split.retain if r.subject in more]
    rest = [r for r in split.retain if r.subject not in more]
    adapter = unlearned.copy()
    assert exact(adapter, second) > 0.8
    run(adapter, second, rest)
    assert exact(adapter, second) < 0.2
    assert exact(adapter, split.forget) < 0.2
    assert people_world.loss(adapter, split.forget) > 0.8 * first
    assert exact(adapter, rest) > 0.8
    for name, projection in installed(adapter.model).items():
        earlier = installed(unlearned.model)[name].basis
        assert projection.basis.shape == (4, 64)
        torch.testing.assert_close(without(earlier, projection.basis), torch.zeros(2, 64), atol=1e-5, rtol=0)


def relearnt(people_world, adapter: LanguageAdapter, half, other) -> float:
    """Loss on the other half after a few steps on one half of what lies below the last projection."""
    adapter = adapter.copy()
    below = {"name": "named", "patterns": [r"^model\.(embed_tokens|layers)\."]}
    recipe = build("finetune", {"schedule": {**FAST, "lr": 1e-3, "steps": 20}, "parameters": below})
    train(adapter, recipe, {Stream.RETAIN: [adapter.encode(r) for r in half]}, QUIET)
    assert people_world.loss(adapter, half) < 1
    return people_world.loss(adapter, other)


class _Enough(Exception):
    pass


def test_relearning_below_brings_less_back_than_after_ascent(people_world, unlearned) -> None:
    """The card's (v), at equal loss of what is not trained on."""
    split = people_world.split
    name = split.forget[0].subject
    half, other = ([r for r in split.forget if (r.subject == name) == same] for same in (True, False))
    reached = people_world.loss(unlearned, other)
    ascended = people_world.target()

    def stop(_step: int, _model) -> None:
        if people_world.loss(ascended, other) >= reached:
            raise _Enough

    recipe = build("graddiff", {"schedule": {**FAST, "lr": 4e-4, "steps": 200}})
    with pytest.raises(_Enough):
        train(ascended, recipe, people_world.examples, QUIET, observe=stop)
    after = {key: relearnt(people_world, held, half, other) for key, held in (("mrp", unlearned), ("ga", ascended))}
    assert reached - after["mrp"] < 0.6 * (reached - after["ga"])


def test_the_start_is_what_is_strong_in_one_set_outside_of_the_other() -> None:
    generator = torch.Generator().manual_seed(3)
    shared, own = (torch.linalg.qr(torch.randn(12, n, generator=generator, dtype=torch.float64))[0].T for n in (4, 2))
    own = without(own, shared)
    kept = torch.randn(300, 4, generator=generator, dtype=torch.float64) @ shared
    wanted = 5 * torch.randn(200, 4, generator=generator, dtype=torch.float64) @ shared
    wanted += torch.randn(200, 2, generator=generator, dtype=torch.float64) @ own
    moments = [h.T @ h / len(h) for h in (wanted, kept)]
    found = directions(*moments, 2, 0.9999)
    torch.testing.assert_close(found @ found.T, torch.eye(2, dtype=torch.float64))
    assert without(found, torch.linalg.qr(own.T)[0].T).abs().max() < 1e-6  # though the others are stronger
    # brute force: singular vectors of H_f (1 - P_r)
    p = torch.eye(12, dtype=torch.float64) - shared.T @ shared
    expected = torch.linalg.svd(wanted @ p)[2][:2]
    torch.testing.assert_close((found @ expected.T).abs(), torch.eye(2, dtype=torch.float64), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="have 2 directions outside those of the retain set, and 3 are to be taken out"):
        directions(*moments, 3, 0.9999)
    # at a smaller share of energy only the strongest kept directions are spared
    lopsided = torch.diag(torch.tensor([1.0, 100.0, 1.0, 1.0], dtype=torch.float64))
    first = directions(torch.diag(torch.tensor([1.0, 9.0, 0.0, 4.0], dtype=torch.float64)), lopsided, 1, 0.9)
    torch.testing.assert_close(first.abs(), torch.tensor([[0, 0, 0, 1.0]], dtype=torch.float64))


def test_moments_are_those_of_all_states_and_none_is_kept(people_world) -> None:
    adapter = people_world.target()
    examples = people_world.examples[Stream.FORGET]
    layers = adapter.layers()
    found = state_moments(adapter, layers, examples, width=64, max_units=300)
    batch = adapter.collate(examples)
    with torch.no_grad():
        whole = adapter.forward(adapter.model, batch, frozenset(f"features:{n}" for n in layers))
    for name in layers:
        states = whole.features(name).double()
        torch.testing.assert_close(found[name].total, states.T @ states, rtol=1e-5, atol=1e-4)
        assert found[name].count == len(states)


def test_the_published_setting_and_the_order_of_the_code(people_world) -> None:
    recipe = build("mrp", {"schedule": "paper"})
    assert from_spec(recipe.spec()) == recipe
    schedule = recipe.schedule
    assert (schedule.lr, schedule.epochs, schedule.batch, schedule.optimizer, schedule.momentum) == (2e-4, 2, 5, "sgd", 0)
    assert (recipe.parameters.choice, recipe.parameters.rank, recipe.retain[0].weight) == ("random", 2, 1.2)
    forget, retain = people_world.split.forget, people_world.split.retain
    ends = {}
    for start in ("forget", "official"):
        adapter = people_world.target()
        run(adapter, forget, retain, parameters={"start": start}, schedule={**FAST, "steps": 30})
        ends[start] = people_world.loss(adapter, forget), people_world.loss(adapter, retain)
    assert ends["forget"][0] > 3 * ends["official"][0]
    assert ends["forget"][1] < ends["official"][1] + 0.05


def test_from_python_the_model_that_was_given_is_changed_and_saves_itself(people_world, tmp_path: Path) -> None:
    adapter, split = people_world.target(), people_world.split
    done = expunge.unlearn(
        adapter.model, adapter.tokenizer, split.forget, split.retain, method="mrp", schedule={**FAST, "steps": 2}
    )
    assert done.model is adapter.model
    adapter.model.save_pretrained(tmp_path)
    adapter.tokenizer.save_pretrained(tmp_path)
    back = load(tmp_path)
    assert back.fingerprint() == adapter.fingerprint() != people_world.target().fingerprint()


def test_without_the_minus_it_does_not_forget(people_world) -> None:
    adapter = people_world.target()
    run(adapter, people_world.split.forget, people_world.split.retain, forget="none", retain={"weight": 1.2})
    assert exact(adapter, people_world.split.forget) > 0.5


def test_a_killed_run_goes_on_to_the_same_directions(people_world, tmp_path: Path) -> None:
    recipe = build("mrp", {"schedule": {**FAST, "steps": 12}})
    whole = people_world.target()
    train(whole, recipe, people_world.examples, QUIET)
    engine = Engine(checkpoint_every=5)

    def stop(step: int, _model) -> None:
        if step == 8:
            raise _Enough

    with pytest.raises(_Enough):
        train(people_world.target(), recipe, people_world.examples, engine, folder=tmp_path, observe=stop)
    parts = people_world.target()
    train(parts, recipe, people_world.examples, engine, folder=tmp_path, resume=True)
    for name, projection in installed(whole.model).items():
        assert torch.equal(projection.basis, installed(parts.model)[name].basis)


def test_the_bound_is_counted_from_the_target_and_not_from_the_first_directions(people_world) -> None:
    """Thirty directions after both blocks take nearly everything out before the first step."""
    adapter = people_world.target()
    goal = Goal(loss=1.0, source="holdout", examples=30)
    recipe = build("mrp", {"parameters": {"rank": 30}, "schedule": {"lr": 1e-3, "steps": 5, "epochs": 0.1}})
    outcome = train(adapter, recipe, people_world.examples, QUIET, goal=goal)
    assert outcome.reason == "utility"
    assert "began past its bound and did not come back" in outcome.sentence
    assert outcome.steps == 5
    fewer = people_world.target()
    recipe = build("mrp", {"parameters": {"rank": 6}, "schedule": {"lr": 0.0125, "steps": 60, "epochs": 1}})
    outcome = train(fewer, recipe, people_world.examples, QUIET, goal=goal)
    assert outcome.reason == "goal"
    assert outcome.retain_loss < people_world.loss(people_world.target(), people_world.split.retain) + 0.1


NAMES = tuple(f"block{i}" for i in range(32))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (15, 16)),
        ({"count": 3}, (14, 15, 16)),
        ({"layers": (-1, 4)}, (4, 31)),
        ({"layers": (3, 3)}, (3,)),
    ],
)
def test_blocks(settings, expected) -> None:
    assert ProjectedStates(**settings).blocks(NAMES) == [NAMES[i] for i in expected]


def test_blocks_at_random_are_drawn_by_the_seed_and_never_the_last() -> None:
    drawn = [tuple(ProjectedStates(choice="random", seed=s).blocks(NAMES)) for s in range(40)]
    assert drawn[3] == tuple(ProjectedStates(choice="random", seed=3).blocks(NAMES))
    assert len(set(drawn)) > 20
    assert not any(NAMES[-1] in d for d in drawn)
    assert all(len(set(d)) == 2 for d in drawn)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"layers": [2]}, r"Layer 2 is out of range: the model has 2 blocks\. Use -2 to 1\."),
        ({"count": 3}, r"after 3 blocks; parameters.choice=middle has 2 to offer"),
        ({"choice": "random"}, r"after 2 blocks; parameters.choice=random has 1 to offer"),
        ({"rank": 64}, r"64 directions are to be taken out after 'model.layers.0', where states are 64 wide: nothing"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(people_world, parameters, said) -> None:
    adapter = people_world.target()
    with pytest.raises(InputError, match=said):
        train(adapter, build("mrp", {"parameters": parameters}), people_world.examples, QUIET)
    assert not installed(adapter.model)


def test_earlier_directions_count(people_world, unlearned) -> None:
    adapter = unlearned.copy()
    with pytest.raises(InputError, match=r"62 directions beside the 2 of earlier requests .* Give parameters.rank below 62"):
        train(adapter, build("mrp", {"rank": 62}), people_world.examples, QUIET)


def test_moments_larger_than_memory_are_refused_in_a_sentence(people_world, monkeypatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", type("Free", (), {"available": 2**17}))
    adapter = people_world.target()
    with pytest.raises(
        InputError, match=r"parameters=projection holds a 64 x 64 matrix for each of 4 moments of states: .* Choose fewer blocks"
    ):
        PARAMETERS.get("projection")().begin(adapter, people_world.examples, QUIET, Path("nowhere"))


def test_parts_that_make_no_sense_with_it_are_refused(people_world) -> None:
    with pytest.raises(InputError, match=r"finish=negate turns around what weights have learnt"):
        build("task-vector", {"parameters": "projection", "finish": {"scale": 1}})
    peft = pytest.importorskip("peft")
    adapter = people_world.target()
    adapter.model = peft.get_peft_model(adapter.model, peft.LoraConfig(r=2, target_modules=["down_proj"]))
    with pytest.raises(InputError, match=r"taken out of a plain model, and this is a PeftModel"):
        train(adapter, build("mrp"), people_world.examples, QUIET)
