"""What was tried: one append-only file of JSON lines a writing process, `out/manifest/<host>-<pid>-<nonce>.jsonl`.

An attempt is a line that is on the disk *before* it runs, so that a process that dies leaves a trace. A writer holds a lock on
its file while it lives and renames it to `*.closed.jsonl` when it ends in any orderly way, which needs no space on the disk. An
attempt without an end is therefore in flight if its file is locked, dropped if it is closed, and otherwise a crash: of the
object, where the process that died was the one that computed it and nothing else; where a supervisor died, or a process that was
at several objects, they were killed with it, and may well be innocent. Where a file system has no locks an open file counts as
alive, so that no object is ever blamed by mistake.
Invariant: nothing here says that an object is done. Products say so; a manifest that is lost costs nothing but the counts.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from diffinv.core.checks import ConfigError
from diffinv.data.locks import ALONE, SHARED, Claims, lock
from diffinv.data.products import safe_id

FOLDER, QUARANTINE = "manifest", "quarantine"
_CLAIMS = "claims"
_OPEN, _CLOSED = ".jsonl", ".closed.jsonl"
_BAD_ENDS = {"crashed": "crashes", "killed": "kills", "failed": "failures"}  # event → field of a tally
Event = dict[str, Any]


@dataclass(frozen=True)
class Tally:
    """How often an object (of one key) has crashed a process, was killed with it, and failed, since it last ended."""

    crashes: int = 0
    kills: int = 0
    failures: int = 0

    @property
    def attempts(self) -> int:
        """That ended badly."""
        return self.crashes + self.kills + self.failures


class Ledger:
    """The file of this process, and what it claims of the objects. A context manager; `closed` by its end, whatever ended it.

    Arguments: out: the output directory. opening: plain values of the first line; `shard` and `supervised` are read again.
    Raises: OSError if the disk refuses.
    """

    def __init__(self, out: Path, opening: Event) -> None:
        folder, host = out / FOLDER, safe_id(socket.gethostname() or "host")
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}{_OPEN}"
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
        lock(self._file, ALONE, wait=True)  # waits for a reader that looks just now
        self.claims = Claims(folder / _CLAIMS)
        self.write("open", host=host, pid=os.getpid(), **opening)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Say that every attempt without an end was dropped in order."""
        self.path.rename(self.path.with_name(self.path.name.removesuffix(_OPEN) + _CLOSED))
        os.close(self._file)
        self.claims.close()

    def write(self, event: str, **values: Any) -> None:
        """One line, on the disk when this returns.

        Raises: OSError if the disk refuses.
        """
        line = (json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n").encode()
        if os.write(self._file, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        os.fsync(self._file)


@dataclass(frozen=True)
class Journal:
    """One file as it was read. alive: its writer holds the lock. closed: it ended in order. events: the first is `open`."""

    path: Path
    alive: bool
    closed: bool
    events: tuple[Event, ...]

    @property
    def opening(self) -> Event:
        return self.events[0]

    def unended(self) -> list[Event]:
        """The attempts that have no end in this file."""
        started: dict[str, Event] = {}
        for event in self.events[1:]:
            if event["event"] == "start":
                started[event["key"]] = event
            else:
                started.pop(event.get("key", ""), None)
        return list(started.values())


def read_journals(out: Path) -> list[Journal]:
    """Every file of the manifest. Lines that are no records, as a full disk or a power cut leaves them, are passed over."""
    found = [_read_journal(path) for path in sorted((out / FOLDER).glob(f"*{_OPEN}"))]
    return [journal for journal in found if journal is not None and journal.events]


def _read_journal(path: Path) -> Journal | None:
    try:
        alive, lines = _read(path)
    except FileNotFoundError:  # closed since it was listed
        path = path.with_name(path.name.removesuffix(_OPEN) + _CLOSED)
        if not path.is_file():
            return None
        alive, lines = _read(path)
    closed = path.name.endswith(_CLOSED)
    events = tuple(event for event in map(_parse, lines) if event is not None)
    opened = bool(events) and events[0]["event"] == "open"
    return Journal(path, alive and not closed, closed or not (alive or path.exists()), events if opened else ())


def _read(path: Path) -> tuple[bool, list[bytes]]:
    """Whether a writer holds the file, looked up before its lines are read, and the lines."""
    with open(path, "rb") as stream:
        return not lock(stream.fileno(), SHARED, wait=False), stream.readlines()


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(event, dict) and isinstance(event.get("event"), str) and isinstance(event.get("time"), (int, float))
    return event if whole and (event["event"] != "start" or isinstance(event.get("key"), str)) else None


def count(journals: Sequence[Journal]) -> dict[str, Tally]:
    """Key → tally over all files, attempts of dead processes included."""
    events = [event for journal in journals for event in (*journal.events[1:], *_abrupt_ends(journal))]
    tallies: dict[str, Tally] = {}
    for event in sorted(events, key=lambda event: event["time"]):
        key, kind = event.get("key"), event["event"]
        if not isinstance(key, str):
            continue
        if kind in ("done", "quarantined"):
            tallies.pop(key, None)
        elif kind in _BAD_ENDS:
            tallies[key] = add(tallies.get(key, Tally()), kind)
    return tallies


def done_keys(journals: Sequence[Journal]) -> set[str]:
    """Keys that the manifest knows as done."""
    return {str(event.get("key")) for journal in journals for event in journal.events if event["event"] == "done"}


def _abrupt_ends(journal: Journal) -> list[Event]:
    if journal.alive or journal.closed:
        return []
    cut_off = journal.unended()
    kind = "killed" if journal.opening.get("supervised") or len(cut_off) > 1 else "crashed"
    return [{**event, "event": kind} for event in cut_off]


def add(tally: Tally, kind: str) -> Tally:
    """A tally with one bad end more: `crashed`, `killed` or `failed`."""
    field = _BAD_ENDS[kind]
    return replace(tally, **{field: getattr(tally, field) + 1})


def others_at_work(journals: Sequence[Journal], own: Ledger, shard: str) -> list[str]:
    """Living writers but `own` that may meet the same objects, as text: other parts of the same split do not.

    Arguments: shard: `i/n`, of the process that asks.
    """
    parts = shard.partition("/")[2]
    found = []
    for journal in journals:
        theirs = str(journal.opening.get("shard"))
        disjoint = theirs.partition("/")[2] == parts and theirs != shard
        if journal.alive and journal.path != own.path and not disjoint:
            found.append(f"{journal.opening.get('host')}, process {journal.opening.get('pid')}, shard {theirs}")
    return found


def check_folder(out: Path, name: str) -> Path:
    """`out/name`.

    Raises: ConfigError if it is a symbolic link that leads out of `out`.
    """
    folder = out / name
    if not folder.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"{folder}: a symbolic link leads out of {out}; remove it.")
    return folder
