"""The registry of controls."""

from __future__ import annotations

from typing import TypeVar

from expunge.core.registry import Registry, origin_of
from expunge.engine.control import Control

C = TypeVar("C", bound=Control)

CONTROLS: Registry[type[Control]] = Registry("control", "expunge.methods.controls", "expunge.controls")


def control(cls: type[C]) -> type[C]:
    """Class decorator: register a control under its ``name``."""
    CONTROLS.add(cls.name, cls, origin_of(cls.__module__))
    return cls
