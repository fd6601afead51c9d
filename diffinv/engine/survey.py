"""What an output directory holds: how far its runs are, and one table of all its products.

Products are found by their files and judged by their headers, without reading an image; products of another configuration
than that of `run.json`, as --new-run leaves them, do not count. The names of all objects are those that the manifest lists.
Invariant: an object is counted once, and done only if a whole product of it is there.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from diffinv.core.checks import InputError
from diffinv.data.atomic import write_atomically
from diffinv.data.fits import encode_ecsv
from diffinv.data.found import Found, find_products
from diffinv.data.headers import read_columns
from diffinv.engine.manifest import QUARANTINE, Event, Journal, read_journals


@dataclass(frozen=True)
class Status:
    """Counts of objects, each in one of them. flagged: of those done, how many are `Found.doubtful`. failed: tried, to be tried
    again. left: not yet tried. damaged: files that are no whole products. running: living processes. rate: objects an hour of
    these, None if none has finished one."""

    done: int
    flagged: int
    failed: int
    quarantined: int
    in_flight: int
    left: int
    damaged: int
    running: int
    rate: float | None

    @property
    def complete(self) -> bool:
        """Whether every object is done or quarantined."""
        return not (self.failed or self.in_flight or self.left)

    def __str__(self) -> str:
        total = self.done + self.failed + self.quarantined + self.in_flight + self.left
        lines = [f"{name.replace('_', ' '):12}{getattr(self, name)}" for name in self.__dataclass_fields__ if name != "rate"]
        if self.rate is not None:
            hours = (self.failed + self.in_flight + self.left) / self.rate
            lines.append(f"{'rate':12}{self.rate:.3g} objects an hour, about {hours:.2g} h to go")
        return "\n".join([f"{'objects':12}{total}", *lines])


def read_status(out: Path) -> Status:
    """How far the runs into a directory are.

    Raises: InputError if it is not the output of `diffinv sample`.
    """
    journals, damaged = read_journals(out), []
    set_aside = _quarantined(out)
    doubtful = {found.object_id: found.doubtful for found in find_products(out, damaged)}  # the newest of an object counts
    done = doubtful.keys() - set_aside
    if not journals and not done and not damaged and not set_aside:
        raise InputError(f"{out}: no output of `diffinv sample`; give the directory of its --out.")
    listed = {str(name) for journal in journals for name in journal.opening.get("objects", ())}
    at_work = {name for journal in journals if journal.alive for name in _names(journal.unended())} - done - set_aside
    tried = (set().union(*map(_tried, journals)) & listed) - done - set_aside - at_work
    alive = [journal for journal in journals if journal.alive]
    return Status(
        done=len(done),
        flagged=sum(doubtful[name] for name in done),
        failed=len(tried),
        quarantined=len(set_aside),
        in_flight=len(at_work),
        left=len(listed - done - set_aside - at_work - tried),
        damaged=len(damaged),
        running=len(alive),
        rate=_rate(alive),
    )


def _tried(journal: Journal) -> set[str]:
    """Names of attempts, less those that a process dropped when it was told to end."""
    attempts = [event for event in journal.events if event["event"] == "start"]
    return _names(attempts) - (_names(journal.unended()) if journal.closed else set())


def _names(events: Sequence[Event]) -> set[str]:
    return {str(event.get("object_id")) for event in events}


def _rate(alive: Sequence[Journal]) -> float | None:
    """Objects an hour: of every living process since it began, together."""
    now = time.time()
    finished = [(sum(bool(e.get("fresh")) for e in journal.events), now - journal.opening["time"]) for journal in alive]
    return sum(3600 * n / max(seconds, 1e-3) for n, seconds in finished) or None


def _quarantined(out: Path) -> set[str]:
    names = set()
    for path in (out / QUARANTINE).glob("*.json"):
        try:
            names.add(str(json.loads(path.read_text(encoding="utf-8"))["object_id"]))
        except (OSError, ValueError, KeyError, TypeError):
            names.add(unquote(path.stem))
    return names


def merge(out: Path) -> tuple[list[Path], list[str]]:
    """Write `catalog.ecsv`, and `catalog.parquet` where pyarrow is installed: the rows of every product's CATALOG with the
    object's name and the product's path before them.

    An object with several products, its input having changed, gives the newest. Rows are sorted by the object's name; a column
    that a product does not have is NaN or empty there.
    Returns: the paths of the table, and one line for each product that could not be read.
    Raises: InputError if there is no product with a CATALOG.
    """
    damaged: list[str] = []
    latest = {found.object_id: found for found in find_products(out, damaged)}
    tables: list[dict[str, np.ndarray]] = []
    for name in sorted(latest):
        table = _table(out, latest[name], damaged)
        if table:
            tables.append(table)
    if not tables:
        raise InputError(f"{out}: no products with a table; give the --out of `diffinv sample` after it has finished some.")
    table = _stack(tables)
    encoded = {"catalog.ecsv": encode_ecsv(table)}
    with contextlib.suppress(ModuleNotFoundError):
        from diffinv.data.parquet import encode_parquet

        encoded["catalog.parquet"] = encode_parquet(table)
    for name, payload in encoded.items():
        write_atomically(out / name, payload)
    return [out / name for name in encoded], damaged


def _table(out: Path, found: Found, damaged: list[str]) -> dict[str, np.ndarray]:
    header = next((header for header in reversed(found.headers) if header.name == "CATALOG"), None)
    if header is None:
        return {}
    try:
        columns = read_columns(found.place.path, header)
    except InputError as error:
        damaged.append(str(error))
        return {}
    rows, name = len(next(iter(columns.values()))), found.object_id
    plain = name if name.isprintable() else ascii(name)[1:-1]
    place = Path(str(found.place)).relative_to(out).as_posix()
    return {"object_id": np.full(rows, plain), "product": np.full(rows, place), **columns}


def _stack(tables: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for table in tables for name in table)
    rows = [len(table["object_id"]) for table in tables]
    stacked = {}
    for name in names:
        kind = next(table[name].dtype.kind for table in tables if name in table)
        missing = "" if kind == "U" else np.nan
        stacked[name] = np.concatenate([table.get(name, np.full(n, missing)) for table, n in zip(tables, rows)])
    return stacked
