"""The same data learnt in another order, then the same request: how far do the results lie apart?

Usage, from the repository root::

    python -m experiments.paths --out runs/paths --page docs/results/path-dependence.md

After *On the Impossibility of Retrain Equivalence in Machine Unlearning* (2025, arXiv 2510.16629): what a method leaves that
reads gradients of the forget set alone depends on the order in which the target learnt its stages, so no tolerance of "as if
retrained" can hold for every path. Here a small model learns three stages of fictitious people, one of which is to be
forgotten; that one comes first, second or last, and the order of the others is fixed. Optimiser and schedule begin anew with
each stage. Each model then forgets by gradient ascent (local) and by gradient difference (with retain data), with equal steps
and seeds. The spread between the paths stands next to that between seeds of one path, which is what a single retrained model
hides.

The paper's theorem for linear regression is here too (:func:`linear_paths`), as the check of the theory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build as build_model
from expunge.adapters.tokenise import DEFAULT_TEMPLATE
from expunge.adapters.words import word_tokenizer
from expunge.core.access import Stream
from expunge.core.files import write_json, write_text
from expunge.core.runs import versions
from expunge.data.people import split_people
from expunge.data.records import Record
from expunge.engine.loop import train
from expunge.engine.objective import mean_losses
from expunge.engine.options import Engine
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.recipe import build
from expunge.methods.terms.likelihood import NLL

Floats = npt.NDArray[np.float64]
ALPHA = 0.05  #: p-value up to which paths are said to differ; not corrected for the number of measures
LOCAL, WITH_RETAIN = "gradascent", "graddiff"
MEASURES = {
    "known": "loss of the forget answers before",
    "forgotten": "rise of the loss of the forget answers",
    "reworded": "rise of the loss of the same facts in other words",
    "damage": "rise of the loss of what is kept",
    "distance": "distance from retrained models",
}


@dataclass(frozen=True)
class Plan:
    """What the result depends on."""

    persons: int = 18
    facts: int = 6
    seeds: tuple[int, ...] = (1, 2, 3)
    lr: float = 4e-3
    epochs: int = 16
    batch: int = 12
    unlearn_lr: float = 5e-4
    steps: int = 15
    model: str = "llama-tiny"
    methods: tuple[str, ...] = (LOCAL, WITH_RETAIN)


# ---- the theory: two stages of ridge regression, then ascent on rows of the first


@dataclass(frozen=True)
class LinearPaths:
    """Two orders of two stages of linear regression, and the ascent on forget rows after both.

    Attributes:
        log_distance: log of ``||X_test (theta_AB^t - theta_BA^t)||^2 / m`` for each step ``t``, from 0.
        log_bound: log of the theorem's lower bound, ``sigma^2 ||P D||^2 / (4 m) (1 + rho)^(2 t)``.
        largest: largest eigenvalue of ``M = (2 eta / k) X_U' X_U``; the distance grows by ``2 log(1 + largest)`` a step at last.
        rho: Rayleigh quotient of ``M`` at ``P D``.
    """

    log_distance: Floats
    log_bound: Floats
    largest: float
    rho: float


def ridge(x: Floats, y: Floats, start: Floats, mu: float) -> Floats:
    """``argmin ||x theta - y||^2 + mu ||theta - start||^2``."""
    solved = np.linalg.solve(x.T @ x + mu * np.eye(x.shape[1]), x.T @ y + mu * start)
    return np.asarray(solved, dtype=np.float64)


def linear_paths(
    *,
    d: int = 60,
    rows: int = 15,
    k: int = 5,
    mu: float = 1.0,
    eta: float = 0.05,
    steps: int = 60,
    seed: int = 0,
    same: bool = False,
) -> LinearPaths:
    """The theorem's setting with Gaussian data.

    Args:
        d: unknowns, more than rows in both stages.
        rows: of each stage.
        k: rows of the first stage that are to be forgotten.
        mu: weight of the proximal term.
        eta: step of the ascent on ``(1/k) ||X_U theta - y_U||^2``.
        steps: of the ascent.
        seed: of the data.
        same: take the same order twice.
    """
    rng = np.random.default_rng(seed)
    stages = [(rng.normal(size=(rows, d)), rng.normal(size=rows)) for _ in range(2)]
    test = rng.normal(size=(2 * d, d))
    order = stages if same else stages[::-1]

    def learnt(path: Sequence[tuple[Floats, Floats]]) -> Floats:
        theta = np.zeros(d)
        for x, y in path:
            theta = ridge(x, y, theta, mu)
        return theta

    ends = [learnt(stages), learnt(order)]
    forget, answers = stages[0][0][:k], stages[0][1][:k]
    delta = ends[0] - ends[1]
    found = []
    for _ in range(steps + 1):
        apart = test @ (ends[0] - ends[1])
        found.append(float(apart @ apart) / len(test))
        ends = [theta + (2 * eta / k) * forget.T @ (forget @ theta - answers) for theta in ends]
    basis = np.linalg.svd(forget, full_matrices=False)[2]  # of the row space
    moved, matrix = basis.T @ (basis @ delta), (2 * eta / k) * forget.T @ forget
    norm = float(moved @ moved)
    rho = float(moved @ matrix @ moved) / norm if norm else 0.0
    sigma = float(np.linalg.svd(test @ basis.T, compute_uv=False).min())
    with np.errstate(divide="ignore"):
        bound = np.log(sigma**2 * norm / (4 * len(test))) + 2 * np.arange(steps + 1) * math.log1p(rho)
        return LinearPaths(np.log(np.array(found)), bound, float(np.linalg.eigvalsh(matrix).max()), rho)


# ---- the spreads


@dataclass(frozen=True)
class Spread:
    """How values of several paths, with several seeds each, are spread.

    Attributes:
        means: of each path.
        between: standard deviation of the paths' means.
        within: standard deviation between seeds of one path, pooled over the paths.
        chance: what ``between`` would be about if the path did not matter: ``within / sqrt(seeds)``.
        p: share of the reassignments of values to paths with so large a ``between`` (all of them where they are few).
    """

    means: dict[str, float]
    between: float
    within: float
    chance: float
    p: float


def spread(values: Mapping[str, Sequence[float]], draws: int = 5000, seed: int = 0) -> Spread:
    """The spread between and within paths.

    Args:
        values: by path, one for each seed; equally many.
        draws: random reassignments, for the p-value.
        seed: of these.
    """
    table = np.array([list(v) for v in values.values()], dtype=float)
    between = float(np.std(table.mean(1), ddof=1))
    within = math.sqrt(float(np.mean(np.var(table, axis=1, ddof=1))))
    rng = np.random.default_rng(seed)
    drawn = np.array([np.std(rng.permutation(table.ravel()).reshape(table.shape).mean(1), ddof=1) for _ in range(draws)])
    p = float((1 + np.sum(drawn >= between - 1e-12)) / (1 + draws))
    means = dict(zip(values, table.mean(1).tolist(), strict=True))
    return Spread(means, between, within, within / math.sqrt(table.shape[1]), p)


# ---- the models


@dataclass(frozen=True)
class Town:
    """The stages, and what is measured on."""

    plan: Plan
    forget: tuple[Record, ...]
    others: tuple[tuple[Record, ...], tuple[Record, ...]]
    tokenizer: Any

    @classmethod
    def of(cls, plan: Plan) -> Town:
        """A third of the people is to be forgotten; the others are divided into two stages."""
        split = split_people(persons=plan.persons, forget=plan.persons // 3, holdout=2, seed=1, facts=plan.facts)
        kept = sorted({r.subject for r in split.retain})
        half = set(kept[: len(kept) // 2])
        stages = tuple(tuple(r for r in split.retain if (r.subject in half) is first) for first in (True, False))
        texts = [
            t for r in (*split.forget, *split.retain) for t in (r.prompt, r.answer, r.paraphrase, r.question_paraphrase) if t
        ]
        return cls(plan, tuple(split.forget), (stages[0], stages[1]), word_tokenizer([*texts, DEFAULT_TEMPLATE]))

    @property
    def kept(self) -> list[Record]:
        """All records of the stages that stay."""
        return [*self.others[0], *self.others[1]]

    @property
    def reworded(self) -> list[Record]:
        """The forget facts, asked and answered in other words."""
        asked = [r for r in self.forget if r.paraphrase and r.question_paraphrase]
        return [dataclasses.replace(r, id=f"{r.id}-said", prompt=r.question_paraphrase, answer=r.paraphrase) for r in asked]

    def orders(self) -> dict[str, list[tuple[Record, ...]]]:
        """The stages in each order: what is to be forgotten comes first, second, or last."""
        out = {}
        for place, name in enumerate(("first", "second", "last")):
            stages = list(self.others)
            stages.insert(place, self.forget)
            out[name] = stages
        return out

    def learnt(self, stages: Sequence[Sequence[Record]], seed: int) -> LanguageAdapter:
        """A model from random weights that has learnt the stages one after the other, each with a new optimiser."""
        plan = self.plan
        adapter = LanguageAdapter(build_model(plan.model, self.tokenizer, seed=seed), self.tokenizer)
        schedule = Fixed(lr=plan.lr, epochs=plan.epochs, batch=plan.batch, warmup=0.1, weight_decay=0.01)
        for number, records in enumerate(stages):
            recipe = compose("train", retain=[NLL()], schedule=schedule)
            train(adapter, recipe, {Stream.RETAIN: [adapter.encode(r) for r in records]}, Engine(seed=10 * seed + number))
        return adapter

    def unlearned(self, target: LanguageAdapter, method: str) -> LanguageAdapter:
        """A copy that has been taken through the method, with the same few steps and the same order of examples for all."""
        plan, made = self.plan, target.copy()
        steps = {"name": "fixed", "lr": plan.unlearn_lr, "epochs": None, "steps": plan.steps, "batch": 8, "warmup": 0}
        streams = {Stream.FORGET: [made.encode(r) for r in self.forget], Stream.RETAIN: [made.encode(r) for r in self.kept]}
        train(made, build(method, {"schedule": steps}), streams, Engine(seed=0))
        return made

    def losses(self, adapter: LanguageAdapter, records: Sequence[Record]) -> Floats:
        """Mean loss per token of each record."""
        return np.array(mean_losses(adapter, adapter.model, [adapter.encode(r) for r in records], 8192))


def experiment(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Train every path with every seed, forget by every method, and measure."""
    town = Town.of(plan)
    sets = {"forget": town.forget, "reworded": town.reworded, "kept": town.kept}
    started = time.perf_counter()
    gold = [town.learnt(town.others, 100 + s) for s in plan.seeds]  # without the stage, the order of the rest is one and the same
    retrained = {name: np.mean([town.losses(g, records) for g in gold], axis=0) for name, records in sets.items()}
    values: dict[str, dict[str, dict[str, list[float]]]] = {m: {k: {} for k in MEASURES} for m in plan.methods}
    for order, stages in town.orders().items():
        for seed in plan.seeds:
            target = town.learnt(stages, seed)
            before = {name: town.losses(target, records) for name, records in sets.items()}
            for method in plan.methods:
                model = town.unlearned(target, method)
                after = {name: town.losses(model, records) for name, records in sets.items()}
                apart = np.concatenate([after[n] - retrained[n] for n in ("forget", "kept")])
                row = {
                    "known": before["forget"].mean(), "forgotten": (after["forget"] - before["forget"]).mean(),
                    "reworded": (after["reworded"] - before["reworded"]).mean(),
                    "damage": (after["kept"] - before["kept"]).mean(), "distance": math.sqrt(float(np.mean(apart**2))),
                }  # fmt: skip
                for key, value in row.items():
                    values[method][key].setdefault(order, []).append(float(value))
            say(f"the stage comes {order}, seed {seed}: done ({time.perf_counter() - started:.0f} s)")
    return {
        "made": time.strftime("%Y-%m-%d"), "plan": dataclasses.asdict(plan), "versions": versions(),
        "seconds": time.perf_counter() - started, "forget": len(town.forget), "kept": len(town.kept),
        "retrained_forget_loss": float(retrained["forget"].mean()), "values": values,
    }  # fmt: skip


# ---- the page

_HEAD = """# The order of training decides what unlearning leaves

<!-- written by experiments/paths.py -->

A model is trained in stages: what it learns first, and what last, is an accident. *On the Impossibility of Retrain
Equivalence in Machine Unlearning* ([arXiv 2510.16629](https://arxiv.org/abs/2510.16629)) shows that a method which reads the
forget set alone cannot lead all such models to the same result. This page shows how much of that there is in one small case,
next to the noise of training.

## What was done

A `{model}` learns three stages of fictitious people from random weights: {forget} records that are to be forgotten, and two
stages with {kept} records together that stay. The stage to be forgotten comes first, second or last. Each path is trained
with {seeds} seeds; optimiser and schedule begin anew with each stage. Then {steps} steps of gradient ascent (`gradascent`),
which reads the forget set alone, or of gradient difference (`graddiff`), which reads the kept records too, at one learning
rate ({unlearn_lr}). Losses are means per answer token, in nats. The distance from retrained models is the root mean square,
over forget and kept records, of the difference from the mean loss of {seeds} models that never had the stage (their loss of
the forget records: {retrained:.2f}).

*Between paths* is the standard deviation of the three paths' means; *between seeds* that of the seeds of one path, pooled. If
the order did not matter, the first would be about *by chance*. *p* is the share of random reassignments of models to paths
that are spread as widely.
"""

_TAIL = """
## How to read it

- The paths differ before anything is forgotten: what was learnt first has been partly overwritten by what came after.
  Rises are counted from there, and a part of their spread is this one.
- The p-values are not corrected for the number of measures.
- One target and one seed show a single cell of these tables. A verdict about one model holds for that model, and says nothing
  of another that learnt the same records in another order.
- {seeds} seeds for each path are few, the model is tiny, and learning rate and steps are the same for all paths: a schedule
  that stops at a goal would even out a part of the spread.
- The theorem is about ascent in linear regression. In that setting (60 unknowns, two stages of 15 rows, ascent at 0.05 on 5
  rows) the squared distance between the two paths grows by {slope:.3f} on the log scale a step at last, and 2 log(1 + largest
  eigenvalue) is {theory:.3f}.

## Again

```sh
OMP_NUM_THREADS=1 python -m experiments.paths --out runs/paths --page docs/results/path-dependence.md
```

Made on {made} with expunge {version} in {seconds:.0f} seconds, on one CPU core that other work shared.
"""


def page(found: Mapping[str, Any]) -> str:
    """The page that shows a result."""
    plan, tables = found["plan"], []
    for method, measures in found["values"].items():
        kind = "the forget set alone" if method == LOCAL else "with retain data"
        lines = ["| | first | second | last | between paths | between seeds | by chance | p |", "| --- |" + " ---: |" * 7]
        told: dict[bool, list[str]] = {True: [], False: []}
        for what, values in _measured(measures).items():
            s = spread(values)
            means = " | ".join(f"{m:.2f}" for m in s.means.values())
            lines.append(f"| {what} | {means} | {s.between:.2f} | {s.within:.2f} | {s.chance:.2f} | {s.p:.3f} |")
            told[s.p <= ALPHA].append(what)
        tables.append(f"## `{method}`: {kind}\n\n" + "\n".join(lines) + f"\n\n{_told(told)}")
    head = _HEAD.format(
        model=plan["model"], forget=found["forget"], kept=found["kept"], seeds=len(plan["seeds"]), steps=plan["steps"],
        unlearn_lr=plan["unlearn_lr"], retrained=found["retrained_forget_loss"],
    )  # fmt: skip
    theory = linear_paths()
    tail = _TAIL.format(
        seeds=len(plan["seeds"]), made=found["made"], version=found["versions"]["expunge"], seconds=found["seconds"],
        slope=theory.log_distance[-1] - theory.log_distance[-2], theory=2 * math.log1p(theory.largest),
    )  # fmt: skip
    return head + "\n" + "\n\n".join(tables) + "\n" + tail


def _measured(measures: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, list[float]]]:
    """The measures by their names on the page, with the loss after beside the loss before."""
    out = {MEASURES["known"]: {order: list(v) for order, v in measures["known"].items()}}
    out["loss of the forget answers after"] = {
        order: [before + rise for before, rise in zip(v, measures["forgotten"][order], strict=True)]
        for order, v in measures["known"].items()
    }
    return out | {MEASURES[key]: {o: list(v) for o, v in measures[key].items()} for key in MEASURES if key != "known"}


def _told(told: Mapping[bool, Sequence[str]]) -> str:
    """Which measures the paths differ in by more than seeds do."""
    beyond, not_beyond = ("; ".join(told[k]) for k in (True, False))
    first = (
        f"The paths differ by more than seeds (p at most {ALPHA}) in: {beyond}." if beyond else "No measure differs beyond seeds."
    )
    return first + (f" They are not shown to in: {not_beyond}." if not_beyond and beyond else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run it, or read the result that is there, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.paths", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the result, paths.json; read if it holds one")
    parser.add_argument("--page", type=Path, help="page to write")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each path, at least 2")
    given = parser.parse_args(argv)
    plan = Plan(seeds=tuple(range(1, max(2, given.seeds) + 1)))
    file = given.out / "paths.json"
    held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if held is None or held["plan"] != json.loads(json.dumps(dataclasses.asdict(plan))):
        held = experiment(plan, lambda text: print(text, file=sys.stderr))
        given.out.mkdir(parents=True, exist_ok=True)
        write_json(file, held)
    if given.page is not None:
        write_text(given.page, page(json.loads(json.dumps(held))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
