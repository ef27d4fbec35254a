"""Work that one process does while the others of a distributed job wait."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def drop_checkpoint(folder: Path) -> None:
    """Remove the checkpoint of a finished run: three times the size of the weights, and nothing reads it again."""
    first_process(lambda: shutil.rmtree(folder / "checkpoint", ignore_errors=True), lambda: None)


def first_process(work: Callable[[], T], others: Callable[[], T]) -> T:
    """Run ``work`` on the first process, then ``others`` on the rest; with one process just ``work``."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return work()
    from accelerate import PartialState

    state = PartialState()
    if state.is_main_process:
        result = work()
        state.wait_for_everyone()
        return result
    state.wait_for_everyone()
    return others()
