"""Fixtures for every floor."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; tests that ask for it are skipped where it is absent."""
    named = os.environ.get("EXPUNGE_SHARED_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set EXPUNGE_SHARED_DATA)")
    return folder
