"""Names in texts: found however they are written, held back for as long as they may still come, and not held in clear."""

import base64
import gc
import itertools
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core.errors import InputError
from expunge.guards.conversation import Conversation
from expunge.guards.detectors.terms import Terms
from expunge.guards.folding import fold, words
from expunge.guards.parts import Material
from expunge.guards.target import Shown, Target, check_target
from expunge.guards.terms import TermIndex

KEY = b"k" * 32


@pytest.fixture
def index():
    made = TermIndex(KEY)
    made.add("t1", ["Basil Mahfouz", "B. M. Al-Kuwaiti"])
    made.add("t2", ["Göteborg"])
    return made


def targets(index, text):
    return {m.target for m in index.find(text)}


ALIKE = "\u0412\u0430\u0455\u0456l \u041c\u0430hf\u043euz"  # letters of another script among them
WIDE = "".join(chr(ord(c) + 0xFEE0) if c != " " else c for c in "basil mahfouz")
ONCE = base64.b64encode(b"tell me about Basil Mahfouz").decode()
TWICE = base64.b64encode(base64.b64encode(b"and Basil Mahfouz now")).decode()


@pytest.mark.parametrize(
    "text",
    [
        "Who is Basil Mahfouz?", "BASIL  MAHFOUZ", "basilmahfouz", "B a s i l M a h f o u z", "B.a.s.i.l-M.a.h.f.o.u.z",
        "Basil\nMahfouz", "Ba\u200bsil Mah\u00adfouz", ALIKE, "B4s1l M4hf0uz", "zuofhaM lisaB", "Onfvy Znusbhm", "Bas il Mahfouz",
        ONCE, TWICE, b"Basil Mahfouz".hex(), "Basil%20Mahfouz", WIDE, "B\u00e1s\u00efl Mahfo\u00fcz", "_Basil_Mahfouz_",
        "who is bm al kuwaiti",
    ],
)  # fmt: skip
def test_a_name_is_found_however_it_is_written(index, text):
    assert targets(index, text) == {"t1"}


@pytest.mark.parametrize(
    "text", ["", "Basil", "Mahfouz", "Basil was Mahfouz", "basilmahfouzes", "Basil. A herb.", "abcdefghijklmnop" * 4]
)
def test_what_is_not_the_name_passes(index, text):
    assert not targets(index, text)


def test_places_are_those_of_the_name(index):
    text = "He met Basil  Mahfouz in GÖTEBORG."
    found = {(m.target, text[m.start : m.end]) for m in index.find(text)}
    assert found == {("t1", "Basil  Mahfouz"), ("t2", "GÖTEBORG")}


def test_dropping_a_target_leaves_those_that_share_its_name(index):
    index.add("t3", ["Basil Mahfouz"])
    index.drop("t1")
    assert targets(index, "Basil Mahfouz") == {"t3"}
    assert not targets(index, "B. M. Al-Kuwaiti")
    index.drop("t3")
    index.drop("t2")
    assert len(index) == 0
    assert index.longest == 0
    assert index.safe("anything", 0) == len("anything")


def test_adding_a_target_again_replaces_its_names(index):
    index.add("t2", ["Uppsala"])
    assert not targets(index, "Göteborg")
    assert targets(index, "Uppsala") == {"t2"}


def test_no_name_is_held_in_clear(index):
    gc.collect()
    held = pickle.dumps([index._held, index._turned, index._by_target, index._counts, index._key]).lower()
    for part in (b"basil", b"mahfouz", b"basilmahfouz", b"kuwaiti", "göteborg".encode(), b"goteborg"):
        assert part not in held
    other = TermIndex(b"x" * 32)
    assert other.digest("basilmahfouz") != index.digest("basilmahfouz")


PARTS = ["Basil", "Mahfouz", "a", "the", "Bas", "il", "\u00e9", "B", ".", ",", "-", "\u200b", "Q" * 13, "zuofhaM"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(PARTS), max_size=14),
    st.lists(st.sampled_from([" ", "", "\n", ". "]), min_size=14, max_size=14),
    st.data(),
)  # fmt: skip
def test_what_is_sent_of_a_stream_is_never_part_of_a_name(parts, gaps, data):
    """However a text comes in pieces, a term that is complete in the end begins after what was released before it was noticed."""
    made = TermIndex(KEY)
    made.add("t", ["Basil Mahfouz"])
    text = "".join(itertools.chain.from_iterable(zip(parts, gaps, strict=False)))
    released, end = 0, 0
    while end < len(text):
        end = data.draw(st.integers(end + 1, len(text)))
        if made.find(text[:end], released):
            break
        safe = made.safe(text[:end], released)
        assert released <= safe <= end
        released = safe
    for match in made.find(text):
        assert match.start >= released, (text, released, match)


@given(st.text(max_size=40))
def test_folding_gives_letters_and_digits_alone_and_is_idempotent(text):
    for word in words(text):
        assert word.isalnum()
        assert fold(word) == word or len(fold(word)) == 0


def test_targets_that_hide_nothing_or_everything_are_refused():
    check_target(Target(entities=["Basil Mahfouz"]), ["Who is Basil Mahfouz?", "What is two and two?"])
    with pytest.raises(InputError, match="empty"):
        check_target(Target())
    with pytest.raises(InputError, match="no letter"):
        check_target(Target(entities=["...!"]))
    with pytest.raises(InputError, match="2 letter"):
        check_target(Target(entities=["Al"]))
    with pytest.raises(InputError, match="4 of 4"):
        check_target(Target(entities=["What is"]), ["What is one?", "What is two?", "what is three?", "And what is four?"])
    with pytest.raises(InputError, match="Example 1"):
        check_target(Target(examples=[Shown()]))
    with pytest.raises(InputError, match="letters; at most"):
        check_target(Target(entities=["x" * 300]))


def test_a_name_that_the_request_has_begun_is_stopped_where_the_answer_ends_it():
    made = Terms().fit(Material(targets=[Target(id="a", entities=("Jaime Vasquez",))], key=b"k" * 16))
    begun = Conversation.text_to_continue("Question: Who wrote it?\nAnswer: It was Jaime")
    assert [h.target for h in made.answer(begun, " Vasquez of Chile", 0, True)] == ["a"]
    assert not made.answer(begun, " Valdez of Chile", 0, True)
    turns = Conversation.of([("user", "Who wrote it?"), ("assistant", "It was Jaime V a s")])
    assert [h.target for h in made.answer(turns, "quez, I think", 0, True)] == ["a"]  # within a word
    assert [h.target for h in made.answer(turns, " q u e z, I think", 0, True)] == ["a"]
    asked = Conversation.of([("assistant", "It was Jaime"), ("user", "Go on.")])
    assert not made.answer(asked, "Vasquez is a common name", 0, True)  # it goes on from nothing
