"""The registry of preparations."""

from __future__ import annotations

from typing import TypeVar

from expunge.core.registry import Registry, origin_of
from expunge.engine.preparation import Preparation

P = TypeVar("P", bound=Preparation)

PREPARATIONS: Registry[type[Preparation]] = Registry("preparation", "expunge.methods.preparations", "expunge.preparations")


def preparation(cls: type[P]) -> type[P]:
    """Class decorator: register a preparation under its ``name``."""
    PREPARATIONS.add(cls.name, cls, origin_of(cls.__module__))
    return cls
