"""Cubes of every kind become one record: axes in their units, bad values masked, damage named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from scipy import io as scipy_io

from diffinv.core.checks import InputError
from diffinv.data.cubes import Cube, encode_cube, masked_cube, read_array_cube, read_cube
from diffinv.data.fits import Plane, Table, encode_fits

SHAPE = (6, 3, 4)
AXIS = {"CTYPE3": "AWAV", "CUNIT3": "Angstrom", "CRPIX3": 1.0, "CRVAL3": 5000.0, "CD3_3": 1.25}


def write(path: Path, *parts: Plane | Table) -> Path:
    path.write_bytes(encode_fits([Plane("PRIMARY", None, {}), *parts]))
    return path


def flux(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 0.3, SHAPE).astype(np.float32)


def test_data_and_stat_with_their_bad_values(tmp_path: Path) -> None:
    data, stat, flags = flux(), np.ones(SHAPE, np.float32), np.zeros(SHAPE, np.uint8)
    data[:, 1, 2], stat[0, 0, 0], stat[1, 0, 0], stat[2, 0, 0], flags[3, 0, 0] = np.nan, np.inf, 0.0, -1.0, 4
    parts = [Plane("DATA", data, AXIS | {"BUNIT": "1e-20 erg"}), Plane("STAT", stat, {}), Plane("DQ", flags, {})]
    cube = read_cube(write(tmp_path / "a.fits", *parts))
    assert (cube.unit, cube.axis, cube.bunit, cube.exposure) == ("Angstrom", "AWAV", "1e-20 erg", None)
    np.testing.assert_allclose(cube.centre, 5000.0 + 1.25 * np.arange(6), rtol=1e-12)
    assert cube.empty.sum() == 1
    assert cube.empty[1, 2]
    assert (~cube.mask).sum() == 6 + 4
    assert np.isfinite(cube.data).all()
    np.testing.assert_array_equal(cube.data[cube.mask], data[cube.mask])


def test_errors_are_squared_and_a_plain_image_is_a_cube(tmp_path: Path) -> None:
    data = flux()
    cube = read_cube(write(tmp_path / "a.fits", Plane("SCI", data, AXIS), Plane("ERR", np.full(SHAPE, 3.0), {})))
    np.testing.assert_array_equal(cube.variance, np.full(SHAPE, 9.0))
    path = tmp_path / "b.fits"
    path.write_bytes(encode_fits([Plane("PRIMARY", data, {})]))
    plain = read_cube(path)
    assert plain.unit == "band"
    assert plain.variance is None
    assert plain.low.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]  # numbers of bands from 1, ± 1/2


@pytest.mark.parametrize(
    ("unit", "scale", "own"),
    [("nm", 10.0, "Angstrom"), ("um", 1e4, "Angstrom"), ("m", 1e10, "Angstrom"), ("eV", 1e-3, "keV"), ("keV", 1.0, "keV")],
)
def test_units_of_the_axis_are_brought_to_two(tmp_path: Path, unit: str, scale: float, own: str) -> None:
    header = {"CTYPE3": "WAVE", "CUNIT3": unit, "CRPIX3": 2.0, "CRVAL3": 50.0, "CDELT3": 4.0, "PC3_3": 0.5}
    cube = read_cube(write(tmp_path / "a.fits", Plane("DATA", flux(), header)))
    assert cube.unit == own
    np.testing.assert_allclose(cube.centre, (50.0 + 2.0 * (np.arange(6) - 1)) * scale, rtol=1e-12)
    np.testing.assert_allclose(cube.grid().edges, (50.0 + 2.0 * (np.arange(7) - 1.5)) * scale, rtol=1e-12)


def test_falling_axes_are_turned_with_their_data(tmp_path: Path) -> None:
    data, stat, header = flux(), np.abs(flux(1)), AXIS | {"CD3_3": -1.25}
    stat[0, 0, 0] = 0
    cube = read_cube(write(tmp_path / "a.fits", Plane("DATA", data, header), Plane("STAT", stat, {})))
    np.testing.assert_allclose(cube.centre, 5000.0 - 1.25 * np.arange(6)[::-1])
    np.testing.assert_array_equal(cube.data[cube.mask], data[::-1][cube.mask])
    assert not cube.mask[5, 0, 0]
    assert cube.variance[0, 1, 1] == stat[5, 1, 1]


def test_logarithmic_axes_are_those_of_the_standard(tmp_path: Path) -> None:
    header = AXIS | {"CTYPE3": "WAVE-LOG"}
    cube = read_cube(write(tmp_path / "a.fits", Plane("DATA", flux(), header)))
    wcs = WCS(
        fits.Header({"WCSAXES": 1, "CTYPE1": "WAVE-LOG", "CUNIT1": "Angstrom", "CRPIX1": 1.0, "CRVAL1": 5e3, "CDELT1": 1.25})
    )
    edges = wcs.wcs_pix2world(np.arange(7) - 0.5, 0)[0] * 1e10
    np.testing.assert_allclose(cube.low, edges[:-1], rtol=1e-10)
    np.testing.assert_allclose(cube.high, edges[1:], rtol=1e-10)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    def message(*parts: Plane) -> str:
        with pytest.raises(InputError) as caught:
            read_cube(write(tmp_path / "a.fits", *parts))
        return str(caught.value)

    assert "a.fits: needs one image of three axes" in message(Plane("SCI", np.ones((3, 4)), {}))
    assert "a.fits: STAT is (6, 3, 3), but the data are (6, 3, 4)" in message(
        Plane("DATA", flux(), AXIS), Plane("STAT", np.ones((6, 3, 3)), {})
    )
    assert "a.fits: CUNIT3 is 'furlong'" in message(Plane("DATA", flux(), AXIS | {"CUNIT3": "furlong"}))
    assert "mixed with the celestial ones" in message(Plane("DATA", flux(), AXIS | {"CD3_1": 0.1}))
    assert "step of the spectral axis is 0" in message(Plane("DATA", flux(), AXIS | {"CD3_3": 0.0}))


def test_counts_are_whole_or_refused() -> None:
    low = np.arange(6.0)

    def cube(data: np.ndarray) -> Cube:
        return masked_cube(data, None, np.ones(SHAPE, bool), low, low + 1, "keV", bunit="count")

    counts = np.random.default_rng(0).poisson(3.0, SHAPE).astype(float)
    np.testing.assert_array_equal(cube(counts).counts(), counts)
    counts[2, 1, 1] = np.nan
    assert cube(counts).counts()[2, 1, 1] == 0
    for value in (-2.0, 0.5):
        counts[4, 0, 3] = value
        with pytest.raises(InputError, match=rf"cube \(count\): 1 values are no counts, the first is {value:g} at \(4, 0, 3\)"):
            cube(counts).counts()
    with pytest.raises(InputError, match="no grid: there is a gap after channel 0"):
        masked_cube(counts, None, np.ones(SHAPE, bool), low + 1, low + 1.5, "keV").grid()
    with pytest.raises(InputError, match="must grow"):
        masked_cube(counts, None, np.ones(SHAPE, bool), -low, 1 - low, "keV")
    with pytest.raises(InputError, match="holds nothing"):
        masked_cube(counts[:, :, :0], None, np.ones((*SHAPE[:2], 0), bool), low, low + 1, "keV")
    with pytest.raises(InputError, match="needs data"):
        masked_cube(counts, None, np.ones(SHAPE, bool), low[1:], low[1:] + 1, "keV")


def test_a_written_cube_comes_back_exactly(tmp_path: Path) -> None:
    low = np.array([0.5, 0.7, 1.0, 1.6, 2.0, 2.1])
    mask = np.ones(SHAPE, bool)
    mask[2, 1] = False
    wcs = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 30.0, "CRVAL2": 5.0, "CRPIX1": 2.0, "CRPIX2": 1.5}
    wcs |= {"CDELT1": -1e-4, "CDELT2": 1e-4, "CUNIT1": "deg", "CUNIT2": "deg"}
    for variance in (None, np.abs(flux(2)).astype(float)):
        cube = masked_cube(flux().astype(float), variance, mask, low, low + 0.1, "keV", bunit="count", wcs=wcs, exposure=12.5)
        path = tmp_path / "a.fits"
        path.write_bytes(encode_cube(cube))
        back = read_cube(path)
        for name in ("data", "mask", "low", "high"):
            np.testing.assert_array_equal(getattr(back, name), getattr(cube, name))
        assert (back.unit, back.bunit, back.exposure) == ("keV", "count", 12.5)
        assert {k: back.wcs[k] for k in wcs} == wcs
        assert (back.variance is None) == (variance is None)


def test_scenes_in_arrays(tmp_path: Path) -> None:
    scene = np.random.default_rng(0).uniform(size=(3, 4, 6))
    scipy_io.savemat(tmp_path / "a.mat", {"Y": scene, "wavelength": np.arange(6.0)})
    np.savez(tmp_path / "b.npz", first=scene, second=scene.transpose(2, 0, 1))
    cube = read_array_cube(tmp_path / "a.mat")
    np.testing.assert_array_equal(cube.data, scene.transpose(2, 0, 1))
    assert cube.unit == "band"
    np.testing.assert_array_equal(read_array_cube(tmp_path / "b.npz", "second", bands_axis=0).data, cube.data)
    with pytest.raises(InputError, match=r"b.npz: needs the name .* first \(3, 4, 6\), second \(6, 3, 4\)"):
        read_array_cube(tmp_path / "b.npz")
    for name in ("c.mat", "c.npz"):
        (tmp_path / name).write_bytes(b"nothing of the kind" * 20)
        with pytest.raises(InputError, match=f"{name}: cannot be read"):
            read_array_cube(tmp_path / name)


def test_real_muse_cubes_keep_wavelength_variance_and_sky(data_folder: Path) -> None:
    folder = data_folder / "hyperspectral" / "muse"
    for name, shape, first, axis in (
        ("CUBE.fits", (1595, 10, 20), 7300.0, "LINEAR"),
        ("subcub_mosaic.fits", (500, 30, 30), 4750.0, "AWAV"),
    ):
        cube = read_cube(folder / name)
        assert cube.data.shape == shape
        assert cube.axis == axis
        np.testing.assert_allclose(cube.centre, first + 1.25 * np.arange(shape[0]), rtol=1e-12)
        with fits.open(folder / name) as file:
            np.testing.assert_array_equal(cube.data, file["DATA"].data)
            np.testing.assert_array_equal(cube.variance, file["STAT"].data)
            sky = WCS(file["DATA"].header).celestial
        ours = WCS(fits.Header(dict(cube.wcs)))
        np.testing.assert_allclose(ours.wcs_pix2world(3, 5, 0), sky.wcs_pix2world(3, 5, 0), rtol=0, atol=1e-9)


def test_real_samson_scene(data_folder: Path) -> None:
    cube = read_array_cube(data_folder / "hyperspectral" / "samson" / "Y_clean.mat")
    assert cube.data.shape == (156, 95, 95)
    assert 0 <= cube.data.min() <= cube.data.max() <= 1
