"""Classifiers of MNIST and CIFAR-10 from start to end: train, retrain, unlearn by many methods with five seeds, audit, tables.

Usage, from the repository root::

    python -m experiments.rows_small --mnist FOLDER --cifar10 FOLDER --out runs/rows-small --page PAGE.md

Two requests for each data set: a tenth of the rows drawn at random, and one class. Seed s is that of the target's training and of
the method: five targets, each unlearned by every method. All are compared with the same retrained models, and with reference
models that are never judged. Every stage is a run folder below ``--out`` (trained models are in the cache): what is done is not
done again, and a killed stage goes on where it stopped. Nothing about a method is set here but its name and seed; those that only
train on retained rows get a schedule at the rate of the original training (:data:`SHARES`), set before anything was audited.

Of the unseen rows some tell the methods when to stop; the others are left to the audit.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.rows_data import SOURCES, Source, problem
from expunge.adapters.supervised import SupervisedAdapter
from expunge.audit.document import AuditDocument
from expunge.audit.kernel.klom import klom
from expunge.audit.kernel.likelihood import u_lira
from expunge.audit.outputs import References, row_outputs
from expunge.audit.run import AuditedModel
from expunge.audit.settings import AuditSettings
from expunge.audit.store import ScoreStore
from expunge.core.errors import ExpungeError
from expunge.core.files import write_text
from expunge.core.runs import Run, cache_folder
from expunge.data.records import RecordSet
from expunge.data.rows import Indices, Row
from expunge.engine.options import Engine
from expunge.pipeline import row_runs
from expunge.pipeline.row_audit import RowAuditConfig, audited, comparison, measure
from expunge.pipeline.row_runs import RowsConfig
from expunge.pipeline.supervised import Supervised, member

METHODS = (
    "retrain", "finetune", "gradascent", "neggrad-plus", "random-label", "salun", "ssd", "scrub", "bad-teacher", "npo",
    "l1-sparse", "prune-finetune", "iau", "influence", "fisher", "laf", "boundary-shrink", "boundary-expand", "unsir",
)  # fmt: skip
#: Steps as a share of the original training's, at its rate, for methods without a forget term: nothing tells them when to stop.
SHARES = {"retrain": 1.0, "finetune": 0.5, "l1-sparse": 0.5, "prune-finetune": 0.5}
CLASS_ONLY = ("boundary-shrink", "boundary-expand", "unsir")  #: methods for whole classes
REQUESTS = ("class", "random")
POOLED = "pooled.json"
_STEER = 300  #: unseen rows that tell the methods when to stop

Sets = Mapping[str, RecordSet[Row]]


@dataclass(frozen=True)
class Plan:
    """What the experiment depends on.

    Attributes:
        out: folder of the runs.
        sources: data sets by name, with the folder of each.
        rows: rows that are trained on, by data set.
        unseen: unseen rows for the audit.
        retained: rows of the retain set that the audit looks at, drawn once.
        seeds: of targets and methods.
        retrained: retrained models that all are compared with; seeds 1, 2, ...
        references: further models trained with and without the forget rows, of each so many.
        methods: names, in the order in which they are run.
        requests: "class", "random".
        skip: what is left out, such as ``cifar10/random/bad-teacher``.
        known: data sets that may be named.
    """

    out: Path
    sources: Mapping[str, Path]
    rows: Mapping[str, int] = field(default_factory=lambda: {"mnist": 2000, "cifar10": 600})
    unseen: int = 1000
    retained: int = 800
    seeds: tuple[int, ...] = (11, 12, 13, 14, 15)
    retrained: int = 5
    references: int = 5
    methods: tuple[str, ...] = METHODS
    requests: tuple[str, ...] = REQUESTS
    skip: tuple[str, ...] = ()
    known: Mapping[str, Source] = field(default_factory=lambda: SOURCES)

    def audit(self) -> RowAuditConfig:
        """What is measured: nothing is trained or rounded on copies, so no verdict can be "forgotten" and none is asked for."""
        settings = AuditSettings(
            metrics=("accuracy", "average-gap", "mia-efficacy", "looks-seen", "klom", "representation"),
            options={"representation": {"rows": 500}}, draws=100, relearn=None, quantise=(), samples_forget=0, samples_retain=0,
        )  # fmt: skip
        return RowAuditConfig(retrain=self.retrained, references=self.references, settings=settings)

    def asked(self, name: str) -> tuple[str, ...]:
        """The methods of a request such as ``mnist/class``."""
        whole = name.endswith("/class")
        return tuple(m for m in self.methods if (whole or m not in CLASS_ONLY) and f"{name}/{m}" not in self.skip)


@dataclass(frozen=True)
class Request:
    """One data set, one request.

    Attributes:
        name: such as ``mnist/class``.
        source: the data set.
        problem: rows to train on, and the unseen rows that steer.
        targets: the trained models by seed.
        chosen: the forget rows.
        choice: the same as a configuration says it.
        sets: what is audited.
        place: its folder.
    """

    name: str
    source: Source
    problem: Supervised
    targets: Mapping[int, SupervisedAdapter]
    chosen: Indices
    choice: Mapping[str, Any]
    sets: Sets
    place: Path


@dataclass(frozen=True)
class Result:
    """What a request leaves: one audit for each seed, what is computed from all seeds together, and what failed."""

    request: Request
    documents: Mapping[int, AuditDocument]
    pooled: Mapping[str, Mapping[str, float]]
    failed: Mapping[str, str]
    seconds: Mapping[str, float]


def experiment(plan: Plan) -> list[Result]:
    """Do all stages, or what is left of them."""
    return [_finish(plan, request) for name in plan.sources for request in _requests(plan, name)]


def _requests(plan: Plan, name: str) -> list[Request]:
    """Read the data, train the targets, and run every method on every request."""
    source, place = plan.known[name], plan.out / name
    place.mkdir(parents=True, exist_ok=True)
    whole = problem(source, plan.sources[name], place / "data", plan.rows[name], plan.unseen + _STEER)
    held, unseen = _divided(whole)
    trained = held.trained(None, list(plan.seeds), progress=told(f"{name}: targets"), what="")
    targets = {seed: held.adapter(member(held, trained, i)) for i, seed in enumerate(plan.seeds)}
    made = []
    for kind in plan.requests:
        choice = _choice(kind, source, held)
        chosen = RowsConfig(model=name, **choice).choose(held.data)
        sets = _sets(held, unseen, chosen, plan.retained)
        made.append(Request(f"{name}/{kind}", source, held, targets, chosen, choice, sets, place / kind))
        for method in plan.asked(made[-1].name):
            for seed in plan.seeds:
                _unlearn(plan, made[-1], method, seed)
    return made


def _divided(whole: Supervised) -> tuple[Supervised, Supervised]:
    """The problem with the unseen rows that steer, and with those that are audited."""
    assert whole.holdout is not None
    order = np.random.default_rng(1).permutation(len(whole.holdout))
    steer, rest = np.sort(order[:_STEER]), np.sort(order[_STEER:])
    return tuple(dataclasses.replace(whole, holdout=whole.holdout.subset(i)) for i in (steer, rest))  # type: ignore[return-value]


def _choice(kind: str, source: Source, held: Supervised) -> dict[str, Any]:
    if kind == "class":
        return {"classes": (source.gone,)}
    drawn = np.sort(np.random.default_rng(2).choice(len(held.data), len(held.data) // 10, replace=False))
    return {"ids": tuple(held.data.ids[i] for i in drawn)}


def _sets(held: Supervised, unseen: Supervised, chosen: Indices, retained: int) -> dict[str, RecordSet[Row]]:
    """Forget rows, some retained ones, unseen rows of the forgotten kind (holdout) and of what is kept (test)."""
    data, rows = held.data, unseen.holdout
    assert rows is not None
    kept = data.others(chosen)
    kept = np.sort(np.random.default_rng(3).permutation(kept)[:retained])
    gone = [data.classes.index(c) for c in data.emptied(chosen)]
    alike = np.isin(rows.targets, gone) if gone else np.ones(len(rows), dtype=bool)
    test = ~alike if gone else alike
    return {
        "forget": data.rows(chosen, "forget"), "retain": data.rows(kept, "retain"),
        "holdout": rows.rows(np.flatnonzero(alike), "holdout"), "test": rows.rows(np.flatnonzero(test), "test"),
    }  # fmt: skip


def _unlearn(plan: Plan, request: Request, method: str, seed: int) -> None:
    """One run; one that fails is recorded in its folder and does not stop the others."""
    out = request.place / method / f"seed-{seed}"
    failure = out.with_suffix(".failed")
    if failure.is_file() or _done(out):
        return
    config = _config(request, method, seed)
    # A copy: a run changes the weights of the model that it is given.
    one = dataclasses.replace(request.problem, model=copy.deepcopy(request.targets[seed].model))
    label = f"{request.name}: {method}, seed {seed}"
    try:
        made = row_runs.execute(row_runs.plan(config, one), out, resume=(out / "manifest.json").is_file())
    except ExpungeError as error:
        failure.parent.mkdir(parents=True, exist_ok=True)
        write_text(failure, str(error))
        say(f"{label}: FAILED: {error}")
        return
    found = made.manifest["stages"]["unlearn"]["result"]
    say(f"{label}: {found['sentence']} ({found['seconds']:.1f} s)")


def _config(request: Request, method: str, seed: int) -> RowsConfig:
    """The method's name and seed; and for what only trains, a schedule: as long as a share of the original training."""
    training, parts = request.source.training, dict[str, Any]()
    if method in SHARES:
        parts["schedule"] = {
            "name": "fixed", "lr": training.lr, "epochs": None, "steps": max(1, round(SHARES[method] * training.steps)),
            "batch": training.batch, "warmup": 0, "decay": training.decay, "weight_decay": training.weight_decay,
        }  # fmt: skip
    return RowsConfig(
        model=f"{request.name}, target of seed {seed}", method=method, parts=parts,
        engine=Engine(seed=seed, checkpoint_every=0, device="cpu"), **request.choice,
    )  # fmt: skip


def _done(out: Path) -> bool:
    return (out / "manifest.json").is_file() and Run.open(out).manifest["stages"].get("unlearn", {}).get("state") == "done"


def _finish(plan: Plan, request: Request) -> Result:
    """Audit the methods that ran with every seed, seed by seed and together."""
    config = plan.audit()
    failed = {
        m: next(path for path in sorted((request.place / m).glob("*.failed"))).read_text(encoding="utf-8")
        for m in plan.asked(request.name)
        if list((request.place / m).glob("*.failed"))
    }
    methods = [m for m in plan.asked(request.name) if m not in failed]
    runs = {(m, s): Run.open(request.place / m / f"seed-{s}") for m in methods for s in plan.seeds}
    audits = request.place / "audit"
    held = Run.start(audits, "rows-small", {"name": request.name}, resume=(audits / "manifest.json").is_file())
    inputs = {
        "targets": {str(s): t.fingerprint() for s, t in request.targets.items()},
        "sets": {k: v.digest for k, v in request.sets.items()}, "config": config.model_dump(mode="json"),
        "runs": {f"{m} {s}": run.manifest["stages"]["unlearn"]["outputs"] for (m, s), run in runs.items()},
    }  # fmt: skip
    names = [f"audit-{s}.json" for s in plan.seeds]

    def work() -> dict[str, Any]:
        first = request.targets[plan.seeds[0]]
        gold, references = comparison(
            request.problem, first, request.chosen, request.sets, config, progress=told(f"{request.name}: retraining")
        )
        assert references is not None
        groups: dict[str, list[AuditedModel]] = {"retrained": gold}
        for name, seed in zip(names, plan.seeds, strict=True):
            target = request.targets[seed]
            models = [AuditedModel("target", "target", target, seed=seed), *gold]
            models += [audited(runs[m, seed], target, label=m) for m in methods]
            for model in models:
                if model.role != "retrained":
                    groups.setdefault(model.label, []).append(model)
            title = f"{request.source.title}, {request.name.rpartition('/')[2]}, seed {seed}"
            document = measure(models, request.sets, config.settings, references, progress=told(f"{title}: audit"), title=title)
            write_text(audits / name, document.model_dump_json(indent=2) + "\n")
            say(f"{title}: audited")
        found = pooled(groups, request.sets, references, config.settings)
        write_text(audits / POOLED, json.dumps(found, indent=2) + "\n")
        return {"methods": methods}

    held.stage("audit", inputs, work, [*names, POOLED])
    documents = {
        s: AuditDocument.model_validate_json((audits / n).read_text(encoding="utf-8"))
        for s, n in zip(plan.seeds, names, strict=True)
    }
    seconds = {"unlearning": sum(r.manifest["stages"]["unlearn"]["seconds"] for r in runs.values())}
    seconds["retraining, references and audit"] = held.manifest["stages"]["audit"]["seconds"]
    return Result(request, documents, json.loads((audits / POOLED).read_text(encoding="utf-8")), failed, seconds)


def pooled(
    groups: Mapping[str, Sequence[AuditedModel]], sets: Sets, references: References, settings: AuditSettings
) -> dict[str, dict[str, float]]:
    """What needs the models of all seeds of a method at once.

    The retrained models are compared with the reference models that were trained in the same way: that is the floor.

    Args:
        groups: models by method; ``retrained`` among them.
        sets: what is audited.
        references: margins under reference models.
        settings: of the audit whose scores in the cache are read.

    Returns:
        By group: ``klom.<set>``, mean over rows in nats, of the group's models against the retrained references; ``u-lira``,
        accuracy at telling the group's models from the retrained ones by a forget row (the retrained ones: from references).
    """
    margins = {g: {n: _margins(held, rows, settings) for n, rows in sets.items()} for g, held in groups.items()}
    out: dict[str, dict[str, float]] = {}
    for group, own in margins.items():
        without = references.retrained
        found = {f"klom.{n}": float(np.mean(klom(own[n], without[n], bins=max(2, len(without[n]) // 4)))) for n in sets}
        other = without["forget"] if group == "retrained" else margins["retrained"]["forget"]
        size = min(len(own["forget"]), len(other))
        if size >= 3:
            found["u-lira"] = u_lira(own["forget"][:size], other[:size]).accuracy
        out[group] = found
    return out


def _margins(models: Sequence[AuditedModel], rows: RecordSet[Row], settings: AuditSettings) -> np.ndarray[Any, Any]:
    """Margins ``[models, n]``, from the cache of the audits."""
    store, found = ScoreStore(cache_folder() / "scores"), []
    for model in models:
        adapter: Any = model.adapter
        held = row_outputs(adapter, rows, store=store, fingerprint=adapter.fingerprint(), batch_tokens=settings.batch_tokens)
        found.append(held.margins)
    return np.stack(found)


_STARTED = time.perf_counter()


def say(text: str) -> None:
    """A line with the time since the start, on standard error."""
    sys.stderr.write(f"[{time.perf_counter() - _STARTED:7.0f} s] {text}\n")
    sys.stderr.flush()


def told(name: str) -> Callable[[int, int, str], None]:
    """A progress callback that writes a line every half minute at most."""
    last = time.perf_counter()

    def tell(done: int, total: int, text: str = "") -> None:
        nonlocal last
        if time.perf_counter() - last > 30:
            last = time.perf_counter()
            say(f"{name}: {done} of {total} {text}".rstrip())

    return tell


def parse(words: Sequence[str] | None = None) -> tuple[Plan, Path | None]:
    """The plan that the command line gives, and where the page goes."""
    default = Plan(Path(), {})
    parser = argparse.ArgumentParser(prog="python -m experiments.rows_small", description=__doc__.partition("\n")[0])
    parser.add_argument("--mnist", type=Path, help="folder of MNIST's idx files; none: left out")
    parser.add_argument("--cifar10", type=Path, help="folder of CIFAR-10 as images, train/ and test/ or archives; none: left out")
    parser.add_argument("--out", type=Path, default=Path("runs/rows-small"), help="folder of the runs")
    parser.add_argument("--page", type=Path, help="Markdown file for the tables")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(default.seeds), help="seeds of targets and methods")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="methods")
    parser.add_argument("--requests", nargs="+", default=list(REQUESTS), choices=REQUESTS, help="requests")
    parser.add_argument("--skip", nargs="*", default=[], help="what is left out, such as cifar10/random/bad-teacher")
    parser.add_argument("--references", type=int, default=default.references, help="reference models of each kind")
    parser.add_argument("--rows", nargs=2, type=int, default=list(default.rows.values()), help="training rows of each data set")
    given = parser.parse_args(words)
    sources = {name: path for name, path in (("mnist", given.mnist), ("cifar10", given.cifar10)) if path is not None}
    if not sources:
        parser.error("give --mnist FOLDER, --cifar10 FOLDER or both")
    return Plan(
        given.out, sources, rows=dict(zip(default.rows, given.rows, strict=True)), seeds=tuple(given.seeds),
        references=given.references, methods=tuple(given.methods), requests=tuple(given.requests), skip=tuple(given.skip),
    ), given.page  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Run the experiment and write the page."""
    plan, page = parse(words)
    try:
        results = experiment(plan)
    except ExpungeError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    from experiments.rows_page import write_page  # it imports this module

    write_page(plan, results, page or plan.out / "page.md")
    say(f"done: {page or plan.out / 'page.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
