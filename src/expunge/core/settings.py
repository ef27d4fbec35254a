"""Typed settings: one definition serves Python, YAML and the command line.

A part (a loss term, a schedule, a metric...) is a :class:`Settings` subclass: its fields are its parameters, with ranges
declared by :func:`pydantic.Field`. Wrong input becomes an :class:`~expunge.core.errors.InputError` that names the
parameter, its owner, what is allowed and what was given.
"""

from __future__ import annotations

import enum
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from expunge.core.errors import InputError, unknown

S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """Base of everything that can be configured: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, arbitrary_types_allowed=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(type(self), error) from None

    @classmethod
    def declared(cls) -> list[Parameter]:
        """The declared parameters, in order of declaration."""
        return [describe(name, info) for name, info in cls.model_fields.items()]


@dataclass(frozen=True)
class Parameter:
    """A declared parameter: what ``expunge methods NAME`` and the docs print."""

    name: str
    type: str
    allowed: str
    default: str
    text: str


def describe(name: str, info: FieldInfo) -> Parameter:
    """Render one field's type, range and default for people."""
    default = "required" if info.is_required() else describe_value(info.get_default(call_default_factory=True, validated_data={}))
    return Parameter(name, _type_name(info.annotation), _allowed(info), default, info.description or "")


def explain(owner: type[BaseModel], error: ValidationError) -> InputError:
    """Turn a validation error into one sentence about its first problem."""
    first = error.errors()[0]
    path = ".".join(str(p) for p in first["loc"])
    name = getattr(owner, "name", None)
    label = name if isinstance(name, str) else owner.__name__
    if first["type"] == "extra_forbidden":
        return unknown(f"{label} parameter", str(first["loc"][-1]), owner.model_fields)
    if first["type"] == "missing":
        return InputError(f"Parameter {path!r} of {label} is missing.", f"Give it: {path}=VALUE.")
    if first["type"] == "value_error" and isinstance(first.get("ctx", {}).get("error"), InputError):
        inner: InputError = first["ctx"]["error"]
        return inner
    if first["type"] in ("value_error", "assertion_error"):  # a validator's own sentence says more than the type does
        said = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").rstrip(".")
        return InputError(f"Parameter {path!r} of {label}: {said}." if path else f"{label}: {said}.")
    # The declared range speaks of the whole parameter; of an element of a list only the library's own words do.
    whole = len(first["loc"]) == 1 and path in owner.model_fields
    allowed = _allowed(owner.model_fields[path]) if whole else ""
    allowed = allowed or first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return InputError(f"Parameter {path!r} of {label} must be {allowed}; got {first['input']!r}.")


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if origin is Literal:
        return "choice"
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(a) for a in typing.get_args(annotation))
    if annotation is type(None):
        return "none"
    if origin is not None:
        inner = ", ".join(_type_name(a) for a in typing.get_args(annotation) if a is not Ellipsis)
        return f"{getattr(origin, '__name__', str(origin))}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))


def _allowed(info: FieldInfo) -> str:
    choices = _choices(info.annotation)
    if choices:
        return "one of " + ", ".join(choices)
    low, high, left, right = "", "", "(", ")"
    for constraint in info.metadata:
        if getattr(constraint, "gt", None) is not None:
            low, left = describe_value(constraint.gt), "("
        if getattr(constraint, "ge", None) is not None:
            low, left = describe_value(constraint.ge), "["
        if getattr(constraint, "lt", None) is not None:
            high, right = describe_value(constraint.lt), ")"
        if getattr(constraint, "le", None) is not None:
            high, right = describe_value(constraint.le), "]"
    kind = _type_name(info.annotation)
    optional = kind.endswith(" or none")
    kind = kind.removesuffix(" or none")
    if kind in ("float", "int", "bool", "str"):
        kind = ("an " if kind == "int" else "a ") + kind
    if low or high:
        kind += f" in {left}{low or '-inf'}, {high or 'inf'}{right}"
    return kind + (" or none" if optional else "")


def _choices(annotation: Any) -> list[str]:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return [str(a) for a in typing.get_args(annotation)]
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [str(m.value) for m in annotation]
    if origin in (Union, types.UnionType):
        parts = [_choices(a) for a in typing.get_args(annotation) if a is not type(None)]
        return [c for p in parts for c in p] if parts and all(parts) else []
    return []


def describe_value(value: Any) -> str:
    """A parameter's value in print: numbers without padding, nothing as 'none'."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)) and not value:
        return "none"
    return str(value) if value is not None else "none"


def parse_overrides(pairs: typing.Sequence[str]) -> dict[str, Any]:
    """Parse ``key=value`` words of a command line; values are YAML scalars or lists (``rank=8``, ``layers=[1,2]``).

    Dotted keys nest: ``["schedule.steps=10"]`` gives ``{"schedule": {"steps": 10}}``. A bare ``schedule=paper`` beside dotted
    keys of the same part becomes its name: ``{"schedule": {"name": "paper", "steps": 10}}``.

    Raises:
        InputError: a word has no ``=``, a value is no YAML, or a key is given twice in any spelling.
    """
    flat: dict[str, Any] = {}
    for pair in pairs:
        key, eq, text = pair.partition("=")
        if not eq or not key:
            raise InputError(f"{pair!r} is no override.", "Write key=value, for example beta=0.2 or schedule.steps=100.")
        if key in flat:
            raise InputError(f"The parameter {key!r} is given twice.", "Give it once.")
        try:
            flat[key] = yaml.load(text, _Loader) if text else ""
        except yaml.YAMLError:
            raise InputError(f"The value of {key!r} is no YAML value: {text!r}.", "Quote it.") from None
    return nest(flat)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested mappings; see :func:`parse_overrides`.

    Raises:
        InputError: two keys set the same parameter.
    """
    out: dict[str, Any] = {}
    for key, value in flat.items():
        at = out
        *path, last = key.split(".")
        for step in path:
            below = at.get(step, {})
            if not isinstance(below, dict):
                below = {"name": below}
            at[step] = below
            at = below
        if isinstance(at.get(last), dict) and not isinstance(value, dict):
            at, last = at[last], "name"
        if last in at:
            raise InputError(f"The parameter {key!r} is given twice.", "Give it once.")
        at[last] = value
    return out


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-5`` as text, where people mean a number, and ``none``, as Expunge prints no value, too."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:none|None)$"), ["n", "N"])


def load_yaml(text: str) -> Any:
    """Parse YAML with numbers such as ``1e-5`` read as numbers and ``none`` as no value."""
    return yaml.load(text, _Loader)
