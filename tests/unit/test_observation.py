"""Observations from every layout: pixels, masks, noise, names and units land where they belong, and what is assumed is noted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffinv.core.checks import InputError
from diffinv.data.fits import Plane, encode_fits, read_fits
from diffinv.data.forward import build_field, estimate_scale
from diffinv.data.grids import SkyGrid
from diffinv.data.layouts import InputOptions, RawBand
from diffinv.data.observation import Band, check_bands, read_observation, sky_statistics
from diffinv.data.psf import gaussian_stamp
from diffinv.operators.geometry import SeparableResample

SHAPE = (32, 36)
PSF = gaussian_stamp(3.5, 25)
CARDS = {"BUNIT": "nJy", "PIXSCALE": 0.2, "BAND": "i"}


def _image(seed: int = 0, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    image = np.random.default_rng(seed).normal(size=shape)
    image[shape[0] // 2 - 3 : shape[0] // 2 + 3, shape[1] // 2 - 3 : shape[1] // 2 + 3] += 30
    return image


def _write(path: Path, *planes: Plane) -> Path:
    path.write_bytes(encode_fits([Plane("PRIMARY", None, {}), *planes]))
    return path


def _raw(**changes) -> RawBand:
    base = RawBand("i", _image(), CARDS, np.ones(SHAPE), psf=PSF, psf_header={"PSFNORM": 1.0})
    return replace(base, **changes)


def _check(**changes) -> Band:
    return check_bands([_raw(**changes)], InputOptions())[0]


def _says(band: Band, text: str) -> bool:
    return any(text in note for note in band.notes)


def test_an_observation_file_is_read_by_extver(tmp_path: Path) -> None:
    planes = []
    for version, name in ((2, "r"), (1, "g")):
        planes += [
            Plane("SCI", _image(version), {**CARDS, "BAND": name, "INSTRUME": "CAM", "ZEROPNT": 27.0}, version),
            Plane("VAR", np.full(SHAPE, float(version)), {}, version),
            Plane("DQ", (np.arange(SHAPE[1]) == version).astype(np.int32)[None].repeat(SHAPE[0], 0), {}, version),
            Plane("PSF", PSF, {"PSFNORM": 0.98, "OVERSAMP": 1}, version),
        ]
    observation = read_observation(_write(tmp_path / "galaxy.fits", *planes), InputOptions())
    assert (observation.object_id, [b.name for b in observation.bands]) == ("galaxy", ["g", "r"])
    for version, band in enumerate(observation.bands, start=1):
        np.testing.assert_array_equal(band.image, _image(version))
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
        Plane("SCI", _image(), {**CARDS, "TELESCOP": "JWST"}),
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
        Plane("IMAGE", _image(), {**CARDS, "FILTER": "HSC-I", "BAND": ""}),
        Plane("MASK", mask, planes),
        Plane("VARIANCE", np.ones(SHAPE), {}),
    )


def test_mask_planes_are_named_and_detected_is_not_bad(tmp_path: Path) -> None:
    psf = _write(tmp_path / "psf.fits", Plane("PSF", PSF, {}))
    path = _lsst(tmp_path / "a.fits")
    band = read_observation(path, InputOptions(psf=psf)).bands[0]
    assert band.name == "HSC-I"
    assert band.good[0, :5].tolist() == [False, False, True, False, True]
    assert band.saturated.sum() == 1
    band = read_observation(path, InputOptions(psf=psf, mask_planes=("SUSPECT",))).bands[0]
    assert band.good[0, :5].tolist() == [True, False, True, True, False]
    with pytest.raises(InputError, match=r"CR is unknown; the file has BAD, DETECTED"):
        read_observation(path, InputOptions(psf=psf, mask_planes=("CR",)))


def test_a_plain_cube_takes_the_rest_from_the_options(tmp_path: Path) -> None:
    path, psf = tmp_path / "a.fits", _write(tmp_path / "psf.fits", Plane("X", np.stack([PSF, PSF]), {}))
    path.write_bytes(encode_fits([Plane("PRIMARY", np.stack([_image(0), _image(1)]), {})]))
    variance = _write(tmp_path / "var.fits", Plane("X", np.stack([np.ones(SHAPE), np.full(SHAPE, 2.0)]), {}))
    options = InputOptions(
        psf=psf, psf_norm=0.97, variance=variance, bands=("g", "r"), unit="adu", pixel_scale=0.2, zeropoint=25.0
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
        _check(header={**CARDS, "BUNIT": unit})
    assert f"unit {unit} is" in str(caught.value)
    with pytest.raises(InputError, match=message):
        check_bands([_raw(header={"PIXSCALE": 0.2})], InputOptions(unit=unit))


@pytest.mark.parametrize(
    "unit", ["nJy", "MJy", "adu", "ELECTRONS/S", "counts/s", "DN", "nanomaggies", "Jy/pix", "erg/s/cm2/Angstrom"]
)
def test_flux_per_pixel_is_taken(unit: str) -> None:
    assert _check(header={**CARDS, "BUNIT": unit}).unit == unit


def test_a_zero_point_that_contradicts_the_header_is_refused() -> None:
    raw = _raw(header={**CARDS, "ZEROPNT": 27.0})
    with pytest.raises(InputError, match="zero point mismatch: ZEROPNT is 27 but input.zeropoint says 25.5"):
        check_bands([raw], InputOptions(zeropoint=25.5))
    assert check_bands([raw], InputOptions(zeropoint=27.0))[0].zeropoint == 27.0
    assert check_bands([_raw()], InputOptions(zeropoint=25.5))[0].zeropoint == 25.5
    with pytest.raises(InputError, match="ZEROPNT is '27 mag'"):
        _check(header={**CARDS, "ZEROPNT": "27 mag"})


def test_bad_pixels_keep_their_value_and_lose_their_weight() -> None:
    image, variance = _image(), np.ones(SHAPE)
    image[0, :2], variance[1, :4] = [np.nan, np.inf], [0.0, -1.0, np.nan, np.inf]
    band = _check(image=image, variance=variance)
    assert np.isnan(band.image[0, 0])
    assert not band.good[0, :2].any()
    assert not band.good[1, :4].any()
    assert band.good.sum() == band.good.size - 6
    assert _says(band, "6 bad pixels")


def test_saturated_pixels_are_flagged_by_level_and_by_plateau() -> None:
    image = _image()
    image[10:13, 10:13] = 500.0
    assert _check(image=image).saturated.sum() == 9
    image[10:13, 10:13] += np.arange(9).reshape(3, 3)
    assert not _check(image=image).saturated.any()
    band = _check(image=image, header={**CARDS, "SATURATE": 504.0})
    assert band.saturated.sum() == 5
    assert not (band.good & band.saturated).any()


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
    band = _check(variance=None, image=_image() + 5)
    assert band.noise_estimated
    assert _says(band, "noise estimated from the sky")
    assert _says(band, "not subtracted")
    assert band.variance[0, 0] == pytest.approx(1, rel=0.3)
    np.testing.assert_array_equal(band.image, _image() + 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.where(np.arange(SHAPE[1]) < 20, np.nan, _image())}, "56% of the pixels are bad"),
        ({"image": np.full(SHAPE, 3.0)}, "constant"),
        ({"image": np.full(SHAPE, 3.0), "variance": None}, "constant"),
        ({"image": np.full(SHAPE, np.nan), "variance": None}, "100% of the pixels are bad"),
        ({"variance": np.zeros(SHAPE)}, "100% of the pixels are bad"),
        ({"variance": -np.ones(SHAPE)}, "bad"),
        ({"variance": np.ones((3, 3))}, "variance is"),
        ({"bad": np.ones(SHAPE, dtype=bool)}, "bad"),
        ({"header": {**CARDS, "SATURATE": 1e-9}, "image": np.abs(_image())}, "bad"),
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
        _check(**changes)
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
        check_bands([_raw(), _raw(**{"name": "r", **second})], options)


def test_one_object_collects_exposures_by_band(tmp_path: Path) -> None:
    planes = [
        p
        for k, n in ((1, "g"), (2, "r"), (3, "g"))
        for p in (Plane("SCI", _image(k), {**CARDS, "BAND": n}, k), Plane("PSF", PSF, {}, k))
    ]
    exposures = read_observation(_write(tmp_path / "a.fits", *planes), InputOptions()).exposures()
    assert {name: len(bands) for name, bands in exposures.items()} == {"g": 2, "r": 1}


def test_a_field_sees_a_point_source_where_it_is() -> None:
    """A unit source of the target's width on the canvas, through the operator: the data's PSF, at the same sky position."""
    band = _check()
    field = build_field([band], pixel_scale=0.1, target_fwhm=0.2, margin=8)
    assert field.grid.shape == (64, 72)
    assert field.canvas.shape == (80, 88)
    assert isinstance(field.likelihood.operator.operators[0], SeparableResample)
    row, column = (int(v) for v in np.round(field.canvas.world_to_pixel(*band.grid.pixel_to_world(15.25, 17.75))))
    seen = field.likelihood.operator(_point(field.canvas.shape, row, column))[0, 0].numpy()
    centre = band.grid.world_to_pixel(*field.canvas.pixel_to_world(float(row), float(column)))
    offset = [np.arange(n) - c for n, c in zip(SHAPE, centre, strict=True)]
    distance = np.hypot(offset[0][:, None], offset[1])
    expected = np.exp(-4 * np.log(2) * (distance / 3.5) ** 2)
    expected /= np.exp(-4 * np.log(2) * (np.hypot(*np.mgrid[-20:21, -20:21]) / 3.5) ** 2).sum()
    assert np.abs(seen - expected).max() < 1e-3 * expected.max()
    assert seen.sum() == pytest.approx(1, abs=1e-3)


def _point(shape: tuple[int, int], row: int, column: int) -> torch.Tensor:
    rows, columns = (torch.arange(n) - c for n, c in zip(shape, (row, column), strict=True))
    image = torch.exp(-4 * np.log(2) * (rows[:, None] ** 2 + columns**2) / 4.0)
    return (image / image.sum())[None, None].float()


def test_a_turned_second_exposure_sees_the_same_sky() -> None:
    """The same point through a detector turned by 30° lands where the WCS of that detector says it does, and the long axis of
    its PSF stays along the detector's columns."""
    lags = np.arange(25) - 12
    long = np.exp(-(lags[:, None] ** 2) / 4.0 - lags**2 / 9.0)
    tan = {
        "CTYPE1": "RA---TAN",
        "CTYPE2": "DEC--TAN",
        "CRVAL1": 10.0,
        "CRVAL2": 20.0,
        "CRPIX1": 18.5,
        "CRPIX2": 16.5,
        "BUNIT": "nJy",
    }
    scale, angle = 0.2 / 3600, np.radians(30)
    turned = {"CD1_1": -np.cos(angle), "CD1_2": np.sin(angle), "CD2_1": np.sin(angle), "CD2_2": np.cos(angle)}
    second = {**tan, **{k: v * scale for k, v in turned.items()}}
    bands = check_bands(
        [_raw(header={**tan, "CD1_1": -scale, "CD2_2": scale}, psf=long), _raw(header=second, psf=long)], InputOptions()
    )
    field = build_field(bands, pixel_scale=0.1, target_fwhm=0.2, margin=8)
    assert len(field.likelihood.parts) == 2
    for band, part in zip(bands, field.likelihood.parts, strict=True):
        seen = part.operator(_point(field.canvas.shape, 50, 40))[0, 0].double().numpy()
        rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
        centroid = (rows * seen).sum() / seen.sum(), (columns * seen).sum() / seen.sum()
        expected = band.grid.world_to_pixel(*field.canvas.pixel_to_world(50.0, 40.0))
        np.testing.assert_allclose(centroid, expected, atol=2e-3)
        assert seen.sum() == pytest.approx(1, abs=2e-3)
        spread = [((p - c) * (q - d) * seen).sum() for (p, c), (q, d) in _pairs((rows, centroid[0]), (columns, centroid[1]))]
        np.testing.assert_allclose(spread, [2.0, 0.0, 4.5], atol=0.05)


def _pairs(row: tuple, column: tuple) -> list[tuple]:
    return [(row, row), (row, column), (column, column)]


def test_mixed_channels_and_small_fields() -> None:
    bands = check_bands([_raw(), _raw(name="r")], InputOptions())
    field = build_field(bands, pixel_scale=0.1, target_fwhm=0.2, margin=0, mixing=np.array([[1.0, 0.0], [0.3, 0.7]]), smallest=70)
    assert field.likelihood.image_shape == (2, 70, 78)
    assert field.margin == 3
    point = _point((70, 78), 35, 39)
    both = [
        p.operator(point.repeat(1, 2, 1, 1) * point.new_tensor([1.0, 2.0])[None, :, None, None]).sum()
        for p in field.likelihood.parts
    ]
    np.testing.assert_allclose([float(b) for b in both], [1.0, 0.3 + 0.7 * 2], rtol=2e-3)
    with pytest.raises(InputError, match="3 rows"):
        build_field(bands, pixel_scale=0.1, target_fwhm=0.2, margin=0, mixing=np.ones((3, 1)))


def test_masked_nan_pixels_leave_likelihoods_finite() -> None:
    image = _image()
    image[3, 4] = np.nan
    field = build_field([_check(image=image)], pixel_scale=0.1, target_fwhm=0.2, margin=8)
    x = _point(field.canvas.shape, 30, 30)
    assert field.likelihood.score(x).isfinite().all()
    assert field.likelihood.log_prob(x).isfinite().all()


def test_noise_correlation_reaches_the_likelihood() -> None:
    lag = np.hypot(*np.mgrid[-2:3, -2:3])
    correlation = np.exp(-(lag**2))
    field = build_field([_check(correlation=correlation)], pixel_scale=0.1, target_fwhm=0.2, margin=8)
    white = build_field([_check()], pixel_scale=0.1, target_fwhm=0.2, margin=8)
    x = _point(field.canvas.shape, 30, 30)
    assert not np.allclose(field.likelihood.score(x).numpy(), white.likelihood.score(x).numpy())


def test_the_scale_is_that_of_the_noiseless_image() -> None:
    """E s² is exact without blur: 200 noise draws of the same image; a larger empty field does not change it."""
    rng = np.random.default_rng(1)
    clean = np.zeros((40, 40))
    clean[15:25, 15:25] = 8.0
    expected = np.sqrt((clean**2).sum() / 4096 / 4)
    variance, good = np.full((40, 40), 4.0), np.ones((40, 40), dtype=bool)
    squares = [estimate_scale(clean + 2 * rng.normal(size=clean.shape), variance, good, area_ratio=4.0) ** 2 for _ in range(200)]
    assert np.sqrt(np.mean(squares)) == pytest.approx(expected, rel=4 * np.std(squares) / np.mean(squares) / np.sqrt(200) / 2)
    wide = np.pad(clean, 20)
    assert estimate_scale(wide, np.full(wide.shape, 1e-9), np.ones(wide.shape, dtype=bool), area_ratio=4.0) == pytest.approx(
        expected
    )
    assert estimate_scale(np.zeros((40, 40)), variance, good, area_ratio=4.0) > 0


def test_the_hsc_field_lies_on_the_hubble_field(data_folder: Path) -> None:
    """84×84 output pixels, and Hubble's image, blurred and read at the WCS positions, matches best without a shift."""
    folder = data_folder / "ground_space"
    if not (folder / "Cut_HSC.fits").is_file():
        pytest.skip("needs ground_space/Cut_HSC.fits")
    observation = read_observation(folder / "Cut_HSC.fits", InputOptions(psf=folder / "PSF_HSC.fits"))
    assert len(observation.bands) == 5
    assert all(b.noise_estimated for b in observation.bands)
    band = observation.bands[2]
    field = build_field([band], pixel_scale=0.1, target_fwhm=0.2, margin=16)
    assert field.grid.shape == (84, 84)
    sky = band.grid.pixel_to_world(10.0, 30.0)
    np.testing.assert_allclose(field.grid.world_to_pixel(*sky), [10.5 * 1.68 - 0.5, 30.5 * 1.68 - 0.5], atol=1e-3)
    hubble, hubble_grid = _blurred_hubble(folder / "Cut_HST.fits")
    affine = band.grid.affine_to(hubble_grid)
    rows, columns = np.mgrid[10:40, 10:40]
    match = {}
    for shift in np.ndindex(5, 5):
        place = np.stack([rows + shift[0] - 2, columns + shift[1] - 2])
        index = np.round(np.einsum("ij,jab->iab", affine.matrix, place) + affine.offset[:, None, None]).astype(int)
        match[shift] = np.corrcoef(hubble[tuple(index)].ravel(), band.image[10:40, 10:40].ravel())[0, 1]
    assert max(match, key=match.get) == (2, 2)
    assert match[2, 2] > 0.97


def _blurred_hubble(path: Path) -> tuple[np.ndarray, SkyGrid]:
    """The image at a seeing of 0.6″, and its grid."""
    plane = read_fits(path).planes[0]
    blur = np.fft.rfft2(gaussian_stamp(20.0, 101), plane.data.shape)
    smooth = np.roll(np.fft.irfft2(np.fft.rfft2(plane.data) * blur, plane.data.shape), (-50, -50), (0, 1))
    return smooth, SkyGrid.from_header(plane.header, plane.data.shape)
