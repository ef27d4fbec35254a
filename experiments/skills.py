"""A skill removed from a small model: Neuron Adjust, Key Space Detection, and recipes that change weights beside them.

Usage, from the repository root (no data are needed)::

    OMP_NUM_THREADS=1 python -m experiments.skills --out runs/skills --page docs/results/skills.md

In each *case* small models learn two generated skills and facts about countries from random weights; one skill is to go. Guards
are fitted on the request alone (questions of that skill, and of what stays), recipes are run on it as they are. Judged are
answers, word for word, to questions that no request holds, asked in the wording of the request and in another one; and the
verdict of an audit beside models that were trained without the skill. Every stage leaves files below ``--out``: what is done is
not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from experiments.stages import Stages
from experiments.tofu_small import say, told, train_once
from expunge.adapters.language import LanguageAdapter
from expunge.audit.run import AuditedModel
from expunge.audit.settings import AuditSettings
from expunge.core.access import Level
from expunge.core.files import write_json, write_text
from expunge.core.runs import Run
from expunge.data.people import world
from expunge.data.records import Record, RecordSet
from expunge.data.skills import skill
from expunge.engine.options import Engine
from expunge.guards.actions.neuron_adjust import NeuronAdjust
from expunge.guards.adapter import GuardedAdapter
from expunge.guards.detectors.key_space import Box, KeySpace, KeyWatcher
from expunge.guards.guarded import guard_model
from expunge.guards.parts import Material, Watcher
from expunge.guards.policy import SORRY, Row
from expunge.guards.probing import Moments
from expunge.pipeline import train as training
from expunge.pipeline.audit import audit_stage, entry_of, unlearned_model
from expunge.pipeline.config import TextConfig, TrainConfig, UnlearnConfig
from expunge.pipeline.guarding import half_of
from expunge.pipeline.models import open_adapter
from expunge.pipeline.unlearn import execute, from_config

Shares = dict[str, float]
LENGTH = (3, 3)  #: digits of a string
REPEATS = 3  #: how often a fact stands in the training data: there are few of them
#: Parts of the recipes whose schedule is the adaptive one: they stop at a goal, or after this many steps.
STEPS = {"schedule": {"steps": 120, "epochs": 1, "check_examples": 32}}


@dataclass(frozen=True)
class Case:
    """What goes and what stays.

    Attributes:
        name: of the case.
        hidden, kept: skills (:mod:`expunge.data.skills`).
        train: questions of each that are trained on, in both wordings.
        asked: of these, how many stand in the request, in one wording: the probes.
        judged: questions that no request holds, of each skill.
        apart: whether these were never trained on; else the model has seen them.
        share: of the units that the paper's authors adjust for skills of this kind.
    """

    name: str
    hidden: str
    kept: str
    train: int
    asked: int
    judged: int
    apart: bool
    share: float

    def source(self, name: str, n: int, reworded: bool = False) -> str:
        """A named set of questions."""
        return f"skills:{name}?n={n}&shortest={LENGTH[0]}&longest={LENGTH[1]}&reworded={str(reworded).lower()}"

    def questions(self, name: str, n: int, reworded: bool = False) -> list[Record]:
        """The same, as records."""
        return list(skill(name, n, length=LENGTH, reworded=reworded))

    def to_judge(self, name: str, reworded: bool = False) -> RecordSet:
        """Questions of a skill that stand in no request."""
        if self.apart:
            return RecordSet(name, tuple(skill(name, self.judged, length=LENGTH, held_out=True, reworded=reworded)))
        return RecordSet(name, tuple(self.questions(name, self.asked + self.judged, reworded)[self.asked :]))


CASES = {
    "languages": Case("languages", "lumi", "tarn", train=120, asked=100, judged=40, apart=True, share=0.005),
    "sums": Case("sums", "words", "digits", train=78, asked=40, judged=38, apart=False, share=0.03),
}


@dataclass(frozen=True)
class Plan:
    """What the experiment depends on.

    Attributes:
        out: folder of the runs.
        cases: what is removed.
        seeds: of targets; guards, recipes and controls have the same.
        retrained: seeds of the models that never saw the skill.
        model: preset.
        schedule: of the training.
        recipes: methods that change weights, with their parts.
        shares: of units, for the ablation of Neuron Adjust.
        alphas: of the box, for that of Key Space Detection.
        steps: parts of all recipes.
    """

    out: Path
    cases: tuple[Case, ...] = tuple(CASES.values())
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    retrained: tuple[int, ...] = (11, 12, 13, 14, 15)
    model: str = "llama-tiny"
    schedule: Mapping[str, Any] = field(default_factory=lambda: {"lr": 4e-3, "epochs": 40, "batch": 32})
    recipes: tuple[str, ...] = ("graddiff", "npo", "task-vector")
    shares: tuple[float, ...] = (0.005, 0.03, 0.1, 0.2, 0.4, 1.0)
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    steps: Mapping[str, Any] = field(default_factory=lambda: dict(STEPS))

    def settings(self) -> dict[str, Any]:
        """What the manifest records."""
        names = ("seeds", "retrained", "model", "recipes", "shares", "alphas")
        return {n: json.loads(json.dumps(getattr(self, n))) for n in names} | {
            "cases": [c.__dict__ for c in self.cases], "schedule": dict(self.schedule), "steps": dict(self.steps),
        }  # fmt: skip


# ---- controls: the same hooks, told nothing


class RandomUnits(NeuronAdjust):
    """As many units of the same modules, drawn at random; what is done to each is the same."""

    name: ClassVar[str] = "random-units"
    title: ClassVar[str] = "Random units"
    drawn: int = 0

    def gaps(self, stays: Moments, skill: Moments) -> Tensor:
        """Random numbers, by the seed and the module's own moments."""
        seed = int(1e6 * float(stays.mean.abs().sum())) + self.drawn
        return torch.rand(len(stays.mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class RandomBox(KeySpace):
    """The box of the skill with its dimensions exchanged at random: the same sides, at another place."""

    name: ClassVar[str] = "random-box"
    title: ClassVar[str] = "Random box"
    drawn: int = 0

    def fit(self, material: Material) -> Watcher:
        """As Key Space Detection, then shuffled."""
        made = super().fit(material)
        assert isinstance(made, KeyWatcher)
        generator = torch.Generator().manual_seed(self.drawn)
        made.boxes = {s: {n: _shuffled(b, generator) for n, b in boxes.items()} for s, boxes in made.boxes.items()}
        return made


def _shuffled(box: Box, generator: torch.Generator) -> Box:
    order = torch.randperm(len(box.mean), generator=generator)
    return Box(box.mean[order], box.std[order], box.k)


# ---- data and models


@dataclass(frozen=True)
class Ground:
    """The files and models of a case."""

    plan: Plan
    case: Case

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.plan.out / self.case.name

    def target(self, seed: int) -> Path:
        """The model with both skills."""
        return self.folder / f"target-{seed}"

    def golden(self, seed: int) -> Path:
        """A model without the skill that is to go."""
        return self.folder / f"retrained-{seed}"

    def run(self, label: str, seed: int) -> Path:
        """An unlearning run."""
        return self.folder / "runs" / f"{label.replace(' ', '-').replace(',', '')}-{seed}"

    @property
    def forget(self) -> str:
        """The request: questions of the skill that is to go."""
        return self.case.source(self.case.hidden, self.case.asked)

    @property
    def retain(self) -> Path:
        """What is to stay, as the request has it: questions of the other skill, and half of the facts."""
        return self.folder / "data" / "retain.jsonl"

    def write_data(self) -> None:
        """The files that no named set gives."""
        held = self.case.questions(self.case.kept, self.case.asked)
        _write(self.retain, [*held, *_facts()[0]])
        both = [replace(r, id=f"{r.id}-{n}") for n in range(REPEATS) for part in _facts() for r in part]
        _write(self.folder / "data" / "facts.jsonl", both)

    def training(self, seed: int) -> TrainConfig:
        """How a target is made."""
        skills = [self.case.source(s, self.case.train, w) for s in (self.case.hidden, self.case.kept) for w in (False, True)]
        return TrainConfig(
            model=self.plan.model, data=(*skills, str(self.folder / "data" / "facts.jsonl")), scratch=True,
            parts={"schedule": dict(self.plan.schedule)}, engine=Engine(seed=seed, checkpoint_every=0),
        )  # fmt: skip

    def models(self) -> None:
        """Train the targets, and the models without the skill."""
        for seed in self.plan.seeds:
            train_once(self.training(seed), self.target(seed))
        every = [r for w in (False, True) for r in self.case.questions(self.case.hidden, self.case.train, w)]
        for seed in self.plan.retrained:
            config = training.retraining(self.training(seed), RecordSet("gone", tuple(every)), seed)[0]
            train_once(config, self.golden(seed))

    def sets(self) -> dict[str, RecordSet]:
        """What is judged by: no record of a request is among it."""
        out = {}
        for key, name in (("hidden", self.case.hidden), ("kept", self.case.kept)):
            out[key] = self.case.to_judge(name)
            out[f"{key}, reworded"] = self.case.to_judge(name, reworded=True)
        return out | {"facts": RecordSet("facts", tuple(_facts()[1]))}

    def guards(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Guards by label: name and parts."""
        blocks = {"detector": {"blocks": ["model.layers.0", "last"]}}
        wide = {"action": {"share": 0.4, "difference": "standardised"}}
        return {
            "key-space": ("key-space", {}), "key-space, both blocks": ("key-space", blocks),
            "neuron-adjust": ("neuron-adjust", {"action": {"share": self.case.share}}),
            "neuron-adjust, 40 % of the units": ("neuron-adjust", wide),
        }  # fmt: skip


def _facts() -> tuple[list[Record], list[Record]]:
    """Facts about five countries that a request names as to stay, and about five others."""
    held = list(world())
    names = list(dict.fromkeys(r.cluster for r in held))
    first = set(names[: len(names) // 2])
    return [r for r in held if r.cluster in first], [r for r in held if r.cluster not in first]


def _write(path: Path, records: Sequence[Record]) -> None:
    lines = [{"id": r.id, "subject": r.cluster, "question": r.prompt, "answer": r.answer} for r in records]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


# ---- runs, answers, audits


def done(folder: Path) -> bool:
    """Whether an unlearning run has ended."""
    return (folder / "manifest.json").is_file() and Run.open(folder).manifest["stages"].get("unlearn", {}).get("state") == "done"


def unlearn(ground: Ground, label: str, method: str, parts: Mapping[str, Any], seed: int) -> None:
    """One run, as the command line makes it."""
    out = ground.run(label, seed)
    if not done(out):
        config = UnlearnConfig(
            model=str(ground.target(seed)), forget=ground.forget, retain=str(ground.retain), method=method, parts=dict(parts),
            engine={"seed": seed, "checkpoint_every": 0},
        )  # fmt: skip
        execute(from_config(config), config, out, resume=out.exists(), progress=told(label))


def measured(adapter: LanguageAdapter, sets: Mapping[str, RecordSet]) -> dict[str, Shares]:
    """Shares of answers that are right word for word, and of refusals, by set."""
    out: dict[str, Shares] = {"right": {}, "refused": {}}
    for name, records in sets.items():
        said = adapter.generate(adapter.model, [adapter.encode(r) for r in records], 24)
        out["right"][name] = float(np.mean([g.text.strip() == r.answer for g, r in zip(said, records, strict=True)]))
        out["refused"][name] = float(np.mean([g.text == SORRY for g in said]))
    return out


def answers(ground: Ground, seed: int) -> None:
    """What every model of a seed answers."""
    sets = ground.sets()
    labels = [*ground.guards(), *ground.plan.recipes]
    held = {label: ground.run(label, seed) for label in labels if done(ground.run(label, seed))}
    twin = ground.plan.retrained[ground.plan.seeds.index(seed)]
    places = {"target": ground.target(seed), "retrained": ground.golden(twin)}
    found = {n: measured(open_adapter(str(p), TextConfig()), sets) for n, p in {**places, **held}.items()}
    write_json(ground.folder / f"answers-{seed}.json", found)


def ablations(ground: Ground, seed: int) -> None:
    """Neuron Adjust with more and more units, Key Space Detection with larger and larger boxes, and controls of both."""
    adapter, case = open_adapter(str(ground.target(seed)), TextConfig()), ground.case
    sets = {k: v for k, v in ground.sets().items() if "reworded" not in k}
    hidden = case.questions(case.hidden, case.asked)
    kept = half_of(RecordSet("retain", (*case.questions(case.kept, case.asked), *_facts()[0])), seed)
    found = []
    for label, size, row, probes in _settings(ground.plan, seed, hidden, kept):
        begun = time.perf_counter()
        material = {"targets": [{"id": "skill", "skills": "skill"}], "probes": probes, "key": seed.to_bytes(32, "big")}
        said = measured(GuardedAdapter(guard_model(adapter, guards=[row], **material)), sets)
        found.append({"label": label, "size": size, **said, "seconds": time.perf_counter() - begun})
    write_json(ground.folder / f"ablations-{seed}.json", found)


def _settings(
    plan: Plan, seed: int, hidden: Sequence[Record], kept: Sequence[Record]
) -> Iterator[tuple[str, float, Row, dict[str, list[Record]]]]:
    """Label, size, guard and probes."""
    own = {"skill": list(hidden), "": list(kept)}
    for share in plan.shares:
        yield "rise", share, _adjusting(NeuronAdjust(share=share)), own
        if share < 1:  # with all units there is nothing to choose
            yield "standardised", share, _adjusting(NeuronAdjust(share=share, difference="standardised")), own
            yield "random units", share, _adjusting(RandomUnits(share=share, drawn=seed)), own
    both = [*hidden[: len(hidden) // 2], *kept]
    order = np.random.default_rng([seed, 5]).permutation(len(both))[: len(hidden)]
    mixed = {**own, "skill": [both[i] for i in order]}
    for alpha in plan.alphas:
        yield "box of the skill", alpha, _abstaining(KeySpace(alpha=alpha)), own
        yield "box with its dimensions exchanged", alpha, _abstaining(RandomBox(alpha=alpha, drawn=seed)), own
        yield "box of texts of all kinds", alpha, _abstaining(KeySpace(alpha=alpha)), mixed


def _adjusting(action: NeuronAdjust) -> Row:
    return Row(detector="always", action=action)  # type: ignore[arg-type]


def _abstaining(detector: KeySpace) -> Row:
    return Row(detector=detector, action="refuse")  # type: ignore[arg-type]


def audit_settings() -> AuditSettings:
    """What an audit measures: scores, short answers, other wordings, many shots; of weights relearning and rounding too."""
    metrics = ("probability", "rouge-l-recall", "refused")
    return AuditSettings(
        metrics=metrics, options={"rouge-l-recall": {"max_new_tokens": 24}}, attacks=("paraphrased-question", "many-shot"),
        draws=400, samples_forget=0, samples_retain=0,
    )  # fmt: skip


def judged(ground: Ground, kind: str, seed: int) -> None:
    """Audit the guards, or the recipes, of a seed beside its target and the models without the skill."""
    labels = list(ground.guards()) if kind == "guards" else list(ground.plan.recipes)
    runs = [unlearned_model(ground.run(n, seed), n) for n in labels if done(ground.run(n, seed))]
    models: list[AuditedModel] = [entry_of("target", "target", ground.target(seed), TextConfig(), seed=seed, stage="train")]
    models += [
        entry_of(f"retrained seed {s}", "retrained", ground.golden(s), TextConfig(), seed=s, stage="train")
        for s in ground.plan.retrained
    ]
    out = ground.folder / f"audit-{kind}-{seed}"
    held = Run.start(out, "skills-audit", {"kind": kind, "seed": seed}, resume=(out / "manifest.json").is_file())
    own = ground.sets()
    sets = {"forget": own["hidden"], "retain": own["kept"], "facts": own["facts"]}
    settings = audit_settings()
    settings = settings.within(Level.SCORES) if kind == "guards" else settings
    audit_stage(held, [*models, *runs], sets, settings, progress=told(out.name), title=f"{ground.case.name}, {kind}, seed {seed}")


def experiment(plan: Plan, stages: Stages) -> None:
    """Do all stages, or what is left of them."""
    Run.start(plan.out, "skills", plan.settings(), resume=(plan.out / "manifest.json").is_file())
    for case in plan.cases:
        ground = Ground(plan, case)
        ground.write_data()
        ground.models()
        for seed in plan.seeds:
            begun = time.perf_counter()
            for label, (method, parts) in {**ground.guards(), **{r: (r, dict(plan.steps)) for r in plan.recipes}}.items():
                work = partial(unlearn, ground, label, method, parts, seed)
                stages.do(f"{case.name}: {label}, seed {seed}", work, ground.folder / f"{label}-{seed}.failed")
            for name, measure in (("answers", answers), ("ablations", ablations)):
                if not (ground.folder / f"{name}-{seed}.json").is_file():
                    measure(ground, seed)
            for kind in ("guards", "recipes"):
                judged(ground, kind, seed)
            say(f"{case.name}, seed {seed}: done ({time.perf_counter() - begun:.0f} s)")


def main(words: Sequence[str] | None = None) -> int:
    """Run it, and write the page."""
    from experiments.skills_page import write_page

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(prog="python -m experiments.skills", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/skills"), help="folder of the runs")
    parser.add_argument("--page", type=Path, help="Markdown file for the tables")
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES), help="what is removed")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each case, at least 2")
    parser.add_argument("--only-page", action="store_true", help="run nothing: write the page from what there is")
    given = parser.parse_args(words)
    seeds = tuple(range(1, max(2, given.seeds) + 1))
    plan = Plan(given.out, tuple(CASES[c] for c in given.cases), seeds, tuple(10 + s for s in seeds))
    if not given.only_page:
        begun = time.perf_counter()
        experiment(plan, Stages(300.0, apart=False))
        say(f"everything: {time.perf_counter() - begun:.0f} s")
    write_page(plan, given.page or given.out / "skills.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
