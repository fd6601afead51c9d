"""Every fault that a user was promised an answer to has a test: `faults.md` lists them by row, and here are those that no other
file injects."""

from __future__ import annotations

import ast
import json
import re
import resource
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffinv.cli import main
from diffinv.data.atomic import remove_parts, write_atomically
from diffinv.data.products import Quality, read_product, safe_id
from diffinv.engine import objects
from diffinv.engine.manifest import read_journals
from diffinv.engine.methods import SAMPLERS
from diffinv.engine.run import Run, Subject
from tests.crashes import last_call
from tests.integration.test_bad_files import FAULTS
from tests.small import FAST, write_observation, write_prior
from tests.survey import ROOT, data_parts, reasons, write_objects

TABLE = Path(__file__).with_name("faults.md").read_text(encoding="utf-8")
ROWS = [line for line in TABLE.splitlines() if line.startswith("| ")][1:]


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prior(tmp_path_factory.mktemp("prior") / "tiny.safetensors")


def sample(source: Path, out: Path, prior: Path, *extra: str) -> int:
    return main(["sample", str(source), "--out", str(out), "--prior", str(prior), *FAST, *extra])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_every_row_has_tests(row: str) -> None:
    tests = re.findall(r"`(\w+/\w+\.py)::(\w+)`", row.split("|")[3])
    assert tests
    for file, name in tests:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_table_has_every_row() -> None:
    assert len(ROWS) >= 23


# For every k, over an old file and over none.
WRITER = """
import sys
from pathlib import Path
from diffinv.data.atomic import write_atomically
from tests.crashes import dies
path, last = Path(sys.argv[1]), int(sys.argv[2])
for k in range(1, last):
    (path.parent / f"{k}").mkdir()
    target = path.parent / f"{k}" / path.name
    if k % 2:
        target.write_bytes(b"old")
    print(k, dies(k, lambda: write_atomically(target, b"new" * 1000)))
"""


def test_a_crash_at_any_call_of_the_writer_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    last = 40
    (tmp_path / "products").mkdir()
    calls = last_call(WRITER, tmp_path / "products" / "p", last, fewest=12)
    states = []
    for k in range(1, last):
        path = tmp_path / "products" / f"{k}" / "p"
        states.append(path.read_bytes() if path.exists() else None)
        assert states[-1] in (b"new" * 1000, b"old" if k % 2 else None)
    whole = [state == b"new" * 1000 for state in states]
    assert whole == sorted(whole) and any(whole[:calls]) and not all(whole)
    left = list(tmp_path.rglob(".*.part"))
    assert left
    for k in range(1, last):
        folder = tmp_path / "products" / f"{k}"
        folder.rename(tmp_path / "products" / f"{k:02x}")
    assert remove_parts(tmp_path) == len(left)
    assert not list(tmp_path.rglob(".*.part"))


def test_the_file_of_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "products" / "ab").mkdir(parents=True)
    dead = tmp_path / "products" / "ab" / ".0.part"
    dead.write_bytes(b"left by a killed writer")
    seen = []

    def meanwhile(temporary: Path) -> None:
        seen.append((remove_parts(tmp_path), temporary.exists()))

    write_atomically(tmp_path / "products" / "ab" / "p", b"payload", verify=meanwhile)
    assert seen == [(1, True)]
    assert [p.name for p in dead.parent.iterdir()] == ["p"]


def test_a_run_removes_what_a_killed_one_left(tmp_path: Path, prior: Path) -> None:
    source, out = write_objects(tmp_path / "in", "a"), tmp_path / "out"
    assert sample(source, out, prior) == 0
    left = [next(out.glob("products/*")) / ".1.part", out / ".2.part", out / "products" / ".3.part"]
    for path in left:
        path.write_bytes(b"half")
    assert sample(source, out, prior) == 0
    assert not any(path.exists() for path in left)


def test_a_quota_ends_the_run_without_a_partial_product(tmp_path: Path, prior: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_objects(tmp_path / "in", "a", "b"), tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        assert sample(source, out, prior) == 74
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("File too large; no partial product was left.")
    assert not [p for p in (out / "products").rglob("*") if p.is_file()]
    assert all(journal.closed for journal in read_journals(out)) and not reasons(out)
    assert sample(source, out, prior) == 0
    assert set(data_parts(out)) == {"a", "b"}


def test_a_folder_of_bad_files_costs_only_the_bad_ones(tmp_path: Path, prior: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_objects(tmp_path / "in", "good", "other"), tmp_path / "out"
    for name, (make, _) in FAULTS.items():
        (source / f"{name}.fits").write_bytes(make())
    assert sample(source, out, prior, "--max-failed", "1", "--set", "input.max_pixels=1000000") == 4
    assert set(data_parts(out)) == {"good", "other"}
    assert set(reasons(out)) == set(FAULTS)
    lines = capsys.readouterr().err.splitlines()
    for name in FAULTS:
        (line,) = [line for line in lines if line.startswith(f"diffinv: object {name!r}: ")]
        assert str(source / f"{name}.fits") in line


def test_no_objects_are_no_error(tmp_path: Path, prior: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "list.csv").write_text("object_id,path\n")
    for source in ("in", "list.csv"):
        assert sample(tmp_path / source, tmp_path / "out", prior) == 0


HOSTILE = ["../escape", "/etc/passwd", "..", ".", "a/../../b", "-rf", "~", "x" * 4096, "naïve\u202e", "<script>", "nul%00", "CON"]


def test_hostile_names_of_bad_objects_stay_inside_the_output(tmp_path: Path, prior: Path) -> None:
    (tmp_path / "list.csv").write_text("object_id,path\n" + "".join(f"{n},/dev/null\n" for n in HOSTILE), encoding="utf-8")
    out = tmp_path / "deep" / "out"
    before = {*tmp_path.rglob("*"), out.parent}
    assert sample(tmp_path / "list.csv", out, prior, "--max-failed", "1") == 4
    assert all(path.is_relative_to(out) for path in {*tmp_path.rglob("*")} - before)
    assert set(reasons(out)) == set(HOSTILE) and len(list((out / "quarantine").iterdir())) == len(HOSTILE)
    assert not any(set(safe_id(name)) & set("/\\\0\n ") for name in ["a\0b", "a\nb", *HOSTILE])


def test_draws_that_are_not_finite_are_flagged(
    tmp_path: Path, prior: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, real = write_objects(tmp_path / "in", "a"), tmp_path / "out", objects.smooth_to

    def diverged(*arguments: object):
        samples = real(*arguments).clone()
        samples[0, ..., :4, :4] = float("inf")
        return samples

    monkeypatch.setattr(objects, "smooth_to", diverged)
    assert sample(source, out, prior) == 0
    (product,) = map(read_product, out.glob("products/*/*.fits"))
    bad = ~(np.isfinite(product.mean) & np.isfinite(product.std))
    assert bad.any() and ((product.quality & Quality.NODATA) != 0)[bad].all()
    assert flagged(out, capsys) == "1"


# Steps towards the data as they should be; a hundred times too long, so that no draw is near them; so long that they overflow.
@pytest.mark.parametrize(("longer", "code"), [(1.0, 0), (100.0, 0), (1e39, 4)])
def test_a_sampler_that_diverges_is_flagged_in_product_and_status(
    longer: float, code: int, tmp_path: Path, prior: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_observation(source / "a.fits")
    tuned = SAMPLERS["dps"]
    monkeypatch.setitem(SAMPLERS, "dps", lambda card, steps: replace(tuned(card, steps), zeta=longer * tuned(card, steps).zeta))
    chosen = ("--samples", "4", "--set", "sampler.steps=24", "--set", "sampler.name=dps")
    assert main(["sample", str(source), "--out", str(out), "--prior", str(prior), *chosen]) == code
    wrong = longer == 100
    assert flagged(out, capsys) == str(int(wrong))
    if code:
        assert "draw 0 of image 0 is not finite" in reasons(out)["a"] and main(["status", str(out)]) == code
        return
    (product,) = map(read_product, out.glob("products/*/*.fits"))
    assert bool((product.quality & Quality.CHI2_BAD).all()) == bool((product.quality & Quality.CHI2_BAD).any()) == wrong


def flagged(out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `diffinv status` counts as flagged."""
    capsys.readouterr()
    main(["status", str(out)])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("flagged")]
    return line.split()[-1]


def test_a_run_opens_no_connection(tmp_path: Path, prior: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("opens a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert sample(write_objects(tmp_path / "in", "a"), tmp_path / "out", prior) == 0


def test_an_input_that_changes_under_the_run_has_the_key_of_what_was_read(
    tmp_path: Path, prior: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, real = write_objects(tmp_path / "in", "a"), tmp_path / "out", Run.read

    def late(run: Run, entry, path: Path) -> Subject:
        if not (tmp_path / "changed").exists():
            (tmp_path / "changed").touch()
            write_observation(entry.path, seed=77)
        return real(run, entry, path)

    monkeypatch.setattr(Run, "read", late)
    assert sample(source, out, prior) == 0
    monkeypatch.undo()
    assert data_parts(out).keys() == {"a"}
    (failed,) = [event for journal in read_journals(out) for event in journal.events if event["event"] == "failed"]
    assert "changed while the run was about to read it" in failed["reason"]
    assert sample(source, tmp_path / "alone", prior) == 0
    assert data_parts(out) == data_parts(tmp_path / "alone")
    assert [p.name for p in out.glob("products/*/*.fits")] == [p.name for p in (tmp_path / "alone").glob("products/*/*.fits")]
    assert json.loads((out / "run.json").read_text()) == json.loads((tmp_path / "alone" / "run.json").read_text())
