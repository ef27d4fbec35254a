"""Multiple choice: letters in one pass equal a pass for each, closed forms, intervals, and hazardous text that stays unseen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from expunge.audit.evidence import Evidence, Protocol, Subject
from expunge.audit.metrics.choices import BELOW, MultipleChoice, OptionAccuracy, first_tokens
from expunge.audit.metrics.registry import METRICS
from expunge.audit.settings import AuditSettings
from expunge.audit.store import ScoreStore
from expunge.benchmarks.measure import measure
from expunge.benchmarks.registry import BENCHMARKS
from expunge.benchmarks.run import load_all
from expunge.core.errors import InputError
from expunge.core.statistics import wilson
from expunge.data.records import Record, RecordSet
from expunge.data.sources import load
from tests.benchmarks.world import sampled, small_model, untrained


def question(i: int, right: str = "B") -> Record:
    letters = tuple(f" {c}" for c in "ABCD" if c != right)
    return Record(
        id=f"q{i}", prompt=f"Which is number {i}?\nA. one\nB. two\nAnswer:", answer=f" {right}", perturbed=letters, verbatim=True
    )


def evidence(records: list[Record], name: str = "forget", store: ScoreStore | None = None) -> Evidence:
    held = RecordSet(name, tuple(records))
    adapter = small_model([held], context=128)
    return Evidence({"m": Subject("m", "target", adapter.fingerprint(), adapter)}, {name: held}, Protocol(batch_tokens=64), store)


def test_letters_in_one_pass_equal_the_next_token_scores_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [question(i, "ABCD"[i % 4]) for i in range(9)]
    records.append(Record(id="none", prompt="No options?", answer=" yes", verbatim=True))
    store = ScoreStore(tmp_path)
    held = evidence(records, store=store)
    found = first_tokens(held, "m", "forget")
    adapter = held.adapter("m")
    calls = 0
    blocks = type(adapter).logit_blocks

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return blocks(*args, **kwargs)

    for record, scores in zip(records, found, strict=True):
        if not record.perturbed:
            assert not len(scores)
            continue
        ids = adapter.tokenizer(record.prompt)["input_ids"]
        logits = adapter.model(torch.tensor([ids])).logits[0, -1].detach().double().log_softmax(-1)
        for letter, score in zip([record.answer, *record.perturbed], scores, strict=True):
            assert score == pytest.approx(float(logits[adapter.tokenizer.convert_tokens_to_ids(letter)]), abs=1e-4)
    monkeypatch.setattr(type(adapter), "logit_blocks", counted)
    again = evidence(records, store=store)
    again.subjects["m"] = held.subjects["m"]
    for a, b in zip(first_tokens(again, "m", "forget"), found, strict=True):
        assert np.array_equal(a, b)
    assert calls == 0, "a second look touched the model"
    batches = evidence(records)
    first_tokens(batches, "m", "forget")
    assert 0 < calls < 9, "one pass for several questions, not one for each letter"


def test_accuracy_interval_and_chance_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    held = evidence([question(i) for i in range(8)])
    rows = [np.array(s) for s in ([1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0.0], [2, 1, 1, 1])] * 2
    monkeypatch.setattr("expunge.audit.metrics.choices.first_tokens", lambda *_: rows)
    numbers = MultipleChoice().compute(held, "m")
    number = numbers["forget.multiple-choice"]
    exact = wilson(4, 8)
    assert (number.value, number.low, number.high) == (0.5, exact.low, exact.high)  # a tie is no right answer
    assert "4 of 8" in number.note
    assert "25.0 %" in number.note
    assert BELOW in number.note
    assert not number.flags
    shares = [np.exp(r[0]) / np.exp(r).sum() for r in rows]
    assert numbers["forget.multiple-choice.share"].value == pytest.approx(np.mean(shares))


def test_far_below_chance_is_flagged_on_what_is_to_be_forgotten_only(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [np.array([0.0, 1, 1, 1])] * 60
    monkeypatch.setattr("expunge.audit.metrics.choices.first_tokens", lambda *_: rows)
    numbers = MultipleChoice().compute(evidence([question(i) for i in range(60)]), "m")
    assert numbers["forget.multiple-choice"].flags == (BELOW,)
    kept = MultipleChoice().compute(evidence([question(i) for i in range(60)], "mmlu"), "m")
    assert not kept["mmlu.multiple-choice"].flags


def test_options_that_begin_alike_are_refused() -> None:
    record = Record(id="same", prompt="Who?", answer=" one two", perturbed=(" one three",), verbatim=True)
    with pytest.raises(InputError, match="begin with the same token"):
        first_tokens(evidence([record]), "m", "forget")


@pytest.mark.parametrize("over", ["sum", "mean"])
def test_full_texts_by_the_models_own_losses(over: str) -> None:
    texts = ["red", "red blue green", "green blue", "blue"]
    records = [
        Record(
            id=f"t{i}",
            prompt=f"Colour {i}:",
            answer=" " + texts[i % 4],
            perturbed=tuple(" " + t for t in texts if t != texts[i % 4]),
            verbatim=True,
        )
        for i in range(6)
    ]
    held = evidence(records)
    adapter = held.adapter("m")
    right = []
    for record in records:
        scores = []
        for option in (record.answer, *record.perturbed):
            example = adapter.encode(record, answer=option)
            losses = adapter.forward(adapter.model, adapter.collate([example]), frozenset({"losses"})).losses.detach()
            text = -losses[:-1].double()  # without the end token
            scores.append(float(text.sum() if over == "sum" else text.mean()))
        right.append(scores[0] > max(scores[1:]))
    found = OptionAccuracy(over=over).values(held, "m", "forget")
    assert found.values.tolist() == [float(r) for r in right]


def test_special_metrics_are_left_out_of_an_audit_that_names_none() -> None:
    special = {n for n, k in METRICS.items() if k.on_request}
    assert special >= {"multiple-choice", "option-accuracy", "echo-corrected-recall", "short-answer"}
    assert not special & {m.name for m in AuditSettings().chosen()}
    assert [m.name for m in AuditSettings(metrics=("multiple-choice",)).chosen()] == ["multiple-choice"]


def test_a_model_that_knows_the_letter_is_right(tmp_path: Path) -> None:
    """The head is set so that one letter always wins: accuracy is the share of questions with that letter."""
    benchmark = sampled("wmdp", tmp_path / "data")
    sets, models = untrained(benchmark)
    adapter = models[0].adapter
    embedding = adapter.model.get_input_embeddings().weight
    token = adapter.tokenizer.convert_tokens_to_ids(" C")
    with torch.no_grad():
        adapter.model.get_output_embeddings().weight.copy_(embedding * 0)
        adapter.model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(embedding)))
        adapter.model.lm_head.bias[token] = 5.0
    document = measure(benchmark, models[:1], sets, AuditSettings.quick(draws=100), axes=["bio-letters"])
    letters = [r.answer for r in sets["bio_letters"]]
    assert document.models[0].numbers["bio-letters"].value == pytest.approx(letters.count(" C") / len(letters))


def test_hazardous_corpora_are_neither_read_nor_shown_unasked(tmp_path: Path) -> None:
    benchmark = sampled("wmdp", tmp_path / "data")
    assert benchmark.roles() is None
    assert not any(s.hazardous for s in benchmark.sources().values())
    with pytest.raises(InputError, match="neither read nor fetched unasked"):
        load(f"wmdp:bio-forget-corpus?folder={tmp_path / 'data'}", name="x")
    asked = sampled("wmdp", tmp_path / "more", hazardous=True)
    sets, models = untrained(asked)
    assert asked.roles() is not None
    document = measure(asked, models, sets, AuditSettings.quick(draws=100, budget=4))
    text = document.model_dump_json()
    for name in ("bio_forget", "bio_retain"):
        assert document.data[name]["hazardous"]
        assert set(document.data[name]) == {"records", "clusters", "digest", "hazardous"}
        for record in sets[name]:
            assert record.answer[:30] not in text
            assert record.id.split("-")[1] not in record.answer
    broken = tmp_path / "more" / "bio-forget-corpus.jsonl"
    broken.write_text('{"text": "secret words"}\n{"text": 5}\n')
    with pytest.raises(InputError, match="line 2: the column 'text' must be text") as error:
        load(f"wmdp:bio-forget-corpus?folder={tmp_path / 'more'}&hazardous=true", name="x")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"question": "a?", "choices": ["1", "2", "3", "4"], "answer": 4}], "the column 'answer' is 4. It must be from 0 to 3"),
        ([{"question": "a?", "choices": ["1", "2", "3"], "answer": 0}], "line 1: the column 'choices' has 3 items. It must"),
        ([{"question": "a?", "chioces": ["1"], "answer": 0}], "line 1 has no column 'choices'"),
        ([{"question": "a?", "chioces": ["1"], "answer": 0}], "'chioces' looks like it: rename it to 'choices'"),
        ([{"question": "a?", "choices": "1234", "answer": 0}], "must be a list of texts; got text"),
        ([{"question": "a?", "choices": ["1", "2", "3", 4], "answer": 0}], "got a list that holds a number"),
        ([{"question": " ", "choices": ["1", "2", "3", "4"], "answer": 0}], "the column 'question' is empty"),
        ([{"question": "a?", "choices": ["1", "2", "3", "4"], "answer": "B"}], "must be a whole number; got text"),
        ([], "holds no row"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_by_file_line_and_column(tmp_path: Path, content: object, said: str) -> None:
    (tmp_path / "wmdp-bio.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        load(f"wmdp:bio?folder={tmp_path}", name="x")
    assert said in str(error.value)
    assert str(error.value).startswith("wmdp-bio.json")


def test_mmlu_of_both_layouts_and_its_wrong_rows(tmp_path: Path) -> None:
    sampled("mmlu", tmp_path)
    records = load(f"mmlu:test?folder={tmp_path}&shots=2", name="x")
    by_subject = {s: [r for r in records if r.subject == s] for s in {r.subject for r in records}}
    assert {len(v) for v in by_subject.values()} == {10}
    first = by_subject["geography"][0]
    assert first.prompt.startswith("The following are multiple choice questions (with answers) about geography.\n\n")
    assert first.prompt.count("\nAnswer: ") == 2
    assert first.prompt.endswith("\nAnswer:")
    assert {r.answer for r in records} == {" A", " B", " C", " D"}
    plain = load(f"mmlu:test?folder={tmp_path}&shots=0&form=texts", name="x")
    assert all(f"{c}. " not in plain[0].prompt for c in "ABCD")
    assert plain[0].answer.strip() in records[0].prompt
    path = tmp_path / "test" / "history_of_towns_test.csv"
    path.write_text(path.read_text() + "what?,1,2,3,4,E\n")
    with pytest.raises(
        InputError, match=r"history_of_towns_test.csv line 11: the column 'answer' is 'E'. It must be one of A, B, C, D"
    ):
        load(f"mmlu:test?folder={tmp_path}", name="x")


@pytest.mark.shared_data
def test_the_published_files(shared_data: Path) -> None:
    mmlu = load_all(BENCHMARKS.get("mmlu")(data=str(shared_data / "mmlu")))
    assert not mmlu[1]
    assert {n: len(s) for n, s in mmlu[0].items()} == {"letters": 14042, "texts": 14042}
    assert len({r.subject for r in mmlu[0]["letters"]}) == 57
    truthful, notes = load_all(BENCHMARKS.get("truthfulqa")(data=str(shared_data / "truthfulqa")))
    assert not notes
    assert all(r.perturbed and r.answer not in r.perturbed for r in truthful["mc1"])
