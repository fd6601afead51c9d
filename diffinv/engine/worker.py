"""The process that makes products for a supervisor: a few objects at a time, told and answered through a pipe.

Nothing heavy is imported before the process has tied its life to the supervisor's. Linux kills it when the supervisor dies;
elsewhere, and as a second line, a thread looks every second whether the supervisor is still its parent.
Invariant: it writes products and nothing else; what is said of them in the manifest is the supervisor's business.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from diffinv.data.catalog import Entry
    from diffinv.engine.pool import Recipe
    from diffinv.engine.run import Run

READY, DONE, FAILED, REFUSED, DISK = "ready", "done", "failed", "refused", "disk"
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_LOST = 70  # exit code, EX_SOFTWARE


def serve(connection: Connection, supervisor: int, threads: int, number: int, of: int) -> None:
    """Receive a `Recipe`, then lists of (entry, path), and answer for each of these as it ends, until the pipe is closed.

    Answers: (READY, hash of the run), (DONE, place in the list), (FAILED, place, reason, whether trying again is in vain),
    (REFUSED, text of an error that holds for every object), (DISK, number, text, file).
    Arguments: supervisor: its process number. threads: that torch may use, or fewer if the environment says so. number, of: among
        the supervisor's processes, from 0, and how many there are.
    """
    die_with(supervisor)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        recipe = connection.recv()
        run = _start(connection, recipe, threads, number, of)
        while run is not None:
            _attempt(run, connection.recv(), connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def die_with(supervisor: int) -> None:
    """End this process with its parent, at once or within a second."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor:
        os._exit(1)
    threading.Thread(target=_watch, args=(supervisor,), daemon=True).start()


def _watch(supervisor: int) -> None:
    while os.getppid() == supervisor:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _start(connection: Connection, recipe: Recipe, threads: int, number: int, of: int) -> Run | None:
    import torch

    from diffinv.core.checks import DiffinvError

    torch.set_num_threads(min(threads, torch.get_num_threads()))
    try:
        run = recipe.build(number, of)
    except DiffinvError as error:
        connection.send((REFUSED, str(error)))
        return None
    connection.send((READY, run.config_hash))
    return run


def _attempt(run: Run, wanted: Sequence[tuple[Entry, Path]], connection: Connection) -> None:
    from diffinv.core.checks import InputError
    from diffinv.engine.run import reason_of
    from diffinv.engine.together import DeviceLost, make_all

    try:
        for place, error in make_all(run, wanted, lambda fraction: None):
            if error is None:
                connection.send((DONE, place))
            else:
                connection.send((FAILED, place, reason_of(error), isinstance(error, InputError)))
    except DeviceLost as error:
        end_with(error)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except OSError as error:
        connection.send((DISK, error.errno, error.strerror or str(error), error.filename))


def end_with(error: Exception) -> NoReturn:
    """Leave a process that can compute nothing more to whoever counts its attempts, with one line."""
    print(f"diffinv: {error}", file=sys.stderr, flush=True)
    os._exit(_LOST)
