"""A benchmark as a run: data, target, reference, methods, axes, verdict; every stage is one of the pipeline's, and resumable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expunge.audit.document import AuditDocument
from expunge.audit.run import AuditedModel
from expunge.audit.scores import Progress as Telling
from expunge.audit.store import ScoreStore
from expunge.benchmarks import courses
from expunge.benchmarks.config import SMALL_TRAINING, BenchmarkConfig
from expunge.benchmarks.document import DOCUMENT, BenchmarkDocument, read
from expunge.benchmarks.measure import measure
from expunge.benchmarks.registry import Benchmark, Roles, Training
from expunge.core.errors import InputError
from expunge.core.files import write_text
from expunge.core.runs import Run, cache_folder
from expunge.data.records import Record, RecordSet
from expunge.engine.outcome import Progress
from expunge.engine.parts import Recipe
from expunge.engine.schedule import Adaptive
from expunge.methods.edits.registry import EDITS
from expunge.methods.recipe import build as build_recipe
from expunge.pipeline import audit as auditing
from expunge.pipeline import train as training
from expunge.pipeline import unlearn as unlearning
from expunge.pipeline.config import TrainConfig, UnlearnConfig, merge
from expunge.pipeline.models import check_source, load_set
from expunge.pipeline.workers import Job, run_jobs

Bars = Callable[[str], AbstractContextManager[Progress | None]]


@dataclass(frozen=True)
class Stage:
    """One thing that a run does: what it is called, where it goes, whether an earlier run has done it, and what it costs."""

    name: str
    folder: Path
    done: bool
    cost: str = ""


@dataclass
class Plan:
    """A benchmark run that has passed every check and has not begun.

    Attributes:
        config, benchmark: what is run.
        out: folder of the run.
        sets: all sets by name, checked against the schema.
        trainings: the steps to the target, with their folders; empty if it is given.
        gold: the retrained models to be trained, by label, with their folders in the cache.
        yardsticks: further trainings of the target that are shown as oracles, by label, with their folders.
        unlearnings: the methods' configurations by label, with their folders.
        notes: what is not there, and what follows from it.
    """

    config: BenchmarkConfig
    benchmark: Benchmark
    out: Path
    sets: dict[str, RecordSet]
    trainings: dict[str, tuple[TrainConfig, Path]]
    gold: dict[str, tuple[TrainConfig, Path]]
    unlearnings: dict[str, tuple[UnlearnConfig, Path]]
    notes: list[str] = field(default_factory=list)
    yardsticks: dict[str, tuple[TrainConfig, Path]] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """The target: given, or the last step of the training."""
        return self.config.target or str(list(self.trainings.values())[-1][1])


def plan(config: BenchmarkConfig, out: Path) -> Plan:
    """Read and check everything; nothing is trained or written (a smoke run's generated data are made in the cache).

    Raises:
        InputError: data that are not there or do not fit the schema, a method or setting that does not fit.
    """
    config = config.checked()
    benchmark = config.opened()
    sets, notes = load_all(benchmark)
    made = Plan(config, benchmark, out, sets, {}, {}, {}, notes)
    if config.own and unseen_holdout(made):
        notes.append("Half of the holdout set says when methods stop; numbers about holdout are of the other half.")
    if config.target is None:
        made.trainings = _trainings(config, benchmark, sets, out)
        made.yardsticks = _yardsticks(made)
    else:
        check_source(config.target)
    for source in config.retrained:
        check_source(source)
    roles = benchmark.roles()
    if benchmark.reference == "retrained" and roles is not None and config.retrain:
        made.gold = _gold(made, roles)
    if roles is not None:
        made.unlearnings = {
            m: (unlearn_config(made, m, roles.forget, made.target), out / "methods" / m) for m in config.methods
        }  # fmt: skip
        for request, _ in made.unlearnings.values():
            unlearning.check_method(request)
    return made


def load_all(benchmark: Benchmark) -> tuple[dict[str, RecordSet], list[str]]:
    """Every set of a benchmark, and a sentence for each optional one that is not there.

    Raises:
        InputError: a set that is needed is not there, or a row does not fit the schema.
    """
    sets: dict[str, RecordSet] = {}
    notes: list[str] = []
    for name, source in benchmark.sources().items():
        try:
            sets[name] = load_set(source.reference, name, {})
        except InputError as error:
            if not source.optional:
                raise
            notes.append(f"The set {name} ({source.text}) was left out: {error.message}")
            continue
        if source.rows is not None and len(sets[name]) != source.rows:
            notes.append(f"The set {name} has {len(sets[name])} records, the published one {source.rows}.")
    return sets, notes


def _trainings(
    config: BenchmarkConfig, benchmark: Benchmark, sets: Mapping[str, RecordSet], out: Path
) -> dict[str, tuple[TrainConfig, Path]]:
    sources = {n: s.reference for n, s in benchmark.sources().items() if n in sets}
    steps = benchmark.trainings()
    if not steps:  # from scratch: something must be learnt before anything can be measured
        steps = (Training("target", tuple(benchmark.learnt())),)
    out_of: dict[str, tuple[TrainConfig, Path]] = {}
    before = config.model
    for step in steps:
        given = SMALL_TRAINING if config.scratch else step.parts
        first = config.scratch and not out_of
        data = tuple(sources[n] for n in step.sets if n in sources)
        made = TrainConfig(
            model=str(before), data=data, scratch=first,
            vocabulary=tuple(s for n, s in sources.items() if s not in data) if first else (),
            parts=merge(dict(given), config.train),
            text=config.text.model_copy(update={} if config.scratch else dict(step.text)), engine=config.engine,
        )  # fmt: skip
        out_of[step.name] = (made, out / step.name)
        before = str(out / step.name)
    return out_of


def _yardsticks(made: Plan) -> dict[str, tuple[TrainConfig, Path]]:
    """The oracle rows that are trained; those that are a step's model are there already."""
    config, sources = made.config, made.benchmark.sources()
    found: dict[str, tuple[TrainConfig, Path]] = {}
    for row in made.benchmark.yardsticks():
        if row.sets:
            parts = merge(dict(SMALL_TRAINING if config.scratch else row.parts), config.train)
            data = tuple(sources[n].reference for n in row.sets if n in made.sets)
            step = TrainConfig(
                model=made.target, data=data, scratch=False, parts=parts, text=config.text, engine=config.engine
            )  # fmt: skip
            found[row.label] = (step, made.out / "oracles" / row.name)
    return found


def _gold(made: Plan, roles: Roles) -> dict[str, tuple[TrainConfig, Path]]:
    """The retrained models that the run trains: as the target, without the forget set in any form, and with other seeds."""
    config = made.config
    unseen = [made.sets[n] for n in dict.fromkeys((roles.forget, *roles.without)) if n in made.sets]
    forget = unseen[0] if len(unseen) == 1 else RecordSet("forget", tuple(_named(unseen)))
    if not made.trainings:
        if config.retrained:
            return {}
        return {
            f"retrained seed {s}": training.retraining_of(str(config.target), forget, s, base=config.model)
            for s in range(1, config.retrain + 1)
        }
    if len(made.trainings) > 1:
        raise InputError(f"{made.benchmark.name} trains its target in several steps: no retrained model follows from them.")
    recipe = next(iter(made.trainings.values()))[0]
    wanted = max(0, config.retrain - len(config.retrained))
    return {f"retrained seed {s}": training.retraining(recipe, forget, s) for s in range(1, wanted + 1)}


def _named(sets: Sequence[RecordSet]) -> Iterator[Record]:
    """All records of some sets under ids of their own."""
    return (dataclasses.replace(r, id=f"{i}/{r.id}") for i, held in enumerate(sets) for r in held)


def unlearn_config(made: Plan, method: str, forget: str, model: str, more: Mapping[str, Any] | None = None) -> UnlearnConfig:
    """The configuration of a method on one of the forget sets.

    The benchmark's published schedule takes the place of an adaptive one; a method that publishes a schedule of its own keeps it.
    """
    config, roles = made.config, made.benchmark.roles()
    if roles is None:
        raise InputError(f"{made.benchmark.name} has nothing to unlearn.")
    sources = made.benchmark.sources()
    published = {} if config.own else _fitting(method, made.benchmark.unlearning())
    holdout = roles.holdout if config.own and roles.holdout in made.sets else None
    return UnlearnConfig(
        model=model, forget=sources[forget].reference, retain=sources[roles.retain].reference if roles.retain else None,
        holdout=sources[holdout].reference if holdout else None, method=method, base=None if config.scratch else config.model,
        parts=merge(dict(published), config.unlearn, dict(more or {})), text=config.text, engine=config.engine,
        allow_large_forget=True,
    )  # fmt: skip


def _fitting(method: str, published: Mapping[str, Any]) -> Mapping[str, Any]:
    if method in EDITS.names() or method == "custom":
        return {}
    recipe = build_recipe(method, {})
    return published if isinstance(recipe, Recipe) and isinstance(recipe.schedule, Adaptive) else {}


def stages(made: Plan) -> list[Stage]:
    """What a run would do, in order, with its cost where it can be told before the target is there."""
    out = [Stage("data", made.out, True, f"{sum(map(len, made.sets.values())):,} records in {len(made.sets)} sets, checked")]
    everything = {**made.trainings, **made.gold, **made.yardsticks}
    costs: dict[str, str] = {}
    for label, (config, folder) in everything.items():
        if not training.finished(folder):
            first = str(config.model) not in {str(f) for _, f in made.trainings.values()}
            costs.setdefault(str(len(config.exclude)), training.plan(config).cost.text() if first else "as the step before")
        out.append(Stage(f"train {label}", folder, training.finished(folder), costs.get(str(len(config.exclude)), "")))
    for label, (request, folder) in made.unlearnings.items():
        out.append(Stage(f"unlearn {label}", folder, finished(folder), _schedule(label, request)))
    out += [Stage(f"course {n}", made.out / "courses" / n, False, courses.describe(made, n)) for n in made.config.courses]
    axes = [a for a in made.benchmark.axes() if all(s in made.sets for s in a.sets.values())]
    out.append(Stage("measure", made.out / DOCUMENT, (made.out / DOCUMENT).is_file(), f"{len(axes)} axes"))
    if made.config.verdict and made.benchmark.reference == "retrained" and made.benchmark.roles() is not None:
        out.append(Stage("audit", made.out / auditing.DOCUMENT, (made.out / auditing.DOCUMENT).is_file(), "verdict"))
    return out


def _schedule(method: str, config: UnlearnConfig) -> str:
    """The schedule of a method, in words; an edit has none."""
    if method in EDITS.names():
        return "an edit of the weights"
    schedule = build_recipe(method, config.parts).schedule
    return f"{schedule.name}: " + ", ".join(f"{k}={v}" for k, v in schedule.model_dump().items() if v is not None)


def finished(folder: Path) -> bool:
    """Whether an unlearning run is done."""
    return (folder / "manifest.json").is_file() and Run.open(folder).manifest["stages"].get("unlearn", {}).get("state") == "done"


def execute(made: Plan, *, resume: bool = False, bars: Bars, say: Callable[[str], None]) -> BenchmarkDocument:
    """Do what is not done, and leave ``benchmark.json`` (and ``audit.json``).

    Args:
        made: the checked run.
        resume: go on with the folder.
        bars: makes a progress bar.
        say: told what is being done.

    Raises:
        InputError: the folder is in use by another run.
    """
    config = made.config
    dump = config.model_dump(mode="json")
    held = Run.start(made.out, "benchmark", dump, resume=resume)
    for label, (step, folder) in made.trainings.items():
        _train({label: (step, folder)}, bars, say)
    _train({**made.gold, **made.yardsticks}, bars, say)
    models = base_models(made)
    chosen: dict[str, str] = {}
    if config.checkpoint == "oracle":
        for method in config.methods:
            folder, said = courses.oracle(made, method, models, bars=bars, say=say)
            made.unlearnings[method] = (made.unlearnings[method][0], folder)
            chosen[method] = said
    else:
        _unlearn(made.unlearnings, bars, say)
    for method, (_, folder) in made.unlearnings.items():
        label = f"{method} (oracle checkpoint: {chosen[method]})" if method in chosen else method
        models.append(auditing.unlearned_model(folder, label))
    curves = [c for name in config.courses for c in courses.follow(made, name, models, bars=bars, say=say)]
    grids = [g for name in config.courses for g in courses.tables(made, name, models, bars=bars, say=say)]
    inputs = {
        "models": [[m.label, m.path, auditing.weights_of(m.path)] for m in models],
        "sets": {n: s.digest for n, s in made.sets.items()},
        "benchmark": made.benchmark.model_dump(mode="json"), "settings": config.audit.model_dump(mode="json"),
        "curves": [c.model_dump(mode="json") for c in curves], "grids": [g.model_dump(mode="json") for g in grids],
    }  # fmt: skip

    def work() -> dict[str, Any]:
        with bars("measuring") as bar:
            document = measured(made, models, bar)
        document.curves = [*courses.profiles(made.benchmark, document), *curves]
        document.grids = grids
        document.not_measured[:0] = made.notes
        write_text(made.out / DOCUMENT, document.model_dump_json(indent=2) + "\n")
        return {"axes": len(document.axes), "models": len(document.models)}

    if held.done("measure", inputs):
        say("measured: by an earlier run")
    held.stage("measure", inputs, work, [DOCUMENT])
    roles = made.benchmark.roles()
    if config.verdict and roles is not None and made.benchmark.reference == "retrained":
        _audit(made, held, models, bars, say)
    return read(made.out)


def measured(
    made: Plan, models: Sequence[AuditedModel], progress: Progress | None, axes: Sequence[str] | None = None
) -> BenchmarkDocument:
    """The axes of some models, with scores and generations cached by content."""
    sets = made.sets if not made.config.own else {**made.sets, **unseen_holdout(made)}
    tell: Telling | None = None if progress is None else (lambda text, done, total: progress(done, total, text))
    store = ScoreStore(cache_folder() / "scores")
    return measure(
        made.benchmark, models, sets, made.config.audit, axes=axes, store=store, progress=tell,
        checkpoint=made.config.checkpoint,
    )  # fmt: skip


def unseen_holdout(made: Plan) -> dict[str, RecordSet]:
    """The half of the holdout set that no method was stopped by, under its name; nothing where there is none."""
    roles = made.benchmark.roles()
    if roles is None or roles.holdout is None or roles.holdout not in made.sets or not made.config.methods:
        return {}
    return {roles.holdout: unlearning.split_holdout(made.sets[roles.holdout], made.config.engine.seed)[1]}


def base_models(made: Plan) -> list[AuditedModel]:
    """Target and reference models."""
    config, text = made.config, made.config.text
    if made.trainings:
        steps = list(made.trainings.items())
        label, (recipe, folder) = steps[-1]
        models = [auditing.entry_of("target", "target", folder, text, seed=recipe.engine.seed, stage="train")]
        for name, (step, place) in steps[:-1]:
            role: Any = "retrained" if name == made.benchmark.reference else "base"
            models.append(auditing.entry_of(name, role, place, text, seed=step.engine.seed, stage="train"))
        models += _oracles(made)
    else:
        models = [AuditedModel("target", "target", auditing.lazily(made.target, text), path=made.target)]
    models += [
        AuditedModel(f"retrained {i}", "retrained", auditing.lazily(m, text), path=m) for i, m in enumerate(config.retrained, 1)
    ]
    for label, (_, folder) in made.gold.items():
        models.append(auditing.entry_of(label, "retrained", folder, text, seed=int(label.split()[-1]), stage="train"))
    return models


def _oracles(made: Plan) -> list[AuditedModel]:
    """The rows that no method could give."""
    out = []
    for row in made.benchmark.yardsticks():
        step, place = made.trainings[row.weights] if row.weights else made.yardsticks[row.label]
        entry = auditing.entry_of(row.label, "unlearned", place, made.config.text, seed=step.engine.seed, stage="train")
        out.append(entry)
    return out


def _train(wanted: Mapping[str, tuple[TrainConfig, Path]], bars: Bars, say: Callable[[str], None]) -> None:
    left = {}
    for label, (config, folder) in wanted.items():
        if training.finished(folder):
            say(f"{label}: from an earlier run")
        else:
            left[label] = (config, folder)
    if left:
        say("training " + ", ".join(left))
        with bars("training") as bar:
            run_jobs([Job("train", c.model_dump(mode="json"), str(out)) for c, out in left.values()], bar)


def _unlearn(wanted: Mapping[str, tuple[UnlearnConfig, Path]], bars: Bars, say: Callable[[str], None]) -> None:
    left = {}
    for label, (config, folder) in wanted.items():
        if finished(folder):
            say(f"{label}: from an earlier run")
        else:
            left[label] = (config, folder)
    if left:
        say("unlearning by " + ", ".join(left))
        with bars("unlearning") as bar:
            run_jobs([Job("unlearn", c.model_dump(mode="json"), str(out)) for c, out in left.values()], bar)
    for label, (_, folder) in left.items():
        say(f"  {label}: {Run.open(folder).manifest['stages']['unlearn']['result']['sentence']}")


def _audit(made: Plan, held: Run, models: Sequence[AuditedModel], bars: Bars, say: Callable[[str], None]) -> AuditDocument:
    roles = made.benchmark.roles()
    if roles is None:
        raise InputError(f"{made.benchmark.name} has nothing to unlearn.")
    names = {"forget": roles.forget, "retain": roles.retain, "holdout": roles.holdout, **roles.audit}
    held_out = unseen_holdout(made) if made.config.own else {}
    sets = {role: held_out.get(name, made.sets[name]) for role, name in names.items() if name in made.sets}
    with bars("audit") as bar:
        title = f"{made.benchmark.title}: {', '.join(made.config.methods) or 'target and reference'}"
        if not auditing.audit_stage(held, models, sets, made.config.audit, progress=bar, title=title):
            say("audit: from an earlier run")
    return auditing.read(held.folder)
