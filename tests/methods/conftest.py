"""Fixtures for methods: small worlds that the language methods' own checks share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.methods.planted import Planted, facts


@pytest.fixture(scope="session")
def planted(trained_models: Path) -> Planted:
    """A tiny Llama that looks names up in its first block, and has no other way; checked to have learnt its facts."""
    held = Planted(trained_models)
    learnt = held.loss(held.target(), [r for n in held.names for r in facts(n)])
    assert learnt < 0.05, f"the planted model has not learnt its facts: loss {learnt:.3f}"
    return held


@pytest.fixture(scope="session")
def qa(trained_models: Path):
    """People, facts at random and a tiny Llama that knows them; it says the same refusal to all strangers."""
    from small_qa import SmallQA

    return SmallQA(trained_models)
