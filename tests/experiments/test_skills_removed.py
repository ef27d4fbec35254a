"""The experiment on skills: its controls, its tables, and all of it at its smallest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from experiments.skills import CASES, Ground, Plan, RandomBox, RandomUnits, experiment, measured
from experiments.skills_page import described, failures, gaps, outcomes, sizes, write_page
from experiments.stages import Stages
from experiments.verdicts import between, counted

from expunge.adapters.language import LanguageAdapter
from expunge.audit.document import ModelEntry
from expunge.core.results import Check, Judgement, Verdict
from expunge.guards.actions.neuron_adjust import NeuronAdjust
from expunge.guards.adapter import GuardedAdapter
from expunge.guards.detectors.key_space import KeySpace
from expunge.guards.guarded import guard_model
from expunge.guards.parts import Material
from expunge.guards.policy import Row
from expunge.guards.probing import Moments
from expunge.report.text import DASH

SMALL = replace(CASES["languages"], train=24, asked=20, judged=4)


def plan(folder: Path, **changes) -> Plan:
    tiny = {"seeds": (1, 2), "retrained": (11, 12), "recipes": ("graddiff",), "shares": (0.1, 1.0), "alphas": (1.0,)}
    return Plan(folder, (SMALL,), schedule={"lr": 4e-3, "epochs": 1, "batch": 32}, **{**tiny, **changes})


def test_what_is_judged_stands_in_no_request():
    for case in CASES.values():
        asked = {r.prompt for s in (case.hidden, case.kept) for r in case.questions(s, case.asked)}
        trained = {r.prompt for s in (case.hidden, case.kept) for w in (False, True) for r in case.questions(s, case.train, w)}
        judged = {r.prompt for s in (case.hidden, case.kept) for w in (False, True) for r in case.to_judge(s, w)}
        assert len(judged) == 4 * case.judged
        assert not judged & asked
        assert (not judged & trained) if case.apart else judged <= trained
        assert asked <= trained


def test_random_units_are_as_many_and_do_not_follow_the_skill():
    generator = torch.Generator().manual_seed(0)
    stays = {"a": Moments(torch.zeros(200), torch.ones(200), 9)}
    skill = {"a": Moments(torch.randn(200, generator=generator), torch.ones(200), 9)}
    counts = {"a": 200}
    chosen = NeuronAdjust(share=0.1)._chosen(stays, skill, counts)["a"]
    first, second = (RandomUnits(share=0.1, drawn=n)._chosen(stays, skill, counts)["a"] for n in (1, 2))
    assert len(chosen.units) == len(first.units) == len(second.units) == 20
    assert set(first.units.tolist()) != set(second.units.tolist())
    assert len(set(chosen.units.tolist()) & set(first.units.tolist())) < 10
    assert torch.equal(first.forget_mean, skill["a"].mean[first.units])


def test_a_random_box_has_the_same_sides_elsewhere(target_adapter: LanguageAdapter, people):
    probes = {"s": list(people.split.retain[:30])}
    material = Material([], adapter=target_adapter, probes=probes)
    own, other = KeySpace().fit(material), RandomBox(drawn=1).fit(material)
    (box,), (moved,) = own.boxes["s"].values(), other.boxes["s"].values()
    assert torch.equal(box.std.sort().values, moved.std.sort().values)
    assert not torch.equal(box.mean, moved.mean)
    assert box.k == moved.k


def test_answers_are_counted_word_for_word_and_refusals_as_such(target_adapter: LanguageAdapter, people):
    records = people.split.retain[:6]
    wrong = [replace(r, answer=r.answer + " no") for r in records]
    assert measured(target_adapter, {"a": records, "b": wrong}) == {
        "right": {"a": 1.0, "b": 0.0}, "refused": {"a": 0.0, "b": 0.0},
    }  # fmt: skip
    every = GuardedAdapter(guard_model(target_adapter, guards=[Row(detector="always", action="refuse")]))
    assert measured(every, {"a": records}) == {"right": {"a": 0.0}, "refused": {"a": 1.0}}


def entry(verdict: Verdict, outcome: str) -> ModelEntry:
    check = Check(name="relearning", outcome=outcome, difference=1.0, margin=1.0, text="It comes back.")
    return ModelEntry(
        label="m", role="unlearned", fingerprint="m", numbers={}, judgement=Judgement(verdict=verdict, reason="", checks=(check,))
    )


def test_verdicts_and_outcomes_are_counted_over_seeds():
    held = [
        entry(Verdict.SUPPRESSED, "knows more"),
        entry(Verdict.DAMAGED, "equivalent"),
        entry(Verdict.SUPPRESSED, "knows more"),
    ]
    assert counted(held) == "suppressed 2/3, damaged 1/3"
    assert outcomes(held, "relearning") == "knows more 2/3, equivalent 1/3"
    assert outcomes(held, "cloze") == between(held[0], "forget.rouge") == DASH


def test_a_table_of_sizes_has_the_mean_and_the_extremes_of_all_seeds(tmp_path):
    ground = Ground(plan(tmp_path), SMALL)
    ground.folder.mkdir(parents=True)
    for seed, value in ((1, 0.2), (2, 0.6)):
        shares = {"hidden": value, "kept": 1.0, "facts": 1.0}
        found = [{"label": "rise", "size": 0.03, "right": shares}, {"label": "other", "size": 0.03, "right": shares}]
        (ground.folder / f"ablations-{seed}.json").write_text(json.dumps(found))
    lines = sizes(ground, "share", ("rise",)).splitlines()
    assert lines[2:] == ["| rise | 0.03 | 0.40 [0.20, 0.60] | 1.00 | 1.00 |"]
    (ground.folder / "npo-1.failed").write_text("It broke.")
    assert failures([ground]) == ["- `languages/npo-1`: It broke."]
    assert "never trained on" in described(SMALL)


@pytest.mark.slow
def test_all_of_it_at_its_smallest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    made = plan(tmp_path / "runs", steps={"schedule": {"name": "fixed", "lr": 1e-4, "steps": 2, "epochs": 1, "batch": 8}})
    stages = Stages(120.0, apart=False)
    experiment(made, stages)
    assert gaps(made)["failed"] == "Nothing failed."
    write_page(made, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    for row in ("| `key-space` |", "| `neuron-adjust` |", "| `graddiff` |", "| random units | 0.1 |", "| box of the skill | 1 |"):
        assert row in page
    assert "$" not in page
    assert "Not done yet" not in page
    held = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.json") if p.name != "manifest.json"}
    experiment(made, stages)  # nothing is done again
    assert {p: p.stat().st_mtime_ns for p in held if p.parent.name != "data"} == {
        p: t for p, t in held.items() if p.parent.name != "data"
    }
