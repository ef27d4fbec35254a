"""Stages of a long experiment: each in a process of its own, within a limit; what fails stands in a file and stops nothing."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.tofu_small import say
from expunge.core.errors import ExpungeError
from expunge.core.files import write_text


@dataclass(frozen=True)
class Stages:
    """How stages are done.

    Attributes:
        limit: seconds that one may take.
        apart: in a process of its own, whose peak memory then is the stage's; it must leave files, for nothing comes back.
    """

    limit: float = 300.0
    apart: bool = True

    def do(self, name: str, work: Callable[[], None], failure: Path, *, again: bool = False) -> None:
        """Do a stage.

        Args:
            name: for the log.
            work: what to do.
            failure: file for the message of what went wrong; where it is there already, the stage is not tried again.
            again: try it all the same, and without a limit.
        """
        if failure.is_file() and not again:
            return
        failure.unlink(missing_ok=True)
        started = time.perf_counter()
        if self.apart:
            self._apart(work, failure, None if again else self.limit)
        else:
            _guarded(work, failure)
        ended = f"FAILED: {failure.read_text(encoding='utf-8')}" if failure.is_file() else "done"
        say(f"{name}: {ended} ({time.perf_counter() - started:.1f} s)")

    def _apart(self, work: Callable[[], None], failure: Path, limit: float | None) -> None:
        process = multiprocessing.get_context("fork").Process(target=_guarded, args=(work, failure))
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
            write_text(failure, f"Not finished within {limit:.0f} s.")
        elif process.exitcode:
            write_text(failure, f"The process ended with exit code {process.exitcode}.")


def _guarded(work: Callable[[], None], failure: Path) -> None:
    try:
        work()
    except ExpungeError as error:
        write_text(failure, str(error))
    except Exception as error:  # a defect of one method is a finding, and no reason to lose the others
        write_text(failure, f"{type(error).__name__}: {error}")
