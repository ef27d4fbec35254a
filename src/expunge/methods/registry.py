"""What a method is, and the registries of methods and loss terms."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from expunge.core.registry import Registry
from expunge.engine.parts import Paper, Recipe, Schedule, Term

TERMS: Registry[type[Term]] = Registry("loss term", "expunge.methods.terms", "expunge.terms")


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
        wants: data that it needs beyond the forget set.
        kind: recipe, or another of the three kinds.
    """

    name: str
    title: str
    paper: Paper
    formula: str
    build: Callable[[], Recipe]
    published: Schedule
    text: str
    wants: tuple[Literal["retain", "alternatives", "base"], ...] = ()
    kind: Literal["recipe", "edit", "prepared", "guard"] = "recipe"
    caveats: tuple[str, ...] = field(default=())


METHODS: Registry[Method] = Registry("method", "expunge.methods", "expunge.methods")


def method(
    name: str,
    *,
    title: str,
    paper: Paper,
    formula: str,
    published: Schedule,
    wants: tuple[Literal["retain", "alternatives", "base"], ...] = (),
    caveats: tuple[str, ...] = (),
) -> Callable[[Callable[[], Recipe]], Method]:
    """Register a function that builds a recipe as a method; its docstring becomes the documentation."""

    def wrap(build: Callable[[], Recipe]) -> Method:
        text = inspect.cleandoc(build.__doc__ or "")
        return METHODS.add(name, Method(name, title, paper, formula, build, published, text, wants, caveats=caveats))

    return wrap


def term(cls: type[Term]) -> type[Term]:
    """Class decorator: register a loss term under its ``name``."""
    return TERMS.add(cls.name, cls)
