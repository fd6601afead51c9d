"""A hand of objects: read ahead, sampled in one pass as far as their shapes and the memory allow, written behind.

While one pass is sampled, a thread reads the objects of the next and another writes the products of the one before. What goes
wrong belongs to one object: where a pass fails, its objects are sampled again, each by itself. Threads that read or write keep
no process from ending; what was to be written is.
Invariant: an object's draws do not depend on its company, but for the rounding of batches of other sizes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from diffinv.core.checks import DiffinvError
from diffinv.data.catalog import Entry
from diffinv.engine.objects import Answer
from diffinv.engine.run import Run, Subject, is_broken_device

PASSES = 4  # in a hand

T = TypeVar("T")
Report = Callable[[float], None]
Ending = tuple[int, Exception | None]


class DeviceLost(DiffinvError):
    """The device has failed this process. Another one can go on; no object is to blame."""


def hand_size(together: int) -> int:
    """Objects that a process is given at once: one, or some passes, so that reading and writing have something to overlap."""
    return 1 if together == 1 else PASSES * together


def make_all(run: Run, wanted: Sequence[tuple[Entry, Path]], report: Report) -> Iterator[Ending]:
    """The products of some objects, as `Run.make` makes them.

    Arguments: wanted: objects and the paths of their products. report: called with the fraction done.
    Returns: (place in `wanted`, what went wrong or None), as each ends.
    Raises: OSError if the disk refuses a product, DeviceLost if the device does.
    """
    if len(wanted) == 1:
        yield 0, _try(lambda: run.make(*wanted[0], report))[1]
        return
    reader, writer, left = _Thread("reader"), _Thread("writer"), deque(range(len(wanted)))
    read = lambda: {place: reader.submit(run.read, *wanted[place]) for place in _take(left, run.pace)}
    ahead: dict[int, Future] = {}
    behind: dict[int, Future] = {}
    try:
        ahead = read()
        while ahead:
            places = tuple(ahead)
            subjects, bad = _gather({place: future.result for place, future in ahead.items()})
            yield from bad
            run.pace = run.company(list(subjects.values())) if subjects else run.pace
            ahead = read()
            queue = deque(subjects)
            while together := _take(queue, run.pace):
                done = places[0] + len(subjects) - len(queue) - len(together)
                share = lambda part, done=done, size=len(together): report((done + part * size) / len(wanted))
                answers, bad = _sample(run, {place: subjects[place] for place in together}, share)
                yield from bad
                yield from _endings(behind)
                behind = {place: writer.submit(run.write, subjects[place], found) for place, found in answers.items()}
        yield from _endings(behind)
    finally:
        for future in ahead.values():
            future.cancel()
        wait(behind.values())
        reader.end()
        writer.end()


def _take(queue: deque[int], most: int) -> list[int]:
    return [queue.popleft() for _ in range(min(most, len(queue)))]


def _sample(run: Run, subjects: dict[int, Subject], report: Report) -> tuple[dict[int, list[Answer]], list[Ending]]:
    """Draws of all, or of those that can be sampled alone."""
    together, error = _try(lambda: run.sample(list(subjects.values()), report))
    if together is not None:
        return dict(zip(subjects, together, strict=True)), []
    if len(subjects) == 1:
        return {}, [(place, error) for place in subjects]
    return _gather({place: lambda subject=subject: run.sample([subject], report)[0] for place, subject in subjects.items()})


def _gather(work: dict[int, Callable[[], T]]) -> tuple[dict[int, T], list[Ending]]:
    """What each gives, and the errors of those that give none."""
    tried = {place: _try(one) for place, one in work.items()}
    return (
        {place: value for place, (value, error) in tried.items() if error is None},
        [(place, error) for place, (_, error) in tried.items() if error is not None],
    )


def _endings(behind: dict[int, Future]) -> Iterator[Ending]:
    for place, future in behind.items():
        yield place, _try(future.result)[1]


def _try(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What it gives, or its error, which holds nothing that the work held.

    Raises: OSError, which the next object would meet as well; DeviceLost.
    """
    try:
        return work(), None
    except OSError:
        raise
    except Exception as error:
        if is_broken_device(error):
            raise DeviceLost(f"the device has failed ({' '.join(str(error).split())[:200]}); run the command again.") from None
        error.__context__ = error.__cause__ = None
        return None, error.with_traceback(None)


class _Thread:
    """Does one thing after the other beside the rest of the process, and does not keep it from ending."""

    def __init__(self, name: str) -> None:
        self.queue: SimpleQueue[tuple[Future, Callable[..., Any], tuple] | None] = SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future:
        """A promise of work(*arguments)."""
        future: Future = Future()
        self.queue.put((future, work, arguments))
        return future

    def end(self) -> None:
        """Do what was submitted and not cancelled, and nothing more."""
        self.queue.put(None)

    def _work(self) -> None:
        while (task := self.queue.get()) is not None:
            future, work, arguments = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(*arguments))
                except BaseException as error:  # whoever waits raises it
                    future.set_exception(error)
            del task, future, work, arguments  # an idle thread holds no object
