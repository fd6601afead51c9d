"""A list of objects whose processes are killed at random: none is blamed for it, however late the kills come."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from diffinv.data.catalog import Entry
from diffinv.engine import campaign as module
from diffinv.engine.campaign import Campaign, Task

OBJECTS, KILLS, WORKERS = 400, 44, 2


class Ledger:
    """Keeps nothing, and claims all but what is elsewhere."""

    def __init__(self, *elsewhere: str) -> None:
        self.elsewhere, self.claims, self.own = set(elsewhere), self, set[str]()

    def take(self, key: str) -> bool:
        if key in self.elsewhere:
            return False
        assert key not in self.own
        self.own.add(key)
        return True

    def drop(self, key: str) -> None:
        self.own.remove(key)

    def write(self, event: str, **values: object) -> None:
        pass


def small(out: Path, count: int, *elsewhere: str) -> Campaign:
    """A campaign of objects whose products are never looked at."""
    nothing = lambda *arguments: None
    run = SimpleNamespace(
        out=out, plan=SimpleNamespace(pack=None), key=lambda e: f"{int(e.object_id):04x}", has=nothing, write_record=nothing
    )
    entries = [Entry(str(number), out / str(number)) for number in range(count)]
    return Campaign(run, entries, Ledger(*elsewhere), [], max_failed=1.0)


def storm(campaign: Campaign, rng: np.random.Generator) -> None:
    """Kill a random process whenever the number of products says so; a new one is ready a few objects later."""
    busy: list[Task] = []
    thresholds = set(rng.choice(np.arange(1, OBJECTS), KILLS, replace=False).tolist())
    absent: list[int] = []  # how many objects each process that starts will still miss
    while True:
        while len(busy) + len(absent) < WORKERS and (task := campaign.next()) is not None:
            if campaign.begin(task):
                busy.append(task)
        if not busy and not absent:
            return
        if busy:
            campaign.done(busy.pop(int(rng.integers(len(busy)))))
        absent = [left - 1 for left in absent if left > 1]
        while busy and len(campaign.outcome.products) in thresholds:
            thresholds.remove(len(campaign.outcome.products))
            campaign.killed(busy.pop(int(rng.integers(len(busy)))), "its process was killed")
            absent.append(int(rng.integers(1, 8)))


@pytest.mark.parametrize("seed", range(20))
def test_no_object_is_blamed_for_random_kills(tmp_path: Path, seed: int) -> None:
    campaign = small(tmp_path, OBJECTS)
    storm(campaign, np.random.default_rng(seed))
    assert not campaign.outcome.quarantined
    assert len(campaign.outcome.products) == OBJECTS == len(set(campaign.outcome.products))


@pytest.mark.parametrize(("end", "times"), [("crashed", 2), ("killed", 4)])
def test_an_object_whose_process_always_dies_is_tried_after_all_others_and_set_aside(
    tmp_path: Path, end: str, times: int
) -> None:
    campaign, order = small(tmp_path, 50), []
    while (task := campaign.next()) is not None:
        campaign.begin(task)
        order.append(int(task.entry.object_id))
        if order[-1] == 3:
            getattr(campaign, end)(task, "it does")
        else:
            campaign.done(task)
    assert [place for place, number in enumerate(order) if number == 3] == [3, *range(50, 49 + times)]
    assert campaign.outcome.quarantined == {"3": f"object '3': it does ({times} times)"}


@pytest.mark.parametrize(("end", "rounds"), [("failed", 3), ("crashed", 3), ("killed", 5)])
def test_a_run_in_which_all_ends_badly_stops_before_every_object_had_its_turn(tmp_path: Path, end: str, rounds: int) -> None:
    campaign, attempts = small(tmp_path, 10_000), 0
    while (task := campaign.next()) is not None:
        campaign.begin(task)
        campaign.failed(task, "as always", final=False) if end == "failed" else getattr(campaign, end)(task, "as always")
        attempts += 1
    assert campaign.outcome.stopped == f"the first {module.HOPELESS} objects all failed"
    assert attempts <= rounds * module.HOPELESS


def test_objects_go_hand_in_hand_but_one_that_ended_badly_goes_alone(tmp_path: Path) -> None:
    campaign, hands = small(tmp_path, 10), []
    while tasks := campaign.hand(4):
        hands.append("".join(task.entry.object_id for task in tasks))
        for task in tasks:
            campaign.begin(task)
            if task.entry.object_id in "25" and len(hands) < 3:
                campaign.killed(task, "together") if task.entry.object_id == "2" else campaign.failed(
                    task, "by itself", final=False
                )
            else:
                campaign.done(task)
    assert hands == ["0123", "4567", "5", "89", "2"]
    assert campaign.at_work == 0 and len(campaign.outcome.products) == 10 and not campaign.outcome.quarantined


def test_what_another_run_is_at_is_left_to_it_and_looked_for_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK", 0.01)
    campaign, order = small(tmp_path, 6, "0001", "0004"), []
    made: set[Path] = set()
    campaign.run.has = lambda path: path in made

    def other() -> None:
        """Makes one of its two objects and dies at the other."""
        campaign.ledger.elsewhere.clear()
        made.update(path for path in paths if "1" in path.name.partition("-")[0])

    paths = [task.path for task in map(campaign._task, [Entry(str(k), tmp_path / str(k)) for k in range(6)])]
    while (task := campaign.next()) is not None:
        if len(order) == 4 and not made:
            other()
        if campaign.begin(task):
            order.append(task.entry.object_id)
            campaign.done(task)
    assert order == ["0", "2", "3", "5", "4"]
    assert campaign.outcome.skipped == 1 and len(campaign.outcome.products) == 6
    assert not campaign.ledger.own and campaign.at_work == 0


def test_a_pool_that_is_busy_is_not_kept_waiting_for_another_run(tmp_path: Path) -> None:
    campaign = small(tmp_path, 2, "0001")
    first = campaign.next()
    assert campaign.begin(first)
    second = campaign.next()
    assert not campaign.begin(second)
    assert campaign.next() is not None  # looked for once,
    campaign.at_work -= 1
    campaign.elsewhere.append(second.entry)
    began = time.monotonic()
    assert campaign.next() is None and time.monotonic() - began < module.LOOK / 2  # and not again at once
