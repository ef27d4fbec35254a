"""Sixteen defects of existing toolkits, each a test that fails if this project had it.

Four of them (7, 8, 10 and 11) are also shown of whole benchmarks, in ``tests/benchmarks/test_defects.py``. The last test is the
sum of all: every metric that reads one pass equals the same metric worked out text by text, on twenty records.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from audit_models import Counter

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build
from expunge.audit.attacks.membership import MEMBERSHIP, min_k, min_k_plus_plus, zlib
from expunge.audit.evidence import Evidence, Protocol, Subject, Values
from expunge.audit.gradients import gradient_norms
from expunge.audit.metrics.fluency import degenerate, repetition
from expunge.audit.metrics.forget_quality import ForgetQuality, forget_quality
from expunge.audit.metrics.membership import Membership, PrivLeak, privleak
from expunge.audit.metrics.memorisation import exact_memorisation, extraction_strength
from expunge.audit.metrics.muse import STOPS, knowledge_memorisation, verbatim_memorisation
from expunge.audit.metrics.probability import option_probability
from expunge.audit.metrics.registry import METRICS
from expunge.audit.metrics.rouge import RougeRecall, rouge_l
from expunge.audit.metrics.truth_ratio import TruthRatio, log_truth_ratio, truth_ratio_score
from expunge.audit.run import AuditedModel, audit
from expunge.audit.scores import score, token_statistics
from expunge.audit.settings import AuditSettings
from expunge.audit.verdict import Arrays, judge
from expunge.benchmarks.registry import BENCHMARKS
from expunge.core.errors import InputError
from expunge.core.ranking import auc
from expunge.data.records import Record, RecordSet

torch.set_num_threads(1)


def evidence_of(models: dict, sets, **options) -> Evidence:
    subjects = {n: Subject(n, role, adapter.fingerprint(), adapter) for n, (role, adapter) in models.items()}
    return Evidence(subjects, dict(sets), Protocol(**{"draws": 100, **options}))


def direct(adapter: LanguageAdapter, record: Record, answer: str | None = None) -> dict[str, np.ndarray]:
    """What one unbatched forward pass of the bare model says of every target, in float64; ``ends``: how many are an end token."""
    data = adapter.encode(record, answer=answer).data
    ids = torch.tensor(data.ids[None].astype(np.int64))
    with torch.no_grad():
        logits = adapter.model(input_ids=ids).logits[0].double()[data.start - 1 : -1]
    labels = ids[0, data.start :]
    logp = torch.log_softmax(logits, 1)
    p, own = logp.exp(), logp.gather(1, labels[:, None])[:, 0]
    mean = (p * logp).sum(1)
    return {
        "logp": own.numpy(), "hit": (logits.argmax(1) == labels).numpy(), "mean": mean.numpy(),
        "std": ((p * logp**2).sum(1) - mean**2).clamp(min=0).sqrt().numpy(), "ends": np.array(int(data.ends)),
    }  # fmt: skip


def text(found: dict[str, np.ndarray], name: str) -> np.ndarray:
    """One of these without the end token that was appended."""
    return found[name][: len(found[name]) - int(found["ends"])]


# ---- 1 to 6


def test_defect_01_extraction_strength_has_no_floor_and_misses_no_token():
    """An answer of which nothing follows has strength 0, not 1/T; no token is given away: by search over all prefixes."""
    for size in range(1, 7):
        for hits in itertools.product([False, True], repeat=size):
            shortest = min(k for k in range(size + 1) if all(hits[k:]))
            assert extraction_strength(hits) == pytest.approx(1 - shortest / size)
    assert extraction_strength([False] * 10) == 0
    assert extraction_strength([True] * 9 + [False]) == 0
    assert extraction_strength([False, True]) == 0.5


def test_defect_02_no_real_last_token_is_dropped(target, sets, text_records):
    """Plain text has no end token: its last word counts everywhere; of an answer nothing but the end token is left out."""
    for records in (text_records, RecordSet("forget", sets["forget"].records[:4])):
        found = [direct(target, r) for r in records]
        assert {int(f["ends"]) for f in found} == ({0} if records is text_records else {1})
        evidence = evidence_of({"t": ("target", target)}, {"forget": records})
        expected = {
            "exact-memorisation": [exact_memorisation(text(f, "hit")) for f in found],
            "extraction-strength": [extraction_strength(text(f, "hit")) for f in found],
        }
        for name, values in expected.items():
            np.testing.assert_allclose(METRICS.get(name)().values(evidence, "t", "forget").values, values, atol=1e-6)
        attacks = {
            "min-k": [min_k(text(f, "logp")) for f in found],
            "min-k-plus-plus": [min_k_plus_plus(*(text(f, n) for n in ("logp", "mean", "std"))) for f in found],
        }
        for name, values in attacks.items():
            np.testing.assert_allclose(MEMBERSHIP.get(name)().values(evidence, "t", "forget").values, values, atol=2e-4)
    examples = [target.encode(r) for r in text_records]
    for example, norm in zip(examples, gradient_norms(target, examples), strict=True):
        ids = torch.tensor(example.data.ids[None].astype(np.int64))
        logits = target.model(input_ids=ids).logits[0, example.data.start - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, example.data.start :])
        parts = torch.autograd.grad(loss, list(target.model.parameters()))
        assert norm == pytest.approx(math.sqrt(sum(float(g.double().square().sum()) for g in parts)), rel=1e-3)


def test_defect_03_which_mean_the_truth_ratio_takes_is_a_setting_that_is_written_down(target, sets):
    record = sets["forget"][0]
    right = -float(direct(target, record, record.paraphrase)["logp"].mean())
    wrong = np.array([-float(direct(target, record, w)["logp"].mean()) for w in record.perturbed])
    evidence = evidence_of({"t": ("target", target)}, sets)
    means = {
        "geometric": right - wrong.mean(),
        "arithmetic": math.log(np.exp(-wrong).mean() / math.exp(-right)),
    }
    assert abs(means["geometric"] - means["arithmetic"]) > 1e-3
    for mean, expected in means.items():
        assert TruthRatio(mean=mean).log_ratios(evidence, "t", "forget").values[0] == pytest.approx(expected, abs=2e-4)
        settings = AuditSettings.quick(metrics=("truth-ratio",), options={"truth-ratio": {"mean": mean}}, draws=100)
        document = audit([AuditedModel("t", "target", target)], {"forget": sets["forget"]}, settings)
        assert document.protocol["metrics"]["truth-ratio"]["mean"] == mean


def test_defect_04_how_many_items_forget_quality_rests_on_is_chosen_and_told(target, retrained, sets):
    kind = BENCHMARKS.get("tofu")
    for items in (300, 400):
        assert kind(split="forget10", items=items).sources()["forget_scored"].rows == items
    with pytest.raises(InputError):
        kind(split="forget10", items=350)
    evidence = evidence_of({"t": ("target", target), "r": ("retrained", retrained[0])}, sets)
    number = ForgetQuality().compute(evidence, "t")["forget-quality"]
    assert number.n == len(sets["forget"])
    assert f"at n = {number.n}" in number.note


def test_defect_05_standard_deviations_of_half_precision_scores_are_those_of_float32(target, sets):
    """Scores are cast once, before the softmax: no term of Min-K%++ is computed in bfloat16, none fails to be converted."""
    half = target.copy()
    half.model = half.model.to(torch.bfloat16)
    records = sets["forget"].records[:6]
    evidence = evidence_of({"t": ("target", half)}, {"forget": RecordSet("forget", records)})
    values = MEMBERSHIP.get("min-k-plus-plus")().values(evidence, "t", "forget").values
    for record, value in zip(records, values, strict=True):
        found = direct(half, record)  # float64 from the model's own bfloat16 scores
        assert value == pytest.approx(min_k_plus_plus(*(text(found, n) for n in ("logp", "mean", "std"))), rel=0.05, abs=0.05)
    logits = torch.randn(200, 400, generator=torch.Generator().manual_seed(0)).mul(3).to(torch.bfloat16)
    exact, rough = torch.log_softmax(logits.double(), 1), torch.log_softmax(logits, 1)
    sigma = [((x.exp() * x**2).sum(1) - (x.exp() * x).sum(1) ** 2).double().clamp(min=0).sqrt() for x in (exact, rough)]
    ours = token_statistics(logits, torch.zeros(200, dtype=torch.int64))["std_logp"].double()
    assert float((ours - sigma[0]).abs().max()) < 1e-3
    assert float((sigma[1] - sigma[0]).abs().max()) > 50 * float((ours - sigma[0]).abs().max())


def test_defect_06_an_answer_without_tokens_is_left_out_and_not_the_most_member_like(target, sets):
    nothing = Record("nothing", "", sets["forget"][0].prompt, subject="nobody", verbatim=True)
    for function in (min_k, lambda v: min_k_plus_plus(v, v, v)):
        with pytest.raises(InputError, match="leave it out"):
            function([])
    records = RecordSet("forget", (*sets["forget"], nothing))
    evidence = evidence_of({"t": ("target", target)}, {"forget": records, "holdout": sets["holdout"]})
    for name in ("min-k", "min-k-plus-plus"):
        found = MEMBERSHIP.get(name)(end="exclude").values(evidence, "t", "forget")
        assert found.present.tolist() == [True] * len(sets["forget"]) + [False]
        assert math.isnan(found.values[-1])
    for name in ("exact-memorisation", "extraction-strength"):
        found = METRICS.get(name)().values(evidence, "t", "forget")
        assert not found.present[-1]
        assert "1 of 13 records have no value" in METRICS.get(name)().compute(evidence, "t")[f"forget.{name}"].note


# ---- 7 to 11


def test_defect_07_no_constant_stands_in_for_a_retrained_model(target, sets):
    evidence = evidence_of({"t": ("target", target)}, sets)
    assert PrivLeak(attacks=("loss",)).compute(evidence, "t") == {}
    assert ForgetQuality().compute(evidence, "t") == {}
    said = " ".join(evidence.missing)
    assert said.count("another retrained model") == 2
    assert privleak(0.8, 0.5) != pytest.approx(privleak(0.8, 0.4))  # what it would be with a constant instead


def test_defect_08_what_is_compared_is_of_the_same_items_precision_and_tokenizer(target, retrained, sets):
    """Nothing is matched by the name of a metric: keys are contents, and a verdict refuses other examples."""
    half = target.copy()
    half.model = half.model.to(torch.bfloat16)
    models = [AuditedModel("target", "target", target), AuditedModel("half", "retrained", half)]
    with pytest.raises(InputError, match="precision"):
        audit(models, {"forget": sets["forget"]}, AuditSettings.quick(draws=100))
    arrays = [Arrays(str(i), ids=ids, clusters=["a", "b"], nll=np.ones(2)) for i, ids in enumerate((["x", "y"], ["x", "z"]))]
    with pytest.raises(InputError, match="same forget examples"):
        judge(arrays[0], [arrays[1]], arrays[0])
    other = LanguageAdapter(target.model, target.tokenizer, template="Q: {prompt} A: {answer}")
    assert other.fingerprint() != target.fingerprint()


def test_defect_09_a_record_that_is_left_out_takes_no_others_value_with_it(target, sets):
    """Ids and values stay in step: the remaining records have the values that they have among all."""
    full = evidence_of({"t": ("target", target)}, sets)
    cut = {1: {"paraphrase": ""}, 4: {"perturbed": ()}, 9: {"paraphrase": "", "perturbed": ()}}
    rows = tuple(replace(r, **cut.get(i, {})) for i, r in enumerate(sets["forget"]))
    part = evidence_of({"t": ("target", target)}, {**sets, "forget": RecordSet("forget", rows)})
    every, left = (TruthRatio().values(e, "t", "forget") for e in (full, part))
    assert [i for i, p in enumerate(left.present) if not p] == [1, 4, 9]
    np.testing.assert_allclose(left.values[left.present], every.values[left.present], atol=1e-5)
    number = TruthRatio().compute(part, "t")["forget.truth-ratio"]
    assert number.n == len(rows) - 3
    assert number.value == pytest.approx(every.values[left.present].mean(), abs=1e-5)
    assert "3 of 12 records have no value" in number.note


def test_defect_10_metrics_hold_nothing_of_what_they_have_measured(target, retrained, sets):
    """Metrics are values without state: equal settings are equal objects, and nothing is registered on them."""
    for kind in (METRICS.get(n) for n in METRICS.names()):
        assert kind() == kind()
        assert kind() is not kind()
        with pytest.raises((TypeError, ValueError, AttributeError)):
            kind().name_of_a_sub_metric = {}
    one, two = TruthRatio(mean="geometric"), TruthRatio(mean="arithmetic")
    evidence = evidence_of({"t": ("target", target)}, sets)
    first = one.compute(evidence, "t")
    assert two.compute(evidence, "t") != first
    assert one.compute(evidence_of({"t": ("target", target)}, sets), "t") == first


def test_defect_11_every_score_of_a_text_is_read_from_one_pass(target, sets):
    attacks = ("loss", "zlib", "min-k", "min-k-plus-plus")
    evidence = evidence_of({"t": ("target", target)}, sets)
    with Counter(target.model) as counted:
        found = Membership(attacks=attacks).compute(evidence, "t")
        for name in ("loss", "probability", "exact-memorisation", "extraction-strength"):
            METRICS.get(name)().values(evidence, "t", "forget")
    assert {f"membership.{a}" for a in attacks} <= set(found)
    assert counted.rows == len(sets["forget"]) + len(sets["holdout"])


# ---- 12 to 16


def test_defect_12_the_gradient_norm_is_one_norm_without_dropout(sets, tokenizer):
    adapter = LanguageAdapter(
        build("gpt2-tiny", tokenizer, 0, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), tokenizer, dropout=True
    )
    adapter.model.train()
    example = adapter.encode(sets["forget"][0])
    first, second = (gradient_norms(adapter, [example])[0] for _ in range(2))
    assert first == second
    assert adapter.model.training
    adapter.model.eval()
    batch = adapter.collate([example])
    with torch.enable_grad():
        loss = adapter.forward(adapter.model, batch, frozenset({"losses"})).losses.mean()
        norms = [float(g.norm()) for g in torch.autograd.grad(loss, list(adapter.model.parameters()))]
    assert first == pytest.approx(math.sqrt(sum(n**2 for n in norms)), rel=1e-4)
    assert first > 2 * np.mean(norms)


def test_defect_13_losses_are_divided_by_the_targets_that_have_one(target, text_records, sets):
    """A first token is predicted by nothing and is no target: the number of labels before a shift counts for nothing."""
    examples = [target.encode(r) for r in (*text_records, *sets["forget"].records[:3])]
    losses = score(target, examples).nll()
    for example, found in zip(examples, losses, strict=True):
        ids = torch.tensor(example.data.ids[None].astype(np.int64))
        with torch.no_grad():
            logp = torch.log_softmax(target.model(input_ids=ids).logits[0, :-1].double(), 1)
        own = logp.gather(1, ids[0, 1:, None])[example.data.start - 1 :, 0]
        assert example.data.start >= 1
        assert example.n_targets == len(own) <= len(example.data.ids) - 1
        assert found == pytest.approx(-float(own.sum()) / len(own), abs=1e-4)


def test_defect_14_members_and_strangers_are_asked_in_the_same_form(target, retrained, sets, monkeypatch):
    """Both sides of every membership attack read the answers to the records' own questions, whatever else is asked."""
    seen: dict[str, set[str]] = {}
    plain = Evidence.scores

    def noted(self, label, name, kind="answer"):
        seen.setdefault(name, set()).add(kind)
        return plain(self, label, name, kind)

    monkeypatch.setattr(Evidence, "scores", noted)
    models = {"t": ("target", target), "r": ("retrained", retrained[0])}
    evidence = evidence_of(models, sets)
    for metric in (Membership(gradient_examples=4), PrivLeak(gradient_examples=4)):
        metric.compute(evidence, "t")
    assert seen == {"forget": {"answer"}, "holdout": {"answer"}}
    asked = [r.question_paraphrase for r in sets["forget"]]
    assert all(asked)  # there is another form that could have been taken
    assert not any("paraphrase" in field for field in Membership.model_fields)


def test_defect_15_gold_and_answer_are_never_found_by_cutting_a_prompt_out_of_a_text(target, sets, monkeypatch):
    """Where the prompt stands in the answer again, the gold text is the whole answer, and what is made is what was made."""
    prompt = sets["forget"][0].prompt
    record = Record("again", f"{prompt} {sets['forget'][0].answer}", prompt, subject="s")
    evidence = evidence_of({"t": ("target", target)}, {"forget": RecordSet("forget", (record, sets["forget"][1]))})
    monkeypatch.setattr("expunge.audit.metrics.rouge.answers", lambda *_, **__: [record.answer, ""])
    assert RougeRecall().per_record(evidence, "t", "forget").values[0] == 1.0
    monkeypatch.setattr("expunge.audit.metrics.rouge.answers", lambda *_, **__: [sets["forget"][0].answer, ""])
    assert RougeRecall().per_record(evidence, "t", "forget").values[0] < 1.0
    example = target.encode(record)
    (made,) = target.generate(target.model, [example], 6)
    ids = torch.tensor(example.data.ids[None, : example.data.start].astype(np.int64))
    with torch.no_grad():
        whole = target.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    assert list(made.tokens) == whole[: len(made.tokens)]
    assert made.text == target.decode(made.tokens)


def test_defect_16_broken_text_is_told_without_a_classifier_and_to_its_end():
    """Nothing is downloaded, and a loop that begins after thirty-two tokens is seen."""
    prose = " ".join(f"word{i}" for i in range(40))
    assert not degenerate(prose)
    assert degenerate(prose + " and so on and so on" * 30)
    assert repetition(prose) == 0 < repetition(prose + " and so on and so on" * 30)
    assert METRICS.get("fluency")().max_new_tokens >= 200


# ---- what must hold of one pass


def test_every_view_of_one_pass_equals_the_metric_worked_out_alone(target, retrained, sets):
    """On twenty records, each text in a forward pass of its own, in float64; answers one by one."""
    forget = RecordSet("forget", (*sets["forget"], *sets["retain"].records[:8]))
    assert len(forget) == 20
    held = {"forget": forget, "holdout": sets["holdout"], "retain": sets["retain"]}
    models = {"t": ("target", target), "r": ("retrained", retrained[0])}
    evidence = evidence_of(models, held)
    one = {n: {r.id: direct(a, r) for s in (forget, sets["holdout"]) for r in s} for n, (_, a) in models.items()}
    own, other = ([one[n][r.id] for r in forget] for n in ("t", "r"))
    nll = np.array([-f["logp"].mean() for f in own])
    wrong = [np.array([-direct(target, r, w)["logp"].mean() for w in r.perturbed]) for r in forget]
    right = np.array([-direct(target, r, r.paraphrase)["logp"].mean() for r in forget])
    ratios = np.array([log_truth_ratio(a, b) for a, b in zip(right, wrong, strict=True)])
    made = [target.generate(target.model, [target.encode(r)], 200)[0] for r in forget]
    short = {n: [target.generate(target.model, [target.encode(r)], n)[0].text for r in forget] for n in (32, 128)}
    known = [next(t for t in (s, *(s.split(x)[0] for x in STOPS if x in s))) for s in short[32]]
    expected = {
        "loss": nll,
        "probability": np.exp(-nll),
        "option-probability": [option_probability(a, b) for a, b in zip(nll, wrong, strict=True)],
        "truth-ratio": truth_ratio_score(np.exp(ratios), "forget"),
        "exact-memorisation": [exact_memorisation(text(f, "hit")) for f in own],
        "extraction-strength": [extraction_strength(text(f, "hit")) for f in own],
        "rouge-l-recall": [rouge_l(g.text, r.answer) for g, r in zip(made, forget, strict=True)],
        "knowledge-memorisation": [knowledge_memorisation(t, r.answer) for t, r in zip(known, forget, strict=True)],
        "verbatim-memorisation": [verbatim_memorisation(t, r.answer) for t, r in zip(short[128], forget, strict=True)],
    }
    for name, values in expected.items():
        found: Values = METRICS.get(name)().per_record(evidence, "t", "forget")
        assert found.present.all(), name
        np.testing.assert_allclose(found.values, values, atol=3e-4, err_msg=name)
    rows = {n: [one["t"][r.id] for r in held[n]] for n in ("forget", "holdout")}
    answers = {n: [r.answer for r in held[n]] for n in rows}
    scores = {
        "loss": lambda f, _: -f["logp"].mean(),
        "zlib": lambda f, a: zlib(f["logp"], a),
        "min-k": lambda f, _: min_k(text(f, "logp")),
        "min-k-plus-plus": lambda f, _: min_k_plus_plus(*(text(f, n) for n in ("logp", "mean", "std"))),
    }
    numbers = Membership(attacks=tuple(scores)).compute(evidence, "t")
    for name, function in scores.items():
        sides = {n: np.array([function(f, a) for f, a in zip(rows[n], answers[n], strict=True)]) for n in rows}
        for n, values in sides.items():
            np.testing.assert_allclose(MEMBERSHIP.get(name)().values(evidence, "t", n).values, values, atol=3e-4, err_msg=name)
        assert numbers[f"membership.{name}"].value == pytest.approx(auc(sides["holdout"], sides["forget"]), abs=0.01)
    theirs = np.array([-f["logp"].mean() for f in other])
    sides = [np.array([-one["r"][r.id]["logp"].mean() for r in held["holdout"]]), theirs]
    leak = PrivLeak(attacks=("loss",)).compute(evidence, "t")["privleak.loss"].value
    assert leak == pytest.approx(privleak(numbers["membership.loss"].value, auc(*sides)), abs=1.0)
    wrong_other = [np.array([-direct(retrained[0], r, w)["logp"].mean() for w in r.perturbed]) for r in forget]
    right_other = [-direct(retrained[0], r, r.paraphrase)["logp"].mean() for r in forget]
    ratios_other = [log_truth_ratio(a, b) for a, b in zip(right_other, wrong_other, strict=True)]
    found = ForgetQuality().compute(evidence, "t")["forget-quality"].value
    assert found == pytest.approx(forget_quality(ratios, ratios_other).pvalue, rel=1e-6)
