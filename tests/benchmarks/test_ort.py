"""Forms of the same fact: the card's small check (a filter, retrained models, ascent on questions), the matrix, and files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expunge.adapters.answers import Generation
from expunge.adapters.base import Example
from expunge.adapters.language import LanguageAdapter
from expunge.audit.attacks.form_bias import forgetting, form_dependent_bias
from expunge.audit.evidence import Evidence, Protocol, Subject
from expunge.audit.facts import tells
from expunge.audit.metrics.forms import FactTold, FormForgetting
from expunge.audit.run import AuditedModel
from expunge.audit.settings import AuditSettings
from expunge.benchmarks.config import BenchmarkConfig
from expunge.benchmarks.document import BenchmarkDocument
from expunge.benchmarks.measure import measure
from expunge.benchmarks.registry import BENCHMARKS
from expunge.benchmarks.run import execute, load_all, plan
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.data.records import Record, RecordSet
from expunge.data.sets.forms import facts
from expunge.data.sources import load
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.recipe import build
from expunge.methods.terms.likelihood import NLL
from expunge.report.benchmark import document_json, markdown
from tests.benchmarks.world import sampled, small_model

FORMS = ("question", "rephrased", "statement", "choice")
OPTIONS: dict[str, Any] = {
    "people": 3, "kept": 3, "facts": 3, "answer_tokens": 16, "forms": ",".join(FORMS), "choices": "choice",
}  # fmt: skip
ASCENT = {"schedule": {"name": "fixed", "lr": 1e-3, "steps": 8, "batch": 9}}


class Filtered(LanguageAdapter):
    """A model behind a table of the exact questions that it must not answer."""

    refused: frozenset[str]

    def generate(self, model: Any, examples: Sequence[Example], *args: Any, **kwargs: Any) -> list[Generation]:
        made = super().generate(model, examples, *args, **kwargs)
        return [replace(g, text="", tokens=()) if e.id in self.refused else g for e, g in zip(examples, made, strict=True)]

    def fingerprint(self) -> str:
        return "filtered " + super().fingerprint()


def filtered(adapter: LanguageAdapter, refused: Sequence[Record]) -> Filtered:
    made = adapter.sharing()
    made.__class__ = Filtered
    assert isinstance(made, Filtered)
    made.refused = frozenset(r.id for r in refused)
    return made


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, AuditedModel], BenchmarkDocument]:
    """Target, two retrained models, gradient ascent on the questions, and a filter of the exact questions."""
    benchmark = BENCHMARKS.get("ort")(**OPTIONS)
    sets = load_all(benchmark)[0]
    roles = benchmark.roles()
    assert roles is not None
    assert roles.without == ("forget_all",)

    def trained(records: Sequence[Record], seed: int) -> LanguageAdapter:
        adapter = small_model(list(sets.values()), seed=seed, context=128)
        recipe = compose("train", retain=[NLL()], schedule=Fixed(lr=5e-3, epochs=30, batch=16, warmup=1, weight_decay=0.01))
        train(adapter, recipe, {Stream.RETAIN: [adapter.encode(r) for r in records]}, Engine(seed=seed))
        adapter.model.eval()
        return adapter

    target = trained([*sets["forget_all"], *sets["retain_all"]], 0)
    ascent = target.copy()
    streams = {
        s: [ascent.encode(r) for r in sets[n]] for s, n in ((Stream.FORGET, roles.forget), (Stream.RETAIN, "retain_question"))
    }
    train(ascent, build("gradascent", ASCENT), streams, Engine())
    models = [
        AuditedModel("target", "target", target),
        *(AuditedModel(f"retrained {s}", "retrained", trained(list(sets["retain_all"]), s)) for s in (1, 2)),
        AuditedModel("gradascent", "unlearned", ascent),
        AuditedModel("filter", "unlearned", filtered(target, list(sets["forget_question"]))),
    ]
    return {m.label: m for m in models}, measure(benchmark, models, sets, AuditSettings.quick(draws=200))


Found = tuple[dict[str, AuditedModel], BenchmarkDocument]


def test_a_filter_of_exact_questions_forgets_one_form_only(found: Found) -> None:
    numbers = found[1].entry("filter").numbers
    assert numbers["g-question"].value == pytest.approx(1, abs=0.1)
    for form in FORMS[1:]:
        assert numbers[f"g-{form}"].value == pytest.approx(0, abs=1e-9), form
    assert numbers["fdb"].value == pytest.approx(1, abs=0.1)
    assert numbers["least"].value == pytest.approx(0, abs=1e-9)
    assert {n.value for k, n in found[1].entry("target").numbers.items() if k.startswith("g-") or k == "fdb"} == {0.0}


def test_retrained_models_have_no_bias(found: Found) -> None:
    for seed in (1, 2):
        numbers = found[1].entry(f"retrained {seed}").numbers
        bias = numbers["fdb"]
        assert bias.value is not None
        assert abs(bias.value) < 0.3
        assert bias.low is None or bias.low <= 0.05
        assert bias.high is None or bias.high >= -0.05
        assert all(numbers[f"g-{f}"].value > 0.6 for f in FORMS), numbers
        assert all(numbers[f"retain-{f}"].value > 0.9 for f in FORMS), "what is kept is known in all forms"
        assert all(numbers[f"forget-{f}"].value < 0.4 for f in FORMS[:3]), "the facts were seen in no form"


def test_gradient_ascent_on_questions_spares_the_statement(found: Found) -> None:
    numbers = found[1].entry("gradascent").numbers
    assert numbers["g-question"].value > numbers["g-statement"].value + 0.1  # type: ignore[operator]
    assert numbers["fdb"].value > 0.05  # type: ignore[operator]
    told = {f: {m.label: m.numbers[f"forget-{f}"].value for m in found[1].models} for f in FORMS}
    gold = {f: (v["retrained 1"] + v["retrained 2"]) / 2 for f, v in told.items()}  # type: ignore[operator]
    shares = [float(forgetting(told[f]["target"], told[f]["gradascent"], gold[f])) for f in FORMS]  # type: ignore[arg-type]
    assert [numbers[f"g-{f}"].value for f in FORMS] == pytest.approx(shares)
    assert numbers["fdb"].value == pytest.approx(form_dependent_bias(shares))
    assert numbers["least"].value == pytest.approx(min(shares))


@pytest.mark.slow
def test_the_matrix_has_a_row_for_each_trained_form(tmp_path: Path) -> None:
    config = BenchmarkConfig(
        benchmark="ort", options=OPTIONS, model="llama-tiny", methods=("gradascent",), unlearn=ASCENT, retrain=1,
        train={"schedule": {"epochs": 30}}, courses=("matrix",), verdict=False, audit=AuditSettings.quick(draws=200),
    )  # fmt: skip
    held = plan(config, tmp_path / "run")
    gone = {r.answer + r.prompt for r in held.sets["forget_all"]}
    exclude = next(iter(held.gold.values()))[0].exclude
    assert len(exclude) == len(gone), "a retrained model has seen the facts in no form"
    document = execute(held, bars=lambda what: nullcontext(), say=lambda text: None)
    grid = document.grids[0]
    assert [r.label for r in grid.rows] == list(FORMS)
    rows = {r.label: r.numbers for r in grid.rows}
    own = {k: v for k, v in document.entry("gradascent").numbers.items() if k in rows["question"]}
    assert rows["question"] == own, "the first row is the run itself"
    for form in FORMS:
        shares = [rows[form][f"g-{f}"].value for f in (form, *(f for f in FORMS if f != form))]
        assert rows[form]["fdb"].value == pytest.approx(form_dependent_bias(shares)), form
    assert len({tuple(n.value for n in r.values()) for r in rows.values()}) == len(FORMS)
    text = markdown(document)
    assert "## matrix: gradascent" in text
    assert text.count("\n| statement |") == 1
    assert document_json(document)["grids"][0]["columns"][0] == "fdb"
    again = execute(held, resume=True, bars=lambda what: nullcontext(), say=lambda text: None)
    assert again.model_dump_json() == document.model_dump_json(), "nothing is done twice"


def test_a_form_that_the_target_cannot_do_is_dropped_and_chance_stands_in_for_retrained_models() -> None:
    rows = {
        "question": [("a b", "cold iron"), ("c d", "warm gold")],
        "choice": [("a b?", "iron"), ("c d?", "gold")],
    }  # fmt: skip
    sets = {
        form: RecordSet(
            form,
            tuple(
                Record(id=f"f{i}@{form}", prompt=p, answer=a, perturbed=("tin", "lead", "zinc")) for i, (p, a) in enumerate(held)
            ),
        )
        for form, held in rows.items()
    }
    adapter = small_model(list(sets.values()))
    subjects = {n: Subject(n, r, n, adapter) for n, r in (("t", "target"), ("u", "unlearned"))}  # type: ignore[arg-type]
    values = {
        ("t", "question"): [1.0, 1.0],
        ("u", "question"): [0.5, 0.0],
        ("t", "choice"): [1.0, 0.0],
        ("u", "choice"): [0.0, 0.0],
    }
    metric = FormForgetting(choices=("choice",))

    def compute(kept: dict[tuple[str, str], list[float]]) -> tuple[dict[str, Any], str]:
        from expunge.audit.evidence import Values

        evidence = Evidence(subjects, sets, Protocol())

        class Given(FormForgetting):
            def accuracy(self, evidence: Evidence, label: str, form: str) -> Values:
                return Values(np.array(kept[label, form]), np.ones(2, dtype=bool))

        return Given(choices=("choice",)).compute(evidence, "u"), " ".join(evidence.missing)

    found, said = compute(values)
    assert found["form-forgetting.question"].value == pytest.approx(0.75)  # chance is 0
    assert found["form-forgetting.choice"].value == pytest.approx(0.5 / 0.25)  # chance is 1/4
    assert found["form-forgetting"].value == pytest.approx(0.75 - 2)
    found, said = compute({**values, ("t", "choice"): [0.0, 0.0]})
    assert {k for k, n in found.items() if n.value is not None} == {"form-forgetting.question", "form-forgetting.least"}
    assert found["form-forgetting.least"].value == pytest.approx(0.75)
    assert "was left out" in found["form-forgetting.choice"].note
    assert "from chance by -0.25" in said
    assert metric.accuracy(Evidence(subjects, sets, Protocol()), "t", "choice").present.all()


def test_what_is_told_is_the_fact_and_not_the_sentence(tmp_path: Path) -> None:
    benchmark = sampled("ort", tmp_path / "data")
    sets = load_all(benchmark)[0]
    record = sets["forget_question"][0]
    assert tells(record, record.answer) == 1
    assert tells(record, record.perturbed[0]) < 0.5
    adapter = small_model(list(sets.values()))
    evidence = Evidence({"t": Subject("t", "target", "t", adapter)}, {"forget": sets["forget_statement"]}, Protocol())
    found = FactTold(max_new_tokens=9).values(evidence, "t", "forget").values
    said = [adapter.generate(adapter.model, [adapter.encode(r)], 9)[0].text.split("\n")[0] for r in sets["forget_statement"]]
    assert found.tolist() == [tells(r, t) for r, t in zip(sets["forget_statement"], said, strict=True)]


def test_generated_facts_hold_together() -> None:
    made = facts(12, 6, 1)
    by_kind: dict[str, list[str]] = {}
    for fact in made:
        forms = fact["forms"]
        value = forms["choice"]["answer"]
        by_kind.setdefault(fact["id"].rpartition("-")[2], []).append(value)
        assert value in forms["question"]["answer"]
        assert forms["statement"]["answer"].strip().startswith(value)
        assert forms["reversed"]["answer"] == fact["subject"]
        assert fact["subject"] not in forms["reversed"]["prompt"]
        assert value not in forms["choice"]["wrong"]
        assert all(o in forms["choice"]["prompt"] for o in (value, *forms["choice"]["wrong"]))
        assert (value in forms["true-false"]["prompt"]) == (forms["true-false"]["answer"] == "Yes")
        assert forms["question"]["prompt"] != forms["rephrased"]["prompt"]
    assert all(len(set(v)) == len(v) for v in by_kind.values()), "no two people share a value"


def test_files_of_your_own(tmp_path: Path) -> None:
    row = {
        "id": "f1",
        "subject": "Ada",
        "forms": {"ask": {"prompt": "Who?", "answer": "Ada"}, "pick": {"prompt": "A or B?", "answer": "A"}},
    }
    path = tmp_path / "forget.jsonl"

    def refused(match: str, *rows: Any, form: str = "ask") -> None:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        with pytest.raises(InputError, match=match):
            load(f"forms:forget-{form}?folder={tmp_path}&forms=ask,pick,sing", name="x")

    refused("line 2: the id 'f1' occurs twice", row, row)
    refused("no column 'forms'", {"id": "f1"})
    refused("line 1 form ask has no column 'answer'", {"id": "f1", "forms": {"ask": {"prompt": "Who?"}}})
    refused("'wrong' must be a list of texts", {"id": "f1", "forms": {"ask": {"prompt": "Who?", "answer": "Ada", "wrong": "Bo"}}})
    refused("No fact to forget has the form 'sing'; there are ask, pick", row, form="sing")
    path.write_text(json.dumps(row) + "\n")
    found = load(f"forms:forget-all?folder={tmp_path}&forms=ask,pick", name="x")
    assert [r.id for r in found] == ["f1@ask", "f1@pick"]
    with pytest.raises(InputError, match="are not two or more"):
        load("forms:forget-all?forms=ask", name="x")
    with pytest.raises(InputError, match="form 'questoin'"):
        BENCHMARKS.get("ort")(trained="questoin")  # type: ignore[call-arg]
