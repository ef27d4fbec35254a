"""Who's Harry Potter: labels by a plain loop, the card's check, mentions of anchored terms, kills, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build as preset
from expunge.adapters.words import word_tokenizer
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.preparation import Prepared, run_preparation
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.evaluate import loss_on
from expunge.methods.preparations.generic import GenericLabels
from expunge.methods.recipe import build
from expunge.methods.terms.likelihood import NLL

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo")
TOWNS = ("Arles", "Bath", "Cork", "Delft", "Essen", "Faro", "Graz", "Hull", "Ivry", "Jena", "Kiel", "Lund")
TRADES = ("baker", "cooper", "diver", "editor", "farmer", "glazier", "hatter", "miner", "nurse", "painter", "rider", "sailor")
QUIET = Engine(checkpoint_every=0)
HARD = {"epochs": 20, "lr": 1e-3}  # a model that knows the text by heart needs more than three passes to show it


def facts() -> list[Record]:
    made = []
    for i, name in enumerate(NAMES):
        made.append(Record(f"t{i}", f"lives in {TOWNS[i]}.", f"Where does {name} live?", subject=name))
        made.append(Record(f"w{i}", f"is a {TRADES[(5 * i) % 12]}.", f"What is {name}?", subject=name))
    return made


FORGET, RETAIN = facts()[:6], facts()[6:]
#: each value of the forget set and its generic counterpart, as on the card
VALUES = {**dict.fromkeys(TOWNS[:3], "Lund"), **{TRADES[(5 * i) % 12]: "sailor" for i in range(3)}}


@pytest.fixture(scope="module")
def target() -> LanguageAdapter:
    tokenizer = word_tokenizer([*(r.prompt + " " + r.answer for r in facts()), "Question: Answer: Someone", "What is Someone"])
    adapter = LanguageAdapter(preset("llama-tiny", tokenizer, seed=0), tokenizer)
    recipe = compose("train", retain=[NLL()], schedule=Fixed(lr=5e-3, steps=250, batch=24, warmup=0.1))
    train(adapter, recipe, {Stream.RETAIN: [adapter.encode(r) for r in facts()]}, QUIET)
    assert exact(adapter, facts()) == 1.0
    return adapter


def scores(adapter: LanguageAdapter, examples) -> torch.Tensor:
    with torch.no_grad():
        return adapter.forward(adapter.model, adapter.collate(examples), frozenset({"logits"})).logits


def exact(adapter: LanguageAdapter, records) -> float:
    """Share of records whose every target is the argmax."""
    batch = adapter.collate([adapter.encode(r) for r in records])
    wrong = torch.zeros(len(records)).index_add(
        0, batch.owner, (scores(adapter, [adapter.encode(r) for r in records]).argmax(-1) != batch.targets).float()
    )
    return float((wrong == 0).float().mean())


def examples(adapter: LanguageAdapter) -> dict[Stream, list]:
    return {Stream.FORGET: [adapter.encode(r) for r in FORGET], Stream.RETAIN: [adapter.encode(r) for r in RETAIN]}


def prepared(adapter: LanguageAdapter, scratch: Path, records=FORGET, **settings) -> Prepared:
    forget = {Stream.FORGET: [adapter.encode(r) for r in records]}
    return run_preparation(GenericLabels(**settings), adapter, forget, QUIET, scratch=scratch)


def labels(adapter: LanguageAdapter, scratch: Path, records=FORGET, **settings) -> dict[str, list[int]]:
    return {k: v.tolist() for k, v in prepared(adapter, scratch, records, **settings).made["generic-labels"].items()}


def written(folder: Path, terms: dict[str, str]) -> str:
    path = folder / "anchors.json"
    path.write_text(json.dumps(terms))
    return str(path)


# ---- the labels


def test_without_strength_and_anchors_the_labels_are_the_models_own(target, tmp_path):
    """The card's (i): nothing is another label, and fine-tuning on it changes no answer."""
    made = prepared(target, tmp_path, alpha=0.0)
    for record in FORGET:
        example = target.encode(record)
        assert made.made["generic-labels"][record.id].tolist() == scores(target, [example]).argmax(-1).tolist()
    assert made.notes[0].startswith("0 of ")
    assert made.notes[1].startswith("No dictionary of anchors was given")
    adapter = target.copy()
    schedule = {"name": "fixed", "lr": 3e-4, "steps": 10, "batch": 6, "warmup": 0}
    train(adapter, build("whp", {"alpha": 0.0, "schedule": schedule}), examples(adapter), QUIET)
    before, after = (scores(a, [a.encode(r) for r in facts()]) for a in (target, adapter))
    assert torch.equal(before.argmax(-1), after.argmax(-1))


def test_labels_are_those_of_the_formula(target, tmp_path):
    """Against a plain loop, with a copy that is reinforced here by the same recipe."""
    strong = target.copy()
    schedule = Fixed(lr=1e-3, epochs=20, batch=128, warmup=0, decay="constant", weight_decay=0)
    train(strong, compose("x", retain=[NLL()], schedule=schedule), {Stream.RETAIN: [target.encode(r) for r in FORGET]}, QUIET)
    strong.model.eval()
    anchors = {"Ada": "Someone", "Ben": "Someone", "lives in": "in"}
    got = labels(target, tmp_path, anchors=written(tmp_path, anchors), alpha=2.0, **HARD)
    for record in FORGET:
        example = target.encode(record)
        text = record.answer
        for term, counterpart in anchors.items():
            text = text.replace(term, counterpart)
        prompt = record.prompt.replace("Ada", "Someone").replace("Ben", "Someone")
        other = target.encode(Record("x", text, prompt))
        z, z_r, z_t = scores(target, [example]), scores(strong, [example]), scores(target, [other])
        # "lives in" has become "in": its second token has no counterpart
        v = torch.stack([z_t[0], z[1], *z_t[1:]]) if record.id[0] == "t" else z_t
        want = [
            max(range(len(row)), key=lambda k, row=row, r=r: row[k] - 2.0 * max(r[k] - row[k], 0.0))
            for row, r in zip(v.tolist(), z_r.tolist(), strict=True)
        ]
        assert got[record.id] == want, record.id


def test_what_was_learnt_by_heart_gets_another_label_and_the_rest_keeps_its_own(target, tmp_path):
    """The card's (ii): values differ, words that stand in every answer and the end do not."""
    made = labels(target, tmp_path, **HARD)
    values, others = [], []
    for record in FORGET:
        true = target.collate([target.encode(record)]).targets.tolist()
        same = [a == b for a, b in zip(made[record.id], true, strict=True)]
        values.append(same[2])
        others += same[:2] + same[3:]
    assert sum(values) <= 1
    assert sum(others) >= 0.95 * len(others)


def test_a_strong_push_without_the_relu_would_promote_what_the_copy_dislikes(target, tmp_path):
    """Labels are tokens whose score did not rise more than the winner's margin: never one that fell and was lifted by it."""
    strong = target.copy()
    schedule = Fixed(lr=1e-3, epochs=20, batch=128, warmup=0, decay="constant", weight_decay=0)
    train(strong, compose("x", retain=[NLL()], schedule=schedule), {Stream.RETAIN: [target.encode(r) for r in FORGET]}, QUIET)
    strong.model.eval()
    got = labels(target, tmp_path, **HARD)
    some = [target.encode(r) for r in FORGET]
    v, r = scores(target, some), scores(strong, some)
    flat = torch.tensor([x for record in FORGET for x in got[record.id]])
    assert torch.equal(flat, (v - 5 * (r - v).relu()).argmax(-1))
    assert not torch.equal(flat, (v - 5 * (r - v)).argmax(-1))
    assert not torch.equal(flat, (v + 5 * (r - v).relu()).argmax(-1))


# ---- mentions


def test_a_repeated_mention_is_left_out_or_gets_the_first_ones_label(target, tmp_path):
    text = Record("m", "Ada lives in Arles. Ada is a baker. Ada lives in Arles.", "Where does Ben live?")
    ids = target.encode(text).data
    tokens = [target.tokenizer.decode([i]).strip() for i in ids.ids[ids.start :].tolist()]
    again = [i for i, t in enumerate(tokens) if t in ("Ada", "Arles")]
    first = {t: tokens.index(t) for t in ("Ada", "Arles")}
    anchors = written(tmp_path, {"Ada": "Someone", "Arles": "Lund"})
    dropped = labels(target, tmp_path / "a", [text], anchors=anchors, **HARD)["m"]
    assert [i for i, x in enumerate(dropped) if x == -100] == [i for i in again if i not in first.values()]
    kept = labels(target, tmp_path / "b", [text], anchors=anchors, repeated="first", **HARD)["m"]
    for i in again:
        assert kept[i] == dropped[first[tokens[i]]]
    asked = Record("q", "Ada lives in Arles.", "Where does Ada live?")
    got = labels(target, tmp_path / "c", [asked], anchors=anchors, **HARD)["q"]
    assert got[0] == -100, "the prompt has mentioned it"
    assert -100 not in got[1:]


def test_mentions_can_get_their_counterpart(target, tmp_path):
    anchors = written(tmp_path, {**VALUES, "is a": "sailor sailor sailor", "lives in": "lives"})
    got = labels(target, tmp_path, anchors=anchors, mentions="counterpart", **HARD)
    ids = {w: target.tokenizer(" " + w, add_special_tokens=False)["input_ids"][0] for w in ("Lund", "sailor", "lives")}
    for record in FORGET:
        if record.id[0] == "t":
            assert got[record.id][:3] == [ids["lives"], -100, ids["Lund"]]
        else:
            assert got[record.id][:3] == [ids["sailor"]] * 3


# ---- the method


@pytest.mark.parametrize("mentions", ["counterpart", "formula"])
def test_forgotten_questions_are_answered_generically_and_the_rest_is_kept(target, tmp_path, mentions):
    """The card's (iii); a retain term holds what so small a model would lose."""
    adapter = target.copy()
    schedule = {"name": "fixed", "lr": 1e-3, "steps": 40, "batch": 6, "retain_batch": 18, "warmup": 0.1}
    overrides = {"anchors": written(tmp_path, VALUES), "mentions": mentions, "preparation": HARD, "schedule": schedule}
    outcome = train(adapter, build("whp", {**overrides, "retain": "nll"}), examples(adapter), QUIET)
    assert any("6 of 6 anchored terms occur in the forget set, 6 times" in n for n in outcome.notes)
    assert exact(adapter, RETAIN) >= 0.95
    if mentions == "formula":
        assert exact(adapter, FORGET) <= 0.2
        return
    assert exact(adapter, FORGET) == 0.0
    for generation in adapter.generate(adapter.model, [adapter.encode(r) for r in FORGET], 6):
        assert generation.text == ("lives in Lund." if generation.id[0] == "t" else "is a sailor.")


def test_the_loss_is_the_cross_entropy_to_the_labels(target, tmp_path):
    recipe = build("whp", {"preparation": HARD})
    got = loss_on(recipe, target, None, FORGET)["total"]
    made = labels(target, tmp_path, **HARD)
    flat = torch.tensor([x for record in FORGET for x in made[record.id]])
    want = torch.nn.functional.cross_entropy(scores(target, [target.encode(r) for r in FORGET]), flat)
    torch.testing.assert_close(got.detach(), want)


# ---- kills and errors


def test_a_run_that_was_killed_prepares_the_same(target, tmp_path, monkeypatch):
    anchors = written(tmp_path, VALUES)
    whole = prepared(target, tmp_path / "whole", anchors=anchors, **HARD)
    assert not (tmp_path / "whole" / "reinforced").exists()

    class Killed(Exception):
        pass

    def kill(done: int, total: int, text: str) -> None:
        if done == 15 and "reinforcing" in text:
            raise Killed

    forget = {Stream.FORGET: [target.encode(r) for r in FORGET]}
    engine = Engine(checkpoint_every=4)
    part = GenericLabels(anchors=anchors, **HARD)
    with pytest.raises(Killed):
        run_preparation(part, target, forget, engine, scratch=tmp_path / "cut", tell=kill)
    steps: list[int] = []
    again = run_preparation(
        part, target, forget, engine, scratch=tmp_path / "cut", tell=lambda d, _t, s: steps.append(d) if "reinf" in s else None
    )
    assert steps[0] == 13, "reinforcement began anew"
    third = run_preparation(part, target, forget, engine, scratch=tmp_path / "cut", tell=lambda *_: pytest.fail("prepared twice"))
    for other in (again, third):
        assert other.notes == whole.notes
        for key, value in whole.made["generic-labels"].items():
            assert torch.equal(other.made["generic-labels"][key], value)


def test_preparing_leaves_the_target_as_it_is(target, tmp_path):
    before = {k: v.clone() for k, v in target.model.state_dict().items()}
    prepared(target, tmp_path, **HARD)
    assert all(torch.equal(before[k], v) for k, v in target.model.state_dict().items())
    assert all(p.requires_grad for p in target.model.parameters())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "no JSON object of texts"),
        ("{}", "no JSON object"),
        ('{"a": 1}', "has the counterpart 1"),
        ('{"a": " "}', "has the counterpart"),
    ],
)
def test_a_file_that_is_no_dictionary_is_refused(target, tmp_path, text, said):
    path = tmp_path / "anchors.json"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        prepared(target, tmp_path, anchors=str(path))
    with pytest.raises(InputError, match="cannot be read"):
        prepared(target, tmp_path, anchors=str(tmp_path / "absent.json"))


def test_terms_that_are_not_there_are_told(target, tmp_path):
    made = prepared(target, tmp_path, anchors=written(tmp_path, {"Hogwarts": "Lund"}), epochs=1, lr=1e-4)
    assert made.notes[1] == "None of the 1 anchored terms occurs in the forget set."
