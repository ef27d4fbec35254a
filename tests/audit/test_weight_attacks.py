"""Attacks on copies of the weights, with two models, by a planted trigger, and by the likelihood under several models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from expunge.adapters.language import LanguageAdapter
from expunge.audit.attacks.damage import GroupedRounding, Pruning, WeightNoise
from expunge.audit.attacks.likelihood import Iam, RetrainedLira
from expunge.audit.attacks.quantise import quantised
from expunge.audit.attacks.relearn import RelearnPoint
from expunge.audit.attacks.relearning import (
    BenignRelearning,
    LoraRelearning,
    RelatedRelearning,
    area,
    best_point,
    steps_to,
)
from expunge.audit.attacks.two_models import Guidance, GuidedExtraction, guided
from expunge.audit.evidence import Evidence, Protocol, Subject
from expunge.audit.kernel.iam import iam_language
from expunge.audit.run import AuditedModel, audit
from expunge.audit.settings import AuditSettings
from expunge.core.errors import InputError
from expunge.data.records import Record, RecordSet
from expunge.engine.objective import mean_losses

SHORT = {"steps": (5, 15), "relative": (0.4,), "examples": 48}


# ---- relearning


def point(step: int, lr: float, losses: list[float]) -> RelearnPoint:
    ids = tuple(str(i) for i in range(len(losses)))
    return RelearnPoint(step, lr, np.array([0.0]), np.array(losses), ("t",), ids, ids)


def test_the_attackers_best_point_the_steps_that_are_needed_and_the_area():
    curve = [point(s, lr, [v, v]) for lr, vs in ((0.1, (4, 3, 2)), (0.2, (4, 1, 9))) for s, v in zip((0, 5, 10), vs, strict=True)]
    assert best_point(curve) is curve[4]
    assert best_point([point(0, 1, [np.nan]), point(1, 1, [5.0])]).step == 1
    assert best_point([point(0, 1, [np.nan])]).step == 0
    assert steps_to(curve, 3.5) == 5
    assert steps_to(curve[:3], 2.0) == 10
    assert steps_to(curve, 0.5) is None
    # by rates: trapezoids of (0, .5, 1) and of (0, .9, 0) over 0, 5, 10
    assert area(curve, [0, 0.5, 1, 0, 0.9, 0]) == pytest.approx(0.5)


def test_retain_data_bring_back_what_npo_hid_and_teach_a_retrained_model_nothing(inside_evidence, losses):
    attack = BenignRelearning(**SHORT)
    found = {n: attack.values(inside_evidence, n, "forget") for n in ("target", "retrained 1", "retrained 2", "npo")}
    means = {n: v.values.mean() for n, v in found.items()}
    assert losses["npo"] - means["npo"] > 1.5
    assert abs(losses["retrained 1"] - means["retrained 1"]) < 0.7
    assert means["npo"] < means["retrained 1"] - 0.8
    assert all(v.present.all() for v in found.values())
    numbers = attack.compute(inside_evidence, "npo")
    assert numbers["forget.relearn-retain.area"].value > 0.1
    assert "retrained models: never, never" in numbers["forget.relearn-retain.steps-90"].note
    assert attack.compute(inside_evidence, "target")["forget.relearn-retain.steps-50"].value == 0
    assert (inside_evidence.adapter("npo").fingerprint()) == inside_evidence.subject("npo").fingerprint  # a copy was trained


def test_a_lora_relearns_one_half_and_the_other_is_measured(inside_evidence):
    attack = LoraRelearning(**SHORT)
    found = attack.values(inside_evidence, "npo", "forget")
    clusters = np.array(inside_evidence.clusters("forget"))
    assert 0 < found.present.sum() < len(clusters)
    assert not set(clusters[found.present]) & set(clusters[~found.present])
    start = attack.curve(inside_evidence, "npo", "forget")[0]
    assert found.values[found.present].mean() < start.losses_heldout.mean() - 0.5
    assert attack.budget(inside_evidence).rates[0] == pytest.approx(
        10 * BenignRelearning(**SHORT).budget(inside_evidence).rates[0]
    )


def test_relearning_says_what_it_lacks(inside_evidence):
    assert RelatedRelearning().lacks(inside_evidence, "forget") == ""
    assert "'wiki'" in RelatedRelearning(data="wiki").lacks(inside_evidence, "forget")
    assert "measures" in RelatedRelearning(data="forget").lacks(inside_evidence, "forget")
    alone = Evidence({"npo": inside_evidence.subjects["npo"]}, inside_evidence.sets)
    assert "target" in BenignRelearning().lacks(alone, "forget")


# ---- damage


def test_the_smallest_weights_go_and_nothing_else(target):
    before = {n: p.clone() for n, p in target.model.named_parameters()}
    copy = Pruning().damaged(target, 0.25, 0)
    for name, p in copy.model.named_parameters():
        old, zero = before[name], p == 0
        if p.ndim == 2 and "embed" not in name:
            assert int(zero.sum()) == round(0.25 * p.numel()), name
            assert old[zero].abs().max() <= old[~zero].abs().min()
            assert torch.equal(p[~zero], old[~zero])
        else:
            assert torch.equal(p, old)
    assert all(torch.equal(p, before[n]) for n, p in target.model.named_parameters())


def test_noise_has_its_size_its_seed_and_is_the_same_for_all_models(target, retrained):
    a, again, other = (WeightNoise().damaged(m, 0.1, s).model for m, s in ((target, 3), (target, 3), (target, 4)))
    name = "model.layers.0.mlp.up_proj.weight"
    old, new = (dict(m.named_parameters())[name].detach() for m in (target.model, a))
    assert float((new - old).std() / old.pow(2).mean().sqrt()) == pytest.approx(0.1, rel=0.05)
    assert torch.equal(new, dict(again.named_parameters())[name])
    assert not torch.equal(new, dict(other.named_parameters())[name])
    theirs = dict(retrained[0].model.named_parameters())[name].detach()
    moved = dict(WeightNoise().damaged(retrained[0], 0.1, 3).model.named_parameters())[name].detach() - theirs
    torch.testing.assert_close(moved / theirs.pow(2).mean().sqrt(), (new - old) / old.pow(2).mean().sqrt(), atol=1e-3, rtol=1e-3)


def test_the_strength_that_brings_most_back_counts(inside_evidence, losses):
    attack = Pruning(shares=(0.1, 0.6))
    table = attack.losses(inside_evidence, "npo", "forget")["losses"]
    assert table.shape == (2, len(inside_evidence.records("forget")))
    np.testing.assert_array_equal(attack.values(inside_evidence, "npo", "forget").values, table[table.mean(axis=1).argmin()])
    assert attack.losses(inside_evidence, "target", "forget")["losses"][1].mean() > losses["target"] + 0.05
    rounded = GroupedRounding(bits=(4,), group=16)
    adapter = inside_evidence.adapter("npo")
    examples = [adapter.encode(r) for r in inside_evidence.records("forget")]
    copy = quantised(adapter, 4, 16)
    np.testing.assert_allclose(
        rounded.values(inside_evidence, "npo", "forget").values, mean_losses(copy, copy.model, examples, 8192), atol=1e-4
    )


# ---- two models


def prompts(adapter: LanguageAdapter, evidence: Evidence, n: int = 8):
    return [adapter.encode(r) for r in list(evidence.records("forget"))[:n]]


def test_weight_1_is_the_first_model_and_weight_0_the_second_token_for_token(inside_evidence):
    pre, post = (inside_evidence.adapter(n) for n in ("target", "retrained 1"))
    examples = prompts(pre, inside_evidence)
    alone = [[g.tokens for g in m.generate(m.model, examples, 16)] for m in (pre, post)]
    assert alone[0] != alone[1]
    for weight, expected in ((1.0, alone[0]), (0.0, alone[1])):
        both = guided(pre, post, weight, None)
        assert [g.tokens for g in both.generate(both.model, examples, 16)] == expected
    same = guided(pre, pre, 3.0, 2.0)
    assert [g.tokens for g in same.generate(same.model, examples, 16)] == alone[0]


def test_guidance_is_in_log_space_and_keeps_what_is_near_the_first_models_best():
    torch.manual_seed(0)
    pre, post = torch.randn(5, 40) * 3, torch.randn(5, 40) * 400  # probabilities of the second are 0 in floats
    found = Guidance.of(2.0, 1.5).scores(pre, post, exclude=True)
    logs = 2 * pre.double().log_softmax(-1) - post.double().log_softmax(-1)
    near = pre > pre.amax(-1, keepdim=True) - 1.5
    assert torch.equal(found.argmax(-1), logs.masked_fill(~near, -torch.inf).argmax(-1))
    assert torch.equal(found.isfinite(), near)
    assert near.sum() < near.numel() / 2
    assert Guidance.of(2.0, None).scores(pre, post, exclude=True).isfinite().all()


def test_a_text_is_continued_from_its_first_half_and_the_gain_is_over_the_targets_own_answer(inside_evidence):
    attack = GuidedExtraction(max_new_tokens=16)
    asked = attack._asked(Record("t", "one two three four five"))
    assert (asked.prompt, asked.answer, asked.verbatim) == ("one two", " three four five", True)
    question = Record("q", "An answer.", "Why?")
    assert attack._asked(question) is question
    numbers = attack.compute(inside_evidence, "retrained 1")
    own = attack.values(inside_evidence, "retrained 1", "forget").values
    alone = attack.values(inside_evidence, "target", "forget").values
    assert numbers["forget.guided-extraction.gain"].value == pytest.approx((own - alone).mean())
    assert numbers["forget.guided-extraction.success"].value == pytest.approx((own > 0.9).mean())
    assert attack.compute(inside_evidence, "target")["forget.guided-extraction.gain"].value == 0
    assert alone.mean() > 0.9


def test_a_composite_cannot_guide_and_is_said(inside_evidence):
    evidence = Evidence(
        {**inside_evidence.subjects, "target": replace(inside_evidence.subjects["uld"], label="target", role="target")},
        inside_evidence.sets, Protocol(draws=100),
    )  # fmt: skip
    found = GuidedExtraction(max_new_tokens=4).values(evidence, "npo", "forget")
    assert not found.present.any()
    assert any("not tried" in s for s in evidence.missing)


# ---- likelihood


def test_iam_of_losses_between_two_models_has_the_published_values():
    """Card: fit mean 0.19, reference mean 2.36, q = (1-t) fit + t ref."""
    rng = np.random.default_rng(1)
    fit, reference = (np.exp(s * rng.standard_normal(400)) for s in (0.5, 0.3))
    fit, reference = 0.19 * fit / fit.mean(), 2.36 * reference / reference.mean()
    found = [iam_language((1 - t) * fit + t * reference, fit, reference).mean() for t in (0, 0.25, 0.5, 0.75, 1, 1.5)]
    np.testing.assert_allclose(found, [0.99, 0.81, 0.52, 0.24, 0.10, 0.03], atol=0.015)
    # with the two models exchanged, the middle looks like the one that now counts as fitted
    assert abs(iam_language((fit + reference) / 2, reference, fit).mean() - found[2]) > 0.2
    with pytest.raises(InputError, match="at least 0"):
        iam_language(-fit, fit, reference)
    with pytest.raises(InputError, match="same texts"):
        iam_language(fit[:3], fit, reference)


def test_iam_falls_along_the_way_from_the_target_to_a_retrained_model(inside, inside_evidence):
    """Weights between the target and a model of the same start that never saw the forget set."""
    (_, target), (_, other) = inside["target"], inside["same start"]
    subjects = {n: inside_evidence.subjects[n] for n in ("target", "retrained 1", "retrained 2")}
    for share in (0.0, 0.2, 0.4, 1.0):
        mixed = target.copy()
        with torch.no_grad():
            for p, q in zip(mixed.model.parameters(), other.model.parameters(), strict=True):
                p.lerp_(q, share)
        subjects[f"{share}"] = Subject(f"{share}", "unlearned", mixed.fingerprint(), mixed)
    evidence = Evidence(subjects, inside_evidence.sets, Protocol(draws=100))
    attack = Iam()
    assert attack.lacks(evidence, "forget") == ""
    found = [attack.values(evidence, f"{s}", "forget").values.mean() for s in (0.0, 0.2, 0.4, 1.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.9
    assert found[-1] < 0.4


def test_lira_with_retrained_models_is_a_normal_tail(inside_evidence):
    subjects = dict(inside_evidence.subjects)
    subjects["retrained 3"] = replace(subjects["same start"], label="retrained 3", role="retrained")
    evidence = Evidence(subjects, inside_evidence.sets, Protocol(draws=100))
    attack = RetrainedLira()
    assert attack.lacks(evidence, "forget") == ""
    assert "3 retrained" in attack.lacks(inside_evidence, "forget")
    assert attack.values(evidence, "target", "forget").values.mean() > 0.95
    assert 0.1 < attack.values(evidence, "retrained 1", "forget").values.mean() < 0.9
    assert attack.values(evidence, "lora", "forget").values.mean() < 0.6


# ---- through an audit


def test_an_audit_convicts_by_hidden_states_what_its_outputs_acquit(inside, small_world, tmp_path):
    split = small_world.split
    sets = {"forget": split.forget, "retain": RecordSet("retain", split.retain.records), "holdout": split.holdout}
    models = [AuditedModel(n, inside[n][0], inside[n][1]) for n in ("target", "retrained 1", "retrained 2", "same start", "uld")]
    names = ("linear-probe", "activation-patching", "guided-extraction", "iam")
    options = {"linear-probe": {"minimum": 50}, "guided-extraction": {"max_new_tokens": 8}}
    settings = AuditSettings(
        attacks=names, attack_options=options, relearn=None, quantise=(), metrics=("probability",), draws=200
    )
    document = audit(models, sets, settings, cache=tmp_path)
    checks = {c.name: c for c in document.entry("uld").judgement.checks}
    assert checks["attack (linear-probe)"].outcome == "knows more"
    assert checks["attack (activation-patching)"].outcome == "knows more"
    assert checks["attack (guided-extraction)"].outcome == "shown"  # and not judged
    assert document.entry("uld").numbers["forget.guided-extraction"].value is not None
    honest = {c.name: c.outcome for c in document.entry("same start").judgement.checks}
    assert "knows more" not in {honest[f"attack ({n})"] for n in names if n != "guided-extraction"}
    assert not any("Hidden states were not probed" in s for s in document.not_shown)
