"""Several runs at a time, each in a process of its own with its share of the threads.

A small model keeps one core busy at best: two of them trained side by side take hardly longer than one.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from expunge.engine.outcome import Progress

_steps: Any = None  #: in a worker: steps done and steps in all, two numbers per job


@dataclass(frozen=True)
class Job:
    """A run to be done: the configuration of its kind, and its folder."""

    kind: Literal["train", "unlearn", "rows", "rows-audit", "trial"]
    config: dict[str, Any]
    out: str


def run_jobs(jobs: Sequence[Job], progress: Progress | None = None, workers: int | None = None) -> None:
    """Do all jobs; the first error is raised after those under way have ended.

    Args:
        jobs: independent of each other, each with a folder of its own; a folder with a killed run is gone on with.
        progress: told the steps of all jobs together.
        workers: processes; none: as many as there are cores, at most four and no more than jobs.
    """
    if not jobs:
        return
    n = min(len(jobs), workers or max(1, min(4, os.cpu_count() or 1)))
    if n == 1:
        for job in jobs:
            _work(job, progress)
        return
    context = multiprocessing.get_context("spawn")
    steps = context.Array("q", 2 * len(jobs))
    threads = max(1, (os.cpu_count() or n) // n)
    with ProcessPoolExecutor(n, mp_context=context, initializer=_start, initargs=(steps, threads)) as pool:
        futures: list[Future[None]] = [pool.submit(_in_worker, job, i) for i, job in enumerate(jobs)]
        while not all(f.done() for f in futures):
            time.sleep(0.2)
            if progress:
                running = sum(f.running() for f in futures)
                progress(sum(steps[::2]), max(1, sum(steps[1::2])), f"{running} at a time")
        for future in futures:
            future.result()


def _start(steps: Any, threads: int) -> None:
    global _steps  # noqa: PLW0603 - the only way for a pool to hand shared memory to its workers
    _steps = steps
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next job for ever, or work on beside the one that resumes."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_worker(job: Job, index: int) -> None:
    def tell(done: int, total: int, text: str) -> None:
        _steps[2 * index], _steps[2 * index + 1] = done, total

    _work(job, tell)


def _work(job: Job, progress: Progress | None) -> None:
    from expunge.pipeline import row_audit, row_runs, sweep_trial, train, unlearn
    from expunge.pipeline.config import TrainConfig, UnlearnConfig

    out = Path(job.out)
    if job.kind == "trial":
        sweep_trial.execute(job.config, out, progress)
        return
    resume = (out / "manifest.json").is_file()
    if job.kind == "train":
        train.execute(train.plan(TrainConfig(**job.config)), out, resume=resume, progress=progress)
    elif job.kind == "rows":
        row_runs.execute(row_runs.plan(row_runs.RowsConfig(**job.config)), out, resume=resume, progress=progress)
    elif job.kind == "rows-audit":
        runs = [out / name for name in job.config["runs"]]
        config = row_audit.RowAuditConfig(**job.config["audit"])
        row_audit.audit_together(out, runs, config, title=job.config["title"], progress=progress)
    else:
        request = UnlearnConfig(**job.config)
        unlearn.execute(unlearn.from_config(request), request, out, resume=resume, progress=progress)
