"""A hand of objects: read ahead, sampled in one pass as far as their shapes agree, written behind.

While one pass is sampled, a thread reads the objects of the next and another writes the products of the one before. What goes
wrong belongs to one object: where a pass fails, its objects are sampled again, each by itself.
Invariant: an object's draws do not depend on its company, but for the rounding of batches of other sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from diffinv.data.catalog import Entry
from diffinv.engine.objects import Answer
from diffinv.engine.run import Run, Subject

PASSES = 4  # in a hand
TOGETHER_ON_DEVICE = 32  # objects, whose 32 draws each are the rows of `memory.MOST_ROWS_ON_DEVICE`

T = TypeVar("T")
Report = Callable[[float], None]
Wanted = Sequence[tuple[Entry, Path]]
Ending = tuple[int, Exception | None]


def suit(device: str) -> int:
    """Objects that are sampled together on a device unless one says otherwise: one fills a processor, many an accelerator."""
    return 1 if device == "cpu" else TOGETHER_ON_DEVICE


def hand_size(run: Run) -> int:
    """Objects that a process is given at once: one, or some passes, so that reading and writing have something to overlap."""
    return 1 if run.plan.objects == 1 else PASSES * run.plan.objects


def make_all(run: Run, wanted: Wanted, report: Report) -> Iterator[Ending]:
    """The products of some objects, as `Run.make` makes them.

    Arguments: wanted: objects and the paths of their products. report: called with the fraction done.
    Returns: (place in `wanted`, what went wrong or None), as each ends.
    Raises: OSError if the disk refuses a product.
    """
    if len(wanted) == 1:
        yield 0, _try(lambda: run.make(*wanted[0], report))[1]
        return
    together = run.plan.objects
    passes = [range(start, min(start + together, len(wanted))) for start in range(0, len(wanted), together)]
    with ThreadPoolExecutor(1, "reader") as reader, ThreadPoolExecutor(1, "writer") as writer:
        ahead: list[dict[int, Future[Subject]]] = []
        read = lambda places: ahead.append({place: reader.submit(run.read, *wanted[place]) for place in places})
        behind: dict[int, Future[None]] = {}
        for number, places in enumerate(passes):
            if not ahead:
                read(places)
            subjects, bad = _gather({place: future.result for place, future in ahead.pop().items()})
            yield from bad
            if number + 1 < len(passes):
                read(passes[number + 1])
            share = lambda fraction, places=places: report((places[0] + fraction * len(places)) / len(wanted))
            answers, bad = _sample(run, subjects, share)
            yield from bad
            yield from _endings(behind)
            behind = {place: writer.submit(run.write, subjects[place], found) for place, found in answers.items()}
        yield from _endings(behind)


def _sample(run: Run, subjects: dict[int, Subject], report: Report) -> tuple[dict[int, list[Answer]], list[Ending]]:
    """Draws of all, or of those that can be sampled alone."""
    if not subjects:
        return {}, []
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


def _endings(behind: dict[int, Future[None]]) -> Iterator[Ending]:
    for place, future in behind.items():
        yield place, _try(future.result)[1]


def _try(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What it gives, or its error; the disk's go on, for the next object would meet them as well."""
    try:
        return work(), None
    except OSError:
        raise
    except Exception as error:
        return None, error
