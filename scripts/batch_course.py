"""The course of a run: its processor time and memory at every attempt that it begins, and at its last product."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffinv.engine.manifest import read_journals

_EVERY = 0.1  # seconds
_TICK, _PAGE = 1 / os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(frozen=True, eq=False)
class Course:
    """clock, processor: (N + 1,) seconds at the N attempts of a run of one process and at its last product. memory: MiB held.

    wall, spent, most: the whole process, the start and the report included.
    """

    clock: np.ndarray
    processor: np.ndarray
    memory: np.ndarray
    wall: float
    spent: float
    most: float

    @property
    def span(self) -> float:
        """Processor seconds from the first attempt to the last product."""
        return float(self.processor[-1] - self.processor[0])


def follow(process: subprocess.Popen[bytes], out: Path) -> Course:
    """Watch a run of one process until its end.

    Raises: RuntimeError if it fails.
    """
    began, seen = time.perf_counter(), []
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        seen.append((time.time(), (int(fields[11]) + int(fields[12])) * _TICK, int(fields[21]) * _PAGE))
        time.sleep(_EVERY)
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise RuntimeError(f"the run ended with status {status}")
    events = [e for j in read_journals(out) for e in j.events]
    done = [e["time"] for e in events if e["event"] == "done" and e["fresh"]]
    times = np.array(sorted(e["time"] for e in events if e["event"] == "start") + done[-1:])
    at, processor, memory = (np.array(column) for column in zip(*seen))
    wall, spent = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
    of = lambda values: np.interp(times, at, values)
    return Course(times, of(processor), of(memory), wall, spent, usage.ru_maxrss / 1024)
