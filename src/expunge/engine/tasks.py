"""Independent pieces of work, in this process or on the workers of a Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch

from expunge.core.errors import ExpungeError, InputError, MissingExtra

K = TypeVar("K")
Workers = Literal["local", "ray"]


def spread(
    work: Callable[[Any, Any], Any],
    common: Any,
    jobs: Iterable[tuple[K, Any]],
    *,
    workers: Workers = "local",
    address: str | None = None,
) -> Iterator[tuple[K, Any]]:
    """``work(common, job)`` for every job; results with their keys, as they come (in this process: in order).

    Args:
        work: a function of its two arguments alone, importable on the workers; there it has one processor.
        common: sent to the workers once.
        jobs: pairs of key and job; each job is sent to one worker, and made only when it is its turn in this process.
        workers: "local" or "ray".
        address: of a Ray cluster; None joins the one that this process is connected to, or starts one on this machine and ends it
            afterwards.

    Raises:
        InputError: an address is given without Ray.
        MissingExtra: workers are "ray" and ray is not installed.
        ExpungeError: what ``work`` raised, as it raised it.
    """
    if workers != "ray":
        if address is not None:
            raise InputError("An address is given, but the work is done in this process.", 'Choose workers="ray".')
        yield from ((key, work(common, job)) for key, job in jobs)
        return
    try:
        import ray
    except ImportError:
        raise MissingExtra("Work on Ray workers", "ray") from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    try:
        # One processor and so one thread per task: Ray tells the arithmetic libraries.
        task = ray.remote(num_cpus=1)(work)
        held = ray.put(common)
        waiting = {task.remote(held, job): key for key, job in jobs}
        while waiting:
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            key = waiting.pop(done)
            try:
                found = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, ExpungeError):  # its own sentence, not the worker's traceback
                    raise error.cause from None
                raise
            yield key, found
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for arithmetic while open: sums split over another number of threads may differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
