"""What a plan looks at if it is asked to: circuits by anchors made here or by earlier runs, and the time that methods take."""

from __future__ import annotations

import dataclasses
import json
import time

import numpy as np
import pytest
import torch

import expunge
from expunge.adapters.language import LanguageAdapter
from expunge.audit.circuits import CircuitSettings
from expunge.audit.wiring import Wiring
from expunge.core.errors import InputError
from expunge.data.records import RecordSet
from expunge.engine.options import Engine
from expunge.pipeline import circuits as looking
from expunge.pipeline.circuits import circuit_difficulty
from expunge.pipeline.outlook import Looks, outlook
from expunge.pipeline.timing import Seconds, extrapolated, from_parts, spell, time_of, timed
from expunge.pipeline.unlearn import Request, run_in_memory
from expunge.pipeline.unlearn import plan as plan_run
from tests.command import Run, Town, refused
from tests.world import World

ENGINE = Engine()


@pytest.fixture(scope="module")
def target(people_world: World):
    return people_world.target()


@pytest.fixture(scope="module")
def asked(people_world: World) -> Request:
    """Three facts each of eight people whom the target knows; the others are kept."""
    known = [*people_world.split.forget, *people_world.split.retain]
    people = sorted({r.subject for r in known})
    forget = [r for name in people[:8] for r in [r for r in known if r.subject == name][:3]]
    kept = [r for r in known if r.subject in people[8:]]
    return Request(RecordSet("forget", tuple(forget)), RecordSet("retain", tuple(kept)), people_world.split.holdout)


@pytest.fixture(scope="module")
def found(target, asked):
    seen: list[str] = []
    before = target.fingerprint()
    looks = Looks(circuits=CircuitSettings())
    plan = outlook(target, asked, ENGINE, names=["npo"], looks=looks, progress=lambda done, total, text: seen.append(text))
    assert target.fingerprint() == before
    return plan, seen


def test_circuits_are_compared_by_two_gradient_ascents_made_here(found, asked) -> None:
    plan, seen = found
    held = plan.circuits
    assert [r.id for r in held.records] == [r.id for r in asked.forget]
    assert all(0 <= r.cud <= 1 and -1 <= r.depth < 2 for r in held.records)
    assert len({r.cud for r in held.records}) > 5
    assert (held.pool, held.source, held.left_out) == (24, (), 0)
    assert held.risen > 0.5  # gradient ascent, and not descent
    assert held.edges == (5, 54)
    assert any("gradient ascent 1 of 2" in text for text in seen)
    assert any("gradient ascent 2 of 2" in text for text in seen)
    assert any("circuits" in text for text in seen)
    value = json.loads(json.dumps(plan.json(), allow_nan=False))["circuits"]
    assert value["anchors"] == {"runs": [], "method": "gradascent", "records": 24, "loss_risen": held.risen}
    assert len(value["records"]) == 24


def test_a_plan_says_so_where_circuits_foretell_nothing(found) -> None:
    plan, _ = found
    said = any("foretells nothing" in c for c in plan.cautions)
    assert said == (not plan.circuits.trusted)
    check = dataclasses.replace(plan.circuits.foretold, value=0.4, p=0.01, partial=0.1, p_partial=0.4)
    from expunge.pipeline.outlook import _circuits

    assert "no more than the loss" in _circuits(dataclasses.replace(plan.circuits, foretold=check))[0]
    assert not _circuits(dataclasses.replace(plan.circuits, foretold=dataclasses.replace(check, p_partial=0.01)))


def test_each_half_is_unlearned_alone_and_scored_by_the_other(target, asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done to one half alone changes the scores of the other half alone."""
    unlearned: list[set[str]] = []
    shift = {"sign": 1.0}
    done: dict[frozenset[str], tuple] = {}

    def run(made, *, progress=None):
        names = frozenset(r.id for r in made.request.forget)
        unlearned.append(set(names))
        if names not in done:  # the second time it would be the same
            done[names] = run_in_memory(made, progress=progress)
        return done[names]

    own = looking._ranks
    monkeypatch.setattr(looking, "run_in_memory", run)
    calls = {"n": 0}

    def ranks(values):
        calls["n"] += 1
        return own(values * shift["sign"]) if calls["n"] % 2 == 1 else own(values)  # of the first half only

    monkeypatch.setattr(looking, "_ranks", ranks)
    before = circuit_difficulty(target, asked, ENGINE)
    shift["sign"] = -1.0
    after = circuit_difficulty(target, asked, ENGINE)
    first, second = unlearned[:2]
    assert not first & second
    assert first | second == {r.id for r in asked.forget}
    assert not {r.subject for r in asked.forget if r.id in first} & {r.subject for r in asked.forget if r.id in second}
    old, new = ({r.id: r.cud for r in d.records} for d in (before, after))
    assert all(old[i] == new[i] for i in first)
    assert any(old[i] != new[i] for i in second)


def test_what_cannot_be_compared_is_refused(target, asked, people_world: World) -> None:
    with pytest.raises(InputError, match="when to stop"):
        circuit_difficulty(target, Request(asked.forget), ENGINE)
    texts = RecordSet("forget", tuple(dataclasses.replace(r, prompt="") for r in asked.forget))
    with pytest.raises(InputError, match="No record to forget has a prompt"):
        circuit_difficulty(target, dataclasses.replace(asked, forget=texts), ENGINE)
    with pytest.raises(InputError, match="too few"):
        circuit_difficulty(target, dataclasses.replace(asked, forget=RecordSet("forget", asked.forget.records[:6])), ENGINE)
    mixed = RecordSet("forget", (*asked.forget.records, dataclasses.replace(asked.forget[0], id="t", prompt="")))
    with pytest.raises(InputError, match="no run"):
        circuit_difficulty(target, asked, ENGINE, runs=["nowhere"])
    assert len(looking._Search(target, ENGINE, CircuitSettings(), None).counterparts(mixed.records, [])) == 24


def test_a_lora_is_merged_into_a_copy_before_heads_are_told_apart(people_world: World, asked) -> None:
    import peft

    target = people_world.target()
    model = peft.get_peft_model(target.model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    worn = LanguageAdapter(model, people_world.tokenizer)
    batch = worn.collate([worn.encode(r) for r in asked.forget[:4]])
    before = worn.forward(worn.model, batch, frozenset({"losses"})).losses
    plain = looking._plain(worn)
    assert Wiring(plain).graph.n_edges == 54
    assert torch.allclose(plain.forward(plain.model, batch, frozenset({"losses"})).losses, before, atol=1e-4)
    assert torch.equal(worn.forward(worn.model, batch, frozenset({"losses"})).losses, before)
    assert (before - plain.forward(people_world.target().model, batch, frozenset({"losses"})).losses).abs().max() > 0.01


def test_records_of_earlier_runs_are_anchors(expunge: Run, town: Town, tmp_path) -> None:
    words = [town.target, "--forget", town.forget, "--retain", town.retain, "--holdout", town.holdout]
    steps = ["schedule=fixed", "schedule.lr=0.001", "schedule.epochs=null", "schedule.steps=6", "schedule.warmup=0"]
    assert expunge("unlearn", *words, "--method", "gradascent", "--out", "run", *steps).code == 0
    plan = [*words, "--method", "npo"]
    value = expunge("plan", *plan, "--anchors", "run", "--json").json()["circuits"]
    assert value["anchors"]["runs"] == ["run"]
    assert value["anchors"]["records"] == 16
    assert value["anchors"]["loss_risen"] > 0
    assert len(value["records"]) == 16
    assert value["foretold"]["records"] == 16
    refused(expunge("plan", *plan, "--anchors", "nowhere"), "no run folder")
    refused(expunge("plan", *plan, "--anchors", str(town.target)), "no finished run of expunge unlearn")
    refused(expunge("plan", *plan, "circuits.steps=0", "--circuits"), "steps", "circuits")
    other = expunge("plan", "run", *words[1:], "--method", "npo", "--anchors", "run")
    refused(other, "began from another model", "--anchors")


def test_time_is_extrapolated_from_steps() -> None:
    found = extrapolated(3.0, [1.0, 1.2, 0.8, 1.0], 100)
    half = 3.182446305 * np.std([1, 1.2, 0.8, 1.0], ddof=1) / 2
    assert found.value == pytest.approx(103)
    assert (found.low, found.high) == (pytest.approx(103 - 100 * half), pytest.approx(103 + 100 * half))
    assert (found.once, found.step, found.timed, found.how) == (3.0, 1.0, 4, "steps")
    assert extrapolated(3.0, [1.0], 10).high == pytest.approx(23)  # one step says little
    line = from_parts([100, 300], [[1.0, 1.1], [3.0, 3.1]], 1000)
    assert line.value == pytest.approx(3.05 + 2 / 200 * 700)
    assert line.low == pytest.approx(3.0 + 1.9 / 200 * 700)
    assert line.high == pytest.approx(3.1 + 2.1 / 200 * 700)
    assert from_parts([100], [[1.0, 1.2]], 100).how == "whole"
    assert [spell(s) for s in (0.34, 42.4, 130, 8000)] == ["0.3 s", "42 s", "2.2 min", "2.2 h"]
    assert dataclasses.replace(found, at_most=True).text().startswith("at most")
    assert Seconds(130, None, None, "unfinished", 130, 0.0, 0, False).text() == "over 2.2 min"


def test_timed_steps_foretell_what_a_run_takes_and_leave_the_model_alone(target, asked) -> None:
    parts = {"schedule": {"name": "fixed", "lr": 1e-4, "steps": 60, "warmup": 0, "batch": 8}}
    before = target.fingerprint()
    made = plan_run(target, asked, "npo", parts, ENGINE)
    found = timed(made)
    assert target.fingerprint() == before
    assert made.adapter is target
    assert (found.how, found.timed, found.at_most) == ("steps", 8, False)
    assert found.low < found.value < found.high
    begun = time.perf_counter()
    run_in_memory(plan_run(target.copy(), asked, "npo", parts, ENGINE))
    took = time.perf_counter() - begun
    assert took / 4 < found.value < 4 * took  # other work on the machine comes and goes
    twice = timed(plan_run(target, asked, "npo", {"schedule": {**parts["schedule"], "steps": 6000}}, ENGINE))
    assert twice.value > 20 * found.value  # a hundred times the steps


def test_edits_are_timed_on_parts_and_what_cannot_be_timed_is_said(target, asked, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan_run(target, asked, "ssd", {}, ENGINE)
    found = timed(made)
    assert found.how == "parts"
    assert 0 < found.low <= found.value <= found.high
    assert timed(plan_run(target, asked, "npo", {}, ENGINE)).at_most  # the adaptive schedule may stop early
    from expunge.pipeline import timing

    monkeypatch.setattr(timing, "LIMIT", 0.0)
    assert timed(plan_run(target, asked, "npo", {}, ENGINE), lambda *_: None).how == "unfinished"

    def full(needed: int, what: str) -> None:
        raise InputError(f"{what} needs {needed}.", "Free some.")

    monkeypatch.setattr(timing, "check_memory", full)
    assert time_of(made)[0] is None
    assert "copy of the model" in time_of(made)[1]


def test_the_same_from_python(people_world: World, asked) -> None:
    model = people_world.target().model
    weights = [p.detach().clone() for p in model.parameters()]
    sets = {n: _table(getattr(asked, n)) for n in ("forget", "retain", "holdout")}
    found = expunge.plan(model, people_world.tokenizer, **sets, methods=["npo", "retrain"], time=True, circuits__edges=8)
    assert found.circuits.edges == (8, 54)
    assert found.method("npo").time.value > 0
    assert "untrained base anew" in found.method("retrain").missing
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    plain = expunge.plan(model, people_world.tokenizer, **sets, methods=["npo"], schedule__name="fixed", schedule__steps=7,
                         schedule__lr=1e-4)  # fmt: skip
    assert plain.method("npo").cost.steps == 7
    assert plain.method("npo").time is plain.circuits is None
    fresh = people_world.fresh().model
    with_base = expunge.plan(model, people_world.tokenizer, **sets, methods=["retrain"], base=fresh)
    assert with_base.method("retrain").runs
    for bad, said in (
        ({"methods": ["npoo"]}, "npoo"),
        ({"methods": "npo"}, "list of names"),
        ({"beta": 0.2}, "one method"),
        ({"alternatives": "nothing"}, "nothing"),
        ({"anchors": ["nowhere"]}, "no run folder"),
    ):
        with pytest.raises(InputError, match=said):
            expunge.plan(model, people_world.tokenizer, **sets, **bad)
    with pytest.raises(InputError, match="ssd"):
        plain.method("ssd")


def _table(records) -> list[dict[str, object]]:
    return [{"id": r.id, "question": r.prompt, "answer": r.answer, "subject": r.subject} for r in records]
