"""Maps a function of an index range over processes.

Invariant: the results are in order and do not depend on the number of processes, if the function is one of its range.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from diffinv.core.checks import DiffinvError

Items = TypeVar("Items", bound=Sequence)

_CHUNKS_PER_WORKER = 16  # enough to balance uneven chunks, few enough to send the function cheaply


def in_chunks(task: Callable[[int, int], Items], count: int, workers: int) -> list[tuple[int, Items]]:
    """(start, task(start, stop)) for consecutive chunks of 0 .. count.

    Arguments:
        task: a picklable function of (start, stop).
        count: number of items in all.
        workers: number of processes, started clean (a fork of a process with threads may deadlock); 1 runs in this one.

    Returns:
        One pair per chunk, in order; none for count = 0.

    Raises:
        ValueError: if `count` is negative or `workers` is not positive.
        DiffinvError: if the processes cannot be started, as from a script without `if __name__ == "__main__":`.
    """
    if count < 0 or workers < 1:
        raise ValueError(f"in_chunks: count is {count} and workers {workers}; give count >= 0 and workers >= 1.")
    chunks = min(count, _CHUNKS_PER_WORKER * workers)
    edges = [count * i // chunks for i in range(chunks + 1)] if chunks else []
    starts, stops = edges[:-1], edges[1:]
    if workers == 1:
        return [(start, task(start, stop)) for start, stop in zip(starts, stops)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([type(task).__module__])  # imported once, not once a worker
    try:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            return list(zip(starts, pool.map(task, starts, stops)))
    except BrokenProcessPool as error:
        raise DiffinvError(
            f"in_chunks: the {workers} worker processes did not come up: a script that starts them must do so under "
            "`if __name__ == '__main__':`; or use workers=1."
        ) from error
