"""RWKU: nine kinds that ask in nine ways, a forced beginning where it is published, echoes, fluency, and the published files."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build
from expunge.audit.metrics.fluency import ngram_entropy
from expunge.audit.metrics.rouge import rouge_l
from expunge.audit.metrics.short_answers import answer_score, echo_corrected_recall, stated
from expunge.audit.settings import AuditSettings
from expunge.benchmarks.measure import measure
from expunge.benchmarks.registry import BENCHMARKS
from expunge.benchmarks.run import load_all
from expunge.core.errors import InputError
from expunge.core.statistics import auc
from expunge.data.records import Record
from expunge.data.sets.rwku import KINDS, kind_of
from expunge.data.sources import load
from tests.adapters.test_tokenise import CHATML, bpe
from tests.benchmarks.world import sampled, untrained

QUICK = AuditSettings.quick(draws=100)


def test_nine_kinds_are_nine_rows_of_distinct_prompts(tmp_path: Path) -> None:
    benchmark = sampled("rwku", tmp_path / "data", chat=True)
    rows = [a for a in benchmark.axes() if a.name.startswith("aa-") and not a.name.endswith("echo-corrected")]
    assert len(rows) == 9 == len(KINDS)
    sets = load_all(benchmark)[0]
    prompts = {kind: {r.prompt for r in sets["forget_" + kind.replace("-", "_")]} for kind in KINDS}
    assert len(set().union(*prompts.values())) == sum(map(len, prompts.values()))
    assert {r.prompt for r in sets["forget_adversarial"]} == set().union(*prompts.values())
    assert {r.prompt for r in sets["forget_fill_in"]}.isdisjoint({r.prompt for r in sets["forget_qa"]})
    leads = {kind: {r.lead for r in sets["forget_" + kind.replace("-", "_")]} for kind in KINDS}
    assert leads.pop("affirmative-suffix") == {""}
    assert all(lead == {"Answer:"} for lead in leads.values())
    assert all("Question: Question" not in r.prompt for r in sets["forget_in_context_learning"])
    assert len(sets["forget_all"]) == sum(len(sets[f"forget_{n}"]) for n in ("fill_in", "qa", "adversarial"))


@pytest.mark.parametrize("chat", [True, False])
def test_the_lead_is_given_and_neither_learnt_nor_scored(chat: bool) -> None:
    tokenizer = bpe(["Answer: who Plato said so", "Question where"], bos=True)
    if chat:
        tokenizer.chat_template = CHATML
    adapter = LanguageAdapter(build("llama-tiny", tokenizer), tokenizer, template=None)
    record = Record(id="a", prompt="who said so", answer=" Plato", lead="Answer:")
    example = adapter.encode(record)
    given = tokenizer.decode(example.data.ids[: example.data.start].tolist())
    assert given.endswith("Answer:")
    assert tokenizer.decode(adapter.spoken(example)) == " Plato"
    whole = adapter.encode(Record(id="b", prompt="who said so", answer="Answer: Plato"))
    assert tokenizer.decode(example.data.ids.tolist()) == tokenizer.decode(whole.data.ids.tolist())
    other = adapter.encode(record, answer=" who")
    assert tokenizer.decode(adapter.spoken(other)) == " who"
    plain = Record(id="a", prompt="who said so", answer=" Plato")
    assert "lead" not in plain.content()
    assert record.content()["lead"] == "Answer:"


def test_an_echo_is_not_knowledge() -> None:
    prompt, gold = "Which was he: teacher, doctor or soldier?", "teacher"
    listed, named = "teacher, doctor or soldier", "teacher"
    assert rouge_l(listed, gold, "recall", False) == 1 == rouge_l(named, gold, "recall", False)
    assert echo_corrected_recall(named, gold, prompt) == 1
    assert echo_corrected_recall(listed, gold, prompt) == pytest.approx(2 / 5)
    hint = "Aristotle, a philosopher of Greece. Where was Aristotle born?"
    assert rouge_l(hint, "Stagira in Greece", "recall", False) == pytest.approx(1 / 3)
    assert echo_corrected_recall(hint, "Stagira in Greece", hint) == 0
    assert echo_corrected_recall("in Stagira", "Stagira in Greece", hint) == pytest.approx(1 / 2)
    assert echo_corrected_recall("", gold, prompt) == 0
    with pytest.raises(InputError):
        echo_corrected_recall("a", "?!", prompt)


def test_short_answers() -> None:
    assert answer_score("The Seven.", ("seven", "7")) == 1
    assert answer_score("seven dwarfs", ("seven", "7")) == pytest.approx(2 / 3)
    assert answer_score("seven dwarfs", ("seven", "7"), "exact") == 0
    assert answer_score("", ("seven",)) == 0
    assert answer_score("the", ("a",)) == 1  # both are empty without articles
    assert stated("We know it. So the answer is (B). Or not.", "the answer is") == "(B)"
    assert stated("Nothing of the kind", "the answer is") == "Nothing of the kind"


def test_fluency_of_one_word_again_and_again_is_nothing() -> None:
    assert ngram_entropy("the " * 60) == 0
    assert ngram_entropy(" ".join(f"word{i}" for i in range(60))) > 5


def test_membership_is_printed_as_published_and_as_auc(tmp_path: Path) -> None:
    benchmark = sampled("rwku", tmp_path / "data")
    sets, models = untrained(benchmark)
    axes = ["fm", "rm", "auc-loss", "auc-zlib", "auc-min-k", "auc-min-k-plus-plus"]
    numbers = measure(benchmark, models[:1], sets, QUICK, axes=axes).models[0].numbers
    adapter = models[0].adapter
    losses = {}
    for name in ("mia_forget", "mia_retain"):
        found = [
            adapter.forward(adapter.model, adapter.collate([adapter.encode(r)]), frozenset({"losses"})).losses for r in sets[name]
        ]
        losses[name] = np.array([float(f.detach().mean()) for f in found])
    assert numbers["fm"].value == pytest.approx(100 * losses["mia_forget"].mean(), rel=1e-5)
    assert numbers["rm"].value == pytest.approx(100 * losses["mia_retain"].mean(), rel=1e-5)
    assert numbers["auc-loss"].value == pytest.approx(auc(losses["mia_retain"], losses["mia_forget"]))


def test_a_person_is_chosen_by_name_and_a_wrong_type_is_named(tmp_path: Path) -> None:
    sampled("rwku", tmp_path)
    people = sorted(p.name for p in tmp_path.iterdir())
    one = load(f"rwku:forget-qa?folder={tmp_path}&target={people[1].partition('_')[2]}", name="x")
    assert {r.id.split("-")[0] for r in one} == {people[1]}
    assert load(f"rwku:forget-qa?folder={tmp_path}&targets=1", name="x").records == load(
        f"rwku:forget-qa?folder={tmp_path}&target={people[0]}", name="x"
    ).records  # fmt: skip
    with pytest.raises(InputError, match="RWKU person"):
        load(f"rwku:forget-qa?folder={tmp_path}&target=Nobody", name="x")
    path = tmp_path / people[0] / "forget_level3.json"
    rows = json.loads(path.read_text())
    rows[3]["type"] = "hypnosis"
    path.write_text(json.dumps(rows))
    with pytest.raises(InputError, match="the column 'type' is 'hypnosis'"):
        load(f"rwku:forget-all?folder={tmp_path}", name="x")
    del rows[2]["answer"]
    path.write_text(json.dumps(rows, indent=1))
    with pytest.raises(InputError, match=rf"{people[0]}/forget_level3.json line \d+ has no column 'answer'"):
        load(f"rwku:forget-all?folder={tmp_path}", name="x")


def test_published_types_are_told_whatever_their_spelling() -> None:
    assert kind_of("cross-lingual (French)") == kind_of("cross lingual") == "cross-lingual"
    assert kind_of("role play") == "role-play"
    assert kind_of("context hint") == "background-hint"
    assert kind_of("hypnosis") is None


@pytest.fixture(scope="module")
def published(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rwku")
    for name in ("rwku_probes_200_targets", "rwku_mia_200_targets", "rwku_full_3_targets"):
        with tarfile.open(shared_data / "rwku" / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return folder


@pytest.mark.shared_data
def test_every_published_probe_arrives(published: Path) -> None:
    rows = {"forget-fill-in": 3268, "forget-qa": 2879, "forget-adversarial": 6984, "forget-all": 13131, "neighbor-all": 11379}
    for part, count in rows.items():
        assert len(load(f"rwku:{part}?folder={published}", name="x")) == count
    kinds = {k: len(load(f"rwku:forget-{k}?folder={published}", name="x")) for k in KINDS}
    assert sum(kinds.values()) == 6984
    assert kinds["cross-lingual"] == 623 + 122 + 79 + 12 + 7 + 2 + 1 + 1
    assert len(load(f"rwku:mia-forget?folder={published}", name="x")) == 6198
    assert len(load(f"rwku:mia-retain?folder={published}", name="x")) == 7487


@pytest.mark.shared_data
@pytest.mark.parametrize("target", ["Aristotle", "Confucius", "Leonardo_da_Vinci"])
def test_a_whole_person_of_the_published_files(published: Path, target: str) -> None:
    sets, notes = load_all(BENCHMARKS.get("rwku")(data=str(published), target=target))
    assert not notes, notes
    prompts = [{r.prompt for r in sets["forget_" + k.replace("-", "_")]} for k in KINDS]
    assert len(set().union(*prompts)) == sum(map(len, prompts))
    assert {len(r.perturbed) for r in sets["general"]} == {3}
    assert all(r.prompt.count("\nAnswer: ") == 5 for r in sets["general"])
    assert all(r.perturbed for r in sets["truthfulness"])
    assert len(sets["corpus"]) == 582
