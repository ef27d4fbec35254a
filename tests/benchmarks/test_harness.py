"""General ability by lm-evaluation-harness on a local model without a network: equal to our own scores of the same questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expunge.audit.evidence import Evidence, Protocol, Subject
from expunge.audit.metrics.choices import MultipleChoice, OptionAccuracy
from expunge.core.errors import InputError
from expunge.core.statistics import wilson
from expunge.data.sources import load
from tests.benchmarks.world import sampled, small_model

pytest.importorskip("lm_eval")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def test_letters_and_texts_are_scored_as_by_our_own_metrics(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from expunge.benchmarks.harness import general_ability

    sampled("mmlu", tmp_path / "mmlu")
    letters = f"mmlu:test?folder={tmp_path / 'mmlu'}&shots=1"
    texts = f"mmlu:test?folder={tmp_path / 'mmlu'}&shots=0&form=texts"
    sets = {"letters": load(letters, name="letters"), "texts": load(texts, name="texts")}
    adapter = small_model(list(sets.values()), context=512)
    held = Evidence({"m": Subject("m", "target", "", adapter)}, sets, Protocol())
    own = MultipleChoice().values(held, "m", "letters").values.mean()
    whole = OptionAccuracy(over="sum").values(held, "m", "texts").values.mean()
    found = general_ability(adapter, [letters, texts])
    assert found[f"{letters}.acc"].value == pytest.approx(own)
    assert found[f"{texts}.acc"].value == pytest.approx(whole)
    n = len(sets["letters"])
    exact = wilson(round(own * n), n)
    assert (found[f"{letters}.acc"].low, found[f"{letters}.acc"].high) == (exact.low, exact.high)
    assert f"{n} questions" in found[f"{letters}.acc"].note
    few = general_ability(adapter, [letters], limit=4)
    assert "4 questions" in few[f"{letters}.acc"].note
    assert not capfd.readouterr().out


def test_a_task_of_ones_own_from_a_folder(tmp_path: Path) -> None:
    from expunge.benchmarks.harness import general_ability

    rows = [{"q": f"Is {i} even?", "right": "yes" if i % 2 == 0 else "no"} for i in range(10)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "parity.yaml").write_text(
        f"task: parity\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: ['yes', 'no']\n"
        "doc_to_target: '{{right}}'\nmetric_list:\n  - metric: acc\nmetadata:\n  version: 1.0\n"
    )
    records = load([{"prompt": r["q"], "completion": " " + r["right"]} for r in rows], name="x")
    adapter = small_model([records, load([{"text": "yes no"}], name="y")], context=64)
    found = general_ability(adapter, ["parity"], include=tmp_path / "tasks")
    assert found["parity.acc"].value == pytest.approx(0.5)  # a model that does not look at the number says one word always
    with pytest.raises(InputError, match="No task"):
        general_ability(adapter, [])
    (tmp_path / "plain.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(InputError, match="no wrong answer"):
        general_ability(adapter, [str(tmp_path / "plain.jsonl")])


@pytest.mark.slow
def test_an_unknown_task_is_refused_before_anything_runs(tmp_path: Path) -> None:
    from expunge.benchmarks.harness import general_ability

    adapter = small_model([load([{"text": "yes no"}], name="y")], context=64)
    with pytest.raises(InputError, match="no task 'party'"):
        general_ability(adapter, ["party"])
