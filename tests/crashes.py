"""Processes that die at their k-th call of anything that touches the disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
CALLS = {"open", "write", "flush", "fsync", "flock", "fstat", "read", "readall", "close", "replace", "unlink", "mkdir", "stat"}
CALLS |= {"__exit__", "lseek", "rename", "seek", "scandir"}


def dies(k: int, action: Callable[[], object]) -> bool:
    """Whether a fork of this process, killed at its k-th call, died before the action's end. For processes of one thread."""
    if os.fork() == 0:
        left = [k]

        def count(frame: FrameType, event: str, call: Callable) -> None:
            if event == "c_call" and call.__name__ in CALLS:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        action()
        sys.setprofile(None)
        os._exit(0)
    _, status = os.wait()
    return os.WTERMSIG(status) == signal.SIGKILL


def last_call(program: str, folder: Path, last: int, fewest: int) -> int:
    """The last call of the action of `program`, which prints k and `dies(k, …)` for k = 1 … last − 1; every call before kills.

    Arguments: folder, last: arguments of the program. fewest: calls that the action must have for the test to mean anything.
    """
    run = [sys.executable, "-c", program, str(folder), str(last)]
    ends = subprocess.run(run, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
    killed = {int(k): died == "True" for k, died in zip(ends[::2], ends[1::2], strict=True)}
    assert list(killed) == list(range(1, last))
    calls = max(k for k, died in killed.items() if died)
    assert fewest <= calls < last - 1 and all(killed[k] for k in range(1, calls + 1))
    return calls
