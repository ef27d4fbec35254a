"""Freed memory kept at hand while a loop runs that frees and takes the same blocks at every step.

glibc gives large freed blocks back to the system at once, and the system fills each page with zeros when it is taken again:
for a training step on a processor that is a tenth of its time. PyTorch's guide to performance on processors advises another
allocator for this reason; two settings of the one that is there do the same.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_DEFAULT = 32 * 2**20  # where glibc's own thresholds end up in a process that frees blocks this large
_open = 0


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """While open, memory that is freed stays with the process; at the end all that is free goes back to the system.

    May be nested. Without glibc (macOS, Windows, musl) nothing happens.
    """
    global _open  # noqa: PLW0603  (the allocator is one per process)
    mallopt, trim = _function("mallopt"), _function("malloc_trim")
    if mallopt is None or trim is None:
        yield
        return
    _open += 1
    try:
        if _open == 1:
            for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
                mallopt(option, 2**31 - 1)
        yield
    finally:
        _open -= 1
        if _open == 0:
            for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
                mallopt(option, _DEFAULT)
            trim(0)


def _function(name: str) -> Callable[..., Any] | None:
    """A function of the C library."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
