"""Many objects: what is done is kept, what is broken is set aside, and the rest goes on, however the process ends.

An object is done if a valid product with its key is there. Else it is attempted, after a line in the manifest says so, until it
is done, has crashed a process `MOST_CRASHES` times, was killed with one `MOST_KILLS` times or has failed `MOST_FAILURES` times,
in this run and those before; an input that cannot be used fails the same way every time and is not tried again. A process that
was killed (a worker by signal 9, or with its supervisor, or at several objects) is as likely the victim of a preempted node as of
its own object's appetite for memory, hence the larger number; and an object whose process died waits until all others had their
turn, so that a storm passes. What another run is at is left to it, and looked for at the end. What was given up stays in
`quarantine/` with the reason until its input or the run's configuration changes, or its file there is removed.
Invariant: every object of the list ends done, quarantined, or untouched by a run that says that it stopped early.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffinv.core.checks import DiffinvError, InputError
from diffinv.data.atomic import write_atomically
from diffinv.data.catalog import Entry
from diffinv.data.products import product_path
from diffinv.engine.manifest import Journal, Ledger, Tally, add, count, done_keys, others_at_work, read_journals
from diffinv.engine.packing import Packing
from diffinv.engine.progress import Progress
from diffinv.engine.run import Run, print_error, quarantine_path, reason_of
from diffinv.engine.shards import Shard
from diffinv.engine.together import hand_size, make_all

HOPELESS = 20  # objects that end before a run is judged by its failures
MOST_CRASHES, MOST_KILLS, MOST_FAILURES = 2, 4, 3
LOOK = 1.0  # seconds between looks at what another run is at


@dataclass(frozen=True)
class Task:
    """One attempt: the object, its key and its product's path."""

    entry: Entry
    key: str
    path: Path


@dataclass
class Outcome:
    """products: written or already there. skipped: of these, already there. quarantined: object → reason. failed: objects that
    this run gave up. stopped: why it ended early, or empty."""

    products: list[Path] = field(default_factory=list)
    skipped: int = 0
    quarantined: dict[str, str] = field(default_factory=dict)
    failed: int = 0
    stopped: str = ""

    def summary(self) -> str:
        """One line for the log."""
        text = f"{len(self.products)} products ({self.skipped} were already there), {len(self.quarantined)} quarantined"
        return f"{text}; stopped early: {self.stopped}" if self.stopped else text


class Campaign:
    """The objects of one run and what became of them.

    Arguments: run. entries: of this process's shard. ledger: its file of the manifest. journals: all files of it, with the
    crashes and failures of earlier runs. max_failed: share of the objects that may fail; None: nobody judges.
    """

    def __init__(
        self, run: Run, entries: Sequence[Entry], ledger: Ledger, journals: Sequence[Journal], *, max_failed: float | None
    ) -> None:
        self.run, self.ledger, self.tallies, self.known = run, ledger, count(journals), done_keys(journals)
        self.total, self.widest = len(entries), 1  # the widest hand
        self.most_failed = None if max_failed is None else max_failed * len(entries)
        self.waiting, self.at_work = deque(entries), 0
        self.suspects: deque[Entry] = deque()  # whose processes died
        self.failing: set[str] = set()  # keys of those that raised, which wait for nobody
        self.elsewhere: deque[Entry] = deque()  # that another run is at
        self.looked, self.told = -math.inf, False  # for what became of these
        self.outcome = Outcome()
        self.packing = None if run.plan.pack is None else Packing(run.packs, entries, run.plan.pack)

    @property
    def ended(self) -> int:
        """Objects that are done or quarantined."""
        return len(self.outcome.products) + len(self.outcome.quarantined)

    def next(self) -> Task | None:
        """The next attempt, to be begun; None if nothing waits or the run is stopped.

        Raises: OSError if the disk refuses.
        """
        while self._anything() and not self.outcome.stopped:
            again = not self.waiting or self._mostly_dies()
            task = self._task((self.suspects if again else self.waiting).popleft())
            if task is not None and not again and task.key in self.tallies and task.key not in self.failing:
                self.suspects.append(task.entry)
            elif task is not None:
                self.at_work += 1
                return task
        return None

    def _anything(self) -> bool:
        """Whether something waits; if all that is left is at another run, look whether it still is, now and then."""
        if not (self.waiting or self.suspects) and self.elsewhere:
            pause = self.looked + LOOK - time.monotonic()
            if self.at_work and pause > 0:
                return False
            if not self.at_work and not self.told:
                self.told = True
                print_error(f"what is left ({len(self.elsewhere)} of {self.total} objects) another run is at; waiting for it")
            time.sleep(max(0.0, pause))
            self.looked = time.monotonic()
            self.waiting, self.elsewhere = self.elsewhere, deque()
        return bool(self.waiting or self.suspects)

    def hand(self, most: int) -> list[Task]:
        """Up to so many attempts for one process, to be begun; an object that has ended badly before is alone among them.

        Raises: OSError if the disk refuses.
        """
        found: list[Task] = []
        while len(found) < most and (task := self.next()) is not None:
            if task.key in self.tallies and found:
                self.at_work -= 1
                (self.waiting if task.key in self.failing else self.suspects).appendleft(task.entry)
                break
            found.append(task)
            if task.key in self.tallies:
                break
        self.widest = max(self.widest, len(found))
        return found

    def _mostly_dies(self) -> bool:
        """Whether it looks as if no object could be done, which second attempts then show before all have had their first."""
        return len(self.suspects) >= max(HOPELESS, 4 * self.widest, len(self.outcome.products))

    def drop(self) -> None:
        """Begin nothing more."""
        for queue in (self.waiting, self.suspects, self.elsewhere):
            queue.clear()

    def begin(self, task: Task) -> bool:
        """Claim an object and record an attempt, before it runs; False if another run is at it, or has made its product since.

        Raises: OSError if the disk refuses.
        """
        if not self.ledger.claims.take(task.key):
            self.at_work -= 1
            self.elsewhere.append(task.entry)
            return False
        if self.run.has(task.path):
            self.at_work -= 1
            self.ledger.claims.drop(task.key)
            self.outcome.skipped += 1
            self._keep(task, fresh=False)
            return False
        self.ledger.write("start", key=task.key, object_id=task.entry.object_id)
        return True

    def _task(self, entry: Entry) -> Task | None:
        """What is to be done for an object; None if it has ended."""
        try:
            key = self.run.key(entry)
            path = product_path(self.run.out, entry.object_id, key)
        except DiffinvError as error:
            self._quarantine(entry, None, reason_of(error))
            return None
        before = read_reason(quarantine_path(self.run.out, entry.object_id), key)
        if self.run.has(path):
            self.outcome.skipped += 1
            self._keep(Task(entry, key, path), fresh=False)
        elif before is not None:
            self._tell(entry, f"{before} (quarantined before; remove its file in quarantine/ to try again)")
        elif (worn := self._worn_out(key)) is not None:
            self._quarantine(entry, key, worn)
        else:
            return Task(entry, key, path)
        return None

    def _worn_out(self, key: str) -> str | None:
        """Why an object is not tried again although nobody has set it aside yet."""
        tally = self.tallies.get(key, Tally())
        if tally.crashes < MOST_CRASHES and tally.kills < MOST_KILLS and tally.failures < MOST_FAILURES:
            return None
        counts = {"its process died": tally.crashes, "its process was killed": tally.kills, "it failed": tally.failures}
        return ", ".join(f"{what} {times} times" for what, times in counts.items() if times)

    def done(self, task: Task) -> None:
        """The product of an attempt is there."""
        self.at_work -= 1
        self.ledger.claims.drop(task.key)
        self._keep(task, fresh=True)

    def _keep(self, task: Task, *, fresh: bool) -> None:
        self.run.write_record()
        self.outcome.products.append(task.path)
        self.tallies.pop(task.key, None)
        if fresh or task.key not in self.known:  # a lost manifest grows again from the products
            self.ledger.write("done", key=task.key, object_id=task.entry.object_id, fresh=fresh)
        quarantine_path(self.run.out, task.entry.object_id).unlink(missing_ok=True)
        self._end(task.entry, task.path if task.path.is_file() else None)

    def failed(self, task: Task, reason: str, *, final: bool) -> None:
        """An attempt raised. final: the next one would as well."""
        self._again(task, "failed", reason, final)

    def crashed(self, task: Task, reason: str) -> None:
        """The process of an attempt died by itself, or was ended because it hung."""
        self._again(task, "crashed", reason, False)

    def killed(self, task: Task, reason: str) -> None:
        """The process of an attempt was killed, by whomever."""
        self._again(task, "killed", reason, False)

    def _again(self, task: Task, kind: str, reason: str, final: bool) -> None:
        """Try once more or give up."""
        self.at_work -= 1
        self.ledger.write(kind, key=task.key, object_id=task.entry.object_id, reason=reason)
        self.ledger.claims.drop(task.key)
        tally = self.tallies[task.key] = add(self.tallies.get(task.key, Tally()), kind)
        if final or self._worn_out(task.key) is not None:
            times = tally.attempts
            self._quarantine(task.entry, task.key, reason if times == 1 else f"{reason} ({times} times)")
        elif kind == "failed":
            self.failing.add(task.key)
            self.waiting.appendleft(task.entry)
        else:
            self.suspects.append(task.entry)

    def _quarantine(self, entry: Entry, key: str | None, reason: str) -> None:
        record = {"object_id": entry.object_id, "path": str(entry.path), "key": key, "reason": reason}
        path = quarantine_path(self.run.out, entry.object_id)
        write_atomically(path, (json.dumps(record) + "\n").encode("utf-8", "backslashreplace"))
        self.ledger.write("quarantined", key=key, object_id=entry.object_id, reason=reason)
        self.tallies.pop(key or "", None)
        self.outcome.failed += 1
        self._tell(entry, reason)

    def _tell(self, entry: Entry, reason: str) -> None:
        self.outcome.quarantined[entry.object_id] = f"object {entry.object_id!r}: {reason}"
        print_error(self.outcome.quarantined[entry.object_id])
        self._end(entry, None)

    def _end(self, entry: Entry, path: Path | None) -> None:
        """An object has ended, with a file of its own or none."""
        if self.packing is not None:
            self.packing.end(entry.object_id, path)
        self._judge()

    def _judge(self) -> None:
        """Stop a run that mostly fails while there is still something to do."""
        failed, left = self.outcome.failed, len(self.waiting) + len(self.suspects) + len(self.elsewhere) + self.at_work
        if self.most_failed is None or not left or self.ended < HOPELESS or self.outcome.stopped:
            return
        if failed >= HOPELESS and not self.outcome.products:
            self.outcome.stopped = f"the first {failed} objects all failed"
        elif failed > self.most_failed:
            self.outcome.stopped = f"{failed} of {self.total} objects failed; --max-failed allows more"


def read_reason(path: Path, key: str) -> str | None:
    """Why the object of this key is in quarantine; None if it is not."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return str(record["reason"]) if record["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_campaign(
    run: Run, entries: Sequence[Entry], shard: Shard, *, max_failed: float | None, supervised: bool = False
) -> Outcome:
    """A product for every object of the shard that can have one, a hand after the other in this process.

    Arguments: max_failed: share of the shard's objects that may fail before the run stops, None for all. supervised: whether
        others may end this process, so that its death is no crash of the object that it is at.
    Raises: OSError if the disk refuses, DeviceLost if the device does.
    """
    with open_ledger(run, entries, shard, supervised=supervised) as ledger:
        campaign = Campaign(run, entries, ledger, look_around(run, ledger, shard), max_failed=max_failed)
        with Progress(campaign.total) as progress:
            while tasks := campaign.hand(hand_size(run.together)):
                _attempt([task for task in tasks if campaign.begin(task)], campaign, progress)
        return campaign.outcome


def _attempt(tasks: Sequence[Task], campaign: Campaign, progress: Progress) -> None:
    ended, name = campaign.ended, tasks[0].entry.object_id if tasks else ""
    report = lambda fraction: progress.set(ended + fraction * len(tasks), name)
    report(0.0)
    for place, error in make_all(campaign.run, [(task.entry, task.path) for task in tasks], report):
        if error is None:
            campaign.done(tasks[place])
        else:
            campaign.failed(tasks[place], reason_of(error), final=isinstance(error, InputError))
        progress.set(campaign.ended, name)
        if campaign.outcome.stopped:
            break  # what else is in the hand is dropped


def open_ledger(run: Run, entries: Sequence[Entry], shard: Shard, *, supervised: bool) -> Ledger:
    """This process's file of the manifest, with the names of all its objects. supervised: other processes do the work."""
    objects = [entry.object_id for entry in entries]
    return Ledger(run.out, {"shard": str(shard), "supervised": supervised, "config": run.config_hash, "objects": objects})


def look_around(run: Run, ledger: Ledger, shard: Shard) -> list[Journal]:
    """The manifest as it is; a warning names every other living run on the same objects."""
    journals = read_journals(run.out)
    for other in others_at_work(journals, ledger, str(shard)):
        print_error(f"{run.out}: another run is at work here ({other}); what it is at is left to it.")
    return journals
