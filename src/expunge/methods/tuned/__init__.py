"""Settings that sweeps found, shipped by name: for models of a size, beside the published values, which stay the defaults.

A set is a folder here, written by an experiment: ``settings.yaml`` says where the settings come from and holds what was searched
of each method, ``used.json`` lists the records that the choice rests on (content keys, no texts): an audit leaves them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from expunge.core.errors import InputError, unknown
from expunge.core.settings import load_yaml

SETTINGS = "settings.yaml"


class Chosen(BaseModel):
    """What a sweep chose for one method."""

    model_config = ConfigDict(extra="forbid")

    trial: int  #: 0 is the method's own setting
    distance: float  #: of the trial's forgetting on validation records: 0 as unseen ones, 1 as the target
    lost: float  #: share of the usefulness that it lost
    own_distance: float | None = None  #: of the method's own setting; None if it gave no result
    own_lost: float | None = None
    parts: dict[str, Any] = Field(default_factory=dict)  #: what was searched, with the values of the trial


class Shipped(BaseModel):
    """One set of settings."""

    model_config = ConfigDict(extra="forbid")

    title: str
    origin: dict[str, Any]  #: data, model, budget, rule, seed, versions
    methods: dict[str, Chosen]


def folder(name: str) -> Path:
    """Where a set lies.

    Raises:
        InputError: there is no such set.
    """
    if name not in names():
        raise unknown("set of settings", name, names())
    return Path(__file__).parent / name


def names() -> list[str]:
    """The sets that are shipped."""
    return sorted(p.parent.name for p in Path(__file__).parent.glob(f"*/{SETTINGS}"))


def shipped(name: str) -> Shipped:
    """A set of settings.

    Raises:
        InputError: there is no such set.
    """
    return Shipped(**load_yaml((folder(name) / SETTINGS).read_text(encoding="utf-8")))


def chosen(name: str, method: str) -> Chosen:
    """What a set holds for a method.

    Raises:
        InputError: there is no such set, or it holds nothing for the method.
    """
    held = shipped(name).methods
    if method not in held:
        raise InputError(
            f"The settings {name!r} hold nothing for the method {method!r}: no sweep has chosen any.",
            f"Leave --settings out, which takes its published values. They hold {', '.join(held)}.",
        )
    return held[method]


def beneath(parts: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Parts with the user's own on top: single values win; a slot that is given another part by name is the user's alone."""
    out: dict[str, Any] = {**parts}
    for slot, value in given.items():
        held = out.get(slot)
        changes = isinstance(value, Mapping) and "name" not in value and isinstance(held, Mapping)
        out[slot] = beneath(held, value) if changes else value  # type: ignore[arg-type]
    return out
