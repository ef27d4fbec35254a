"""The registry of prepared methods, and how one is found again by its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from expunge.core.errors import InputError
from expunge.core.registry import Registry, origin_of
from expunge.engine.members import Training
from expunge.engine.prepared import Prepared
from expunge.engine.record import Record

P = TypeVar("P", bound=Prepared)

PREPARED: Registry[type[Prepared]] = Registry("prepared method", "expunge.methods.prepared", "expunge.prepared")


def prepared(cls: type[P]) -> type[P]:
    """Class decorator: register a prepared method under its ``name``."""
    PREPARED.add(cls.name, cls, origin_of(cls.__module__))
    return cls


def stored(folder: Path) -> tuple[Prepared, Training | None]:
    """The method with its settings, and the training, that a folder was made with.

    Raises:
        InputError: it is no folder of a prepared method, or it is damaged.
    """
    plan = Record.open(Path(folder)).plan
    try:
        made = PREPARED.get(plan["method"])(**plan["settings"])
        return made, None if plan["training"] is None else Training(**plan["training"])
    except (KeyError, TypeError):
        raise InputError(f"The plan in {str(folder)!r} is damaged.", "Restore it from a copy, or train anew.") from None


def refuse_prepared(name: str) -> None:
    """Refuse a prepared method where a model that was trained in another way is to forget.

    Raises:
        InputError: the method is prepared.
    """
    if name in PREPARED:
        raise InputError(
            f"{name!r} takes rows out of what it has trained itself, not out of another model.",
            f"Train with it first: expunge train ENTRY --method {name} --out RUN.",
        )
