"""The warnings of a piece of work, in a program of several threads: Python keeps one state of them a process."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

_ONE = threading.RLock()


@contextmanager
def warned(action: Literal["always", "ignore"]) -> Iterator[list[warnings.WarningMessage]]:
    """What is warned of within, as a list that grows; nothing is shown. One thread at a time is within."""
    with _ONE, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        yield caught
