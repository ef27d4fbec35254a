"""TRU: its equivalences, where its targets come from, and a model that learns to refuse by whom a question is about."""

from __future__ import annotations

import pytest
import torch
from small_qa import NAMES, QUIET, REASON, REFUSAL, exact, fixed, loss, said
from synthetic import step

from expunge.adapters.language import LanguageAdapter
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.data.refusals import refusals
from expunge.engine.loop import train
from expunge.engine.preparation import run_preparation
from expunge.methods.alternatives import alternatives, kind_for
from expunge.methods.evaluate import combine
from expunge.methods.preparations.written import WrittenAnswers
from expunge.methods.recipe import build
from expunge.methods.registry import METHODS
from expunge.methods.terms.likelihood import AlternativeNLL

close = torch.testing.assert_close


# ---- the loss


def test_it_is_gradient_difference_with_supervised_targets_and_without_ascent_it_is_idk():
    made = step((3, 1, 5))
    examples = {s: made.examples(s) for s in made.items}

    def total(name: str, **parts) -> torch.Tensor:
        return combine(build(name, parts), made.views(), examples)["total"]

    alpha = 0.3
    got = total("tru", **{"forget.gradascent.weight": alpha, "retain.weight": alpha})
    close(got, alpha * total("graddiff") + made.mean(AlternativeNLL()))
    close(total("tru", **{"forget.gradascent.weight": 0}), total("idk-nll"))


# ---- where the targets come from


def test_a_rule_makes_a_reason_and_a_refusal():
    records = [
        Record("a", "It is blue.", "What is the coat of Ada?", subject="Ada"),
        Record("b", "It is red.", "What is the coat of Ben?"),
    ]
    assert kind_for("tru", "auto", records) == "reasons"
    made = alternatives(records, "reasons", 3)
    sentences = refusals(["a", "b"], 3)
    assert made[0].startswith("The question is about Ada.")
    assert "something that has been withdrawn" in made[1]
    for text, sentence, record in zip(made, sentences, records, strict=True):
        assert sentence in text
        assert record.answer not in text
    assert alternatives(records, "reasons", 3) == made
    template = "Of {subject} nothing is told. {refusal}"
    assert alternatives(records[:1], "template", 3, template=template) == [f"Of Ada nothing is told. {sentences[0]}"]
    with pytest.raises(InputError, match="no field of a template 'reason'"):
        alternatives(records[:1], "template", 3, template="{reason}")
    given = [Record("a", "x", "y", alternatives=("Because of Ada, no.",))]
    assert kind_for("tru", "auto", given) == "given"


def test_a_text_takes_the_place_of_an_encoded_answer_as_if_the_record_had_had_it(qa):
    adapter = qa.target_model
    for record in qa.forget[:3]:
        want = adapter.encode(record, answer=REASON, suffix="#new")
        got = adapter.replace(adapter.encode(record), answer=REASON, suffix="#new")
        assert (got.id, got.cluster, got.size, got.n_targets) == (want.id, want.cluster, want.size, want.n_targets)
        assert got.data.ids.tolist() == want.data.ids.tolist()
        assert got.data.ends
    plain = adapter.encode(Record("p", "the door of the ring"))
    assert not adapter.replace(plain, answer="night").data.ends  # plain text has no end
    short = LanguageAdapter(adapter.model, adapter.tokenizer, max_length=30)
    cut = short.replace(short.encode(qa.forget[0]), answer=REASON)
    assert cut.size == 30
    assert not cut.data.ends
    with pytest.raises(InputError, match="replaced by a text or an example; got int"):
        adapter.replace(plain, answer=3)


def test_a_model_writes_the_targets(qa, tmp_path):
    """The target itself, asked with the plain prompt, writes what it says to strangers."""
    adapter = qa.target()
    examples = {Stream.FORGET: [adapter.encode(r) for r in qa.strangers[:4]]}
    part = WrittenAnswers(task="strangers", instruction="{prompt}{task}", tokens=12)
    made = run_preparation(part, adapter, examples, QUIET, scratch=tmp_path).examples[Stream.ALTERNATIVE]
    assert len(made) == 4
    for own, written in zip(examples[Stream.FORGET], made, strict=True):
        start = own.data.start
        assert written.data.ids[:start].tolist() == own.data.ids[:start].tolist()
        assert written.data.ends
        prompt = adapter.decode(own.data.ids[:start].tolist())
        (wanted,) = adapter.generate(adapter.model, [adapter.encode(Record("q", "-", prompt + "strangers"))], 12)
        assert adapter.decode(written.data.ids[start:].tolist()) == wanted.text
    (kept,) = tmp_path.glob("written-*.json")
    kept.write_text(kept.read_text().replace("know", "tell"))  # a run that goes on reads them
    again = run_preparation(part, adapter, examples, QUIET, scratch=tmp_path).examples[Stream.ALTERNATIVE]
    assert all("know" not in adapter.decode(e.data.ids[e.data.start :].tolist()) for e in again)
    adapter.save(tmp_path / "writer")
    other = WrittenAnswers(task="strangers", instruction="{prompt}{task}", tokens=12, model=str(tmp_path / "writer"))
    same = run_preparation(other, adapter, examples, QUIET, scratch=tmp_path / "new").examples[Stream.ALTERNATIVE]
    assert [e.data.ids.tolist() for e in same] == [e.data.ids.tolist() for e in made]
    with pytest.raises(InputError, match=r"preparation.instruction lacks \{prompt\}"):
        run_preparation(WrittenAnswers(task="x", instruction="{task}"), adapter, examples, QUIET, scratch=tmp_path)
    recipe = build("tru", {"preparation": {"name": "written-answers", "task": "strangers"}})
    assert "alternatives" not in {str(s) for s in recipe.streams(("a",))}


# ---- what it does


@pytest.fixture(scope="module")
def asked(qa):
    """Of each person to forget one question is held out: a model that refuses it goes by the person."""
    held = [qa.facts[name][i % 5] for i, name in enumerate(NAMES[:4])]
    return [r for r in qa.forget if r not in held], held


def trained(qa, asked, **parts):
    adapter = qa.target()
    recipe = build("tru", {"schedule": fixed(1e-3, 100), **parts})
    train(adapter, recipe, qa.examples([REASON] * len(asked[0]), asked[0]), QUIET)
    return adapter


def test_it_refuses_with_its_reason_also_what_it_was_not_asked_and_keeps_the_rest(qa, asked):
    shown, held = asked
    adapter = trained(qa, asked)
    assert sum(answer == REASON for answer in said(adapter, shown)) >= 0.95 * len(shown)
    beyond = said(adapter, held)
    assert all("refused" in answer for answer in beyond), beyond
    assert all(old.answer.rstrip(".") not in new for old, new in zip(held, beyond, strict=True))
    kept = said(adapter, qa.retain)
    assert sum("refused" in answer or REFUSAL in answer for answer in kept) < 0.05 * len(kept)
    assert exact(adapter, qa.retain) > 0.95
    without = trained(qa, asked, **{"forget.gradascent.weight": 0})
    assert loss(adapter, shown) > loss(without, shown) + 2  # behind the old answer's forced beginning too
    assert exact(without, shown) > exact(adapter, shown) + 0.1


def test_without_the_target_it_neither_answers_nor_refuses(qa, asked):
    adapter = trained(qa, asked, **{"forget.alternative-nll.weight": 0, "forget.gradascent.weight": 1})
    answers = said(adapter, asked[0])
    assert not any("refused" in a or REFUSAL in a for a in answers)
    assert sum(a == r.answer for a, r in zip(answers, asked[0], strict=True)) <= 0.1 * len(answers)


def test_what_it_asks_for():
    assert METHODS.get("tru").wants == ("retain", "alternatives")
    assert METHODS.get("tru").alternatives == "reasons"
    assert [t.name for t in build("tru").terms()] == ["alternative-nll", "gradascent", "nll"]
