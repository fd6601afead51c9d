"""FITS records: what is written is read, what is damaged is refused, and grids keep the sky where it is."""

from __future__ import annotations

import gzip
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.io import fits
from astropy.wcs import WCS

from diffinv.core.checks import InputError
from diffinv.data.fits import MAX_HDUS, Plane, Table, encode_fits, read_fits, read_images, read_table
from diffinv.data.grids import SkyGrid, output_grid

TAN = {
    "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.2, "CRVAL2": 2.2, "CRPIX1": 25.5, "CRPIX2": 20.0,
    "CD1_1": -4e-5, "CD1_2": 2e-5, "CD2_1": 2e-5, "CD2_2": 4e-5,
}  # fmt: skip

LONG = (
    "17.6% of the solves met σ² > 0 and some words more, which does not fit on a single card of eighty characters; " * 2 + "end"
)


def _image(rng: np.random.Generator, shape: tuple[int, ...] = (40, 50)) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def _file(path: Path, data: np.ndarray | None = None) -> Path:
    data = _image(np.random.default_rng(0)) if data is None else data
    path.write_bytes(encode_fits([Plane("PRIMARY", None, {"A": 1}), Plane("SCI", data, {"BUNIT": "nJy"})]))
    return path


@pytest.mark.parametrize("compress", [False, True])
def test_a_broadcast_array_is_written_as_it_reads(tmp_path: Path, compress: bool) -> None:
    path = tmp_path / "a.fits"
    flat, transposed = torch.tensor(0.3).expand(32, 32).numpy(), _image(np.random.default_rng(0)).T
    planes = [Plane("VAR", flat, {}, compress=compress), Plane("SCI", transposed, {}, compress=compress)]
    path.write_bytes(encode_fits([Plane("PRIMARY", flat, {}), *planes]))
    for name, data in {"PRIMARY": flat, "VAR": flat, "SCI": transposed}.items():
        np.testing.assert_array_equal(read_fits(path).named(name)[0].data, data)


def test_planes_and_tables_come_back_as_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    columns = {"flux": rng.normal(size=3), "n": np.arange(3), "band": np.array(["g", "r", "iz"]), "q": rng.normal(size=(3, 5))}
    cube = rng.normal(size=(2, 8, 9))
    parts = [Plane("PRIMARY", None, {"OBJ": "x"}, history=("first", LONG)), Plane("SCI", cube, {"B": True}, 2)]
    path = tmp_path / "a.fits"
    path.write_bytes(encode_fits([*parts, Table("CAT", columns, {})]))
    file = read_fits(path)
    assert file.primary["OBJ"] == "x"
    assert file.planes[0].history == ("first", LONG)
    sci = file.named("SCI")[0]
    assert (sci.extver, sci.header["B"]) == (2, True)
    np.testing.assert_array_equal(sci.data, cube)
    for name, values in columns.items():
        np.testing.assert_array_equal(file.tables[0].columns[name], values)


@pytest.mark.parametrize("dtype", [">i2", ">i4", ">f4", ">f8", "u1"])
def test_arrays_are_native_endian(tmp_path: Path, dtype: str) -> None:
    data = np.arange(12).reshape(3, 4).astype(dtype)
    read = read_fits(_file(tmp_path / "a.fits", data)).named("SCI")[0].data
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, data)


def test_scaled_and_unsigned_integers_are_unscaled(tmp_path: Path) -> None:
    values = np.array([[0.5, 1.0], [2.5, -3.0]])
    scaled = fits.ImageHDU(values.copy(), name="SCI")
    scaled.scale("int16", bscale=0.5, bzero=1.0)
    unsigned = fits.ImageHDU(np.array([[0, 65535]], dtype=np.uint16), name="U")
    path = tmp_path / "a.fits"
    fits.HDUList([fits.PrimaryHDU(), scaled, unsigned]).writeto(path)
    file = read_fits(path)
    np.testing.assert_array_equal(file.named("SCI")[0].data, values)
    np.testing.assert_array_equal(file.named("U")[0].data, [[0, 65535]])


@pytest.mark.parametrize("kind", ["RICE_1", "GZIP_1", "GZIP_2"])
def test_compressed_images_are_read(tmp_path: Path, kind: str) -> None:
    data = np.random.default_rng(2).integers(-1000, 1000, (64, 64)).astype(np.int32)
    path = tmp_path / "a.fits"
    fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(data, name="SCI", compression_type=kind)]).writeto(path)
    np.testing.assert_array_equal(read_fits(path).named("SCI")[0].data, data)


def test_written_samples_are_lossless_and_their_checksum_holds(tmp_path: Path) -> None:
    data = _image(np.random.default_rng(3), (4, 32, 32))
    raw = bytearray(encode_fits([Plane("PRIMARY", None, {}), Plane("SAMPLES", data, {}, compress=True)]))
    path = tmp_path / "a.fits"
    path.write_bytes(raw)
    np.testing.assert_array_equal(read_fits(path).named("SAMPLES")[0].data, data)
    raw[len(raw) // 2 + 4000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match="checksum"):
        read_fits(path)


def test_gzip_and_links_are_followed(tmp_path: Path) -> None:
    plain = _file(tmp_path / "a.fits")
    zipped, link = tmp_path / "a.fits.gz", tmp_path / "link.fits"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    os.symlink(zipped, link)
    np.testing.assert_array_equal(read_fits(link).planes[1].data, read_fits(plain).planes[1].data)


def test_every_flipped_bit_of_a_checked_file_is_found(tmp_path: Path) -> None:
    raw = _file(tmp_path / "a.fits").read_bytes()
    rng, path = np.random.default_rng(4), tmp_path / "b.fits"
    for position in rng.integers(0, len(raw), 60):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(InputError) as caught:
            read_fits(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_data_sum_alone_is_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "a.fits"
    hdu = fits.PrimaryHDU(_image(np.random.default_rng(0)))
    hdu.add_datasum()
    hdu.writeto(path)
    raw = bytearray(path.read_bytes())
    raw[4000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match="DATASUM"):
        read_fits(path)


def test_the_checksum_is_what_finds_a_flipped_bit(tmp_path: Path) -> None:
    """Without CHECKSUM and DATASUM the same flip goes unseen: the test above tests the checksum and nothing else."""
    path = tmp_path / "a.fits"
    fits.PrimaryHDU(_image(np.random.default_rng(0))).writeto(path)
    raw = bytearray(path.read_bytes())
    raw[4000] ^= 1
    path.write_bytes(raw)
    assert read_fits(path).planes[0].data is not None


def test_every_truncation_is_found(tmp_path: Path) -> None:
    raw = _file(tmp_path / "a.fits").read_bytes()
    path = tmp_path / "b.fits"
    for length in [1, 8, 79, 80, 2000, 2879, 2881, 4000, 5759, 5760, 5761, len(raw) - 2880, len(raw) - 1]:
        path.write_bytes(raw[:length])
        with pytest.raises(InputError, match=r"truncated|not a FITS|damaged"):
            read_fits(path)


def test_random_damage_never_raises_anything_else(tmp_path: Path) -> None:
    """Files without checksums, 1 to 30 random bytes: a record or an InputError."""
    path = tmp_path / "a.fits"
    hdus = [
        fits.PrimaryHDU(),
        fits.ImageHDU(_image(np.random.default_rng(0))),
        fits.CompImageHDU(np.arange(400, dtype=np.int32).reshape(20, 20)),
    ]
    fits.HDUList(hdus).writeto(path)
    raw, rng, refused = path.read_bytes(), np.random.default_rng(5), 0
    for _ in range(80):
        damaged = bytearray(raw)
        for position in rng.integers(0, len(raw), int(rng.integers(1, 30))):
            damaged[position] = int(rng.integers(256))
        path.write_bytes(damaged)
        try:
            read_fits(path, max_pixels=10**6)
        except InputError:
            refused += 1
    assert refused > 10


def _claim(path: Path, **cards: int) -> Path:
    """A primary header that claims more than there is."""
    header = fits.PrimaryHDU(np.zeros((2, 2), dtype=np.float32)).header
    for key, value in cards.items():
        header[key] = value
    path.write_bytes(header.tostring().encode() + bytes(2880))
    return path


def test_a_header_bomb_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_pixels"):
        read_fits(_claim(tmp_path / "a.fits", NAXIS1=10**6, NAXIS2=10**6))
    with pytest.raises(InputError, match="impossible"):
        read_fits(_claim(tmp_path / "b.fits", NAXIS1=-3, NAXIS2=-3))
    with pytest.raises(InputError, match="truncated"):
        read_fits(_claim(tmp_path / "c.fits", NAXIS1=1000, NAXIS2=1000))


def test_a_compressed_pixel_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.fits"
    zeros = fits.CompImageHDU(np.zeros((2000, 2000), dtype=np.int16), name="SCI", compression_type="GZIP_1")
    fits.HDUList([fits.PrimaryHDU(), zeros]).writeto(path)
    assert path.stat().st_size < 200_000
    with pytest.raises(InputError, match="max_pixels"):
        read_fits(path, max_pixels=10**6)


def test_a_gzip_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.fits.gz"
    path.write_bytes(gzip.compress(bytes(30_000_000), 9))
    with pytest.raises(InputError, match="gzip bomb"):
        read_fits(path, max_pixels=10**6)


def test_too_many_hdus_are_refused(tmp_path: Path) -> None:
    path, block = tmp_path / "a.fits", fits.ImageHDU().header.tostring().encode()
    path.write_bytes(fits.PrimaryHDU().header.tostring().encode() + block * (MAX_HDUS + 1))
    with pytest.raises(InputError, match="HDUs"):
        read_fits(path)


def test_warnings_become_notes(tmp_path: Path) -> None:
    path = tmp_path / "a.fits"
    raw = fits.PrimaryHDU(_image(np.random.default_rng(0))).header.tostring()
    bad = raw.replace("END" + " " * 77, "FOO = 'never closed" + " " * 61 + "END" + " " * 77, 1)[:2880]
    path.write_bytes(bad.encode() + _image(np.random.default_rng(0)).astype(">f4").tobytes().ljust(8640, b"\0"))
    assert read_fits(path).planes[0].data.shape == (40, 50)


def test_rescaled_grids_agree_on_the_sky() -> None:
    grid = SkyGrid.from_header(TAN, (40, 50))
    fine = grid.rescaled(1.68, (68, 84))
    affine = fine.affine_to(grid)
    np.testing.assert_allclose(affine.matrix, np.eye(2) / 1.68, atol=1e-9)
    np.testing.assert_allclose(affine.offset, [0.5 / 1.68 - 0.5] * 2, atol=1e-7)
    assert fine.pixel_scale == pytest.approx(grid.pixel_scale / 1.68, rel=1e-12)


SIP = {**TAN, "CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "B_ORDER": 2, "A_2_0": 1e-5, "B_1_1": -2e-5}
TPV = {**TAN, "CTYPE1": "RA---TPV", "CTYPE2": "DEC--TPV", "PV1_0": 0.0036, "PV1_1": 0.998, "PV1_2": 0.001, "PV1_4": -0.0119}
TPV |= {"PV2_0": 0.01, "PV2_1": 1.004, "PV2_2": -0.002, "PV2_4": 0.02}


@pytest.mark.parametrize("header", [SIP, TPV], ids=["SIP", "TPV"])
def test_the_output_of_a_distorted_field_is_a_tangent_plane_on_the_same_sky(header: dict) -> None:
    grid = SkyGrid.from_header(header, (40, 50))
    fine = output_grid(grid, grid.undistorted().pixel_scale / 2)
    assert grid.distorted and not fine.distorted and fine.cards["CTYPE1"] == "RA---TAN" and fine.shape == (80, 100)
    for row, column in [(0.0, 0.0), (39.0, 3.0), (12.3, 47.0)]:
        there = fine.world_to_pixel(*grid.pixel_to_world(row, column))
        np.testing.assert_allclose(there, [(row + 0.5) * 2 - 0.5, (column + 0.5) * 2 - 0.5], atol=0.06)
    cards = fine.image_cards(("BAND",))
    again = SkyGrid.from_header(cards, fine.shape)
    np.testing.assert_allclose(again.pixel_to_world(3.0, 4.0), fine.pixel_to_world(3.0, 4.0), rtol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert WCS(fits.Header(cards)).naxis == 3  # as anybody opens it
    with pytest.raises(InputError, match="distortion"):
        grid.rescaled(2.0, (80, 100))


def test_a_field_that_bends_or_is_stretched_is_refused() -> None:
    stretched = SkyGrid.from_header({**TPV, "PV1_1": 0.97}, (40, 50))
    with pytest.raises(InputError, match="not square"):
        output_grid(stretched, stretched.pixel_scale)
    bent = SkyGrid.from_header({**SIP, "A_2_0": 1e-3}, (40, 50))
    with pytest.raises(InputError, match="bends"):
        output_grid(bent, bent.pixel_scale)
    with pytest.raises(InputError, match="bends"):
        SkyGrid.from_header({**SIP, "A_2_0": 1e-4}, (40, 50)).affine_to(SkyGrid.from_header(TAN, (40, 50)), tolerance=0.01)


def test_a_cube_with_sip_is_read_by_its_first_two_axes() -> None:
    cube = {**SIP, "WCSAXES": 3, "CTYPE3": "BAND", "CRPIX3": 1.0, "CRVAL3": 1.0, "CDELT3": 1.0}
    flat, deep = (SkyGrid.from_header(header, (40, 50)).pixel_to_world(3.0, 40.0) for header in (SIP, cube))
    np.testing.assert_allclose(deep, flat, rtol=1e-12)


def test_padding_moves_pixels_and_not_the_sky() -> None:
    grid = SkyGrid.from_header(TAN, (40, 50))
    affine = grid.padded(7).affine_to(grid)
    np.testing.assert_allclose(affine.offset, [-7, -7], atol=1e-7)
    assert grid.padded(7).padded(-7).shape == grid.shape


def test_equinox_frames_are_told_apart() -> None:
    """FK5 J1975 precesses by about 20 arcmin from ICRS: a grid that ignored the frame would be far off."""
    old = SkyGrid.from_header({**TAN, "RADESYS": "FK5", "EQUINOX": 1975.0}, (40, 50))
    new = SkyGrid.from_header({**TAN, "RADESYS": "ICRS"}, (40, 50))
    difference = np.subtract(old.pixel_to_world(20.0, 20.0), new.pixel_to_world(20.0, 20.0))
    assert 0.2 < abs(difference[0]) < 0.5


def test_output_grid_covers_the_footprint_from_its_edge() -> None:
    grid = SkyGrid.linear((50, 58), 0.168)
    fine = output_grid(grid, 0.1)
    assert fine.shape == (84, 98)
    assert fine.pixel_scale == pytest.approx(0.1)
    x, y = grid.pixel_to_world(-0.5, -0.5)
    np.testing.assert_allclose(fine.pixel_to_world(-0.5, -0.5), (x, y), atol=1e-12)


@pytest.mark.parametrize(
    ("header", "scale", "message"),
    [
        ({}, None, "PIXSCALE"),
        ({"PIXSCALE": -0.2}, None, "> 0"),
        (TAN, 0.5, "mismatch"),
        ({**TAN, "CD1_1": -8e-5}, None, "not square"),
        ({**TAN, "CD1_1": 0.0, "CD1_2": 0.0}, None, "WCS"),
        ({**TAN, "CPDIS1": "LOOKUP"}, None, "distortion"),
    ],
)
def test_unusable_grids_are_refused(header: dict, scale: float | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SkyGrid.from_header(header, (40, 50), pixel_scale=scale)


def _table_file(path: Path) -> Path:
    columns = {"flux": np.array([1.5, 2.5, 3.5]), "n": np.arange(3, dtype=np.int32), "q": np.arange(6.0).reshape(3, 2)}
    image = Plane("SCI", _image(np.random.default_rng(0)), {})
    path.write_bytes(encode_fits([Plane("PRIMARY", None, {}), image, Table("CAT", columns, {})]))
    return path


def test_tables_and_images_of_their_own_are_read_through_the_checks(tmp_path: Path) -> None:
    path = _table_file(tmp_path / "a.fits")
    table = read_table(path, 2)
    assert table.dtype.names == ("flux", "n", "q")
    assert all(table.dtype[name].isnative for name in table.dtype.names)
    np.testing.assert_array_equal(table["q"], np.arange(6.0).reshape(3, 2))
    np.testing.assert_array_equal(table["flux"], [1.5, 2.5, 3.5])
    assert [image.shape for image in read_images(path)] == [(40, 50)]
    assert [(p.name, p.hdu) for p in read_fits(path).planes] == [("PRIMARY", 0), ("SCI", 1)]
    assert read_fits(path).tables[0].hdu == 2


@pytest.mark.parametrize("read", [read_table, read_images])
@pytest.mark.parametrize("fault", ["missing", "truncated", "flipped", "text", "empty HDUs"])
def test_a_damaged_table_or_image_file_is_one_line_that_names_it(tmp_path: Path, read: object, fault: str) -> None:
    path = _table_file(tmp_path / "a.fits")
    raw = path.read_bytes()
    flipped = bytearray(raw)
    flipped[9000] ^= 16
    made = {
        "truncated": raw[:9000],
        "flipped": bytes(flipped),
        "text": b"no",
        "empty HDUs": encode_fits([Plane("PRIMARY", None, {})]),
    }
    path.unlink() if fault == "missing" else path.write_bytes(made[fault])
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_number_that_is_no_table_is_refused_with_those_there_are(tmp_path: Path) -> None:
    for number in (0, 1, 3):
        with pytest.raises(InputError, match=rf"a\.fits: HDU {number} is no table with columns; the file's tables are: 2 CAT"):
            read_table(_table_file(tmp_path / "a.fits"), number)
