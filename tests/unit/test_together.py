"""Objects that share a pass: read ahead, written behind, and each with its own fate."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffinv.engine.together import hand_size, make_all, suit

WAIT = 30.0  # seconds that nothing here needs


class Run:
    """Notes what it is asked for; an object is its name, and a product "name!" unless `read`, `sample` or `write` refuse it."""

    def __init__(self, objects: int, **refuse: str) -> None:
        self.plan, self.refuse = SimpleNamespace(objects=objects), refuse
        self.log: list[tuple[str, str]] = []
        self.products: list[str] = []
        self.before: dict[tuple[str, str], Callable[[], object]] = {}

    def _do(self, step: str, names: str, error: type[Exception] = ValueError) -> None:
        self.log.append((step, names))
        self.before.get((step, names), lambda: None)()
        if set(self.refuse.get(step, "")) & set(names):
            raise error(f"{step} {names}")

    def read(self, name: str, path: Path) -> str:
        self._do("read", name)
        return name

    def sample(self, names: Sequence[str], report: Callable[[float], None]) -> list[str]:
        self._do("sample", "".join(names))
        report(1.0)
        return [f"{name}!" for name in names]

    def write(self, name: str, product: str) -> None:
        self._do("write", name, OSError if name == "o" else ValueError)
        self.products.append(product)

    def make(self, name: str, path: Path, report: Callable[[float], None]) -> None:
        self.write(name, self.sample([self.read(name, path)], report)[0])


def endings(run: Run, names: str) -> dict[str, str]:
    """Object → what went wrong, or nothing."""
    found = list(make_all(run, [(name, Path(name)) for name in names], lambda fraction: None))
    assert sorted(place for place, _ in found) == list(range(len(names)))
    return {names[place]: str(error or "") for place, error in found}


@pytest.mark.parametrize("objects", [1, 2, 3, 8])
def test_every_object_is_made_once_whatever_the_size_of_a_pass(objects: int) -> None:
    run = Run(objects)
    assert endings(run, "abcdefg") == dict.fromkeys("abcdefg", "")
    assert sorted(run.products) == [f"{name}!" for name in "abcdefg"]
    passes = [names for step, names in run.log if step == "sample"]
    assert "".join(passes) == "abcdefg" and max(map(len, passes)) == min(objects, 7)


def test_what_goes_wrong_belongs_to_one_object() -> None:
    run = Run(4, read="b", sample="f", write="g")
    found = endings(run, "abcdefghi")
    assert {name: why for name, why in found.items() if why} == {"b": "read b", "f": "sample f", "g": "write g"}
    assert sorted(run.products) == [f"{name}!" for name in "acdehi"]
    passes = [names for step, names in run.log if step == "sample"]
    assert passes == ["acd", "efgh", "e", "f", "g", "h", "i"]


def test_a_pass_of_unreadable_objects_samples_nothing() -> None:
    run = Run(2, read="ab")
    assert endings(run, "abc") == {"a": "read a", "b": "read b", "c": ""}
    assert [names for step, names in run.log if step == "sample"] == ["c"]


@pytest.mark.parametrize("names", ["o", "aob"])
def test_a_disk_that_refuses_ends_it(names: str) -> None:
    with pytest.raises(OSError, match="write o"):
        list(make_all(Run(2, write="o"), [(name, Path(name)) for name in names], lambda fraction: None))


def test_the_next_pass_is_read_and_the_last_one_written_while_one_is_sampled() -> None:
    run, read, written, sampled = Run(1), threading.Event(), threading.Event(), []
    run.before["read", "b"] = read.set
    run.before["sample", "a"] = lambda: sampled.append(read.wait(WAIT))
    run.before["write", "a"] = written.set
    run.before["sample", "b"] = lambda: sampled.append(written.wait(WAIT))
    assert endings(run, "abc") == dict.fromkeys("abc", "")
    assert sampled == [True, True]
    order = [entry for entry in run.log]
    assert order.index(("read", "c")) > order.index(("sample", "a"))  # one pass ahead, not all


def test_the_report_never_goes_back_and_ends_at_one() -> None:
    run, heard = Run(2), []
    list(make_all(run, [(name, Path(name)) for name in "abcde"], heard.append))
    assert heard == [0.4, 0.8, 1.0]


def test_a_processor_takes_one_object_at_a_time_and_an_accelerator_many() -> None:
    assert suit("cpu") == 1 and hand_size(Run(1)) == 1
    assert suit("cuda") > 8 and hand_size(Run(suit("cuda"))) >= 2 * suit("cuda")
