"""From names and settings to a recipe: the one parser behind Python, YAML and the command line.

Overrides are nested mappings, as :func:`expunge.core.settings.parse_overrides` makes them from ``key=value`` words::

    build("npo", {"beta": 0.2})                                    # the only field called beta
    build("npo", {"retain": {"name": "kl", "weight": 2}})          # another retain term
    build("npo", {"retain": "none", "gradient": "plain"})
    build("npo", {"schedule": {"name": "paper", "epochs": 5}})     # the published schedule, shortened
    build("custom", {"forget": ["npo", "alternative-nll"], "retain": "kl", "parameters": {"name": "lora", "rank": 16}})
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from expunge.core.errors import InputError, unknown
from expunge.core.registry import Registry
from expunge.core.settings import Settings, nest
from expunge.engine.balance import BALANCES
from expunge.engine.finish import FINISHES
from expunge.engine.gradient import GRADIENTS
from expunge.engine.parameters import PARAMETERS
from expunge.engine.parts import Recipe
from expunge.engine.penalty import PENALTIES
from expunge.engine.schedule import SCHEDULES
from expunge.methods.check import check
from expunge.methods.compose import compose
from expunge.methods.controls.registry import CONTROLS
from expunge.methods.preparations.registry import PREPARATIONS
from expunge.methods.registry import METHODS, TERMS, Method

Spec = dict[str, Any]

TERM_SLOTS = ("forget", "retain")
PART_SLOTS: dict[str, Registry[Any]] = {
    "preparation": PREPARATIONS,
    "parameters": PARAMETERS,
    "gradient": GRADIENTS,
    "balance": BALANCES,
    "schedule": SCHEDULES,
    "control": CONTROLS,
    "penalty": PENALTIES,
    "finish": FINISHES,
}
OPTIONAL_SLOTS = ("preparation", "control", "penalty", "finish")
CHOICE_SLOTS = ("reference", "start")
SLOTS = (*TERM_SLOTS, *PART_SLOTS, *CHOICE_SLOTS)


def build(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a method, with overrides; ``custom`` starts from nothing but the defaults of the parts.

    A key is a slot (``forget``, ``retain``, ``preparation``, ``parameters``, ``gradient``, ``balance``, ``schedule``,
    ``control``, ``penalty``, ``finish``, ``reference``, ``start``) or the name of a field that one part of the recipe has. A slot
    takes the name of a part, a mapping (with a ``name``: that part; without: changes the part that is there), ``none``, and for
    terms a list of these. Dotted keys nest.

    Raises:
        InputError: an unknown or ambiguous key, a value out of range, or parts that do not work together.
    """
    method = None if name == "custom" else METHODS.get(name)
    spec = (method.build() if method else compose()).spec()
    given: Spec = nest(copy.deepcopy(dict(overrides or {})))
    _publish(spec, given, name, method)
    for slot in [s for s in SLOTS if s in given]:
        _set_slot(spec, slot, given.pop(slot))
    for key, value in given.items():
        _set_field(spec, key, value, name, method.together if method else ())
    return from_spec(spec)


def from_spec(spec: Mapping[str, Any]) -> Recipe:
    """Rebuild a recipe from :meth:`expunge.engine.parts.Recipe.spec`; slots that are missing get their defaults.

    Raises:
        InputError: an unknown key, name or value, or parts that do not work together.
    """
    for key in spec:
        if key not in Recipe.model_fields:
            raise unknown("part of a recipe", str(key), Recipe.model_fields)
    values: dict[str, Any] = {k: spec[k] for k in ("name", *CHOICE_SLOTS) if k in spec}
    for slot in TERM_SLOTS:
        values[slot] = tuple(make(TERMS, slot, item) for item in spec.get(slot) or ())
    default = compose()
    for slot, registry in PART_SLOTS.items():
        held = spec.get(slot, getattr(default, slot))
        values[slot] = held if held is None or isinstance(held, Settings) else make(registry, slot, held)
    recipe = Recipe(**values)
    check(recipe)
    return recipe


def make(registry: Registry[Any], slot: str, item: Any) -> Any:
    """The part that a name, or a mapping with a ``name``, stands for."""
    if isinstance(item, str):
        item = {"name": item}
    if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
        raise InputError(f"{slot} must be given by name; got {item!r}.", f"For example {slot}={registry.names()[0]}.")
    fields = {str(k): v for k, v in item.items() if k != "name"}
    return registry.get(item["name"])(**fields)


def _publish(spec: Spec, given: Spec, name: str, method: Method | None) -> None:
    """Put the published setting in place if ``schedule=paper`` asks for it; what else is said of the schedule stays given."""
    asked = given.get("schedule")
    if asked != "paper" and not (isinstance(asked, Mapping) and asked.get("name") == "paper"):
        return
    if method is None:
        raise InputError(
            f"{name!r} has no published schedule.", "Use schedule=adaptive, or schedule=fixed with schedule.lr=VALUE."
        )
    published = method.published
    spec["schedule"] = {"name": published.name, **published.model_dump(mode="json")}
    rest = {k: v for k, v in asked.items() if k != "name"} if isinstance(asked, Mapping) else {}
    given.pop("schedule")
    if rest:
        given["schedule"] = rest
    for slot, value in method.with_paper.items():
        _set_slot(spec, slot, copy.deepcopy(value))


def _set_slot(spec: Spec, slot: str, value: Any) -> None:
    if slot in TERM_SLOTS:
        spec[slot] = _terms(slot, spec[slot], value)
    elif slot in CHOICE_SLOTS:
        choices = get_args(Recipe.model_fields[slot].annotation)
        if not isinstance(value, str) or value not in choices:
            raise unknown(f"choice of {slot}", str(value), choices)
        spec[slot] = value
    else:
        spec[slot] = _part(slot, spec[slot], value)


def _is_none(value: Any) -> bool:
    return value is None or value == "none" or (isinstance(value, Mapping) and value.get("name") == "none")


def _part(slot: str, held: Spec | None, value: Any) -> Spec | None:
    if _is_none(value):
        if slot not in OPTIONAL_SLOTS:
            raise InputError(f"{slot} cannot be none.", f"Known: {', '.join(PART_SLOTS[slot].names())}.")
        return None
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise InputError(f"{slot} must be the name of a part or a mapping; got {value!r}.")
    if "name" in value and (held is None or value["name"] != held["name"]):
        return dict(value)
    if held is None:
        raise InputError(f"There is no {slot} to change.", f"Name one: {slot}={PART_SLOTS[slot].names()[0]}.")
    return {**held, **value}


def _terms(slot: str, held: list[Spec], value: Any) -> list[Spec]:
    if _is_none(value):
        return []
    if isinstance(value, Mapping) and isinstance(value.get("name"), (list, tuple)):
        # "retain=[nll,kl] retain.kl.weight=2": the list first, then what is said of its members
        rest = {k: v for k, v in value.items() if k != "name"}
        return _change_terms(slot, _terms(slot, held, value["name"]), rest)
    if isinstance(value, str) or (isinstance(value, Mapping) and "name" in value):
        return [_term(slot, held, value)]
    if isinstance(value, Mapping):
        return _change_terms(slot, held, value)
    if isinstance(value, (list, tuple)):
        return [_term(slot, held, item) for item in value]
    raise InputError(f"{slot} must be the name of a term, a mapping or a list of these; got {value!r}.")


def _term(slot: str, held: list[Spec], item: Any) -> Spec:
    """A term by name; one that is there already keeps the settings that are not given anew."""
    if isinstance(item, str):
        item = {"name": item}
    if not isinstance(item, Mapping) or "name" not in item:
        raise InputError(f"Each {slot} term needs a name; got {item!r}.", "Write a name, or {name: NAME, weight: NUMBER}.")
    same = [t for t in held if t["name"] == item["name"]]
    return {**(same[0] if len(same) == 1 else {}), **item}


def _change_terms(slot: str, held: list[Spec], value: Mapping[str, Any]) -> list[Spec]:
    out = [dict(t) for t in held]
    for key, setting in value.items():
        named = [t for t in out if t["name"] == key]
        if len(named) == 1 and isinstance(setting, Mapping):
            named[0].update(setting)
        elif len(out) == 1:
            out[0][key] = setting
        elif not out:
            example = "nll" if slot == "retain" else "npo"
            raise InputError(f"There is no {slot} term whose {key!r} could be set.", f"Name one: {slot}={example}.")
        else:
            ways = " or ".join(f"{slot}.{t['name']}.{key}" for t in out)
            raise InputError(f"There are several {slot} terms.", f"Say which one: {ways}.")
    return out


@dataclass(frozen=True)
class Place:
    """Where a part stands in a spec."""

    path: str
    cls: type[Settings]
    values: Spec


def places(spec: Spec) -> Iterator[Place]:
    """The parts of a spec; several terms of one side go by their names."""
    for slot in TERM_SLOTS:
        for item in spec[slot]:
            path = slot if len(spec[slot]) == 1 else f"{slot}.{item['name']}"
            yield Place(path, TERMS.get(item["name"]), item)
    for slot, registry in PART_SLOTS.items():
        if spec[slot] is not None:
            yield Place(slot, registry.get(spec[slot]["name"]), spec[slot])


def _set_field(spec: Spec, key: str, value: Any, name: str, together: tuple[str, ...]) -> None:
    held = list(places(spec))
    having = [p for p in held if key in p.cls.model_fields]
    if not having:
        raise _no_field(key, name, held)
    if len(having) > 1 and key not in together:
        ways = " or ".join(f"{p.path}.{key}" for p in having)
        raise InputError(f"Several parts of {name} have a parameter {key!r}.", f"Say which one: {ways}.")
    for place in having:
        place.values[key] = value


def _no_field(key: str, name: str, held: list[Place]) -> InputError:
    elsewhere = [f"{slot}={n}" for slot, r in PART_SLOTS.items() for n, cls in r.items() if key in cls.model_fields]
    elsewhere += [n for n, cls in TERMS.items() if key in cls.model_fields]
    if elsewhere:
        some = " or ".join(elsewhere[:3])
        return InputError(f"No part of this {name} has a parameter {key!r}.", f"It belongs to {some}.")
    return unknown(f"{name} parameter", key, [*SLOTS, *(f for p in held for f in p.cls.model_fields)])
