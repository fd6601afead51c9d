"""Observations from every layout: pixels, masks, noise, names and units land where they belong, and what is assumed is noted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffinv.core.checks import InputError
from diffinv.data.fits import Plane, encode_fits
from diffinv.data.layouts import InputOptions
from diffinv.data.observation import Band, check_bands, read_observation, sky_statistics
from tests.bands import CARDS, PSF, SHAPE, checked_band, raw_band, source


def _write(path: Path, *planes: Plane) -> Path:
    path.write_bytes(encode_fits([Plane("PRIMARY", None, {}), *planes]))
    return path


def _says(band: Band, text: str) -> bool:
    return any(text in note for note in band.notes)


def test_an_observation_file_is_read_by_extver(tmp_path: Path) -> None:
    planes = []
    for version, name in ((2, "r"), (1, "g")):
        planes += [
            Plane("SCI", source(version), {**CARDS, "BAND": name, "INSTRUME": "CAM", "ZEROPNT": 27.0}, version),
            Plane("VAR", np.full(SHAPE, float(version)), {}, version),
            Plane("DQ", (np.arange(SHAPE[1]) == version).astype(np.int32)[None].repeat(SHAPE[0], 0), {}, version),
            Plane("PSF", PSF, {"PSFNORM": 0.98, "OVERSAMP": 1}, version),
        ]
    observation = read_observation(_write(tmp_path / "galaxy.fits", *planes), InputOptions())
    assert (observation.object_id, [b.name for b in observation.bands]) == ("galaxy", ["g", "r"])
    for version, band in enumerate(observation.bands, start=1):
        np.testing.assert_array_equal(band.image, source(version))
        assert np.all(band.variance == version)
        assert not band.good[:, version].any()
        assert band.good.sum() == SHAPE[0] * (SHAPE[1] - 1)
        assert (band.unit, band.instrument, band.zeropoint) == ("nJy", "CAM", 27.0)
        assert band.psf.stamp.sum() == pytest.approx(0.98)
        assert not band.noise_estimated


def test_errors_are_squared_and_jwst_flags_are_its_own(tmp_path: Path) -> None:
    flags = np.zeros(SHAPE, dtype=np.int32)
    flags[0, 0], flags[1, 1] = 4, 1
    planes = [
        Plane("SCI", source(), {**CARDS, "TELESCOP": "JWST"}),
        Plane("ERR", np.full(SHAPE, 3.0), {}),
        Plane("DQ", flags, {}),
    ]
    path = _write(tmp_path / "a.fits", *planes, Plane("PSF", PSF, {}))
    band = read_observation(path, InputOptions()).bands[0]
    assert np.all(band.variance == 9)
    assert band.good[0, 0]
    assert not band.good[1, 1]
    strict = read_observation(path, InputOptions(dq_bits=4)).bands[0]
    assert not strict.good[0, 0]
    assert strict.good[1, 1]


def _lsst(path: Path) -> Path:
    planes = {"MP_BAD": 0, "MP_SAT": 1, "MP_DETECTED": 5, "MP_NO_DATA": 8, "MP_SUSPECT": 7}
    mask = np.zeros(SHAPE, dtype=np.int32)
    mask[0, :5] = [1 << 0, 1 << 1, 1 << 5, 1 << 8, 1 << 7]
    return _write(
        path,
        Plane("IMAGE", source(), {**CARDS, "FILTER": "HSC-I", "BAND": ""}),
        Plane("MASK", mask, planes),
        Plane("VARIANCE", np.ones(SHAPE), {}),
    )


def test_mask_planes_are_named_and_detected_is_not_bad(tmp_path: Path) -> None:
    psf = _write(tmp_path / "psf.fits", Plane("PSF", PSF, {}))
    path = _lsst(tmp_path / "a.fits")
    band = read_observation(path, InputOptions(psf=(psf,))).bands[0]
    assert band.name == "HSC-I"
    assert band.good[0, :5].tolist() == [False, False, True, False, True]
    assert band.saturated.sum() == 1
    band = read_observation(path, InputOptions(psf=(psf,), mask_planes=("SUSPECT",))).bands[0]
    assert band.good[0, :5].tolist() == [True, False, True, True, False]
    with pytest.raises(InputError, match=r"CR is unknown; the file has BAD, DETECTED"):
        read_observation(path, InputOptions(psf=(psf,), mask_planes=("CR",)))


def test_a_plain_cube_takes_the_rest_from_the_options(tmp_path: Path) -> None:
    path, psf = tmp_path / "a.fits", _write(tmp_path / "psf.fits", Plane("X", np.stack([PSF, PSF]), {}))
    path.write_bytes(encode_fits([Plane("PRIMARY", np.stack([source(0), source(1)]), {})]))
    variance = _write(tmp_path / "var.fits", Plane("X", np.stack([np.ones(SHAPE), np.full(SHAPE, 2.0)]), {}))
    options = InputOptions(
        psf=(psf,), psf_norm=0.97, variance=variance, bands=("g", "r"), unit="adu", pixel_scale=0.2, zeropoint=25.0
    )
    bands = read_observation(path, options).bands
    assert [(b.name, b.unit, b.zeropoint, b.variance[0, 0]) for b in bands] == [("g", "adu", 25.0, 1.0), ("r", "adu", 25.0, 2.0)]
    assert bands[0].psf.norm == 0.97
    bands = read_observation(path, replace(options, variance=None, noise_std=(0.5, 2.0), bands=None, unit=None)).bands
    assert [(b.name, b.variance[0, 0]) for b in bands] == [("1", 0.25), ("2", 4.0)]
    assert _says(bands[0], "numbered")
    assert _says(bands[0], "no BUNIT")


SURFACE_BRIGHTNESS = (
    "MJy/sr", "MJy sr-1", "MJy.sr**(-1)", "nJy/arcsec2", "nJy/arcsec^2", "nJy arcsec-2", "mag/arcsec**2", "erg/s/cm2/sqarcsec",
    "ct/s/deg2", "ct/square degree", "uJy/mas^2", "Jy/beam", "Jy as-2", "Jy/arcmin2", "Jy/rad2", "W m-2 steradian-1", "Jy/SR",
)  # fmt: skip


@pytest.mark.parametrize("unit", SURFACE_BRIGHTNESS)
def test_surface_brightness_is_refused_with_the_remedy(unit: str) -> None:
    message = r"^band i: the unit .* is a surface brightness, not flux per pixel; multiply the image by the pixel area"
    with pytest.raises(InputError, match=message) as caught:
        checked_band(header={**CARDS, "BUNIT": unit})
    assert f"unit {unit} is" in str(caught.value)
    with pytest.raises(InputError, match=message):
        check_bands([raw_band(header={"PIXSCALE": 0.2})], InputOptions(unit=unit))


@pytest.mark.parametrize(
    "unit", ["nJy", "MJy", "adu", "ELECTRONS/S", "counts/s", "DN", "nanomaggies", "Jy/pix", "erg/s/cm2/Angstrom"]
)
def test_flux_per_pixel_is_taken(unit: str) -> None:
    assert checked_band(header={**CARDS, "BUNIT": unit}).unit == unit


def test_a_zero_point_that_contradicts_the_header_is_refused() -> None:
    raw = raw_band(header={**CARDS, "ZEROPNT": 27.0})
    with pytest.raises(InputError, match="zero point mismatch: ZEROPNT is 27 but input.zeropoint says 25.5"):
        check_bands([raw], InputOptions(zeropoint=25.5))
    assert check_bands([raw], InputOptions(zeropoint=27.0))[0].zeropoint == 27.0
    assert check_bands([raw_band()], InputOptions(zeropoint=25.5))[0].zeropoint == 25.5
    with pytest.raises(InputError, match="ZEROPNT is '27 mag'"):
        checked_band(header={**CARDS, "ZEROPNT": "27 mag"})


def test_bad_pixels_keep_their_value_and_lose_their_weight() -> None:
    image, variance = source(), np.ones(SHAPE)
    image[0, :2], variance[1, :4] = [np.nan, np.inf], [0.0, -1.0, np.nan, np.inf]
    band = checked_band(image=image, variance=variance)
    assert np.isnan(band.image[0, 0])
    assert not band.good[0, :2].any()
    assert not band.good[1, :4].any()
    assert band.good.sum() == band.good.size - 6
    assert _says(band, "6 bad pixels")


def test_saturated_pixels_are_flagged_by_level_and_by_plateau() -> None:
    image = source()
    image[10:13, 10:13] = 500.0
    assert checked_band(image=image).saturated.sum() == 9
    image[10:13, 10:13] += np.arange(9).reshape(3, 3)
    assert not checked_band(image=image).saturated.any()
    band = checked_band(image=image, header={**CARDS, "SATURATE": 504.0})
    assert band.saturated.sum() == 5
    assert not (band.good & band.saturated).any()


def test_a_level_that_may_be_of_another_unit_is_used_and_said() -> None:
    image = source()
    image[10, 10] = 500.0
    for unit, said in (("nJy", True), ("electrons", False), ("ADU", False), ("", False)):
        band = checked_band(image=image, header={**CARDS, "BUNIT": unit, "SATURATE": 400.0})
        assert band.saturated.sum() == 1
        assert _says(band, "1 pixels are above SATURATE = 400, taken to be in nJy") == said


def test_zeros_that_were_hardly_measured_are_said() -> None:
    image = source()
    assert not _says(checked_band(image=image), "exactly 0")
    image[:4] = 0
    assert _says(checked_band(image=image), f"{4 * SHAPE[1]} pixels are exactly 0 and are read as data")
    assert not _says(checked_band(image=np.random.default_rng(0).poisson(0.5, SHAPE).astype(float)), "exactly 0")  # counts


def test_light_at_the_edge_is_said() -> None:
    rows, columns = np.indices(SHAPE)
    radius = np.hypot(rows - SHAPE[0] / 2, columns - SHAPE[1] / 2)
    for size, said in ((2.0, False), (20.0, True)):
        image = 50 * np.exp(-radius / size) + np.random.default_rng(1).normal(size=SHAPE)
        frame = np.ones(SHAPE)
        frame[2:-2, 2:-2] = 0
        for unseen in (np.zeros(SHAPE, dtype=bool), frame > 0):  # behind a frame of bad pixels as well
            band = checked_band(image=np.where(unseen, np.nan, image), variance=np.ones(SHAPE))
            assert _says(band, "light reaches the edge of the image") == said
    assert not _says(checked_band(image=np.random.default_rng(1).normal(size=SHAPE)), "edge")


def test_the_sky_noise_is_seen_through_sources() -> None:
    """σ within 12 % and the level within .35 σ with sources over 15 % of the field; the plain std is off by more than tenfold."""
    rng = np.random.default_rng(3)
    for _ in range(5):
        image = rng.normal(7.0, 2.0, (64, 64))
        distance = np.hypot(*np.meshgrid(np.arange(64) - 32, np.arange(64) - 30))
        image += 400 * np.exp(-distance / 3)
        level, sigma = sky_statistics(image.ravel())
        assert abs(sigma / 2 - 1) < 0.12
        assert abs(level - 7) < 0.7
        assert image.std() > 20


def test_an_estimated_noise_is_noted_and_the_sky_is_not_subtracted() -> None:
    band = checked_band(variance=None, image=source() + 5)
    assert band.noise_estimated
    assert _says(band, "noise estimated from the sky")
    assert _says(band, "not subtracted")
    assert band.variance[0, 0] == pytest.approx(1, rel=0.3)
    np.testing.assert_array_equal(band.image, source() + 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.where(np.arange(SHAPE[1]) < 20, np.nan, source())}, "56% of the pixels are bad"),
        ({"image": np.full(SHAPE, 3.0)}, "constant"),
        ({"image": np.full(SHAPE, 3.0), "variance": None}, "constant"),
        ({"image": np.full(SHAPE, np.nan), "variance": None}, "100% of the pixels are bad"),
        ({"variance": np.zeros(SHAPE)}, "100% of the pixels are bad"),
        ({"variance": -np.ones(SHAPE)}, "bad"),
        ({"variance": np.ones((3, 3))}, "variance is"),
        ({"bad": np.ones(SHAPE, dtype=bool)}, "bad"),
        ({"header": {**CARDS, "SATURATE": 1e-9}, "image": np.abs(source())}, "bad"),
        ({"psf": None}, "input.psf=FILE"),
        ({"psf_header": {"PSFKIND": "airy"}}, "effective"),
        ({"psf_header": {"PSFNORM": "x"}}, "numbers"),
        ({"psf_header": {"OVERSAMP": 0.1}}, "half of the image"),
        ({"header": {"BUNIT": "nJy"}}, "PIXSCALE"),
        ({"correlation": np.ones((4, 4))}, "NOISECOR"),
    ],
)
def test_unusable_bands_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        checked_band(**changes)
    assert str(caught.value).startswith("band i: ")


@pytest.mark.parametrize(
    ("second", "options", "message"),
    [
        ({"header": {**CARDS, "BUNIT": "adu"}}, InputOptions(), "band i is in nJy but band r in adu"),
        ({"header": {"PIXSCALE": 0.2}}, InputOptions(), "band i is in nJy but band r in no unit"),
        ({}, InputOptions(unit="Jy"), "BUNIT is nJy but input.unit says Jy"),
        ({"name": "i", "header": {**CARDS, "ZEROPNT": 27.0}}, InputOptions(), "have None and 27.0"),
    ],
)
def test_bands_that_disagree_are_both_named(second: dict, options: InputOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_bands([raw_band(), raw_band(**{"name": "r", **second})], options)


def test_one_object_collects_exposures_by_band(tmp_path: Path) -> None:
    planes = [
        p
        for k, n in ((1, "g"), (2, "r"), (3, "g"))
        for p in (Plane("SCI", source(k), {**CARDS, "BAND": n}, k), Plane("PSF", PSF, {}, k))
    ]
    exposures = read_observation(_write(tmp_path / "a.fits", *planes), InputOptions()).exposures()
    assert {name: len(bands) for name, bands in exposures.items()} == {"g": 2, "r": 1}
