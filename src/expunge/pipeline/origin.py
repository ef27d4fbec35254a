"""The model before the first of several requests whose task vectors add up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from expunge.core.errors import InputError
from expunge.core.runs import Run
from expunge.engine.finish import FINISHES, Origin
from expunge.engine.parts import Recipe
from expunge.pipeline.config import TextConfig
from expunge.pipeline.models import open_adapter


@dataclass(frozen=True)
class Began:
    """Where a row of requests began, and what says that it is still the same."""

    origin: Origin
    source: str
    digest: str


def began(model: str, recipe: Recipe) -> Began | None:
    """The origin of a request on ``model``; None for a first request, and for a recipe whose finish does not accumulate.

    A run of such a recipe names the model that it started from, and that may be such a run again.

    Raises:
        InputError: the first model is gone or has changed, or the last request turned nothing around.
    """
    if recipe.finish is None or not recipe.finish.accumulates:
        return None
    source, scale, digest, text = model, 0.0, "", TextConfig()
    while (run := _accumulating(source)) is not None:
        scale = scale or float(run.manifest["stages"]["unlearn"]["result"]["finish_scale"] or 0.0)
        if not scale:
            raise InputError(
                f"The run {source!r} turned nothing around (its scale is 0).",
                "Start from the model before it, or give finish.scale.",
            )
        source, text = run.manifest["config"]["model"], TextConfig(**run.manifest["config"]["text"])
        digest = run.manifest["inputs"]["target"]["digest"]
    if source == model:
        return None
    adapter = open_adapter(source, text)
    if adapter.fingerprint() != digest:
        raise InputError(
            f"The requests up to {model!r} began with {source!r}, which has changed since.", "Put it back, or begin anew from it."
        )
    weights = {n: p.detach() for n, p in adapter.model.named_parameters()}
    return Began(Origin(weights, scale), source, digest)


def _accumulating(source: str) -> Run | None:
    """The finished run in a folder, if its recipe accumulates."""
    if not (Path(source) / "manifest.json").is_file():
        return None
    run = Run.open(Path(source))
    entry = run.manifest["stages"].get("unlearn", {})
    finish = entry.get("result", {}).get("recipe", {}).get("finish") if entry.get("state") == "done" else None
    if not finish or finish["name"] not in FINISHES.names() or not FINISHES.get(finish["name"]).accumulates:
        return None
    return run
