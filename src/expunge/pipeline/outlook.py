"""Which methods can carry out a request, what each costs, and what the diagnostics warn of; the target stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.adapters.language import LanguageAdapter
from expunge.audit.circuits import CircuitSettings
from expunge.core.access import Stream
from expunge.core.errors import InputError, unknown
from expunge.core.files import size
from expunge.core.runs import Run
from expunge.core.settings import nest
from expunge.engine.options import Engine
from expunge.engine.outcome import Progress
from expunge.engine.parts import Join, Recipe
from expunge.guards.named import GUARDS
from expunge.methods.catalogue import Known, find, known, serves
from expunge.methods.edits.registry import EDITS
from expunge.methods.prepared.registry import PREPARED
from expunge.methods.recipe import build as build_recipe
from expunge.methods.registry import PLACEHOLDER_LAYERS, Method
from expunge.pipeline.circuits import CircuitDifficulty, circuit_difficulty
from expunge.pipeline.config import UnlearnConfig
from expunge.pipeline.cost import Cost
from expunge.pipeline.difficulty import ALPHA, Difficulty, diagnose
from expunge.pipeline.guarding import is_guard
from expunge.pipeline.models import open_adapter
from expunge.pipeline.timing import Seconds, time_of
from expunge.pipeline.unlearn import Request, encode, load_request
from expunge.pipeline.unlearn import plan as plan_run

FEW_RETAIN = 20  #: retain subjects below which what is measured on them hangs on single ones
SHOWN = 5  #: names in a sentence


@dataclass(frozen=True)
class MethodOutlook:
    """What a method would need and cost here.

    Attributes:
        name, title: of the method.
        kind: recipe, edit, prepared or guard.
        missing: why it cannot run on this request, and what would help; empty if it can.
        cost: an upper estimate; none if it cannot run.
        time: on this machine, if it was asked for; none if it cannot run, or was not timed.
        untimed: why it was not timed though it was asked for; empty otherwise.
        cautions: what the diagnostics, or its construction, warn of.
    """

    name: str
    kind: str
    title: str
    missing: str
    cost: Cost | None
    cautions: tuple[str, ...]
    time: Seconds | None = None
    untimed: str = ""

    @property
    def runs(self) -> bool:
        """Whether it can run."""
        return not self.missing

    def json(self) -> dict[str, Any]:
        """A plain mapping."""
        cost = self.cost.json() if self.cost is not None else None
        return {
            "name": self.name, "kind": self.kind, "title": self.title, "runs": self.runs, "missing": self.missing or None,
            "cost": cost, "time": self.time.json() if self.time is not None else None, "untimed": self.untimed or None,
            "cautions": list(self.cautions),
        }  # fmt: skip


@dataclass(frozen=True)
class Outlook:
    """A request before it is carried out: how hard it is, what can do it, and what to mind.

    Attributes:
        difficulty: of the request.
        methods: by kind and name.
        cautions: what to mind whatever the method.
        circuits: how hard it is by its circuits, if that was asked for.
    """

    difficulty: Difficulty
    methods: tuple[MethodOutlook, ...]
    cautions: tuple[str, ...]
    circuits: CircuitDifficulty | None = None

    def method(self, name: str) -> MethodOutlook:
        """What was found of one method.

        Raises:
            InputError: it was not looked at.
        """
        found = {m.name: m for m in self.methods}
        if name not in found:
            raise unknown("method of this plan", name, found)
        return found[name]

    def json(self) -> dict[str, Any]:
        """A plain mapping, which is also what ``--out`` writes."""
        return {
            "format": 1, "difficulty": self.difficulty.json(),
            "circuits": self.circuits.json() if self.circuits is not None else None,
            "cautions": list(self.cautions), "methods": [m.json() for m in self.methods],
        }  # fmt: skip


@dataclass(frozen=True)
class Looks:
    """What is looked at beside the request itself, at a price.

    Attributes:
        circuits: how circuits are found, if they are to be compared (:mod:`expunge.pipeline.circuits`).
        anchors: finished runs whose records are the anchors; none: gradient ascent on copies of the target makes them.
        timed: time a few steps of each method that can run (:mod:`expunge.pipeline.timing`).
    """

    circuits: CircuitSettings | None = None
    anchors: tuple[str, ...] = ()
    timed: bool = False


def looks_of(
    *, circuits: bool = False, anchors: Sequence[str] = (), timed: bool = False, settings: Mapping[str, Any] | None = None
) -> Looks:
    """What is to be looked at, as a user says it; anchors, or settings of circuits, ask for circuits.

    Raises:
        InputError: an unknown setting of circuits, or an anchor that is no run.
    """
    for name in anchors:
        Run.open(Path(name))
    wanted = circuits or bool(anchors) or settings is not None
    return Looks(CircuitSettings(**(settings or {})) if wanted else None, tuple(anchors), timed)


def from_config(
    config: UnlearnConfig, names: Sequence[str] = (), *, looks: Looks | None = None, progress: Progress | None = None
) -> Outlook:
    """Load what a configuration names and look at it.

    Args:
        config: as for unlearning; its method is not read.
        names: methods to look at; none: all.
        looks: what else is looked at.
        progress: called while that is done.

    Raises:
        InputError: an unknown method, or data or a model that cannot be read.
    """
    for name in names:
        if not is_guard(name):
            find(name)
    if config.parts and len(names) != 1:
        raise InputError("Parts belong to one method.", "Name it: --method NAME.")
    request = load_request(config)
    adapter = open_adapter(config.model, config.text, dropout=config.engine.dropout)
    base = open_adapter(config.base, config.text, dropout=config.engine.dropout) if config.base else None
    return outlook(
        adapter, request, config.engine, names=names, parts=config.parts, how=config.alternatives,
        template=config.alternative_template, base=base, looks=looks, progress=progress,
    )  # fmt: skip


def outlook(
    adapter: LanguageAdapter,
    request: Request,
    engine: Engine,
    *,
    names: Sequence[str] = (),
    parts: Mapping[str, Any] | None = None,
    how: str = "auto",
    template: str | None = None,
    base: LanguageAdapter | None = None,
    looks: Looks | None = None,
    progress: Progress | None = None,
) -> Outlook:
    """Diagnose a request and look at each method; methods come by kind, then by name.

    Args:
        adapter: holds the target model.
        request: checked data.
        engine: how the machine is used.
        names: methods to look at; none: all.
        parts: what differs from a method's own parts.
        how, template: see :func:`expunge.pipeline.unlearn.plan`.
        base: the untrained base, for methods that start from it.
        looks: what else is looked at.
        progress: called while that is done.

    Raises:
        InputError: an unknown method, a record cannot be encoded, or the model has no circuits that could be compared.
    """
    looks = looks or Looks()
    examples = encode(adapter, request)
    tokens = sum(e.size for e in examples.get(Stream.RETAIN, ()))
    found = diagnose(adapter, request, engine, examples=examples[Stream.FORGET], retain_tokens=tokens, how=how, template=template)
    circuits = None
    if looks.circuits is not None:
        circuits = circuit_difficulty(adapter, request, engine, runs=looks.anchors, settings=looks.circuits, progress=progress)
    options: dict[str, Any] = {"how": how, "template": template, "base": base, "encoded": examples}
    case = _Case(adapter, request, engine, found, options, looks.timed, progress)
    methods = [case.look(name, dict(parts or {})) for name in (sorted(set(names)) or [*known(), *GUARDS.names()])]
    methods.sort(key=lambda m: (_KINDS.index(m.kind), m.name))
    return Outlook(found, tuple(methods), (*_cautions(found), *_circuits(circuits)), circuits)


_KINDS = ("recipe", "edit", "prepared", "guard")
_HIDES = "It hides and removes nothing: the weights stay as they are, and an audit can at best call it suppressed."


@dataclass(frozen=True)
class _Case:
    """A request under a target, as every method is asked about it."""

    adapter: LanguageAdapter
    request: Request
    engine: Engine
    found: Difficulty
    options: Mapping[str, Any]
    timed: bool
    progress: Progress | None

    def look(self, name: str, parts: Mapping[str, Any]) -> MethodOutlook:
        """Whether the method called ``name`` can run, at what cost, and what to mind."""
        if is_guard(name):
            return self._guard(name, parts)
        held = find(name)
        kind = "edit" if name in EDITS.names() else "prepared" if name in PREPARED.names() else "recipe"
        missing = _unfit(held, kind, self.adapter) or self._unasked(held, name, parts)
        if missing:
            return MethodOutlook(name, kind, held.title, missing, None, ())
        try:
            plan = plan_run(self.adapter, self.request, name, parts, self.engine, **self.options)
            cautions = tuple(_method_cautions(_made(held, name, parts), self.found))
        except InputError as error:
            return MethodOutlook(name, kind, held.title, f"{error.message} {error.remedy}".strip(), None, ())
        time, untimed = time_of(plan, self.progress) if self.timed else (None, "")
        return MethodOutlook(name, kind, held.title, "", plan.cost, cautions, time, untimed)

    def _guard(self, name: str, parts: Mapping[str, Any]) -> MethodOutlook:
        """The same for a guard, which has no steps."""
        title, untimed = GUARDS.get(name).title, "A guard has no steps that could be timed." if self.timed else ""
        try:
            plan = plan_run(self.adapter, self.request, name, parts, self.engine, **self.options)
        except InputError as error:
            return MethodOutlook(name, "guard", title, f"{error.message} {error.remedy}".strip(), None, ())
        return MethodOutlook(name, "guard", title, "", plan.cost, (_HIDES,), None, untimed)

    def _unasked(self, held: Known, name: str, parts: Mapping[str, Any]) -> str:
        """Why a method is none for this request, though it may be one for the model; empty if it may be."""
        if not isinstance(held, Method) or self.options["base"] is not None:
            return ""
        if build_recipe(name, parts).start != "initial":
            return ""
        return "It trains the untrained base anew instead of changing this model. Name the base to see its cost: --base MODEL."


def _unfit(held: Known, kind: str, adapter: LanguageAdapter) -> str:
    """Why a method is none for this model at all; empty if it may be."""
    if kind == "prepared":
        return "It shapes the training itself, and this model is trained already. Train by it: expunge train."
    fits, lacking = serves(held, adapter.offers)
    if fits:
        return ""
    return f"It needs {', '.join(lacking)}, which a language model does not offer."


def _made(held: Known, name: str, parts: Mapping[str, Any]) -> Recipe | Any:
    return build_recipe(name, parts) if isinstance(held, Method) else EDITS.get(name)(**nest(dict(parts)))


def _method_cautions(made: Recipe | Any, found: Difficulty) -> list[str]:
    """What to mind with one method, by what it is made of."""
    out = []
    streams = made.streams(PLACEHOLDER_LAYERS) if isinstance(made, Recipe) else frozenset(made.streams)
    if isinstance(made, Recipe):
        if isinstance(made.finish, Join) or made.parameters.beside:
            out.append("It suppresses: the target's own weights stay in the result, and whoever has them can ask the target.")
        if _contrasts(made) and found.alike:
            out.append(
                f"It prefers another answer to the forgotten one: in {len(found.alike)} of {len(found.records)} pairs the "
                "normalised CHES is not negative, so the probability of the other answer may fall too."
            )
        if Stream.RETAIN not in streams:
            out.append("It reads the forget set alone: its result depends on the order in which the target learnt.")
    if Stream.RETAIN in streams and found.told:
        out.append(f"It keeps the retain set, which tells {len(found.told)} of the forget records again.")
    return out


def _contrasts(recipe: Recipe) -> bool:
    """Whether one term reads a forgotten answer and the one in its place, under the model being changed."""
    for term in recipe.terms():
        read = {stream for stream, _, _ in term.needs(PLACEHOLDER_LAYERS)}
        if {Stream.FORGET, Stream.ALTERNATIVE} <= read:
            return True
    return False


def _cautions(found: Difficulty) -> list[str]:
    """What to mind with any method."""
    return [text for make in (_knowledge, _repetition, _likeness, _audit, _retain) for text in make(found)]


def _knowledge(found: Difficulty) -> list[str]:
    out = []
    if found.source == "none":
        return [
            "There is nothing unseen to compare with, so whether the target knows the records cannot be told. Give --holdout."
        ]
    if found.source == "swapped":
        out.append(
            "No holdout was given: retain records with swapped answers stand in for unseen ones. They are wrong rather than "
            "unknown, so their loss is an upper estimate, and what is known is overstated."
        )
    if all(r.known is None for r in found.records):
        out.append(f"Of single records it cannot be told whether they are known: {found.unseen} unseen records are too few (19).")
    split, stand_out = found.separation, sum(bool(r.known) for r in found.records)
    if split is not None and (split.low is None or split.low <= 0.5) and 2 * stand_out < len(found.records):
        out.append(
            f"As a set the forget records are not told from unseen ones by their loss (AUC {split.value:.2f}): there may be "
            "nothing to forget."
        )
    if found.unknown:
        out.append(f"Nothing to forget in {len(found.unknown)} records, which look like unseen ones: {_names(found.unknown)}.")
    return out


def _circuits(found: CircuitDifficulty | None) -> list[str]:
    """What to mind with circuit-guided difficulty."""
    if found is None:
        return []
    check, out = found.foretold, []
    if found.left_out:
        out.append(f"{found.left_out} records have no prompt that could be asked of somebody else, and so no circuit.")
    if not found.trusted:
        out.append(
            f"Circuit-guided difficulty foretells nothing here: over {check.records} records it goes along with what was hard to "
            f"erase by {check.value:.2f} (Spearman), and {100 * check.p:.0f} % of random anchors do as well."
        )
    elif check.partial <= 0 or check.p_partial > ALPHA:
        out.append(
            f"Circuit-guided difficulty says no more than the loss: given it, {check.partial:.2f} is left of {check.value:.2f} "
            "(Spearman)."
        )
    return out


def _repetition(found: Difficulty) -> list[str]:
    out = []
    if found.standing_twice:
        out.append(
            f"{found.standing_twice} retain records duplicate forget records: what is kept there cannot be forgotten. Leave them "
            "out by --drop-overlap."
        )
    told = [r.id for r in found.told]
    if told:
        out.append(
            f"The retain set tells {len(told)} of the forget records again ({_names(told)}): a model that keeps it cannot forget "
            "them. Take these retain records out, or ask for less."
        )
    return out


def _likeness(found: Difficulty) -> list[str]:
    if not found.alike:
        return []
    return [
        f"In {len(found.alike)} of {len(found.records)} pairs the forgotten answer's state lies along that of the one to take "
        f"its place (normalised CHES not negative): {_names(found.alike)}. Preference methods may move probability to neither of "
        "the two."
    ]


def _audit(found: Difficulty) -> list[str]:
    power = found.power
    if power is None or power.enough or power.margin <= 0:
        return []
    much = f"about {power.needed} subjects would be needed" if power.needed is not None else "more subjects alone would not help"
    return [
        f"An audit will likely be undecided: with {power.subjects} subjects its interval is about +-{power.half_width:.2f} nats, "
        f"and +-{power.margin:.2f} are accepted; {much}."
    ]


def _retain(found: Difficulty) -> list[str]:
    if not found.retain:
        return ["No retain set was given: what else the model loses is neither held back nor measured. Give --retain."]
    out = []
    if found.retain < len(found.records):
        out.append(f"There are fewer records to keep ({found.retain}) than to forget ({len(found.records)}).")
    if found.retain_subjects < FEW_RETAIN:
        out.append(
            f"The retain set has {found.retain_subjects} subjects: utility measured on fewer than {FEW_RETAIN} hangs on single "
            "ones."
        )
    return out


def _names(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")


def cost_text(cost: Cost) -> tuple[str, str, str]:
    """Steps, tokens and memory of a cost, for a table."""
    return f"{cost.steps:,}" if cost.steps else "-", f"{cost.tokens:,}", size(cost.memory)
