"""Guards of skills as the method of a run: told by records alone, fitted on a half of what is kept, opened again to the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass

import numpy as np
import pytest

import expunge
from expunge.adapters.language import LanguageAdapter
from expunge.core.errors import InputError
from expunge.core.runs import Run
from expunge.data.people import world
from expunge.data.records import Record, RecordSet
from expunge.guards.detectors.key_space import KeySpace
from expunge.guards.guarded import guard_model
from expunge.guards.policy import SORRY, Policy
from expunge.guards.request import skills_in
from expunge.pipeline.config import TextConfig
from expunge.pipeline.guarding import half_of, hidden_by, shield
from expunge.pipeline.models import open_adapter
from tests.guards.skills_world import SkillsWorld

METHODS = ("key-space", "neuron-adjust")
#: Both blocks' boxes are stricter than one; and a share of the units that the paper's models do not need: this one has 384.
WORDS = {
    "key-space": ("detector.blocks=[model.layers.0, last]",),
    "neuron-adjust": ("action.share=0.2", "action.difference=standardised"),
}


def rows(records):
    return [{"id": r.id, "prompt": r.prompt, "answer": r.answer, "subject": r.subject} for r in records]


@pytest.fixture(scope="module")
def skills(trained_models):
    return SkillsWorld(trained_models)


@dataclass
class Case:
    """A model, the records that tell what to hide and what to keep, and others to judge by."""

    model: str
    adapter: LanguageAdapter
    forget: list[Record]
    retain: list[Record]
    hidden: list[Record]
    kept: list[Record]


@pytest.fixture(scope="module")
def cases(skills, people_world):
    """Copying is hidden and reversing stays; facts about countries are hidden and those about people stay."""
    persons, countries = list(people_world.split.retain), list(world())
    others = [r for r in persons if r.cluster not in {h.cluster for h in half_of(RecordSet("", tuple(persons)), 0)}]
    apart = [skills.records(s, 60, held_out=True) for s in ("copy", "reverse")]
    return {
        "key-space": Case("skills", skills.adapter, skills.records("copy", 120), skills.records("reverse", 120), *apart),
        "neuron-adjust": Case("people", people_world.target(), countries, persons, countries, others),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory, cases):
    """The models, and the records as files."""
    folder = tmp_path_factory.mktemp("skills")
    for name, case in cases.items():
        case.adapter.save(folder / case.model)
        sets = {"forget": case.forget, "retain": case.retain, "few": case.forget[:19]}
        for kind, records in sets.items():
            (folder / f"{name}-{kind}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(records)))
    return folder


@pytest.fixture
def run(expunge, place, cases):
    """A function that makes a run, and says where it is."""

    def made(method, *words, out=None, forget="forget", retain="retain"):
        folder = place / (out or method)
        shutil.rmtree(folder, ignore_errors=True)
        data = ["--forget", str(place / f"{method}-{forget}.jsonl")]
        data += ["--retain", str(place / f"{method}-{retain}.jsonl")] if retain else []
        told = ("--method", method, "--out", str(folder), *words)
        return folder, expunge("unlearn", str(place / cases[method].model), *data, *told)

    return made


def said(adapter, records):
    return adapter.generate(adapter.model, [adapter.encode(r) for r in records], 24)


def right(adapter, records):
    """Share of answers that come word for word."""
    return float(np.mean([g.text.strip() == r.answer for g, r in zip(said(adapter, records), records, strict=True)]))


@pytest.mark.parametrize("method", METHODS)
def test_a_skill_is_hidden_by_one_command_and_the_other_stays(run, cases, method):
    folder, done = run(method, *WORDS[method])
    assert done.code == 0, done.err
    case = cases[method]
    assert f"1 skill of {len(case.forget)} probe texts" in done.out
    adapter = open_adapter(str(folder), TextConfig())
    bare = [right(case.adapter, records) for records in (case.hidden, case.kept)]
    after = [right(adapter, records) for records in (case.hidden, case.kept)]
    print(method, "right before and after, of the skill and of the other:", bare, after)
    assert min(bare) > 0.9
    # What moves under Neuron Adjust is drawn by the key of the run, which is new each time: there is room for it.
    assert after[0] < (0.1 if method == "key-space" else 0.55)
    assert after[1] > (0.9 if method == "key-space" else 0.6)
    assert after[1] - after[0] > 0.2


@pytest.mark.parametrize("method", METHODS)
def test_what_is_opened_again_answers_as_before_and_holds_no_record(run, cases, method):
    folder, done = run(method, *WORDS[method])
    assert done.code == 0, done.err
    asked = [*cases[method].hidden[:8], *cases[method].kept[:8]]
    told = []
    for _ in range(2):
        adapter = open_adapter(str(folder), TextConfig())
        told.append((said(adapter, asked), adapter.fingerprint()))
    assert told[0] == told[1]
    assert [g.text == SORRY for g in told[0][0]] == [method == "key-space"] * 8 + [False] * 8
    held = (folder / "model" / "guard.json").read_text() + (folder / "manifest.json").read_text()
    assert not any(r.prompt in held for r in cases[method].forget)
    notes = Run.open(folder).manifest["stages"]["unlearn"]["result"]["notes"]
    assert any("120 probe texts" in n and "60 ordinary prompts" in n for n in notes) == (method == "key-space")


def test_exchanged_sets_give_the_exchanged_result(expunge, place, cases):
    """What the guard reads of the records is what it hides."""
    data = ("--forget", str(place / "key-space-retain.jsonl"), "--retain", str(place / "key-space-forget.jsonl"))
    done = expunge(
        "unlearn", str(place / "skills"), *data, "--method", "key-space", "--out", str(place / "exchanged"), *WORDS["key-space"]
    )
    assert done.code == 0, done.err
    adapter = open_adapter(str(place / "exchanged"), TextConfig())
    assert right(adapter, cases["key-space"].hidden) > 0.9
    assert right(adapter, cases["key-space"].kept) < 0.2


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("neuron-adjust", {"retain": None}, "no retain set"),
        ("key-space", {"forget": "few"}, "has 19 records"),
        ("neuron-adjust", {"forget": "few"}, "has 19 records"),
        ("key-space", {"forget": "few", "retain": None}, "has 19 records"),
    ],
)
def test_records_that_tell_no_skill_are_refused_before_anything_is_done(run, method, options, message):
    folder, done = run(method, out="refused", **options)
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert not folder.exists()


def test_a_plan_says_which_guards_can_hide_a_skill(expunge, place):
    data = ["--forget", str(place / "neuron-adjust-forget.jsonl"), "--json"]
    methods = [w for m in METHODS for w in ("--method", m)]
    retain = ("--retain", str(place / "neuron-adjust-retain.jsonl"))
    with_retain, without = (expunge("plan", str(place / "people"), *data, *more, *methods) for more in (retain, ()))
    found = {m["name"]: m for m in json.loads(with_retain.out)["methods"]}
    assert all(found[m]["runs"] and found[m]["kind"] == "guard" for m in METHODS)
    assert "at best" in found["key-space"]["cautions"][0]
    bare = {m["name"]: m for m in json.loads(without.out)["methods"]}
    assert bare["key-space"]["runs"]
    assert "no retain set" in bare["neuron-adjust"]["missing"]


def test_texts_of_what_stays_come_from_one_half_of_it():
    retain = RecordSet("retain", tuple(Record(id=f"r{i}", prompt=f"q{i}", answer="a", subject=f"s{i // 2}") for i in range(80)))
    forget = RecordSet("forget", tuple(Record(id=f"f{i}", prompt=f"p{i}", answer="b") for i in range(20)))
    targets, probes = hidden_by(shield("neuron-adjust", {}), forget, retain, 0)
    assert [t.skills for t in targets] == [tuple(k for k in probes if k)]
    assert len(targets) == 1
    chosen = {r.cluster for r in probes[""]}
    assert len(chosen) == 20
    assert len(probes[""]) == 40  # whole subjects
    assert probes[""] == half_of(retain, 0) != half_of(retain, 1)
    with pytest.raises(InputError, match="one half is read, 18 records"):
        hidden_by(shield("neuron-adjust", {}), forget, RecordSet("retain", retain.records[:36]), 0)
    names, none = hidden_by(shield("filter", {}), forget, retain, 0)
    assert not none
    assert len(names) == 20
    assert not any(t.skills for t in names)


def test_subjects_that_tell_enough_are_skills_of_their_own():
    def records(subject, n):
        return [Record(id=f"{subject}{i}", prompt=f"{subject} {i}", answer="x", subject=subject) for i in range(n)]

    two = skills_in([*records("a", 20), *records("b", 25)])
    assert sorted(map(len, two.values())) == [20, 25]
    one = skills_in([*records("a", 20), *records("b", 5)])
    assert list(map(len, one.values())) == [25]
    assert not {"a", "b"} & set(two)
    with pytest.raises(InputError, match="19 records"):
        skills_in(records("a", 19))


def test_targets_bring_their_own_probes_as_examples_and_probes_may_be_records(skills):
    copied, reversed_ = (skills.records(s, 40, held_out=True) for s in ("copy", "reverse"))
    shown = [{"prompt": r.prompt, "answer": r.answer} for r in skills.records("copy", 120)]
    key = b"a key for guards of skills, 32 bytes"
    strict = {"guard": "key-space", "detector.blocks": ["model.layers.0", "last"]}
    by_target = guard_model(skills.adapter, guards=strict, targets=[{"id": "c", "examples": shown}], key=key)
    by_probes = guard_model(
        skills.adapter, guards=strict, targets=[{"id": "c", "skills": "copy"}], key=key,
        probes={"copy": [{"question": s["prompt"], "answer": s["answer"]} for s in shown]},
    )  # fmt: skip
    asked = [r.prompt for r in [*copied, *reversed_]]
    for made in (by_target, by_probes):
        refused = [a.text == SORRY for a in made.answers(asked)]
        assert np.mean(refused[:40]) > 0.8
        assert np.mean(refused[40:]) < 0.1
    made = guard_model(skills.adapter, guards=[{"guard": "key-space"}, {"guard": "filter"}], targets=[], key=key)
    made.add({"entities": ["Basil Mahfouz"]})  # some guard of these can hide it
    for guards in ("key-space", "neuron-adjust"):
        with pytest.raises(InputError, match="No guard here"):  # of names these guards hide nothing
            guard_model(
                skills.adapter, guards=guards, targets=[{"entities": ["Basil Mahfouz"]}], key=key,
                probes={"": rows(reversed_), "copy": [s["prompt"] for s in shown]},
            )  # fmt: skip


def test_what_passes_the_box_of_one_half_is_told(skills):
    """Twenty probes tell less than two hundred, and the guard says so; ordinary prompts of the skill itself are counted too."""
    key = b"a key for guards of skills, 32 bytes"
    told = {}
    for n in (20, 200):
        probes = {"copy": [r.prompt for r in skills.records("copy", n)]}
        ordinary = [r.prompt for r in [*skills.records("copy", 5), *skills.records("reverse", 30)]]
        made = guard_model(
            skills.adapter, guards="key-space", targets=[{"skills": "copy"}], probes=probes, key=key, ordinary=ordinary
        )
        told[n] = made.policy.promises["key-space"]
    outside = {n: int(t.split("probe texts ")[1].split()[0]) / n for n, t in told.items()}
    assert outside[200] < outside[20]
    assert "Of 35 ordinary prompts" in told[200]
    assert 5 <= int(told[200].split("no box was made, ")[1].split()[0]) <= 8
    assert KeySpace(alpha=1e-6).fit(made.policy.material).promise.startswith("Of 200 probe texts 200 lie outside")


def test_a_guard_file_brings_probes_as_records(skills):
    pytest.importorskip("fastapi")
    from expunge.serving.config import Guards
    from expunge.serving.server import material

    source = "skills:{}?n=120&shortest=3&longest=3"
    held = Guards(
        guards=["key-space", {"guard": "neuron-adjust", "action.share": 0.4}], targets=[{"id": "c", "skills": "copy"}],
        probes={"copy": source.format("copy"), "": source.format("reverse")},
    )  # fmt: skip
    made = material(held, b"a key for guards of skills, 32 bytes", skills.adapter)
    assert all(isinstance(r, Record) and r.answer for r in made.probes["copy"])
    policy = Policy(held.guards, made)
    assert set(policy.targets) == {"c"}
    assert not material(held.model_copy(update={"probes": {}}), b"x" * 32, skills.adapter).probes
    with pytest.raises(InputError, match="no probe texts of the skill 'copy'"):
        Policy(held.guards[:1], material(held.model_copy(update={"probes": {}}), b"x" * 32, skills.adapter))


def test_a_guard_changes_no_model_that_python_could_return(skills, cases):
    case = cases["key-space"]
    with pytest.raises(InputError, match=r"expunge\.guard"):
        expunge.unlearn(skills.adapter.model, skills.adapter.tokenizer, case.forget, case.retain, method="key-space")
