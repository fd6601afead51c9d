"""Several processes on one list: whatever kills one of them, or the supervisor, loses no product and blames no neighbour."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from diffinv.cli import main
from diffinv.data.products import read_product
from diffinv.engine.manifest import Tally, count, read_journals
from tests.small import FAST, write_observation, write_prior
from tests.survey import ROOT, data_parts, events, finish, is_alive, pid_of, reasons, start, wait_for, write_objects


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prior(tmp_path_factory.mktemp("prior") / "tiny.safetensors")


def sample(source: Path, out: Path, prior: Path, *extra: str) -> int:
    return main(["sample", str(source), "--out", str(out), "--prior", str(prior), *FAST, *extra])


@pytest.mark.slow
def test_objects_that_kill_hang_or_fail_leave_their_neighbours_bit_for_bit_as_they_are_alone(tmp_path: Path, prior: Path) -> None:
    source, out = write_objects(tmp_path / "in", "a", "exits", "fails", "hangs", "once", "z"), tmp_path / "out"
    code, lines = finish(start(source, out, prior, "--workers", "2", "--timeout", "20"), timeout=300)
    assert code == 4, lines
    why = reasons(out)
    assert set(why) == {"exits", "fails", "hangs"}
    assert why["exits"] == "its process ended with exit code 70 (2 times)"
    assert why["fails"] == "RuntimeError: as it always does (3 times)"
    assert why["hangs"] == "took longer than --timeout 20 s and was ended (2 times)"
    assert events(out, "start").count("once") == 2 and events(out, "killed").count("once") == 1
    for name in why:
        (source / f"{name}.fits").unlink()
    assert sample(source, tmp_path / "alone", prior) == 0
    assert data_parts(out) == data_parts(tmp_path / "alone")
    assert set(data_parts(out)) == {"a", "once", "z"}


def test_processes_die_with_the_supervisor_and_the_rest_is_done_by_the_next_run(tmp_path: Path, prior: Path) -> None:
    source, out = write_objects(tmp_path / "in", "a", "hangs", "waits"), tmp_path / "out"
    process = start(source, out, prior, "--workers", "2")
    try:
        workers = [pid_of(out, "hangs"), pid_of(out, "waits")]
        assert all(map(is_alive, workers)) and process.pid not in workers
    finally:
        process.kill()
    wait_for(lambda: not any(map(is_alive, workers)), timeout=5)
    process.communicate()
    assert sorted(count(read_journals(out)).values(), key=str) == [Tally(kills=1)] * 2
    (source / "hangs.fits").unlink()
    assert sample(source, out, prior) == 0
    assert events(out, "start").count("a") == 1
    assert set(data_parts(out)) == {"a", "waits"}


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_gives_objects_in_flight_their_grace_and_blames_none(
    tmp_path: Path, prior: Path, number: signal.Signals, expected: int
) -> None:
    source, out = write_objects(tmp_path / "in", "hangs", "waits", "z"), tmp_path / "out"
    process = start(source, out, prior, "--workers", "2")
    try:
        workers = [pid_of(out, "hangs"), pid_of(out, "waits")]
        process.send_signal(number)
        (out / "go").touch()
        began = time.monotonic()
        code, lines = finish(process)
    finally:
        process.kill()
    assert code == expected
    assert time.monotonic() - began < 20
    assert lines.splitlines()[-1] == "diffinv: interrupted; finished products are kept, the same command does the rest."
    assert not any(map(is_alive, workers))
    assert set(data_parts(out)) == {"waits"}
    assert count(read_journals(out)) == {} and not reasons(out)
    assert main(["status", str(out)]) == 3


def test_a_signal_ends_a_process_whose_reader_hangs(tmp_path: Path, prior: Path) -> None:
    source, out = write_objects(tmp_path / "in", "a", "b", "hangs", "z"), tmp_path / "out"
    process = start(source, out, prior, "--set", "sampler.objects=2")
    try:
        pid_of(out, "hangs")
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code, _ = finish(process)
    finally:
        process.kill()
    assert code == 143 and time.monotonic() - began < 20
    assert count(read_journals(out)) == {} and not reasons(out)
    assert main(["status", str(out)]) == 3


def test_two_runs_on_one_output_warn_and_agree(tmp_path: Path, prior: Path) -> None:
    source, out = write_objects(tmp_path / "in", "a", "b", "waits"), tmp_path / "out"
    first = start(source, out, prior, "--workers", "1")
    pid_of(out, "waits")
    second = start(source, out, prior)
    try:
        wait_for(lambda: living(out) == 2)
        time.sleep(2.0)
        assert second.poll() is None  # it has nothing else to do
        (out / "go").touch()
        ends = [finish(first), finish(second)]
    finally:
        first.kill()
        second.kill()
    assert [code for code, _ in ends] == [0, 0]
    assert (
        "another run is at work here" in ends[1][1]
        and "what is left (1 of 3 objects)" in ends[1][1]
        and "another run" not in ends[0][1]
    )
    assert sample(source, tmp_path / "alone", prior) == 0
    assert data_parts(out) == data_parts(tmp_path / "alone")
    assert sorted(events(out, "start")) == ["a", "b", "waits"]
    assert main(["status", str(out)]) == 0


def test_what_a_killed_run_was_at_is_taken_over_by_the_one_beside_it(tmp_path: Path, prior: Path) -> None:
    source, out = write_objects(tmp_path / "in", "a", "waits"), tmp_path / "out"
    first = start(source, out, prior)
    pid_of(out, "waits")
    second = start(source, out, prior, "--workers", "1")
    try:
        wait_for(lambda: living(out) == 2)
        (out / "go").touch()
        first.kill()
        code, lines = finish(second)
    finally:
        first.kill()
        second.kill()
    first.communicate()
    assert code == 0, lines
    assert set(data_parts(out)) == {"a", "waits"} and not reasons(out)


def living(out: Path) -> int:
    """Runs at work."""
    return sum(journal.alive for journal in read_journals(out))


def test_a_full_disk_ends_the_run_and_processes_that_cannot_start_are_one_line(tmp_path: Path, prior: Path) -> None:
    source, out = write_objects(tmp_path / "in", "full"), tmp_path / "out"
    code, lines = finish(start(source, out, prior, "--workers", "2"))
    assert code == 74 and lines.count("\n") == 1 and "No space left on device" in lines
    assert count(read_journals(out)) == {} and not data_parts(out)
    code, lines = finish(start(source, out, prior, "--workers", "2", STILLBORN="1"))
    assert code == 2
    assert (
        lines
        == "diffinv: --workers: processes die before they are ready (the last ended with exit code 3); try fewer, or none.\n"
    )


ORPHAN = """
import os, sys, time
from diffinv.engine.worker import die_with
supervisor = os.getpid()
if os.fork() == 0:
    sys.platform = "without a death signal"
    die_with(supervisor)
    print(os.getpid(), flush=True)
    time.sleep(1000)
sys.stdin.readline()
"""


def test_without_a_death_signal_a_process_sees_that_its_supervisor_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", ORPHAN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        child = int(process.stdout.readline())
        time.sleep(1.5)
        assert is_alive(child)
    finally:
        process.kill()
    wait_for(lambda: not is_alive(child), timeout=5)
    process.communicate()


@pytest.mark.parametrize(
    "option", [("--workers", "0"), ("--workers", "two"), ("--workers", "1.5"), ("--timeout", "0"), ("--max-failed", "5")]
)
def test_impossible_numbers_are_refused(tmp_path: Path, option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["sample", "in", "--out", "out", *option])
    assert caught.value.code == 2
    assert f"got '{option[1]}'" in capsys.readouterr().err


def test_objects_sampled_together_are_as_they_are_alone(tmp_path: Path, prior: Path) -> None:
    source = write_objects(tmp_path / "in", *"abcdefg")
    write_observation(source / "two.fits", bands=("g", "i"), seed=9)
    (source / "bad.fits").write_bytes(b"<html>")
    assert sample(source, tmp_path / "alone", prior) == 4
    alone, notes = draws_of(tmp_path / "alone"), notes_of(tmp_path / "alone")
    assert set(alone) == {*"abcdefg", "two"}
    for name, options in {"one process": (), "two": ("--workers", "2"), "passes": ("--set", "sampler.max_batch=5")}.items():
        out = tmp_path / name
        assert sample(source, out, prior, "--set", "sampler.objects=3", *options) == 4
        together = draws_of(out)
        assert set(together) == set(alone) and set(reasons(out)) == {"bad"}
        assert notes_of(out) == notes
        for object_id, images in alone.items():
            np.testing.assert_allclose(together[object_id], images, rtol=0, atol=1e-5 * np.abs(images).max())
        assert sample(source, out, prior) == 4  # the same run: the size of a pass decides no number
        assert sorted(name for name in events(out, "start") if name != "bad") == sorted(alone)


def notes_of(out: Path) -> dict[str, tuple[str, ...]]:
    """Object → what is to be known of it."""
    return {p.object_id: p.notes for p in map(read_product, (out / "products").glob("*/*.fits"))}


def draws_of(out: Path) -> dict[str, np.ndarray]:
    """Object → its draws."""
    return {p.object_id: p.samples for p in map(read_product, (out / "products").glob("*/*.fits"))}


@pytest.mark.slow
def test_of_objects_that_were_together_only_the_guilty_are_set_aside(tmp_path: Path, prior: Path) -> None:
    source, out = write_objects(tmp_path / "in", *"abc", "exits", "fails", "hangs", "once", "z"), tmp_path / "out"
    options = ("--workers", "2", "--timeout", "10", "--set", "sampler.objects=2")
    code, lines = finish(start(source, out, prior, *options), timeout=300)
    assert code == 4, lines
    assert set(reasons(out)) == {"exits", "fails", "hangs"}
    assert events(out, "crashed").count("exits") == 2 and events(out, "crashed").count("hangs") == 2
    assert not {*"abcz", "once"} & set(events(out, "crashed") + events(out, "failed"))
    assert set(draws_of(out)) == {*"abcz", "once"}
