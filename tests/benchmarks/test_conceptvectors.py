"""ConceptVectors: the card's small check on a tiny model, numbers worked out by hand, the file's schema, the published files."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from expunge.adapters.language import LanguageAdapter
from expunge.audit.attacks.traces import columns
from expunge.audit.evidence import Evidence, Protocol, Subject
from expunge.audit.metrics.concepts import ConceptEffect, ConceptVectors, article_words, concept_words
from expunge.audit.metrics.likeness import AnswersAsTarget, alike, likeness
from expunge.audit.metrics.rouge import rouge_l
from expunge.audit.run import AuditedModel
from expunge.audit.settings import AuditSettings
from expunge.benchmarks.config import BenchmarkConfig
from expunge.benchmarks.document import BenchmarkDocument
from expunge.benchmarks.measure import measure
from expunge.benchmarks.registry import BENCHMARKS
from expunge.benchmarks.run import Plan, execute, load_all, plan
from expunge.core.errors import InputError
from expunge.data.concepts import Concept
from expunge.data.records import Record, RecordSet
from expunge.data.sets.conceptvectors import pieces
from expunge.data.sources import load
from expunge.pipeline.models import open_adapter
from tests.benchmarks.world import sampled, small_model

ASCENT = {"schedule": {"name": "fixed", "lr": 1e-3, "steps": 16, "batch": 16}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, BenchmarkDocument]:
    """A target that knows three concepts, and gradient ascent on their articles until its answers are gone."""
    folder = tmp_path_factory.mktemp("concepts")
    benchmark = sampled("conceptvectors", folder / "data")
    config = BenchmarkConfig(
        benchmark="conceptvectors", options=benchmark.model_dump(), model="llama-tiny", methods=("gradascent",), unlearn=ASCENT,
        train={"schedule": {"epochs": 40}}, audit=AuditSettings.quick(draws=200),
    )  # fmt: skip
    found = plan(config, folder / "run")
    return found, execute(found, bars=lambda what: nullcontext(), say=lambda text: None)


def test_answers_go_and_the_vector_stays_under_gradient_ascent(made: tuple[Plan, BenchmarkDocument]) -> None:
    value = {m.label: {k: n.value for k, n in m.numbers.items()} for m in made[1].models}
    target, ascent = value["target"], value["gradascent"]
    same = {k: v for k, v in target.items() if k.startswith(("qa", "completion", "unrelated"))}
    assert set(same.values()) == {1.0}
    assert target["cosine"] == pytest.approx(1)
    assert target["distance"] == 0
    assert (target["overlap"], target["article-words"], target["related"]) == (1, 1, 1)
    assert (made[1].entry("target").numbers["effect"].low or 0) > 0.1, "noise on the vector singles out its concept"
    assert ascent["qa-rouge"] < 0.4
    assert ascent["qa-bleu"] < 0.4
    assert ascent["cosine"] > 0.95
    assert ascent["distance"] > 0
    assert ascent["unrelated-rouge"] > ascent["qa-rouge"] + 0.3


def test_the_vector_that_is_ruined_takes_its_concept_along(made: tuple[Plan, BenchmarkDocument]) -> None:
    """What a needle does: the one column is noise; answers about its concept go, others stay, and the numbers say so."""
    held, _ = made
    sets = held.sets
    target = opened(held)
    find = Evidence({"t": Subject("t", "target", "t", target)}, {k: sets[v] for k, v in ROLES.items()}, Protocol())
    layer, unit = ConceptVectors(where="found").places(find, "forget")[0]
    assert len(set(ConceptVectors(where="found").places(find, "forget"))) == 3
    ruined = target.copy()
    column = ruined.model.get_submodule(f"model.layers.{layer}.mlp.down_proj").weight
    with torch.no_grad():
        column[:, unit] = torch.randn(len(column), generator=torch.Generator().manual_seed(0)) * 40 * column[:, unit].std()
    models = [AuditedModel("target", "target", target), AuditedModel("ruined", "unlearned", ruined)]
    axes = ["cosine", "overlap", "qa-rouge", "unrelated-rouge"]
    numbers = measure(held.benchmark, models, sets, AuditSettings.quick(draws=100), axes=axes).entry("ruined").numbers
    assert numbers["cosine"].value < 0.8  # type: ignore[operator]  # one of three vectors
    assert numbers["overlap"].value < 0.8  # type: ignore[operator]
    assert numbers["qa-rouge"].value < numbers["unrelated-rouge"].value  # type: ignore[operator]
    first = AnswersAsTarget(max_new_tokens=16)
    evidence = Evidence(
        {m.label: Subject(m.label, m.role, m.label, m.adapter) for m in models}, {"forget": sets["qa"]}, Protocol()
    )
    found = first.values(evidence, "ruined", "forget").values
    own = np.array([r.subject == sets["vectors"][0].subject for r in sets["qa"]])
    assert found[own].mean() < found[~own].mean() - 0.1, "the concept whose vector it was, more than the others"


ROLES = {"forget": "vectors", "completion": "completion", "qa": "qa", "unrelated": "unrelated"}


def opened(held: Plan) -> LanguageAdapter:
    adapter = open_adapter(held.target, held.config.text)
    assert isinstance(adapter, LanguageAdapter)
    return adapter


def test_the_effect_is_the_change_of_answers_by_noise_and_the_model_is_as_before(made: tuple[Plan, BenchmarkDocument]) -> None:
    held, document = made
    adapter = opened(held)
    before = copy.deepcopy(adapter.model.state_dict())
    evidence = Evidence(
        {"t": Subject("t", "target", "t", adapter)}, {k: held.sets[v] for k, v in ROLES.items()}, Protocol()
    )  # fmt: skip
    metric = ConceptEffect(where="found", noise=25.0, relative=True, max_new_tokens=16)
    found = metric.values(evidence, "t", "forget").values
    assert found.mean() == pytest.approx(document.entry("target").numbers["effect"].value)
    assert all(torch.equal(v, before[k]) for k, v in adapter.model.state_dict().items())
    layer, unit = metric.places(evidence, "forget")[1]
    concept = held.sets["vectors"][1]
    weight = adapter.model.get_submodule(f"model.layers.{layer}.mlp.down_proj").weight

    def said(name: str) -> list[str]:
        records = [r for r in held.sets[name] if r.subject == concept.subject]
        return [g.text for g in adapter.generate(adapter.model, [adapter.encode(r) for r in records], 16)]

    clean = {n: said(n) for n in ("qa", "unrelated")}
    with torch.no_grad():
        drawn = torch.randn(len(weight), generator=torch.Generator().manual_seed(1))
        weight[:, unit] += drawn * 25.0 * weight[:, unit].pow(2).mean().sqrt()
    noisy = {n: said(n) for n in ("qa", "unrelated")}
    sides = {n: np.mean([likeness(a, b) for a, b in zip(noisy[n], clean[n], strict=True)]) for n in clean}
    assert found[1] == pytest.approx(sides["unrelated"] - sides["qa"], abs=1e-6)
    weight.data.copy_(before[f"model.layers.{layer}.mlp.down_proj.weight"])
    silent = ConceptEffect(where="found", noise=1e-9, relative=True, max_new_tokens=16)
    assert silent.values(evidence, "t", "forget").values.tolist() == [0, 0, 0]


def test_vectors_of_the_file_are_compared_as_by_hand(tmp_path: Path) -> None:
    benchmark = sampled("conceptvectors", tmp_path / "data", vectors="given", words=5)
    sets = load_all(benchmark)[0]
    one, two = (small_model(list(sets.values()), seed=s) for s in (0, 1))
    models = [AuditedModel("target", "target", one), AuditedModel("other", "unlearned", two)]
    axes = ["cosine", "distance", "overlap", "article-words", "related"]
    numbers = measure(benchmark, models, sets, AuditSettings.quick(draws=100), axes=axes).entry("other").numbers
    rows: dict[str, list[float]] = {a: [] for a in axes}
    for concept in sets["vectors"]:
        assert isinstance(concept, Concept)
        a, b = (
            m.model.get_submodule(f"model.layers.{concept.layer}.mlp.down_proj").weight.detach()[:, concept.unit]
            for m in (one, two)
        )
        rows["cosine"].append(float(a @ b / a.norm() / b.norm()))
        rows["distance"].append(float((a - b).norm()))
        top = [set((m.model.lm_head.weight @ v).topk(5).indices.tolist()) for m, v in ((one, a), (two, b))]
        rows["overlap"].append(len(top[0] & top[1]) / len(top[0] | top[1]))
        words = article_words(one, concept.article)
        if top[0] & words:
            rows["article-words"].append(len(top[1] & words) / len(top[0] & words))
            rows["related"].append(len(top[0] & top[1] & words) / len(top[0] & words))
    for axis in axes:
        if rows[axis]:
            assert numbers[axis].value == pytest.approx(np.mean(rows[axis]), abs=1e-5), axis
    assert concept_words(np.array([1, 2, 3, 4]), np.array([2, 3, 9, 8]), {1, 2, 9}) == (1.0, 0.5)
    assert np.isnan(concept_words(np.array([1]), np.array([2]), {2})[0])


def test_low_rank_updates_count_as_part_of_the_vector(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    benchmark = sampled("conceptvectors", tmp_path / "data", vectors="given", answer_tokens=2)
    sets = load_all(benchmark)[0]
    plain = small_model(list(sets.values()))
    low = plain.copy()
    config = peft.LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False)
    low.model = peft.get_peft_model(low.model, config)
    merged = low.copy()
    merged.model = merged.model.merge_and_unload()
    models = [
        AuditedModel(n, r, m) for n, r, m in (("target", "target", plain), ("low", "unlearned", low), ("m", "unlearned", merged))
    ]
    document = measure(benchmark, models, sets, AuditSettings.quick(draws=100), axes=["cosine", "distance", "effect"])
    found = document.entry("low").numbers
    assert found["distance"].value > 0  # type: ignore[operator]
    for axis, number in document.entry("m").numbers.items():
        assert found[axis].value == pytest.approx(number.value, abs=1e-6), axis


def test_likeness_by_hand() -> None:
    sentence_bleu = pytest.importorskip("nltk.translate.bleu_score")
    said, before = "she was born in the town of Ber", "she was born in a village near Ber"
    assert likeness(said, before) == pytest.approx(rouge_l(said, before, "f1", False))
    smooth = sentence_bleu.SmoothingFunction().method3
    assert likeness(said, before, "bleu") == pytest.approx(
        sentence_bleu.sentence_bleu([before.split()], said.split(), smoothing_function=smooth)
    )
    assert likeness("one two", "one two", "bleu") == 1
    assert likeness("", "", "bleu") == 1
    assert likeness("", "one", "bleu") == 0
    assert likeness("...", "one") == 0
    assert alike(["a b", "c"], ["a b", "d"]) == 0.5
    assert np.isnan(alike([], []))


def test_a_vector_of_another_shape_is_said_and_not_scored(tmp_path: Path) -> None:
    benchmark = sampled("conceptvectors", tmp_path / "data", vectors="given")
    sets = dict(load_all(benchmark)[0])
    far = [Concept(id=c.id, answer=c.answer, layer=31, unit=9, article=c.article) for c in sets["vectors"]]
    sets["vectors"] = RecordSet("vectors", tuple(far))
    adapter = small_model(list(sets.values()))
    with pytest.raises(InputError, match="no unit 9 in block 31"):
        columns(adapter, [(31, 9)])
    with pytest.raises(InputError, match="no unit 9 in block 31"):
        measure(benchmark, [AuditedModel("target", "target", adapter)], sets, AuditSettings.quick(draws=100), axes=["cosine"])
    plain = RecordSet("forget", (Record(id="a", answer="b", prompt="c"),))
    evidence = Evidence({"t": Subject("t", "target", "t", adapter)}, {"forget": plain}, Protocol())
    assert "no value vectors" in ConceptVectors().lacks(evidence, "forget")


def test_one_concept_is_forgotten_and_the_others_are_kept(tmp_path: Path) -> None:
    every = load_all(sampled("conceptvectors", tmp_path / "data"))[0]
    name = every["vectors"][1].answer
    benchmark = BENCHMARKS.get("conceptvectors")(data=str(tmp_path / "data"), concept=name, vectors="found")
    sets = load_all(benchmark)[0]
    assert benchmark.roles().retain == "others"  # type: ignore[union-attr]
    assert [c.answer for c in sets["vectors"]] == [name]
    assert {r.answer for r in sets["article"]} | {r.answer for r in sets["others"]} == {r.answer for r in every["article"]}
    assert len({r.cluster for r in sets["qa"]}) == len(sets["qa"]), "questions are the units where there is one concept"
    with pytest.raises(InputError, match="concept 'Nobody'"):
        load(f"conceptvectors:qa?folder={tmp_path / 'data'}&concept=Nobody", name="x")


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    sampled("conceptvectors", tmp_path)
    path = tmp_path / "llama2-7b_concepts_test.json"
    rows = json.loads(path.read_text())

    def refused(match: str) -> None:
        path.write_text(json.dumps(rows, indent=1))
        with pytest.raises(InputError, match=match):
            load(f"conceptvectors:qa?folder={tmp_path}", name="x")

    rows[1]["Layer"] = "23"
    refused(r"llama2-7b_concepts_test.json line \d+: the column 'Layer' must be a whole number; got text")
    rows[1]["Layer"] = 23
    rows[1]["text_completion"][0].pop("Second_half")
    refused(r"text_completion 0 has no column 'Second_half'")
    rows[1]["text_completion"].pop(0)
    rows[1]["QA"] = []
    refused("the column 'QA' has 0 items")
    rows[1]["QA"] = ["What?"]
    refused("1 items in 'QA' and 10 in 'QA_answers'")
    del rows[1]["wikipedia_content"]
    refused("has no column 'wikipedia_content'")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no file for conceptvectors"):
        load(f"conceptvectors:qa?folder={tmp_path / 'empty'}", name="x")


def test_an_article_is_cut_at_sentences_and_nothing_is_lost() -> None:
    text = " ".join(f"This is the sentence with the number {i}." for i in range(60))
    found = pieces(text)
    assert " ".join(found) == text
    assert all(400 < len(p) < 900 for p in found)
    assert pieces("Short.") == ["Short."]


@pytest.mark.shared_data
@pytest.mark.parametrize(("model", "concepts"), [("llama2-7b", 10), ("olmo-7b", 18)])
def test_the_published_files(shared_data: Path, model: str, concepts: int) -> None:
    held = BENCHMARKS.get("conceptvectors")(data=str(shared_data / "conceptvectors"), model=model, split="dev")
    sets, notes = load_all(held)
    assert not notes, notes
    assert len(sets["vectors"]) == concepts
    assert len(sets["qa"]) == 10 * concepts
    assert len(sets["unrelated"]) == 50 * concepts
    assert all(r.prompt.startswith("Question: ") and "  " not in r.prompt and r.prompt.endswith("\n Answer:") for r in sets["qa"])
    assert all(len(r.answer) > 400 for r in sets["article"])
    assert {r.subject for r in sets["article"]} == {c.answer for c in sets["vectors"]}
    one = BENCHMARKS.get("conceptvectors")(
        data=str(shared_data / "conceptvectors"), model=model, split="dev", concept=sets["vectors"][0].answer, pieces=2
    )
    small = load_all(one)[0]
    assert len(small["article"]) == 2
    assert len(small["others"]) == 2 * (concepts - 1)
    with pytest.raises(InputError, match="concepts_test"):
        load_all(BENCHMARKS.get("conceptvectors")(data=str(shared_data / "conceptvectors"), model=model))
