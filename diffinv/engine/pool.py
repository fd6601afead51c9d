"""Several processes on one list of objects, fed a hand of them at a time by a supervisor that outlives every one of them.

A process that dies takes down only its objects in flight, which another process tries again, each by itself; one that takes
longer than the time limit is ended. That counts as the crash of an object that was alone, and as a kill of those that were
together. The supervisor alone decides, and writes the manifest. A signal to stop gives the objects in flight a few seconds to
finish; those that do not are dropped, and blamed for nothing.
Invariant: no process is left behind, whatever ends the supervisor.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Self

import torch

from diffinv.core.checks import ConfigError
from diffinv.data.catalog import Entry
from diffinv.engine.campaign import Campaign, Outcome, Task, look_around, open_ledger
from diffinv.engine.devices import choose_device, own_device, sharers
from diffinv.engine.progress import Progress
from diffinv.engine.run import Plan, Run, print_error, suit
from diffinv.engine.shards import Shard
from diffinv.engine.together import hand_size
from diffinv.engine.worker import DISK, DONE, FAILED, READY, REFUSED, serve
from diffinv.priors.store import load_prior

GRACE = 5.0  # seconds that objects in flight have after a signal to stop
_STILLBORN = 3  # processes in a row that die before they are ready
_TICK = 0.5  # seconds between looks at the time limit


@dataclass(frozen=True)
class Recipe:
    """What a process needs to make the products of a run. prior: name or path. device: of a configuration, resolved where the
    process is. dtype: a name of torch's."""

    out: Path
    prior: str
    device: str
    dtype: str
    plan: Plan

    def build(self, number: int = 0, of: int = 1) -> Run:
        """The run, with the prior on this process's device. number, of: as of `own_device`.

        Raises: DiffinvError as `choose_device`, `load_prior` and `Run`.
        """
        chosen = choose_device(self.device, self.dtype)
        device, plan = own_device(chosen, number, of), replace(self.plan, processes=sharers(chosen, self.plan.processes))
        prior = load_prior(self.prior, device=device, dtype=getattr(torch, self.dtype))
        return Run(self.out, prior, plan, new_run=True)


def run_pool(
    run: Run,
    recipe: Recipe,
    entries: Sequence[Entry],
    shard: Shard,
    *,
    workers: int,
    timeout: float | None,
    max_failed: float,
) -> Outcome:
    """A product for every object of the shard that can have one, by several processes.

    Arguments: run: of this process, whose prior is not asked. recipe: of the same run. workers: processes. timeout: seconds an
        object, or None. max_failed: share of the shard's objects that may fail before the run stops.
    Raises: OSError if the disk refuses, ConfigError if no process can start.
    """
    with open_ledger(run, entries, shard, supervised=True) as ledger:
        campaign = Campaign(run, entries, ledger, look_around(run, ledger, shard), max_failed=max_failed)
        with Progress(campaign.total) as progress, Pool(campaign, recipe, workers, timeout) as pool:
            while pool.step():
                progress.set(campaign.ended, f"{pool.in_flight} in flight")
        return campaign.outcome


@dataclass
class _Worker:
    """A process, its pipe, its number among the living, the tasks that it has not ended by their place in its hand, and until
    when (`time.monotonic`) it may take for them."""

    process: BaseProcess
    connection: Connection
    number: int
    ready: bool = False
    tasks: dict[int, Task] = field(default_factory=dict)
    alone: bool = True
    until: float = math.inf


class Pool:
    """The processes of a run. A context manager: all have ended when it is left.

    Arguments: campaign. recipe. size: processes at most. timeout: seconds an object, or None.
    """

    def __init__(self, campaign: Campaign, recipe: Recipe, size: int, timeout: float | None) -> None:
        self.campaign, self.recipe, self.size = campaign, recipe, size
        self.timeout = math.inf if timeout is None else timeout
        self.workers: list[_Worker] = []
        self.taken: deque[list[Task]] = deque()  # hands of the pool, not yet begun
        self.stillborn = 0
        self.together = campaign.run.plan.objects or suit(recipe.device)

    @property
    def busy(self) -> list[_Worker]:
        """The processes at work."""
        return [worker for worker in self.workers if worker.tasks]

    @property
    def in_flight(self) -> int:
        """Objects at work."""
        return sum(len(worker.tasks) for worker in self.workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is not None and not issubclass(kind, Exception):
                self._finish_in_grace()
        finally:
            for worker in list(self.workers):
                self._end(worker)

    def step(self) -> bool:
        """Give work to whom has none and hear who is done; False if there is nothing more to do.

        Raises: OSError if the disk refuses, ConfigError if no process can start.
        """
        self._take()
        if not self.taken and not self.busy:
            return False
        while len(self.workers) < min(self.size, len(self.taken) + len(self.busy)):
            self._start()
        for worker in self.workers:
            if self.taken and worker.ready and not worker.tasks:
                self._give(worker, self.taken.popleft())
        self._hear(_TICK)
        for worker in self.busy:
            if time.monotonic() > worker.until:
                many = "" if worker.alone else " an object"
                self._lose(worker, f"took longer than --timeout {self.timeout:g} s{many} and was ended", self.campaign.crashed)
        return True

    def _take(self) -> None:
        """A hand for every process that may be without one; the last ones share what is left."""
        if self.campaign.outcome.stopped:
            self.taken.clear()
            for worker in [worker for worker in self.busy if not worker.alone]:
                self._end(worker)  # what else is in its hand is dropped
        most = min(hand_size(self.together), math.ceil(len(self.campaign.waiting) / self.size)) or 1
        while len(self.taken) + len(self.busy) < self.size and (tasks := self.campaign.hand(most)):
            self.taken.append(tasks)

    def _start(self) -> None:
        """One more process. Signals to stop are for the supervisor: its processes inherit that they are blocked."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        number = min(set(range(self.size)) - {worker.number for worker in self.workers})
        threads = max(1, count_cores() // self.size)
        process = context.Process(target=serve, args=(theirs, os.getpid(), threads, number, self.size), daemon=True)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            process.start()
            self.workers.append(_Worker(process, ours, number))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        self._send(self.workers[-1], self.recipe)

    def _give(self, worker: _Worker, tasks: Sequence[Task]) -> None:
        begun = [task for task in tasks if self.campaign.begin(task)]
        worker.tasks, worker.alone = dict(enumerate(begun)), len(begun) == 1
        self._wind(worker)
        if begun:
            self._send(worker, [(task.entry, task.path) for task in begun])

    def _wind(self, worker: _Worker) -> None:
        """Start the clock again. Those that are together end a pass at a time, and one pass after they were sampled."""
        most = 1 if worker.alone else 2 * min(self.together, len(worker.tasks))
        worker.until = time.monotonic() + self.timeout * most if worker.tasks else math.inf

    def _send(self, worker: _Worker, message: object) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died, which its pipe tells next
            worker.connection.send(message)

    def _hear(self, seconds: float) -> None:
        heard = wait([worker.connection for worker in self.workers], seconds)
        for worker in [worker for worker in self.workers if worker.connection in heard]:
            try:
                self._note(worker, *worker.connection.recv())
                while worker.connection.poll() and not self.campaign.outcome.stopped:  # all, before its time is judged
                    self._note(worker, *worker.connection.recv())
            except (EOFError, ConnectionResetError):
                self._bury(worker)

    def _note(self, worker: _Worker, kind: str, *values) -> None:
        if kind == READY:
            worker.ready, self.stillborn = True, 0
            if values[0] != self.campaign.run.config_hash:
                raise ConfigError(f"prior {self.recipe.prior}: changed since the run began; run the command again.")
        elif kind == REFUSED:
            raise ConfigError(values[0])
        elif kind == DISK:
            raise OSError(*values)
        elif kind == DONE:
            self.campaign.done(worker.tasks.pop(values[0]))
            self._wind(worker)
        elif kind == FAILED:
            self.campaign.failed(worker.tasks.pop(values[0]), values[1], final=values[2])
            self._wind(worker)

    def _bury(self, worker: _Worker) -> None:
        """Note that a process has died by itself."""
        worker.process.join()
        code = worker.process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if not worker.ready:
            self.stillborn += 1
            if self.stillborn >= _STILLBORN:
                raise ConfigError(f"--workers: processes die before they are ready (the last {how}); try fewer, or none.")
        if code == -signal.SIGKILL:
            self._lose(worker, f"its process {how} (out of memory?)", self.campaign.killed)
        else:
            self._lose(worker, f"its process {how}", self.campaign.crashed)

    def _lose(self, worker: _Worker, reason: str, note: Callable[[Task, str], None]) -> None:
        self._end(worker)
        for task in worker.tasks.values():
            if worker.alone:
                note(task, reason)
            else:  # nobody knows whose fault it was
                self.campaign.killed(task, reason)

    def _end(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        self.workers.remove(worker)

    def _finish_in_grace(self) -> None:
        end = time.monotonic() + GRACE
        self.campaign.drop()
        if self.busy:
            print_error(f"interrupted; {self.in_flight} objects in flight have {GRACE:g} s to finish")
        while self.busy and time.monotonic() < end:
            self._hear(min(_TICK, max(0.0, end - time.monotonic())))


def count_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
