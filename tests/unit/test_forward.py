"""From bands to the likelihood of an image of the sky: positions, mixing, masks, noise and the scale of the prior."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffinv.core.checks import InputError
from diffinv.data.fits import read_fits
from diffinv.data.forward import build_field, estimate_scale
from diffinv.data.grids import SkyGrid
from diffinv.data.layouts import InputOptions
from diffinv.data.observation import check_bands, read_observation
from diffinv.data.psf import gaussian_stamp
from diffinv.operators.geometry import SeparableResample
from tests.bands import SHAPE, checked_band, raw_band, source


def test_a_field_sees_a_point_source_where_it_is() -> None:
    """A unit source of the target's width on the canvas, through the operator: the data's PSF, at the same sky position."""
    band = checked_band()
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
        [raw_band(header={**tan, "CD1_1": -scale, "CD2_2": scale}, psf=long), raw_band(header=second, psf=long)], InputOptions()
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
    bands = check_bands([raw_band(), raw_band(name="r")], InputOptions())
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


def test_the_canvas_of_an_odd_field_is_even() -> None:
    """A row and a column more at the upper end, so that 51² pixels are one field of a prior of 64²; the output stays as it is."""
    (band,) = check_bands([raw_band(image=source(shape=(51, 53)), variance=np.ones((51, 53)))], InputOptions())
    field = build_field([band], pixel_scale=0.2, target_fwhm=0.4, margin=0, smallest=64)
    assert (field.canvas.shape, field.grid.shape, field.margin) == ((64, 66), (51, 53), 6)
    x = _point(field.canvas.shape, 6 + 20, 6 + 30)
    for image in (field.inner(x), field.likelihood.operator(x)):
        assert image.shape[-2:] == (51, 53)
        assert np.unravel_index(int(image.argmax()), (51, 53)) == (20, 30)


def test_masked_nan_pixels_leave_likelihoods_finite() -> None:
    image = source()
    image[3, 4] = np.nan
    field = build_field([checked_band(image=image)], pixel_scale=0.1, target_fwhm=0.2, margin=8)
    x = _point(field.canvas.shape, 30, 30)
    assert field.likelihood.score(x).isfinite().all()
    assert field.likelihood.log_prob(x).isfinite().all()


def test_noise_correlation_reaches_the_likelihood() -> None:
    lag = np.hypot(*np.mgrid[-2:3, -2:3])
    correlation = np.exp(-(lag**2))
    field = build_field([checked_band(correlation=correlation)], pixel_scale=0.1, target_fwhm=0.2, margin=8)
    white = build_field([checked_band()], pixel_scale=0.1, target_fwhm=0.2, margin=8)
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
    observation = read_observation(folder / "Cut_HSC.fits", InputOptions(psf=(folder / "PSF_HSC.fits",)))
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
