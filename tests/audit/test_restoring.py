"""Restoration of sparse features: it brings back what was only moved away, and gives nothing to who never knew it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from inside_models import SCHEDULE, judged, unlearned
from tests.world import World

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build
from expunge.audit.attacks.patching import lost_by_patching
from expunge.audit.attacks.restoring import Features, SparseRestoration, mean_features, said_with, shifts
from expunge.audit.evidence import Evidence, Protocol, Subject
from expunge.audit.kernel.restoration import steer
from expunge.audit.statements import contrasts, facts, statement_means, states_of
from expunge.core.errors import InputError
from expunge.data.people import world
from expunge.data.records import RecordSet
from expunge.engine.autoencoder import fit_autoencoder

KEY = "forget.sae-restoration"
CONTROLS = ("retrained 1", "retrained 2", "same start", "misinformed")
ATTACK = SparseRestoration()


@pytest.fixture(scope="module")
def models(small_world: World) -> dict[str, tuple[str, LanguageAdapter]]:
    """``misdirected`` has the states of forget texts steered away (RMU), ``npo`` its answers pushed down.

    ``same start`` never saw the forget set and began at the target's random weights; ``misinformed`` began there too and has
    learnt false answers to the very questions: it knows the people and the form, and not the facts.
    """
    steered = {"schedule": SCHEDULE | {"lr": 5e-3, "steps": 100}, "layer": 1, "coefficient": 5.0, "retain": {"weight": 1.0}}
    false = [replace(r, answer=r.perturbed[0]) for r in small_world.split.forget]
    return {
        "target": ("target", small_world.target()),
        "retrained 1": ("retrained", small_world.retrained(1)),
        "retrained 2": ("retrained", small_world.retrained(2)),
        "same start": ("unlearned", small_world.retrained(0)),
        "misinformed": ("unlearned", small_world._trained([*false, *small_world.split.retain, *world()], 0)),
        "misdirected": ("unlearned", unlearned(small_world, "rmu", **steered)),
        "npo": ("unlearned", unlearned(small_world, "npo", schedule=SCHEDULE | {"lr": 1e-3, "steps": 60})),
    }


def evidence_of(models: dict[str, tuple[str, LanguageAdapter]], small_world: World, **protocol) -> Evidence:
    subjects = {label: Subject(label, role, adapter.fingerprint(), adapter) for label, (role, adapter) in models.items()}
    sets = {"forget": small_world.split.forget, "retain": small_world.split.retain}
    return Evidence(subjects, sets, Protocol(draws=100, **protocol))


@pytest.fixture(scope="module")
def evidence(models, small_world: World) -> Evidence:
    return evidence_of(models, small_world)


# ---- what it finds


def test_states_that_were_steered_away_come_back_and_are_convicted(evidence):
    numbers = ATTACK.compute(evidence, "misdirected")
    gain, random = numbers[f"{KEY}.gain"].value, numbers[f"{KEY}.random"].value
    assert gain > 1.5
    assert random < gain / 2
    assert numbers[f"{KEY}.right"].value > numbers[f"{KEY}.before"].value + 0.15
    share, check = judged(ATTACK, evidence, "misdirected")
    assert share > 0.3
    assert check.outcome == "knows more", check.text


def test_answers_that_were_pushed_down_come_back_in_part(evidence):
    numbers = ATTACK.compute(evidence, "npo")
    assert numbers[f"{KEY}.gain"].value > 0.7
    assert numbers[f"{KEY}.right"].value > numbers[f"{KEY}.before"].value
    assert judged(ATTACK, evidence, "npo")[1].outcome in ("knows more", "undecided")


@pytest.mark.parametrize("label", CONTROLS)
def test_who_never_knew_the_answers_gains_nothing(label, evidence):
    numbers = ATTACK.compute(evidence, label)
    assert numbers[f"{KEY}.gain"].value < 0.35
    assert numbers[f"{KEY}.right"].value <= numbers[f"{KEY}.before"].value + 0.1
    assert judged(ATTACK, evidence, label)[1].outcome != "knows more"


def test_the_target_has_lost_nothing(evidence):
    numbers = ATTACK.compute(evidence, "target")
    assert numbers[f"{KEY}.gain"].value == pytest.approx(0, abs=1e-6)
    assert numbers[f"{KEY}.right"].value == 1
    held = ATTACK.arrays(evidence, "target", "forget")
    np.testing.assert_allclose(held["layers"], np.broadcast_to(held["layers"][0], held["layers"].shape), atol=1e-5)


def test_the_targets_own_activations_would_give_the_answer_away(evidence, models):
    """As published, text by text: a model that never knew gains. By means over the other half it does not."""
    target, other = models["target"][1], models["same start"][1]
    found = ATTACK.facts(evidence, other, "forget")
    statements = [s for f in found for s in f.statements]
    own, full = (states_of(m, statements, m.layers(), 8192, whole=True) for m in (other, target))
    known = ATTACK.learn(evidence, "forget")
    every = [steer(f.code, own.values[f.block], full.values[f.block], np.arange(len(f.code.bias)), 1.0) for f in known]
    lost = lost_by_patching(other, statements, replace(own, values=torch.stack(every)), 8192)
    published = -contrasts(lost, found).mean(axis=1)
    assert published.max() > 0.6
    held = ATTACK.arrays(evidence, "same start", "forget")["layers"]
    assert (held[1:].mean(axis=1) - held[0].mean()).max() < 0.1


def test_a_change_after_the_last_block_is_not_seen(models, small_world):
    """The states are the target's, so nothing was lost; the value is what the model says."""
    edited = small_world.target()
    with torch.no_grad():
        edited.model.model.norm.weight.neg_()
    few = {n: models[n] for n in ("target", "retrained 1")} | {"edited": ("unlearned", edited)}
    held = SparseRestoration(steps=100, least=0.0).arrays(evidence_of(few, small_world), "edited", "forget")["layers"]
    assert held[0].mean() < 0
    np.testing.assert_allclose(held, np.broadcast_to(held[0], held.shape), atol=1e-5)


# ---- how it is measured


def test_the_autoencoders_explain_states_of_other_texts(evidence):
    known = ATTACK.learn(evidence, "forget")
    assert [f.block for f in known] == [0, 1]
    assert all(f.explained > 0.85 for f in known)
    for features in known:
        assert features.code.signed
        torch.testing.assert_close(features.code.decoder.norm(dim=0), torch.ones(256), atol=1e-5, rtol=0)


def test_halves_are_whole_subjects_and_follow_from_the_seed(evidence, models, small_world):
    found = ATTACK.facts(evidence, models["target"][1], "forget")
    halves = ATTACK.halves(evidence, "forget", found)
    clusters = [evidence.clusters("forget")[f.record] for f in found]
    assert set(halves) == {0, 1}
    assert all(len({h for h, c in zip(halves, clusters, strict=True) if c == name}) == 1 for name in set(clusters))
    assert np.array_equal(ATTACK.halves(evidence, "forget", found), halves)
    others = [ATTACK.halves(evidence_of(models, small_world, seed=s), "forget", found) for s in range(1, 6)]
    assert any(not np.array_equal(o, halves) for o in others)


@pytest.fixture(scope="module")
def code():
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    return fit_autoencoder(x, latents=12, k=3, steps=30, signed=True)


def test_what_is_added_to_a_half_was_learnt_on_the_other(code):
    typical, own = (torch.randn(2, 12, generator=torch.Generator().manual_seed(s)) for s in (2, 3))
    real, random = shifts(Features(0, 2, code, 1.0, typical), own, 4, torch.Generator().manual_seed(0))
    for half in (0, 1):
        lost = typical[1 - half] - own[1 - half]
        chosen = sorted(range(12), key=lambda j: -abs(lost[j].item()))[:4]
        want = sum(lost[j] * code.decoder[:, j] for j in chosen) * code.deviation
        torch.testing.assert_close(real[half], want, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(random[half], want)
    changed = typical.clone()
    changed[1] += 1
    again, _ = shifts(Features(0, 2, code, 1.0, changed), own, 4, torch.Generator().manual_seed(0))
    assert torch.equal(again[1], real[1])  # what the target does on half 1 is not given to half 1
    assert not torch.equal(again[0], real[0])


def test_means_and_answers_are_those_of_one_text_at_a_time(target, sets):
    """Batched and padded, against a pass for each text with a hook of its own."""
    statements = [s for f in facts(target, sets["forget"], range(6), 2) for s in f.statements]
    halves = np.arange(len(statements)) % 2
    layer = target.layers()[0]
    vectors = torch.randn(2, target.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    states = states_of(target, statements, [layer], 10**6, whole=True)
    code = fit_autoencoder(states.values[0], latents=32, k=4, steps=20, signed=True)
    means = mean_features(target, statements, halves, {layer: code}, 300)[layer]
    plain, said = said_with(target, statements, halves, [(layer, vectors)], 300)
    rows = [states.values[0][states.rows([i])] for i in range(len(statements))]
    for half in (0, 1):
        own = torch.cat([r for r, h in zip(rows, halves, strict=True) if h == half])
        torch.testing.assert_close(means[half], code.encode(own).mean(dim=0), atol=1e-4, rtol=1e-3)
    block = target.model.get_submodule(layer)
    for i, statement in enumerate(statements):
        ids = torch.from_numpy(statement.example.data.ids.astype(np.int64))[None]
        first = statement.example.data.start + statement.start
        for want, add in ((plain, 0.0), (said, 1.0)):
            step = add * vectors[halves[i]]
            hook = block.register_forward_hook(
                lambda _m, _i, o, step=step: o + step if isinstance(o, torch.Tensor) else (o[0] + step, *o[1:])
            )
            with torch.no_grad():
                logs = target.model(input_ids=ids).logits[0].log_softmax(-1)
            hook.remove()
            told = logs[torch.arange(first - 1, first - 1 + statement.length), ids[0, first : first + statement.length]]
            assert want[i] == pytest.approx(told.mean().item(), abs=1e-4)


def test_nothing_added_changes_nothing_and_the_model_is_left_as_it_is(target, sets):
    statements = [f.right for f in facts(target, sets["forget"], range(4), 0)]
    halves, zero = np.array([0, 1, 0, 1]), torch.zeros(2, target.model.config.hidden_size)
    before = target.fingerprint()
    said = said_with(target, statements, halves, [(n, zero) for n in target.layers()], 8192)
    assert (said == said[0]).all()
    again = said_with(target, statements, halves, [(target.layers()[0], zero + 3)], 8192)
    assert (again[0] == said[0]).all()
    assert (again[1] != said[0]).all()
    assert target.fingerprint() == before
    assert statement_means(np.ones(sum(s.length for s in statements)), statements).tolist() == [1] * 4


def test_the_seed_decides_everything(models, small_world):
    few = {n: models[n] for n in ("target", "npo")}
    attack = SparseRestoration(steps=40, least=0.0, strengths=(1.0,))
    first, again, other = (attack.arrays(evidence_of(few, small_world, seed=s), "npo", "forget") for s in (0, 0, 1))
    assert all(np.array_equal(first[k], again[k], equal_nan=True) for k in first)
    assert not np.array_equal(first["layers"][1:], other["layers"][1:])
    assert first["tried"].tolist() == [[0, 0], [1, 1], [2, 1]]
    assert first["layers"].shape == first["random"].shape == first["right"].shape == (3, len(small_world.split.forget))


# ---- what it cannot do


def test_what_is_missing_is_said(evidence, models, small_world):
    forget = small_world.split.forget
    alone = Evidence({"npo": evidence.subjects["npo"]}, evidence.sets)
    assert "target" in ATTACK.lacks(alone, "forget")
    one = RecordSet("forget", tuple(r for r in forget if r.cluster == forget[0].cluster))
    assert "two subjects" in ATTACK.lacks(replace(evidence, sets={**evidence.sets, "forget": one}), "forget")
    plain = RecordSet("forget", tuple(replace(r, perturbed=()) for r in forget))
    bare = replace(evidence, sets={**evidence.sets, "forget": plain})
    assert "contrast=false" in ATTACK.lacks(bare, "forget")
    assert SparseRestoration(contrast=False).lacks(bare, "forget") == ""
    assert ATTACK.lacks(evidence, "forget") == ""


def test_poor_autoencoders_and_other_shapes_tell_nothing(models, small_world, tokenizer):
    taller = build("llama-tiny", small_world.tokenizer, seed=0, num_hidden_layers=3)
    few = {"target": models["target"], "taller": ("unlearned", LanguageAdapter(taller.eval(), small_world.tokenizer))}
    held = evidence_of(few, small_world)
    poor = SparseRestoration(steps=1, least=1.0)
    assert not poor.values(held, "target", "forget").present.any()
    assert any("explain" in s and "steps" not in s for s in held.missing)
    assert KEY not in poor.compute(held, "target")
    quick = SparseRestoration(steps=100, least=0.0, strengths=(1.0,))
    assert not quick.values(held, "taller", "forget").present.any()
    assert any("3 blocks" in s for s in held.missing)
    wider = LanguageAdapter(build("llama-tiny", tokenizer, seed=0, hidden_size=32).eval(), tokenizer)
    statements = [f.right for f in facts(wider, small_world.split.forget, range(2), 0)]
    code = quick.learn(held, "forget")[0].code
    with pytest.raises(InputError, match="32 wide"):
        mean_features(wider, statements, np.array([0, 1]), {wider.layers()[0]: code}, 512)
