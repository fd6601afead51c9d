"""Scenes, truth images and survey observations: fluxes, positions, PSFs and noise against closed forms and GalSim."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffinv.data import raster
from diffinv.data.chunks import in_chunks
from diffinv.data.colours import Colours
from diffinv.data.fits import read_images, read_table
from diffinv.data.galaxies import CosmosSample, Population, cosmos_sample, draw_scene
from diffinv.data.scenes import Knots, PatternedDisc, Scene, Segmentation, Sersic, Stamp, Star, Texture
from diffinv.data.spectra import FourierGrid, gaussian_transfer, image_spectrum, pixel_transfer
from diffinv.data.surveys import EUCLID_VIS, HSC_WIDE, LSST, LSST_YEAR_1, JitteredAiry, Kolmogorov, Moffat, Survey

galsim = pytest.importorskip("galsim", reason="GalSim renders the scenes")
simulate = pytest.importorskip("diffinv.data.simulate")

GROUND = Moffat(fwhm=0.7, beta=3.1, e1=0.03, e2=-0.02)
SPACE = JitteredAiry(wavelength=750.6, diameter=1.2, obscuration=0.36, jitter=0.06, e1=0.0, e2=0.0)


def _synthetic_sample() -> CosmosSample:
    rng = np.random.default_rng(5)
    x = np.arange(41) - 20.0
    r2 = x[:, None] ** 2 + x[None, :] ** 2
    stamp = 10 * np.exp(-0.5 * r2 / 16) + 0.3 * rng.standard_normal((41, 41))
    psf = np.exp(-0.5 * r2 / 2)
    return CosmosSample(
        singles=np.array([[1.0, 0.4, 0.6], [4.0, 0.5, 0.8]]),
        pairs=np.array([[0.6, 0.5, 0.15, 0.8, 0.3]]),
        magnitudes=np.array([21.0, 22.0, 22.5]),
        stamps=(stamp,),
        psfs=(psf / psf.sum(),),
        weights=np.ones(1),
    )


POPULATION = Population(_synthetic_sample())
PLAIN_DISC = PatternedDisc(
    flux=100.0, scale=0.3, index=1.0, axis_ratio=0.5, angle=0.7, arms=0, pitch=0.3, phase=0.0, contrast=0.0,
    sharpness=1.0, bar_strength=0.0, bar_length=1.0, bar_ratio=0.3, bar_angle=0.0, ring_strength=0.0, ring_radius=1.0,
    ring_width=0.2, dust_depth=0.0, dust_offset=0.0, dust_width=0.1, lopsidedness=0.0, lopsided_angle=0.0, bend=0.0,
    texture=Texture(0.0, 1.0, 0.5, 0), x=0.23, y=-0.41,
)  # fmt: skip
KNOTS = Knots(  # offsets that leave the centroid at (x, y)
    flux=100.0,
    dx=np.array([0.3, -0.2]),
    dy=np.array([-0.15, 0.1]),
    width=np.array([0.05, 0.1]),
    share=np.array([0.4, 0.6]),
    x=0.23,
    y=-0.41,
)
COMPACT = {
    "sersic": Sersic(100.0, 1.0, 0.15, 0.6, 0.4, 0.23, -0.41),
    "star": Star(100.0, 0.23, -0.41),
    "knots": KNOTS,
    "disc": replace(PLAIN_DISC, scale=0.1),
    "stamp": Stamp(100.0, 0, 2.0, 0.4, True, 1.0, 0.23, -0.41),
}


@pytest.fixture(scope="module")
def data() -> Path:
    folder = Path(os.environ.get("DIFFINV_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (folder / "cosmos").is_dir():
        pytest.skip(f"the data folder {folder} is absent: set DIFFINV_DATA to a folder that holds cosmos/ and mocks/")
    return folder


def _centroid(image: np.ndarray, scale: float) -> tuple[float, float]:
    points = raster.coordinates(len(image), scale)
    return float((image * points).sum() / image.sum()), float((image * points[:, None]).sum() / image.sum())


def test_truths_do_not_depend_on_workers_or_count() -> None:
    one = simulate.render_truths(POPULATION, 24, seed=3)
    assert one.dtype == np.float32
    np.testing.assert_array_equal(one, simulate.render_truths(POPULATION, 24, seed=3, workers=3))
    np.testing.assert_array_equal(one[:7], simulate.render_truths(POPULATION, 7, seed=3))
    assert np.abs(one - simulate.render_truths(POPULATION, 24, seed=4)).max() > 0


def test_truths_in_bands_have_the_image_in_the_reference_and_do_not_depend_on_workers() -> None:
    """A scene that is not segmented is the same in the band of its fluxes; the colours of a point are those of its pixels."""
    colours = Colours(("g", "i"), "i", np.array([[0.5, 0.0], [1.5, 0.0]]))
    plain = replace(POPULATION, segmented_fraction=0.0)
    one = simulate.render_truths(plain, 24, seed=3, colours=colours)
    assert one.shape == (24, 2, 64, 64)
    np.testing.assert_array_equal(one, simulate.render_truths(plain, 24, seed=3, workers=3, colours=colours))
    np.testing.assert_allclose(one[:, 1], simulate.render_truths(plain, 24, seed=3), rtol=1e-5, atol=1e-6)
    stars = replace(plain, kinds={"star": 1.0}, blend_fraction=0.0)
    ratio = np.log10(simulate.render_truths(stars, 24, seed=3, colours=colours).sum((2, 3)))
    assert np.ptp(ratio[:, 0] - ratio[:, 1]) > 0.2


def test_truths_are_finite_and_not_empty() -> None:
    images = simulate.render_truths(POPULATION, 150, seed=8)
    assert np.isfinite(images).all()
    assert (images.max((1, 2)) > 0).all()


def test_analytic_scenes_are_never_negative() -> None:
    population = replace(POPULATION, kinds={"sersic": 1.0, "irregular": 1.0, "patterned": 1.0}, segmented_fraction=0.0)
    assert simulate.render_truths(population, 40, seed=1).min() >= 0


@pytest.mark.parametrize("name", COMPACT)
def test_truth_conserves_flux_and_position(name: str) -> None:
    image = simulate.render_truth(Scene((COMPACT[name],)), POPULATION)
    assert image.sum() == pytest.approx(100.0, rel=3e-3)
    if name != "stamp":  # a noisy stamp has no closed-form centroid
        np.testing.assert_allclose(_centroid(image, 0.1), (0.23, -0.41), atol=2e-3)


@pytest.mark.parametrize("name", COMPACT)
@pytest.mark.parametrize(("psf", "scale"), [(GROUND, 0.2), (SPACE, 0.1)])
def test_observation_conserves_position_and_loses_only_wings(name: str, psf: Moffat | JitteredAiry, scale: float) -> None:
    image = simulate.render_observed(Scene((COMPACT[name],)), POPULATION, psf, scale)
    assert 96.0 < image.sum() < 100.1
    if name != "stamp":
        np.testing.assert_allclose(_centroid(image, scale), (0.23, -0.41), atol=0.03)


@pytest.mark.parametrize(("index", "radius", "ratio"), [(0.5, 0.3, 0.3), (1.0, 1.0, 0.5), (4.075, 0.5, 0.7), (6.2, 1.0, 0.6)])
def test_sersic_truth_agrees_with_galsim(index: float, radius: float, ratio: float) -> None:
    profile = Sersic(100.0, index, radius, ratio, 0.7, 0.3, -0.8)
    image = simulate.render_truth(Scene((profile,)), POPULATION)
    sky = galsim.Sersic(index, half_light_radius=radius, flux=100).shear(q=ratio, beta=0.7 * galsim.radians).shift(0.3, -0.8)
    expected = galsim.Convolve(sky, galsim.Gaussian(fwhm=0.2)).drawImage(nx=64, ny=64, scale=0.1, method="no_pixel").array
    assert np.abs(image - expected).max() < 1e-3 * expected.max()


@pytest.mark.parametrize(
    ("psf", "reference", "scale"),
    [
        (GROUND, galsim.Moffat(beta=3.1, fwhm=0.7).shear(e1=0.03, e2=-0.02), 0.2),
        (Kolmogorov(0.6, -0.02, 0.04), galsim.Kolmogorov(fwhm=0.6).shear(e1=-0.02, e2=0.04), 0.168),
        (SPACE, galsim.Convolve(galsim.Airy(lam=750.6, diam=1.2, obscuration=0.36), galsim.Gaussian(sigma=0.06)), 0.1),
    ],
)
def test_observation_and_psf_agree_with_galsim(psf: Moffat, reference: galsim.GSObject, scale: float) -> None:
    size = round(6.4 / scale)
    sky = galsim.Sersic(2.0, half_light_radius=0.4, flux=100).shear(q=0.6, beta=0.7 * galsim.radians).shift(0.3, -0.8)
    expected = galsim.Convolve(sky, reference).drawImage(nx=size, ny=size, scale=scale).array
    image = simulate.render_observed(Scene((Sersic(100.0, 2.0, 0.4, 0.6, 0.7, 0.3, -0.8),)), POPULATION, psf, scale)
    assert np.abs(image - expected).max() < 1e-3 * expected.max()
    stamp = simulate.render_psf(psf, scale, size=33, oversampling=1)
    assert np.abs(stamp - reference.drawImage(nx=33, ny=33, scale=scale).array).max() < 1e-3 * stamp.max()


def test_a_plain_disc_is_an_exponential_sersic_profile() -> None:
    circularised = 1.67835 * PLAIN_DISC.scale * np.sqrt(PLAIN_DISC.axis_ratio)
    sersic = Scene((Sersic(100.0, 1.0, circularised, 0.5, 0.7, 0.23, -0.41),))
    disc = Scene((PLAIN_DISC,))
    expected = simulate.render_truth(sersic, POPULATION)
    assert np.abs(simulate.render_truth(disc, POPULATION) - expected).max() < 5e-3 * expected.max()
    expected = simulate.render_observed(sersic, POPULATION, GROUND, 0.2)
    assert np.abs(simulate.render_observed(disc, POPULATION, GROUND, 0.2) - expected).max() < 5e-3 * expected.max()


@pytest.mark.parametrize("segmentation", [None, Segmentation(0.05, 1.5, 0.08, 7)])
@pytest.mark.parametrize("name", ["knots", "disc", "stamp"])
def test_observation_is_the_truth_seen_through_the_difference_kernel(name: str, segmentation: Segmentation | None) -> None:
    scene = Scene((COMPACT[name],), segmentation)
    observed = simulate.render_observed(scene, POPULATION, GROUND, 0.2)
    grid = FourierGrid.covering(32, 0.2, step=0.05, box=25.6)
    sigma = simulate.TRUTH_FWHM * raster.FWHM_TO_SIGMA
    ratio = simulate._transfer(GROUND, grid.kx, grid.ky) / np.maximum(gaussian_transfer(sigma, grid.kx, grid.ky), 1e-3)
    truth = simulate.render_truth(scene, POPULATION)
    spectrum = image_spectrum(truth, 0.1, grid)
    predicted = grid.sample(spectrum * ratio * pixel_transfer(0.2, grid), 32, 0.2)
    assert np.abs(predicted - observed).max() < 5e-3 * observed.max()


def test_segmented_scenes_are_zero_outside_their_outline() -> None:
    image = simulate._segmented(Scene((COMPACT["sersic"],), Segmentation(0.05, 1.5, 0.08, 7)), POPULATION)
    assert 0.005 < (image != 0).mean() < 0.5


@pytest.mark.parametrize("survey", [LSST, HSC_WIDE])
def test_effective_psf_sums_to_one_on_a_wide_stamp(survey: Survey) -> None:
    psf = simulate.draw_psf(survey, survey.band("i"), np.random.default_rng(2), size=129, oversampling=1)
    assert psf.sum() == pytest.approx(1.0, abs=2e-3)
    assert np.unravel_index(psf.argmax(), psf.shape) == (64, 64)


def test_oversampled_psf_is_the_same_function() -> None:
    coarse = simulate.render_psf(GROUND, 0.2, size=33, oversampling=1)
    fine = simulate.render_psf(GROUND, 0.2, size=97, oversampling=3)
    np.testing.assert_allclose(9 * fine[::3, ::3], coarse, atol=1e-6)


@pytest.mark.parametrize("survey", [LSST, LSST_YEAR_1, EUCLID_VIS])
def test_noise_agrees_with_the_variance_plane(survey: Survey) -> None:
    band = survey.bands[-1] if survey is EUCLID_VIS else survey.band("i")
    mean = simulate.render_observed(Scene((Sersic(5000.0, 1.0, 0.5, 0.6, 0.4),)), POPULATION, survey.optics.draw(
        band.wavelength, np.random.default_rng(0)), survey.pixel_scale)  # fmt: skip
    rng, repeats = np.random.default_rng(1), 100
    variance = survey.variance(mean, band)
    draws = np.stack([survey.observe(mean, band, rng) for _ in range(repeats)])
    z = (draws - mean) / np.sqrt(variance)
    assert abs(z.mean()) * np.sqrt(z.size) < 4.5
    bright = mean > 0.3 * mean.max()
    for chi2 in (z**2, z[:, bright] ** 2):  # Var[z^2] = 2 + an excess kurtosis of at most one over the electrons
        assert abs(chi2.mean() - 1) * np.sqrt(chi2.size / 2.1) < 4.5


def test_observations_are_complete_and_do_not_depend_on_workers() -> None:
    args = (POPULATION, LSST, LSST.band("i"), 6, 3)
    one = simulate.simulate_observations(*args, psf_size=33, psf_oversampling=1)
    two = simulate.simulate_observations(*args, psf_size=33, psf_oversampling=1, workers=2)
    for name in ("image", "variance", "mean", "psf", "truth"):
        assert np.isfinite(getattr(one, name)).all()
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert one.image.shape == (6, 32, 32)
    z = ((one.image - one.mean) / np.sqrt(one.variance)).reshape(6, -1)
    correlation = z @ z.T / z.shape[1] - np.eye(6)
    assert np.abs(correlation).max() < 4.5 * np.sqrt(2 / z.shape[1])  # every image has noise of its own
    np.testing.assert_array_equal(one.truth, simulate.render_truths(POPULATION, 6, seed=3))


def test_population_covers_its_kinds_and_positions() -> None:
    rng = np.random.default_rng(0)
    scenes = [draw_scene(POPULATION, rng) for _ in range(2000)]
    types = {type(c) for scene in scenes for c in scene.components}
    assert types == {Sersic, Star, Knots, PatternedDisc, Stamp}
    segmented = np.mean([scene.segmentation is not None for scene in scenes])
    assert abs(segmented - 0.14 * 0.88) < 4.5 * np.sqrt(0.12 * 0.88 / 2000)
    flux = np.array([sum(c.flux for c in scene.components) for scene in scenes])
    assert 1 < np.median(flux) / 10 ** (-0.4 * (23.0 - 31.4)) < 4


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="it has g, r, i, z, y"):
        HSC_WIDE.band("IE")
    with pytest.raises(ValueError, match="one PSF per stamp"):
        cosmos_sample(np.zeros(0), [np.zeros((3, 3))], [])
    with pytest.raises(ValueError, match="workers >= 1"):
        in_chunks(lambda start, stop: [], 3, 0)


@pytest.mark.parametrize(
    ("key", "survey", "band", "plane"),
    [("lsst_var", LSST, "gri", 0), ("lsst_y1_var", LSST_YEAR_1, "gri", 0), ("hsc_i_var", HSC_WIDE, "i", None),
     ("vis_var", EUCLID_VIS, "IE", None)],
)  # fmt: skip
def test_depth_is_that_of_the_validation_mocks(data: Path, key: str, survey: Survey, band: str, plane: int | None) -> None:
    planes = np.load(data / "mocks" / "galaxies_val32.npz")[key]
    sky = planes.min((0, -2, -1)) if plane is not None else [planes.min()]
    for name, expected in zip(band if plane is not None else [band], sky):
        assert survey.sky_variance(survey.band(name)) == pytest.approx(expected, rel=1e-4)


def test_cosmos_population_renders(data: Path) -> None:
    table = read_table(data / "cosmos" / "parametric_fits.fits")
    stamps, psfs = (read_images(data / "cosmos" / f"hst_f814w_{name}.fits") for name in ("stamps", "psfs"))
    sample = cosmos_sample(table, stamps, psfs, excluded=(int(table["IDENT"][0]),))
    assert len(sample.singles) == len(table) - 1
    stamps_only = Population(sample, kinds={"stamp": 1.0}, blend_fraction=0.0, centred_fraction=1.0)
    images = simulate.render_truths(stamps_only, 30, seed=0)
    assert np.isfinite(images).all()
    assert (images.min((1, 2)) > -0.4 * images.max((1, 2))).all()
