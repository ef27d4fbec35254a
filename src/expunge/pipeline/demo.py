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
from expunge.core.files import digest_json, write_text
from expunge.core.runs import Run
from expunge.data.records import RecordSet
from expunge.data.sources import load as load_records
from expunge.engine.loop import Progress
from expunge.engine.options import Engine
from expunge.pipeline import train as training
from expunge.pipeline import unlearn as unlearning
from expunge.pipeline.audit import DOCUMENT, entry_of, measure, read, sets_of, unlearned_model
from expunge.pipeline.config import TextConfig, TrainConfig, UnlearnConfig

WORLD = "persons=40&forget=4&holdout=8&authors=12&countries=8"
SCHEDULE: dict[str, Any] = {"name": "fixed", "lr": 5e-3, "epochs": 36, "batch": 16, "warmup": 1, "weight_decay": 0.01}
SEEDS = (1, 2, 3)

#: Gradient ascent runs a fixed schedule, as published, to show the collapse; the others find their own step size and stop.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "gradascent": {"schedule": {"name": "fixed", "lr": 1e-3, "epochs": None, "steps": 60, "warmup": 0, "batch": 8}},
    "graddiff": {},
    "npo": {},
    "simnpo": {},
    "idkdpo": {},
}

Bars = Callable[[str], AbstractContextManager[Progress | None]]


@dataclass(frozen=True)
class Demo:
    """What the demo leaves: the document, its folder, and how long it took."""

    document: AuditDocument
    folder: Path
    seconds: float


def run(folder: Path, *, bars: Bars, say: Callable[[str], None], methods: Mapping[str, Mapping[str, Any]] = METHODS) -> Demo:
    """Train, retrain, unlearn, audit; what an earlier run in the same folder has done is used again.

    Args:
        folder: gets one run folder per model, ``audit.json`` and (written by the caller) ``report.html``.
        bars: makes a progress bar.
        say: told what is being done.
        methods: parts by method.
    """
    started = time.perf_counter()
    target = folder / "target"
    config = TrainConfig(
        model="llama-tiny", data=tuple(f"people:{part}?{WORLD}" for part in ("full",)), scratch=True, parts={"schedule": SCHEDULE}
    )
    _train(config, target, "target model", bars, say)
    base = _unlearn_config(target, "npo", {})
    request = unlearning.load_request(base)
    gold = [_retrain(target, request.forget, seed, bars, say) for seed in SEEDS]
    runs = [_unlearn(_unlearn_config(target, m, parts), folder / m, bars, say) for m, parts in methods.items()]
    models = [entry_of("target", "target", target, TextConfig(), seed=0, stage="train"), *gold, *map(unlearned_model, runs)]
    document = _audit(folder, models, sets_of(base, request, {}), bars, say)
    return Demo(document, folder, time.perf_counter() - started)


def _unlearn_config(target: Path, method: str, parts: Mapping[str, Any]) -> UnlearnConfig:
    sets = {part: f"people:{part}?{WORLD}" for part in ("forget", "retain", "holdout")}
    return UnlearnConfig(model=str(target), method=method, parts=dict(parts), engine=Engine(checkpoint_every=0), **sets)


def _train(config: TrainConfig, out: Path, what: str, bars: Bars, say: Callable[[str], None]) -> None:
    if _done(out, "train"):
        say(f"{what}: from an earlier run")
        return
    say(f"training the {what}")
    made = training.plan(config)
    with bars(f"training the {what}") as bar:
        training.execute(made, out, resume=(out / "manifest.json").is_file(), progress=bar)


def _retrain(target: Path, forget: RecordSet, seed: int, bars: Bars, say: Callable[[str], None]) -> AuditedModel:
    with bars(f"retraining without the forget set, seed {seed}") as bar:
        out = training.retrained(str(target), forget, seed, progress=bar, say=say)
    return entry_of(f"retrained seed {seed}", "retrained", out, TextConfig(), seed=seed, stage="train")


def _unlearn(config: UnlearnConfig, out: Path, bars: Bars, say: Callable[[str], None]) -> Path:
    if _done(out, "unlearn"):
        say(f"{config.method}: from an earlier run")
        return out
    made = unlearning.from_config(config)
    with bars(f"unlearning by {config.method}") as bar:
        held = unlearning.execute(made, config, out, resume=(out / "manifest.json").is_file(), progress=bar)
    say(f"{config.method}: {held.manifest['stages']['unlearn']['result']['sentence']}")
    return out


def _audit(
    folder: Path, models: list[AuditedModel], sets: Mapping[str, RecordSet], bars: Bars, say: Callable[[str], None]
) -> AuditDocument:
    settings = AuditSettings()
    key = digest_json(
        [[m.label, _weights(Path(m.path))] for m in models]
        + [{k: v.digest for k, v in sets.items()}, settings.model_dump(mode="json")]
    )
    mark = folder / ".audit-inputs"
    if mark.is_file() and mark.read_text() == key and (folder / DOCUMENT).is_file():
        say("audit: from an earlier run")
        return read(folder)
    say("auditing all models")
    with bars("audit") as bar:
        document = measure(models, sets, settings, progress=bar, title="Demo: forgetting fictitious people")
    write_text(folder / DOCUMENT, document.model_dump_json(indent=2) + "\n")
    write_text(mark, key)
    return document


def _weights(run_folder: Path) -> dict[str, str]:
    held = Run.open(run_folder).manifest["stages"]
    return {name: entry["outputs"].get("model/model.safetensors", "") for name, entry in held.items()}


def _done(out: Path, stage: str) -> bool:
    return (out / "manifest.json").is_file() and Run.open(out).manifest["stages"].get(stage, {}).get("state") == "done"


def load_sets() -> dict[str, RecordSet]:
    """The demo's sets by name, for a look at the data."""
    return {part: load_records(f"people:{part}?{WORLD}", name=part) for part in ("forget", "retain", "holdout")}
