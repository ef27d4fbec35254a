"""What a method is, and the registries of methods and loss terms."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from expunge.core.access import Of, Stream
from expunge.core.registry import Registry, origin_of
from expunge.engine.parts import Paper, Recipe, Schedule, Term

T = TypeVar("T", bound=Term)

TERMS: Registry[type[Term]] = Registry("loss term", "expunge.methods.terms", "expunge.terms")


Want = Literal["retain", "alternatives", "holdout", "base", "oracle"]


@dataclass(frozen=True)
class Method:
    """A named recipe with its published settings.

    Attributes:
        name: as typed by users.
        title: full name.
        paper: where it was published.
        formula: the loss in plain text.
        build: makes the recipe with the published coefficients and the adaptive schedule.
        published: the published fixed schedule (``schedule=paper``), for the model sizes of the paper.
        text: the docstring: what it does, what we follow where sources differ, caveats.
        with_paper: overrides of other parts that belong to the published setting; they come with ``schedule=paper``.
        together: names of fields that several of its parts share: their bare name sets them all.
        alternatives: how alternative answers are made if the user does not say (see :mod:`expunge.methods.alternatives`).
        kind: recipe, or another of the three kinds.
        caveats: what to know before using it, one sentence each.
    """

    name: str
    title: str
    paper: Paper
    formula: str
    build: Callable[[], Recipe]
    published: Schedule
    text: str
    with_paper: Mapping[str, Any] = field(default_factory=dict)
    together: tuple[str, ...] = ()
    alternatives: str = "refusals"
    kind: Literal["recipe", "edit", "prepared", "guard"] = "recipe"
    caveats: tuple[str, ...] = ()

    @property
    def wants(self) -> tuple[Want, ...]:
        """What it needs beyond the forget set, derived from its parts; see :func:`wants`."""
        return wants(self.build())


def wants(recipe: Recipe) -> tuple[Want, ...]:
    """What a recipe needs beyond the target and the forget set: retain data, alternative answers, the untrained base, an oracle.

    What its preparation makes is not asked for.
    """
    # Which blocks a term names does not matter for the streams it reads, so any list that is long enough will do.
    streams = recipe.streams(PLACEHOLDER_LAYERS)
    found: list[Want] = []
    if Stream.RETAIN in streams:
        found.append("retain")
    if Stream.ALTERNATIVE in streams:
        found.append("alternatives")
    if Stream.VALIDATION in streams:
        found.append("holdout")
    if recipe.start == "initial":
        found.append("base")
    if Of.ORACLE in recipe.models(PLACEHOLDER_LAYERS):
        found.append("oracle")
    return tuple(found)


PLACEHOLDER_LAYERS = tuple(f"block{i}" for i in range(512))
"""Stands for the block names of an unknown model where only the kind of a need matters, not the layer."""

METHODS: Registry[Method] = Registry("method", "expunge.methods", "expunge.methods")


def method(
    name: str,
    *,
    title: str,
    paper: Paper,
    formula: str,
    published: Schedule,
    with_paper: Mapping[str, Any] | None = None,
    together: tuple[str, ...] = (),
    alternatives: str = "refusals",
    caveats: tuple[str, ...] = (),
) -> Callable[[Callable[[], Recipe]], Method]:
    """Register a function that builds a recipe as a method; its docstring becomes the documentation.

    The arguments are the attributes of :class:`Method`.
    """

    def wrap(build: Callable[[], Recipe]) -> Method:
        text = inspect.cleandoc(build.__doc__ or "")
        made = Method(
            name, title, paper, formula, build, published, text, dict(with_paper or {}), together, alternatives, caveats=caveats
        )
        return METHODS.add(name, made, origin_of(build.__module__))

    return wrap


def term(cls: type[T]) -> type[T]:
    """Class decorator: register a loss term under its ``name``."""
    TERMS.add(cls.name, cls, origin_of(cls.__module__))
    return cls
