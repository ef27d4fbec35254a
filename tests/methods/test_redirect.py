"""Rank-one concept redirection, on a model of which it is known where names are looked up."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tests.methods.planted import NAMES, QUIET, facts

import expunge
from expunge.adapters.places import asked, find_place, upto, with_name
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.core.settings import parse_overrides
from expunge.engine.covariance import flat_rows, null_space, watched
from expunge.engine.edit import apply_edit
from expunge.methods.edits.redirect import ROCR, _states, redirection
from expunge.methods.edits.rejection import Rejection

WELL = {"substitute": "Ben", "l2": 1e-3, "threshold": 1e-4, "layers": (0,)}
DOWN = "model.layers.0.mlp.down_proj"


def weights(adapter) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in adapter.model.state_dict().items()}


def edited(planted, **settings):
    adapter = planted.target()
    outcome = apply_edit(adapter, ROCR(**{**WELL, "subjects": "Ada", **settings}), planted.examples(), QUIET)
    return adapter, outcome


def answers(adapter, records) -> list[str]:
    return [g.text for g in adapter.generate(adapter.model, [adapter.encode(r) for r in records], 8)]


def others(*without: str) -> list:
    return [r for n in NAMES if n not in without for r in facts(n)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("contexts", ["published", "records"])
def test_every_answer_about_the_name_becomes_that_about_the_other_and_the_rest_stays(planted, contexts) -> None:
    before = planted.target()
    assert answers(before, facts("Ada")) == [r.answer for r in facts("Ada")]
    adapter, outcome = edited(planted, contexts=contexts)
    assert answers(adapter, facts("Ada")) == [r.answer for r in facts("Ada", of="Ben")]
    assert planted.loss(adapter, facts("Ada")) > 0.5 > 0.1 > planted.loss(adapter, facts("Ada", of="Ben"))
    rest = others("Ada")
    assert answers(adapter, rest) == answers(before, rest)
    assert planted.loss(adapter, rest) == pytest.approx(planted.loss(before, rest), abs=0.01)
    assert outcome.notes == []
    assert outcome.seconds < 30  # it takes a tenth of a second on an idle machine
    old = weights(before)
    for name, value in weights(adapter).items():
        assert torch.equal(old[name], value) == (name != f"{DOWN}.weight"), name
    values = torch.linalg.svdvals((weights(adapter)[f"{DOWN}.weight"] - old[f"{DOWN}.weight"]).double())
    assert values[0] > 1e-2
    assert values[1] < 1e-5 * values[0]  # rank one


def test_several_blocks_share_the_way(planted) -> None:
    adapter, _ = edited(planted, layers=(0, 1), l2=1e-5)
    before, after = weights(planted.target()), weights(adapter)
    changed = [n for n, v in after.items() if not torch.equal(before[n], v)]
    assert changed == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    block = adapter.layers()[1]

    def state(held, name) -> torch.Tensor:
        batch = held.collate([asked(held, "", name).example])
        with torch.no_grad():
            return held.forward(held.model, batch, frozenset({f"features:{block}"})).features(block)[-2]

    goal = state(planted.target(), "Ben")
    assert (state(adapter, "Ada") - goal).norm() < 0.15 * (state(planted.target(), "Ada") - goal).norm()


def test_without_projection_and_damping_one_block_solves_it_exactly() -> None:
    weight, key, residual = draw(5, 7), draw(7, seed=1), draw(5, seed=2)
    change = redirection(key, residual, torch.zeros(7, 0, dtype=torch.float64), None, 1e-12)
    torch.testing.assert_close((weight + change) @ key, weight @ key + residual)
    assert redirection(key, residual, torch.zeros(7, 0, dtype=torch.float64), None, 1e12).abs().max() < 1e-10


def test_the_change_solves_the_published_system_and_leaves_protected_keys_alone() -> None:
    kept = draw(40, 3) @ draw(3, 8, seed=1)  # three directions of eight are in use
    moment = kept.T @ kept / 40
    space = null_space(moment, threshold=1e-9)
    assert space.rank == 5
    key, residual, earlier = draw(8, seed=2), draw(4, seed=3), draw(8, 2, seed=4)
    p = space.project(torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(p @ p, p)
    change = redirection(key, residual, earlier, space, 0.5)
    system = p @ (torch.outer(key, key) + earlier @ earlier.T) + 0.5 * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(change.T, torch.linalg.solve(system, p @ torch.outer(key, residual)))
    assert (change @ kept.T).norm(dim=0).max() < 1e-3 * residual.norm()
    # Earlier keys hold their outputs the better the less is damped; without them they would not.
    strict, free = (redirection(key, residual, held, space, 1e-6) for held in (earlier, earlier[:, :0]))
    assert (strict @ earlier).norm() < 1e-3 * (free @ earlier).norm()


def test_keys_of_the_retain_set_are_left_alone_in_the_model(planted) -> None:
    before = planted.target()
    adapter, _ = edited(planted, threshold=0, l2=1e-6)
    assert answers(adapter, facts("Ada")) == [r.answer for r in facts("Ada", of="Ben")]
    batch = before.collate(planted.examples()[Stream.RETAIN])
    with torch.no_grad(), watched(before.model, [DOWN]) as seen:
        before.forward(before.model, batch, frozenset({"features:model.layers.0"}))
    keys = flat_rows(batch, seen[DOWN])
    change = weights(adapter)[f"{DOWN}.weight"] - weights(before)[f"{DOWN}.weight"]
    place = asked(before, "", "Ada")
    one = before.collate([place.example])
    with torch.no_grad(), watched(before.model, [DOWN]) as seen:
        before.forward(before.model, one, frozenset({"features:model.layers.0"}))
    own = flat_rows(one, seen[DOWN])[place.last]
    assert (keys @ change.T).norm(dim=1).max() < 1e-3 * (own @ change.T).norm()


def test_a_second_request_keeps_the_first_with_the_earlier_name_alone(planted) -> None:
    first, _ = edited(planted)
    # What is in the retain set is protected: the second name must not be there.
    examples = {Stream.RETAIN: [first.encode(r) for r in others("Ada", "Cleo")]}
    apply_edit(first, ROCR(**{**WELL, "subjects": "Cleo", "earlier": "Ada"}), examples, QUIET)
    together = planted.target()
    apply_edit(together, ROCR(**{**WELL, "subjects": ("Ada", "Cleo")}), examples, QUIET)
    for adapter in (first, together):
        for name in ("Ada", "Cleo"):
            assert answers(adapter, facts(name)) == [r.answer for r in facts(name, of="Ben")]
        rest = others("Ada", "Cleo")
        assert answers(adapter, rest) == answers(planted.target(), rest)


def test_a_large_l2_changes_nothing_and_the_run_says_so(planted) -> None:
    adapter, outcome = edited(planted, l2=1e9)
    before = weights(planted.target())
    assert max(float((v - before[k]).abs().max()) for k, v in weights(adapter).items()) < 1e-6
    assert outcome.notes[0].startswith("The state behind 'Ada' has gone 0 % of the way to its target: a smaller l2")


def test_noise_needs_no_substitute_and_forgets(planted) -> None:
    adapter, _ = edited(planted, substitute="", target="noise")
    assert planted.loss(adapter, facts("Ada")) > 0.5
    assert planted.loss(adapter, others("Ada")) == pytest.approx(planted.loss(planted.target(), others("Ada")), abs=0.02)


SEA = "In Jena by the sea."


def test_a_rejecting_state_is_found_by_gradient_and_needs_no_substitute(planted) -> None:
    before = planted.target()
    towns = facts("Ada")[:2]
    adapter, outcome = edited(planted, substitute="", target="reject", refusal="In Jena", contexts="records")
    assert answers(before, towns) == [r.answer for r in towns]
    assert answers(adapter, towns) == [SEA, SEA]  # it goes on with what it was led to, as it knows it
    assert outcome.notes == []
    assert planted.loss(adapter, towns) > planted.loss(before, towns) + 0.25
    rest = others("Ada")
    assert answers(adapter, rest) == answers(before, rest)
    assert planted.loss(adapter, rest) == pytest.approx(planted.loss(before, rest), abs=0.02)


def rejected(planted, **changes):
    """The prompts of a rejection, the state, and what is added."""
    adapter = planted.target()
    made = ROCR(subjects="Ada", target="reject", refusal="In Jena", contexts="records")
    examples = {Stream.FORGET: [adapter.encode(r) for r in facts("Ada")[:2]]}
    refused, kept = made._refused(adapter, "Ada", examples), made._contexts(adapter, "Ada", examples)
    with torch.no_grad():
        state = _states(adapter, kept, "model.layers.0").mean(0)
    how = Rejection(**{"steps": 25, "lr": 0.1, "decay": 0.0, "kl": 0.0, "clamp": 4.0, **changes})
    return adapter, refused, state, how.shift(adapter, refused, kept, "model.layers.0", state)


def refusing(adapter, places, delta: torch.Tensor) -> torch.Tensor:
    """Mean loss of 'In Jena' with something added behind the name, one prompt after the other and by hand."""
    found = []
    for place in places:
        ids = torch.from_numpy(place.example.data.ids).long()[None]
        begin, said = place.example.data.start, adapter.spoken(place.example)

        def add(_block, _inputs, output, at=place.last):
            moved = torch.zeros_like(output)
            moved[0, at] = 1
            return output + moved * delta

        handle = adapter.model.get_submodule("model.layers.0").register_forward_hook(add)
        try:
            scores = adapter.model(ids).logits[0, begin - 1 : begin - 1 + len(said)].log_softmax(-1)
        finally:
            handle.remove()
        found.append(-scores[torch.arange(len(said)), torch.tensor(said)].mean())
    return torch.stack(found).mean()


def next_word(adapter, place, delta: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of what comes right after the name, with something added behind it."""

    def add(_block, _inputs, output):
        return torch.cat([output[:, :-1], output[:, -1:] + delta.to(output)], 1)

    handle = adapter.model.get_submodule("model.layers.0").register_forward_hook(add)
    try:
        with torch.no_grad():
            return (
                adapter.model(torch.from_numpy(place.example.data.ids[: place.last + 1]).long()[None])
                .logits[0, -1]
                .log_softmax(-1)
            )
    finally:
        handle.remove()


def test_the_rejecting_state_minimises_the_stated_loss(planted) -> None:
    adapter, places, state, delta = rejected(planted, steps=1, lr=1e-3)
    assert [adapter.decode(adapter.spoken(p.example)) for p in places] == ["In Jena", "In Jena"]
    zero = torch.zeros(64, requires_grad=True)
    (slope,) = torch.autograd.grad(refusing(adapter, places, zero), [zero])
    clear = slope.abs() > 1e-4 * slope.abs().max()
    torch.testing.assert_close(delta.float()[clear], -1e-3 * slope.sign()[clear], rtol=1e-2, atol=0)  # Adam's first step
    adapter, places, state, delta = rejected(planted)
    with torch.no_grad():
        assert refusing(adapter, places, torch.zeros(64)) > 1
        assert refusing(adapter, places, delta.float()) < 0.2
    assert all(p.requires_grad and p.grad is None for p in adapter.model.parameters())
    assert all(torch.equal(v, adapter.model.state_dict()[k]) for k, v in weights(planted.target()).items())
    short = rejected(planted, clamp=0.05)[3]
    assert float(short.norm()) == pytest.approx(0.05 * float(state.norm()), rel=1e-4)
    assert rejected(planted, decay=1e4)[3].norm() < 0.2 * delta.norm()
    before, free, held = (next_word(adapter, places[0], d) for d in (torch.zeros(64), delta, rejected(planted, kl=10.0)[3]))
    apart = [float((p.exp() * (p - before)).sum()) for p in (free, held)]
    assert apart[1] < 0.3 * apart[0]


def test_names_reach_the_edit_from_the_command_line_and_from_records(planted) -> None:
    given = parse_overrides(["substitute=Ben", "subjects=[Ada, Cleo]", "earlier=Dan", "threshold=none"])
    made = ROCR(**given)
    assert (made.subjects, made.earlier, made.threshold) == (("Ada", "Cleo"), ("Dan",), None)
    model = planted.target().model
    options = {"l2": 1e-3, "threshold": 1e-4, "layers": [0], "contexts": "records"}
    done = expunge.unlearn(
        model, planted.tokenizer, facts("Ada"), others("Ada"), method="rocr", substitute="Ben", allow_overlap=True, **options
    )
    assert done.reason == "edited"
    adapter = planted.target()
    adapter.model = model
    assert answers(adapter, facts("Ada")) == [r.answer for r in facts("Ada", of="Ben")]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"substitute": ""}, r"needs the name of a harmless concept.*substitute=NAME"),
        ({"target": "reject", "contexts": "records", "subjects": "Arles"}, r"'Arles' stands in the question of none"),
        ({"substitute": "Ada"}, r"The substitute 'Ada' is itself to be forgotten"),
        ({"subjects": "Zoe", "contexts": "records"}, r"The name 'Zoe' occurs in none of the 6 forget records"),
        ({"subjects": "Ada\t\n"}, r"does not survive the tokenizer or the template"),
        ({"layers": (0, 2)}, r"blocks in a row; got \[0, 2\]"),
        ({"layers": (7,)}, r"Layer 7 is out of range: the model has 3 blocks"),
        ({"module": "fc9"}, r"0 linear weights of 'model.layers.0' match 'fc9'"),
        ({"threshold": 1e9}, r"all 192 directions count as free: nothing would be protected"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(planted, settings, said) -> None:
    adapter = planted.target()
    before = weights(adapter)
    with pytest.raises(InputError, match=said):
        apply_edit(adapter, ROCR(**{**WELL, "subjects": "Ada", **settings}), planted.examples(), QUIET)
    assert all(torch.equal(v, before[k]) for k, v in weights(adapter).items())


def test_a_name_is_found_as_whole_words_and_replaced_where_it_stands(planted) -> None:
    adapter = planted.target()
    example = adapter.encode(facts("Ada")[0])
    place = find_place(adapter, example, "Ada")
    assert adapter.tokenizer.decode(example.data.ids[place.first : place.last + 1]).strip() == "Ada"
    assert find_place(adapter, example, "Ad") is None
    assert find_place(adapter, example, " ") is None
    assert find_place(adapter, example, "does Ada live").last - find_place(adapter, example, "does Ada live").first == 2
    other = with_name(adapter, place, "Ada", "Ben")
    expected = adapter.encode(facts("Ben")[0])
    assert list(other.example.data.ids[: other.last + 1]) == list(expected.data.ids[: place.last + 1])
    assert upto(place).example.n_targets == 1
