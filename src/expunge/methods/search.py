"""What there is to search about a method: the ranges that its parts declare, and those that a user gives."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from expunge.core.errors import InputError, unknown
from expunge.core.search import Range, searched
from expunge.core.settings import Settings, describe_value, nest
from expunge.methods.edits.registry import EDITS
from expunge.methods.recipe import TERM_SLOTS, Place, build, places
from expunge.methods.registry import METHODS


@dataclass(frozen=True)
class Dimension:
    """One parameter that is searched.

    Attributes:
        path: how it is written as ``path=value`` (``forget.beta``, ``schedule.lr``).
        range: its values.
        default: its value in the method's own setting.
    """

    path: str
    range: Range
    default: Any

    def text(self) -> str:
        """One line for people."""
        return f"{self.path}={self.range.text()} (own value: {describe_value(self.default)})"


@dataclass(frozen=True)
class _Field:
    """A parameter that can be set."""

    path: str
    bare: str
    part: type[Settings]
    value: Any


def space(method: str, parts: Mapping[str, Any], given: Mapping[str, str], *, declared: bool = True) -> tuple[Dimension, ...]:
    """The parameters of a method that are searched, those that a user gives first.

    A parameter that ``parts`` fix is not searched. Of the weights only ratios matter, so the first forget term keeps its own.

    Args:
        method: name of a method or an edit, or ``custom``.
        parts: what differs from the method's own parts, in every trial.
        given: ranges by parameter as users write them; they replace what is declared.
        declared: search what the parts declare too.

    Raises:
        InputError: an unknown or ambiguous parameter, an empty range, values that the parameter does not allow, or nothing to
            search.
    """
    fields, together = _fields(method, parts)
    found = [_given(method, parts, key, text) for key, text in given.items()]
    named = {d.path for d in found}
    fixed = set(_leaves(nest(dict(parts))))
    for d in found:
        if d.path in fixed or (d.path.rpartition(".")[2] in fixed):
            raise InputError(f"The parameter {d.path!r} is given and searched.", "Leave one of them out.")
    for field in fields if declared else ():
        asked = searched(field.part.model_fields[field.bare])
        path = field.bare if field.bare in together else field.path
        if asked is None or path in named or field.bare in named or {field.path, field.bare} & fixed:
            continue
        if field.bare == "weight" and _only_ratio(field, fields):
            continue
        if asked.unless and any(o.value is not None for o in fields if o.path == _beside(field, asked.unless)):
            continue
        made = asked.range(field.value, whole=_whole(field))
        if made is not None:
            found.append(Dimension(path, made, field.value))
            named.add(path)
    if not found:
        some = ", ".join(dict.fromkeys(f.path for f in fields if not f.bare.startswith("layer")))
        raise InputError(
            f"The method {method!r} has nothing to search" + (": its parts declare no ranges." if declared else "."),
            f"Name a parameter and its range, such as --search KEY=LOW..HIGH; it has {some}." if some else "Leave it out.",
        )
    return tuple(found)


def known(method: str, parts: Mapping[str, Any], key: str) -> bool:
    """Whether a method has the parameter that ``key`` names."""
    fields, _ = _fields(method, parts)
    return any(key in (f.path, f.bare) for f in fields)


def paths(method: str, parts: Mapping[str, Any]) -> list[str]:
    """All parameters of a method."""
    return [f.path for f in _fields(method, parts)[0]]


def with_values(parts: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``parts`` with the values of a trial put in, by path."""
    out: dict[str, Any] = nest(copy.deepcopy(dict(parts)))
    for path, value in values.items():
        _put(out, path.split("."), value)
    return out


def _put(at: dict[str, Any], keys: list[str], value: Any) -> None:
    first, *rest = keys
    if not rest:
        at[first] = value
        return
    below = at.get(first, {})
    if isinstance(below, str):
        below = {"name": below}
    if isinstance(below, (list, tuple)):  # terms by name
        items = [{"name": i} if isinstance(i, str) else dict(i) for i in below]
        at[first] = items
        named = [i for i in items if i["name"] == rest[0]] if len(rest) > 1 else items
        _put(named[0], rest[1:] if len(rest) > 1 else rest, value)
        return
    at[first] = below
    _put(below, rest, value)


def _fields(method: str, parts: Mapping[str, Any]) -> tuple[list[_Field], tuple[str, ...]]:
    if method in EDITS.names():
        edit = EDITS.get(method)(**nest(copy.deepcopy(dict(parts))))
        values = edit.model_dump(mode="json")
        return [_Field(name, name, type(edit), values[name]) for name in type(edit).model_fields], ()
    spec = build(method, parts).spec()
    together = METHODS.get(method).together if method != "custom" else ()
    held = list(places(spec))
    twice = {p.path for p in held if sum(o.path == p.path for o in held) > 1}
    return [f for p in held if p.path not in twice for f in _of(p)], together


def _of(place: Place) -> Iterator[_Field]:
    for name in place.cls.model_fields:
        yield _Field(f"{place.path}.{name}", name, place.cls, place.values.get(name))


def _given(method: str, parts: Mapping[str, Any], key: str, text: str) -> Dimension:
    fields, together = _fields(method, parts)
    having = [f for f in fields if f.path == key] or [f for f in fields if f.bare == key]
    if not having:
        raise unknown(f"{method} parameter", key, {n for f in fields for n in (f.path, f.bare)})
    if len(having) > 1 and key not in together:
        ways = " or ".join(f.path for f in having)
        raise InputError(f"Several parts of {method} have a parameter {key!r}.", f"Say which one: {ways}.")
    field = having[0]
    made = Range.parse(key, text, whole=_whole(field))
    path = key if key in together else field.path
    for value in made.ends():  # what is not allowed is said before anything starts, in the parameter's own words
        tried = with_values(parts, {path: value})
        if method in EDITS.names():
            EDITS.get(method)(**tried)
        else:
            build(method, tried)
    return Dimension(path, made, field.value)


def _whole(field: _Field) -> bool:
    annotation = field.part.model_fields[field.bare].annotation
    kinds = get_args(annotation) or (annotation,)
    return int in kinds and float not in kinds


def _beside(field: _Field, name: str) -> str:
    return field.path.removesuffix(field.bare) + name


def _only_ratio(field: _Field, fields: list[_Field]) -> bool:
    weights = [f for f in fields if f.bare == "weight" and f.path.partition(".")[0] in TERM_SLOTS]
    return bool(weights) and field == weights[0]


def _leaves(given: Any, path: str = "") -> Iterator[str]:
    """The parameters that nested overrides set, by every path that may name them."""
    if isinstance(given, Mapping):
        for key, value in given.items():
            if key != "name":
                yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(given, (list, tuple)) and any(isinstance(i, Mapping) for i in given):
        for item in given:
            if isinstance(item, Mapping):
                name = f"{path}.{item.get('name')}"
                yield from (p for at in (path, name) for p in _leaves(item, at))
    else:
        yield path
