"""Train a model on records: the target, and its retrained twins that never saw the forget set."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.adapters.base import Example
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.memory import training_memory
from expunge.core.access import Stream
from expunge.core.errors import Destroyed, InputError
from expunge.core.files import atomic_path, check_room, digest_json
from expunge.core.runs import Run, cache_folder
from expunge.core.settings import nest
from expunge.data.records import Record, RecordSet, content_key
from expunge.engine.loop import train
from expunge.engine.outcome import Outcome, Progress, write_log_summary
from expunge.engine.parts import Recipe
from expunge.methods.recipe import build as build_recipe
from expunge.pipeline.config import TrainConfig
from expunge.pipeline.cost import Cost, estimate
from expunge.pipeline.models import (
    all_texts,
    check_memory,
    describe_data,
    load_set,
    load_sets,
    open_adapter,
    refuse_composite,
    resolve,
)
from expunge.pipeline.processes import drop_checkpoint, first_process

_DEFAULTS: dict[str, Any] = {"schedule": {"name": "fixed", "lr": None, "epochs": 10, "batch": 16, "warmup": 1, "decay": "linear"}}


@dataclass
class TrainPlan:
    """A training run that has passed every check and has not begun."""

    config: TrainConfig
    adapter: LanguageAdapter
    recipe: Recipe
    examples: list[Example]
    records: RecordSet
    cost: Cost
    base: str


def load_all(sources: Sequence[str], columns: dict[str, str], name: str) -> RecordSet:
    """Load several sources as one set; records that say the same are kept once.

    Raises:
        InputError: a source cannot be read, or two records with one id differ in content.
    """
    seen: dict[str, str] = {}
    records: list[Record] = []
    for held in load_sets({source: source for source in sources}, columns).values():
        for record in held:
            key = content_key(record)
            if seen.get(record.id) == key:
                continue
            if record.id in seen:
                raise InputError(
                    f"Two different records are called {record.id!r} in {', '.join(sources)}.",
                    "Give ids that are unique across your files.",
                )
            seen[record.id] = key
            records.append(record)
    return RecordSet(name, tuple(records), ", ".join(sources))


def plan(config: TrainConfig) -> TrainPlan:
    """Check everything and say what it will cost; nothing is written."""
    records = load_all(config.data, config.text.columns, "training data")
    vocabulary = records
    if config.exclude:
        gone = set(config.exclude)
        records = RecordSet(records.name, tuple(r for r in records if content_key(r) not in gone), records.source)
    if not len(records):
        raise InputError("No record is left to train on.", "Check the data and what is excluded.")
    recipe = build_recipe("finetune", with_defaults(config.parts))
    # The tokenizer of a model made from scratch covers all of the data, the excluded records too: with a vocabulary of its
    # own, a retrained model could not be compared token by token with the target.
    adapter, base = (
        (scratch_model(config, scratch_tokenizer(config, [vocabulary]), config.engine.seed), config.model)
        if config.scratch
        else (open_adapter(config.model, config.text, dropout=config.engine.dropout), config.model)
    )
    refuse_composite(adapter)
    examples = [adapter.encode(r) for r in records]
    parameters = sum(p.numel() for p in adapter.model.parameters())
    lora = recipe.parameters.factors
    memory = training_memory(adapter, config.engine.max_tokens, lora=lora, checkpointing=config.engine.gradient_checkpointing)
    check_memory(memory, "Training")
    disk = 3 * sum(p.numel() * p.element_size() for p in adapter.model.parameters())
    cost = estimate(recipe, {Stream.RETAIN: examples}, parameters, memory, disk)
    return TrainPlan(config, adapter, recipe, examples, records, cost, base)


def with_defaults(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a training; settings of a schedule without its name change the default one instead of replacing it."""
    given = nest(dict(parts))
    schedule = given.get("schedule", {})
    if isinstance(schedule, Mapping) and "name" not in schedule:
        given["schedule"] = {**_DEFAULTS["schedule"], **schedule}
    return given


def scratch_tokenizer(config: TrainConfig, sets: Sequence[RecordSet]) -> Any:
    """A word tokenizer made from the texts of some sets and of the further files that the configuration names."""
    from expunge.adapters.tokenise import DEFAULT_TEMPLATE
    from expunge.adapters.words import word_tokenizer

    # Words of people never trained on must be single tokens as those of the others are: spelt out in characters that the model
    # has never produced, they would look far less likely than anything unlearnt.
    more = [load_set(s, "vocabulary", config.text.columns) for s in config.vocabulary]
    return word_tokenizer([*all_texts([*sets, *more]), config.text.template or DEFAULT_TEMPLATE])


def scratch_model(config: TrainConfig, tokenizer: Any, seed: int) -> LanguageAdapter:
    """The preset with random weights."""
    from expunge.adapters.loading import wrap
    from expunge.adapters.presets import build

    return wrap(
        build(config.model, tokenizer, seed=seed), tokenizer, template=config.text.template, max_length=config.text.max_length,
        truncate=config.text.truncate, dropout=config.engine.dropout,
    )  # fmt: skip


def execute(made: TrainPlan, out: Path, *, resume: bool = False, progress: Progress | None = None) -> Run:
    """Train and leave a run folder with ``model/``.

    Raises:
        Destroyed: the loss became NaN or infinite; the last good weights are in ``model/``.
    """
    check_room(out, made.cost.disk, "Training")
    inputs = {
        "base": made.adapter.fingerprint(),
        "data": made.records.digest,
        "recipe": made.recipe.spec(),
        "engine": made.config.engine.model_dump(),
    }
    run = first_process(
        lambda: Run.start(out, "train", made.config.model_dump(mode="json"), resume=resume), lambda: Run.open(out)
    )
    run.check_same("train", inputs)
    run.note_inputs(data=describe_data(made.records), base={"source": made.base, "digest": inputs["base"]})

    def work() -> dict[str, Any]:
        outcome = train(
            made.adapter,
            made.recipe,
            {Stream.RETAIN: made.examples},
            made.config.engine,
            folder=out,
            resume=resume,
            progress=progress,
        )
        return save_outcome(made.adapter, outcome, out)

    result = run.stage("train", inputs, work, ["model", "training.json", "log.jsonl"])
    drop_checkpoint(out)
    if result["reason"] == "diverged":
        raise Destroyed(result["sentence"])
    return run


def save_outcome(adapter: LanguageAdapter, outcome: Outcome, out: Path) -> dict[str, Any]:
    """Write the model and how training ended; on the first process only. Returns what the manifest records."""

    def write() -> None:
        with atomic_path(out / "model") as temporary:
            adapter.save(temporary, outcome.model, state=outcome.gathered)
        write_log_summary(out, outcome)

    first_process(write, lambda: None)
    return {
        "reason": outcome.reason, "reached": outcome.reached, "sentence": outcome.sentence, "steps": outcome.steps,
        "lr": outcome.lr, "finish_scale": outcome.finish_scale, "tokens": outcome.tokens, "seconds": outcome.seconds,
        "peak_bytes": outcome.peak_bytes, "notes": outcome.notes,
    }  # fmt: skip


def retrained(
    target: str, forget: RecordSet, seed: int, *, base: str | None = None, retain: str | None = None,
    progress: Progress | None = None, say: Callable[[str], None] | None = None,
) -> Path:  # fmt: skip
    """The model trained without ``forget``: the target's own recipe and data minus the forget set, another seed.

    Kept in the cache by content, and trained only once.

    Args:
        target: the run folder of the target's training; or, with ``base`` and ``retain``, any model.
        forget: what the model must never see.
        seed: of initial weights (from scratch) and of the order of examples.
        base: the untrained base, if ``target`` is no training run.
        retain: what to train on, if ``target`` is no training run.
        progress: of the training.
        say: told whether the model came from the cache.

    Raises:
        InputError: nothing says how the target was trained.
    """
    made, out = retraining_of(target, forget, seed, base=base, retain=retain)
    if finished(out):
        if say:
            say(f"retrained model, seed {seed}: from the cache")
        return out
    execute(plan(made), out, resume=(out / "manifest.json").is_file(), progress=progress)
    return out


def retraining_of(
    target: str, forget: RecordSet, seed: int, *, base: str | None = None, retain: str | None = None
) -> tuple[TrainConfig, Path]:
    """The configuration of the training that :func:`retrained` asks for, and its folder in the cache.

    Raises:
        InputError: nothing says how the target was trained.
    """
    folder = Path(target)
    if (folder / "manifest.json").is_file() and Run.open(folder).manifest["kind"] == "train":
        config = TrainConfig(**Run.open(folder).manifest["config"])
    elif base and retain:
        config = TrainConfig(model=base, data=(retain,))
    else:
        raise InputError(
            f"To retrain without the forget set, Expunge must know how {target!r} was trained.",
            "Give a run folder of `expunge train` as the model, or --base MODEL with --retain DATA, "
            "or --retrained MODEL that you trained.",
        )
    return retraining(config, forget, seed)


def retraining(config: TrainConfig, forget: RecordSet, seed: int) -> tuple[TrainConfig, Path]:
    """The configuration of a training without ``forget``, and its folder in the cache."""
    gone = tuple(sorted({*config.exclude, *(content_key(r) for r in forget)}))
    made = config.model_copy(update={"exclude": gone, "engine": config.engine.model_copy(update={"seed": seed})})
    data = load_all(made.data, made.text.columns, "training data")
    left = [k for k in (content_key(r) for r in data) if k not in gone]  # with repetitions: how often a text is seen counts
    key = digest_json(
        ["retrained-1", resolve(made.model), sorted(left), made.model_dump(mode="json", exclude={"exclude", "data"})]
    )
    return made, cache_folder() / "models" / key[:24]


def finished(folder: Path) -> bool:
    """Whether a run folder holds a finished training."""
    return (folder / "manifest.json").is_file() and Run.open(folder).manifest["stages"].get("train", {}).get("state") == "done"


def training_recipe(folder: Path) -> dict[str, Any]:
    """The configuration of a training run, for the report."""
    held: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["config"]
    return held
