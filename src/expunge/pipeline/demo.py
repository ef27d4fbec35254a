"""``expunge demo``: fictitious people, a small model that knows them, several ways to forget some, and the evidence."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.audit.document import AuditDocument
from expunge.audit.run import AuditedModel
from expunge.audit.settings import AuditSettings
from expunge.core.runs import Run
from expunge.data.records import RecordSet
from expunge.engine.options import Engine
from expunge.engine.outcome import Progress
from expunge.pipeline import train as training
from expunge.pipeline import unlearn as unlearning
from expunge.pipeline.audit import audit_stage, entry_of, read, sets_of, unlearned_model
from expunge.pipeline.config import TextConfig, TrainConfig, UnlearnConfig
from expunge.pipeline.workers import Job, run_jobs

WORLD = "persons=48&forget=6&holdout=12&facts=8&authors=12&countries=8"
SCHEDULE: dict[str, Any] = {"name": "fixed", "lr": 5e-3, "epochs": 36, "batch": 16, "warmup": 1, "weight_decay": 0.01}
SEEDS = (1, 2, 3)
PARTS = {"forget": "forget", "retain": "rest", "holdout": "holdout"}

#: Gradient ascent runs a fixed schedule, as published, to show the collapse. Fine-tuning runs at four times the rate of the
#: training: hot enough to leave the target's weights behind, which nearly is retraining. The others find their own step size
#: and stop by themselves.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "gradascent": {"schedule": {"name": "fixed", "lr": 1e-3, "epochs": None, "steps": 60, "warmup": 0, "batch": 8}},
    "graddiff": {},
    "npo": {},
    "simnpo": {},
    "idkdpo": {},
    "finetune": {"schedule": {**SCHEDULE, "lr": 2e-2, "epochs": 12}},
}

Bars = Callable[[str], AbstractContextManager[Progress | None]]


@dataclass(frozen=True)
class Demo:
    """What the demo leaves: the document, its folder, and how long it took."""

    document: AuditDocument
    folder: Path
    seconds: float


@dataclass(frozen=True)
class Prepared:
    """What the audit of a demo reads: the run, its models (target first, then retrained, then unlearned), and the sets."""

    run: Run
    models: list[AuditedModel]
    sets: dict[str, RecordSet]


def run(folder: Path, *, bars: Bars, say: Callable[[str], None], methods: Mapping[str, Mapping[str, Any]] = METHODS) -> Demo:
    """Train, retrain, unlearn, audit; what an earlier run in the same folder has done is used again.

    Args:
        folder: gets one run folder per model, ``audit.json`` and (written by the caller) ``report.html``.
        bars: makes a progress bar.
        say: told what is being done.
        methods: parts by method.
    """
    started = time.perf_counter()
    made = prepare(folder, bars=bars, say=say, methods=methods)
    document = _audit(made.run, made.models, made.sets, bars, say)
    return Demo(document, folder, time.perf_counter() - started)


def prepare(
    folder: Path, *, bars: Bars, say: Callable[[str], None], methods: Mapping[str, Mapping[str, Any]] = METHODS
) -> Prepared:
    """Train, retrain and unlearn, without the audit; arguments as of :func:`run`."""
    settings = {"world": WORLD, "schedule": SCHEDULE, "seeds": list(SEEDS), "methods": {k: dict(v) for k, v in methods.items()}}
    held = Run.start(folder, "demo", settings, resume=(folder / "manifest.json").is_file())
    target = folder / "target"
    config = TrainConfig(
        model="llama-tiny",
        data=(f"people:all?{WORLD}",),
        vocabulary=(f"people:holdout?{WORLD}",),
        scratch=True,
        parts={"schedule": SCHEDULE},
    )
    base = _unlearn_config(target, "npo", {})
    request = unlearning.load_request(base)
    twins = [training.retraining(config, request.forget, seed) for seed in SEEDS]
    trained = {"target": (config, target), **{f"retrained seed {s}": t for s, t in zip(SEEDS, twins, strict=True)}}
    _train({k: v for k, v in trained.items() if not _done(v[1], "train", k, say)}, bars, say)
    runs = {m: (_unlearn_config(target, m, parts), folder / m) for m, parts in methods.items()}
    _unlearn({k: v for k, v in runs.items() if not _done(v[1], "unlearn", k, say)}, bars, say)
    models = [entry_of("target", "target", target, TextConfig(), seed=0, stage="train")]
    for seed, (_, out) in zip(SEEDS, twins, strict=True):
        models.append(entry_of(f"retrained seed {seed}", "retrained", out, TextConfig(), seed=seed, stage="train"))
    models += [unlearned_model(out) for _, out in runs.values()]
    return Prepared(held, models, sets_of(base, request, {}))


def _unlearn_config(target: Path, method: str, parts: Mapping[str, Any]) -> UnlearnConfig:
    sets = {part: f"people:{name}?{WORLD}" for part, name in PARTS.items()}
    return UnlearnConfig(model=str(target), method=method, parts=dict(parts), engine=Engine(checkpoint_every=0), **sets)


def _train(left: Mapping[str, tuple[TrainConfig, Path]], bars: Bars, say: Callable[[str], None]) -> None:
    if left:
        say("training " + ", ".join(left))
    with bars("training") as bar:
        run_jobs([Job("train", c.model_dump(mode="json"), str(out)) for c, out in left.values()], bar)


def _unlearn(left: Mapping[str, tuple[UnlearnConfig, Path]], bars: Bars, say: Callable[[str], None]) -> None:
    if left:
        say("unlearning by " + ", ".join(left))
    with bars("unlearning") as bar:
        run_jobs([Job("unlearn", c.model_dump(mode="json"), str(out)) for c, out in left.values()], bar)
    for method, (_, out) in left.items():
        say(f"  {method}: {Run.open(out).manifest['stages']['unlearn']['result']['sentence']}")


def _audit(
    run: Run, models: list[AuditedModel], sets: Mapping[str, RecordSet], bars: Bars, say: Callable[[str], None]
) -> AuditDocument:
    with bars("audit of all models") as bar:
        title = "Demo: forgetting fictitious people"
        if not audit_stage(run, models, sets, AuditSettings(), progress=bar, title=title):
            say("audit: from an earlier run")
    return read(run.folder)


def _done(out: Path, stage: str, label: str, say: Callable[[str], None]) -> bool:
    held = (out / "manifest.json").is_file() and Run.open(out).manifest["stages"].get(stage, {}).get("state") == "done"
    if held:
        say(f"{label}: from an earlier run")
    return held
