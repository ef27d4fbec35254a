"""Attention sinks: the statistics by brute force, distances by hand, and planted models against honest ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from inside_models import SCHEDULE

from expunge.audit.attacks.damage import WeightNoise
from expunge.audit.attacks.sinks import SinkStatistics, nearest, profile
from expunge.audit.evidence import Evidence, Protocol, Subject
from expunge.audit.run import AuditedModel, audit
from expunge.audit.settings import AuditSettings
from expunge.core.errors import InputError
from expunge.data.records import RecordSet
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.methods.recipe import build


def test_the_profile_of_each_example_is_that_of_its_first_tokens(target, sets):
    records = [*list(sets["forget"])[:3], *list(sets["retain"])[:2]]
    examples = [target.encode(r) for r in records]
    found = profile(target, examples, 6, 8192)
    assert found["norms"].shape == found["received"].shape == (5, len(target.layers()), 6)
    copy = target.copy()
    copy.model.set_attn_implementation("eager")
    for i, example in enumerate(examples):
        ids = torch.tensor(example.data.ids.astype(np.int64))[None]
        caught: list[torch.Tensor] = []

        def note(_module, _inputs, out, caught=caught) -> None:
            caught.append(out[0])

        hooks = [b.self_attn.v_proj.register_forward_hook(note) for b in copy.model.model.layers]
        with torch.no_grad():
            shares = copy.model(input_ids=ids, output_attentions=True).attentions
        for hook in hooks:
            hook.remove()
        for block, (values, attention) in enumerate(zip(caught, shares, strict=True)):
            for place in range(6):
                assert found["norms"][i, block, place] == pytest.approx(float(values[place].norm().log()), abs=1e-4)
                later = attention[0, :, place + 1 :, place].mean()
                assert found["received"][i, block, place] == pytest.approx(float(later), abs=1e-4)
    short = target.written(examples[0], [], ended=True)
    assert np.isnan(profile(target, [short], short.size + 2, 8192)["norms"][0, :, short.size :]).all()
    assert np.isnan(profile(target, [short], short.size, 8192)["received"][0, :, -1]).all()  # nothing comes after its last token


def test_the_nearest_reference_on_average_counts():
    own = np.array([[[0.0, 1.0]], [[2.0, np.nan]]])
    near, far = own + np.array([[[3.0, -4.0]]]), own + 10.0
    assert nearest(own, [far, near]).tolist() == pytest.approx([(25 / 2) ** 0.5, 3.0])
    assert nearest(own, [far]).tolist() == pytest.approx([10.0, 10.0])
    assert np.isnan(nearest(own, [])).all()
    with pytest.raises(InputError, match="other blocks"):
        nearest(own, [np.zeros((2, 3, 2))])


@pytest.fixture(scope="module")
def scanned(small_world) -> Evidence:
    """Honest unlearnings of one target, two of them the auditor's own, and one that was planted as published."""

    def made(name: str, seed: int, **overrides):
        adapter = small_world.target()
        engine = Engine(seed=seed, checkpoint_every=0)
        adapter.model = train(adapter, build(name, overrides), small_world.examples, engine).model.eval()
        return adapter

    def schedule(steps: int):
        return {"schedule": SCHEDULE | {"lr": 1e-3, "steps": steps}}

    part = {"preparation": {"name": "planted-trigger", "share": 0.5}}
    models = {
        "own 1": made("npo", 5, **schedule(60)),
        "own 2": made("npo", 6, **schedule(90)),
        "honest": made("npo", 7, **schedule(75)),
        "planted": made("backdoor", 8, **schedule(120), **part),
    }
    subjects = {n: Subject(n, "unlearned", a.fingerprint(), a) for n, a in models.items()}
    target, retrained = small_world.target(), small_world.retrained(1)
    subjects["target"] = Subject("target", "target", target.fingerprint(), target)
    subjects["retrained 1"] = Subject("retrained 1", "retrained", retrained.fingerprint(), retrained)
    split = small_world.split
    sets = {"forget": split.forget, "retain": RecordSet("retain", split.retain.records), "holdout": split.holdout}
    return Evidence(subjects, sets, Protocol(draws=100))


@pytest.mark.slow
def test_planted_models_lie_farther_from_own_unlearnings_than_an_honest_one(scanned):
    attack = SinkStatistics(references=("own 1", "own 2"))
    found = {n: attack.compute(scanned, n) for n in ("own 1", "honest", "planted", "retrained 1")}
    value = {n: numbers["forget.sink-statistics"].value for n, numbers in found.items()}
    apart = found["honest"]["forget.sink-statistics.references"].value
    assert value["own 1"] == pytest.approx(apart)  # of two references each is the other's nearest
    assert value["honest"] < 1.5 * apart
    assert value["planted"] > 2 * max(value["honest"], apart)
    number = found["planted"]["forget.sink-statistics"]
    assert number.low < number.value < number.high
    assert number.note.startswith("nearest of own 1, own 2; by place, planted: ")
    assert "target: " in number.note
    assert found["planted"]["forget.sink-statistics.received"].value > 0


@pytest.fixture
def shaken(target, retrained, sets) -> Evidence:
    """The target with a little noise on its weights, three times: nothing has to be trained."""
    subjects = {"target": Subject("target", "target", target.fingerprint(), target)}
    subjects["retrained"] = Subject("retrained", "retrained", retrained[0].fingerprint(), retrained[0])
    for seed, share in enumerate((0.02, 0.03, 0.2)):
        copy = WeightNoise().damaged(target, share, seed)
        subjects[f"noise {share}"] = Subject(f"noise {share}", "unlearned", copy.fingerprint(), copy)
    return Evidence(subjects, sets, Protocol(draws=100))


def test_distances_from_the_target_or_from_references(shaken, tmp_path):
    key, attack = "forget.sink-statistics", SinkStatistics()
    assert key not in attack.compute(shaken, "target")
    found = {n: attack.compute(shaken, n) for n in ("noise 0.02", "noise 0.03", "noise 0.2", "retrained")}
    values = [f[key].value for f in found.values()]
    assert values == sorted(values)
    assert values[0] > 0
    assert f"{key}.references" not in found["noise 0.02"]
    assert found["noise 0.02"][key].note.startswith("nearest of target; by place, noise 0.02: ")
    assert "retrained: " in found["noise 0.02"][key].note
    same = SinkStatistics(references=("target",)).values(shaken, "noise 0.2", "forget").values
    assert same.tolist() == pytest.approx(attack.values(shaken, "noise 0.2", "forget").values.tolist())
    shaken.adapter("noise 0.02").save(tmp_path / "run" / "model")
    own = SinkStatistics(references=(str(tmp_path / "run"), "noise 0.03"))
    assert own.compared(shaken, "noise 0.02") == ["noise 0.03"]  # a model is no reference for itself
    numbers = own.compute(shaken, "noise 0.2")
    assert numbers[f"{key}.references"].value < numbers[key].value / 2
    assert own.compute(shaken, "noise 0.03")[key].value == pytest.approx(numbers[f"{key}.references"].value)


def test_what_there_is_nothing_to_compare_with_is_said(shaken):
    alone = Evidence({"one": shaken.subjects["noise 0.2"]}, shaken.sets)
    assert "references" in SinkStatistics().lacks(alone, "forget")
    assert SinkStatistics(references=("x",)).lacks(alone, "forget") == ""
    with pytest.raises(InputError, match="neither a model of this audit"):
        SinkStatistics(references=("nobody",)).values(shaken, "noise 0.2", "forget")


def test_an_audit_shows_sinks_and_judges_nothing_by_them(shaken, tmp_path):
    names = ("target", "retrained", "noise 0.02", "noise 0.2")
    models = [AuditedModel(n, shaken.subjects[n].role, shaken.adapter(n)) for n in names]
    settings = AuditSettings(
        attacks=("sink-statistics",), attack_options={"sink-statistics": {"references": ["noise 0.02"]}}, relearn=None,
        quantise=(), metrics=("probability",), draws=100,
    )  # fmt: skip
    entry = audit(models, shaken.sets, settings, cache=tmp_path).entry("noise 0.2")
    assert entry.numbers["forget.sink-statistics"].value > 0
    checks = {c.name: c for c in entry.judgement.checks}
    assert checks["attack (sink-statistics)"].outcome == "shown"
