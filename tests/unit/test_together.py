"""Objects that share a pass: read ahead, written behind, and each with its own fate."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from diffinv.engine.run import is_broken_device, is_out_of_memory, suit
from diffinv.engine.together import DeviceLost, hand_size, make_all

WAIT = 30.0  # seconds that nothing here needs


class Run:
    """Notes what it is asked for; an object is its name, and a product "name!" unless `read`, `sample` or `write` refuse it."""

    def __init__(self, objects: int, **refuse: str) -> None:
        self.objects, self.pace, self.refuse = objects, 1, refuse
        self.log: list[tuple[str, str]] = []
        self.products: list[str] = []
        self.before: dict[tuple[str, str], Callable[[], object]] = {}

    def company(self, subjects: Sequence[str]) -> int:
        return self.objects

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
    assert "".join(passes) == "abcdefg"
    assert len(passes[0]) == 1  # which says how many can be together
    assert max(map(len, passes)) == min(objects, 6)
    again = Run(objects)
    again.pace = run.pace
    endings(again, "abcdefg")
    assert [len(names) for step, names in again.log if step == "sample"][0] == min(objects, 7)


def test_what_goes_wrong_belongs_to_one_object() -> None:
    run = Run(4, read="b", sample="f", write="g")
    found = endings(run, "abcdefghi")
    assert {name: why for name, why in found.items() if why} == {"b": "read b", "f": "sample f", "g": "write g"}
    assert sorted(run.products) == [f"{name}!" for name in "acdehi"]
    passes = [names for step, names in run.log if step == "sample"]
    assert passes == ["a", "cde", "fghi", "f", "g", "h", "i"]


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
    assert heard == [0.2, 0.6, 1.0]


def test_a_processor_takes_one_object_at_a_time_and_an_accelerator_many() -> None:
    assert suit("cpu") == 1 and hand_size(1) == 1
    assert suit("cuda") > 8 and hand_size(suit("cuda")) >= 2 * suit("cuda")


def test_an_error_holds_nothing_of_what_failed() -> None:
    run, held = Run(4, sample="ab"), []

    def sample(names: Sequence[str], report: Callable[[float], None]) -> list[str]:
        assert all(reference() is None for reference in held)  # nothing of the passes before is left
        large = Large()
        held.append(weakref.ref(large))
        raise ValueError("too large")

    run.sample = sample
    run.pace = 2
    assert endings(run, "abc") == dict.fromkeys("abc", "too large")
    assert len(held) == 4


class Large:
    """Something of a pass."""


def test_a_device_that_is_lost_blames_no_object() -> None:
    run = Run(2)

    def sample(names: Sequence[str], report: Callable[[float], None]) -> list[str]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    run.sample = sample
    with pytest.raises(DeviceLost, match="illegal memory access"):
        list(make_all(run, [(name, Path(name)) for name in "abc"], lambda fraction: None))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory")) and not is_broken_device(
        RuntimeError("CUDA error: out of memory")
    )


@pytest.mark.parametrize("stops", ["interrupt", "close"])
def test_an_end_in_between_waits_for_what_is_written_and_for_no_reader(stops: str) -> None:
    run, stuck, slow = Run(1), threading.Event(), threading.Event()
    run.before["read", "c"] = lambda: stuck.wait(WAIT)
    run.before["write", "a"] = lambda: slow.wait(0.2)
    made = make_all(run, [(name, Path(name)) for name in "abcd"], lambda fraction: None)
    if stops == "close":
        assert next(made) == (0, None)
        made.close()
    else:
        run.before["sample", "b"] = interrupt
        with pytest.raises(KeyboardInterrupt):
            list(made)
    assert "a!" in run.products and not stuck.is_set()
    stuck.set()
    assert ("read", "d") not in run.log


def interrupt() -> None:
    raise KeyboardInterrupt
