"""Courses over steps: recipes at one fixed rate, without a goal and a bound, looked at on the way.

The published claims about single parts (NPO beside ascent, the hinge beside ascent, a projection beside none) are about what
happens as training goes on. An adaptive schedule would end it; so these runs have a fixed one that is the same for all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.passes import evaluating
from expunge.audit.attacks.relearn import rate
from expunge.audit.metrics.fluency import degenerate, repetition
from expunge.core.files import write_text
from expunge.core.settings import nest
from expunge.data.records import RecordSet
from expunge.engine.loop import train
from expunge.engine.objective import mean_losses
from expunge.pipeline import unlearn
from expunge.pipeline.config import UnlearnConfig

NO_MOMENTUM = {"schedule": {"momentum": 0.0}}
GU = {"gradient": {"name": "project", "geometry": "optimizer"}}
#: by name: method, and the parts that differ. GU's rule is that of AdamW without momentum, so its hosts have none either.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "ascent": ("gradascent", {}),
    "npo": ("npo", {"retain": "none"}),
    "ihl": ("loku", {"retain": "none", "parameters": "all"}),
    "ascent + nll": ("graddiff", {}),
    "ihl + nll": ("loku", {"parameters": "all"}),
    "flat": ("flat", {}),
    "graddiff": ("graddiff", NO_MOMENTUM),
    "graddiff + gu": ("graddiff", {**NO_MOMENTUM, **GU}),
    "npo-kl": ("gu", {"gradient": "plain", **NO_MOMENTUM}),
    "npo-kl + gu": ("gu", NO_MOMENTUM),
}


@dataclass(frozen=True)
class Course:
    """What the courses depend on.

    Attributes:
        looks: steps at which a model is looked at; the last one ends the run.
        relative: change of a layer's output by one step, relative to its size, from which the rate follows.
        batch: examples of each side in a step.
        seeds: of the order of examples.
        records: forget and retain records that are looked at, each at most.
        prompts: of these, how many are answered at the last look.
        longest: answer in tokens.
        recipes: names in :data:`RECIPES`.
    """

    looks: tuple[int, ...] = (0, 5, 10, 20, 30, 40, 60)
    relative: float = 0.02
    batch: int = 8
    seeds: tuple[int, ...] = (1, 2, 3)
    records: int = 60
    prompts: int = 30
    longest: int = 60
    recipes: tuple[str, ...] = tuple(RECIPES)


def all_courses(
    course: Course, request: Mapping[str, Any], folder: Path, stage: Callable[[str, Callable[[], None], Path], None]
) -> None:
    """Every recipe with every seed, each a stage that leaves one file."""
    folder.mkdir(exist_ok=True)
    for name in course.recipes:
        out = folder / f"{name.replace(' ', '')}.json"
        if not out.is_file():
            stage(f"course of {name}", lambda n=name, o=out: _course(course, request, n, o), out.with_suffix(".failed"))  # type: ignore[misc]


def _course(course: Course, request: Mapping[str, Any], name: str, out: Path) -> None:
    method, parts = RECIPES[name]
    found = [_one(course, request, method, parts, seed) for seed in course.seeds]
    write_text(out, json.dumps({"name": name, "method": method, "parts": parts, "seeds": found}, indent=1) + "\n")


def _one(course: Course, request: Mapping[str, Any], method: str, parts: Mapping[str, Any], seed: int) -> dict[str, Any]:
    first = UnlearnConfig(**{**request, "method": method})
    adapter = unlearn.open_adapter(first.model, first.text)
    lr = rate(adapter.model, course.relative)
    schedule = {
        "name": "fixed", "lr": lr, "steps": course.looks[-1], "epochs": None, "batch": course.batch, "warmup": 0,
        "decay": "constant", "weight_decay": 0,
    }  # fmt: skip
    whole = {**nest(dict(parts)), "schedule": {**schedule, **parts.get("schedule", {})}}
    engine = {**request.get("engine", {}), "seed": seed}
    config = UnlearnConfig(**{**request, "method": method, "parts": whole, "engine": engine})
    made = unlearn.from_config(config)
    given = {"forget": made.request.forget, "retain": made.request.retain}
    sets = {n: _some(held, course.records) for n, held in given.items() if held is not None}
    looks: list[dict[str, float]] = []

    def observe(step: int, model: nn.Module) -> None:
        if step in course.looks:
            with evaluating(model):
                looks.append({"step": step, **_look(made.adapter, model, sets)})

    outcome = train(made.adapter, made.recipe, made.examples, config.engine, observe=observe)  # type: ignore[arg-type]
    with evaluating(outcome.model):
        answers = {n: _answers(made.adapter, outcome.model, held[: course.prompts], course.longest) for n, held in sets.items()}
    return {"seed": seed, "lr": lr, "looks": looks, "answers": answers, "seconds": outcome.seconds}


def _some(records: RecordSet, count: int) -> RecordSet:
    """So many records, evenly over the set: of every author some."""
    at = np.unique(np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int))
    return RecordSet(records.name, tuple(records[int(i)] for i in at), records.source)


def _look(adapter: LanguageAdapter, model: nn.Module, sets: Mapping[str, RecordSet]) -> dict[str, float]:
    found = {}
    for name, records in sets.items():
        losses = np.array(mean_losses(adapter, model, [adapter.encode(r) for r in records], 8192))
        found |= {f"{name}.loss": float(losses.mean()), f"{name}.probability": float(np.exp(-losses).mean())}
    return found


def _answers(adapter: LanguageAdapter, model: nn.Module, records: Sequence[Any], longest: int) -> dict[str, float]:
    """Shares of answers that are broken, mean repetition of word pairs, and the first one to be looked at."""
    texts = [g.text for g in adapter.generate(model, [adapter.encode(r) for r in records], longest)]
    return {
        "degenerate": float(np.mean([degenerate(t) for t in texts])),
        "repetition": float(np.mean([repetition(t, 2) for t in texts])),
        "first": texts[0],  # type: ignore[dict-item]
    }
