"""Terms replaced in token sequences: as in the text, as whole words, and with every token's place known."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build
from expunge.adapters.supervised import RegressionAdapter
from expunge.adapters.tokenise import Tokens
from expunge.adapters.translate import Dictionary, Translation
from expunge.adapters.words import word_tokenizer
from expunge.core.errors import InputError
from expunge.data.records import Record
from tests.adapters.test_tokenise import bpe, metaspace

TERMS = {"Ron": "Alexander", "Ron Weasley": "Tom", "Hogwarts": "the Mystic Academy", "wand": "stick"}
WORDS = ("Ron", "Weasley", "Hogwarts", "wand", "Ronald", "went", "to", "school", "Moron")
TEXTS = [" ".join(WORDS), *TERMS.values(), "Aaron wands 'Ron' \"Ron said. Hogwarts's"]
TOKENIZERS = {
    "words": word_tokenizer(TEXTS),
    "bytes": bpe(TEXTS * 4),
    "pieces": metaspace(TEXTS * 4),
}


def dictionary(name: str, terms=TERMS) -> Dictionary:
    tokenizer = TOKENIZERS[name]
    return Dictionary(
        terms,
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False),
    )


def translate(name: str, text: str, start: int = 0, terms=TERMS, limit: int | None = None) -> tuple[Tokens, Translation, str]:
    tokenizer = TOKENIZERS[name]
    old = Tokens(np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32), start, False)
    found = dictionary(name, terms).translate(old, limit)
    return old, found, tokenizer.decode(found.tokens.ids.tolist(), clean_up_tokenization_spaces=False)


def in_text(text: str, terms=TERMS) -> str:
    longest_first = sorted(terms, key=len, reverse=True)
    return re.sub(r"\b(" + "|".join(longest_first) + r")\b", lambda m: terms[m.group(1)], text)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_tokens_are_replaced_as_text_is(name, words):
    text = " ".join(words)
    old, found, new = translate(name, text)
    assert new == in_text(text)
    assert len(found.place) == len(old.ids)
    assert [m.term for m in found.mentions] == re.findall(r"\bRon Weasley\b|\bRon\b|\bHogwarts\b|\bwand\b", text)
    for p in range(1, len(old.ids)):
        left = TOKENIZERS[name].decode(old.ids[:p].tolist(), clean_up_tokenization_spaces=False)
        if found.place[p] >= 0 and text[len(left) :].startswith(" "):  # what stands before a word is translated by itself
            before = dictionary(name).translate(Tokens(old.ids[:p], 0, False))
            assert found.tokens.ids[: found.place[p]].tolist() == before.tokens.ids.tolist()
    inner = {i for m in found.mentions for i in range(m.start + 1, m.stop)}
    assert {p for p in range(len(old.ids)) if found.place[p] < 0} == inner


@pytest.mark.parametrize("name", TOKENIZERS)
def test_words_that_contain_a_term_stay(name):
    text = "Ronald Moron Aaron wands"
    assert translate(name, text)[2] == text
    assert translate(name, text)[1].mentions == ()


@pytest.mark.parametrize("name", ["words", "bytes"])
def test_marks_around_a_term_do_not_hide_it(name):
    assert translate(name, "'Ron' \"Ron said.")[2].count("Alexander") >= 1
    assert translate(name, '"Ron said.')[2] == '"Alexander said.'
    assert translate(name, "to Hogwarts's school")[2] == "to the Mystic Academy's school"


def test_no_term_crosses_from_prompt_to_answer_and_the_border_is_kept():
    ids = TOKENIZERS["bytes"]("went to Ron Weasley", add_special_tokens=False)["input_ids"]
    border = len(TOKENIZERS["bytes"]("went to Ron", add_special_tokens=False)["input_ids"])
    assert translate("bytes", "went to Ron Weasley")[2] == "went to Tom"
    _, found, new = translate("bytes", "went to Ron Weasley", start=border)
    assert new == "went to Alexander Weasley"
    assert found.tokens.start == found.place[border]
    assert TOKENIZERS["bytes"].decode(found.tokens.ids[found.tokens.start :].tolist()) == " Weasley"
    assert len(ids) > border


def test_what_no_longer_fits_is_cut_and_has_no_place():
    whole = translate("words", "Hogwarts went to school")[1]
    for limit in (1, 5, len(whole.tokens.ids)):
        _, found, _ = translate("words", "Hogwarts went to school", limit=limit)
        assert found.tokens.ids.tolist() == whole.tokens.ids[:limit].tolist()
        assert found.place.tolist() == [p if p < limit else -1 for p in whole.place.tolist()]


def test_through_the_adapter():
    tokenizer = word_tokenizer([*TEXTS, "Question: Where is Ron?\nAnswer: At Hogwarts."])
    adapter = LanguageAdapter(build("llama-tiny", tokenizer, seed=0, context=16), tokenizer)
    example = adapter.encode(Record("a", "At Hogwarts.", "Where is Ron?"))
    ((made, told),) = adapter.translate([example], TERMS)
    assert tokenizer.decode(made.data.ids).startswith("<s>Question: Where is Alexander?\nAnswer: At the Mystic Academy")
    assert made.n_targets == made.size - made.data.start
    assert made.id == "a#translated"
    assert adapter.collate([made]).targets.tolist() == made.data.ids[made.data.start :].tolist()
    assert told.place[example.data.start] == made.data.start
    with pytest.raises(InputError, match="longer than the model's context"):
        adapter.translate([example], {"Ron": " ".join(["went"] * 20)})
    import torch

    with pytest.raises(InputError, match="no text"):
        RegressionAdapter(torch.nn.Linear(2, 1)).translate([], {})
