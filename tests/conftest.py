"""Fixtures for every floor."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from expunge.adapters.language import LanguageAdapter
from expunge.data.sets.drawn import drawn_shapes
from tests.digits import Digits, accuracy
from tests.drawings import Drawings
from tests.world import World


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; tests that ask for it are skipped where it is absent."""
    named = os.environ.get("EXPUNGE_SHARED_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set EXPUNGE_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def trained_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which the session's models are kept; all workers share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "models"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def people_world(trained_models: Path) -> World:
    """A tiny Llama that knows 24 people, three of them to be forgotten; its target is checked to have learnt them."""
    held = World(trained_models)
    learnt = held.loss(held.target(), held.split.forget)
    assert learnt < 0.05, f"the target has not learnt the forget set: loss {learnt:.3f}"
    unseen = held.loss(held.retrained(), held.split.forget)
    assert unseen > 1.0, f"the retrained model knows the forget set: loss {unseen:.3f}"
    return held


@pytest.fixture(scope="session")
def people(people_world: World) -> World:
    """The people that guards hide."""
    return people_world


@pytest.fixture(scope="session")
def target_adapter(people: World) -> LanguageAdapter:
    """The target, shared by tests that leave it as it is."""
    return people.target()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a cache folder of its own."""
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def digits(trained_models: Path) -> Digits:
    """A small network that knows handwritten digits, class 3 of which is to be forgotten; checked to have learnt them."""
    held = Digits(trained_models)
    learnt = accuracy(held.target(), held.tables[0].rows())
    assert learnt > 0.98, f"the target has not learnt the digits: accuracy {learnt:.3f}"
    assert accuracy(held.retrained(), held.split()[0]) == 0, "the retrained network knows the class"
    return held


@pytest.fixture(scope="session")
def drawings(trained_models: Path) -> Drawings:
    """A tiny diffusion model that draws four shapes, crosses to be forgotten; model and judge are checked to know them."""
    held = Drawings(trained_models)
    unseen = drawn_shapes(50, seed=6)
    told = held.judge.score(unseen.inputs.reshape(len(unseen), -1), unseen.targets)
    assert told > 0.98, f"the judge cannot tell the shapes apart: {told:.3f}"
    drawn = held.judged(held.target()).diagonal()
    assert drawn.min() > 0.9, f"the target has not learnt to draw: {drawn}"
    return held
