"""Stable sequential unlearning: task vectors add up over requests, and are turned around together."""

from __future__ import annotations

import copy

import pytest
import torch

from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.engine.finish import Origin
from expunge.engine.loop import train
from expunge.engine.objective import Objective
from expunge.engine.options import Engine
from expunge.engine.outcome import Outcome
from expunge.methods.alternatives import encoded, several
from expunge.methods.compose import compose
from expunge.methods.evaluate import loss_on
from expunge.methods.recipe import build
from expunge.methods.terms.likelihood import ForgetNLL

FIXED = {"name": "fixed", "lr": 1e-3, "steps": 20, "batch": 10, "warmup": 0, "decay": "constant", "weight_decay": 0.01}
ONE = {"schedule": FIXED, "finish": {"scale": 1.0}}
BARE = {"forget": "forget-nll", "gradient": "plain"}  # no random passages, no mask


def requests(world) -> list[list[Record]]:
    """One person each."""
    people = sorted({r.cluster for r in world.split.forget})
    assert len(people) == 3
    return [[r for r in world.split.forget if r.cluster == name] for name in people]


def weights(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def ask(adapter, records, overrides=None, origin=None) -> Outcome:
    recipe = build("ssu", {**ONE, **(overrides or {})})
    examples = {Stream.FORGET: [adapter.encode(r) for r in records]}
    if Stream.ALTERNATIVE in recipe.streams(adapter.layers()):
        examples[Stream.ALTERNATIVE] = encoded(adapter, records, recipe, "auto")
    outcome = train(adapter, recipe, examples, Engine(), origin=origin)
    adapter.model = outcome.model
    return outcome


def right(adapter, records) -> float:
    """Share of records whose whole answer is the most likely at each of its tokens."""
    batch = adapter.collate([adapter.encode(r) for r in records])
    with torch.no_grad():
        out = adapter.forward(adapter.model, batch, frozenset({"logits"}))
    wrong = out.per_example((out.logits.argmax(1) != out.targets).float())
    return (wrong == 0).float().mean().item()


def test_one_request_without_mask_and_passages_is_task_vector_negation(people_world) -> None:
    """Bit for bit; and the whole method is something else."""
    records, ends = requests(people_world)[0], []
    for overrides in (BARE, {}):
        adapter = people_world.target()
        ask(adapter, records, {**overrides, "forget.reduction": "token"} if overrides else {})
        ends.append(weights(adapter.model))
    twin = people_world.target()
    recipe = build("task-vector", ONE)
    train(twin, recipe, {Stream.FORGET: [twin.encode(r) for r in records]}, Engine())
    assert all(torch.equal(ends[0][n], p) for n, p in weights(twin.model).items())
    assert any(not torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_task_vectors_add_up_step_by_step(people_world, scale) -> None:
    """Against a model that is taught one request after the other, by hand, and turned around after each."""
    adapter, taught = people_world.fresh(seed=5), people_world.fresh(seed=5)
    first, origin = weights(adapter.model), None
    plain = {**FIXED, "optimizer": "sgd", "lr": 0.05, "steps": 8}  # Adam would enlarge rounding where a gradient is nearly 0
    recipe = compose("teach", forget=[ForgetNLL()], schedule=build("ssu", {**ONE, "schedule": plain}).schedule)
    for records in requests(people_world):
        overrides = {**BARE, "forget.reduction": "token", "finish": {"scale": scale}, "schedule": plain}
        ask(adapter, records, overrides, origin)
        origin = Origin(first, scale)
        train(taught, recipe, {Stream.FORGET: [taught.encode(r) for r in records]}, Engine())
        now, knowing = weights(adapter.model), weights(taught.model)
        for name, start in first.items():
            vector = knowing[name] - start
            torch.testing.assert_close(now[name] + scale * vector, start, rtol=0, atol=2e-5, msg=name)
        assert max((knowing[n] - first[n]).abs().max() for n in first) > 1e-2


def test_three_requests_are_all_forgotten_and_a_flipped_sign_is_not(people_world) -> None:
    adapter, flipped = people_world.target(), people_world.target()
    first, asked = weights(adapter.model), requests(people_world)
    for number, records in enumerate(asked):
        origin = Origin(first, 4.0) if number else None
        outcome = ask(adapter, records, {"finish": {"scale": 4.0}, "schedule": {**FIXED, "steps": 40}}, origin)
        assert 0.02 < outcome.history[-1]["moved"] < 0.5
        assert right(adapter, [r for held in asked[: number + 1] for r in held]) < 0.2
    assert right(people_world.target(), [r for held in asked for r in held]) > 0.9
    ask(flipped, asked[0], {"finish": {"scale": -1.0}, **BARE})
    assert right(flipped, asked[0]) > 0.9


def test_passages_are_other_answers_of_the_set_and_each_step_reads_five(people_world) -> None:
    records = requests(people_world)[0]
    adapter, recipe = people_world.fresh(), build("ssu")
    own = {r.answer for r in records}
    drawn = several(records, "passages", 5, seed=3)
    assert len(drawn) == 5 * len(records)
    for i, record in enumerate(records):
        mine = drawn[5 * i : 5 * i + 5]
        assert set(mine) <= own - {record.answer}
    assert len({tuple(drawn[k::5]) for k in range(5)}) == 5
    assert drawn == several(records, "passages", 5, seed=3) != several(records, "passages", 5, seed=4)
    assert [drawn[5 * i] for i in range(len(records))] == several(records, "passages", 1, seed=3)
    examples = {Stream.FORGET: [adapter.encode(r) for r in records]}
    examples[Stream.ALTERNATIVE] = encoded(adapter, records, recipe, "auto")
    assert len({e.id for e in examples[Stream.ALTERNATIVE]}) == 5 * len(records)
    objective = Objective(adapter, recipe, examples)
    whole = objective.micro_batches({Stream.FORGET: [0, 2]}, 100_000)
    assert [len(whole[0].examples[s]) for s in (Stream.FORGET, Stream.ALTERNATIVE)] == [2, 10]
    assert {e.id.split("#")[0] for e in whole[0].examples[Stream.ALTERNATIVE]} == {records[0].id, records[2].id}
    small = objective.micro_batches({Stream.FORGET: [0, 2]}, 64)
    assert [len(m.examples[Stream.ALTERNATIVE]) for m in small] == [5, 5]
    assert objective.counts({Stream.FORGET: [0, 2]}) == [2, 10]
    assert len(objective.filler().examples[Stream.ALTERNATIVE]) == 5


def test_the_loss_is_the_mean_over_prompts_and_passages_of_token_means(people_world) -> None:
    adapter, records = people_world.target(), requests(people_world)[1]
    found = loss_on("ssu", adapter, adapter, records)
    answers = several(records, "passages", 5)

    def mean(record, answer=None) -> float:
        with torch.no_grad():
            batch = adapter.collate([adapter.encode(record, answer=answer)])
            return adapter.forward(adapter.model, batch, frozenset({"losses"})).losses.mean().item()

    taught = [mean(records[i // 5], a) for i, a in enumerate(answers)]
    wanted = sum(map(mean, records)) / len(records) + sum(taught) / len(taught)
    assert found["total"].item() == pytest.approx(wanted, rel=1e-5)


def test_a_lora_is_merged_before_it_is_turned_around(people_world) -> None:
    """Against factors taken from a run without the finish: theta - scale * (alpha / rank) B A, a plain model."""
    records = requests(people_world)[0]
    lora = {"parameters": {"name": "lora", "rank": 4, "alpha": 8.0, "modules": ["q_proj", "v_proj"]}}
    adapter, taught = people_world.target(), people_world.target()
    first = weights(adapter.model)
    ask(adapter, records, {**BARE, **lora, "forget.reduction": "token", "finish": {"scale": 2.0}})
    recipe = build("task-vector", {**ONE, **lora})
    recipe = recipe.model_copy(update={"finish": None})
    wrapped = train(taught, recipe, {Stream.FORGET: [taught.encode(r) for r in records]}, Engine()).model
    assert not hasattr(adapter.model, "peft_config")
    moved = 0
    for name, value in weights(adapter.model).items():
        module = "base_model.model." + name.removesuffix(".weight")
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            layer = wrapped.get_submodule(module)
            product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2.0
            torch.testing.assert_close(value, first[name] - 2.0 * product, rtol=0, atol=1e-5)
            moved += 1
        else:
            assert torch.equal(value, first[name]), name
    assert moved > 2
    before = copy.deepcopy(first)
    ask(adapter, requests(people_world)[1], {**lora}, Origin(first, 2.0))
    assert all(torch.equal(before[n], w) for n, w in first.items()), "the origin is left as it is"


def test_what_does_not_fit_is_refused(people_world) -> None:
    adapter, records = people_world.fresh(), requests(people_world)[0]
    other = {n: p[:1] for n, p in weights(adapter.model).items()}
    with pytest.raises(InputError, match="differs in shape"):
        ask(adapter, records, origin=Origin(other, 1.0))
    with pytest.raises(InputError, match=r"can only follow forget-nll"):
        build("ssu", {"retain": "nll"})
    examples = [adapter.encode(r) for r in records]
    with pytest.raises(InputError, match="one alternative answer per forget example, or equally many"):
        Objective(adapter, build("ssu"), {Stream.FORGET: examples, Stream.ALTERNATIVE: examples[:3]})
    both = {Stream.FORGET: examples, Stream.ALTERNATIVE: examples * 2, Stream.RETAIN: examples}
    with pytest.raises(InputError, match="compares each forget example with one alternative"):
        Objective(adapter, build("dpo"), both, dict.fromkeys(Of))
