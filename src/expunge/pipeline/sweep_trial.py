"""One trial of a sweep, in a process of its own: forget the validation request with one setting, and measure."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.core.errors import InputError, NoRoom
from expunge.core.files import write_json
from expunge.engine.outcome import Progress
from expunge.engine.tasks import threads
from expunge.pipeline.processes import drop_checkpoint
from expunge.pipeline.validation import Split, open_ground

RESULT = "trial.json"


def result_of(folder: Path, key: str) -> dict[str, Any] | None:
    """What the trial in ``folder`` found, if it is one of this key and has ended."""
    try:
        held: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return held if held.get("key") == key else None


def execute(job: Mapping[str, Any], folder: Path, progress: Progress | None = None) -> None:
    """Do a trial and leave ``trial.json`` in its folder; a trial that was killed goes on from its last checkpoint."""
    if result_of(folder, job["key"]) is not None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / "begun"
    resume = begun.is_file() and begun.read_text(encoding="utf-8") == job["key"]
    begun.write_text(job["key"], encoding="utf-8")
    found = run(job, folder, resume=resume, progress=progress)
    write_json(folder / RESULT, found)
    tidy(folder)


def tidy(folder: Path) -> None:
    """Remove what a trial that has ended needs no more."""
    drop_checkpoint(folder)
    (folder / "begun").unlink(missing_ok=True)


def on_worker(common: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """The same on a Ray worker, which must see the model and the data under the same names; nothing is written."""
    place = Path(str(common["folder"]))
    if place.is_dir():
        os.chdir(place)
    return run({**common, **job}, None)


def run(job: Mapping[str, Any], folder: Path | None, *, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Do a trial.

    Args:
        job: ``rows``, ``request``, ``split``, ``weights``, ``target`` (its fingerprint), ``threads``, ``key``, ``method``,
            ``index``, ``parts``, ``values``, ``seed``.
        folder: where checkpoints and the log go; none keeps none.
        resume: go on from the last checkpoint.
        progress: of the training.

    Returns:
        What is written: state, losses and usefulness, and what it cost.

    Raises:
        InputError: the target is not the one that the sweep began with.
    """
    place = Path(job["weights"] or "")
    weights = place if job["weights"] and place.is_dir() else None
    with threads(int(job["threads"])):
        ground = open_ground(job["rows"], job["request"], Split(**job["split"]), weights)
        adapter = ground.target()
        if adapter.fingerprint() != job["target"]:
            raise InputError("The target model is not the one that the sweep began with.", "Put it back, or sweep anew.")
        head = {name: job[name] for name in ("key", "method", "index", "seed", "values")}
        try:
            made = ground.plan(job["method"], job["parts"], int(job["seed"]), adapter)
            outcome = made.run(folder, resume, progress)
        except NoRoom:  # says nothing about the setting
            raise
        except InputError as error:  # what one setting does not allow is its result; the others go on
            return {**head, "state": "refused", "sentence": str(error), "losses": [], "utility": {}, "cost": {}}
        cost = {"seconds": outcome.seconds, "steps": outcome.steps, "tokens": outcome.tokens, "peak_bytes": outcome.peak_bytes}
        if outcome.reason == "diverged":
            return {**head, "state": "diverged", "sentence": outcome.sentence, "losses": [], "utility": {}, "cost": cost}
        found = ground.measure(made.adapter, outcome.model)
        if not all(map(math.isfinite, (*found.losses, *found.utility.values()))):
            sentence = "Losses or scores of the model are not finite."
            return {**head, "state": "diverged", "sentence": sentence, "losses": [], "utility": {}, "cost": cost}
    return {
        **head, "state": "done", "sentence": outcome.sentence, "losses": list(found.losses), "utility": dict(found.utility),
        "cost": cost,
    }  # fmt: skip
