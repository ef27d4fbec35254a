"""General ability by the Language Model Evaluation Harness (Gao et al., EleutherAI), on models that lie here, without a network.

Three kinds of tasks: the harness's own by name (their data come from the hub or its cache), tasks of a folder of YAML files, and
any set of records with wrong answers that Expunge reads (``mmlu:test?folder=...``, a file with ``perturbed_answer``), of which a
multiple-choice task is made on the spot. Forgetting is never measured by it: for that the metrics here are made.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge.adapters.language import LanguageAdapter
from expunge.core.errors import InputError, MissingExtra
from expunge.core.results import Direction, Number
from expunge.core.statistics import wilson
from expunge.data.named import is_named
from expunge.data.records import Record
from expunge.data.sources import load
from expunge.pipeline.models import refuse_composite

_SHARES = ("acc", "acc_norm", "exact_match", "em")  #: metrics that are proportions of right answers


def general_ability(
    adapter: LanguageAdapter,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch: int = 8,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Number]:
    """Scores of a model on tasks of the harness.

    Args:
        adapter: holds the model.
        tasks: names of the harness, names of tasks in ``include``, or sets of records with wrong answers.
        include: folder of YAML files with tasks of one's own.
        shots: solved examples before each question; none: as the task says.
        limit: only the first so many questions of each task.
        batch: questions per forward pass.
        level: of the intervals; proportions have Wilson's, others the harness's standard error.
        seed: of whatever the harness draws.

    Returns:
        ``<task>.<metric>`` to number; the note says how many questions and which version of the harness.

    Raises:
        MissingExtra: lm-eval is not installed.
        InputError: there is no such task, its data cannot be had, or the model is more than one network.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingExtra("General ability by lm-evaluation-harness", "eval") from None
    refuse_composite(adapter)
    if not tasks:
        raise InputError("No task was given.", "Name one, such as hellaswag, or a set of records with wrong answers.")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        own = {t: record_task(t, Path(folder), i) for i, t in enumerate(tasks) if is_named(t) or Path(t).is_file()}
        place = str(include) if include else None
        manager = TaskManager(include_path=place, include_defaults=False)  # its own tasks take half a minute to be indexed
        unknown = [t for t in tasks if t not in own and not manager.match_tasks([t])]
        if unknown:
            manager = TaskManager(include_path=place)
            unknown = [t for t in unknown if not manager.match_tasks([t])]
        if unknown:
            raise InputError(
                f"The harness has no task {unknown[0]!r}.", "See `lm-eval ls tasks`, or give a folder of tasks: --include."
            )
        model = HFLM(
            pretrained=adapter.model, tokenizer=adapter.tokenizer, batch_size=batch, max_length=adapter.context,
            device=str(next(adapter.model.parameters()).device),
        )  # fmt: skip
        try:
            found = lm_eval.simple_evaluate(
                model=model, tasks=[own.get(t, t) for t in tasks], num_fewshot=shots, limit=limit, task_manager=manager,
                bootstrap_iters=0, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
                log_samples=False,
            )  # fmt: skip
        except (OSError, ConnectionError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise InputError(f"The harness could not run: {reason}.", "Fetch the task's data once with a connection.") from error
    if found is None:
        raise InputError("The harness gave no result: it runs on the first process only.")
    labels = {config["task"]: name for name, config in own.items()}
    return _numbers(found, labels, getattr(lm_eval, "__version__", ""), level)


def record_task(source: str, folder: Path, number: int) -> dict[str, Any]:
    """A multiple-choice task of the harness, made of records with wrong answers; its data are a file in ``folder``.

    Raises:
        InputError: the records cannot be read, or one has no prompt or no wrong answer.
    """
    lines = []
    for record in load(source, name="task"):
        if not record.prompt or not record.perturbed:
            raise InputError(
                f"The record {record.id!r} of {source} has no {'wrong answer' if record.prompt else 'prompt'}.",
                "A task needs questions with wrong answers (perturbed_answer).",
            )
        lines.append(_line(record))
    path = folder / f"task-{number}.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return {
        "task": f"expunge_{number}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "target_delimiter": "", "num_fewshot": 0,
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
        "metadata": {"version": 1.0},
    }  # fmt: skip


def _line(record: Record) -> dict[str, Any]:
    """Prompt and options as they are joined; without a template of its own a question is asked as question and answer."""
    prompt = record.prompt if record.verbatim else f"Question: {record.prompt}\nAnswer:"
    space = "" if record.verbatim else " "
    return {"prompt": prompt, "choices": [space + record.answer, *(space + w for w in record.perturbed)], "answer": 0}


def _numbers(found: Mapping[str, Any], labels: Mapping[str, str], version: str, level: float) -> dict[str, Number]:
    out = {}
    for task, held in found["results"].items():
        sizes = found.get("n-samples", {}).get(task, {})
        n = int(sizes.get("effective", sizes.get("original", 0)))
        for key, value in held.items():
            metric, _, variant = key.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr") or not variant:
                continue
            name = f"{labels.get(task, task)}.{metric}" + ("" if variant == "none" else f".{variant}")
            note = f"{n} questions, lm-evaluation-harness {version}, version {found.get('versions', {}).get(task)} of the task"
            error = held.get(f"{metric}_stderr,{variant}")
            up = found.get("higher_is_better", {}).get(task, {}).get(metric, True)
            direction = Direction.UTILITY_UP if up else Direction.UTILITY_DOWN
            out[name] = _number(metric, value, n, error, direction, level, note)
    return out


def _number(metric: str, value: float, n: int, error: Any, direction: Direction, level: float, note: str) -> Number:  # noqa: PLR0917
    if metric in _SHARES and n and 0 <= value <= 1:
        return wilson(round(value * n), n, level).number(direction, (0.0, 1.0), note).model_copy(update={"value": value})
    half = None
    if isinstance(error, float) and math.isfinite(error):
        from scipy import special

        half = float(special.ndtri((1 + level) / 2)) * error
    bounds = {} if half is None else {"low": value - half, "high": value + half}
    return Number(value=value, **bounds, level=level, over="examples", n=n, clusters=n, direction=direction, note=note).checked()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness writes to standard error and opens bars; both would break a command's output."""
    held = {k: os.environ.get(k) for k in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS")}
    os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        for key, value in held.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
