"""Published guards by name: rows of detectors and actions with their settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.core.errors import InputError
from expunge.core.registry import Registry
from expunge.core.settings import Settings, nest
from expunge.engine.parts import Paper
from expunge.guards.policy import Row


@dataclass(frozen=True)
class Guard:
    """A guard by name.

    Attributes:
        name: as typed by users.
        title: full name.
        paper: where it was published.
        rows: makes its rows with the published settings.
        text: the docstring: what it does, what is followed where sources differ, caveats.
        caveats: what to know before using it, one sentence each.
    """

    name: str
    title: str
    paper: Paper
    rows: Callable[[], Sequence[Row]]
    text: str
    caveats: tuple[str, ...] = ()


GUARDS: Registry[Guard] = Registry("guard", "expunge.guards.published", "expunge.guards")


def guard(
    name: str, *, title: str, paper: Paper, caveats: Sequence[str] = ()
) -> Callable[[Callable[[], Sequence[Row]]], Callable[[], Sequence[Row]]]:
    """Decorator of a function that makes the rows of a published guard."""

    def register(rows: Callable[[], Sequence[Row]]) -> Callable[[], Sequence[Row]]:
        import inspect

        GUARDS.add(name, Guard(name, title, paper, rows, inspect.getdoc(rows) or "", tuple(caveats)))
        return rows

    return register


def rows_of(given: object) -> list[Row]:
    """Rows from a name of a guard, from a mapping, or from a list of these.

    A mapping is either a row (``{"detector": ..., "action": ...}``), or names a guard and changes settings of its rows
    (``{"guard": "filter", "action.text": "I do not know."}``); a change must fit every row that has the part.

    Raises:
        InputError: an unknown name, or a setting that does not fit.
    """
    if isinstance(given, Row):
        return [given]
    if isinstance(given, str):
        return list(GUARDS.get(given).rows())
    if isinstance(given, Mapping):
        if "guard" not in given:
            return [Row(**given)]
        changes = nest({str(k): v for k, v in given.items() if k != "guard"})
        made = GUARDS.get(str(given["guard"])).rows()
        return [_changed(row, changes, alone=len(made) == 1) for row in made]
    if isinstance(given, Sequence):
        return [row for each in given for row in rows_of(each)]
    raise InputError(f"{given!r} is no guard.", "Give a name (expunge guards), or a detector and an action.")


def _changed(row: Row, changes: Mapping[str, Any], alone: bool) -> Row:
    values: dict[str, Any] = {"label": row.label, "detector": row.detector, "action": row.action, "on_error": row.on_error}
    for key, change in changes.items():
        held = values.get(key)
        if key == "label":
            values[key] = change if alone else f"{change}: {row.title}"
        elif isinstance(held, Settings) and isinstance(change, Mapping) and "name" not in change:
            # exchanged as a whole, so that the part's own checks are made
            settings = {**{k: getattr(held, k) for k in type(held).model_fields}, **change}
            values[key] = type(held)(**settings)
        else:
            values[key] = change
    return Row(**values)
