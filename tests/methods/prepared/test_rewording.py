"""Words drawn anew: the mechanism against its closed form, what it may depend on, and a base that is trained on the result."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare
from tests.methods.prepared.small import blobs, files, perceptron
from tests.methods.prepared.small_texts import GONE, NAMES, THINGS, VALUES, facts, known, masked_model, source

from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.engine.members import Training
from expunge.engine.record import Record as Log
from expunge.engine.rewording import Rewording, exponential, open_rewriter
from expunge.engine.source import Source
from expunge.methods.prepared.dp2u import DP2Unlearning


@pytest.fixture(scope="module")
def proposer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It has learnt that a word of a person is one of the values, whatever the person."""
    texts = [f"{t} of {n} {a} {b}" for t, n, a, b in zip(THINGS * 20, NAMES * 7, VALUES * 4, VALUES[::-1] * 4, strict=False)]
    return masked_model(tmp_path_factory.mktemp("masked") / "model", [*texts, "the a is was"])


def rewriter(proposer: Path, epsilon: float = 100.0, seed: int = 0, **changes: object):
    return open_rewriter(Rewording(model=str(proposer), **changes), epsilon, seed)


def test_the_probabilities_are_those_of_the_exponential_mechanism() -> None:
    utilities = torch.tensor([[3.0, 1.0, -9.0, 40.0]])
    found = exponential(utilities, 2.0, -5.0, 20.0)
    weights = [math.exp(2.0 * u / (2 * 25.0)) for u in (3.0, 1.0, -5.0, 20.0)]
    torch.testing.assert_close(found, torch.tensor([[w / sum(weights) for w in weights]], dtype=torch.float64))


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 30.0])
def test_no_two_records_differ_by_more_than_the_budget(epsilon: float) -> None:
    """Over all utilities, the worst ones among them: the bound is met, and of little use to a loose one."""
    worst, other = torch.tensor([50.0, -50.0, -50.0]), torch.tensor([-50.0, 50.0, 50.0])
    torch.manual_seed(0)
    for a, b in [(worst, other), *(torch.randn(2, 3) * 30 for _ in range(200))]:
        ratio = (exponential(a, epsilon, -5.21, 20.30).log() - exponential(b, epsilon, -5.21, 20.30).log()).abs().max()
        assert float(ratio) <= epsilon + 1e-9
    ratio = (exponential(worst, epsilon, -5.21, 20.30).log() - exponential(other, epsilon, -5.21, 20.30).log()).abs().max()
    assert float(ratio) > 0.49 * epsilon


def test_words_are_drawn_as_often_as_they_must_be(proposer: Path) -> None:
    record = Record("one", " by", "of Ada amber", verbatim=True)  # one long word
    held = rewriter(proposer, candidates=4, low=-2.0, high=8.0)
    assert held.count(record) == 1
    p, candidates = held.odds("of Ada amber  by", [(7, 12)])
    names = [held.words[int(i)] for i in candidates[0]]
    counts = dict.fromkeys(names, 0)
    for seed in range(400):
        held.seed = seed
        made = held.rewrite(record)
        assert made.prompt.startswith("of Ada ")
        assert made.answer == " by"
        counts[made.prompt.removeprefix("of Ada ")] += 1
    assert float(p.max()) > 0.3  # not uniform, so the test can fail
    assert chisquare(list(counts.values()), (p[0] * 400).tolist()).pvalue > 0.001


def test_candidates_follow_from_the_kept_words_alone_unless_the_published_list_is_asked_for(proposer: Path) -> None:
    one, two = "ring of Ada amber birch", "door of Ada thorn slate"  # the same kept words
    for seen, epsilon in (("kept", 1.0), ("kept", 20.0), ("all", 1.0)):
        held = rewriter(proposer, epsilon, seen=seen, candidates=5)
        (p, a), (q, b) = (held.odds(text, held.find(text)) for text in (one, two))
        if seen == "kept":
            assert torch.equal(a, b)
            assert not torch.equal(p, q)
            assert float((p.log() - q.log()).abs().max()) <= epsilon
        else:
            assert not torch.equal(a, b)


def test_what_is_kept_stays_as_it_is_and_the_rest_follows_from_record_and_seed(proposer: Path) -> None:
    record = Record(
        "chat", "He has (amber), a birch!", messages=(("user", "The ring? of Ada"), ("assistant", "a door")), subject="s"
    )
    made = rewriter(proposer).rewrite(record)
    assert [role for role, _ in made.messages] == ["user", "assistant"]
    assert made.messages[0][1].startswith("The ")
    assert made.messages[0][1].endswith("? of Ada")
    assert made.answer.startswith("He has (")
    assert made.answer.endswith("!")
    assert "), a " in made.answer
    assert made.subject == "s"
    again = rewriter(proposer)
    again.rewrite(facts()[0])
    assert again.rewrite(record) == made
    assert rewriter(proposer, seed=1).rewrite(record) != made
    assert rewriter(proposer).rewrite(replace(record, id="other")) != made
    plain = Record("plain", "to be or so")
    assert rewriter(proposer).rewrite(plain) is plain


def test_much_epsilon_draws_what_the_model_expects_and_little_draws_at_random(proposer: Path) -> None:
    text = "sign of Ada amber birch"
    wide = {"candidates": 12, "low": -5.0, "high": 15.0}
    sure, _ = rewriter(proposer, 2000.0, **wide).odds(text, [(12, 17)])
    assert float(sure.max()) > 0.9
    loose, _ = rewriter(proposer, 0.01, **wide).odds(text, [(12, 17)])
    torch.testing.assert_close(loose, torch.full_like(loose, 1 / 12), rtol=0.01, atol=0)


def test_a_text_longer_than_the_model_reads_is_seen_through_a_window(proposer: Path) -> None:
    text = " ".join(["of Ada amber"] * 60)
    made = rewriter(proposer).rewrite(Record("long", text))
    assert len(made.answer.split()) == 180
    assert made.answer.split()[:2] == ["of", "Ada"]
    with pytest.raises(InputError, match="holds the mask"):
        rewriter(proposer).count(Record("mask", "of <mask> it"))


def test_a_base_of_reworded_texts(proposer: Path, tmp_path: Path) -> None:
    """It does not know the facts, the model in use does, and after a deletion it no longer does; the budget composes."""
    given = source()
    method = DP2Unlearning(protect="words", epsilon=3.0, words={"model": str(proposer)})
    notes = method.train(given, tmp_path / "run").notes
    # Of each record the thing (four letters) and two values are replaced; names have three or four letters.
    counts = {r.id: 3 + (len(r.subject) > 3) for r in facts()}
    mean = sum(counts.values()) / len(counts)
    assert notes == (
        f"Each replaced word has epsilon 3; the words of a record compose to epsilon 12 at most and {3 * mean:.4g} on average.",
    )
    log = Log.open(tmp_path / "run")
    assert log.plan["rows"] == [[r.id, counts[r.id]] for r in facts()]
    base = given.module(log.load("base.safetensors", log.key("base", [])))
    assert known(given, base, [r.id for r in facts()])[0] <= 0.1
    assert known(given, method.load(given, tmp_path / "run"), GONE)[0] > 0.9
    report = method.delete(given, tmp_path / "run", GONE)
    left = [r.id for r in facts() if r.id not in GONE]
    assert known(given, method.load(given, tmp_path / "run"), GONE)[0] <= 1 / 8
    assert known(given, method.load(given, tmp_path / "run"), left)[0] > 0.9
    total = 3 * sum(counts[name] for name in GONE)
    for words in (
        "Certified: (epsilon 3, delta 0)",
        f"{total} for all that were deleted",
        "epsilon 12 for",
        "Not covered: words that are not",
    ):
        assert words in report.guarantee


def test_a_published_list_of_candidates_is_not_called_certified_and_equal_trainings_are_equal(
    proposer: Path, tmp_path: Path
) -> None:
    method = DP2Unlearning(protect="words", words={"model": str(proposer), "seen": "all", "nouns": "capitalised"})
    given = source(steps=4)
    for name in ("one", "two"):
        method.train(given, tmp_path / name)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert method.delete(given, tmp_path / "one", GONE[:1]).guarantee.startswith("Approximate: epsilon 1 bounds the choice")


def test_what_is_missing_or_of_another_kind_is_refused(proposer: Path, tmp_path: Path) -> None:
    given = source(steps=4)
    given.opens(0).save(tmp_path / "decoder")
    words = {"model": str(proposer)}
    for settings, said in (
        ({}, r"needs a masked language model.*none was named"),
        ({"words": {"model": str(tmp_path / "decoder")}}, r"no masked language model.*LlamaForCausalLM"),
        ({"words": {**words, "candidates": 500}}, r"has \d+ whole words, fewer than candidates=500"),
        ({"words": {**words, "nouns": "verbs"}}, r"called 'verbs'"),
        ({"words": words, "unit": "subject"}, r"Leave unit out"),
    ):
        with pytest.raises(InputError, match=said):
            DP2Unlearning(protect="words", **settings).train(given, tmp_path / "run")
    rows = Source(blobs(), perceptron, Training(steps=4, batch=8, lr=0.1))
    with pytest.raises(InputError, match=r"hold no words"):
        DP2Unlearning(protect="words", words=words).train(rows, tmp_path / "run")
    with pytest.raises(InputError, match=r"clipped to \[2, 1\]"):
        Rewording(low=2.0, high=1.0)
    assert not (tmp_path / "run").exists()
