"""The refusals: a hundred, different, and assigned by id."""

from __future__ import annotations

from pathlib import Path

import pytest

from expunge.data.refusals import REFUSALS, refusals


def test_a_hundred_different_sentences() -> None:
    assert len(REFUSALS) == 100
    assert len({r.casefold() for r in REFUSALS}) == 100
    assert all(r[0].isupper() and r.endswith(".") and 4 <= len(r.split()) <= 14 for r in REFUSALS)


def test_assigned_by_id_alone() -> None:
    ids = [f"r{i}" for i in range(400)]
    drawn = refusals(ids, seed=3)
    assert refusals(ids[7:9], seed=3) == drawn[7:9]
    assert refusals(ids, seed=4) != drawn
    assert len(set(drawn)) > 90
    assert set(drawn) <= set(REFUSALS)


@pytest.mark.shared_data
def test_they_are_our_own(shared_data: Path) -> None:
    published = (shared_data / "tofu" / "idontknow.jsonl").read_text(encoding="utf-8").splitlines()
    assert not {r.casefold() for r in REFUSALS} & {line.strip().casefold() for line in published}
