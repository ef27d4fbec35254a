"""What a sweep leaves: the trade-off of every method, the choice, and the settings as ``expunge unlearn --config`` reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from expunge.core.errors import InputError
from expunge.core.files import digest_file, write_text
from expunge.core.runs import Run, versions
from expunge.methods.search import with_values
from expunge.pipeline import tradeoff
from expunge.pipeline.config import UnlearnConfig
from expunge.pipeline.row_runs import RowsConfig
from expunge.pipeline.sweep import KIND, Study, SweepConfig, SweepPlan
from expunge.pipeline.sweep_document import MethodSweep, SweepDocument, Trial
from expunge.pipeline.tradeoff import RULES, Place, Reference
from expunge.pipeline.tuned import USED, Tuned
from expunge.pipeline.validation import Measured

DOCUMENT, CHOSEN, REFERENCE = "sweep.json", "chosen.yaml", "reference.json"

Results = dict[str, list[dict[str, Any]]]  #: by method, what its trials have left, in order


def read(folder: Path) -> SweepDocument:
    """The result of a sweep.

    Raises:
        InputError: there is none.
    """
    run = Run.open(folder)
    if run.manifest["kind"] != KIND:
        raise InputError(f"{str(folder)!r} is a run of kind {run.manifest['kind']!r}, not a sweep.", "Give the folder of one.")
    if not (folder / DOCUMENT).is_file():
        raise InputError(f"The sweep {str(folder)!r} has not finished.", f"Go on: expunge sweep ... --out {folder} --resume.")
    return SweepDocument.model_validate_json((folder / DOCUMENT).read_text(encoding="utf-8"))


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return (folder / "manifest.json").is_file() and Run.open(folder).manifest["kind"] == KIND


def place_of(result: Mapping[str, Any], reference: Reference) -> Place | None:
    """Where a trial stands; None if it gave no result."""
    if result["state"] != "done":
        return None
    return tradeoff.place(Measured(tuple(result["losses"]), result["utility"]), reference)


def document_of(made: SweepPlan, out: Path, reference: Reference, results: Results) -> SweepDocument:
    """Choose, write the settings, and say all there is to say."""
    config = made.config
    places = {m: [place_of(r, reference) for r in held] for m, held in results.items()}
    marks = iter(tradeoff.front([p for held in places.values() for p in held]))
    studies = []
    for study in made.studies:
        held, at = results[study.method], places[study.method]
        trials = [_trial(r, p, f, next(marks)) for r, p, f in zip(held, at, tradeoff.front(at), strict=True)]
        studies.append(_study(made, out, study, trials, at))
    best = _best(studies, places, config)
    if best is not None:
        write_text(out / CHOSEN, (out / "settings" / f"{best}.yaml").read_text(encoding="utf-8"))
    used = json.loads((out / USED).read_text(encoding="utf-8"))["sets"]
    return SweepDocument(
        title=f"Settings of {', '.join(config.methods)} on {config.request['model']}", model=str(config.request["model"]),
        rows=config.rows, sampler=config.sampler, seed=config.seed, budget=config.trials, rule=config.rule,
        rule_text=RULES[config.rule], bound=config.bound, counts=made.ground.counts(),
        used={n: {"records": s["records"], "digest": s["digest"]} for n, s in used.items()},
        reference={
            "of": reference.of, "loss": float(reference.unseen.mean()), "target_loss": float(reference.target.mean()),
            "utility": dict(reference.utility),
        },
        methods=studies, best=best, settings=CHOSEN if best is not None else "", notes=_notes(made, reference, studies),
        versions=versions(),
    )  # fmt: skip


def _study(made: SweepPlan, out: Path, study: Study, trials: list[Trial], at: Sequence[Place | None]) -> MethodSweep:
    config = made.config
    chosen = tradeoff.choose(at, config.rule, config.bound)
    (out / "settings").mkdir(exist_ok=True)
    file = f"settings/{study.method}.yaml" if chosen is not None else ""
    if chosen is not None:
        write_text(out / file, _settings_text(made, out, study, trials[chosen].values))
    return MethodSweep(
        method=study.method, ranges={d.path: d.range.text() for d in study.dimensions},
        own={d.path: d.default for d in study.dimensions}, trials=trials, chosen=chosen, tied=_tied(at, chosen, config),
        settings=file,
    )  # fmt: skip


def _trial(result: Mapping[str, Any], at: Place | None, on_front: bool, on_best: bool) -> Trial:
    where = {} if at is None else {"distance": at.distance, "low": at.low, "high": at.high, "lost": at.lost}
    loss = float(np.mean(result["losses"])) if result["losses"] else None
    kept = {k: result[k] for k in ("index", "seed", "values", "state", "sentence", "utility", "cost")}
    return Trial(**kept, **where, loss=loss, front=on_front, best_front=on_best)


def _tied(places: Sequence[Place | None], chosen: int | None, config: SweepConfig) -> int:
    """Other allowed trials that cannot be told from the chosen one: their interval holds its distance."""
    at = places[chosen] if chosen is not None else None
    if at is None:
        return 0
    others = [p for i, p in enumerate(places) if p is not None and i != chosen]
    allowed = [p for p in others if config.rule == "balanced" or p.lost <= config.bound]
    return sum(p.low <= at.distance <= p.high for p in allowed)


def _best(studies: Sequence[MethodSweep], places: Mapping[str, Sequence[Place | None]], config: SweepConfig) -> str | None:
    able = [s for s in studies if s.chosen is not None]
    if not able:
        return None
    chosen = [places[s.method][s.chosen or 0] for s in able]
    found = tradeoff.choose(chosen, config.rule, config.bound)
    return able[found].method if found is not None else None


def _settings_text(made: SweepPlan, out: Path, study: Study, values: Mapping[str, Any]) -> str:
    """The configuration of the final run, as ``expunge unlearn --config`` reads it."""
    config = made.config
    tuned = Tuned(sweep=str(out), digest=digest_file(out / USED))
    given = {k: v for k, v in config.request.items() if k not in ("parts", "method") and v is not None}
    every = {d.path: values.get(d.path, d.default) for d in study.dimensions}  # the method's own too: they may change one day
    held = {**given, "method": study.method, "parts": with_values(study.parts, {k: v for k, v in every.items() if v is not None})}
    cls = RowsConfig if config.rows else UnlearnConfig
    full = cls(**held, tuned=tuned).model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump({"method": study.method, **full}, sort_keys=False, allow_unicode=True)


def _notes(made: SweepPlan, reference: Reference, studies: Sequence[MethodSweep]) -> list[str]:
    config = made.config
    notes = []
    if not reference.retrained:
        notes.append(
            f"No model was retrained: what forgetting should reach is taken from {reference.of}. --retrain 1 compares with a "
            "model that never saw the records."
        )
    subjects = len(set(reference.clusters))
    if subjects < 10:
        notes.append(f"The validation records to forget are of {subjects} subjects: the order of near trials may be chance.")
    for study in studies:
        if study.chosen is None:
            notes.append(
                f"No trial of {study.method} lost at most {config.bound:.0%} of the usefulness: no setting of it is chosen."
            )
        elif study.tied:
            notes.append(
                f"{study.tied} other trials of {study.method} cannot be told from the chosen one: its distance lies within their "
                "intervals."
            )
        failed = sum(t.state != "done" for t in study.trials)
        if failed:
            notes.append(
                f"{failed} of {len(study.trials)} trials of {study.method} gave no result: they diverged or were refused."
            )
    if len(made.ground.spared) == 0:
        notes.append(
            "All records to forget were used: settings for another request can be judged by an audit, settings for this one only "
            "with --all-records."
        )
    if len(studies) > 1:
        notes.append(
            f"Every method had {config.trials} trials. The best of several methods on validation records is a choice of a "
            "setting, not a ranking: that takes an audit over several seeds."
        )
    return notes
