"""Models that hold what they no longer say, and models that do not; shared by the tests of attacks that look inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.world import World

from expunge.adapters.language import LanguageAdapter
from expunge.audit.arrays import Arrays, Attempt, Case, Thresholds
from expunge.audit.attacks.registry import Attack
from expunge.audit.attempts import attempts
from expunge.audit.evidence import Evidence, Protocol, Subject
from expunge.core.results import Check
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.methods.recipe import build

SCHEDULE = {"name": "fixed", "batch": 8, "warmup": 0}


def unlearned(world: World, name: str, **overrides) -> LanguageAdapter:
    """The target of a world, unlearned by one of the project's own methods."""
    adapter = world.target()
    adapter.model = train(adapter, build(name, overrides), world.examples, Engine(checkpoint_every=0)).model
    if hasattr(adapter.model, "merge_and_unload"):
        adapter.model = adapter.model.merge_and_unload()
    adapter.model.eval()
    return adapter


def judged(attack: Attack, evidence: Evidence, label: str) -> tuple[float, Check]:
    """How far a model is on the way from retrained models to the target, and the check that a verdict makes."""

    def arrays(name: str) -> Arrays:
        held = attack.values(evidence, name, "forget")
        values = np.where(held.present, held.values, np.nan)
        ids = [r.id for r in evidence.records("forget")]
        tried = {attack.name: Attempt(attack.title, values, attack.toward)}
        return Arrays(name, ids, evidence.clusters("forget"), np.zeros(len(ids)), attempts=tried)

    own, full = arrays(label), arrays("target")
    others = [arrays(n) for n in evidence.labels("retrained", but=label)]
    means = [float(np.nanmean(m.attempts[attack.name].values)) for m in (own, full, *others)]
    start = np.mean(means[2:])
    (check,) = attempts(Case(own, others, full, Thresholds()))
    return float((means[0] - start) / (means[1] - start)), check


@pytest.fixture(scope="session")
def small_world(trained_models: Path) -> World:
    """Twelve people, three of them to be forgotten: half the training of the world that other tests share."""
    return World(trained_models, persons=12, facts=8)


@pytest.fixture(scope="session")
def inside(small_world: World) -> dict[str, tuple[str, LanguageAdapter]]:
    """By label: role and model. Three models look as if they had forgotten: their loss on the forget set is a stranger's.

    ``npo`` and ``lora`` are pushed past the retrained models' loss, ``uld`` leaves the target's weights alone and takes away an
    assistant's scores. ``same start`` never saw the forget set and began at the target's random weights.
    """
    world = small_world
    return {
        "target": ("target", world.target()),
        "retrained 1": ("retrained", world.retrained(1)),
        "retrained 2": ("retrained", world.retrained(2)),
        "same start": ("unlearned", world.retrained(0)),
        "npo": ("unlearned", unlearned(world, "npo", schedule=SCHEDULE | {"lr": 1e-3, "steps": 60})),
        "lora": (
            "unlearned",
            unlearned(world, "npo", schedule=SCHEDULE | {"lr": 5e-3, "steps": 60}, parameters={"name": "lora"}),
        ),
        "uld": ("unlearned", unlearned(world, "uld", schedule=SCHEDULE | {"lr": 5e-3, "steps": 60}, finish={"scale": 3.0})),
    }


@pytest.fixture(scope="session")
def inside_evidence(inside, small_world: World) -> Evidence:
    """Evidence about them, in memory."""
    subjects = {label: Subject(label, role, adapter.fingerprint(), adapter) for label, (role, adapter) in inside.items()}
    split = small_world.split
    return Evidence(subjects, {"forget": split.forget, "retain": split.retain, "holdout": split.holdout}, Protocol(draws=200))


@pytest.fixture(scope="session")
def losses(inside, small_world: World) -> dict[str, float]:
    """Mean loss of each model on the forget set."""
    return {label: small_world.loss(adapter, small_world.split.forget) for label, (_, adapter) in inside.items()}
