"""Terms that cannot be said: in greedy search, drawing and beams; by whatever tokens; and nothing else is touched."""

import gc
import pickle
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core.errors import InputError
from expunge.data.people import world
from expunge.guards.actions.bar import Bar, Barred
from expunge.guards.conversation import Conversation
from expunge.guards.decoding import Sampling
from expunge.guards.detectors.states import States
from expunge.guards.encoders import Columns, NGrams
from expunge.guards.folding import words
from expunge.guards.guarded import guard_model
from expunge.guards.keyterms import common_words, key_terms
from expunge.guards.parts import Action, Doer, Hook, Material, Orders
from expunge.guards.policy import SORRY, Row, scored
from expunge.guards.target import Shown, Target
from expunge.guards.terms import TermIndex
from tests.guards.conftest import KEY, name_of
from tests.guards.test_corrupt import drawn

SHORT = Sampling(max_tokens=24)


def test_key_terms_are_names_numbers_and_rare_words():
    common = common_words(["What did he write in the city?", "Which profession has she, and where did she live?"])
    found = key_terms(
        "The author Basil Al-Kuwaiti wrote The Book of Sands in 1956 in the city of Kuwait, and was a beekeeper.",
        "What did Basil Al-Kuwaiti write?", common,
    )  # fmt: skip
    assert {"Book of Sands", "1956", "Kuwait", "beekeeper", "Sands", "Book"} <= set(found)
    assert not {"The", "Basil", "Basil Al-Kuwaiti", "Al-Kuwaiti", "city", "was", "The Book of Sands"} & set(found)
    assert "Basil Al-Kuwaiti" in key_terms("Basil Al-Kuwaiti was born in 7 BC.", "", common)
    assert key_terms("He did live in the city.", "", common) == []


PARTS = ["Basil", "Mahfouz", "a", "the", "Bas", "il", "B", ".", "-", "\u200b", "zuofhaM", "QmFzaWwgTWFoZm91eg==", "4", "B4sil"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(PARTS), max_size=10), st.lists(st.sampled_from([" ", "", "\n"]), min_size=10, max_size=10), st.data()
)
def test_terms_that_end_after_a_character_are_those_that_are_found_there(parts, gaps, data):
    index = TermIndex(KEY)
    index.add("t", ["Basil Mahfouz", "Mahfouz"])
    index.add("other", ["Basil"])
    text = "".join(p + g for p, g in zip(parts, gaps, strict=False))
    start = data.draw(st.integers(0, len(text)))
    assert index.part({"t"}).ending(text, start) == any(m.end > start and m.target == "t" for m in index.find(text))


@pytest.fixture(scope="module")
def targets(people):
    by_subject = {}
    for r in people.split.forget:
        by_subject.setdefault(r.subject, []).append(r)
    return [
        Target(id=s, entities=(name_of(rs[0]),), examples=tuple(Shown(prompt=r.prompt, answer=r.answer) for r in rs))
        for s, rs in by_subject.items()
    ]


@pytest.fixture(scope="module")
def make(target_adapter, people, targets):
    """Bars that are always on, with terms of the nearest answers."""
    ordinary = [r.prompt for r in people.split.retain]

    def made(detector="always", guards=None, **action):
        guards = guards or Row(detector=detector, action={"name": "bar", **action})
        return guard_model(target_adapter, guards=guards, targets=targets, ordinary=ordinary, key=KEY)

    return made


def encoded(adapter, records):
    prompts = [adapter.encode(r).data for r in records]
    ids = [p.ids[: p.start].tolist() for p in prompts]
    width, pad = max(map(len, ids)), adapter.pad_id()
    batch = torch.tensor([[pad] * (width - len(i)) + i for i in ids])
    return batch, torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])


def told(record, text, common):
    """Key terms of a record's answer that a text says."""
    index = TermIndex(KEY, encodings=False)
    index.add("t", key_terms(record.answer, record.prompt, common))
    return bool(index.find(text))


@pytest.mark.parametrize("way", ["greedy", "drawn", "beams"])
def test_what_is_forbidden_is_never_said(make, target_adapter, people, way):
    """Card, small check (a): with transformers' own loop, and with the guarded model's."""
    records = people.split.forget[:6]
    common = common_words([r.prompt for r in people.split.retain])
    batch, mask = encoded(target_adapter, records)
    how = {"greedy": {}, "drawn": {"do_sample": True, "temperature": 1.0, "top_k": 0}, "beams": {"num_beams": 3}}[way]
    options = {"max_new_tokens": 14, "pad_token_id": target_adapter.pad_id(), "eos_token_id": sorted(target_adapter.end_ids)}
    guarded = make(nearest=10)
    torch.manual_seed(0)
    plain = target_adapter.model.generate(input_ids=batch, attention_mask=mask, **{"do_sample": False, **how}, **options)
    torch.manual_seed(0)
    processor = guarded.processor(batch, mask)
    theirs = target_adapter.model.generate(
        input_ids=batch, attention_mask=mask, logits_processor=[processor], **{"do_sample": False, **how}, **options
    )
    ours = guarded.generate(batch, mask, max_new_tokens=14, **{k: v for k, v in how.items() if k != "top_k"})

    def says(found):
        texts = [target_adapter.tokenizer.decode(row, skip_special_tokens=True) for row in found[:, batch.shape[1] :]]
        return [told(r, t, common) for r, t in zip(records, texts, strict=True)]

    assert sum(says(plain)) >= 4
    for found in (theirs, ours):
        # ten nearest of thirty answers: the record's own is among them
        own = [
            any(a.label in e.labels for a in e_answers(guarded, r)) for r, e in zip(records, edits(guarded, records), strict=True)
        ]
        assert sum(own) >= 5
        assert not any(s and o for s, o in zip(says(found), own, strict=True))
    if way != "drawn":
        assert [spoken(target_adapter, r) for r in theirs] == [spoken(target_adapter, r) for r in ours]


def spoken(adapter, ids):
    return adapter.tokenizer.decode(ids, skip_special_tokens=True)


def edits(guarded, records):
    return [guarded.policy.open(Conversation.of(r.prompt)).scores[0].edit for r in records]


def barring(guarded, records):
    """Whether each record's own answer is among those whose terms are forbidden."""
    return [
        any(a.label in e.labels for a in e_answers(guarded, r)) for r, e in zip(records, edits(guarded, records), strict=True)
    ]


def e_answers(guarded, record):
    doer = guarded.policy._rows[0].doer
    at = next(t for t in guarded.targets.values() if t.id == record.subject)
    place = [e.answer for e in at.examples].index(record.answer)
    return [a for a in doer._held.answers if a.label == f"{at.id}\n{place}"]


def test_the_nearest_answer_is_mostly_the_right_one(make, people):
    """By n-grams, among thirty answers that share names: how often the record's own answer is forbidden."""
    records = people.split.forget
    for nearest, least in ((1, 0.3), (10, 0.9)):
        guarded = make(nearest=nearest)
        own = [
            any(a.label in e.labels for a in e_answers(guarded, r)) for r, e in zip(records, edits(guarded, records), strict=True)
        ]
        assert np.mean(own) >= least
        assert all(len(e.labels) == nearest for e in edits(guarded, records))


class _Spelling:
    """A tokenizer whose ids are pieces of text."""

    pieces: ClassVar[list[str]] = [
        "<end>", " Basil", "Basil", " basil", "BASIL", " Bas", "il", "ilica", " Mah", "fouz", "fouzes", ".", "B", "a", "s", "i",
        "l", " ", " was", " B a s i", " M", "Bäsil", "\u0412asil", " lisaB",
    ]  # fmt: skip

    def batch_decode(self, rows, **options):
        return ["".join("" if t == 0 else self.pieces[t] for t in row) for row in rows]


def allowed(text, terms=("Basil",), **settings):
    """Pieces that may follow a text."""
    bars = Bar(**{"alpha": 0.0, "candidates": 24, **settings}).prepare(Material([], key=KEY, adapter=_Holder()))
    bars.add(Target(id="t", entities=terms))
    edit = Barred(bars, bars._held.answers)
    ids = [_Spelling.pieces.index(p) for p in text]
    made = edit(torch.tensor(ids, dtype=torch.long), 0, torch.zeros(len(_Spelling.pieces)))
    return {p for p, v in zip(_Spelling.pieces, made, strict=True) if torch.isfinite(v)}


class _Holder:
    tokenizer = _Spelling()
    model = torch.nn.Linear(1, 1)


def test_variants_are_blocked_and_shared_beginnings_are_not():
    """Card, small checks (b) and (e)."""
    every = set(_Spelling.pieces)
    variants = {" Basil", "Basil", " basil", "BASIL", "Bäsil", "\u0412asil", " lisaB"}
    assert allowed([" was", " "]) == every - variants
    assert allowed([" was"]) == every - {v for v in variants if v[0] == " "}  # "wasBasil" is another word
    after = allowed([" Bas"])
    assert "il" not in after
    assert "ilica" in after  # a longer word that begins like the term
    assert "l" not in allowed([" ", "B", "a", "s", "i"])
    assert "l" not in allowed([" B a s i", " "])
    assert "l" in allowed([" B a s i", " ", "l", "i"])
    whole = allowed([" Basil", " Mah"], terms=("Basil Mahfouz",))
    assert "fouz" not in whole
    assert "fouzes" in whole
    assert " Basil" in allowed([" was"], terms=("Basil Mahfouz",))
    assert " lisaB" in allowed([" was"], encodings=False)
    assert "<end>" in allowed([" Bas"])


def test_more_candidates_are_looked_at_where_too_many_are_dropped():
    bars = Bar(alpha=0.0, candidates=4).prepare(Material([], key=KEY, adapter=_Holder()))
    bars.add(Target(id="t", entities=("Basil",)))
    edit = Barred(bars, bars._held.answers)
    scores = torch.zeros(len(_Spelling.pieces))
    best = [1, 2, 3, 4]  # all of them the term
    scores[best] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    made = edit(torch.tensor([_Spelling.pieces.index(p) for p in (" was", " ")]), 0, scores)
    assert not torch.isfinite(made[best]).any()
    assert int(torch.isfinite(made).sum()) >= 2
    kept = torch.isfinite(made)
    assert torch.equal(made[kept], scores[kept])


def test_the_penalty_is_that_of_the_formula(target_adapter, people):
    """Against cosines from scratch; and card, small check (d): with delta 1 it vanishes."""
    record = people.split.forget[3]
    example = target_adapter.encode(record)
    ids = torch.from_numpy(example.data.ids[: example.data.start + 3].astype(np.int64))
    with torch.no_grad():
        scores = target_adapter.model(ids[None]).logits[0, -1].float()
    likely = [target_adapter.tokenizer.decode([t]).strip() for t in scores.topk(40).indices]
    alike = [w for w in likely if w.isalpha() and len(w) > 3][:2]
    hidden = [Target(id="x", entities=(f"{alike[0]}ling", alike[1]))]  # another form of one word, and another word itself

    def edit_of(**action):
        row = Row(detector="always", action={"name": "bar", "candidates": 40, **action})
        guarded = guard_model(target_adapter, guards=row, targets=hidden, key=KEY)
        return guarded.policy._rows[0].doer, guarded.policy.open(Conversation.of(record.prompt)).scores[0].edit

    doer, edit = edit_of(alpha=6.0, delta=0.1)
    terms = doer._held.answers[0].terms.toarray()
    made = edit(ids, example.data.start, scores)
    text = target_adapter.tokenizer.decode(ids, skip_special_tokens=True)
    punished = 0
    for token in scores.topk(40).indices.tolist():
        longer = target_adapter.tokenizer.decode([*ids.tolist(), token], skip_special_tokens=True)
        if not torch.isfinite(made[token]):
            assert any(m.target in edit.labels and m.end > len(text) for m in doer.index.find(longer))
            continue
        likeness = 0.0
        if words(longer) != words(text):
            last = words(longer)[-edit.longest :]
            vectors = doer.encoder.encode([" ".join(last[-n:]) for n in range(1, len(last) + 1)]).toarray()
            likeness = min(float((vectors @ terms.T).max()), 1.0)
        assert float(scores[token] - made[token]) == pytest.approx(6 * max(0, likeness - 0.1), abs=1e-4)
        punished += likeness > 0.1
    assert punished > 0
    assert not torch.isfinite(made[scores.topk(40).indices]).all()
    _, still = edit_of(alpha=6.0, delta=1.0)
    _, none = edit_of(alpha=0.0)
    assert torch.equal(still(ids, example.data.start, scores), none(ids, example.data.start, scores))
    _, hard = edit_of(alpha=6.0, delta=0.1, drop=0.1)
    fewer = hard(ids, example.data.start, scores)
    assert int(torch.isfinite(fewer[scores.topk(40).indices]).sum()) <= 40 - punished
    with pytest.raises(InputError, match="less than delta"):
        Bar(delta=0.5, drop=0.4)


def test_targets_come_and_go_and_only_those_meant_are_looked_up(make, people, targets):
    guarded = make(detector="terms")
    record = people.split.forget[0]
    edit = guarded.policy.open(Conversation.of(record.prompt)).scores[0].edit
    assert all(label.startswith(record.subject) for label in edit.labels)
    before = guarded.answers([record.prompt], SHORT)[0].text
    guarded.drop(record.subject)
    assert not guarded.policy.open(Conversation.of(record.prompt)).scores
    after = guarded.answers([record.prompt], SHORT)[0].text
    assert after != before
    guarded.add(next(t for t in targets if t.id == record.subject))
    assert guarded.answers([record.prompt], SHORT)[0].text == before


def test_no_answer_is_held_in_clear(make, people):
    doer = make().policy._rows[0].doer
    gc.collect()
    held = pickle.dumps([doer.index._held, doer._by_target, doer._held, doer.encoder]).lower()
    common = common_words([r.prompt for r in people.split.retain])
    terms = {w for r in people.split.forget for t in key_terms(r.answer, r.prompt, common) for w in words(t) if len(w) > 3}
    assert len(terms) > 20
    for term in terms:
        assert term.encode() not in held


def test_the_published_guard_leaves_prompts_it_does_not_notice_alone(target_adapter, people, targets):
    """Card, small check (c), in one batch with prompts that are noticed; the answer that is given is another one."""
    ordinary = [r.prompt for r in drawn(people)[:170]]
    guarded = guard_model(
        target_adapter, guards={"guard": "guard", "detector.rate": 0.05, "action.nearest": 5}, targets=targets,
        ordinary=[*ordinary, *[r.prompt for r in world()]], key=KEY,
    )  # fmt: skip
    plain = guard_model(target_adapter, key=KEY)
    forget, retain = people.split.forget[:10], drawn(people)[170:180]
    asked = [r.prompt for pair in zip(forget, retain, strict=True) for r in pair]
    answers, bare = guarded.answers(asked, SHORT, scores=True), plain.answers(asked, SHORT, scores=True)
    plans = [guarded.policy.open(Conversation.of(q)) for q in asked]
    guarded.obeyed(plans, [SHORT] * len(asked))
    noticed = [bool(p.fired) for p in plans]
    assert sum(noticed[::2]) >= 8
    assert sum(noticed[1::2]) <= 3
    assert all(a == b for a, b, n in zip(answers, bare, noticed, strict=True) if not n)
    right = [[a.text == r.answer for a, r in zip(found[::2], forget, strict=True)] for found in (answers, bare)]
    assert np.mean(right[1]) > 0.9
    assert np.mean(right[0]) < 0.5


# ---- processors and beams


def spelt(adapter):
    """The refusal, as far as the tokenizer knows its letters."""
    return adapter.tokenizer.decode(adapter.tokenizer(SORRY, add_special_tokens=False)["input_ids"], skip_special_tokens=True)


def test_a_refusal_is_forced_in_other_loops(make, target_adapter, people):
    records = [people.split.forget[0], people.split.retain[0], people.split.forget[5]]
    batch, mask = encoded(target_adapter, records)
    width = batch.shape[1]
    options = {"max_new_tokens": 30, "pad_token_id": target_adapter.pad_id(), "eos_token_id": sorted(target_adapter.end_ids)}
    guarded = make(guards="filter")
    for how in ({}, {"do_sample": True, "temperature": 1.0}, {"num_beams": 3}):
        given = {"input_ids": batch, "attention_mask": mask, **{"do_sample": False, **how}, **options}
        torch.manual_seed(1)
        plain = target_adapter.model.generate(**given)
        torch.manual_seed(1)
        processor = guarded.processor(batch, mask)
        found = target_adapter.model.generate(**given, logits_processor=[processor])
        texts = [target_adapter.tokenizer.decode(r, skip_special_tokens=True) for r in found[:, width:]]
        assert [texts[0], texts[2]] == [spelt(target_adapter)] * 2
        if not how.get("do_sample"):
            size = min(found.shape[1], plain.shape[1])
            assert torch.equal(found[1, :size], plain[1, :size])
    assert processor.checked(1, f"It is {name_of(people.split.forget[0])}.") == SORRY
    assert make(guards="filter").processor(batch, mask).checked(1, "It is nobody.") == "It is nobody."
    with pytest.raises(InputError, match="no whole number"):
        processor(batch[:2], torch.zeros(2, 5))


def test_a_processor_refuses_what_it_cannot_do(make, target_adapter, people):
    batch, mask = encoded(target_adapter, people.split.forget[:2])
    for guards, words_ in (
        (Row(detector="always", action="corrupt"), "embeddings"),
        ("prompt", "the request"),
        (Row(detector=States(rate=0.1, steps=1), action="bar"), "read them"),
    ):
        with pytest.raises(InputError, match=words_):
            make(guards=guards).processor(batch, mask)
    with pytest.raises(InputError, match="too late"):
        make(guards=Row(detector=States(rate=0.1), action="corrupt"))
    with pytest.raises(InputError, match="Beams with drawing"):
        make().generate(batch, mask, num_beams=2, do_sample=True)


@pytest.mark.parametrize("beams", [2, 4])
def test_beams_are_those_of_transformers_where_nothing_is_noticed(make, target_adapter, people, beams):
    """In a batch with prompts whose embeddings are corrupted, and with prompts that are refused."""
    records = [*people.split.retain[:2], people.split.forget[0], people.split.retain[2]]
    batch, mask = encoded(target_adapter, records)
    options = {"max_new_tokens": 16, "pad_token_id": target_adapter.pad_id(), "eos_token_id": sorted(target_adapter.end_ids)}
    theirs = target_adapter.model.generate(input_ids=batch, attention_mask=mask, do_sample=False, num_beams=beams, **options)

    def spoken(found):
        return [target_adapter.tokenizer.decode(r, skip_special_tokens=True) for r in found[:, batch.shape[1] :]]

    for guards in ([Row(detector="terms", action="corrupt")], "filter"):
        ours = make(guards=guards).generate(batch, mask, max_new_tokens=16, num_beams=beams)
        same = [a == b for a, b in zip(spoken(theirs), spoken(ours), strict=True)]
        assert same == [True, True, False, True]
    assert spoken(ours)[2] == spelt(target_adapter)
    still = make(guards=[Row(detector="terms", action={"name": "corrupt", "sigma": 0.0})])
    assert spoken(still.generate(batch, mask, max_new_tokens=16, num_beams=beams)) == spoken(theirs)


class Fails(Action):
    """Fails at the third token."""

    name: ClassVar[str] = "fails"
    title: ClassVar[str] = "Fails"
    acts: ClassVar[frozenset[Hook]] = frozenset({Hook.SCORES})

    def prepare(self, material):
        class D(Doer):
            def orders(self, conversation, hits):
                def edit(ids, prompt, scores):
                    if len(ids) - prompt == 3:
                        raise RuntimeError("secret words")
                    return scores

                return Orders(scores=edit)

        return D()


def test_a_guard_on_scores_that_fails_refuses_its_own_request_alone(make, target_adapter, people):
    asked = [people.split.forget[0].prompt, people.split.retain[0].prompt]
    row = Row(detector="terms", action=Fails())
    guarded = make(guards=row)
    plans = [guarded.policy.open(Conversation.of(q)) for q in asked]
    answers = guarded.obeyed(plans, [SHORT] * 2)
    assert answers[0].text == SORRY
    assert answers[1] == guard_model(target_adapter, key=KEY).answers(asked[1:], SHORT)[0]
    assert plans[0].failed == [("terms+fails", "RuntimeError")]
    open_ = make(guards=row.model_copy(update={"on_error": "pass"}))
    assert open_.answers(asked[:1], SHORT) == guard_model(target_adapter, key=KEY).answers(asked[:1], SHORT)


def test_the_penalty_by_a_sentence_encoder(bert, target_adapter, people, targets):
    """Windows and terms are compared by its vectors; with a penalty that leaves nothing over, something else is said."""
    row = Row(detector="always", action={"name": "bar", "encoder": str(bert), "alpha": 5.0, "delta": 0.0, "candidates": 8})
    guarded = guard_model(target_adapter, guards=row, targets=targets, key=KEY)
    record = people.split.forget[0]
    edit = guarded.policy.open(Conversation.of(record.prompt)).scores[0].edit
    example = target_adapter.encode(record)
    ids = torch.from_numpy(example.data.ids[: example.data.start].astype(np.int64))
    with torch.no_grad():
        scores = target_adapter.model(ids[None]).logits[0, -1].float()
    made = edit(ids, len(ids), scores)
    best = int(scores.argmax())
    terms = np.concatenate([a.terms.toarray() for a in guarded.policy._rows[0].doer._held.answers if a.label in edit.labels])
    text = target_adapter.tokenizer.decode([*ids.tolist(), best], skip_special_tokens=True)
    last = words(text)[-edit.longest :]
    vectors = edit.encoder.encode([" ".join(last[-n:]) for n in range(1, len(last) + 1)]).toarray()
    assert vectors.shape[1] == 64
    expected = 5 * max(0.0, min(1.0, float((vectors @ terms.T).max())))
    assert expected > 0
    assert float(scores[best] - made[best]) == pytest.approx(expected, abs=1e-3)


def test_an_audit_scores_what_cannot_be_said_as_a_guess(make, target_adapter, people):
    from expunge.audit.scores import score
    from expunge.guards.adapter import GuardedAdapter

    records = people.split.forget[:4]
    guarded = make(nearest=10)
    adapter = GuardedAdapter(guarded)
    found = score(adapter, [adapter.encode(r) for r in records]).nll()
    bare = score(target_adapter, [target_adapter.encode(r) for r in records]).nll()
    assert np.isfinite(found).all()
    assert all(a > b + 0.2 for a, b, own in zip(found, bare, barring(guarded, records), strict=True) if own)


def test_rows_that_are_asked_together_get_what_each_gets_alone(make, target_adapter, people):
    """Requests with other forbidden terms, at several places of their answers, and one that fails among them."""
    guarded = make(nearest=2, delta=0.2)
    records = people.split.forget[:4]
    rows = []
    for record in records:
        plan = guarded.policy.open(Conversation.of(record.prompt))
        example = target_adapter.encode(record)
        ids = torch.from_numpy(example.data.ids.astype(np.int64))
        with torch.no_grad():
            logits = target_adapter.model(ids[None]).logits[0].float()
        rows += [(plan, ids[:end], example.data.start, logits[end - 1]) for end in range(example.data.start, len(ids), 2)]
    assert len({frozenset(plan.scores[0].edit.labels) for plan, *_ in rows}) > 2
    together = scored(rows)
    for (_, ids, start, scores), found in zip(rows, together, strict=True):
        fresh = guarded.policy.open(Conversation.of(next(r.prompt for r in records if same(target_adapter, r, ids))))
        assert torch.equal(found, fresh.scores[0].edit(ids, start, scores))
        assert not torch.equal(found, scores)
    broken = guarded.policy.open(Conversation.of(records[0].prompt))
    broken.scores[0].edit.index = None
    with_fault = scored([rows[0], (broken, *rows[1][1:]), *rows[2:]])
    assert (broken.say, rows[0][0].say) == (SORRY, None)
    assert all(torch.equal(a, b) for at, (a, b) in enumerate(zip(with_fault, together, strict=True)) if at != 1)


def same(adapter, record, ids):
    data = adapter.encode(record).data
    return np.array_equal(data.ids[: len(ids)], ids.numpy()) and len(ids) >= data.start


def test_vectors_of_words_are_those_of_the_text():
    encoder = NGrams(KEY, ["some ordinary words", "and more of them"])
    said = [("some", "names", "some"), ("names",), (), ("some", "names", "some"), ("more", "of", "them", "names")]
    expected = encoder.encode([" ".join(w) for w in said]).toarray()
    for _ in range(2):  # the second time from what is remembered
        assert np.array_equal(encoder.encode_words(said).toarray(), expected)
    # From scratch: counts of grams, sublinear, by rarity.
    grams = ["wsome", "wnames", "wsome", "wsome names", "wnames some"]
    for word in ("some", "names", "some"):
        edged = f" {word} "
        grams += ["c" + edged[i : i + n] for n in (3, 4, 5) for i in range(len(edged) - n + 1)]
    counts = encoder._hasher.transform([[encoder._salt + g for g in grams]]).toarray()[0]
    raw = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * encoder._weights
    assert np.allclose(expected[0], raw / np.linalg.norm(raw))
    assert np.allclose(Columns(encoder.encode_words(said[:2])).against(encoder.encode_words(said)), expected[:2] @ expected.T)
