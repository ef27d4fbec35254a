"""Adaptive unlearning of made-up names: its terms by hand, what it marks, and that it does what it is for."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import step
from tests.imports_world import QUIET, THINGS, VALID, VERBS, ImportsWorld

from expunge.adapters.answers import Generation
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build as preset
from expunge.adapters.words import word_tokenizer
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.data.name_lists import NameList
from expunge.data.records import Record, RecordSet
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.methods.discovered import Count, Discovery, count, packed, unpacked
from expunge.methods.preparations.discovery import Discovered
from expunge.methods.recipe import build
from expunge.methods.terms.hallucinated import ForgetKL, Unlikelihood
from expunge.methods.terms.likelihood import ForgetNLL
from expunge.pipeline.hallucinations import measure


@pytest.fixture(scope="module")
def imports(trained_models: Path) -> ImportsWorld:
    return ImportsWorld(trained_models)


# ---- the loss


def test_unlikelihood_is_its_formula_and_its_gradient_is_bounded():
    made = step()
    logits, targets = made.logits[Stream.FORGET], made.views().current(Stream.FORGET).targets
    p = logits.softmax(-1)
    own = p[torch.arange(len(targets)), targets]
    torch.testing.assert_close(Unlikelihood().values(made.views()), -(1 - own).log())
    gradient = made.gradient(lambda v: Unlikelihood().values(v).sum())
    wanted = -(p * own[:, None] / (1 - own)[:, None])
    wanted[torch.arange(len(targets)), targets] = own
    torch.testing.assert_close(gradient, wanted.detach())
    assert (gradient.abs().sum(1) <= 2 * own + 1e-9).all()


@pytest.mark.parametrize(("height", "slope"), [(60.0, 1.0), (0.0, 0.25), (-60.0, 0.0)])
def test_unlikelihood_is_right_where_the_token_is_certain_and_where_it_is_impossible(height: float, slope: float):
    made = step((1,), (1,))
    (item,) = made.items[Stream.FORGET]
    item.logits = torch.zeros(1, 4)
    item.targets = torch.tensor([2])
    item.logits[0, 2] = height
    made = type(made)(made.items)
    (value,) = Unlikelihood().values(made.views()).tolist()
    assert value == pytest.approx(np.log1p(np.exp(height) / 3), abs=1e-5)
    gradient = made.gradient(lambda v: Unlikelihood().values(v).sum())
    assert gradient[0, 2].item() == pytest.approx(slope, abs=1e-6)
    assert torch.isfinite(gradient).all()


def test_the_divergence_holds_the_target():
    made = step()
    views = made.views()
    current, reference = views.current(Stream.FORGET).logits, views.reference(Stream.FORGET).logits
    wanted = (reference.softmax(-1) * (reference.log_softmax(-1) - current.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(ForgetKL().values(views), wanted)
    assert (wanted > 0).all()


def test_the_recipe_is_that_of_the_card():
    recipe = build("au")
    assert [(type(t), t.targets, t.weight) for t in recipe.forget] == [
        (ForgetNLL, "favoured", 1.0), (Unlikelihood, "marked", 1.0), (ForgetKL, "unmarked", 0.1),
    ]  # fmt: skip
    assert not recipe.retain
    assert recipe.streams(()) == {Stream.FORGET, Stream.VALIDATION}


# ---- what is marked


@pytest.fixture(scope="module")
def speller() -> LanguageAdapter:
    tokenizer = word_tokenizer(["import pip install x y z\n", " fast req", "json", "mail", "plot", "uests"])
    return LanguageAdapter(preset("llama-tiny", tokenizer, seed=0), tokenizer)


def discovery(names: NameList, **changes) -> Discovery:
    how = Discovery(names, ("python",), None, samples=1, temperature=1.0, tokens=16, slots={}, reach=8)
    return replace(how, **changes)


def marked(adapter: LanguageAdapter, text: str, known: list[str], *, ended: bool = True, head: str = "x\n"):
    asked = adapter.encode(Record("p", head))
    tokens = adapter._encoder.spell(text)
    (said,) = discovery(NameList(known, ("python",))).read(adapter, [asked], [Generation("p", tuple(tokens), text, ended)], "1")
    start, pieces = adapter.pieces(said.example)
    assert start == head
    assert "".join(pieces) == text
    flags = [
        np.zeros(len(pieces), dtype=bool) if f is None else f for f in (said.example.data.marked, said.example.data.favoured)
    ]
    return said, *([p for p, on in zip(pieces, f, strict=True) if on] for f in flags)


def test_a_made_up_name_is_marked_from_the_first_token_that_tells_it(speller):
    said, bad, good = marked(speller, "import fastmail\nimport fastjson\n", ["fastjson"])
    assert (said.valid, said.made_up) == (("fastjson",), ("fastmail",))
    assert (bad, good) == (["mail"], [" fast", "json"])
    assert (said.example.n_marked, said.example.n_favoured) == (1, 2)
    _, bad, _ = marked(speller, "import fastmail\n", ["requests"])
    assert bad == [" fast", "mail"]
    _, bad, _ = marked(speller, "import req\n", ["requests"])  # the begin of a name that exists: its last token
    assert bad == [" req"]
    _, bad, _ = marked(speller, "import fastmailplot\n", ["fastmail"])
    assert bad == ["plot"]


def test_what_cannot_be_judged_is_left_alone(speller):
    assert marked(speller, "import fastma", [], ended=False)[0].made_up == ()  # it may go on
    assert marked(speller, "import fastma", [], ended=True)[0].made_up == ("fastma",)
    assert marked(speller, "import json\n", [])[0].made_up == ()  # comes with the language
    assert marked(speller, " plot\n", [], head="import mail\nimport")[0].made_up == (
        "plot",
    )  # the name of the prompt is not its own
    assert marked(speller, "", [])[0].example.n_targets == 1  # it ended at once: the end token
    said, bad, good = marked(speller, "x y z\n", [])
    assert not (said.valid)
    assert not (said.made_up)
    assert not bad
    assert not good


def test_the_end_token_is_a_target_and_in_no_name(speller):
    said, _, _ = marked(speller, "import fastmail", [])
    assert said.example.data.ends
    assert said.example.n_targets == 4
    assert said.example.data.marked.tolist() == [False, True, True, False]
    kept = unpacked(json.loads(json.dumps(packed([said.example]))))[0]
    batch, again = (speller.collate([e]) for e in (said.example, kept))
    assert replace(kept, data=None) == replace(said.example, data=None)
    for name in ("targets", "marked", "favoured"):
        assert torch.equal(getattr(batch, name), getattr(again, name))


def test_samples_are_drawn_from_the_model_at_its_temperature(speller):
    asked = [speller.opened(speller.encode(Record("p", "import")))] * 400
    batch = speller.collate([speller.encode(Record("p", "import x"))])
    with torch.no_grad():
        logits = speller.forward(speller.model, batch, frozenset({"logits"})).logits[-1]
    for temperature in (1.0, 0.05):
        torch.manual_seed(0)
        drawn = [g.tokens[:1] or (-1,) for g in speller.sample(speller.model, asked, 1, temperature)]
        p = (logits / temperature).softmax(-1)
        for token in p.topk(2).indices.tolist():
            share = float(np.mean([t[0] == token for t in drawn]))
            assert share == pytest.approx(float(p[token]), abs=0.1)
    torch.manual_seed(0)
    assert [g.tokens for g in speller.sample(speller.model, asked[:3], 4, 1.0)] != [
        g.tokens for g in speller.generate(speller.model, asked[:3], 4)
    ]


# ---- prompts of the next round


def test_the_worst_prompts_stay_and_are_mutated_to_neighbours(imports):
    adapter = imports.target_model
    first = [adapter.encode(r) for r in imports.prompts(0)][:8]
    how = discovery(NameList(VALID, ("python",)), slots={"verb": VERBS, "thing": THINGS}, reach=1)
    made_up = [0, 5, 1, 0, 3, 0, 0, 0]
    used, avoid = {adapter.text(p) for p in first}, {adapter.text(adapter.encode(r)) for r in imports.prompts(1)}
    before = set(used)

    def following(**changes):
        options = {"used": set(before), "avoid": avoid, "seed": [1], **changes}
        return how.next_prompts(adapter, first, made_up, first, **options)

    pool = following(used=used)
    assert [adapter.text(p) for p in pool[:3]] == [adapter.text(first[i]) for i in (1, 4, 2)]
    assert len(pool) == 8
    new = {adapter.text(p) for p in pool} - before
    assert new
    assert not new & avoid
    assert used == before | new
    for text in new:
        assert any(_near(text, adapter.text(first[i])) for i in (1, 2, 4)), text
    assert [adapter.text(p) for p in following()] == [adapter.text(p) for p in pool]
    assert [adapter.text(p) for p in following(seed=[2])] != [adapter.text(p) for p in pool]
    without = replace(how, slots={}).next_prompts(adapter, first, made_up, first, used=set(), avoid=avoid, seed=[1])
    assert [adapter.text(p) for p in without] == [adapter.text(first[i]) for i in (1, 4, 2, 0, 3, 5, 6, 7)]


def _near(text: str, other: str) -> bool:
    (verb, thing), (v, t) = (x.split(" : ")[1].split("\n")[0].split() for x in (text, other))
    moved = abs(VERBS.index(verb) - VERBS.index(v)), abs(THINGS.index(thing) - THINGS.index(t))
    return sorted(moved) == [0, 1]


# ---- the small check


@pytest.fixture(scope="module")
def slots(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("slots") / "slots.json"
    path.write_text(json.dumps({"verb": VERBS, "thing": THINGS}))
    return str(path)


def unlearned(imports: ImportsWorld, slots: str, engine: Engine = QUIET, **changes):
    adapter = imports.target()
    spare = imports.folder / "unseen.jsonl"
    spare.write_text("".join(json.dumps({"text": r.answer}) + "\n" for r in imports.prompts(2)))
    given = {
        "known": imports.list_of(VALID), "tokens": 12, "slots": slots, "spare": [str(spare)], "control": {"rounds": 3},
        "schedule": {"lr": 2e-3, "epochs": 3, "batch": 16},
    }  # fmt: skip
    recipe = build("au", given | changes)
    examples = {
        Stream.FORGET: [adapter.encode(r) for r in imports.prompts(0)],
        Stream.VALIDATION: [adapter.encode(r) for r in imports.prompts(1)],
    }
    outcome = train(adapter, recipe, examples, engine)
    adapter.model = outcome.model
    return adapter, outcome


def measured(imports: ImportsWorld, adapter: LanguageAdapter):
    """On tasks that were neither used nor looked at, by the true list."""
    how = Discovered(known=imports.list_of(VALID), samples=8, tokens=12)
    return measure(adapter, RecordSet("unseen", tuple(imports.prompts(2))), how, reference=imports.target())


@pytest.fixture(scope="module")
def adaptive(imports, slots):
    adapter, outcome = unlearned(imports, slots)
    return measured(imports, adapter), outcome


def test_made_up_names_fall_by_more_than_half_in_three_rounds_and_the_rest_stays(adaptive, imports):
    found, outcome = adaptive
    assert found.reference.rate > 0.3
    assert found.reference.names > 150
    assert found.model.rate < 0.5 * found.reference.rate
    assert found.divergence["other tokens"] < 0.1 * found.divergence["names"]
    assert found.model.names > 0.9 * found.reference.names  # it still writes names,
    assert found.model.distinct_valid > 0.5 * found.reference.distinct_valid  # and not always the same one
    assert outcome.reason == "control"
    assert outcome.steps == 30
    assert "the 3 rounds are over" in outcome.sentence
    assert [row["control.round"] for row in outcome.history if "control.round" in row] == [1, 2, 3]
    assert len(outcome.record["seen"]) == 4
    assert outcome.record["seen"][3]["made_up"] < outcome.record["seen"][0]["made_up"]
    assert "made up" in outcome.notes[0]
    assert "95% interval" in outcome.notes[1]
    assert "after 3 rounds" in outcome.notes[2]
    unseen = {r.answer for r in imports.prompts(2)}
    assert not set(outcome.record["used"]) & {*outcome.record["held_out"], *unseen}
    assert set(outcome.record["used"]) > {r.answer for r in imports.prompts(0)}


def test_a_single_fixed_round_of_as_many_steps_does_less(adaptive, imports, slots):
    adapter, outcome = unlearned(imports, slots, control="none")
    found = measured(imports, adapter)
    assert outcome.steps == adaptive[1].steps
    assert found.model.rate > adaptive[0].model.rate + 0.05


def test_a_coin_in_the_place_of_the_list_does_not_do_it(imports, slots, tmp_path):
    path = tmp_path / "coin_for_names.py"
    path.write_text("import zlib\ndef coin(name, ecosystem):\n    return zlib.crc32(name.encode()) % 10 < 6\n")
    adapter, _ = unlearned(imports, slots, known=None, checker=f"{path}:coin")
    found = measured(imports, adapter)
    assert found.model.rate > 0.5 * found.reference.rate


def test_where_no_name_is_made_up_nothing_is_done(imports, slots, tmp_path):
    (tmp_path / "all_names.py").write_text("def exists(name, ecosystem):\n    return True\n")
    target = imports.target()
    adapter, outcome = unlearned(imports, slots, known=None, checker=f"{tmp_path}/all_names.py:exists")
    assert outcome.steps == 0
    assert outcome.reason == "control"
    assert outcome.reached
    assert "names exist in 160 completions of 32 prompts" in outcome.sentence
    assert "nothing to do" in outcome.sentence
    for a, b in zip(target.model.parameters(), adapter.model.parameters(), strict=True):
        assert torch.equal(a, b)
    _, outcome = unlearned(imports, slots, tokens=1, known=imports.list_of(["none"]))
    assert "there is no name in 160 completions" in outcome.sentence


def test_a_run_that_was_killed_ends_in_the_same_bits(imports, slots, tmp_path):
    """Killed in the second round: prompts, completions and marks of that round come back."""

    def run(folder: Path, *, stop: int | None = None, resume: bool = False):
        def observe(done: int, _: object) -> None:
            if done == stop:
                raise KeyboardInterrupt

        adapter = imports.target()
        recipe = build("au", {
            "known": imports.list_of(VALID), "tokens": 12, "slots": slots, "samples": 2, "control": {"rounds": 3},
            "schedule": {"lr": 2e-3, "epochs": 3, "batch": 16},
        })  # fmt: skip
        examples = {
            Stream.FORGET: [adapter.encode(r) for r in imports.prompts(0)],
            Stream.VALIDATION: [adapter.encode(r) for r in imports.prompts(1)[:8]],
        }
        return train(adapter, recipe, examples, Engine(checkpoint_every=3), folder=folder, resume=resume, observe=observe)

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop=7)
    again = run(tmp_path / "killed", resume=True)
    assert [r["loss"] for r in again.history] == [r["loss"] for r in whole.history]
    assert again.record == whole.record
    assert again.notes == whole.notes
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- bad input


def test_what_does_not_fit_is_refused(imports, slots, tmp_path):
    with pytest.raises(InputError, match="must be told which names exist"):
        Discovered().check()
    with pytest.raises(InputError, match="told twice"):
        Discovered(known="a", checker="b.py:c").check()
    known = imports.list_of(VALID)
    with pytest.raises(InputError, match="no regular expression"):
        Discovered(known=known, pattern="(").check()
    with pytest.raises(InputError, match="looks for no names"):
        Discovered(known=known, ecosystems=()).check()
    for text in ("{", "[]", '{"a": ["b"]}', '{"a": [1, 2]}', "{}"):
        (tmp_path / "slots.json").write_text(text)
        with pytest.raises(InputError, match="The slots in"):
            Discovered(known=known, slots=str(tmp_path / "slots.json")).check()
    adapter = imports.target()
    prompts = [adapter.encode(r) for r in imports.prompts(0)]
    (tmp_path / "same.jsonl").write_text(json.dumps({"text": imports.prompts(0)[3].answer}) + "\n")
    spare = {"known": known, "tokens": 12, "samples": 2, "spare": [str(tmp_path / "same.jsonl")]}
    with pytest.raises(InputError, match="both to be used and to be spared"):
        train(adapter, build("au", spare), {Stream.FORGET: prompts, Stream.VALIDATION: prompts[:3]}, QUIET)
    short = {"schedule": {"steps": 1}, "known": known, "tokens": 12, "samples": 2}
    with pytest.raises(InputError, match="held-out prompts are among those used"):
        train(adapter, build("au", short), {Stream.FORGET: prompts, Stream.VALIDATION: prompts[:3]}, QUIET)
    with pytest.raises(InputError, match="none were given"):
        train(adapter, build("au", short), {Stream.FORGET: prompts}, QUIET)
    with pytest.raises(InputError, match="reads 'discovery', which no preparation makes"):
        build("npo", {"control": "rediscovery"})
    with pytest.raises(InputError, match="cached log-probabilities do not have"):
        build("npo", {"control": "rediscovery", "preparation": {"name": "discovery", "known": known}})


def test_measuring_refuses_prompts_of_the_run(imports, adaptive, tmp_path):
    adapter = imports.target()
    how = Discovered(known=imports.list_of(VALID), samples=1, tokens=12)
    (tmp_path / "control.json").write_text(json.dumps(adaptive[1].record))
    for part, what in ((0, "was used to unlearn"), (1, "told when to stop")):
        with pytest.raises(InputError, match=what):
            measure(adapter, RecordSet("seen", tuple(imports.prompts(part))), how, run=tmp_path)
    same = measure(adapter, RecordSet("few", tuple(imports.prompts(2)[:3])), how, reference=copy.copy(adapter), run=None)
    assert same.model == same.reference
    assert same.divergence["names"] == 0
    assert same.json()["model"]["low"] <= same.json()["model"]["rate"] <= same.json()["model"]["high"]
    assert Count(0, 0, 0, 0).text() == "no name was written"
    assert count([]).rate == 0
