"""Runs over many objects as processes of their own, with objects that crash, hang or fail for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffinv.data.products import read_product
from diffinv.engine.manifest import Journal, read_journals
from tests.small import FAST, write_observation

ROOT = Path(__file__).resolve().parents[1]

# Workers import the main module again, so that the faults are in every process.
DRIVER = """
import os, signal, sys, time

if __name__ == "__mp_main__" and "STILLBORN" in os.environ:
    os._exit(3)

from diffinv.engine.run import Run

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
real = Run.read

def faulty(run, entry, path):
    name = entry.object_id
    if name.startswith("exits"):
        os._exit(70)
    if name.startswith("once") and not (run.out / name).exists():
        (run.out / name).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("hangs"):
        (run.out / (name + ".pid")).write_text(str(os.getpid()))
        time.sleep(1000)
    if name.startswith("full"):
        raise OSError(28, "No space left on device", str(path))
    if name.startswith("waits"):
        (run.out / (name + ".pid")).write_text(str(os.getpid()))
        while not (run.out / "go").exists():
            time.sleep(0.05)
    if name.startswith("fails"):
        raise RuntimeError("as it always does")
    return real(run, entry, path)

Run.read = faulty

if __name__ == "__main__":
    from diffinv.cli import main
    sys.exit(main())
"""


def write_objects(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        write_observation(folder / f"{name}.fits", seed=number)
    return folder


def start(source: Path, out: Path, prior: Path, *extra: str, **variables: str) -> subprocess.Popen[str]:
    """`diffinv sample` with faulty objects, as a process."""
    driver = out.parent / "driver.py"
    driver.write_text(DRIVER)
    out.mkdir(exist_ok=True)
    arguments = [sys.executable, str(driver), "sample", str(source), "--out", str(out), "--prior", str(prior), *FAST, *extra]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=out.parent)


def pid_of(out: Path, name: str) -> int:
    """The process at work on an object that waits or hangs, as soon as there is one."""
    path = out / f"{name}.pid"
    wait_for(lambda: path.exists() and path.read_text() != "")
    return int(path.read_text())


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def finish(process: subprocess.Popen[str], timeout: float = 180) -> tuple[int, str]:
    """Exit code and stderr."""
    try:
        _, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, errors


def wait_for(condition: Callable[[], bool], timeout: float = 90) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def data_parts(out: Path) -> dict[str, dict[str, bytes]]:
    """Object → the bytes of all arrays and table columns of its product; an object with two products is an error."""
    found: dict[str, dict[str, bytes]] = {}
    for path in (out / "products").glob("*/*.fits"):
        product = read_product(path)
        assert product.object_id not in found
        arrays = {"mean": product.mean, "std": product.std, "quality": product.quality, "samples": product.samples}
        arrays |= {f"q{level}": cube for level, cube in product.quantiles.items()}
        arrays |= {f"column {name}": np.asarray(column) for name, column in product.catalog.items()}
        found[product.object_id] = {name: array.tobytes() for name, array in arrays.items()}
    return found


def reasons(out: Path) -> dict[str, str]:
    records = [json.loads(path.read_text()) for path in (out / "quarantine").glob("*.json")]
    return {record["object_id"]: record["reason"] for record in records}


def events(out: Path, kind: str) -> list[str]:
    """The objects of all events of a kind, in the order of their times."""
    journals: list[Journal] = read_journals(out)
    found = [event for journal in journals for event in journal.events if event["event"] == kind]
    return [event["object_id"] for event in sorted(found, key=lambda event: event["time"])]
