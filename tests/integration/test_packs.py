"""`diffinv sample --pack N`: the same answers in fewer files, for every command that reads them, whatever kills the run."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from astropy.table import Table

from diffinv.cli import main
from diffinv.data.packs import Packs, find_places, read_pack
from tests.small import FAST, write_prior
from tests.survey import data_parts, events, finish, pid_of, start, write_objects


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prior(tmp_path_factory.mktemp("prior") / "tiny.safetensors")


def sample(source: Path, out: Path, prior: Path, *extra: str) -> int:
    return main(["sample", str(source), "--out", str(out), "--prior", str(prior), *FAST, *extra])


def parts(out: Path) -> dict[str, bytes]:
    """Object → the bytes of its mean, wherever it is; an object with two products is an error."""
    products = [place.read() for place in find_places(out, [])]
    assert len({product.object_id for product in products}) == len(products)
    return {product.object_id: product.mean.tobytes() for product in products}


def files(out: Path) -> list[int]:
    """The sizes of all packs, and 1 for every product with a file of its own."""
    packs = sorted(len(read_pack(path)) for path in out.glob("products/packs/*.zip"))
    return [*packs, *(1 for _ in out.glob("products/??/*.fits"))]


def test_packed_products_are_those_of_single_files_for_every_command(
    tmp_path: Path, prior: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, alone = write_objects(tmp_path / "in", *"abcdefg"), tmp_path / "out", tmp_path / "alone"
    (source / "bad.fits").write_bytes(b"<html>")
    assert sample(source, alone, prior, "--max-failed", "1") == 4
    capsys.readouterr()
    assert sample(source, out, prior, "--max-failed", "1", "--pack", "3") == 4
    shown = capsys.readouterr().out.splitlines()
    assert files(out) == [2, 2, 3]  # a b bad | c d e | f g
    assert {f"{place}" for place in find_places(out, [])} == set(shown[:-1]) and shown[-1].endswith("report.html")
    assert parts(out) == {name: arrays["mean"] for name, arrays in data_parts(alone).items()}
    assert main(["status", str(out)]) == 4
    packed = capsys.readouterr().out
    assert main(["status", str(alone)]) == 4
    assert packed == capsys.readouterr().out and "done        7" in packed
    tables = []
    for place in (out, alone):
        assert main(["merge", str(place)]) == 0
        tables.append(Table.read(place / "catalog.ecsv", format="ascii.ecsv"))
        assert main(["evaluate", str(place)]) == 0
    assert all(".zip/" in row for row in tables[0]["product"])
    for name in tables[0].colnames:
        if name != "product":
            assert np.array_equal(tables[0][name], tables[1][name], equal_nan=tables[0][name].dtype.kind == "f")
    rows = [json.loads((place / "evaluation.json").read_text())["rows"] for place in (out, alone)]
    assert rows[0] == rows[1] and len(rows[0]) == 7
    for place in (out, alone):
        assert main(["report", str(place)]) == 0
    assert (out / "report.html").read_bytes() == (alone / "report.html").read_bytes()


def test_a_run_goes_on_where_packs_end_and_does_again_only_what_is_damaged(tmp_path: Path, prior: Path) -> None:
    source, out = write_objects(tmp_path / "in", *"abcd"), tmp_path / "out"
    assert sample(source, out, prior, "--pack", "2") == 0
    before = parts(out)
    assert sample(source, out, prior) == 0 and sample(source, out, prior, "--pack", "4") == 0
    assert files(out) == [2, 2] and len(events(out, "start")) == 4
    path = next(path for path in out.glob("products/packs/*.zip") if "a-" in read_pack(path)[0].name)
    payload = bytearray(path.read_bytes())
    payload[read_pack(path)[0].start + 3000] ^= 1
    path.write_bytes(payload)
    write_objects(source, *"abcde")
    assert sample(source, out, prior, "--pack", "3") == 0
    assert events(out, "start")[4:] == ["a", "e"]
    after = parts(out)
    assert set(after) == set("abcde") and {name: after[name] for name in "abcd"} == before


@pytest.mark.slow
def test_a_run_killed_within_a_pack_loses_no_product_that_was_done(tmp_path: Path, prior: Path) -> None:
    source, out = write_objects(tmp_path / "in", "a", "b", "c", "hangs", "z"), tmp_path / "out"
    process = start(source, out, prior, "--pack", "4")
    pid_of(out, "hangs")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert files(out) == [1, 1, 1] and set(parts(out)) == {"a", "b", "c"}
    (source / "hangs.fits").rename(source / "d.fits")
    code, lines = finish(start(source, out, prior, "--pack", "4", "--workers", "2"))
    assert code == 0, lines
    assert files(out) == [4, 1] and set(parts(out)) == {"a", "b", "c", "d", "z"}
    assert events(out, "start").count("a") == 1
    assert sample(source, tmp_path / "alone", prior) == 0
    assert parts(out) == {name: arrays["mean"] for name, arrays in data_parts(tmp_path / "alone").items()}


def test_a_pack_that_another_run_made_meanwhile_is_found(tmp_path: Path, prior: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_objects(tmp_path / "in", *"abc"), tmp_path / "out"
    assert sample(source, out, prior) == 0
    hold, asked = Packs.hold, []

    def meanwhile(packs: Packs, path: Path) -> bool:
        asked.append(path)
        if len(asked) == 1:
            Packs(out).pack(sorted(out.glob("products/??/*.fits")))
        return hold(packs, path)

    monkeypatch.setattr(Packs, "hold", meanwhile)
    (next(out.glob("products/??/a-*.fits"))).unlink()
    assert sample(source, out, prior, "--pack", "3") == 0
    monkeypatch.undo()
    assert sorted(parts(out)) == ["a", "b", "c"] and len(events(out, "start")) == 4
