"""TOFU's protocol: which items, which mean, and numbers equal to those of the formulas worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from expunge.adapters.language import LanguageAdapter
from expunge.audit.run import AuditedModel
from expunge.audit.settings import AuditSettings
from expunge.benchmarks.measure import measure
from expunge.benchmarks.registry import BENCHMARKS
from expunge.benchmarks.run import load_all
from expunge.data.records import Record
from tests.benchmarks.world import sampled, untrained


def nll(adapter: LanguageAdapter, record: Record, answer: str | None = None) -> float:
    """Mean loss of an answer with its end token, by the model's own forward pass."""
    example = adapter.encode(record, answer=answer)
    losses = adapter.forward(adapter.model, adapter.collate([example]), frozenset({"losses"})).losses
    return float(losses.detach().mean())


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_utility_is_the_harmonic_mean_of_nine_by_hand(tmp_path: Path, mean: str) -> None:
    benchmark = sampled("tofu", tmp_path / "data", split="forget01", mean=mean, max_new_tokens=4)
    sets, models = untrained(benchmark)
    names = {"retain": "retain_scored", "real_authors": "real_authors", "world_facts": "world_facts"}
    sets = {n: type(s)(s.name, s.records[:6], s.source) for n, s in sets.items()}
    document = measure(benchmark, models[:1], sets, AuditSettings.quick(draws=100))
    numbers, adapter = document.models[0].numbers, models[0].adapter
    assert isinstance(adapter, LanguageAdapter)
    found = []
    for role, name in names.items():
        key = role.replace("_", "-")
        probability, score = [], []
        for r in sets[name]:
            own, wrong = nll(adapter, r), np.array([nll(adapter, r, w) for w in r.perturbed])
            right = nll(adapter, r, r.paraphrase) if role == "retain" else own
            share = np.exp(-own) / (np.exp(-own) + np.exp(-wrong).sum())
            probability.append(np.exp(-own) if role == "retain" else share)
            ratio = np.exp(right - wrong.mean()) if mean == "geometric" else np.exp(-wrong).mean() / np.exp(-right)
            score.append(max(0.0, 1 - ratio))
        assert numbers[f"{key}-probability"].value == pytest.approx(np.mean(probability), rel=1e-4)
        assert numbers[f"{key}-truth-ratio"].value == pytest.approx(np.mean(score), rel=1e-3)
        found += [np.mean(probability), numbers[f"{key}-rouge"].value or 0.0, np.mean(score)]
    expected = 0.0 if min(found) == 0 else len(found) / sum(1 / f for f in found)
    assert numbers["model-utility"].value == pytest.approx(expected, rel=1e-3)


def test_the_reference_against_itself_and_collapse(tmp_path: Path) -> None:
    """FQ of a model with the retrained model's weights is 1; numbers of other splits and means are told apart by the options."""
    benchmark = sampled("tofu", tmp_path / "data", split="forget05")
    sets, models = untrained(benchmark)
    twin = AuditedModel("twin", "unlearned", models[1].adapter)
    axes = ["forget-quality", "ks-distance"]
    document = measure(benchmark, [models[1], models[2]], sets, AuditSettings.quick(draws=100), axes=axes)
    assert (document.entry("unlearned").numbers["ks-distance"].value or 0) > 0
    # a model of the very weights of the only reference has no other one to be compared with: that is said, not scored
    same = measure(benchmark, [models[1], twin], sets, AuditSettings.quick(draws=100), axes=axes)
    assert not same.entry("twin").numbers
    assert any("forget quality" in s.lower() for s in same.not_measured)
    assert document.options["split"] == "forget05"


@pytest.mark.shared_data
@pytest.mark.parametrize("split", ["forget01", "forget05", "forget10"])
@pytest.mark.parametrize("items", [300, 400])
def test_every_split_of_the_published_files(shared_data: Path, split: str, items: int) -> None:
    benchmark = BENCHMARKS.get("tofu")(data=str(shared_data / "tofu"), split=split, items=items)
    sets, notes = load_all(benchmark)
    assert not notes, notes
    rows = {"forget01": 40, "forget05": 200, "forget10": 400}[split]
    assert len(sets["forget"]) == rows
    assert len(sets["retain"]) == 4000 - rows
    assert len(sets["holdout"]) == rows
    assert len(sets["forget_scored"]) == min(rows, items)
    assert len(sets["retain_scored"]) == items
    assert sets["forget_scored"][0].prompt == sets["forget"][0].prompt
    assert len(sets["real_authors"]) == 100
    assert len(sets["world_facts"]) == 117
    assert not {r.prompt for r in sets["holdout"]} & {r.prompt for r in sets["full"]}
    assert {(r.prompt, r.answer) for r in sets["forget"]} | {(r.prompt, r.answer) for r in sets["retain"]} == {
        (r.prompt, r.answer) for r in sets["full"]
    }


@pytest.mark.shared_data
def test_a_file_of_another_size_is_noticed(shared_data: Path, tmp_path: Path) -> None:
    for path in (shared_data / "tofu").glob("*.json"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "forget10.json").unlink()
    lines = (shared_data / "tofu" / "forget10.json").read_text().splitlines()
    (tmp_path / "forget10.json").write_text("\n".join(lines[:-1]))
    from expunge.core.errors import InputError

    with pytest.raises(InputError, match="399 rows"):
        load_all(BENCHMARKS.get("tofu")(data=str(tmp_path)))
