"""The registry of edits."""

from __future__ import annotations

from typing import TypeVar

from expunge.core.registry import Registry, origin_of
from expunge.engine.edit import Edit

E = TypeVar("E", bound=Edit)

EDITS: Registry[type[Edit]] = Registry("edit", "expunge.methods.edits", "expunge.edits")


def edit(cls: type[E]) -> type[E]:
    """Class decorator: register an edit under its ``name``."""
    EDITS.add(cls.name, cls, origin_of(cls.__module__))
    return cls
