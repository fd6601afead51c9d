"""How far a run is: a bar on a terminal, one line per 30 seconds otherwise.

Invariant: only stderr is written, and a run that ends within 30 seconds on no terminal writes nothing here.
"""

from __future__ import annotations

import sys
import time
from typing import Self

from tqdm import tqdm

LINE_SECONDS = 30.0


class Progress:
    """Objects done out of `total`, with fractions of the one at work. A context manager."""

    def __init__(self, total: int) -> None:
        self.total, self.start = total, time.monotonic()
        self.done, self.last_line = 0.0, self.start
        terminal = sys.stderr.isatty()
        layout = "{l_bar}{bar}| {n:.1f}/{total} objects [{elapsed}<{remaining}]"
        self.bar = tqdm(total=total, bar_format=layout, file=sys.stderr) if terminal else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def set(self, done: float, name: str) -> None:
        """`done` objects, the last one in part, and never fewer than before; `name` of the one at work."""
        done = max(done, self.done)
        if self.bar is not None:
            self.bar.set_postfix_str(name, refresh=False)
            self.bar.update(done - self.done)
        self.done = done
        now = time.monotonic()
        if self.bar is None and now - self.last_line >= LINE_SECONDS:
            self.last_line = now
            left = (now - self.start) * (self.total - done) / done if done > 0 else float("nan")
            print(f"diffinv: {done:.1f} of {self.total} objects, {name}, about {left:.0f} s left", file=sys.stderr, flush=True)
