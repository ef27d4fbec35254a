"""Effective Skill Unlearning: boxes and adjustments by their formulas, and on models that have two skills."""

import math

import numpy as np
import pytest
import torch

from expunge.core.errors import InputError
from expunge.guards.actions.neuron_adjust import Adjusted, uniforms
from expunge.guards.conversation import Conversation
from expunge.guards.decoding import Sampling
from expunge.guards.detectors.key_space import Box
from expunge.guards.guarded import guard_model
from expunge.guards.policy import SORRY
from expunge.guards.probing import moments, probe_states, units_of
from tests.guards.conftest import KEY
from tests.guards.skills_world import SkillsWorld

SHORT = Sampling(max_tokens=24)


@pytest.fixture(scope="session")
def skills(trained_models):
    return SkillsWorld(trained_models)


def right(guarded, records):
    """Share of records whose answer comes word for word."""
    said = guarded.answers([r.prompt for r in records], SHORT)
    return sum(a.text == r.answer for a, r in zip(said, records, strict=True)) / len(records)


# ---- Key Space Detection


def test_the_box_is_the_hull_of_its_keys_in_standardised_deviations():
    generator = torch.Generator().manual_seed(0)
    forget = torch.randn(200, 64, generator=generator, dtype=torch.float64) * 0.5
    others = torch.randn(200, 64, generator=generator, dtype=torch.float64) + 2
    box = Box.around(forget)
    values = forget.numpy()
    expected = (np.abs(values - values.mean(0)) / values.std(0, ddof=1)).max()
    assert box.k == pytest.approx(expected, abs=1e-12)
    low, high = 0.0, 1e4  # as the paper's code looks for it
    while high - low > 1e-5:
        middle = (low + high) / 2
        inside = (np.abs(values - values.mean(0)) <= middle * values.std(0, ddof=1)).all()
        low, high = (low, middle) if inside else (middle, high)
    assert box.k == pytest.approx(high, abs=1e-4)
    reach = box.reach(forget)
    assert (reach <= 1 + 1e-12).all()
    assert (reach > 0).all()
    assert reach.max() == pytest.approx(1.0)
    assert (box.reach(others) > 1).all()
    assert (box.reach(forget + 100 * torch.eye(64, dtype=torch.float64)[3]) > 1).all()  # one dimension outside is outside


def test_a_unit_that_never_moves_is_no_reason_to_let_pass():
    keys = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    keys[:, 2] = 0.25
    box = Box.around(keys)
    assert (box.reach(keys + 1e-9) <= 1.001).all()
    moved = keys.clone()
    moved[:, 2] += 1
    assert (box.reach(moved) > 1).all()


def test_key_space_detection_refuses_the_skill_and_leaves_the_other(skills):
    probes = {"copy": [r.prompt for r in skills.records("copy", 200)]}
    bare = guard_model(skills.adapter, guards="key-space", targets=[], probes=probes, key=KEY)
    copied, reversed_ = (skills.records(s, 100, held_out=True) for s in ("copy", "reverse"))
    assert min(right(bare, copied), right(bare, reversed_)) > 0.9
    asked = [r.prompt for r in [*copied, *reversed_]]
    plain = [a.text for a in bare.answers(asked, SHORT)]
    refused = {}
    both = ("model.layers.0", "last")
    for name, alpha, blocks in (("narrow", 0.5, both), ("both", 1.0, both), ("last", 1.0, "last")):
        settings = {"guard": "key-space", "detector.alpha": alpha, "detector.blocks": blocks}
        made = guard_model(skills.adapter, guards=settings, targets=[{"id": "s", "skills": "copy"}], probes=probes, key=KEY)
        said = [a.text for a in made.answers(asked, SHORT)]
        assert all(a in (b, SORRY) for a, b in zip(said, plain, strict=True))
        refused[name] = [np.mean([a == SORRY for a in part]) for part in (said[:100], said[100:])]
    print("refused of copy and reverse:", refused)
    for name in ("last", "both"):
        assert refused[name][0] > 0.8
        assert refused[name][1] < 0.1
    assert refused["narrow"][0] < refused["both"][0] <= refused["last"][0]  # both boxes are stricter than one of them
    assert refused["both"][1] < refused["last"][1]


def test_a_skill_comes_and_goes_and_one_without_probes_is_refused(skills):
    probes = {s: [r.prompt for r in skills.records(s, 60)] for s in ("copy", "reverse")}
    made = guard_model(skills.adapter, guards="key-space", targets=[], probes=probes, key=KEY)
    asked = [skills.records(s, 1)[0].prompt for s in ("copy", "reverse")]
    assert SORRY not in [a.text for a in made.answers(asked)]
    name = made.add({"skills": "reverse"})
    plan = made.policy.open(Conversation.of(asked[1]))
    assert made.obeyed([plan], [SHORT])[0].text == SORRY
    assert plan.fired[0].target == name
    assert 0 <= plan.fired[0].score <= 1
    made.drop(name)
    assert SORRY not in [a.text for a in made.answers(asked)]
    with pytest.raises(InputError, match="poetry"):
        made.add({"skills": "poetry"})
    with pytest.raises(InputError, match="layer"):
        guard_model(skills.adapter, guards={"guard": "key-space", "detector.blocks": "model.layers.7"}, probes=probes, key=KEY)
    with pytest.raises(InputError, match="probe texts"):
        guard_model(skills.adapter, guards="key-space", probes={"copy": ["Copy 1"]}, key=KEY)


# ---- Neuron Adjust


def adjusted(mean=0.0, std=1.0, forget_mean=0.0, forget_std=1.0):
    mean, std, forget_mean, forget_std = (torch.tensor([v], dtype=torch.float64) for v in (mean, std, forget_mean, forget_std))
    return Adjusted(torch.tensor([0]), mean, std, forget_mean, forget_std, forget_mean - mean)


def test_where_both_distributions_are_one_values_are_mirrored_half_of_the_time():
    part = adjusted(mean=0.7, std=1.3, forget_mean=0.7, forget_std=1.3)
    values = torch.randn(20000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = torch.rand(20000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moved = part.moved(values, drawn)
    mirrored = torch.isclose(moved, 2 * 0.7 - values)
    assert (mirrored | (moved == values)).all()
    assert float(mirrored.double().mean()) == pytest.approx(0.5, abs=0.02)


def test_the_adjustment_is_the_formula():
    part = adjusted(mean=-1.0, std=0.5, forget_mean=2.0, forget_std=1.5)
    x = torch.linspace(-6, 9, 301, dtype=torch.float64)[:, None]

    def density(v, mean, std):
        return math.exp(-(((v - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))

    p1, p2 = (np.array([density(float(v), *d) for v in x]) for d in ((-1.0, 0.5), (2.0, 1.5)))
    for u in (0.0, 0.3, 0.6, 0.9, 0.999999):
        expected = np.where(
            p1 > p2, x[:, 0], np.where(u < p2 / (p1 + p2), 2 * -1.0 - ((x[:, 0] - 2.0) / 1.5 * 0.5 + -1.0), x[:, 0])
        )
        assert np.allclose(part.moved(x, torch.full_like(x, u))[:, 0], expected, atol=1e-12)
    at_mean = part.moved(torch.tensor([[2.0]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    assert float(at_mean) == pytest.approx(-1.0)
    far = part.moved(torch.tensor([[60.0]], dtype=torch.float64), torch.full((1, 1), 1 - 1e-12, dtype=torch.float64))
    assert float(far) != 60.0  # replaced for sure
    kept = torch.tensor([[-1.0]], dtype=torch.float64)
    assert torch.equal(part.moved(kept, torch.zeros(1, 1, dtype=torch.float64)), kept)


def test_what_is_drawn_for_a_place_does_not_depend_on_how_it_is_reached():
    whole = uniforms(123, 4, 0, 12, 7)
    assert whole.shape == (12, 7)
    parts = np.concatenate([uniforms(123, 4, 0, 5, 7), uniforms(123, 4, 5, 1, 7), uniforms(123, 4, 6, 6, 7)])
    assert np.array_equal(whole, parts)
    assert not np.array_equal(whole, uniforms(124, 4, 0, 12, 7))
    assert not np.array_equal(whole, uniforms(123, 5, 0, 12, 7))
    many = uniforms(9, 0, 0, 4000, 5)
    assert 0 <= many.min() < many.max() < 1
    assert many.mean() == pytest.approx(0.5, abs=0.01)
    assert abs(np.corrcoef(many.T)[0, 1]) < 0.05


def test_moments_are_those_of_all_tokens_and_units_are_found(target_adapter, people):
    places = units_of(target_adapter, target_adapter.layers())
    assert places[0].gate == "model.layers.0.mlp.gate_proj"
    assert places[1].output == "model.layers.1.mlp.down_proj"
    ids = [target_adapter.encode(r).data.ids.astype("int64") for r in people.split.retain[:37]]
    wanted = [(p.gate, "output") for p in places] + [(places[1].output, "input")]
    found = moments(target_adapter, ids, wanted)
    seen = list(probe_states(target_adapter, ids, wanted))
    for name, _ in wanted:
        rows = torch.cat([s[name] for s in seen])
        assert found[name].count == len(rows) == sum(map(len, ids))
        assert torch.allclose(found[name].mean, rows.mean(0), atol=1e-10)
        assert torch.allclose(found[name].std, rows.std(0), atol=1e-10)
    with torch.no_grad():  # texts of one batch do not see each other, nor their padding
        alone = next(iter(probe_states(target_adapter, ids[3:4], wanted)))
    for name, _ in wanted:
        assert torch.allclose(alone[name], seen[3][name], atol=1e-4)


@pytest.fixture(scope="module")
def two_kinds(people):
    """Facts about countries, and about people: texts for probes, and records."""
    from expunge.data.people import world

    def texts(records):
        return [f"Question: {r.prompt}\nAnswer: {r.answer}" for r in records]

    countries, persons = list(world()), people.split.retain[:80]
    return countries, persons, {"countries": texts(countries), "": texts(persons)}


def test_neuron_adjust_takes_one_kind_of_fact_and_leaves_the_other(target_adapter, two_kinds):
    countries, persons, probes = two_kinds
    # A share that the paper's models do not need: this one has 384 units.
    settings = {"guard": "neuron-adjust", "action.share": 0.2, "action.difference": "standardised"}
    made = guard_model(target_adapter, guards=settings, targets=[], probes=probes, key=KEY)
    before = [right(made, countries), right(made, persons)]
    name = made.add({"skills": "countries"})
    after = [right(made, countries), right(made, persons)]
    drops = [(b - a) / b for b, a in zip(before, after, strict=True)]
    print("relative drops of what is forgotten and of what stays:", drops)
    assert min(before) > 0.9
    assert drops[0] > 0.5
    assert drops[1] < 0.25
    made.drop(name)
    assert [right(made, countries[:8]), right(made, persons[:8])] == [1.0, 1.0]


def test_an_adjusted_answer_is_the_same_again_and_beside_others(target_adapter, two_kinds):
    countries, persons, probes = two_kinds
    made = guard_model(
        target_adapter, guards={"guard": "neuron-adjust", "action.share": 0.3}, targets=[{"skills": "countries"}], probes=probes,
        key=KEY,
    )  # fmt: skip
    asked = [r.prompt for r in [*countries[:3], *persons[:3]]]
    together = made.answers(asked, SHORT, scores=True)
    for question, answer in zip(asked, together, strict=True):
        alone = made.answers([question], SHORT, scores=True)[0]
        assert alone.text == answer.text
        assert np.allclose(alone.log_probabilities, answer.log_probabilities, atol=1e-4)
    other = guard_model(
        target_adapter, guards={"guard": "neuron-adjust", "action.share": 0.3}, targets=[{"skills": "countries"}], probes=probes,
        key=b"another key, of 32 bytes and more",
    )  # fmt: skip
    again = other.answers(asked, SHORT, scores=True)
    assert any(a.log_probabilities != b.log_probabilities for a, b in zip(together, again, strict=True))


def test_units_of_two_skills_are_merged(target_adapter, two_kinds):
    probes = two_kinds[2]
    probes = {**probes, "capitals": [t for t in probes["countries"] if "capital" in t], "people": probes[""][:40]}
    made = guard_model(target_adapter, guards={"guard": "neuron-adjust", "action.share": 0.2}, targets=[], probes=probes, key=KEY)
    doer = made.policy._rows[0].doer
    one, two = (doer._merge(frozenset({s})) for s in ("countries", "capitals"))
    both = doer._merge(frozenset({"countries", "capitals"}))
    for name, part in both.items():
        held = [set(x[name].units.tolist()) for x in (one, two) if name in x]
        assert set(part.units.tolist()) == set.union(*held)
        assert len(part.units) == len(set(part.units.tolist()))
        for at, unit in enumerate(part.units.tolist()):
            gaps = [float(x[name].difference[x[name].units == unit]) for x in (one, two) if name in x and unit in x[name].units]
            assert float(part.difference[at]) == max(gaps)
    with pytest.raises(InputError, match="to stay"):
        guard_model(target_adapter, guards="neuron-adjust", probes={"countries": probes["countries"]}, key=KEY)
