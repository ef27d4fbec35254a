from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.audit.evaluate import evaluate_metric
from expunge.audit.metrics.fluency import degenerate, ngram_entropy, repetition
from expunge.audit.metrics.forget_quality import _distance, forget_quality, log10_floor
from expunge.audit.metrics.memorisation import exact_memorisation, extraction_strength
from expunge.audit.metrics.muse import halves, knowledge_memorisation, verbatim_memorisation
from expunge.audit.metrics.probability import loss, option_probability, probability
from expunge.audit.metrics.registry import METRICS
from expunge.audit.metrics.rouge import rouge_l
from expunge.audit.metrics.truth_ratio import log_truth_ratio, truth_ratio, truth_ratio_score
from expunge.audit.metrics.utility import _harmonic, model_utility
from expunge.audit.metrics.words import lcs_length, words
from expunge.core.errors import InputError
from expunge.core.statistics import harmonic_mean, ks

WORDS = st.lists(st.sampled_from(["born", "in", "the", "city", "and", "running", "painter's", "houses", "paints"]), max_size=12)


# ---- probability -----------------------------------------------------------------------------------------------------


def test_probability_is_the_geometric_mean():
    p = [0.5, 0.125, 1.0]
    assert probability(np.log(p)) == pytest.approx((0.5 * 0.125) ** (1 / 3))
    assert loss(np.log(p)) == pytest.approx(math.log(16) / 3)
    with pytest.raises(InputError, match="without tokens"):
        loss([])


def test_options():
    assert option_probability(1.0, [1.0, 1.0, 1.0]) == pytest.approx(0.25)
    a, b, c = math.exp(-1), math.exp(-2), math.exp(-3)
    assert option_probability(1.0, [2.0, 3.0]) == pytest.approx(a / (a + b + c))
    assert option_probability(2000.0, [2000.0]) == pytest.approx(0.5)  # exp(-2000) is 0: not 0/0
    assert option_probability(0.0, [2000.0]) == 1.0
    with pytest.raises(InputError, match="wrong option"):
        option_probability(1.0, [])


# ---- truth ratio -----------------------------------------------------------------------------------------------------


def test_truth_ratio_of_the_definition():
    ratio = truth_ratio(1.0, [2.0, 2.0])
    assert ratio == pytest.approx(math.exp(-1))
    assert truth_ratio_score([ratio], "forget")[0] == pytest.approx(0.368, abs=1e-3)
    # Numerator and denominator exchanged leave the forget score as it is and destroy the retain score.
    assert truth_ratio_score([ratio], "utility")[0] == pytest.approx(0.632, abs=1e-3)
    assert truth_ratio_score([1 / ratio], "forget")[0] == pytest.approx(0.368, abs=1e-3)
    assert truth_ratio_score([1 / ratio], "utility")[0] == 0


def test_both_means_of_the_truth_ratio():
    assert truth_ratio(0.0, [1.0, 3.0]) == pytest.approx(math.exp(-2))
    assert truth_ratio(0.0, [1.0, 3.0], mean="arithmetic") == pytest.approx((math.exp(-1) + math.exp(-3)) / 2)
    assert truth_ratio(0.0, [1.0, 3.0], mean="arithmetic") == pytest.approx(0.209, abs=1e-3)


@given(st.floats(0, 30), st.lists(st.floats(0, 30), min_size=1, max_size=6))
def test_arithmetic_is_never_below_geometric(right, wrong):
    geometric, arithmetic = log_truth_ratio(right, wrong), log_truth_ratio(right, wrong, "arithmetic")
    assert arithmetic >= geometric - 1e-9
    assert math.exp(arithmetic) == pytest.approx(np.mean(np.exp(-np.array(wrong))) / math.exp(-right), rel=1e-9)


def test_truth_ratio_beyond_the_range_of_floats():
    assert truth_ratio(2000.0, [1.0]) == math.inf
    assert log_truth_ratio(2000.0, [1.0]) == 1999.0
    assert truth_ratio_score([math.inf, 0.0], "forget").tolist() == [0.0, 0.0]
    assert truth_ratio_score([math.inf, 0.0], "utility").tolist() == [0.0, 1.0]


# ---- utility and forget quality --------------------------------------------------------------------------------------


def test_one_zero_makes_model_utility_zero():
    assert model_utility([0.5] * 8 + [0.0]) == 0
    assert model_utility([0.854, 0.772, 0.512, 0.430, 0.820, 0.552, 0.431, 0.831, 0.596]) == pytest.approx(0.601, abs=1e-3)


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=9))
def test_the_vectorised_harmonic_mean_is_the_same(values):
    assert _harmonic(np.array([values, [0.0] * len(values)])).tolist() == pytest.approx([harmonic_mean(values), 0.0])


def test_forget_quality():
    rng = np.random.default_rng(0)
    ratios = rng.lognormal(size=40)
    same = forget_quality(ratios, ratios)
    assert (same.statistic, same.pvalue, same.log10_pvalue) == (0.0, 1.0, 0.0)
    apart = forget_quality(ratios, ratios + 1000)
    assert apart.statistic == 1
    assert apart.log10_pvalue == pytest.approx(log10_floor(40), abs=1e-6)
    assert 10 ** log10_floor(40) == pytest.approx(1.9e-23, rel=0.03)
    assert log10_floor(400) == pytest.approx(math.log10(1.1) - 239, abs=0.05)
    # The test sees R, 1/R and log R alike, and both directions alike.
    assert forget_quality(1 / ratios, 1 / (ratios * 1.3)).pvalue == pytest.approx(forget_quality(ratios, ratios * 1.3).pvalue)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.lists(st.integers(0, 9), min_size=1, max_size=20))
def test_distance_is_that_of_the_test(a, b):
    assert _distance(np.array(a, float), np.array(b, float)) == pytest.approx(ks(a, b).statistic)


# ---- memorisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "strength", "exact"),
    [
        ([0, 0, 0], 0, 0),
        ([1, 0, 1], 1 / 3, 2 / 3),
        ([1, 1, 1], 1, 1),
        ([0], 0, 0),
        ([1], 1, 1),
        ([0, 1, 1, 1], 0.75, 0.75),
        ([1, 1, 0], 0, 2 / 3),
    ],
)
def test_extraction_strength_and_exact_memorisation(hits, strength, exact):
    assert extraction_strength(hits) == pytest.approx(strength)
    assert exact_memorisation(hits) == pytest.approx(exact)


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_extraction_strength_by_search(hits):
    length = len(hits)
    k = next(k for k in range(length + 1) if all(hits[k:]))
    assert extraction_strength(hits) == pytest.approx(1 - k / length)
    assert extraction_strength(hits) <= exact_memorisation(hits) + 1e-12


def test_empty_answers_are_refused_not_zero():
    for function in (extraction_strength, exact_memorisation):
        with pytest.raises(InputError, match="without tokens"):
            function([])


# ---- ROUGE -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)  # the first call loads the stemmer
@given(WORDS, WORDS)
def test_rouge_equals_the_package(prediction, gold):
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    if not gold:
        with pytest.raises(InputError, match="no words"):
            rouge_l(" ".join(prediction), "")
        return
    for stem in (True, False):
        want = scorer.RougeScorer(["rougeL"], use_stemmer=stem).score(" ".join(gold), " ".join(prediction))["rougeL"]
        for kind, value in (("recall", want.recall), ("precision", want.precision), ("f1", want.fmeasure)):
            assert rouge_l(" ".join(prediction), " ".join(gold), kind, stem) == pytest.approx(value)


@given(st.lists(st.sampled_from("abcde"), max_size=40), st.lists(st.sampled_from("abcde"), max_size=40))
def test_lcs_by_table(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    assert lcs_length(a, b) == table[-1, -1]


def test_recall_and_precision_are_not_exchanged():
    assert rouge_l("Paris", "the city of Paris") == 0.25
    assert rouge_l("Paris", "the city of Paris", "precision") == 1
    assert rouge_l("", "the city of Paris") == 0


def test_scripts_that_the_default_tokeniser_cannot_see():
    with pytest.raises(InputError, match="tokeniser=unicode"):
        rouge_l("Москва", "Москва")
    assert rouge_l("город Москва", "Москва", tokeniser="unicode") == 1
    assert words("東京タワー 2 houses", True, "unicode") == [*"東京タワー", "2", "hous"]


def test_stemming():
    assert rouge_l("painting", "paints") == 1
    assert rouge_l("painting", "paints", stem=False) == 0


def test_muse_scores_are_f1_in_percent_without_stemming():
    assert verbatim_memorisation("a b c", "a b c") == 100
    assert knowledge_memorisation("Paris", "the city of Paris") == pytest.approx(100 * 2 * 0.25 / 1.25)
    assert knowledge_memorisation("painting", "paints") == 0


def test_halves():
    assert halves("one two three four", 0.5) == ("one two", " three four")
    assert halves("one", 0.5) == ("one", "")
    assert halves("one two three", 0.01) == ("one", " two three")
    assert halves("one two three", 0.99) == ("one two", " three")


# ---- fluency ---------------------------------------------------------------------------------------------------------


def test_repetition_and_entropy_of_a_loop():
    loop, prose = "the " * 60, " ".join(f"word{i}" for i in range(60))
    assert repetition(loop) == pytest.approx(1 - 1 / 57)
    assert repetition(prose) == 0
    assert repetition("too short") == 0
    assert ngram_entropy(loop) == 0
    assert ngram_entropy(prose) == pytest.approx((2 / 3 * math.log2(59) + 4 / 3 * math.log2(58)) / 2)


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("", True),
        ("... !!", True),
        ("the the the the the the the the the", True),
        ("a" * 200, True),
        ("He was born, he was born, he was born, he was born, he was born.", True),
        ("He was born in Vienna in 1901 and worked as a painter of quiet interiors.", False),
        ("No.", False),
        ("no no no", False),
        ("東京", False),
    ],
)
def test_degenerate(text, broken):
    assert degenerate(text) is broken


def test_random_prose_is_not_called_degenerate():
    rng = random.Random(0)
    vocabulary = [f"{a}{b}" for a in ("be", "to", "ri", "ma", "so") for b in ("ran", "den", "lio", "s", "tek")]
    assert not any(degenerate(" ".join(rng.choices(vocabulary, k=40))) for _ in range(200))


# ---- the public entry ------------------------------------------------------------------------------------------------


def test_evaluate_from_logits_equals_evaluate_from_arrays():
    logits, labels = torch.randn(6, 11, generator=torch.Generator().manual_seed(1)), torch.arange(6)
    logp = torch.log_softmax(logits.double(), 1)
    own = logp[torch.arange(6), labels]
    assert evaluate_metric("probability", logits=logits, labels=labels) == pytest.approx(float(own.mean().exp()), rel=1e-5)
    hits = (logits.argmax(1) == labels).numpy()
    assert evaluate_metric("exact-memorisation", logits=logits, labels=labels) == hits.mean()
    p = logp.exp()
    mean = (p * logp).sum(1)
    z = (own - mean) / ((p * logp**2).sum(1) - mean**2).sqrt()
    found = evaluate_metric("min-k-plus-plus", logits=logits, labels=labels, k=0.5)
    assert found == pytest.approx(-float(z.sort()[0][:3].mean()), rel=1e-4)


def test_evaluate_on_strings_and_numbers():
    assert evaluate_metric("rouge-l-recall", prediction="a b", gold="a c") == 0.5
    assert evaluate_metric("truth-ratio", nll_paraphrase=1.0, nll_perturbed=[2.0, 2.0]) == pytest.approx(math.exp(-1))
    assert evaluate_metric("privleak", auc_model=1.0, auc_retrained=0.5) == -100
    assert evaluate_metric("model-utility", components=[0.5, 0.5]) == 0.5


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("probabilty", {}, "probability"),
        ("probability", {"logps": [0.0]}, "logp"),
        ("truth-ratio", {"nll_paraphrase": 1.0}, "nll_perturbed"),
        ("rouge-l-recall", {"logits": torch.zeros(1, 2), "labels": torch.zeros(1)}, "reads no logits"),
        ("loss", {"logits": torch.zeros(3, 2), "labels": torch.zeros(2)}, r"\[T, V\]"),
    ],
)
def test_wrong_inputs_are_explained(name, inputs, message):
    with pytest.raises(InputError, match=message):
        evaluate_metric(name, **inputs)


def test_every_metric_declares_itself():
    for name, cls in METRICS.items():
        assert cls.name == name
        assert cls.title
        assert cls.formula
        assert cls.needs
        assert cls.paper.url.startswith("https://")
        assert callable(cls.evaluate)
        assert len(cls.__doc__ or "") > 40
        assert cls.declared() is not None
        assert len(cls.range) == 2
