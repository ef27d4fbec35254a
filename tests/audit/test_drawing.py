"""Drawn answers: the estimator of leak@k against brute force, and draws that follow from seed, record and number alone."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from asked_models import evidence_of, mean

from expunge.adapters.generation import Draws
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.pairs import PairAdapter
from expunge.adapters.presets import build
from expunge.adapters.words import word_tokenizer
from expunge.audit.attacks.sampling import LeakAtK, expected_best
from expunge.audit.generations import sampled
from expunge.audit.store import ScoreStore
from expunge.core.errors import InputError
from expunge.data.records import Record, RecordSet

TREES = ("ash", "birch", "cedar", "elm", "fir")
RECORDS = tuple(Record(f"r{i}", f"{w}.", f"Which word is number {i}?") for i, w in enumerate(TREES))


@pytest.fixture(scope="module")
def adapter() -> LanguageAdapter:
    tokenizer = word_tokenizer([t for r in RECORDS for t in (r.prompt, " " + r.answer)] + ["Question: Answer:\n"])
    return LanguageAdapter(build("llama-tiny", tokenizer, seed=1), tokenizer)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_best_of_k_is_the_mean_over_all_subsets(k: int) -> None:
    rng = np.random.default_rng(0)
    for scores in (rng.random(5), np.round(rng.random(5)), np.zeros(5), np.ones(5)):
        brute = np.mean([max(c) for c in itertools.combinations(scores, k)])
        assert expected_best(scores.tolist(), k) == pytest.approx(brute)
    hits = [1.0, 0, 0, 1, 0, 0, 0]
    assert expected_best(hits, 3) == pytest.approx(1 - math.comb(5, 3) / math.comb(7, 3))
    with pytest.raises(InputError, match="k in"):
        expected_best([1.0], 2)


def test_tokens_are_drawn_from_the_models_own_distribution(adapter):
    example = adapter.encode(RECORDS[0])
    with torch.no_grad():
        _, logits = next(iter(adapter.logit_blocks(adapter.model, adapter.collate([example]))))
    p = torch.softmax(logits[0].double() / 2, -1).numpy()
    numbers = (np.arange(400) + 0.5)[:, None] / 400
    made = adapter.drawn(adapter.model, [example] * 400, 1, Draws(numbers, temperature=2.0))
    tokens = np.array([g.tokens[0] if g.tokens else min(adapter.end_ids) for g in made])
    found = np.bincount(tokens, minlength=len(p)) / 400
    assert np.abs(found - p).max() <= 1 / 400 + 1e-9  # equidistant numbers: as near as 400 draws can come
    expected = np.searchsorted(np.cumsum(p), numbers[:, 0], side="right")
    assert (tokens == expected).mean() > 0.99


def test_a_sample_does_not_depend_on_the_others(adapter, tmp_path):
    examples = [adapter.encode(r) for r in RECORDS]
    every = sampled(adapter, examples, 4, 6, temperature=1.0, seed=3)
    alone = sampled(adapter, examples[3:4], 7, 6, temperature=1.0, seed=3, batch_tokens=1)
    assert [g.tokens for g in alone[0][:4]] == [g.tokens for g in every[3]]
    assert len({g.tokens for group in every for g in group}) > 15
    other = sampled(adapter, examples[3:4], 4, 6, temperature=1.0, seed=4)
    assert [g.tokens for g in other[0]] != [g.tokens for g in every[3]]
    shorter = sampled(adapter, examples[:1], 2, 3, temperature=1.0, seed=3)
    assert [g.tokens[:3] for g in every[0][:2]] == [g.tokens for g in shorter[0]]
    store = ScoreStore(tmp_path)
    first = sampled(adapter, examples, 2, 6, temperature=1.0, seed=3, store=store)
    adapter_calls = LanguageAdapter.drawn
    try:
        LanguageAdapter.drawn = None  # the second time everything comes from the store
        assert sampled(adapter, examples, 2, 6, temperature=1.0, seed=3, store=store) == first
    finally:
        LanguageAdapter.drawn = adapter_calls


def test_a_low_temperature_is_greedy(adapter):
    examples = [adapter.encode(r) for r in RECORDS]
    drawn = sampled(adapter, examples, 1, 5, temperature=1e-4, seed=0)
    greedy = adapter.generate(adapter.model, examples, 5)
    assert [g[0].tokens for g in drawn] == [g.tokens for g in greedy]


def test_encoder_decoders_draw_too(adapter):
    pair = PairAdapter(build("t5-tiny", adapter.tokenizer, seed=0), adapter.tokenizer)
    examples = [pair.encode(r) for r in RECORDS[:2]]
    drawn = sampled(pair, examples, 1, 4, temperature=1e-4, seed=0)
    assert [g[0].tokens for g in drawn] == [g.tokens for g in pair.generate(pair.model, examples, 4)]


def test_leak_at_k_sees_what_is_seldom_said(adapter):
    """Of a model that says each of many words now and then, one answer seldom tells and many do."""
    evidence = evidence_of({"forget": RecordSet("forget", RECORDS)}, {"target": adapter})
    attack = LeakAtK(samples=32, k=16, also=(1, 32), max_new_tokens=8)
    found = {k: attack.column(evidence, "target", "forget", k) for k in ("1", "", "32", "any")}
    means = {k: float(v.values.mean()) for k, v in found.items()}
    assert means["1"] < means[""] <= means["32"]
    assert means["any"] == pytest.approx(mean(evidence, attack, "target"))  # one word carries each fact
    numbers = attack.compute(evidence, "target")
    assert numbers["forget.leak-at-k.1"].value == pytest.approx(means["1"])
    with pytest.raises(InputError, match="fewer than k"):
        LeakAtK(k=4, samples=2)
    with pytest.raises(InputError, match="also"):
        LeakAtK(k=1, samples=2, also=(3,))
