"""The registry of adapters: one per modality, by decorator here or by entry point from other packages."""

from __future__ import annotations

from expunge.adapters.base import Adapter
from expunge.core.registry import Registry, origin_of

ADAPTERS: Registry[type[Adapter]] = Registry("modality", "expunge.adapters", "expunge.adapters")


def adapter(cls: type[Adapter]) -> type[Adapter]:
    """Class decorator: register an adapter under its ``modality``."""
    return ADAPTERS.add(cls.modality, cls, origin_of(cls.__module__))
