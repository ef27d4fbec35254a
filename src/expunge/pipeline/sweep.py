"""Sweeps: search the settings of methods on a validation request, all with the same budget, and choose by a declared rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from expunge.adapters.base import Adapter
from expunge.core.errors import InputError, unknown
from expunge.core.settings import Settings
from expunge.engine.outcome import Progress
from expunge.methods.catalogue import find
from expunge.methods.prepared.registry import refuse_prepared
from expunge.methods.search import Dimension, known, paths, space
from expunge.pipeline import unlearn
from expunge.pipeline.config import UnlearnConfig
from expunge.pipeline.cost import Cost
from expunge.pipeline.row_runs import RowsConfig
from expunge.pipeline.sampling import Sampler, check_sampler
from expunge.pipeline.tradeoff import Rule
from expunge.pipeline.validation import Ground, RowGround, Split, TextGround

KIND = "sweep"
DOCUMENT, CHOSEN, REFERENCE = "sweep.json", "chosen.yaml", "reference.json"


class SweepConfig(Settings):
    """Everything that the result of a sweep depends on."""

    name: ClassVar[str] = "sweep"

    request: dict[str, Any] = Field(description="settings of the unlearning run that is tuned for; its parts go for all methods")
    rows: bool = Field(False, description="whether it is about rows of a classifier or a regressor")
    methods: tuple[str, ...] = Field(min_length=1, description="methods whose settings are searched")
    own: dict[str, dict[str, Any]] = Field(default_factory=dict, description="by method, parts of it alone")
    search: dict[str, str] = Field(default_factory=dict, description="ranges by parameter, or by METHOD:parameter")
    own_ranges: bool = Field(True, description="search what the methods' parts declare too")
    trials: int = Field(20, ge=1, le=10_000, description="trials of each method; the first is its own setting")
    sampler: Sampler = Field("random", description="how settings are drawn: random, or tpe, which learns from earlier trials")
    at_once: int = Field(5, ge=1, description="of tpe: trials of a method that are drawn before any of them has ended")
    split: Split = Field(default_factory=Split, description="how the request is divided")
    seed: int = Field(0, ge=0, description="of the settings drawn; trial i of every method has the seed 10000 (seed + 1) + i")
    rule: Rule = Field("nearest", description="how the trial is chosen")
    bound: float = Field(0.05, ge=0, le=1, description="of rule nearest: largest share of usefulness that may be lost")
    retrain: int = Field(0, ge=0, le=50, description="models to retrain here without all records to forget, to compare with")
    retrained: tuple[str, ...] = Field((), description="such models that are there already")
    threads: int = Field(1, ge=1, description="threads of each trial; another number may change the last digits")


@dataclass
class Study:
    """One method of a sweep."""

    method: str
    parts: dict[str, Any]
    dimensions: tuple[Dimension, ...]
    cost: Cost


@dataclass
class SweepPlan:
    """A sweep that has passed every check and has not begun; ``target`` is the fingerprint of the target model."""

    config: SweepConfig
    ground: Ground
    studies: list[Study]
    adapter: Adapter
    target: str

    def cost(self) -> dict[str, Any]:
        """By method and together: at most so many steps over so many tokens."""
        n = self.config.trials
        by = {s.method: {"trials": n, "steps": n * s.cost.steps, "tokens": n * s.cost.tokens} for s in self.studies}
        return {
            "methods": by, "trials": n * len(self.studies), "steps": sum(m["steps"] for m in by.values()),
            "tokens": sum(m["tokens"] for m in by.values()), "memory": max(s.cost.memory for s in self.studies),
        }  # fmt: skip


def plan(config: SweepConfig, *, dry: bool = False, progress: Progress | None = None) -> SweepPlan:
    """Check everything, and say what it will cost; nothing is written, and nothing trained but a target that there is not yet.

    Args:
        config: the sweep.
        dry: do not train that either; such a plan cannot be carried out.
        progress: of the training of the target.

    Raises:
        InputError: anything does not fit.
    """
    check_sampler(config.sampler)
    studies = _spaces(config)
    ground = _ground(config, progress)
    if not len(ground.unseen) and not config.retrain and not config.retrained:
        raise InputError("Nothing says how a record looks that the model has never seen.", "Give --holdout DATA, or --retrain 1.")
    if config.retrained and config.rows:
        raise InputError("--retrained is for language models.", "Models of rows are retrained here: --retrain 3.")
    if config.retrain and isinstance(ground, RowGround) and not ground.problem.retrainable:
        raise InputError(
            "Nothing says how the model was trained, so none can be retrained.",
            "Let the entry give build=... with training=... or fit=....",
        )
    adapter = ground.shape()
    for study in studies:
        study.cost = ground.plan(study.method, study.parts, 0, adapter).cost
    if not dry and config.rows:
        adapter = ground.target()
    return SweepPlan(config, ground, studies, adapter, "" if dry else adapter.fingerprint())


def _ground(config: SweepConfig, progress: Progress | None) -> Ground:
    if config.rows:
        return RowGround(RowsConfig(**config.request), config.split, progress=progress)
    return TextGround(UnlearnConfig(**config.request), config.split)


def _spaces(config: SweepConfig) -> list[Study]:
    """What is searched of each method; everything that can be said without data."""
    twice = sorted({m for m in config.methods if config.methods.count(m) > 1})
    if twice:
        raise InputError(f"The method {twice[0]!r} is named twice.", "Name each once; --trials says how often it is tried.")
    for key in ("method", "settings", "tuned"):
        if config.request.get(key):
            raise InputError(f"A sweep chooses {key!r} itself.", "Leave it out; name methods by --method NAME.")
    for name in config.own:
        if name not in config.methods:
            raise unknown("method of this sweep", name, config.methods)
    common = dict(config.request.get("parts") or {})
    parts = {m: {**common, **config.own.get(m, {})} for m in config.methods}
    for method in config.methods:
        refuse_prepared(method)
        find(method)
        if not config.rows:
            unlearn.check_method(UnlearnConfig(**{**config.request, "method": method, "parts": parts[method]}))
    given = _ranges(config, parts)
    nothing = Cost(0, 0, 0, 0, 0)
    return [Study(m, parts[m], space(m, parts[m], given[m], declared=config.own_ranges), nothing) for m in config.methods]


def _ranges(config: SweepConfig, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The user's ranges by method: those of a method alone, and those that every method with the parameter takes."""
    found: dict[str, dict[str, str]] = {m: {} for m in config.methods}
    for word, text in config.search.items():
        method, colon, key = word.partition(":")
        if colon:
            if method not in config.methods:
                raise unknown("method of this sweep", method, config.methods)
            found[method][key] = text
            continue
        having = [m for m in config.methods if known(m, parts[m], word)]
        if not having:
            names = {n for m in config.methods for p in paths(m, parts[m]) for n in (p, p.rpartition(".")[2])}
            raise unknown("parameter of " + " or ".join(config.methods), word, names)
        for m in having:
            found[m].setdefault(word, text)
    return found
