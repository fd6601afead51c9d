"""A run over many objects that is killed again and again: how, and what must hold of what it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffinv.core.checks import DiffinvError
from diffinv.data.products import read_product
from diffinv.engine.manifest import read_journals

FAST = ("--samples", "2", "--set", "sampler.name=diffpir", "--set", "sampler.steps=2", "--set", "sampler.guidance.iterations=1")
VICTIMS = ("worker", "worker", "parent")  # drawn with equal chances


def start(source: Path, out: Path, prior: Path, *extra: str) -> subprocess.Popen[bytes]:
    """`diffinv sample` as a process."""
    arguments = [sys.executable, "-m", "diffinv", "sample", str(source), "--out", str(out), "--prior", str(prior), *FAST, *extra]
    with open(out.with_suffix(".log"), "ab") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=log, env=environment)


def children(pid: int) -> list[int]:
    """The worker processes of a supervisor."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and b"spawn_main" in (path.parent / "cmdline").read_bytes():
                found.append(int(path.parent.name))
        except (OSError, ValueError):
            continue
    return found


def products(out: Path) -> list[Path]:
    return sorted((out / "products").glob("*/*.fits"))


@dataclass
class Storm:
    """A run with `workers` that is killed at given numbers of products, and one beside it from the given kill on."""

    source: Path
    out: Path
    prior: Path
    workers: int
    beside_from: int
    killed: Counter[str] = field(default_factory=Counter)
    starts: int = 0

    def rage(self, thresholds: Sequence[int], rng: np.random.Generator) -> None:
        """Kill −9 at every threshold; a supervisor that was killed, or has finished, is started again."""
        run, beside = self._start(), None
        try:
            for number, threshold in enumerate(thresholds):
                while len(products(self.out)) < threshold:
                    if run.poll() is not None:
                        run = self._start()
                    time.sleep(0.02)
                if number >= self.beside_from and (beside is None or beside.poll() is not None):
                    beside = self._start()
                victim = str(rng.choice(VICTIMS))
                target = beside if beside is not None and beside.poll() is None and rng.random() < 0.5 else run
                self._kill(target, victim, rng)
            while run.poll() is None or (beside is not None and beside.poll() is None):
                time.sleep(0.1)
        finally:
            for process in (run, beside):
                if process is not None:
                    process.kill()
                    process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        return start(self.source, self.out, self.prior, "--workers", str(self.workers))

    def _kill(self, process: subprocess.Popen[bytes], victim: str, rng: np.random.Generator) -> None:
        """One kill −9 of a process that lives; where there is no worker yet, it is the supervisor."""
        pids = children(process.pid) if victim == "worker" else []
        try:
            os.kill(int(rng.choice(pids)) if pids else process.pid, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(process.pid, signal.SIGKILL)
        self.killed["worker" if pids else "parent"] += 1
        if not pids:
            process.wait()


@dataclass(frozen=True)
class Damage:
    """What was found. wasted: attempts beyond the first that were begun after a product of the object was there."""

    valid: int
    corrupt: int
    duplicated: int
    different: int
    attempts: int
    wasted: int
    quarantined: int
    temporary: int


def survey(out: Path, reference: Path) -> Damage:
    """What a run left, beside an undisturbed one."""
    ours, corrupt, duplicated = parts(out)
    theirs, _, _ = parts(reference)
    events = sorted((e for j in read_journals(out) for e in j.events[1:]), key=lambda e: e["time"])
    done: dict[str, float] = {}
    for event in events:
        if event["event"] == "done" and event.get("fresh"):
            done.setdefault(event["object_id"], event["time"])
    attempts = [e for e in events if e["event"] == "start"]
    return Damage(
        valid=len(ours),
        corrupt=corrupt,
        duplicated=duplicated,
        different=sum(ours.get(name) != data for name, data in theirs.items()),
        attempts=len(attempts),
        wasted=sum(e["time"] > done.get(e["object_id"], np.inf) for e in attempts),
        quarantined=len(list((out / "quarantine").glob("*.json"))),
        temporary=len(list(out.rglob(".*.part"))),
    )


def parts(out: Path) -> tuple[dict[str, tuple[bytes, ...]], int, int]:
    """Object → the bytes of its data, and how many products are corrupt or not the first of their object."""
    found: dict[str, tuple[bytes, ...]] = {}
    corrupt = duplicated = 0
    for path in products(out):
        try:
            product = read_product(path)
        except DiffinvError:
            corrupt += 1
            continue
        duplicated += product.object_id in found
        columns = [np.asarray(column) for column in product.catalog.values()]
        arrays = [product.mean, product.std, product.quality, product.samples, *product.quantiles.values(), *columns]
        found[product.object_id] = tuple(array.tobytes() for array in arrays)
    return found, corrupt, duplicated
