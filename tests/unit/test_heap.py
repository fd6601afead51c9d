"""The heap keeps what is freed: pages of large tensors are not taken from the system again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from diffinv.core.heap import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):
    tensors = [torch.ones(2**20) for _ in range(20)]
    del tensors
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    tensors = [torch.ones(2**20) for _ in range(20)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone has the option")
def test_memory_that_was_freed_is_used_again() -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # else a heap may keep its top by luck
    run = lambda mode: subprocess.run(
        [sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True, env=environment
    )
    found = {mode: int(run(mode).stdout) for mode in ("plain", "keep")}
    assert found["keep"] < 0.1 * found["plain"]
