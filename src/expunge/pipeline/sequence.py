"""Several requests in order: each starts from the model that the last one left, and all earlier ones are audited again.

A file of requests holds one JSON object a line: ``{"id": "r1", "forget": "file-or-named-set"}``, or, to select from the
retain data, ``{"id": "r2", "subjects": ["person-0007"]}`` or ``{"id": "r3", "ids": ["..."]}``. What is forgotten leaves the
retain set for good. Every request is an unlearning run of its own, in a folder of its own. Its ``audit.json`` judges its
records in the model after it and again in the model after every later request: knowledge that returns (relapse) shows there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expunge.adapters.language import LanguageAdapter
from expunge.audit.document import AuditDocument
from expunge.audit.run import AuditedModel
from expunge.audit.settings import AuditSettings
from expunge.core.errors import InputError, nearest
from expunge.core.files import check_room
from expunge.core.runs import Run
from expunge.data.records import Record, RecordSet, content_key
from expunge.engine.outcome import Progress
from expunge.engine.parts import Recipe
from expunge.pipeline import unlearn
from expunge.pipeline.audit import audit_stage, entry_of, lazily, read
from expunge.pipeline.config import UnlearnConfig
from expunge.pipeline.cost import Cost
from expunge.pipeline.models import load_set, load_sets, open_adapter
from expunge.pipeline.train import retrained, retraining_of
from expunge.pipeline.tuned import check_left, check_tuned, unseen

_KEYS = {"id", "forget", "subjects", "ids"}
_EXAMPLE = 'Write one request a line, such as {"id": "r1", "forget": "r1.jsonl"} or {"id": "r2", "subjects": ["person-0007"]}.'

Bars = Callable[[str], AbstractContextManager[Progress | None]]


@dataclass(frozen=True)
class Step:
    """One request of a sequence, with what is left to keep after it."""

    id: str
    forget: RecordSet
    retain: RecordSet


def read_requests(path: Path, retain: RecordSet, columns: dict[str, str] | None = None) -> list[Step]:
    """Read and check a file of requests.

    Raises:
        InputError: the file is missing or malformed (the line is named), a request selects nothing, two requests share an
            id, or nothing would be left to keep.
    """
    if not path.is_file():
        raise InputError(f"There is no file of requests {str(path)!r}.", _EXAMPLE)
    steps: list[Step] = []
    left = list(retain)
    forgotten: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        request = _request(line, f"{path} line {number}")
        if any(s.id == request["id"] for s in steps):
            raise InputError(
                f"{path} line {number}: the request id {request['id']!r} is taken by an earlier line.", "Give each its own."
            )
        chosen = _select(request, left, f"{path} line {number}", columns, retain)
        keys = {content_key(r) for r in chosen}
        if keys & forgotten:
            raise InputError(
                f"{path} line {number}: {len(keys & forgotten)} records were asked for by an earlier request.", "Leave them out."
            )
        forgotten |= keys
        left = [r for r in left if content_key(r) not in keys]
        if not left:
            raise InputError(f"{path} line {number}: nothing is left to keep after this request.", "Give more retain data.")
        source = str(request.get("forget", f"{retain.source} (selected)"))
        steps.append(
            Step(request["id"], RecordSet(request["id"], tuple(chosen), source), RecordSet("retain", tuple(left), retain.source))
        )
    if not steps:
        raise InputError(f"The file {str(path)!r} holds no request.", _EXAMPLE)
    return steps


def _request(line: str, where: str) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is no JSON: {error}.", _EXAMPLE) from None
    if not isinstance(request, dict):
        raise InputError(f"{where} must be a JSON object.", _EXAMPLE)
    for key in request.keys() - _KEYS:
        close = nearest(key, _KEYS)
        raise InputError(
            f"{where} has an unknown key {key!r}.",
            f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(sorted(_KEYS))}.",
        )
    name = request.get("id")
    if not isinstance(name, str) or not name or not name.replace("-", "").replace("_", "").isalnum():
        raise InputError(
            f"{where} needs an 'id' of letters, digits, '-' and '_'; got {name!r}.", "It names the folder of its run."
        )
    if len(request.keys() & {"forget", "subjects", "ids"}) != 1:
        raise InputError(f"{where} must have exactly one of 'forget', 'subjects' and 'ids'.", _EXAMPLE)
    return request


def _select(
    request: dict[str, Any], left: Sequence[Record], where: str, columns: dict[str, str] | None, everything: RecordSet
) -> list[Record]:
    if "forget" in request:
        try:
            return list(load_set(str(request["forget"]), request["id"], columns or {}))
        except InputError as error:
            raise InputError(f"{where}: {error.message}", error.remedy) from None
    key = "subjects" if "subjects" in request else "ids"
    wanted = request[key]
    if not isinstance(wanted, list) or not wanted or not all(isinstance(w, str) for w in wanted):
        raise InputError(f"{where}: {key!r} must be a list of texts that is not empty.")
    of: Callable[[Record], str] = (lambda r: r.cluster) if key == "subjects" else (lambda r: r.id)
    present = {of(r) for r in left}
    for name in wanted:
        if name not in present and any(of(r) == name for r in everything):
            raise InputError(f"{where}: {name!r} was asked for by an earlier request.", "Leave it out.")
        if name not in present:
            close = nearest(name, present)
            raise InputError(
                f"{where}: the retain data have no {key.removesuffix('s')} {name!r}.",
                f"Near: {', '.join(close)}." if close else f"It has, for example, {', '.join(sorted(present)[:3])}.",
            )
    return [r for r in left if of(r) in set(wanted)]


@dataclass(frozen=True)
class Done:
    """A request that was carried out: its run folder, whether its goal was reached, and how training ended, in a sentence."""

    id: str
    folder: Path
    reached: bool
    sentence: str


@dataclass(frozen=True)
class Requests:
    """Requests that have passed every check, none of them begun; ``cost`` is that of all of them together."""

    config: UnlearnConfig
    steps: list[Step]
    checked: list[unlearn.Request]
    holdout: RecordSet | None
    cost: Cost
    notes: list[str]


def plan(path: Path, config: UnlearnConfig, retrain: int = 0) -> Requests:
    """Check all requests and say what they will cost; nothing is trained or written.

    Args:
        path: the file of requests.
        config: as for one request; ``forget`` is ignored, ``retain`` is everything that was trained on.
        retrain: number of models to retrain for the audits.

    Raises:
        InputError: anything does not fit.
    """
    if config.retain is None:
        raise InputError(
            "A sequence of requests needs the data that are kept.",
            "Give --retain DATA: everything that the model was trained on.",
        )
    unlearn.check_method(config)
    check_tuned(config.tuned)
    sources = {"retain": config.retain, "holdout": config.holdout}
    held = {k: config.spans.mark(v) for k, v in load_sets(sources, config.text.columns).items()}
    found = read_requests(path, held["retain"], config.text.columns or None)
    steps = [replace(s, forget=config.spans.mark(s.forget)) for s in found]
    for step in steps:
        check_left(config.tuned, step.forget)
    holdout = held.get("holdout")
    checked = [unlearn.check(unlearn.Request(s.forget, s.retain, holdout), config) for s in steps]
    if retrain:  # that it can be done is known before anything is begun
        retraining_of(config.model, steps[0].forget, 1, base=config.base, retain=config.retain)
    adapter = open_adapter(config.model, config.text, dropout=config.engine.dropout)
    base = open_adapter(config.base, config.text, dropout=config.engine.dropout) if config.base else None
    made = [_plan(adapter, base, request, config) for request in checked]
    parameters = made[0].recipe.parameters if isinstance(made[0].recipe, Recipe) else None
    if len(made) > 1 and parameters is not None and parameters.beside and not parameters.extends:
        raise InputError(
            f"{config.method!r} puts a model beside the target, and a second request would need one network to begin from.",
            "Unlearn the forget sets of all requests together.",
        )
    cost = Cost(
        sum(m.cost.steps for m in made), sum(m.cost.tokens for m in made), max(m.cost.memory for m in made),
        sum(m.cost.disk for m in made), made[0].cost.parameters,
    )  # fmt: skip
    notes = list(dict.fromkeys(note for m in made for note in m.notes))
    return Requests(config, steps, checked, holdout, cost, notes)


def _plan(
    adapter: LanguageAdapter, base: LanguageAdapter | None, request: unlearn.Request, config: UnlearnConfig
) -> unlearn.UnlearnPlan:
    return unlearn.plan(
        adapter, request, config.method, config.parts, config.engine,
        how=config.alternatives, template=config.alternative_template, base=base, source=config.model,
    )  # fmt: skip


def run(
    made: Requests,
    out: Path,
    *,
    retrain: int = 0,
    settings: AuditSettings | None = None,
    resume: bool = False,
    bars: Bars,
    say: Callable[[str], None],
) -> tuple[list[AuditDocument], list[Done]]:
    """Do the requests in order and audit the model after each, earlier requests included.

    Args:
        made: the checked requests.
        out: folder; gets a run folder per request, each with an ``audit.json``.
        retrain: number of models retrained without the records of all requests.
        settings: of the audits.
        resume: go on where a killed run stopped.
        bars, say: progress.

    Raises:
        InputError: the folder is in use, or holds other requests.
    """
    config, steps = made.config, made.steps
    check_room(out, made.cost.disk, "The sequence")
    Run.start(out, "sequence", {**config.model_dump(mode="json"), "requests": [s.forget.digest for s in steps]}, resume=resume)
    source, done = config.model, []
    for number, (step, request) in enumerate(zip(steps, made.checked, strict=True), 1):
        folder = out / f"{number:02d}-{step.id}"
        at = config.model_copy(update={"model": source, "forget": step.forget.source})
        if not _done(folder):
            base = open_adapter(config.base, config.text, dropout=config.engine.dropout) if config.base else None
            planned = _plan(open_adapter(source, at.text, dropout=at.engine.dropout), base, request, at)
            with bars(f"request {number} of {len(steps)}: {step.id}") as bar:
                unlearn.execute(planned, at, folder, resume=(folder / "manifest.json").is_file(), progress=bar)
            said = step.id
        else:
            said = f"{step.id}: from an earlier run"
        result = Run.open(folder).manifest["stages"]["unlearn"]["result"]
        say(f"{said}: {result['sentence']}")
        done.append(Done(step.id, folder, bool(result["reached"]), result["sentence"]))
        source = str(folder)
    documents = _audit(
        config, steps, [d.folder for d in done],
        holdout=made.holdout, retrain=retrain, settings=settings or AuditSettings(), bars=bars, say=say,
    )  # fmt: skip
    return documents, done


def _audit(
    config: UnlearnConfig, steps: list[Step], folders: list[Path], *,
    holdout: RecordSet | None, retrain: int, settings: AuditSettings, bars: Bars, say: Callable[[str], None],
) -> list[AuditDocument]:  # fmt: skip
    """One document per request: its records in the model after it and in the models after all later requests.

    The gold standard of each is trained without the records of all requests: it never saw this request's either, and it knows
    what is left to keep.
    """
    together = RecordSet("forget", tuple(r for s in steps for r in s.forget), "all requests")
    shared = {"retain": steps[-1].retain}
    if holdout is not None:
        shared["holdout"] = unlearn.split_holdout(holdout, config.engine.seed)[1]
    gold = []
    for seed in range(1, retrain + 1):
        with bars(f"retraining without all requests, seed {seed}") as bar:
            made = retrained(config.model, together, seed, base=config.base, retain=config.retain, progress=bar, say=say)
        gold.append(entry_of(f"retrained seed {seed}", "retrained", made, config.text, seed=seed, stage="train"))
    target = AuditedModel("target", "target", lazily(config.model, config.text), path=config.model)
    after = [  # what came before tells the models apart in a comparison: they are no seeds of one method
        entry_of(
            f"after {s.id}", "unlearned", f, config.text,
            seed=config.engine.seed, stage="unlearn", method=config.method, after=s.id,
        )
        for s, f in zip(steps, folders, strict=True)
    ]  # fmt: skip
    documents = []
    for number, (step, folder) in enumerate(zip(steps, folders, strict=True)):
        sets, notes = unseen(folder, config.tuned, {"forget": step.forget, **shared})
        title = f"Request {step.id} ({number + 1} of {len(steps)}), {config.method}"
        with bars(f"audit of request {step.id}") as bar:
            new = audit_stage(
                Run.open(folder), [target, *gold, *after[number:]], sets, settings, progress=bar, title=title, notes=notes
            )
        if not new:
            say(f"audit of request {step.id}: from an earlier run")
        documents.append(read(folder))
    return documents


def _done(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() and Run.open(folder).manifest["stages"].get("unlearn", {}).get("state") == "done"
