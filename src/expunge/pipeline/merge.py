"""Unlearned models joined to one: a run that is audited like any other.

All must have been made from the same target. Runs may have forgotten different records: what the joined model must not know is
all of it, and what it must know is what every run was to keep.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from expunge.adapters.language import LanguageAdapter
from expunge.core.errors import InputError
from expunge.core.files import atomic_path, check_room, digest_folder, write_text
from expunge.core.runs import Run
from expunge.core.settings import Settings
from expunge.data.records import Record, RecordSet, content_key
from expunge.data.shapes import row_of
from expunge.engine.devices import peak_bytes
from expunge.engine.merging import Merging, check_alike, merged
from expunge.engine.outcome import Progress
from expunge.pipeline.config import UnlearnConfig
from expunge.pipeline.models import check_memory, describe_data, open_adapter
from expunge.pipeline.unlearn import Request, load_request, split_holdout

_ROLES = ("forget", "retain", "holdout")


class MergeConfig(Settings):
    """Everything that a merge depends on."""

    name: ClassVar[str] = "merge-runs"

    runs: tuple[str, ...] = Field(min_length=2, description="folders of finished unlearning runs on one target")
    settings: Merging = Field(default_factory=Merging, description="how they are joined")


@dataclass
class MergePlan:
    """A merge that has passed every check and has not begun.

    Attributes:
        config: what is joined, and how.
        runs: the runs, in order.
        unlearning: the configuration under which the result is audited; sources of sets that are ``written`` are not in it yet.
        sets: forget, retain and holdout of the joined model, as far as there are any.
        written: names of the sets that are no run's own and are written into the result.
        target: digest of the model that all came from.
        adapter: holds that model.
        notes: what to know beforehand.
    """

    config: MergeConfig
    runs: list[Run]
    unlearning: UnlearnConfig
    sets: dict[str, RecordSet]
    written: tuple[str, ...]
    target: str
    adapter: LanguageAdapter
    notes: list[str]


def merge_models(target: nn.Module, models: Sequence[nn.Module], **settings: Any) -> nn.Module:
    """Join models that you hold, all of which were made from ``target``; nothing given is changed.

    >>> joined = expunge.merge_models(target, [first, second], how="ties", density=0.3)

    Args:
        target: the model that they came from.
        models: two or more, of the same architecture; a peft model is merged into its weights before.
        **settings: of :class:`~expunge.engine.merging.Merging`: ``how``, ``weights``, ``density``, ``sign``, ``seed``.

    Returns:
        A new model.

    Raises:
        InputError: fewer than two models, another architecture, or settings that do not fit.
    """
    made = Merging(**settings)
    if len(models) < 2:
        raise InputError(f"There are {len(models)} models to merge.", "Give two or more.")
    made.coefficients(len(models))
    base = weights_of(target)
    others = [weights_of(_plain(m)) for m in models]
    check_alike(base, others, [f"model {i + 1}" for i in range(len(models))])
    joined = copy.deepcopy(target)
    _put(joined, merged(base, others, made))
    return joined


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, tied ones once, and the buffers that are kept with them."""
    kept = set(model.state_dict())
    buffers = {n: b for n, b in model.named_buffers() if n in kept}
    return {n: t.detach() for n, t in {**dict(model.named_parameters()), **buffers}.items()}


def _plain(model: nn.Module) -> nn.Module:
    merge = getattr(model, "merge_and_unload", None)
    if not callable(merge):
        return model
    made: nn.Module = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    return made


def _put(model: nn.Module, weights: dict[str, Tensor]) -> None:
    held = weights_of(model)
    for name, value in weights.items():
        held[name].copy_(value)


def plan(config: MergeConfig) -> MergePlan:
    """Check that runs can be joined; nothing is written.

    Raises:
        InputError: no finished unlearning run of a language model, the same run twice, another target, another way to form text,
            data that have changed since, or nothing left to keep.
    """
    config.settings.coefficients(len(config.runs))
    runs = [_opened(Path(name)) for name in config.runs]
    if len({r.folder.resolve() for r in runs}) < len(runs):
        raise InputError("A run is named twice.", "Give weights=[2,1] to count one for more.")
    first = UnlearnConfig(**runs[0].manifest["config"])
    target = runs[0].manifest["inputs"]["target"]["digest"]
    requests = []
    for run in runs:
        own = UnlearnConfig(**run.manifest["config"])
        if run.manifest["inputs"]["target"]["digest"] != target:
            raise InputError(
                f"{str(runs[0].folder)!r} was made from {first.model!r}, and {str(run.folder)!r} from {own.model!r}.",
                "Merge runs that were made from one and the same model.",
            )
        if own.text != first.text:
            raise InputError(
                f"{str(run.folder)!r} forms text in another way than {config.runs[0]!r}.", "Use the same text.* settings."
            )
        requests.append(_request(run, own))
    adapter = open_adapter(first.model, first.text)
    if adapter.fingerprint() != target:
        raise InputError(f"The model {first.model!r} has changed since the runs were made.", "Put it back, or unlearn again.")
    weights = sum(t.numel() * t.element_size() for t in weights_of(adapter.model).values())
    check_memory((len(runs) + 1) * weights, "Merging")
    notes: list[str] = []
    sets, written = _sets(runs, requests, notes)
    for name in written:
        _check_shape(sets[name])
    unlearning = first.model_copy(update={"method": f"merge-{config.settings.how}", "parts": {}})
    return MergePlan(config, runs, unlearning, sets, written, target, adapter, notes)


def _opened(folder: Path) -> Run:
    run = Run.open(folder)
    if run.manifest["kind"] != "unlearn":
        raise InputError(
            f"{str(folder)!r} is a run of kind {run.manifest['kind']!r}.",
            "Give folders of `expunge unlearn` on a language model.",
        )
    if run.manifest["stages"].get("unlearn", {}).get("state") != "done":
        raise InputError(f"The run {str(folder)!r} has not finished.", f"Go on: expunge unlearn ... --out {folder} --resume.")
    return run


def _request(run: Run, config: UnlearnConfig) -> Request:
    made = load_request(config)
    for name in _ROLES:
        held, recorded = getattr(made, name), run.manifest["inputs"].get(name, {}).get("digest")
        if held is not None and recorded not in (None, held.digest):
            raise InputError(
                f"The {name} data have changed since the run {str(run.folder)!r}.", "Put the file back, or unlearn again."
            )
    return made


def _sets(runs: Sequence[Run], requests: Sequence[Request], notes: list[str]) -> tuple[dict[str, RecordSet], tuple[str, ...]]:
    """What the joined model is judged by, and which of it is no run's own."""
    sets: dict[str, RecordSet] = {}
    forget = _union([r.forget for r in requests])
    gone = {content_key(r) for r in forget}
    sets["forget"] = requests[0].forget if _same([r.forget for r in requests]) else forget
    kept = [r.retain for r in requests if r.retain is not None]
    if kept:
        left = _shared("retain", kept, gone)
        if not len(left):
            raise InputError("The runs share no record that is to be kept.", "Merge runs whose retain data overlap.")
        sets["retain"] = kept[0] if _same(kept) and len(left) == len(kept[0]) else left
    held = [r.holdout for r in requests if r.holdout is not None]
    seeds = [int(r.manifest["config"]["engine"]["seed"]) for r in runs]
    if held and _same(held) and len(held) == len(runs) and len(set(seeds)) == 1:
        sets["holdout"] = held[0]
    elif held and len(held) == len(runs):
        # An audit must not judge by what any of the runs was stopped by.
        unseen = _shared("holdout", [split_holdout(h, s)[1] for h, s in zip(held, seeds, strict=True)], gone)
        if len(unseen) > 1:
            sets["holdout"] = unseen
    if held and "holdout" not in sets:
        notes.append("The runs share no held-out records that none of them was stopped by: the audit has no holdout.")
    own = {name: [getattr(r, name) for r in requests] for name in _ROLES}
    written = tuple(n for n, s in sets.items() if not any(s is held for held in own[n]))
    return sets, written


def _same(sets: Sequence[RecordSet]) -> bool:
    return len({s.digest for s in sets}) == 1


def _union(sets: Sequence[RecordSet]) -> RecordSet:
    found: dict[str, Record] = {}
    for record in (r for s in sets for r in s):
        found.setdefault(content_key(record), record)
    return RecordSet("forget", _renamed(list(found.values())), "all merged runs")


def _renamed(records: Sequence[Record]) -> tuple[Record, ...]:
    """The records, with other ids where two different ones share theirs."""
    from dataclasses import replace

    taken: set[str] = set()
    made = []
    for record in records:
        name, number = record.id, 2
        while name in taken:
            name, number = f"{record.id}-{number}", number + 1
        taken.add(name)
        made.append(replace(record, id=name))
    return tuple(made)


def _shared(name: str, sets: Sequence[RecordSet], gone: set[str]) -> RecordSet:
    keys = set.intersection(*({content_key(r) for r in s} for s in sets)) - gone
    return RecordSet(name, tuple(r for r in sets[0] if content_key(r) in keys), sets[0].source)


def execute(made: MergePlan, out: Path, *, resume: bool = False, progress: Progress | None = None) -> Run:
    """Join the models, and leave a run folder with ``model/`` as an unlearning run does."""
    weights = weights_of(made.adapter.model)
    check_room(out, sum(t.numel() * t.element_size() for t in weights.values()), "Merging")
    sources = {name: str(out / f"{name}.jsonl") if name in made.written else s.source for name, s in made.sets.items()}
    # Named columns belong to the runs' own files: what is written here has the usual ones.
    text = made.unlearning.text.model_copy(update={"columns": {}}) if made.written else made.unlearning.text
    changes = {name: sources.get(name) for name in _ROLES}
    config = made.unlearning.model_copy(update={**changes, "text": text})
    run = Run.start(out, "unlearn", config.model_dump(mode="json"), resume=resume)
    recipe = {"name": config.method, "merge": made.config.settings.model_dump(mode="json"), "of": [_recipe(r) for r in made.runs]}
    inputs = {
        "target": made.target, "recipe": recipe, "engine": config.engine.model_dump(mode="json"),
        "models": [digest_folder(r.folder / "model") for r in made.runs], "data": {k: s.digest for k, s in made.sets.items()},
    }  # fmt: skip
    run.check_same("unlearn", inputs)
    for name in made.written:
        lines = (json.dumps(row_of(r), ensure_ascii=False) + "\n" for r in made.sets[name])
        write_text(out / f"{name}.jsonl", "".join(lines))
    run.note_inputs(**{k: describe_data(s) for k, s in made.sets.items()})
    run.note_inputs(target={"source": config.model, "digest": made.target}, merged={"runs": [str(r.folder) for r in made.runs]})

    def work() -> dict[str, Any]:
        begun = time.perf_counter()
        others = []
        for number, r in enumerate(made.runs):
            if progress is not None:
                progress(number, len(made.runs) + 1, f"reading {r.folder}")
            others.append(weights_of(open_adapter(str(r.folder), made.unlearning.text).model))
        check_alike(weights, others, [str(r.folder) for r in made.runs])
        _put(made.adapter.model, merged(weights, others, made.config.settings))
        with atomic_path(out / "model") as temporary:
            made.adapter.save(temporary)
        return _result(made, recipe, time.perf_counter() - begun)

    run.stage("unlearn", inputs, work, ["model", *(f"{name}.jsonl" for name in made.written)])
    return run


def _recipe(run: Run) -> Any:
    return run.manifest["stages"]["unlearn"]["result"].get("recipe")


def _result(made: MergePlan, recipe: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What the manifest records; the cost is that of the runs and of joining them."""
    ended = [r.manifest["stages"]["unlearn"]["result"] for r in made.runs]
    names = ", ".join(str(r.folder) for r in made.runs)
    missed = [str(r.folder) for r, e in zip(made.runs, ended, strict=True) if not e["reached"]]
    said = f"Merged {len(made.runs)} runs by {made.config.settings.how}: {names}."
    return {
        "reason": "merged", "reached": not missed, "recipe": recipe, "lr": 0.0, "goal": None,
        "sentence": said + (f" Of these {', '.join(missed)} had not reached their goal." if missed else ""),
        "steps": sum(int(e["steps"]) for e in ended), "tokens": sum(int(e["tokens"]) for e in ended),
        "seconds": seconds + sum(float(e["seconds"]) for e in ended),
        "peak_bytes": max(peak_bytes(made.adapter.model.device), *(int(e["peak_bytes"]) for e in ended)),
    }  # fmt: skip


def _check_shape(records: RecordSet) -> None:
    """The rows of one file are of one shape."""
    if len({frozenset(row_of(r).keys() & {"messages", "text", "answer", "completion"}) for r in records}) > 1:
        raise InputError(f"The {records.name} data of the runs differ in shape.", "Give all of them the same columns.")
