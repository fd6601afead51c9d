"""Packs: what goes in comes out byte for byte, and a crash at any call loses nothing and leaves nothing twice."""

from __future__ import annotations

import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from diffinv.core.checks import DiffinvError, InputError
from diffinv.data import packs as module
from diffinv.data.atomic import remove_parts
from diffinv.data.headers import read_plane
from diffinv.data.packs import Packs, encode_pack, find_places, read_pack
from diffinv.data.products import product_path, write_product
from tests.crashes import last_call
from tests.unit.test_report import product


def write(out: Path, *names: str) -> list[Path]:
    paths = [product_path(out, name, f"{number:02x}ff") for number, name in enumerate(names)]
    for name, path in zip(names, paths):
        write_product(path, replace(product(name), samples=None))
    return paths


def archives(out: Path) -> list[Path]:
    return sorted((out / "products" / "packs").glob("*.zip"))


def found(out: Path) -> list[str]:
    """The names of all whole products."""
    damaged: list[str] = []
    names = [place.read().object_id for place in find_places(out, damaged)]
    assert not damaged
    return sorted(names)


def test_products_leave_their_files_for_a_pack_and_any_unzip_gives_them_back(tmp_path: Path) -> None:
    paths = write(tmp_path, "a", "ünï", "../c", "d")
    before = {path: path.read_bytes() for path in paths}
    packs = Packs(tmp_path)
    assert packs.find(paths[0]) is None and not packs.hold(paths[0])
    packs.pack(paths[:3])
    assert [path.exists() for path in paths] == [False, False, False, True]
    assert [packs.hold(path) for path in paths] == [True, True, True, False]
    assert found(tmp_path) == ["../c", "a", "d", "ünï"]
    (archive,) = archives(tmp_path)
    with zipfile.ZipFile(archive) as stream:
        assert stream.testzip() is None
        stream.extractall(tmp_path / "products")
    assert {path: path.read_bytes() for path in paths} == before


def test_headers_and_planes_are_read_where_they_lie(tmp_path: Path) -> None:
    paths = write(tmp_path, "a", "b")
    alone = [place.headers() for place in find_places(tmp_path, [])]
    planes = [read_plane(path, next(h for h in headers if h.name == "SCI")) for path, headers in zip(paths, alone)]
    Packs(tmp_path).pack(paths)
    places = sorted(find_places(tmp_path, []), key=lambda place: place.name)
    for place, headers, plane in zip(places, alone, planes):
        assert [header.text for header in place.headers()] == [header.text for header in headers]
        within = next(header for header in place.headers() if header.name == "SCI")
        assert read_plane(place.path, within).tobytes() == plane.tobytes()
        assert str(place) == str(place.path / place.name)


def test_the_same_products_are_the_same_pack_and_one_alone_stays_a_file(tmp_path: Path) -> None:
    for out in ("x", "y"):
        Packs(tmp_path / out).pack(write(tmp_path / out, "a", "b"))
    (x,), (y,) = archives(tmp_path / "x"), archives(tmp_path / "y")
    assert x.name == y.name and x.read_bytes() == y.read_bytes()
    (path,) = write(tmp_path / "z", "a")
    Packs(tmp_path / "z").pack([path])
    assert path.exists() and not archives(tmp_path / "z")


def test_what_another_run_has_packed_is_not_packed_again(tmp_path: Path) -> None:
    paths = write(tmp_path, "a", "b", "c")
    ours, theirs = Packs(tmp_path), Packs(tmp_path)
    assert ours.find(paths[0]) is None
    theirs.pack(paths[:2])
    write(tmp_path, "a")  # as a run makes it that looked for it just before
    ours.pack(paths)
    assert len(archives(tmp_path)) == 1 and not paths[0].exists() and paths[2].exists()
    assert found(tmp_path) == ["a", "b", "c"]


def test_packs_are_no_larger_than_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write(tmp_path, *"abcde")
    monkeypatch.setattr(module, "MOST_BYTES", int(2.5 * paths[0].stat().st_size))
    Packs(tmp_path).pack(paths)
    assert [len(read_pack(path)) for path in archives(tmp_path)] == [2, 2] and paths[4].exists()
    assert found(tmp_path) == list("abcde")


def test_damage_of_a_member_is_its_own_and_a_newer_file_counts(tmp_path: Path) -> None:
    paths = write(tmp_path, "a", "b")
    Packs(tmp_path).pack(paths)
    (archive,) = archives(tmp_path)
    payload = bytearray(archive.read_bytes())
    payload[read_pack(archive)[0].start + 3000] ^= 1
    archive.write_bytes(payload)
    os.utime(archive, ns=(1, 1))
    packs = Packs(tmp_path)
    assert [packs.hold(path) for path in paths] == [False, True]
    write(tmp_path, "a")
    assert found(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("damage", [b"", b"PK", b"<html>"])
def test_a_pack_that_is_none_is_one_line(tmp_path: Path, damage: bytes) -> None:
    paths = write(tmp_path, "a", "b")
    Packs(tmp_path).pack(paths)
    (archive,) = archives(tmp_path)
    archive.write_bytes(damage)
    lines: list[str] = []
    assert find_places(tmp_path, lines) == []
    assert len(lines) == 1 and str(archive) in lines[0] and "remove it" in lines[0]
    assert not Packs(tmp_path).hold(paths[0])


def test_foreign_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("00/a-00ff.fits", b"0" * 9999)
    with pytest.raises(InputError, match="not written"):
        read_pack(path)


def test_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    paths = write(tmp_path / "out", "a", "b")
    (tmp_path / "away").mkdir()
    (tmp_path / "out" / "products" / "packs").symlink_to(tmp_path / "away")
    with pytest.raises(DiffinvError, match="symbolic link"):
        Packs(tmp_path / "out").pack(paths)
    assert all(path.exists() for path in paths) and not list((tmp_path / "away").iterdir())


def test_names_lie_where_the_index_says(tmp_path: Path) -> None:
    members = {f"{k:02x}/{'n' * k}-{k:02x}.fits": bytes([k]) * (k + 1) for k in range(1, 50)}
    path = tmp_path / "p.zip"
    path.write_bytes(encode_pack(members))
    content = path.read_bytes()
    assert {p.name: content[p.start : p.start + p.size] for p in read_pack(path)} == members


# For every k, while three products are packed.
PACKER = """
import shutil, sys
from pathlib import Path
import diffinv.data.packs as packs
from tests.crashes import dies
packs.Packs.hold = lambda self, path: self.find(path) is not None
work, last = Path(sys.argv[1]), int(sys.argv[2])
for k in range(1, last):
    out = work / f"{k}"
    shutil.copytree(work / "source", out)
    print(k, dies(k, lambda: packs.Packs(out).pack(sorted(out.glob("products/*/*.fits")))))
"""


def test_a_crash_at_any_call_of_the_packer_loses_nothing_and_the_next_one_ends_what_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, names = 120, ["00/a-00ff.fits", "01/b-01ff.fits", "02/c-02ff.fits"]
    monkeypatch.setattr(Packs, "hold", lambda self, path: self.find(path) is not None)
    for name in names:
        (tmp_path / "source" / "products" / name).parent.mkdir(parents=True)
        (tmp_path / "source" / "products" / name).write_bytes(name.encode() * 100)
    last_call(PACKER, tmp_path, last, fewest=20)
    kinds = set()
    for k in range(1, last):
        out = tmp_path / f"{k}"
        own = [path for path in out.glob("products/[0-9a-f][0-9a-f]/*.fits")]
        kinds.add((len(own), len(archives(out))))
        places = find_places(out, [])
        assert sorted(place.name for place in places) == names
        payloads = [place.path.read_bytes()[place.start :][: place.size] for place in places]
        source = [(tmp_path / "source" / "products" / place.name).read_bytes() for place in places]
        assert payloads == source
        Packs(out).pack(sorted(own))
        remove_parts(out)
        assert len(archives(out)) == 1 and not list(out.rglob(".*.part")) and not list(out.glob("products/??/*.fits"))
    assert kinds == {(3, 0), (3, 1), (2, 1), (1, 1), (0, 1)}
