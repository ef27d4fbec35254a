"""Freed memory kept at hand."""

import subprocess
import sys

import pytest

PROBE = """
import resource
import numpy as np
from contextlib import nullcontext
from expunge.core.memory import freed_memory_kept

def faults(open_it):
    with freed_memory_kept() if open_it else nullcontext():
        np.ones(8_000_000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            np.ones(8_000_000)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with freed_memory_kept():
    nested = faults(True)
print(faults(False), faults(True), nested, faults(False))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
def test_blocks_are_used_again_while_it_is_open_and_not_after() -> None:
    out = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout
    before, kept, nested, after = map(int, out.split())
    assert before > 500  # 61 MiB five times, whatever the size of a page
    assert kept < before / 10
    assert nested < before / 10
    assert after > before / 2
