"""Ranges of objects as tasks of Parsl, on this machine or in jobs of Slurm. The only file that imports parsl.

Parsl delivers a task at least once; the output directory makes that exact, so that nothing of Parsl's is kept: no checkpoints, no
memory of answers, no report of its use. A task whose process or node is lost is given again. Jobs that fail three times in a
row end the run.
The processes of a site end with the run: Parsl ends them when the run ends in any orderly way; when it is killed, Linux ends
the interchange, whose silence ends the node managers after `silence` seconds; a guard on each node ends what a manager leaves.
Invariant: no process of a site outlives the run by more than that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import parsl
from parsl.executors import HighThroughputExecutor
from parsl.executors.errors import BadStateException
from parsl.executors.high_throughput.errors import ManagerLost, WorkerLost
from parsl.executors.high_throughput.executor import DEFAULT_LAUNCH_CMD
from parsl.jobs.error_handlers import windowed_error_handler
from parsl.launchers import SimpleLauncher, SrunLauncher
from parsl.providers import LocalProvider, SlurmProvider
from parsl.providers.base import ExecutionProvider

from diffinv.core.checks import ConfigError
from diffinv.data.catalog import Entry
from diffinv.engine.blocks import run_block
from diffinv.engine.campaign import HOPELESS, MOST_FAILURES, Outcome
from diffinv.engine.manifest import check_folder
from diffinv.engine.pool import Recipe
from diffinv.engine.progress import Progress
from diffinv.engine.run import Run, print_error
from diffinv.engine.shards import Shard

FOLDER = "parsl"  # of its logs, in the output directory
_TIED = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""  # a program that Linux ends with the thread that started it


@dataclass(frozen=True)
class Slurm:
    """What a job asks for. options: further lines of its script, each with its #SBATCH."""

    account: str | None
    partition: str | None
    qos: str | None
    constraint: str | None
    walltime: str
    memory: int | None
    gpus: int | None
    options: str


@dataclass(frozen=True)
class Site:
    """Where tasks run.

    workers: processes a node. jobs: at most, at once. nodes: a job. objects: a task. setup: shell lines before a node's workers.
    address: of this machine as the nodes see it, None to find out. silence: seconds after which a node is given up. slurm: None
    for this machine.
    """

    workers: int
    jobs: int
    nodes: int
    objects: int
    setup: str
    address: str | None
    silence: int
    slurm: Slurm | None

    def provider(self) -> ExecutionProvider:
        """Parsl's way to start a job here."""
        if self.slurm is None:
            return LocalProvider(
                init_blocks=1, min_blocks=1, max_blocks=self.jobs, worker_init=self.setup, launcher=SimpleLauncher()
            )
        job = self.slurm
        return SlurmProvider(
            partition=job.partition,
            account=job.account,
            qos=job.qos,
            constraint=job.constraint,
            nodes_per_block=self.nodes,
            mem_per_node=job.memory,
            gpus_per_node=job.gpus,
            min_blocks=1,
            max_blocks=self.jobs,
            walltime=job.walltime,
            scheduler_options=job.options,
            worker_init=self.setup,
            exclusive=False,
            launcher=SrunLauncher() if self.nodes > 1 else SimpleLauncher(),
        )

    def config(self, logs: Path) -> parsl.Config:
        """Parsl's configuration."""
        executor = HighThroughputExecutor(
            label="diffinv",
            provider=self.provider(),
            launch_cmd=f"python -m diffinv.engine.guard {DEFAULT_LAUNCH_CMD}",
            max_workers_per_node=self.workers,
            cores_per_worker=1e-3,  # `workers` decides
            address="127.0.0.1" if self.slurm is None and self.address is None else self.address,
            heartbeat_period=max(1, self.silence // 5),
            heartbeat_threshold=self.silence,
            block_error_handler=windowed_error_handler,
            interchange_launch_cmd=[sys.executable, "-c", _TIED, "interchange.py"],
        )
        return parsl.Config(
            executors=[executor],
            retries=0,
            strategy="simple",
            strategy_period=2,
            usage_tracking=0,
            run_dir=str(logs),
            initialize_logging=False,
        )


def run_site(run: Run, recipe: Recipe, entries: Sequence[Entry], site: Site, *, max_failed: float) -> Outcome:
    """A product for every object that can have one, by tasks of a site.

    Arguments: run: of this process, whose prior is not asked. recipe: of the same run. max_failed: share of the objects that may
        fail before the run stops.
    Raises: OSError if the disk refuses there, ConfigError if the site has no run.
    """
    count = -(-len(entries) // site.objects)
    blocks = [_Block(Shard(k, count), tuple(entries[k * site.objects : (k + 1) * site.objects])) for k in range(count)]
    outcome = Outcome()
    with Progress(len(entries)) as progress, _Tasks(run, recipe, site) as tasks:
        for block in blocks:
            tasks.give(block)
        while tasks.given and not outcome.stopped:
            for block, future in tasks.ended():
                _note(outcome, block, future, tasks.give)
            outcome.stopped = _judge(outcome, len(entries), max_failed) if tasks.given else outcome.stopped
            progress.set(len(outcome.products) + len(outcome.quarantined), f"{len(tasks.given)} ranges left")
    return outcome


@dataclass
class _Block:
    """A range of the objects, and how often it was lost."""

    part: Shard
    entries: tuple[Entry, ...]
    lost: int = 0


class _Tasks:
    """The tasks that were given to a site. A context manager: no process is left when it is left."""

    def __init__(self, run: Run, recipe: Recipe, site: Site) -> None:
        self.run, self.recipe, self.site = run, recipe, site
        self.given: dict[Future, _Block] = {}

    def __enter__(self) -> Self:
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # of Parsl's programs
        self.kernel = parsl.DataFlowKernel(self.site.config(check_folder(self.run.out, FOLDER)))
        self.app = parsl.python_app(run_block, data_flow_kernel=self.kernel, executors=["diffinv"])
        return self

    def __exit__(self, *exception: object) -> None:
        self.kernel.cleanup()

    def give(self, block: _Block) -> None:
        """One more task."""
        arguments = (self.recipe, self.run.config_hash, block.entries, block.part, os.getcwd())
        self.given[self.app(*arguments)] = block

    def ended(self) -> list[tuple[_Block, Future]]:
        """Those that ended since this was asked, as soon as one has."""
        done, _ = wait(self.given, timeout=1.0, return_when=FIRST_COMPLETED)
        return [(self.given.pop(future), future) for future in done]


def _note(outcome: Outcome, block: _Block, future: Future[Any], again: Callable[[_Block], None]) -> None:
    """Add what a task answered, or give it again if its process or node was lost."""
    try:
        found = future.result()
    except (WorkerLost, ManagerLost) as error:
        block.lost += 1
        print_error(f"range {block.part}: {' '.join(str(error).split())[:160]}; it is given again")
        if block.lost > MOST_FAILURES * len(block.entries):
            outcome.stopped = f"range {block.part} was lost {block.lost} times"
        else:
            again(block)
    except BadStateException as error:
        raise ConfigError(f"--site: its jobs fail ({' '.join(str(error).split())[:300]}); see the logs in {FOLDER}/.") from error
    else:
        outcome.products += found.products
        outcome.skipped += found.skipped
        outcome.quarantined |= found.quarantined
        outcome.failed += found.failed


def _judge(outcome: Outcome, total: int, max_failed: float) -> str:
    """Why a run that mostly fails is stopped, or nothing."""
    if outcome.stopped or len(outcome.products) + len(outcome.quarantined) < HOPELESS:
        return outcome.stopped
    if outcome.failed >= HOPELESS and not outcome.products:
        return f"the first {outcome.failed} objects all failed"
    if outcome.failed <= max_failed * total:
        return ""
    return f"{outcome.failed} of {total} objects failed; --max-failed allows more"
