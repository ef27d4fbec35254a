"""Attacks on hidden states: what they measure, what they find in suppressed models, and what not in retrained ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from inside_models import judged
from transformers import GPT2Config, GPT2LMHeadModel

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build
from expunge.audit.attacks.lens import LogitLens, TunedLens, fit_lens
from expunge.audit.attacks.patching import ActivationPatching, lost_by_patching, patched
from expunge.audit.attacks.probing import LinearProbe, probe
from expunge.audit.attacks.similarity import RepresentationSimilarity, row_agreement
from expunge.audit.attacks.traces import ParametricTraces, attributions, jaccard, noised, strongest
from expunge.audit.evidence import Evidence, Protocol, Subject
from expunge.audit.kernel.depth import converging_point, depth_score, jumping_point
from expunge.audit.reader import Reader
from expunge.audit.scores import score
from expunge.audit.statements import (
    batches,
    contrasts,
    facts,
    false_answers,
    places,
    spans,
    statement_means,
    states_of,
    tokens_of,
)
from expunge.audit.store import ScoreStore
from expunge.core.errors import InputError
from expunge.data.records import Record, RecordSet
from expunge.engine.objective import mean_losses

ATTACKS = [LogitLens(), TunedLens(), ActivationPatching(), ActivationPatching(tokens="answer"), LinearProbe(minimum=50)]
HIDDEN = ("npo", "lora", "uld")


# ---- statements


def test_a_false_answer_has_the_words_of_the_true_one():
    record = Record(
        "r", "The birthplace of Ann Lee is called Perava.", "Where?", paraphrase="Ann Lee was born in the town of Perava.",
        perturbed=("Ann Lee was born in the town of Datburg.", "Ann Lee was born in the town of Perava.", "No idea at all."),
    )  # fmt: skip
    assert false_answers(record, 5) == ["The birthplace of Ann Lee is called Datburg.", "No idea at all."]
    assert false_answers(record, 1) == ["The birthplace of Ann Lee is called Datburg."]
    assert not false_answers(Record("s", "No wrong answers here.", "Why?"), 3)


def test_only_what_tells_answers_apart_is_looked_at(target, sets):
    found = facts(target, sets["forget"], [0, 3], 2)
    for fact in found:
        own = fact.right.example.data
        ids = own.ids[own.start :].tolist()
        for wrong in fact.wrong:
            other = wrong.example.data.ids[wrong.example.data.start :].tolist()
            assert ids[: wrong.start] == other[: wrong.start]
            assert ids[fact.right.start : fact.right.stop] != other[wrong.start : wrong.stop]
    assert {len(f.wrong) for f in found} == {2}
    alone = facts(target, sets["forget"], [0], 0)[0]
    assert (alone.right.start, alone.right.stop, alone.wrong) == (0, alone.right.example.n_targets, ())


def test_rows_and_means_belong_to_their_statements(target, sets):
    statements = [s for f in facts(target, sets["forget"], range(6), 2) for s in f.statements]
    layers = target.layers()
    whole = states_of(target, statements, layers, 256, whole=True)
    told = states_of(target, statements, layers, 10**6)
    assert whole.values.shape[1] == sum(s.example.size for s in statements)
    start = statements[4].example.data.start
    own = whole.values[:, whole.rows([4])][:, start - 1 + statements[4].start : start - 1 + statements[4].stop]
    torch.testing.assert_close(own, told.values[:, told.rows([4])], atol=1e-4, rtol=1e-4)
    values = np.arange(sum(s.length for s in statements), dtype=float)
    means = statement_means(values, statements)
    first = statements[0].length
    assert means[0] == values[:first].mean()
    assert means[-1] == values[-statements[-1].length :].mean()
    assert len(tokens_of(statements)) == len(values)


def test_a_contrast_is_the_true_answer_minus_the_mean_of_the_false():
    class F:
        def __init__(self, n):
            self.wrong = (None,) * n

    found = contrasts(np.array([[5.0, 1.0, 2.0, 7.0]]), [F(2), F(0)])
    assert found.tolist() == [[3.5, 7.0]]


# ---- reading a state


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_last_state_read_by_norm_and_head_is_the_models_own_answer(kind, target, tokenizer, sets):
    adapter = target
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=1, eos_token_id=2
        )
        torch.manual_seed(0)
        adapter = LanguageAdapter(GPT2LMHeadModel(config).eval(), tokenizer)
        with torch.no_grad():
            adapter.model.transformer.ln_f.weight.mul_(2)
    records = list(sets["forget"])[:4]
    statements = [f.right for f in facts(adapter, records, range(4), 0)]
    states = states_of(adapter, statements, adapter.layers(), 512).values
    logs, ranks = Reader(adapter).log_probabilities(states[-1], tokens_of(statements))
    scores = score(adapter, [s.example for s in statements])
    np.testing.assert_allclose(statement_means(logs.double().numpy(), statements), -scores.nll(), atol=1e-4)
    assert ((ranks.numpy() == 0).mean() > 0.3) == (kind == "llama")


def test_a_model_that_cannot_be_read_is_said_and_the_audit_goes_on(inside_evidence):
    found = LogitLens().values(inside_evidence, "uld", "forget")
    assert not found.present.any()
    assert any("'uld'" in s and "not one module" in s for s in inside_evidence.missing)
    with pytest.raises(InputError, match="not one module"):
        Reader(inside_evidence.adapter("uld"))


def test_a_lens_is_the_ridge_regression_in_closed_form():
    torch.manual_seed(0)
    x, true = torch.randn(400, 6, dtype=torch.float64) + 3, torch.randn(6, 6, dtype=torch.float64)
    y = x @ true + torch.tensor([1.0, -2, 0, 4, 5, 6], dtype=torch.float64)
    matrix, offset = fit_lens(x, y, 1e-9)
    torch.testing.assert_close(matrix, true, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(x @ matrix + offset, y, atol=1e-5, rtol=1e-5)
    assert fit_lens(x, y, 1e3)[0].abs().max() < 0.05


# ---- patching


def test_the_target_in_itself_loses_nothing_and_another_does(target, retrained, sets):
    statements = [s for f in facts(target, sets["forget"], range(12), 2) for s in f.statements]
    for whole in (True, False):
        own = lost_by_patching(target, statements, states_of(target, statements, target.layers(), 512, whole=whole), 512)
        np.testing.assert_allclose(own, 0, atol=1e-4)
        other = states_of(retrained[0], statements, target.layers(), 512, whole=whole)
        assert (lost_by_patching(target, statements, other, 512)[:, ::3].mean(axis=1) > 1).all()


def test_all_states_after_the_last_layer_give_the_other_models_states_to_the_targets_head(target, retrained, sets):
    statements = [f.right for f in facts(target, sets["forget"], range(5), 0)]
    states = states_of(retrained[0], statements, target.layers(), 512)
    lost = lost_by_patching(target, statements, states, 512)[-1]
    logs, _ = Reader(target).log_probabilities(states.values[-1], tokens_of(statements))
    own = score(target, [s.example for s in statements]).nll()
    np.testing.assert_allclose(lost, -statement_means(logs.double().numpy(), statements) - own, atol=1e-3)


def test_a_patch_goes_where_it_should_and_is_gone_afterwards(target, sets):
    statements = [f.right for f in facts(target, sets["forget"], range(3), 2)]
    (_, batch), *_ = batches(target, statements, 10**6)
    layer = target.layers()[0]
    rows, _ = spans(batch, statements)
    want = frozenset({f"features:{layer}"})
    before = target.forward(target.model, batch, want).features(layer).detach()
    with torch.no_grad(), patched(target, layer, batch, rows, torch.full((len(rows), before.shape[1]), 7.0)):
        seen = target.forward(target.model, batch, want | {f"features:{target.layers()[1]}"}).features(layer)
    assert (seen[rows] == 7).all()
    others = torch.ones(len(before), dtype=torch.bool)
    others[rows] = False
    torch.testing.assert_close(seen[others], before[others])
    torch.testing.assert_close(target.forward(target.model, batch, want).features(layer).detach(), before)
    assert len(places(batch, statements, whole=True)) == len(before)


def test_the_depth_score_is_0_for_nothing_lost_and_1_for_as_much_as_retrained():
    lost = np.array([[0.01, 0.2], [2.0, 1.0], [4.0, 0.03]])
    np.testing.assert_allclose(depth_score(np.zeros_like(lost), lost), 0)
    np.testing.assert_allclose(depth_score(lost, lost), 1)
    np.testing.assert_allclose(depth_score(lost / 2, lost), 0.5)
    np.testing.assert_allclose(depth_score(2 * lost, lost), 1)  # more than retrained is no more than forgotten
    np.testing.assert_allclose(depth_score([-1.0, 1.0], [3.0, 1.0]), 0.25)
    assert np.isnan(depth_score([1.0], [0.01]))
    # layers below the threshold say nothing
    assert depth_score([0.0, 1.0], [0.05, 1.0]) == 1
    with pytest.raises(InputError, match="same layers"):
        depth_score([1.0], [1.0, 2.0])


def test_the_depth_score_of_target_and_retrained_models(inside_evidence):
    attack = ActivationPatching()
    score_of = {n: attack.compute(inside_evidence, n)["forget.activation-patching.depth"].value for n in ("target", *HIDDEN)}
    assert score_of["target"] == pytest.approx(0, abs=1e-3)
    assert score_of["uld"] == pytest.approx(0, abs=1e-3)
    retrained = attack.compute(inside_evidence, "retrained 1")["forget.activation-patching.depth"].value
    assert retrained > 0.8 > score_of["npo"]
    assert retrained > score_of["lora"]


def test_models_of_another_shape_are_refused(target, tokenizer, sets):
    other = LanguageAdapter(build("llama-tiny", tokenizer, seed=0, num_hidden_layers=3), tokenizer)
    statements = [f.right for f in facts(target, sets["forget"], range(2), 0)]
    with pytest.raises(InputError, match="one shape"):
        lost_by_patching(target, statements, states_of(other, statements, other.layers(), 512), 512)


# ---- probes and depth


def test_a_probe_finds_a_concept_where_it_is_computed_and_not_before():
    """Four layers; the second computes the XOR of two bits, which no linear probe can read from the bits themselves."""
    rng = np.random.default_rng(0)
    bits = np.array([(i % 2, i // 2 % 2) for i in range(2000)], dtype=float)[rng.permutation(2000)]
    wanted = (bits[:, 0] != bits[:, 1]).astype(np.int64)
    noise = 0.05 * rng.standard_normal((4, 2000, 6))
    layers = [np.pad(bits, ((0, 0), (0, 4)))] * 2 + [np.pad(np.c_[bits, wanted], ((0, 0), (0, 3)))] * 2
    train, test = slice(0, 1200), slice(1200, None)
    shuffled = rng.permutation(wanted[train])

    def accuracy(layer, labels):
        x = layers[layer] + noise[layer]
        return probe(x[train], labels, x[test], wanted[test])[1].mean()

    found = [accuracy(i, wanted[train]) for i in range(4)]
    assert max(found[:2]) < 0.65
    assert min(found[2:]) > 0.95
    assert jumping_point(found) == 2
    assert converging_point(found) == 2
    assert abs(accuracy(3, shuffled) - 0.5) < 0.1
    assert jumping_point([0.5, 0.5]) is None
    assert converging_point([0.9]) == 0


def test_words_that_no_probe_was_trained_on_get_nothing():
    values, right = probe(np.eye(4), np.array([0, 1, 0, 1]), np.eye(4)[:2], np.array([0, 9]))
    assert values[0] > 0.5
    assert (values[1], right[1]) == (0, 0)
    with pytest.raises(InputError, match="not finite"):
        probe(np.full((4, 2), np.nan), np.array([0, 1, 0, 1]), np.zeros((1, 2)), np.array([0]))


def test_shuffled_words_teach_a_probe_nothing(inside_evidence):
    numbers = LinearProbe(minimum=50).compute(inside_evidence, "target")
    assert numbers["forget.linear-probe.accuracy"].value > 0.8
    assert numbers["forget.linear-probe.control"].value < 0.3


def test_too_few_facts_for_a_probe_are_said(inside_evidence):
    assert "2000 retain facts" in LinearProbe(minimum=2000).lacks(inside_evidence, "forget")
    few = {"forget": inside_evidence.sets["forget"], "retain": inside_evidence.sets["retain"][:30]}
    subjects = {"target": inside_evidence.subjects["target"]}
    assert "there are 30" in LinearProbe().lacks(Evidence(subjects, few), "forget")
    assert "retain set" in LinearProbe().lacks(Evidence(subjects, {"forget": few["forget"]}), "forget")


# ---- suppressed and removed


def test_the_suppressed_models_look_forgotten(losses):
    assert losses["target"] < 0.05
    assert all(losses[n] > 3.5 for n in (*HIDDEN, "same start", "retrained 1"))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: f"{a.name}-{getattr(a, 'tokens', '')}")
def test_hidden_states_convict_the_suppressed_and_acquit_the_retrained(attack, inside_evidence):
    assert attack.lacks(inside_evidence, "forget") == ""
    read = [n for n in HIDDEN if n != "uld" or attack.name != "logit-lens"]
    for label in read:
        share, check = judged(attack, inside_evidence, label)
        assert share > 0.2, label
        assert check.outcome in ("knows more", "undecided"), (label, check.text)
    assert judged(attack, inside_evidence, "same start")[1].outcome != "knows more"
    for label in ("retrained 1", "retrained 2"):
        assert judged(attack, inside_evidence, label)[1].outcome != "knows more"


def test_each_suppressed_model_is_convicted_by_an_attack_on_its_states(inside_evidence):
    for label in HIDDEN:
        found = {
            a.name: judged(a, inside_evidence, label)[1].outcome for a in ATTACKS if a.name != "logit-lens" or label != "uld"
        }
        assert "knows more" in found.values(), (label, found)


def test_layers_are_kept_in_the_cache_by_content(inside, small_world, tmp_path, monkeypatch):
    sets = {"forget": small_world.split.forget, "retain": small_world.split.retain}

    def evidence():
        held = {n: Subject(n, inside[n][0], inside[n][1].fingerprint(), inside[n][1]) for n in ("target", "npo")}
        return Evidence(held, sets, Protocol(draws=100), ScoreStore(tmp_path))

    first = LogitLens().arrays(evidence(), "npo", "forget")["layers"]
    monkeypatch.setattr(LogitLens, "measure", None)
    np.testing.assert_array_equal(LogitLens().arrays(evidence(), "npo", "forget")["layers"], first)
    with pytest.raises(TypeError):
        LogitLens(wrong=1).arrays(evidence(), "npo", "forget")


def test_without_wrong_answers_the_answer_itself_is_read(inside_evidence, small_world):
    plain = RecordSet("forget", tuple(Record(r.id, r.answer, r.prompt, subject=r.subject) for r in small_world.split.forget))
    evidence = Evidence(dict(inside_evidence.subjects), {**inside_evidence.sets, "forget": plain}, Protocol(draws=100))
    assert "contrast=false" in LogitLens().lacks(evidence, "forget")
    attack = LogitLens(contrast=False)
    assert attack.lacks(evidence, "forget") == ""
    found = {n: attack.values(evidence, n, "forget").values.mean() for n in ("target", "retrained 1")}
    assert found["target"] > found["retrained 1"] + 1


def test_attacks_without_a_target_say_so(inside_evidence):
    alone = Evidence({"npo": inside_evidence.subjects["npo"]}, inside_evidence.sets)
    assert "target" in TunedLens().lacks(alone, "forget")
    assert "target" in ActivationPatching().lacks(alone, "forget")
    assert LogitLens().lacks(alone, "forget") == ""


# ---- similarity and traces


def test_similarity_does_not_depend_on_the_basis_and_has_a_ceiling(inside_evidence):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 5))
    turn = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    np.testing.assert_allclose(row_agreement(x, 3 * x @ turn + 2), 1)
    assert abs(row_agreement(x, rng.standard_normal((12, 5))).mean()) < 0.6
    attack = RepresentationSimilarity()
    numbers = {n: attack.compute(inside_evidence, n) for n in ("target", "uld", "npo", "retrained 1")}
    key = "forget.representation-similarity"
    assert numbers["target"][key].value == pytest.approx(1)
    assert numbers["uld"][key].value == pytest.approx(1, abs=1e-6)  # it left the target's weights alone
    assert 1 > numbers["npo"][key].value > numbers["retrained 1"][key].value
    assert numbers["target"][f"{key}.cka-target"].value == pytest.approx(1)
    assert numbers["npo"][f"{key}.cka-ceiling"].value < 1
    assert f"{key}.cka-ceiling" not in numbers["retrained 1"]  # one other retrained model is no pair


def test_an_attribution_is_the_loss_without_the_vector(target, sets):
    """The vector with the largest attribution, taken away by half of a hundredth, changes the loss as it says."""
    examples = [target.encode(r) for r in list(sets["forget"])[:4]]
    scores = attributions(target, examples, 8192)
    before = np.mean(mean_losses(target, target.model, examples, 8192))
    for layer, unit in strongest(scores, 2):
        weight = target.model.model.layers[layer].mlp.down_proj.weight
        held = weight.detach().clone()
        with torch.no_grad():
            weight[:, unit] *= 0.98
            after = np.mean(mean_losses(target, target.model, examples, 8192))
            weight.copy_(held)
        assert (after - before) / 0.02 == pytest.approx(float(scores[layer, unit]), rel=0.3)
    assert strongest(torch.tensor([[1.0, 5.0], [7.0, 0.0]]), 2) == [[1, 0], [0, 1]]


def test_noise_on_vectors_is_gone_afterwards(target):
    before = {n: p.detach().clone() for n, p in target.model.named_parameters()}
    with noised(target, [[0, 3]], 5.0, torch.Generator().manual_seed(0)):
        changed = [n for n, p in target.model.named_parameters() if not torch.equal(p, before[n])]
        assert changed == ["model.layers.0.mlp.down_proj.weight"]
        moved = (target.model.model.layers[0].mlp.down_proj.weight - before[changed[0]]).abs().sum(0)
        assert moved.nonzero().squeeze(1).tolist() == [3]
    assert all(torch.equal(p, before[n]) for n, p in target.model.named_parameters())


def test_traces_are_where_they_were_after_gradient_unlearning_and_elsewhere_in_retrained_models(inside_evidence):
    attack = ParametricTraces()
    held = attack.chosen(inside_evidence, "forget")
    assert (held["harm"][:, 0] > held["harm"][:, 1]).any()
    numbers = {n: attack.compute(inside_evidence, n) for n in ("target", "npo", "retrained 1")}
    key = "forget.parametric-traces"
    assert numbers["target"][key].value == pytest.approx(1)
    assert numbers["target"][f"{key}.change"].value == pytest.approx(0, abs=1e-6)
    assert numbers["target"][f"{key}.overlap"].value == pytest.approx(1)
    assert numbers["npo"][key].value > 0.9
    assert abs(numbers["retrained 1"][key].value) < 0.5
    assert numbers["retrained 1"][f"{key}.overlap"].value < numbers["npo"][f"{key}.overlap"].value
    assert jaccard([1, 2, 3], [2, 3, 4]) == 0.5
