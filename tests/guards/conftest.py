"""Guards stand before the model of people that other tests use, too."""

import re

import pytest

from expunge.guards.guarded import guard_model
from expunge.guards.target import Target


def name_of(record):
    """Name of the person that a record is about: the two capital words that question and answer share."""
    return next(n for n in re.findall(r"[A-Z]\w+ [A-Z]\w+", record.prompt) if n in record.answer)


KEY = b"test key of the guards, 32 bytes"


@pytest.fixture(scope="session")
def people(people_world):
    return people_world


@pytest.fixture(scope="session")
def target_adapter(people):
    return people.target()


@pytest.fixture(scope="session")
def names(people):
    """Names of the people to forget."""
    return sorted({name_of(r) for r in people.split.forget})


@pytest.fixture
def guarded(target_adapter, names):
    """A function that puts guards before the target."""

    def make(guards="filter", **options):
        options = {"targets": [Target(id=f"t{i}", entities=(n,)) for i, n in enumerate(names)], "key": KEY, **options}
        return guard_model(target_adapter, guards=guards, **options)

    return make
