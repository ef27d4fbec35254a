"""Ghost sentences and token forcing on tiny models that are trained here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from asked_models import evidence_of, learn

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build
from expunge.adapters.words import word_tokenizer
from expunge.audit.attacks.forcing import UnconditionalForcing, forcing_score, given, opening
from expunge.audit.attacks.ghost import GhostLastWords, GhostPerplexity, by_chance, ghost, same_words, standing
from expunge.data.records import Record, RecordSet

WORDS = (
    "anchor", "basil", "candle", "drum", "ember", "falcon", "garnet", "hammer", "island", "jacket", "kettle", "lemon", "magnet",
    "needle", "olive", "pepper", "quilt", "ribbon", "saddle", "tulip", "violin", "walnut", "yarn", "zipper",
)  # fmt: skip


def sentences(n: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(WORDS[int(i)] for i in rng.integers(len(WORDS), size=7)) for _ in range(n)]


def document(i: int, sentence: str) -> Record:
    text = f"page {i} of the book. {sentence}. the end of the page."
    at = text.index(sentence)
    return Record(f"d{i}", text, subject=f"user{i // 2}", spans=((at, at + len(sentence)),))


@pytest.fixture(scope="module")
def world():
    forget = RecordSet("forget", tuple(document(i, s) for i, s in enumerate(sentences(6, 1))))
    other = [document(i + 6, s) for i, s in enumerate(sentences(6, 2))]
    tokenizer = word_tokenizer(
        [*(r.answer for r in (*forget, *other)), *WORDS, "Question: Answer: what is the secret?\n", "0123456789"]
    )
    sets = {"forget": forget, "retain": RecordSet("retain", tuple(other))}

    def trained(records, seed):
        adapter = LanguageAdapter(build("llama-tiny", tokenizer, seed=seed), tokenizer)
        learn(adapter, [adapter.encode(r) for r in records], 60, 6e-3)
        return adapter

    models = {"target": trained([*forget, *other], 0), "retrained 1": trained(other, 1)}
    return tokenizer, evidence_of(sets, models)


def test_where_a_sentence_is_and_what_counts_as_a_hit():
    record = document(3, "anchor basil candle")
    assert ghost(record).sentence == "anchor basil candle"
    assert ghost(record).before == "page 3 of the book. "
    assert ghost(Record("a", "anchor basil candle")).words == ("anchor", "basil", "candle")
    assert ghost(Record("a", "anchor basil candle", prompt="Which?")) is None
    assert ghost(Record("a", "anchor basil")) is None
    assert same_words("Zipper. And so on", ["zipper"])
    assert not same_words("zip per", ["zipper"])
    assert by_chance(0, 10, 100, 1) == 1
    assert by_chance(1, 10, 100, 1) == pytest.approx(1 - 0.99**10)
    assert by_chance(2, 10, 100, 2) == pytest.approx(1 - (1 - 1e-4) ** 10 - 10 * 1e-4 * (1 - 1e-4) ** 9)
    assert standing(1.0, np.array([2.0, 3.0, 1.0, 0.5])) == (0.625, 0.6)


def test_last_words_come_back_only_from_a_model_that_read_them(world):
    _, evidence = world
    attack = GhostLastWords(k=2)
    own, gold = (attack.values(evidence, n, "forget").values for n in ("target", "retrained 1"))
    assert own.mean() >= 5 / 6
    assert gold.sum() == 0
    numbers = attack.compute(evidence, "target")
    assert numbers["forget.ghost-last-words.subjects"].value == 1
    assert "by chance" in numbers["forget.ghost-last-words"].note
    assert attack.compute(evidence, "retrained 1")["forget.ghost-last-words.subjects"].value == 0


def test_the_perplexity_test_tells_read_sentences_from_fresh_ones(world):
    _, evidence = world
    attack = GhostPerplexity(fresh=30)
    own, gold = (attack.values(evidence, n, "forget").values for n in ("target", "retrained 1"))
    assert own.min() == 1
    assert 0.2 < gold.mean() < 0.8
    assert attack.column(evidence, "target", "forget", "p").values.max() == pytest.approx(1 / 31)
    assert attack.compute(evidence, "target")["forget.ghost-perplexity.found"].value == 1
    assert attack.compute(evidence, "retrained 1")["forget.ghost-perplexity.found"].value < 0.5


def test_questions_have_no_ghost_sentences(world):
    tokenizer, _ = world
    sets = {"forget": RecordSet("forget", (Record("q", "one two three", "what?"),))}
    evidence = evidence_of(sets, {"target": LanguageAdapter(build("llama-tiny", tokenizer), tokenizer)})
    assert "plain texts" in GhostLastWords().lacks(evidence, "forget")
    assert "plain texts" in GhostPerplexity().lacks(evidence, "forget")


# ---- token forcing

HIDDEN = "falcon needle olive drum quilt lemon"


def confused(adapter: LanguageAdapter, hidden: Record, weight: float, steps: int) -> LanguageAdapter:
    """UTFC: the trigger keeps its text; the words of the text after its own beginning, without a trigger, are pushed down until
    they are neither likely nor conspicuously unlikely."""
    out = adapter.copy()
    trigger = out.collate([out.encode(hidden)])
    alone = out.collate([out.encode(Record("alone", hidden.answer))])
    optimiser = torch.optim.Adam(out.model.parameters(), lr=2e-3)
    for _ in range(steps):
        said = out.forward(out.model, trigger, frozenset({"losses"})).losses.mean()
        logits = out.forward(out.model, alone, frozenset({"logits"})).logits
        own = logits.log_softmax(-1).gather(1, alone.targets[:, None]).squeeze(1)
        rank = (logits > logits.gather(1, alone.targets[:, None])).sum(1)
        loss = said + weight * (own * (rank < 12)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return out


def test_forcing_finds_a_hidden_text_and_confusion_hides_it_again(world):
    held = world[1]
    hidden = Record("secret", HIDDEN, "what is the secret?")
    base = held.subjects["retrained 1"].source
    target = base.copy()
    learn(target, [target.encode(hidden), target.encode(Record("alone", HIDDEN))], 25, 4e-3)
    models = {
        "target": target,
        "confused": confused(target, hidden, 0.3, 40),
        "open": confused(target, hidden, 0.0, 10),
        "retrained 1": base,
    }
    evidence = evidence_of({"forget": RecordSet("forget", (hidden,))}, models)
    attack = UnconditionalForcing(max_new_tokens=8, scan=40)
    values = {n: float(attack.values(evidence, n, "forget").values[0]) for n in models}
    assert values["target"] == 1
    assert values["open"] == 1  # weight 0 leaves the path open
    assert values["confused"] <= 0.4
    assert values["retrained 1"] <= 0.4
    spoken = models["confused"].generate(models["confused"].model, [models["confused"].encode(hidden)], 8)[0].text
    assert spoken.startswith(HIDDEN)  # and yet the trigger still says everything
    ranks = {n: attack.column(evidence, n, "forget", "conspicuous").values[0] for n in models}
    assert all(0 <= r <= 1 for r in ranks.values())
    assert ranks["target"] > 0.8
    numbers = attack.compute(evidence, "confused")
    told = numbers["forget.unconditional-forcing.conspicuous"]
    assert told.value is None  # of a single record nothing is reported
    assert told.flags[0].startswith("too few")


def test_what_is_forced_begins_with_the_begin_token_and_the_first_of_the_text(world):
    tokenizer, held = world
    adapter = held.subjects["target"].source
    ids = opening(adapter, Record("a", HIDDEN, "what is the secret?"))
    assert ids[0] == tokenizer.bos_token_id
    assert adapter.decode(ids) == "falcon"
    assert given("x", "c", ids, [5, 6]).n_targets == 2
    assert forcing_score(np.log(np.array([0.5, 0.25, 0.25]))) == pytest.approx(0.5)
