"""Unlearn: check a request, say what it costs, change the model, leave the evidence in a run folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from expunge.adapters.added import with_tokens
from expunge.adapters.base import Example
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.memory import training_memory
from expunge.core.access import Of, Stream
from expunge.core.errors import Destroyed, InputError
from expunge.core.files import check_room, check_writable, empty
from expunge.core.runs import Run, cache_folder
from expunge.core.settings import nest
from expunge.data.checks import OverlapReport, check_request, drop_overlap
from expunge.data.records import Record, RecordSet
from expunge.data.spans import swapped
from expunge.engine.edit import Edit, apply_edit
from expunge.engine.goal import Goal
from expunge.engine.goal import estimate as estimate_goal
from expunge.engine.loop import train
from expunge.engine.objective import check_marks, mean_losses
from expunge.engine.options import Engine
from expunge.engine.outcome import Outcome, Progress
from expunge.engine.parameters import Twin
from expunge.engine.parts import Need, Recipe
from expunge.engine.preparation import Preparation
from expunge.engine.reference import choose
from expunge.engine.schedule import Adaptive
from expunge.methods.alternatives import encoded as encoded_alternatives
from expunge.methods.catalogue import find
from expunge.methods.edits.registry import EDITS
from expunge.methods.prepared.registry import refuse_prepared
from expunge.methods.recipe import build as build_recipe
from expunge.methods.registry import Method
from expunge.pipeline.config import Allowances, UnlearnConfig
from expunge.pipeline.cost import Cost, estimate
from expunge.pipeline.guarding import Shield, apply_guard, check_retain, hidden_by, is_guard, refuse_guarded, shield
from expunge.pipeline.models import check_memory, describe_data, load_sets, open_adapter, refuse_composite
from expunge.pipeline.origin import Began, began
from expunge.pipeline.processes import drop_checkpoint, first_process
from expunge.pipeline.train import save_outcome
from expunge.pipeline.tuned import COPY, check_tuned, keep_copy


@dataclass
class Request:
    """What is to be forgotten and kept, as records; ``holdout`` were never trained on."""

    forget: RecordSet
    retain: RecordSet | None = None
    holdout: RecordSet | None = None
    overlap: OverlapReport = field(default_factory=OverlapReport)


def check_out(out: Path, resume: bool) -> None:
    """Refuse a folder in use before anything is loaded.

    Raises:
        InputError: it exists and is not empty, and ``resume`` was not given; or it cannot be written.
    """
    if out.is_file():
        raise InputError(f"{str(out)!r} is a file.", "Choose another --out.")
    check_writable(out)
    if not resume and out.is_dir() and not empty(out):
        raise InputError(
            f"The folder {str(out)!r} exists and is not empty.", "Go on with it by --resume, or choose another --out."
        )


@dataclass
class UnlearnPlan:
    """An unlearning run that has passed every check and has not begun."""

    recipe: Recipe | Edit | Shield
    adapter: LanguageAdapter
    request: Request
    examples: dict[Stream, list[Example]]
    goal_records: tuple[Sequence[Record], Sequence[Record]]
    engine: Engine
    cost: Cost
    notes: list[str]
    began: Began | None = None
    source: str = ""


def split_holdout(holdout: RecordSet, seed: int = 0) -> tuple[RecordSet, RecordSet]:
    """Divide held-out records by cluster: one half sets the goal of training, the other is left to the audit.

    An audit must not judge by what training was stopped by. With a single cluster the records themselves are divided.
    """
    clusters = sorted(set(holdout.clusters()))
    by_cluster = len(clusters) > 1
    names = clusters if by_cluster else [r.id for r in holdout]
    order = np.random.default_rng([seed, 11]).permutation(len(names))
    first = {names[int(i)] for i in order[: len(names) // 2]}

    def of(record: Record) -> str:
        return record.cluster if by_cluster else record.id

    goal = tuple(r for r in holdout if of(r) in first)
    audit = tuple(r for r in holdout if of(r) not in first)
    return RecordSet("holdout for the goal", goal, holdout.source), RecordSet("holdout", audit, holdout.source)


def load_request(config: UnlearnConfig) -> Request:
    """Read and check the data of a request.

    Raises:
        InputError: a source cannot be read, a set is empty, sets overlap, or there is more to forget than to keep.
    """
    sources = {"forget": config.forget, "retain": config.retain, "holdout": config.holdout}
    sets = {k: config.spans.mark(v) for k, v in load_sets(sources, config.text.columns).items()}
    return check(Request(sets["forget"], sets.get("retain"), sets.get("holdout")), config)


def check(request: Request, config: Allowances) -> Request:
    """Check sets against each other; with ``drop_overlap`` leave duplicates out of retain and holdout."""
    drop = config.drop_overlap
    report = check_request(
        request.forget, request.retain, request.holdout,
        allow_overlap=config.allow_overlap or drop, allow_large_forget=config.allow_large_forget,
    )  # fmt: skip
    retain, holdout = request.retain, request.holdout
    if drop and report.found:
        retain = drop_overlap(retain, report) if retain is not None else None
        holdout = drop_overlap(holdout, report, "holdout") if holdout is not None else None
    return Request(request.forget, retain, holdout, report)


def plan(
    adapter: LanguageAdapter,
    request: Request,
    method: str,
    parts: Mapping[str, Any],
    engine: Engine,
    *,
    how: str = "auto",
    template: str | None = None,
    base: LanguageAdapter | None = None,
    goal: RecordSet | None = None,
    source: str | None = None,
    encoded: Mapping[Stream, list[Example]] | None = None,
) -> UnlearnPlan:
    """Put a run together and check that everything fits; nothing is trained or written.

    Args:
        adapter: holds the target model.
        request: checked data.
        method: name of a method, or ``custom``.
        parts: what differs from the method's own parts.
        engine: how to use the machine.
        how: where alternative answers come from.
        template: their text, for ``how="template"``.
        base: the untrained base, for methods that start from it.
        goal: records never trained on that set the goal; none: half of the holdout, see :func:`split_holdout`.
        source: where the model came from; a run of a recipe that accumulates says there where it began.
        encoded: the forget and retain records as examples, where they were encoded before (for several plans of one request).
    """
    notes: list[str] = [request.overlap.summary()] if request.overlap.found else []
    refuse_guarded(adapter)
    if is_guard(method):
        return _plan_guard(adapter, request, shield(method, parts), engine, notes=notes, source=source, encoded=encoded)
    if method in EDITS.names():
        refuse_composite(adapter)
        return _plan_edit(adapter, request, EDITS.get(method)(**nest(dict(parts))), engine, notes=notes, encoded=encoded)
    if goal is None and request.holdout is not None:
        goal = split_holdout(request.holdout, engine.seed)[0]
    recipe = build_recipe(method, parts)
    refuse_composite(adapter, recipe.parameters)
    _check_sides(method, recipe, retain=request.retain is not None, holdout=goal is not None, base=base is not None)
    if recipe.start == "initial" and base is not None:
        adapter = base
    _check_models(recipe, adapter)
    trained = request
    if recipe.preparation is not None:
        recipe.preparation.check()
        trained = _rewritten(request, recipe.preparation, engine.seed)
        if recipe.preparation.added_tokens:
            adapter = with_tokens(adapter, recipe.preparation.added_tokens)
    if trained is not request:
        encoded = None
    needs = recipe.needs(adapter.layers())
    _check_features(recipe, adapter, needs)
    examples = dict(encoded) if encoded is not None and adapter is not base else encode(adapter, trained)
    if Stream.ALTERNATIVE in recipe.streams(adapter.layers()):
        examples[Stream.ALTERNATIVE] = encoded_alternatives(
            adapter, request.forget.records, recipe, how, engine.seed, template=template
        )
    if isinstance(recipe.schedule, Adaptive) and recipe.forget and goal is None:
        notes.append("No holdout was given: the goal is estimated on retain records with swapped answers, an upper estimate.")
    goal_records = goal.records if goal is not None else ()
    if Stream.VALIDATION in recipe.looks:
        examples[Stream.VALIDATION] = [adapter.encode(r) for r in goal_records]
    check_marks(recipe, examples, recipe.preparation.makes if recipe.preparation is not None else ())
    if recipe.preparation is not None:
        recipe.preparation.examine(adapter, examples)
    kind = choose(recipe, needs)
    parameters = sum(p.numel() for p in adapter.model.parameters())
    lora = recipe.parameters.factors
    weights = sum(p.numel() * p.element_size() for p in adapter.model.parameters())
    sized = recipe.preparation.planned(examples) if recipe.preparation is not None else examples
    tokens = min(engine.max_tokens, 2 * recipe.schedule.batch * max(e.units for held in sized.values() for e in held))
    copies = (kind == "copy") + isinstance(recipe.parameters, Twin)
    memory = training_memory(adapter, tokens, lora=lora, checkpointing=engine.gradient_checkpointing) + weights * copies
    memory += recipe.parameters.memory(weights)
    check_memory(memory, "Unlearning")
    cost = estimate(recipe, sized, parameters, memory, disk=weights * 5)
    kept = request.retain.records if request.retain is not None else ()
    first = began(source, recipe) if source is not None else None
    if first is not None:
        notes.append(f"What was learnt since {first.source} is turned around together.")
    return UnlearnPlan(recipe, adapter, request, examples, (goal_records, kept), engine, cost, notes, first)


def _rewritten(request: Request, preparation: Preparation, seed: int) -> Request:
    """The request with the records that are trained on, or itself where these are the same."""
    held = request.retain.records if request.retain is not None else ()
    forget, retain = preparation.rewritten(request.forget.records, held, seed)
    if forget is request.forget.records and retain is held:
        return request
    kept = replace(request.retain, records=tuple(retain)) if request.retain is not None else None
    return replace(request, forget=replace(request.forget, records=tuple(forget)), retain=kept)


def encode(adapter: LanguageAdapter, request: Request) -> dict[Stream, list[Example]]:
    """The forget and retain records of a request as examples.

    Raises:
        InputError: a record does not fit the model.
    """
    sets = {Stream.FORGET: request.forget, Stream.RETAIN: request.retain}
    return {stream: [adapter.encode(r) for r in records] for stream, records in sets.items() if records is not None}


def _plan_edit(
    adapter: LanguageAdapter, request: Request, edit: Edit, engine: Engine, *, notes: list[str],
    encoded: Mapping[Stream, list[Example]] | None,
) -> UnlearnPlan:  # fmt: skip
    if Stream.RETAIN in edit.streams and request.retain is None:
        raise InputError(f"The method {edit.name!r} reads a retain set, and none was given.", "Give --retain DATA.")
    examples = dict(encoded) if encoded is not None else encode(adapter, request)
    weights = sum(p.numel() * p.element_size() for p in adapter.model.parameters())
    tokens = sum(e.size for s in edit.streams for e in examples[s])
    # Weights, new weights, and up to three gradients or importances of their size; activations as in a training step.
    memory = training_memory(adapter, min(engine.max_tokens, tokens)) + 2 * weights
    check_memory(memory, "Unlearning")
    parameters = sum(p.numel() for p in adapter.model.parameters())
    return UnlearnPlan(edit, adapter, request, examples, ((), ()), engine, Cost(0, tokens, memory, weights, parameters), notes)


def _plan_guard(
    adapter: LanguageAdapter, request: Request, chosen: Shield, engine: Engine, *, notes: list[str], source: str | None,
    encoded: Mapping[Stream, list[Example]] | None,
) -> UnlearnPlan:  # fmt: skip
    hidden_by(chosen, request.forget, request.retain, engine.seed)
    examples = dict(encoded) if encoded is not None else encode(adapter, request)
    weights = sum(p.numel() * p.element_size() for p in adapter.model.parameters())
    parameters = sum(p.numel() for p in adapter.model.parameters())
    check_memory(weights, "A guard")
    cost = Cost(0, 0, weights, 1_000_000, parameters)
    return UnlearnPlan(chosen, adapter, request, examples, ((), ()), engine, cost, notes, source=source or "")


def check_method(config: UnlearnConfig) -> None:
    """Check method and parts against what is given, before data are read and a large model is loaded.

    Raises:
        InputError: an unknown name, a value out of range, or a side that the method needs and was not given.
    """
    refuse_prepared(config.method)
    if is_guard(config.method):
        check_retain(shield(config.method, config.parts), config.retain is not None)
        return
    if config.method != "custom" and not isinstance(find(config.method), Method):
        edit = EDITS.get(config.method)(**nest(dict(config.parts)))
        missing = sorted(edit.offers - LanguageAdapter.offers)
        if missing:
            raise InputError(
                f"The method {edit.name!r} needs {', '.join(missing)}, which a language model does not offer.",
                "See `expunge methods --matrix` for those that run.",
            )
        if Stream.RETAIN in edit.streams and config.retain is None:
            raise InputError(f"The method {edit.name!r} reads a retain set, and none was given.", "Give --retain DATA.")
        return
    recipe = build_recipe(config.method, config.parts)
    missing = sorted((recipe.preparation.offers if recipe.preparation else frozenset()) - LanguageAdapter.offers)
    if missing:
        raise InputError(
            f"The method {config.method!r} needs {', '.join(missing)}, which a language model does not offer.",
            "See `expunge methods --matrix` for those that run.",
        )
    _check_sides(
        config.method, recipe, retain=config.retain is not None, holdout=config.holdout is not None, base=config.base is not None
    )


def _check_models(recipe: Recipe, adapter: LanguageAdapter) -> None:
    """A language model's oracle comes from a file: there is no second model in a request."""
    if Of.ORACLE in recipe.models(adapter.layers()):
        raise InputError(
            f"The method {recipe.name!r} reads an oracle: what a model trained without the forget set says.",
            "Give it: preparation=given-outputs preparation.file=FILE.npz.",
        )


def _check_features(recipe: Recipe, adapter: LanguageAdapter, needs: frozenset[Need]) -> None:
    """What is trained for a further request has no place for the names of a composite's blocks."""
    if recipe.parameters.beside and getattr(adapter.model, "kind", None) and any(v.startswith("features:") for _, _, v in needs):
        raise InputError(
            f"The method {recipe.name!r} reads hidden states, which a further request on a composite model cannot.",
            "Use terms that read losses or logits.",
        )


def _check_sides(method: str, recipe: Recipe, *, retain: bool, holdout: bool, base: bool) -> None:
    if recipe.start == "initial" and not base:
        raise InputError(f"The method {method!r} starts from the untrained base model.", "Give it: --base MODEL.")
    if Stream.VALIDATION in recipe.looks and not holdout:
        raise InputError(f"The method {method!r} chooses by held-out data, and none were given.", "Give --holdout DATA.")
    if recipe.retain and not retain:
        raise InputError(
            f"The method {method!r} keeps a retain set, and none was given.", "Give --retain DATA, or choose retain=none."
        )
    if Stream.RETAIN in recipe.parameters.reads and not retain:
        raise InputError(
            f"parameters={recipe.parameters.name} reads a retain set, and none was given.",
            "Give --retain DATA, or choose parameters=lora.",
        )


def goal_of(made: UnlearnPlan) -> Goal | None:
    """What the forget set should look like, measured on the target model; None where the schedule does not ask."""
    if isinstance(made.recipe, (Edit, Shield)):
        return None
    schedule = made.recipe.schedule
    if not (isinstance(schedule, Adaptive) or schedule.lr is None) or not made.recipe.forget:
        return None
    holdout, retain = made.goal_records
    watched = made.recipe.watched
    marked = made.request.forget.records if watched == "marked" else None
    if marked is None:
        known = bool(holdout) or len(retain) > 1
    else:
        known = any(r.spans for r in holdout) or bool(swapped(marked, made.engine.seed))
    if not known:
        return None

    def losses(records: Sequence[Record]) -> list[float]:
        examples = [made.adapter.encode(r) for r in records]
        return mean_losses(made.adapter, made.adapter.model, examples, made.engine.max_tokens, targets=watched)

    return estimate_goal(losses, holdout, retain, made.engine.seed, marked=marked)


def run_in_memory(
    made: UnlearnPlan, *, folder: Path | None = None, resume: bool = False, progress: Progress | None = None
) -> tuple[Outcome, Goal | None]:
    """Change the model that the plan holds, or put a guard before it."""
    if isinstance(made.recipe, Shield):
        asked = made.request
        made.adapter, guarded = apply_guard(
            made.adapter, made.recipe, asked.forget, asked.retain, seed=made.engine.seed, target=made.source
        )  # fmt: skip
        return guarded, None
    if isinstance(made.recipe, Edit):
        return apply_edit(made.adapter, made.recipe, made.examples, made.engine, progress=progress), None
    goal = goal_of(made)
    outcome = train(
        made.adapter, made.recipe, made.examples, made.engine, goal=goal, folder=folder,
        origin=made.began.origin if made.began else None,
        cache=cache_folder() / "references" if folder else None, resume=resume, progress=progress,
    )  # fmt: skip
    return outcome, goal


def execute(
    made: UnlearnPlan,
    config: UnlearnConfig,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    command: Sequence[str] | None = None,
) -> Run:
    """Unlearn and leave a run folder with ``model/``.

    Raises:
        Destroyed: the loss became NaN or infinite; the last good weights are in ``model/``.
    """
    check_room(out, made.cost.disk, "Unlearning")
    dump = config.model_dump(mode="json")
    run = first_process(lambda: Run.start(out, "unlearn", dump, resume=resume, command=command), lambda: Run.open(out))
    spec = made.recipe.spec()
    sets = {"forget": made.request.forget, "retain": made.request.retain, "holdout": made.request.holdout}
    inputs = {
        "target": made.adapter.fingerprint(), "recipe": spec, "engine": config.engine.model_dump(mode="json"),
        "data": {k: v.digest for k, v in sets.items() if v is not None},
        **({"origin": made.began.digest} if made.began else {}),
    }  # fmt: skip
    run.check_same("unlearn", inputs)
    first_process(lambda: keep_copy(config.tuned, out), lambda: None)
    run.note_inputs(**{k: describe_data(v) for k, v in sets.items() if v is not None})
    run.note_inputs(target={"source": config.model, "digest": inputs["target"]}, overlap=made.request.overlap.to_json())

    def work() -> dict[str, Any]:
        outcome, goal = run_in_memory(made, folder=out, resume=resume, progress=progress)
        result = save_outcome(made.adapter, outcome, out)
        return result | {"recipe": spec, "goal": goal.model_dump() if goal else None, "notes": outcome.notes}

    log = [] if isinstance(made.recipe, (Edit, Shield)) else ["log.jsonl"]
    try:
        result = run.stage("unlearn", inputs, work, ["model", "training.json", *log])
    except InputError:
        _withdraw(out)
        raise
    drop_checkpoint(out)
    if result["reason"] == "diverged":
        raise Destroyed(result["sentence"])
    return run


def _withdraw(out: Path) -> None:
    """Remove the folder of a run that was refused before it left anything, so that it can be asked for again under this name."""
    if {p.name for p in out.iterdir()} <= {"manifest.json", COPY}:
        shutil.rmtree(out, ignore_errors=True)


def from_config(config: UnlearnConfig) -> UnlearnPlan:
    """Load everything that a configuration names and plan the run.

    Raises:
        InputError: anything does not fit; nothing was started.
    """
    check_method(config)
    check_tuned(config.tuned)
    request = load_request(config)
    adapter = open_adapter(config.model, config.text, dropout=config.engine.dropout)
    base = open_adapter(config.base, config.text, dropout=config.engine.dropout) if config.base else None
    return plan(
        adapter, request, config.method, config.parts, config.engine,
        how=config.alternatives, template=config.alternative_template, base=base, source=config.model,
    )  # fmt: skip
