"""Parsl: whatever dies at a site, the output directory has every product once, and no process stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diffinv.assembly.sampling import choose_crew, read_site
from diffinv.cli import main
from diffinv.core.checks import ConfigError
from diffinv.engine.manifest import read_journals
from tests.small import FAST, write_prior
from tests.survey import ROOT, data_parts, finish, is_alive, wait_for, write_objects

SITE = "kind: local\nworkers: 2\nobjects: 2\nsilence: 10\n"
OBJECTS = [f"object-{k}" for k in range(24)]


def parents() -> dict[int, int]:
    """Process → its parent, of all that run."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            found[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    return found


def named(folder: Path) -> set[int]:
    """The processes whose arguments name a folder: a node manager has no parent among the run's."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                found.add(int(path.parent.name))
    return found


class Watched:
    """A run on a site, and every process that it was ever seen to have."""

    def __init__(self, source: Path, out: Path, prior: Path, site: Path) -> None:
        options = ["--engine", "parsl", "--site", str(site), "--prior", str(prior), *FAST]
        arguments = [sys.executable, "-m", "diffinv", "sample", str(source), "--out", str(out), *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.out, self.seen, self.dead = out, set(), set[int]()
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(arguments, **pipes, text=True, env=environment, cwd=source.parent)
        self.seen.add(self.process.pid)

    def look(self) -> None:
        """Note the descendants, also of those that have lost their parent since."""
        tree = parents()
        self.seen |= named(self.out)
        while new := {pid for pid, parent in tree.items() if parent in self.seen} - self.seen:
            self.seen |= new

    def worker(self) -> int:
        """A process that is at an object and was not killed here."""
        found: list[int] = []

        def at_work() -> bool:
            self.look()
            assert self.process.poll() is None, self.process.stderr.read()
            found[:] = [j.opening["pid"] for j in read_journals(self.out) if j.alive and j.unended()]
            found[:] = [pid for pid in found if is_alive(pid) and pid not in self.dead]
            return bool(found)

        wait_for(at_work, timeout=400)
        return found[0]

    def kill(self, pid: int) -> None:
        self.dead.add(pid)
        os.kill(pid, signal.SIGKILL)

    def all_gone(self) -> bool:
        self.look()
        return not any(map(is_alive, self.seen))


@pytest.mark.slow
def test_a_worker_its_node_manager_and_the_run_itself_may_die(tmp_path: Path) -> None:
    source, out, site = write_objects(tmp_path / "in", *OBJECTS), tmp_path / "out", tmp_path / "site.yaml"
    prior = write_prior(tmp_path / "tiny.safetensors")
    site.write_text(SITE)
    first = Watched(source, out, prior, site)
    try:
        first.kill(first.worker())
        worker = first.worker()
        manager = parents()[worker]
        assert manager in first.seen
        first.dead.add(worker)
        first.kill(manager)
        wait_for(lambda: not is_alive(worker), timeout=10)
        first.worker()  # of a new manager
        first.kill(first.process.pid)
        wait_for(first.all_gone, timeout=60)
        assert len(data_parts(out)) < len(OBJECTS)
        again = Watched(source, out, prior, site)
        wait_for(lambda: again.look() or again.process.poll() is not None, timeout=600)
        code, lines = finish(again.process)
        assert code == 0, lines
        wait_for(again.all_gone, timeout=20)
    finally:
        for pid in first.seen | named(out):
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        first.process.communicate()
    assert main(["sample", str(source), "--out", str(tmp_path / "alone"), "--prior", str(prior), *FAST]) == 0
    assert data_parts(out) == data_parts(tmp_path / "alone")
    assert not list(out.rglob("*.pkl")) and not list(out.rglob("checkpoint*"))


GUARDED = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
print(child.pid, os.getpid(), flush=True)
time.sleep(1000)
"""


def test_a_guard_ends_what_a_killed_program_leaves() -> None:
    command = [sys.executable, "-m", "diffinv.engine.guard", sys.executable, "-c", GUARDED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as guard:
        child, program = map(int, guard.stdout.readline().split())
        assert is_alive(child)
        os.kill(program, signal.SIGKILL)
        assert guard.wait(timeout=30) == 128 + signal.SIGKILL
        wait_for(lambda: not is_alive(child), timeout=5)


def test_a_run_does_not_import_parsl_unless_asked(tmp_path: Path) -> None:
    code = "import sys; from diffinv.cli import main; main(sys.argv[1:]); sys.exit(bool({'parsl', 'pyarrow'} & {*sys.modules}))"
    source, prior = write_objects(tmp_path / "in", "a"), write_prior(tmp_path / "tiny.safetensors")
    arguments = ["sample", str(source), "--out", str(tmp_path / "out"), "--prior", str(prior), *FAST]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: slurm\nworkers: 2\n", "needs a section `slurm`"),
        ("kind: local\nworkers: 2\nslurm: {walltime: '1:00:00'}\n", "another has none"),
        ("kind: cloud\nworkers: 2\n", "site.yaml:1 kind"),
        ("kind: local\nworker: 2\n", "did you mean workers"),
    ],
)
def test_a_wrong_site_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_site(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(SITE)
    for arguments, message in (
        (("local", path, None, None), "--site"),
        (("parsl", None, None, None), "give --site FILE"),
        (("parsl", path, 2, None), "neither --workers"),
        (("parsl", path, None, 5.0), "nor --timeout"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose_crew(*arguments)


def test_what_parsl_is_told_keeps_nothing_and_tells_nobody(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(SITE)
    config = read_site(path).config(tmp_path / "logs")
    assert config.usage_tracking == 0 and config.retries == 0 and config.memoizer is None and config.monitoring is None
    (executor,) = config.executors
    assert executor.block_error_handler.__name__ == "windowed_error_handler"


def test_without_parsl_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(SITE)
    monkeypatch.delitem(sys.modules, "diffinv.engine.sites", raising=False)
    monkeypatch.setitem(sys.modules, "parsl", None)
    with pytest.raises(ConfigError, match=r"diffinv\[parsl\]"):
        read_site(path)
