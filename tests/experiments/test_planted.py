"""The experiment on planted unlearnings: how areas are counted, and all of it at its smallest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import planted


def test_areas_compare_planted_with_honest_models_over_all_targets() -> None:
    low, high = dict.fromkeys(planted.HONEST, 1.0), dict.fromkeys(planted.PLANTED, 2.0)
    rows = [{"own, norms": {**low, **high}}, {"own, norms": {**low, **high, "planted, no V": 0.0}}]
    found = planted.areas(rows)["own, norms"]
    assert found["planted, one"] == 1.0
    assert found["planted, no V"] == 0.5  # of its two models one is above all honest ones, one below
    assert found["all"] == pytest.approx(1 - 1 / (2 * len(planted.PLANTED)))


@pytest.mark.slow
def test_all_of_it_at_its_smallest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(planted, "RETRAINED", 1)
    monkeypatch.setattr(planted, "SEARCHED", ("npo", "planted, three"))
    given = ["--out", str(tmp_path), "--seeds", "0", "--steps", "2", "--epochs", "1", "--rounds", "0"]
    assert planted.main(given) == 0
    found = json.loads((tmp_path / "planted.json").read_text())
    row = found["search"]["0"]["planted, three"]
    assert row["trigger tokens"] == 3
    assert len(row["prefixes"]) == len(row["found of it"]) == 2
    assert row["tried"] == [161, 161]
    assert set(found["areas"]) == {"own, norms", "own, received", "target, norms", "target, received"}
    assert set(found["sinks"]["0"]["own, norms"]) == {*planted.HONEST, *planted.PLANTED, *planted.OWN}
    assert "planted, three" in capsys.readouterr().out
    states = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.pt")}
    assert planted.main(given) == 0  # nothing is trained again
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.pt")} == states
