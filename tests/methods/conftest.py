"""The small world of questions that the language methods' own checks share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def qa(trained_models: Path):
    """People, facts at random and a tiny Llama that knows them; it says the same refusal to all strangers."""
    from small_qa import SmallQA

    return SmallQA(trained_models)
