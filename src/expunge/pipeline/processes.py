"""Work that one process does while the others of a distributed job wait."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


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
