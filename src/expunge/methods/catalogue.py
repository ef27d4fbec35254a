"""What there is to know about a method: for ``expunge methods``, the docs and the method x modality table."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection
from dataclasses import dataclass

from expunge.core.access import Of, Offer, Stream
from expunge.core.errors import unknown
from expunge.core.settings import Parameter, Settings, describe_value
from expunge.engine.edit import Edit
from expunge.engine.parts import Paper, Recipe
from expunge.engine.prepared import Prepared
from expunge.methods.alternatives import CLASS_KINDS
from expunge.methods.edits.registry import EDITS
from expunge.methods.prepared.registry import PREPARED
from expunge.methods.recipe import PART_SLOTS
from expunge.methods.registry import METHODS, PLACEHOLDER_LAYERS, Method, Want, wants


@dataclass(frozen=True)
class PartDescription:
    """One part of a recipe: its slot, its name, and its parameters with the values that the method gives them as defaults."""

    slot: str
    name: str
    text: str
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class Description:
    """Everything that is declared about a method.

    Attributes:
        needs: capabilities that the modality's adapter must offer, derived from the terms.
        wants: data that it needs beyond the forget set.
        reads_reference: what it reads of the frozen target ("losses" can be cached; "logits" and "features" need it at hand).
        published: the published schedule.
        origin: the distribution that the method comes from.
    """

    name: str
    title: str
    text: str
    formula: str
    paper: Paper
    caveats: tuple[str, ...]
    parts: tuple[PartDescription, ...]
    published: PartDescription
    needs: tuple[Offer, ...]
    wants: tuple[Want, ...]
    reads_reference: tuple[str, ...]
    alternatives: str | None
    origin: str


@dataclass(frozen=True)
class EditDescription:
    """Everything that is declared about an edit; the names are those of :class:`Description`."""

    name: str
    title: str
    text: str
    formula: str
    paper: Paper
    caveats: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    needs: tuple[Offer, ...]
    wants: tuple[Want, ...]
    origin: str


@dataclass(frozen=True)
class PreparedDescription:
    """Everything that is declared about a prepared method; the names are those of :class:`Description`."""

    name: str
    title: str
    text: str
    formula: str
    guarantee: str
    paper: Paper
    caveats: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    needs: tuple[Offer, ...]
    wants: tuple[Want, ...]
    origin: str


Known = Method | type[Edit] | type[Prepared]


def known() -> dict[str, Known]:
    """All methods by name: recipes, edits and prepared ones."""
    return dict(sorted([*METHODS.items(), *EDITS.items(), *PREPARED.items()]))


def find(name: str) -> Known:
    """The method called ``name``.

    Raises:
        InputError: there is none.
    """
    held = known()
    if name not in held:
        raise unknown("method", name, held)
    return held[name]


def describe_edit(name: str) -> EditDescription:
    """All that is declared about the edit called ``name``.

    Raises:
        InputError: there is no such edit.
    """
    kind = EDITS.get(name)
    wants: tuple[Want, ...] = ("retain",) if Stream.RETAIN in kind.streams else ()
    return EditDescription(
        name, kind.title, inspect.cleandoc(kind.__doc__ or ""), kind.formula, kind.paper, kind.caveats, tuple(kind.declared()),
        tuple(sorted(kind.offers)), wants, EDITS.origin(name),
    )  # fmt: skip


def describe_prepared(name: str) -> PreparedDescription:
    """All that is declared about the prepared method called ``name``.

    Raises:
        InputError: there is no such method.
    """
    kind = PREPARED.get(name)
    return PreparedDescription(
        name, kind.title, inspect.cleandoc(kind.__doc__ or ""), kind.formula, kind.guarantee, kind.paper, kind.caveats,
        tuple(kind.declared()), tuple(sorted(kind.offers)), (), PREPARED.origin(name),
    )  # fmt: skip


def describe(name: str) -> Description:
    """All that is declared about the method called ``name``.

    Raises:
        InputError: there is no such method.
    """
    method = METHODS.get(name)
    recipe = method.build()
    parts = [_part(slot, t) for slot in ("forget", "retain") for t in getattr(recipe, slot)]
    held = {slot: getattr(recipe, slot) for slot in PART_SLOTS}
    parts += [_part(slot, part) for slot, part in held.items() if part is not None]
    asked = wants(recipe)
    return Description(
        name=method.name,
        title=method.title,
        text=method.text,
        formula=method.formula,
        paper=method.paper,
        caveats=method.caveats,
        parts=tuple(parts),
        published=_part("schedule", method.published),
        needs=offers_needed(recipe, method.alternatives),
        wants=asked,
        reads_reference=tuple(sorted({_kind(v) for _, of, v in recipe.needs(PLACEHOLDER_LAYERS) if of is Of.REFERENCE})),
        alternatives=method.alternatives if "alternatives" in asked else None,
        origin=METHODS.origin(name),
    )


def offers_needed(recipe: Recipe, alternatives: str = "refusals") -> tuple[Offer, ...]:
    """What an adapter must offer so that the recipe can run on its modality.

    The loss is always needed (the adaptive schedule looks at it). Alternatives need text, where other answers can be written, or
    classes, by their kind; a preparation asks for what it reads.
    """
    needs = recipe.needs(PLACEHOLDER_LAYERS)
    found = {Offer.LOSSES, *([Offer.LOGITS] if Stream.VALIDATION in recipe.schedule.reads else [])} | {
        Offer(_kind(value)) for _, _, value in needs
    }
    found |= recipe.parameters.offers
    for part in (recipe.preparation, recipe.control):
        found |= part.offers if part is not None else frozenset()
    if any(t.targets != "all" for t in recipe.terms()):
        found |= {Offer.TEXT, Offer.SEQUENCE}  # nothing else has spans
    if Stream.ALTERNATIVE in recipe.streams(PLACEHOLDER_LAYERS):
        found.add(Offer.CLASSES if alternatives in CLASS_KINDS else Offer.TEXT)
    return tuple(sorted(found))


def serves(method: str | Known, offers: Collection[Offer]) -> tuple[bool, tuple[Offer, ...]]:
    """Whether a method runs on an adapter that offers ``offers``, and what is missing for it."""
    found = find(method) if isinstance(method, str) else method
    needed = offers_needed(found.build(), found.alternatives) if isinstance(found, Method) else tuple(sorted(found.offers))
    missing = tuple(o for o in needed if o not in offers)
    return not missing, missing


def _kind(value: str) -> str:
    return value.partition(":")[0]


def _part(slot: str, part: Settings) -> PartDescription:
    declared = type(part).declared()
    parameters = tuple(dataclasses.replace(p, default=describe_value(getattr(part, p.name))) for p in declared)
    text = (type(part).__doc__ or "").strip().partition("\n")[0]
    return PartDescription(slot, part.name, text, parameters)  # type: ignore[attr-defined]
