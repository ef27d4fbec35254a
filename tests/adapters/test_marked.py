"""Marked spans become marked targets: for every tokenizer, template and cut, and through batches, packing and narrowing."""

from __future__ import annotations

import pytest
import torch

from expunge.adapters.base import Example
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build
from expunge.adapters.words import word_tokenizer
from expunge.core.errors import InputError
from expunge.data.records import Record
from tests.adapters.conftest import sharpen
from tests.adapters.test_tokenise import BARE, CHATML, THINKING, TRIMMING, bpe, encoder, metaspace

ANSWER = "  the key is abc-99 and the word is äöü, no more"
SECRETS = ("abc-99", "äöü")
SPANS = tuple((ANSWER.index(s), ANSWER.index(s) + len(s)) for s in SECRETS)
TEXTS = [ANSWER, "Question: what\nAnswer: " + ANSWER] * 5


def tokenizers():
    return {
        "words": word_tokenizer(TEXTS),
        "bytes": bpe(TEXTS, vocab=262),
        "bpe": bpe(TEXTS, bos=True, vocab=400),
        "across": bpe(TEXTS, vocab=275, split=False),
        "metaspace": metaspace(TEXTS, vocab=120),
    }


def marked_text(tokenizer, tokens) -> str:
    """What the marked targets say, a bar between runs."""
    runs, before = [[]], False
    for token, mark in zip(tokens.ids[tokens.start :].tolist(), tokens.marked.tolist(), strict=True):
        if mark and not before:
            runs.append([])
        if mark:
            runs[-1].append(token)
        before = mark
    return [tokenizer.decode(r, clean_up_tokenization_spaces=False) for r in runs[1:]]


@pytest.mark.parametrize("name", list(tokenizers()))
@pytest.mark.parametrize("shape", ["text", "template", "verbatim", "no-space", *("chatml", "thinking", "trimming", "bare")])
def test_the_marked_targets_are_those_that_overlap_a_span(name, shape):
    tokenizer = tokenizers()[name]
    record = {
        "text": Record("r", ANSWER, spans=SPANS),
        "verbatim": Record("r", ANSWER, prompt="xth", verbatim=True, spans=SPANS),
    }.get(shape, Record("r", ANSWER, prompt="what", spans=SPANS))
    template = {"template": None, "no-space": "Q{prompt}A{answer}."}.get(shape)
    chat = {"chatml": CHATML, "thinking": THINKING, "trimming": TRIMMING, "bare": BARE}.get(shape)
    if chat:
        tokenizer.chat_template = chat
    tokens = encoder(tokenizer, template).encode(record)
    assert len(tokens.marked) == len(tokens.ids) - tokens.start
    runs = marked_text(tokenizer, tokens)
    assert len(runs) == 2
    for run, secret in zip(runs, SECRETS, strict=True):
        assert secret in run
        if name != "across":  # whose tokens may hold more than the secret: all that overlap are marked
            assert run.strip() == secret or (name in ("bpe", "metaspace") and len(run) < len(secret) + 8)
    # without spans the ids are the same, and nothing is marked
    bare = encoder(tokenizer, template).encode(Record("r", record.answer, prompt=record.prompt, verbatim=record.verbatim))
    assert bare.ids.tolist() == tokens.ids.tolist()
    assert bare.marked is None


def test_byte_tokens_are_marked_exactly():
    tokenizer = tokenizers()["bytes"]
    tokens = encoder(tokenizer).encode(Record("r", ANSWER, prompt="what", spans=SPANS))
    assert [r.strip() for r in marked_text(tokenizer, tokens)] == list(SECRETS)


def test_repaired_boundaries_keep_the_marks_in_place():
    tokenizer = bpe(["ab"] * 50, split=False)
    coder = encoder(tokenizer)
    tokens = coder.encode(Record("r", "bxyz", prompt="xa", verbatim=True, spans=((2, 3),)))
    assert coder.repairs == 1
    assert marked_text(tokenizer, tokens) == ["y"]


def test_other_answers_have_no_spans_and_a_cut_takes_them_off():
    tokenizer = word_tokenizer(TEXTS)
    record = Record("r", ANSWER, prompt="what", spans=SPANS)
    assert encoder(tokenizer).encode(record, answer="another one").marked is None
    whole = encoder(tokenizer).encode(record)
    assert encoder(tokenizer).encode(record, prompt="which").marked.sum() == whole.marked.sum()
    cut = encoder(tokenizer, max_length=len(whole.ids) - 7, truncate=True).encode(record)
    assert cut.marked.tolist() == whole.marked[:-7].tolist()
    assert 0 < cut.marked.sum() < whole.marked.sum()


def test_spans_outside_of_the_text_are_refused_before_anything():
    coder = encoder(word_tokenizer(TEXTS))
    with pytest.raises(InputError, match=r"Record 'r' has the span \[3, 99\], but the answer has"):
        coder.encode(Record("r", ANSWER, prompt="what", spans=((3, 99),)))


def test_a_tokenizer_without_places_is_refused():
    class Slow:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, text, **options):
            if options.pop("return_offsets_mapping", False):
                raise NotImplementedError
            return self.inner(text, **options)

    coder = encoder(Slow(word_tokenizer(TEXTS)))
    coder.encode(Record("r", ANSWER, prompt="what"))
    with pytest.raises(InputError, match="does not say which characters"):
        coder.encode(Record("r", ANSWER, prompt="what", spans=SPANS))


# ---- through batches


@pytest.fixture
def adapter():
    tokenizer = word_tokenizer([*TEXTS, "pin 12 34 is mine and yours"])
    return LanguageAdapter(sharpen(build("llama-tiny", tokenizer, seed=1, context=64)), tokenizer)


RECORDS = [
    Record("a", ANSWER, prompt="what", spans=SPANS),
    Record("b", "pin 12 is mine", prompt="which pin"),
    Record("c", "pin 12 34 is yours and mine and yours", spans=((4, 9),)),
]


@pytest.mark.parametrize("packed", [True, False])
def test_marks_travel_with_their_targets(adapter, packed):
    adapter = LanguageAdapter(adapter.model, adapter.tokenizer, packed=packed)
    examples = [adapter.encode(r) for r in RECORDS]
    assert [e.n_marked for e in examples] == [int(e.data.marked.sum()) if e.data.marked is not None else 0 for e in examples]
    assert examples[1].n_marked == 0
    batch = adapter.collate(examples)
    assert batch.to("cpu").marked.equal(batch.marked)
    assert int(batch.marked.sum()) == sum(e.n_marked for e in examples)
    words = adapter.tokenizer.convert_ids_to_tokens(batch.targets[batch.marked].tolist())
    assert "".join(words).split() == ["abc-99", "äöü", "12", "34"]
    layer = adapter.layers()[0]
    out = adapter.forward(adapter.model, batch, frozenset({"losses", f"features:{layer}"}))
    assert out.narrow(1, 3).marked.equal(batch.marked[batch.owner >= 1])

    for which, mask in (("marked", batch.marked), ("unmarked", ~batch.marked)):
        part = out.only(which)
        assert part.targets.equal(batch.targets[mask])
        assert part.losses.equal(out.losses[mask])
        assert part.counts == tuple(int(((batch.owner == i) & mask).sum()) for i in range(3))
        assert part.position.tolist() == [p for c in part.counts for p in range(c)]
        assert part.n_examples == 3
        sizes = [e.only(which) for e in examples]
        assert part.counts == tuple(e.n_targets for e in sizes)
        assert part.token_counts == tuple(e.size for e in sizes)
        assert len(part.features(layer)) == sum(part.token_counts)
        later = part.narrow(1, 3)
        assert later.losses.equal(out.narrow(1, 3).only(which).losses)
        assert later.owner.equal(out.narrow(1, 3).only(which).owner)
    assert out.only("all") is out
    spoken = torch.zeros_like(batch.token_supervised)
    spoken[batch.token_supervised] = batch.marked
    assert out.only("marked").features(layer).equal(out.features(layer)[spoken])
    assert out.only("unmarked").features(layer).equal(out.features(layer)[~spoken])


def test_rows_are_not_marked(digits):
    adapter = digits.target()
    rows = digits.split()[0][:3]
    batch = adapter.collate([adapter.encode(r) for r in rows])
    assert batch.marked.tolist() == [False] * 3
    assert batch.to("cpu").marked.tolist() == [False] * 3


def test_counts_of_an_example():
    example = Example("r", "r", 5, 9, None, n_marked=2)
    assert example.only("all") is example
    assert (example.only("marked").n_targets, example.only("marked").size) == (2, 2)
    assert (example.only("unmarked").n_targets, example.only("unmarked").size) == (3, 7)
