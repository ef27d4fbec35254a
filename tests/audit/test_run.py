from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from audit_models import Counter, make, teach

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.words import word_tokenizer
from expunge.audit.document import AuditDocument
from expunge.audit.evidence import Evidence, Protocol, Subject, Values
from expunge.audit.metrics.registry import METRICS, Metric, mean_number, widened
from expunge.audit.metrics.rouge import rouge_l
from expunge.audit.metrics.truth_ratio import TruthRatio, truth_ratio
from expunge.audit.pictures import spread, thinned
from expunge.audit.run import AuditedModel, audit
from expunge.audit.scores import score
from expunge.audit.settings import AuditSettings
from expunge.core.errors import InputError
from expunge.core.results import Direction, Verdict
from expunge.core.statistics import auc, harmonic_mean
from expunge.data.records import Record, RecordSet


@pytest.fixture(scope="module")
def models(target, retrained, fresh):
    return [
        AuditedModel("target", "target", target),
        AuditedModel("broken", "unlearned", fresh, method="none", cost={"seconds": 1.0}, stopped="never started"),
        AuditedModel("retrained 1", "retrained", retrained[0], seed=1),
        AuditedModel("retrained 2", "retrained", retrained[1], seed=2),
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("scores")


@pytest.fixture(scope="module")
def document(models, sets, cache) -> AuditDocument:
    return audit(models, sets, AuditSettings(relearn={"steps": (1, 5)}), cache=cache, title="four models")


def evidence_of(adapters: dict, sets, **options) -> Evidence:
    subjects = {n: Subject(n, role, adapter.fingerprint(), adapter) for n, (role, adapter) in adapters.items()}
    return Evidence(subjects, dict(sets), Protocol(draws=200, **options))


# ---- the document ----------------------------------------------------------------------------------------------------


def test_the_document_holds_everything_and_is_json(document, sets):
    text = document.model_dump_json()
    assert AuditDocument.model_validate_json(text) == document
    json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert [m.label for m in document.models] == ["target", "broken", "retrained 1", "retrained 2"]
    assert {s: d["records"] for s, d in document.data.items()} == {n: len(r) for n, r in sets.items()}
    assert {c.name for c in document.curves} >= {"relearn", "roc.loss", "roc.min-k", "roc.gradient-norm"}
    assert len([s for s in document.samples if s.set == "forget"]) == 6
    assert len([s for s in document.samples if s.set == "retain"]) == 3
    assert all(set(s.answers) == {"target", "broken", "retrained 1", "retrained 2"} for s in document.samples)
    assert document.entry("broken").stopped == "never started"
    assert document.signature["precision"] == "float32"
    usual = {n for n, kind in METRICS.items() if kind.offers <= LanguageAdapter.offers and not kind.on_request}
    assert set(document.protocol["metrics"]) == usual


def test_every_number_is_complete(document):
    for model in document.models:
        assert len(model.numbers) > 40
        for key, number in model.numbers.items():
            assert number.n > 0, key
            assert number.clusters > 0, key
            if number.value is None:
                assert number.flags, key
                continue
            low, high = number.range
            assert low is None or number.value >= low - 1e-9, key
            assert high is None or number.value <= high + 1e-9, key
            if number.over == "examples":
                assert number.low is not None, key
                assert number.low - 1e-9 <= number.value <= number.high + 1e-9, key


def test_directions_follow_the_set(document):
    numbers = document.entry("target").numbers
    assert numbers["forget.probability"].direction == Direction.FORGET_DOWN
    assert numbers["retain.probability"].direction == Direction.UTILITY_UP
    assert numbers["holdout.probability"].direction == Direction.REFERENCE
    assert numbers["retain.loss"].direction == Direction.UTILITY_DOWN
    assert numbers["forget.loss"].direction == Direction.REFERENCE


def test_the_target_knows_what_retrained_models_do_not(document):
    target, other = document.entry("target").numbers, document.entry("retrained 1").numbers
    for key in ("forget.probability", "forget.rouge-l-recall", "forget.extraction-strength", "forget.exact-memorisation"):
        assert target[key].value > other[key].value + 0.2, key
    assert target["membership.loss"].value > 0.9 > other["membership.loss"].value
    assert target["privleak.min-k"].value < -50  # under-unlearned is negative
    assert target["forget-quality"].value < other["forget-quality"].value
    assert target["forget-quality.log10-p"].value < -2
    assert abs(other["retain.probability"].value - target["retain.probability"].value) < 0.1


def test_verdicts(document):
    verdicts = {m.label: m.judgement.verdict for m in document.models}
    assert verdicts["target"] == Verdict.NOT_FORGOTTEN
    assert verdicts["broken"] == Verdict.DAMAGED
    # Three persons and two retrained models are thin evidence: what must not happen is a conviction.
    assert {verdicts["retrained 1"], verdicts["retrained 2"]} <= {Verdict.FORGOTTEN, Verdict.UNDECIDED}


def test_what_is_missing_is_said(document):
    said = " ".join(document.not_shown)
    assert "6 of TOFU's 9 components" in said
    assert "Prompt attacks" in said
    number = document.entry("target").numbers["membership.loss.tpr-at-1"]
    assert number.value is None
    assert "too few" in number.flags[0]
    assert "too few" in document.entry("target").numbers["forget-quality"].flags[0]


def test_a_second_audit_touches_no_model(models, sets, cache, document):
    with Counter(models[0].adapter.model) as a, Counter(models[1].adapter.model) as b, Counter(models[2].adapter.model) as c:
        again = audit(models, sets, AuditSettings(relearn={"steps": (1, 5)}), cache=cache, title="four models")
    assert a.passes == b.passes == c.passes == 0
    same = {"created", "cost"}
    assert again.model_dump(exclude=same) == document.model_dump(exclude=same)


def test_a_new_method_costs_only_its_own_passes(models, sets, cache, tokenizer, document):
    other = teach(make(tokenizer, 5), sets["retain"], steps=3)
    with Counter(models[0].adapter.model) as target, Counter(other.model) as own:
        audit([*models[:1], *models[2:], AuditedModel("new", "unlearned", other)], sets, AuditSettings.quick(), cache=cache)
    assert target.passes == 0
    # One row per unique text, then generation: the prompts of three sets, of at most 200 tokens.
    texts = sum(len(r) + sum(bool(x.paraphrase) + len(x.perturbed) for x in r) for r in sets.values())
    prompts = sum(len(r) for n, r in sets.items() if n != "holdout")
    assert texts <= own.rows <= texts + prompts * 200


def test_models_are_loaded_one_at_a_time(models, sets, tmp_path):
    import gc
    import weakref

    alive: list[weakref.ref] = []

    def loader(source):
        def load():
            gc.collect()
            assert not any(ref() for ref in alive)
            copy = source.copy()
            alive.append(weakref.ref(copy))
            return copy

        return load

    lazy = [dataclasses.replace(m, adapter=loader(m.adapter)) for m in models]
    settings = AuditSettings.quick(draws=100)
    found = audit(lazy, sets, settings, cache=tmp_path)
    assert len(alive) <= 2 * len(models)
    direct = audit(models, sets, settings)
    skip = {"created", "cost"}
    assert found.model_dump(exclude=skip) == direct.model_dump(exclude=skip)


# ---- numbers against a direct computation ------------------------------------------------------------------------------


def losses(adapter, record: Record, answer: str) -> torch.Tensor:
    """Per-token log-probabilities by the bare model, one text at a time."""
    data = adapter.encode(record, answer=answer).data
    ids = torch.tensor(data.ids[None].astype(np.int64))
    with torch.no_grad():
        logp = torch.log_softmax(adapter.model(input_ids=ids).logits[0, :-1].double(), 1)
    return logp.gather(1, ids[0, 1:, None]).squeeze(1)[data.start - 1 :]


def test_metrics_equal_a_computation_text_by_text(document, sets, target, retrained):
    numbers = document.entry("target").numbers
    direct: dict[str, float] = {}
    forget, holdout = sets["forget"], sets["holdout"]
    own = {r.id: losses(target, r, r.answer) for r in (*forget, *holdout)}
    direct["forget.probability"] = float(np.mean([math.exp(own[r.id].mean()) for r in forget]))
    ratios = []
    for r in forget:
        wrong = [-float(losses(target, r, w).mean()) for w in r.perturbed]
        ratios.append(truth_ratio(-float(losses(target, r, r.paraphrase).mean()), wrong))
    direct["forget.truth-ratio"] = float(np.mean([min(x, 1 / x) for x in ratios]))
    made = [target.generate(target.model, [target.encode(r)], 200)[0].text for r in forget]
    direct["forget.rouge-l-recall"] = float(np.mean([rouge_l(t, r.answer) for t, r in zip(made, forget, strict=True)]))
    direct["membership.loss"] = auc([-float(own[r.id].mean()) for r in holdout], [-float(own[r.id].mean()) for r in forget])
    lowest = {k: -float(v[:-1].sort().values[: max(1, int(0.4 * (len(v) - 1)))].mean()) for k, v in own.items()}
    direct["membership.min-k"] = auc([lowest[r.id] for r in holdout], [lowest[r.id] for r in forget])
    for key, value in direct.items():
        assert numbers[key].value == pytest.approx(value, abs=2e-4), key
    parts = ["retain.probability", "retain.rouge-l-recall", "retain.truth-ratio"]
    parts += ["world-facts.option-probability", "world-facts.rouge-l-recall", "world-facts.truth-ratio"]
    assert numbers["model-utility"].value == pytest.approx(harmonic_mean([numbers[p].value for p in parts]))
    other = [-float(losses(retrained[0], r, r.answer).mean()) for r in forget]
    assert document.entry("retrained 1").numbers["forget.loss"].value == pytest.approx(np.mean(other), abs=2e-4)


def test_a_model_is_never_its_own_gold_standard(sets, target, retrained):
    evidence = evidence_of({"t": ("target", target), "a": ("retrained", retrained[0]), "b": ("retrained", retrained[0])}, sets)
    assert evidence.labels("retrained", but="t") == ["a", "b"]
    assert evidence.labels("retrained", but="a") == []  # b has the same weights
    quality = METRICS.get("forget-quality")()
    assert quality.compute(evidence, "t")["forget-quality"].value < 0.5
    assert quality.compute(evidence, "a") == {}
    assert any("another retrained model" in m for m in evidence.missing)


def test_over_unlearning_is_flagged(sets, target, retrained, tokenizer):
    """A model pushed up on the forget set only: the attack tells the sets apart the wrong way round."""
    pushed = target.copy()
    batch = pushed.collate([pushed.encode(r) for r in sets["forget"]])
    optimiser = torch.optim.AdamW(pushed.model.parameters(), lr=2e-3)
    for _ in range(25):
        loss = -pushed.forward(pushed.model, batch, frozenset({"losses"})).losses.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    evidence = evidence_of({"u": ("unlearned", pushed), "r": ("retrained", retrained[0])}, sets)
    options = {"attacks": ("loss",)}
    number = METRICS.get("membership")(**options).compute(evidence, "u")["membership.loss"]
    assert number.value < 0.25
    assert "over-unlearned, not private" in number.flags[0]
    calm = METRICS.get("membership")(**options).compute(evidence, "r")["membership.loss"]
    assert not any("over-unlearned" in flag for flag in calm.flags)
    assert METRICS.get("privleak")(**options).compute(evidence, "u")["privleak.loss"].value > 30


def test_a_broken_model_is_flagged_not_averaged_away(sets, target):
    broken = target.copy()
    with torch.no_grad():
        for p in broken.model.model.layers[1].parameters():
            p.fill_(float("nan"))
    evidence = evidence_of({"x": ("unlearned", broken)}, sets)
    for name in ("loss", "probability", "truth-ratio"):
        number = METRICS.get(name)().compute(evidence, "x")[f"forget.{name}"]
        assert number.value is None
        assert "not a finite number" in number.flags[0]
    number = METRICS.get("membership")(attacks=("loss",)).compute(evidence, "x")["membership.loss"]
    assert number.value is None


# ---- missing data ------------------------------------------------------------------------------------------------------


def test_records_without_paraphrases_are_said_not_zero(sets, target):
    bare = RecordSet("forget", tuple(dataclasses.replace(r, paraphrase="", perturbed=()) for r in sets["forget"]))
    mixed = RecordSet(
        "retain", tuple(dataclasses.replace(r, paraphrase="") if i % 2 else r for i, r in enumerate(sets["retain"]))
    )
    found = audit([AuditedModel("t", "target", target)], {"forget": bare, "retain": mixed}, AuditSettings.quick(draws=100))
    numbers = found.models[0].numbers
    assert "forget.truth-ratio" not in numbers
    assert "forget.option-probability" not in numbers
    assert numbers["retain.truth-ratio"].n == len([r for r in mixed if r.paraphrase])
    assert "left out" in numbers["retain.truth-ratio"].note
    said = " ".join(found.not_shown)
    for sentence in (
        "needs paraphrased answers and perturbed",
        "no holdout set",
        "no retrained model",
        "Relearning was not",
    ):
        assert sentence in said.replace("it needs", "needs"), sentence
    assert found.models[0].judgement.verdict == Verdict.NO_GOLD


def test_plain_text_is_audited_by_what_fits_it(text_records, tokenizer):
    adapter = teach(make(word_tokenizer([r.answer for r in text_records]), 0), text_records, steps=80, rate=5e-3)
    found = audit([AuditedModel("t", "target", adapter)], {"forget": text_records}, AuditSettings.quick(draws=100))
    numbers = found.models[0].numbers
    assert numbers["forget.verbatim-memorisation"].value > 80  # it has the texts by heart
    assert numbers["forget.extraction-strength"].value > 0.5
    assert "forget.rouge-l-recall" not in numbers
    assert "model-utility" not in numbers
    assert any("plain text" in s for s in found.not_shown)


def test_scripts_that_rouge_cannot_read_are_left_out_and_said(sets, target):
    odd = [dataclasses.replace(r, answer="東京") if i < 3 else r for i, r in enumerate(sets["forget"])]
    tokenizer = pytest.importorskip("expunge.adapters.words").word_tokenizer(
        [r.prompt + r.answer for r in odd] + ["Question: Answer:\n"]
    )
    adapter = make(tokenizer)
    found = audit(
        [AuditedModel("t", "target", adapter)], {"forget": RecordSet("forget", tuple(odd))},
        AuditSettings(metrics=("rouge-l-recall",), relearn=None, quantise=(), draws=100),
    )  # fmt: skip
    number = found.models[0].numbers["forget.rouge-l-recall"]
    assert number.n == len(odd) - 3
    assert "3 of" in number.note


# ---- settings and small parts ------------------------------------------------------------------------------------------


def test_a_budget_keeps_whole_persons(sets, target):
    settings = AuditSettings(metrics=("loss",), budget=9, relearn=None, quantise=(), draws=100)
    found = audit([AuditedModel("t", "target", target)], sets, settings)
    assert found.data["retain"]["records"] == 8
    assert found.data["retain"]["of"] == len(sets["retain"])
    assert found.data["retain"]["clusters"] == 2


@pytest.mark.parametrize(
    ("make_call", "message"),
    [
        (lambda t, s: audit([], s), "no model"),
        (lambda t, s: audit([AuditedModel("a", "target", t)] * 2, s), "Two audited models"),
        (lambda t, s: audit([AuditedModel("a", "target", t)], {"retain": s["retain"]}), "needs a forget set"),
        (lambda t, s: audit([AuditedModel("a", "target", t)], {"forget": RecordSet("forget", ())}), "is empty"),
        (lambda t, s: AuditSettings(metrics=("probabilty",)), "probability"),
        (lambda t, s: AuditSettings(options={"truth-ratio": {"mean": "median"}}), "mean"),
        (lambda t, s: AuditSettings(options={"membership": {"attacks": ("los",)}}), "loss"),
        (lambda t, s: AuditSettings(metrics=("loss",), options={"truth-ratio": {}}).chosen(), "truth-ratio"),
        (lambda t, s: AuditSettings(quantise=(1,)), "quantise"),
    ],
)  # fmt: skip
def test_bad_input_is_explained(make_call, message, target, sets):
    with pytest.raises(InputError, match=message):
        make_call(target, sets)


def test_models_of_different_precision_are_not_compared(target, retrained, sets):
    half = retrained[0].copy()
    half.model = half.model.to(torch.bfloat16)
    with pytest.raises(InputError, match="precision"):
        audit([AuditedModel("t", "target", target), AuditedModel("r", "retrained", half)], sets, AuditSettings.quick())


def test_both_means_of_the_truth_ratio_reach_the_numbers(sets, target):
    evidence = evidence_of({"t": ("target", target)}, sets)
    both = [TruthRatio(mean=m).log_ratios(evidence, "t", "forget").values for m in ("geometric", "arithmetic")]
    assert (both[1] >= both[0]).all()
    assert (both[1] > both[0]).any()


def test_shots_come_from_other_subjects_of_the_retain_set(sets, target):
    evidence = evidence_of({"t": ("target", target)}, sets, max_new_tokens=8)
    metric = METRICS.get("knowledge-memorisation")(shots=2)
    examples = metric._prompted(target, evidence, "retain")
    text = target.tokenizer.decode(examples[0].data.ids[: examples[0].data.start])
    record = sets["retain"][0]
    shown = [r for r in sets["retain"] if r.prompt in text and r.id != record.id]
    assert len(shown) == 2
    assert all(r.cluster != record.cluster for r in shown)
    assert text.rstrip().endswith(f"Question: {record.prompt}\nAnswer:")
    assert not any(r.prompt in text for r in sets["forget"])
    assert metric.compute(evidence, "t").keys() == {"forget.knowledge-memorisation", "retain.knowledge-memorisation"}


def test_equal_values_at_an_end_of_the_range_leave_a_bound(sets, target):
    evidence = evidence_of({"t": ("target", target)}, sets)
    n = len(sets["forget"])
    number = mean_number(evidence, "forget", Values(np.zeros(n), np.ones(n, bool)), Direction.FORGET_DOWN, (0.0, 1.0))
    assert number.low == 0
    assert number.high == pytest.approx(1 - 0.025 ** (1 / 3))  # three persons
    middle = mean_number(evidence, "forget", Values(np.full(n, 0.5), np.ones(n, bool)), Direction.FORGET_DOWN, (0.0, 1.0))
    assert (middle.low, middle.high) == (0.5, 0.5)
    assert widened(evidence.interval("forget", Values(np.zeros(n), np.ones(n, bool))), (0.0, None)).high == 0


def test_samples_spread_over_subjects_and_questions():
    clusters = ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    chosen = spread(clusters, 3)
    assert [clusters[i] for i in chosen] == ["a", "b", "c"]
    assert len({i % 3 for i in chosen}) == 3
    assert spread(clusters, 99) == list(range(9))


def test_thinned_lines_keep_their_ends():
    x = np.linspace(0, 1, 5001)
    a, b = thinned(x, x**2, 200)
    assert len(a) <= 200
    assert (a[0], a[-1], b[-1]) == (0, 1, 1)


def test_a_metric_of_ones_own(sets, target):
    """What CONTRIBUTING shows: a metric is one small class."""
    from expunge.audit.metrics.memorisation import _Hits

    class FirstToken(_Hits):
        """Share of answers whose first token is the model's first choice."""

        name = "first-token"
        title = "First token"
        formula = "hit_1"
        direction = Direction.FORGET_DOWN
        range = (0.0, 1.0)
        needs = ()
        paper = None
        evaluate = staticmethod(lambda hits: float(hits[0]))

    assert issubclass(FirstToken, Metric)
    evidence = evidence_of({"t": ("target", target)}, sets)
    number = FirstToken().compute(evidence, "t")["forget.first-token"]
    hits = score(target, [target.encode(r) for r in sets["forget"]]).examples("hit")
    assert number.value == pytest.approx(np.mean([h[0] for (h,) in hits]))
