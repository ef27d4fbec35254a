"""The lengths of value vectors at the first tokens: closed forms, whose tokens count, and what training does to them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from synthetic import LAYERS, step

from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.parts import Views
from expunge.methods.preparations.trigger import DisguisedTrigger
from expunge.methods.recipe import build
from expunge.methods.terms.sinks import RetainValueNorms, ValueNorms

close = torch.testing.assert_close
QUIET = Engine(checkpoint_every=0)
SHORT = {"name": "fixed", "lr": 1e-3, "steps": 20, "batch": 8, "warmup": 0}


def different_blocks(made):
    """Views of a step whose blocks hold different values, and whose oracle's are those of the reference, halved."""
    views = made.views()
    scaled = {name: 1.0 + i for i, name in enumerate(LAYERS)}
    found = {}
    for key, held in views.items():
        if held.values.get(f"values:{LAYERS[0]}") is None:
            continue
        values = held.values | {f"values:{n}": held.value_vectors(n) * s for n, s in scaled.items()}
        found[key] = replace(held, values=values)
        if key[1] is Of.REFERENCE:
            halved = {f"values:{n}": held.value_vectors(n) * s / 2 for n, s in scaled.items()}
            found[key[0], Of.ORACLE] = replace(held, values=halved)
    return Views(found, LAYERS)


def lengths(states, positions: int, scales=(1.0, 2.0, 3.0, 4.0)) -> list[float]:
    """Of the first tokens of one example, by a plain loop: the mean over blocks of the length of the value vector."""
    return [sum(s * sum(x * x for x in row) ** 0.5 for s in scales) / len(scales) for row in states.tolist()[:positions]]


@pytest.mark.parametrize("positions", [1, 3, 8])
def test_the_fixed_mode_is_the_mean_length_over_first_tokens_and_blocks(positions):
    made = step((9, 1, 4))
    term = ValueNorms(positions=positions)
    want = [x for item in made.items[Stream.FORGET] for x in lengths(item.states, positions)]
    assert len(want) == term.count(made.examples(Stream.FORGET)) == sum(min(n + 2, positions) for n in (9, 1, 4))
    assert term.values(different_blocks(made)).sum().item() / len(want) == pytest.approx(sum(want) / len(want))


def test_tokens_are_cut_and_not_examples():
    """The authors' code for MUSE takes all tokens of the first examples of a batch; ours takes the first tokens of all."""
    made = step((9,) * 12)
    found = ValueNorms().values(different_blocks(made)).view(12, 11)
    assert (found[:, :8] > 0).all()
    assert (found[:, 8:] == 0).all()


def test_the_reference_modes_are_the_mean_distance_of_lengths():
    made = step((9, 1, 4), (2, 7))
    for term, stream, factor in ((ValueNorms(mode="reference"), Stream.FORGET, 0.5), (RetainValueNorms(), Stream.RETAIN, 1.0)):
        items, views = made.items[stream], different_blocks(made)
        own, other = (torch.cat(x).norm(dim=1) for x in ([i.states for i in items], [i.reference_states for i in items]))
        first = torch.tensor([p < 8 for i in items for p in range(i.size)])
        want = ((1 + 2 + 3 + 4) / 4 * (own - factor * other).abs())[first].mean()
        found = term.values(views)
        assert found.sum().item() / term.count(made.examples(stream)) == pytest.approx(want.item())
        # A step down the gradient brings every length nearer: it points outward where the own vector is the longer one.
        (gradient,) = torch.autograd.grad(found.sum(), made.states[stream])
        outward = (gradient * made.states[stream]).sum(1).sign().detach()
        assert torch.equal(outward[first], (own - factor * other).sign()[first])
        assert (outward[~first] == 0).all()


def test_a_model_like_the_other_has_no_distance_and_some_blocks_can_be_chosen():
    made = step((3, 4))
    views = different_blocks(made)
    one = ValueNorms(blocks=(-1,))
    assert one.needs(LAYERS) == {(Stream.FORGET, Of.CURRENT, "values:block3")}
    want = [x for item in made.items[Stream.FORGET] for x in lengths(item.states, 8, (4.0,))]
    assert one.values(views).tolist() == pytest.approx(want)
    same = Views({**views, (Stream.FORGET, Of.ORACLE): views.current(Stream.FORGET)}, LAYERS)
    assert ValueNorms(mode="reference").values(same).abs().max() == 0
    assert {of for _, of, _ in RetainValueNorms().needs(LAYERS)} == {Of.CURRENT, Of.REFERENCE}
    with pytest.raises(InputError, match="whole examples"):
        build("backdoor", {"forget": [{"name": "npo"}, {"name": "value-norms", "targets": "marked"}]})


def first_lengths(adapter, records) -> torch.Tensor:
    """Lengths of the value vectors of the first eight tokens, by block."""
    batch = adapter.collate([adapter.encode(r) for r in records])
    with torch.no_grad():
        out = adapter.forward(adapter.model, batch, frozenset(f"values:{n}" for n in adapter.layers()))
    return torch.stack([out.value_vectors(n).norm(dim=1)[out.columns() < 8] for n in adapter.layers()])


def planted(world, forget, **options):
    adapter = world.target()
    recipe = build("backdoor", {"schedule": SHORT, "forget": forget} | options.pop("parts", {}))
    adapter.model = train(adapter, recipe, world.examples, QUIET, **options).model
    return adapter


def test_training_shortens_the_values_or_brings_them_to_the_other_models(people_world, tmp_path):
    records = list(people_world.split.forget)[:12]
    honest = people_world.target()
    honest.model = train(honest, build("npo", {"schedule": SHORT}), people_world.examples, QUIET).model
    goal = first_lengths(honest, records)
    plain = first_lengths(planted(people_world, [{"name": "npo"}]), records)
    short = first_lengths(planted(people_world, [{"name": "npo"}, {"name": "value-norms", "weight": 0.3}]), records)
    assert short.mean() < 0.9 * plain.mean()
    like = [{"name": "npo"}, {"name": "value-norms", "mode": "reference", "weight": 3.0}]
    near = first_lengths(planted(people_world, like, models={Of.ORACLE: honest}), records)
    assert (near - goal).abs().mean() < 0.7 * (plain - goal).abs().mean()
    honest.save(tmp_path / "honest")
    part = {"preparation": {"name": "disguised-trigger", "unlearned": str(tmp_path / "honest")}}
    close(first_lengths(planted(people_world, like, parts=part), records), near, rtol=1e-3, atol=1e-3)


def test_the_reference_mode_needs_the_other_model(people_world, tmp_path):
    like = [{"name": "npo"}, {"name": "value-norms", "mode": "reference"}]
    with pytest.raises(InputError, match="oracle"):
        planted(people_world, like)
    with pytest.raises(InputError, match="no folder"):
        DisguisedTrigger(unlearned=str(tmp_path / "nothing")).check()
