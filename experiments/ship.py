"""Settings that sweeps chose, as the files that ``expunge unlearn --settings NAME`` reads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from expunge.core.errors import InputError
from expunge.core.files import write_text
from expunge.methods.search import with_values
from expunge.methods.tuned import SETTINGS, Chosen, Shipped
from expunge.pipeline.sweep_document import SweepDocument
from expunge.pipeline.tuned import USED, read_used


def write(
    folder: Path, sweeps: Mapping[str, Path], documents: Mapping[str, SweepDocument], title: str, origin: Mapping[str, Any]
) -> None:
    """Write a set: ``settings.yaml`` and ``used.json``.

    Args:
        folder: of the set.
        sweeps: by method, the folder of its sweep; all must have been measured on the same records.
        documents: what they found.
        title: one line for people.
        origin: where the settings come from.

    Raises:
        InputError: there is no sweep, or two were measured on different records.
    """
    used = {m: read_used(place / USED) for m, place in sweeps.items()}
    if not used or any(held != next(iter(used.values())) for held in used.values()):
        raise InputError("The sweeps were measured on different records, or there are none.", "Give sweeps of one request.")
    made = Shipped(title=title, origin=dict(origin), methods={m: c for m, d in sorted(documents.items()) if (c := chosen(d))})
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(next(iter(sweeps.values())) / USED, folder / USED)
    head = f"# Written by {origin['experiment']}; not to be changed by hand.\n"
    write_text(
        folder / SETTINGS, head + yaml.safe_dump(made.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    )


def chosen(document: SweepDocument) -> Chosen | None:
    """What a sweep of one method chose; None if nothing."""
    one = document.methods[0]
    if one.chosen is None:
        return None
    best, own = one.trials[one.chosen], one.trials[0]
    assert best.distance is not None
    assert best.lost is not None
    return Chosen(
        trial=best.index, distance=_short(best.distance), lost=_short(best.lost),
        own_distance=None if own.distance is None else _short(own.distance),
        own_lost=None if own.lost is None else _short(own.lost),
        parts=with_values({}, best.values),
    )  # fmt: skip


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def origin_of(experiment: str, document: SweepDocument, **more: Any) -> dict[str, Any]:
    """Where settings come from, as the file says it."""
    return {
        "experiment": experiment, **more, "trials": document.budget, "sampler": document.sampler, "seed": document.seed,
        "rule": document.rule, "rule_text": document.rule_text, "compared_with": document.reference["of"],
        "records": {name: held["records"] for name, held in document.used.items()}, "versions": dict(document.versions),
    }  # fmt: skip
