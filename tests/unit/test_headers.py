"""Headers read without images say the same as the whole file, and damage is one line that names the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffinv.core.checks import InputError
from diffinv.data.fits import Plane, Table, encode_fits, read_fits
from diffinv.data.headers import read_columns, read_headers

COLUMNS = {
    "band": np.array(["g", "i z"]),
    "flux": np.array([1.5, np.nan]),
    "count": np.array([1, -2], np.int32),
    "axes": np.arange(6.0).reshape(2, 3),
}


def write(path: Path) -> Path:
    cards = {"OBJID": "it's " + "%20long" * 40, "SCALE": 1.5e-7, "GOOD": True, "NUMBER": -3, "EMPTY": ""}
    noise = np.random.default_rng(0).standard_normal((3, 40, 50)).astype(np.float32)
    parts = [Plane("PRIMARY", None, cards, history=("a note",)), Plane("SAMPLES", noise, {"BAND": "i"}, compress=True)]
    path.write_bytes(encode_fits([*parts, Plane("SCI", noise, {}), Table("CATALOG", COLUMNS, {})]))
    return path


def test_cards_and_columns_are_those_of_the_whole_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fits")
    whole, headers = read_fits(path), read_headers(path)
    assert [header.name for header in headers] == ["", "SAMPLES", "SCI", "CATALOG"]
    for name, value in whole.primary.items():
        assert headers[0].cards[name] == value
    assert headers[-1].end == path.stat().st_size
    found = read_columns(path, headers[-1])
    assert list(found) == list(COLUMNS)
    for name, column in COLUMNS.items():
        assert found[name].dtype.isnative
        np.testing.assert_array_equal(found[name], column)


@pytest.mark.parametrize("length", [0, 1, 2879, 4000, -1, -2880])
def test_a_file_of_another_length_than_its_headers_say_is_damaged(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "a.fits")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match="a.fits: "):
        read_headers(path)


def test_strangers_additions_and_flipped_bits_are_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fits")
    whole = path.read_bytes()
    header = read_headers(path)[-1]
    path.write_bytes(whole[: header.start] + bytes([whole[header.start] ^ 1]) + whole[header.start + 1 :])
    with pytest.raises(InputError, match="a.fits: CATALOG fails its checksum"):
        read_columns(path, header)
    for content in (
        whole + b"more",
        b"<html>" + whole,
        whole.replace(b"NAXIS1", b"NAXIS9"),
        whole.replace(b"BITPIX", b"BITP\xff "),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match="a.fits: "):
            read_headers(path)
    with pytest.raises(InputError, match="none: cannot be read"):
        read_headers(tmp_path / "none")
