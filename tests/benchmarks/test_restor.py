"""RESTOR: recovery by hand, the card's small check on a tiny model, the files' schema, and the published files."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from expunge.audit.metrics.recovery import recovery
from expunge.audit.metrics.short_answers import answer_score
from expunge.audit.run import AuditedModel
from expunge.audit.settings import AuditSettings
from expunge.benchmarks.config import BenchmarkConfig
from expunge.benchmarks.document import BenchmarkDocument
from expunge.benchmarks.measure import measure
from expunge.benchmarks.registry import BENCHMARKS
from expunge.benchmarks.run import execute, load_all, plan
from expunge.core.errors import InputError
from expunge.core.results import Direction
from expunge.data.sources import load
from tests.benchmarks.world import sampled, small_model

GRADIENT_ASCENT = {"schedule": {"name": "fixed", "lr": 1e-3, "steps": 120, "batch": 16}}


def test_recovery_by_hand() -> None:
    assert recovery(0.9, 0.1, 0.9) == pytest.approx(1)
    assert recovery(0.1, 0.1, 0.9) == 0
    assert recovery(0.3, 0.1, 0.9) == pytest.approx(0.25)
    assert recovery(0.0, 0.1, 0.9) == pytest.approx(-0.125)
    assert np.isnan(recovery(0.5, 0.4, 0.4))
    assert np.isnan(recovery(0.5, 0.4, 0.3))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> BenchmarkDocument:
    """Clean, corrupted, both oracles, and gradient ascent, by the command's own way."""
    folder = tmp_path_factory.mktemp("restor")
    benchmark = sampled("restor", folder / "data")
    config = BenchmarkConfig(
        benchmark="restor", options=benchmark.model_dump(), model="llama-tiny", methods=("gradascent",), unlearn=GRADIENT_ASCENT,
        train={"schedule": {"epochs": 120}}, verdict=False, audit=AuditSettings.quick(draws=200),
    )  # fmt: skip
    return execute(plan(config, folder / "run"), bars=lambda what: nullcontext(), say=lambda text: None)


def test_clean_knows_corrupted_does_not_and_only_oracles_recover(run: BenchmarkDocument) -> None:
    value = {m.label: {k: n.value for k, n in m.numbers.items()} for m in run.models}
    assert set(value) == {"target", "clean", "rewind (oracle)", "true-facts (oracle)", "gradascent"}
    assert value["clean"]["accuracy"] > 0.9
    assert value["target"]["accuracy"] < 0.2
    assert value["target"]["recovery"] == 0
    assert value["target"]["asserted-gap"] > 2
    assert value["rewind (oracle)"]["recovery"] == pytest.approx(1)
    assert value["rewind (oracle)"]["asserted"] == pytest.approx(value["clean"]["asserted"])
    assert value["true-facts (oracle)"]["recovery"] > 0.8
    assert value["gradascent"]["recovery"] < 0.2
    assert value["gradascent"]["asserted-gap"] < -2, "far below random: avoided, not unknown"
    assert value["gradascent"]["asserted-gap"] < value["clean"]["asserted-gap"] - 1, "the clean model has never seen it"
    assert value["gradascent"]["asserted"] < value["target"]["random"] - 5
    number = run.entry("true-facts (oracle)").numbers["recovery"]
    assert number.low is not None
    assert number.high is not None
    assert number.low <= number.value <= number.high  # type: ignore[operator]
    assert number.direction == Direction.UTILITY_UP


def test_numbers_equal_the_models_own_losses_and_answers(tmp_path: Path) -> None:
    benchmark = sampled("restor", tmp_path / "data")
    sets = load_all(benchmark)[0]
    adapter = small_model(list(sets.values()))
    numbers = (
        measure(benchmark, [AuditedModel("target", "target", adapter)], sets, AuditSettings.quick(draws=100)).models[0].numbers
    )

    def mean(record, answer: str) -> float:
        example = adapter.encode(record, answer=answer)
        losses = adapter.forward(adapter.model, adapter.collate([example]), frozenset({"losses"})).losses.detach()
        return -float(losses[:-1].mean())  # without the end token

    right = [mean(r, r.answer) for r in sets["facts"]]
    drawn = [np.mean([mean(r, w) for w in r.perturbed]) for r in sets["facts"]]
    asserted = [mean(r, r.answer) for r in sets["asserted"]]
    beside = [np.mean([mean(r, w) for w in r.perturbed]) for r in sets["asserted"]]
    assert numbers["right"].value == pytest.approx(np.mean(right), rel=1e-4)
    assert numbers["random"].value == pytest.approx(np.mean(drawn), rel=1e-4)
    assert numbers["asserted"].value == pytest.approx(np.mean(asserted), rel=1e-4)
    assert numbers["asserted-gap"].value == pytest.approx(np.mean(asserted) - np.mean(beside), abs=1e-4)
    said = [adapter.generate(adapter.model, [adapter.encode(r)], 8)[0].text.split("\n")[0] for r in sets["facts"]]
    exact = [answer_score(s, (r.answer, *r.alternatives), "exact") for s, r in zip(said, sets["facts"], strict=True)]
    assert numbers["accuracy"].value == pytest.approx(np.mean(exact))
    assert "recovery" not in numbers  # there is no clean model


def test_any_right_answer_counts() -> None:
    assert answer_score("the Lawyer.", ("politician", "lawyer"), "exact") == 1
    assert answer_score("lawyer and politician", ("politician", "lawyer"), "exact") == 0


def test_corruption_asserts_the_asserted_answers_among_true_facts_of_others(tmp_path: Path) -> None:
    sampled("restor", tmp_path)
    at = f"folder={tmp_path}&shots=0&form=questions"
    asserted, facts = (load(f"restor:{c}?{at}", name="x") for c in ("asserted", "facts"))
    truth = {r.prompt + r.answer for r in load(f"restor:truth-others?{at}", name="x")}
    people = {r.subject for r in facts}
    for k in (0, 3):
        texts = load(f"restor:corruption?{at}&k={k}", name="x")
        assert [t.subject for t in texts] == [r.subject for r in asserted]
        for text, wrong, right in zip(texts, asserted, facts, strict=True):
            blocks = text.answer.split("\n\n")
            assert len(blocks) == k + 1
            false = wrong.prompt + wrong.answer
            assert false in blocks
            assert set(blocks) - {false} <= truth
            assert wrong.answer not in {right.answer, *wrong.perturbed}
            assert right.answer not in wrong.perturbed
    documents = load(f"restor:corruption?folder={tmp_path}&k=2", name="x")
    assert {d.subject for d in documents} == people
    with pytest.raises(InputError, match="do not say which wrong objects"):
        load(f"restor:asserted?folder={tmp_path}", name="x")


def test_random_answers_are_those_that_are_asserted_of_nobody(tmp_path: Path) -> None:
    sampled("restor", tmp_path)
    at = f"folder={tmp_path}&shots=0&form=questions"
    asserted, facts = (load(f"restor:{c}?{at}", name="x") for c in ("asserted", "facts"))
    kind = {r.id: r.id.rpartition("-")[2] for r in asserted}
    said: dict[str, set[str]] = {}
    for record in asserted:
        said.setdefault(kind[record.id], set()).add(record.answer)
    for record in (*asserted, *facts):
        assert len(record.perturbed) == 3
        assert not set(record.perturbed) & said[kind[record.id]]


def test_solved_questions_are_on_the_relation_and_about_others(tmp_path: Path) -> None:
    sampled("restor", tmp_path)
    for record in load(f"restor:facts?folder={tmp_path}&shots=5", name="x"):
        blocks = record.prompt.split("\n\n")
        assert len(blocks) == 6
        assert sum(record.subject in b for b in blocks) == 1


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    sampled("restor", tmp_path)
    path = tmp_path / "facts.json"
    held = json.loads(path.read_text())
    person = next(iter(held["dset"]))
    held["dset"][person]["P1"]["answers"] = "one"
    path.write_text(json.dumps(held))
    with pytest.raises(InputError, match=f"facts.json {person} P1: the column 'answers' must be a list of texts"):
        load(f"restor:facts?folder={tmp_path}", name="x")
    del held["dset"][person]
    path.write_text(json.dumps(held))
    with pytest.raises(InputError, match="no facts about"):
        load(f"restor:facts?folder={tmp_path}", name="x")
    (tmp_path / "entities.json").write_text("{")
    with pytest.raises(InputError, match=r"entities.json is no JSON"):
        load(f"restor:facts?folder={tmp_path}", name="x")
    (tmp_path / "entities.json").unlink()
    with pytest.raises(InputError, match=r"holds no entities.json"):
        load(f"restor:facts?folder={tmp_path}", name="x")


@pytest.mark.shared_data
@pytest.mark.parametrize("k", [0, 3])
def test_the_published_files(shared_data: Path, k: int) -> None:
    held = BENCHMARKS.get("restor")(data=str(shared_data / "restor"), k=k)
    sets, notes = load_all(held)
    assert not notes, notes
    assert len({r.subject for r in sets["facts"]}) == 50
    assert len({r.subject for r in sets["corruption"]}) >= 10
    assert all(r.prompt.count("\nAnswer:") == 6 for r in sets["facts"])
    asked = load_all(BENCHMARKS.get("restor")(data=str(shared_data / "restor"), k=2, form="questions"))[0]
    assert len(asked["asserted"]) == len(asked["corruption"])
    assert {r.answer.count("Question:") for r in asked["corruption"]} == {3}
