"""Renders scenes to truth images and to survey observations. The only file that imports GalSim.

A truth image is the scene convolved with a round Gaussian (the *effective* target PSF, pixel included) and sampled at
pixel centres: flux per pixel = surface brightness x scale^2. An observation is the same scene, not the truth image,
multiplied in Fourier space by the transfer functions of the survey's PSF and pixel, sampled, and given its noise.

Sersic profiles and PSFs enter as GalSim's Fourier transforms, tabulated once per shape; knots are analytic; patterned
discs, real stamps and segmented scenes exist on a raster of 1/30 arcsec (see `raster`) whose transform is taken exactly.
Real stamps carry the pixel noise of HST, which is thereby part of the "truth" in truth and observation alike.

Invariant: image i of a set depends on (seed, i) only, not on the number of workers or on chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import galsim
import numpy as np
from scipy import sparse

from diffinv.data import raster
from diffinv.data.chunks import in_chunks
from diffinv.data.colours import Colours, in_bands
from diffinv.data.galaxies import Population, draw_scene
from diffinv.data.scenes import Knots, PatternedDisc, Scene, Sersic, Stamp, Star
from diffinv.data.spectra import (
    FourierGrid,
    Table,
    gaussian_transfer,
    image_spectrum,
    knots_spectrum,
    lookup,
    pixel_transfer,
)
from diffinv.data.surveys import Band, JitteredAiry, Kolmogorov, Moffat, Psf, Survey

TRUTH_SIZE = 64
TRUTH_SCALE = 0.1
TRUTH_FWHM = 0.20
STAMP_SCALE = 0.03
_FINE = 3
_FINE_SIZE = _FINE * 72
_FINE_SCALE = TRUTH_SCALE / _FINE
_DETECTION_FWHM = 0.10  # resolution at which segmentation outlines are cut, that of HST
_NUMERICAL_FLOOR = 0.02  # transfer functions that are divided out are kept above this


@dataclass(frozen=True, eq=False)
class SimulatedObservation:
    """One observed field, or a set of them with one more leading axis on every array.

    Arguments:
        image: (h, w) nJy per pixel, sky subtracted.
        variance: (h, w) nJy^2, sky + read-out + source.
        mean: (h, w) the image without noise.
        psf: (s, s) effective PSF (pixel included) at `psf_scale`; sums to its encircled energy, below 1.
        truth: (64, 64) nJy per pixel of 0.1 arcsec, effective PSF Gaussian of FWHM 0.20 arcsec.
        pixel_scale, psf_scale, truth_scale: arcsec; all grids share their centre.
    """

    image: np.ndarray
    variance: np.ndarray
    mean: np.ndarray
    psf: np.ndarray
    truth: np.ndarray
    pixel_scale: float
    psf_scale: float
    truth_scale: float = TRUTH_SCALE


def render_truths(
    population: Population, count: int, seed: int, workers: int = 1, *, colours: Colours | None = None
) -> np.ndarray:
    """Truth images of `count` scenes.

    Arguments:
        population: what to draw from.
        count: number of images.
        seed: image i is a function of (seed, i).
        workers: number of processes (forked).
        colours: bands to render each scene in, not segmented; None: in that of its fluxes.

    Returns:
        (count, 64, 64) float32, (count, bands, 64, 64) with colours, nJy per pixel of 0.1 arcsec, Gaussian effective PSF of
        FWHM 0.20 arcsec.
    """
    bands = () if colours is None else (len(colours.bands),)
    images = np.empty((count, *bands, TRUTH_SIZE, TRUTH_SIZE), np.float32)
    for start, part in in_chunks(_TruthChunk(population, seed, colours), count, workers):
        images[start : start + len(part)] = part
    return images


def scene_of(population: Population, seed: int, number: int) -> Scene:
    """Scene `number` of the set with this seed: the one that `render_truths` renders there."""
    return draw_scene(population, np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,))))


def render_truth(scene: Scene, population: Population) -> np.ndarray:
    """The truth image of a scene: (64, 64) float64, nJy per pixel; negative only where a stamp or its mimic is noisy."""
    if scene.segmentation is not None:
        start = (_FINE_SIZE - _FINE * (TRUTH_SIZE - 1) - 1) // 2
        image = raster.sharpened(_segmented(scene, population), _sharpening())[start::_FINE, start::_FINE]
        return image[:TRUTH_SIZE, :TRUTH_SIZE] * _FINE**2
    image = render(scene, population, TRUTH_SIZE, TRUTH_SCALE, TRUTH_FWHM)
    return image if any(isinstance(c, Stamp) for c in scene.components) else np.maximum(image, 0)


def render(scene: Scene, population: Population, size: int, scale: float, fwhm: float) -> np.ndarray:
    """A scene convolved with a round Gaussian and sampled, its segmentation ignored.

    Arguments:
        scene: what to render.
        population: holds the real stamps that a scene refers to.
        size: pixels a side.
        scale: arcsec a pixel.
        fwhm: of the effective PSF in arcsec.

    Returns:
        (size, size) nJy per pixel.
    """
    points, sigma = raster.coordinates(size, scale), fwhm * raster.FWHM_TO_SIGMA
    brightness = np.zeros((size, size))
    for component in scene.components:
        if isinstance(component, Knots):
            brightness += raster.render_knots(component, points, sigma)
        elif isinstance(component, Stamp):
            brightness += _render_stamp(component, population, points, sigma)
    discs = _discs_on_fine_grid(scene)
    if discs is not None:
        matrix = _resampling(size, scale, sigma)
        brightness += matrix @ (matrix @ discs.T).T
    return brightness * scale**2 + _render_profiles(scene, size, scale, fwhm)


def draw_psf(survey: Survey, band: Band, rng: np.random.Generator, *, size: int, oversampling: int) -> np.ndarray:
    """An effective PSF of the survey: see `render_psf`."""
    return render_psf(survey.optics.draw(band.wavelength, rng), survey.pixel_scale, size=size, oversampling=oversampling)


def render_psf(psf: Psf, pixel_scale: float, *, size: int, oversampling: int) -> np.ndarray:
    """The PSF convolved with the survey's pixel, sampled `oversampling` times a pixel.

    Arguments:
        psf: atmosphere or optics, without the pixel.
        pixel_scale: arcsec.
        size: samples a side; the PSF is centred at (size - 1) / 2.
        oversampling: samples per pixel.

    Returns:
        (size, size), flux per sample: the sum is the encircled energy.
    """
    scale = pixel_scale / oversampling
    grid = FourierGrid.covering(size, scale, step=psf.sampling, box=max(4 * size * scale, 12.8))
    return grid.sample(_transfer(psf, grid.kx, grid.ky) * pixel_transfer(pixel_scale, grid), size, scale)


def simulate_observation(
    scene: Scene,
    population: Population,
    survey: Survey,
    band: Band,
    rng: np.random.Generator,
    *,
    psf_size: int,
    psf_oversampling: int,
    flux_scale: float = 1.0,
) -> SimulatedObservation:
    """A survey's image of a scene: scene * PSF * pixel, plus sky, source and read-out noise.

    Arguments:
        scene: what is on the sky; the image covers its 6.4 arcsec.
        population: holds the real stamps that a scene refers to.
        survey: pixels, depth and PSFs.
        band: one of the survey's.
        rng: source of the PSF and of the noise.
        psf_size: samples a side of the returned PSF.
        psf_oversampling: its samples per pixel.
        flux_scale: flux in this band over the scene's (a colour).

    Returns:
        A SimulatedObservation.
    """
    psf = survey.optics.draw(band.wavelength, rng)
    mean = flux_scale * render_observed(scene, population, psf, survey.pixel_scale)
    return SimulatedObservation(
        image=survey.observe(mean, band, rng).astype(np.float32),
        variance=survey.variance(mean, band).astype(np.float32),
        mean=mean.astype(np.float32),
        psf=render_psf(psf, survey.pixel_scale, size=psf_size, oversampling=psf_oversampling).astype(np.float32),
        truth=(flux_scale * render_truth(scene, population)).astype(np.float32),
        pixel_scale=survey.pixel_scale,
        psf_scale=survey.pixel_scale / psf_oversampling,
    )


def simulate_observations(
    population: Population,
    survey: Survey,
    band: Band,
    count: int,
    seed: int,
    *,
    psf_size: int,
    psf_oversampling: int,
    workers: int = 1,
) -> SimulatedObservation:
    """Observations of `count` scenes, those of `render_truths` with the same seed, stacked on a leading axis.

    Arguments: as `simulate_observation` and `render_truths`.

    Returns:
        One SimulatedObservation whose arrays are (count, ...) float32.
    """
    task = _ObservationChunk(population, seed, survey, band, psf_size, psf_oversampling)
    parts = [o for _, chunk in in_chunks(task, count, workers) for o in chunk]
    stacked = {name: np.stack([getattr(o, name) for o in parts]) for name in ("image", "variance", "mean", "psf", "truth")}
    return SimulatedObservation(**stacked, pixel_scale=survey.pixel_scale, psf_scale=survey.pixel_scale / psf_oversampling)


def render_observed(scene: Scene, population: Population, psf: Psf, pixel_scale: float) -> np.ndarray:
    """A scene through PSF and pixel, without noise: (n, n) nJy per pixel, n = round(6.4 arcsec / pixel)."""
    size = round(TRUTH_SIZE * TRUTH_SCALE / pixel_scale)
    grid = FourierGrid.covering(size, pixel_scale, step=psf.sampling, box=4 * size * pixel_scale)
    transfer = _transfer(psf, grid.kx, grid.ky) * pixel_transfer(pixel_scale, grid)
    return grid.sample(_scene_spectrum(scene, population, grid) * transfer, size, pixel_scale)


@dataclass(frozen=True)
class _TruthChunk:
    """Renders truths start .. stop; a picklable function."""

    population: Population
    seed: int
    colours: Colours | None

    def __call__(self, start: int, stop: int) -> np.ndarray:
        return np.stack([self._one(number) for number in range(start, stop)])

    def _one(self, number: int) -> np.ndarray:
        scene = scene_of(self.population, self.seed, number)
        if self.colours is None:
            return render_truth(scene, self.population).astype(np.float32)
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(number, 0)))
        return np.stack([render_truth(band, self.population).astype(np.float32) for band in in_bands(scene, self.colours, rng)])


@dataclass(frozen=True)
class _ObservationChunk:
    """Simulates observations start .. stop; a picklable function."""

    population: Population
    seed: int
    survey: Survey
    band: Band
    psf_size: int
    psf_oversampling: int

    def __call__(self, start: int, stop: int) -> list[SimulatedObservation]:
        return [self._one(number) for number in range(start, stop)]

    def _one(self, number: int) -> SimulatedObservation:
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(number, 1)))
        scene = scene_of(self.population, self.seed, number)
        return simulate_observation(
            scene, self.population, self.survey, self.band, rng,
            psf_size=self.psf_size, psf_oversampling=self.psf_oversampling,
        )  # fmt: skip


def _scene_spectrum(scene: Scene, population: Population, grid: FourierGrid) -> np.ndarray:
    """Fourier transform of the sky, no PSF: (len(ky), len(kx)) complex, origin at the centre of the field."""
    kx, ky = grid.kx, grid.ky
    if scene.segmentation is not None:
        return image_spectrum(_segmented(scene, population), _FINE_SCALE, grid) / _hst_transfer(kx, ky)
    spectrum = _profiles_spectrum(scene, kx, ky)
    for component in scene.components:
        if isinstance(component, Knots):
            spectrum += knots_spectrum(component, kx, ky)
    discs = _discs_on_fine_grid(scene)
    if discs is not None:
        spectrum += image_spectrum(discs * _FINE_SCALE**2, _FINE_SCALE, grid)
    stamps = [c for c in scene.components if isinstance(c, Stamp)]
    if stamps:
        fine = raster.coordinates(_FINE_SIZE, _FINE_SCALE)
        sigma = _DETECTION_FWHM * raster.FWHM_TO_SIGMA
        image = sum(_render_stamp(stamp, population, fine, sigma) for stamp in stamps) * _FINE_SCALE**2
        gaussian = gaussian_transfer(sigma, kx, ky)
        spectrum += image_spectrum(image, _FINE_SCALE, grid) / np.maximum(gaussian, _NUMERICAL_FLOOR)
    return spectrum


def _profiles_spectrum(scene: Scene, kx: np.ndarray, ky: np.ndarray) -> np.ndarray:
    """Sum of the Fourier transforms of the Sersic profiles and stars."""
    spectrum = np.zeros((len(ky), len(kx)), complex)
    for component in scene.components:
        if isinstance(component, Sersic | Star):
            phase = np.exp(-1j * ky * component.y)[:, None] * np.exp(-1j * kx * component.x)
            spectrum += phase * (component.flux if isinstance(component, Star) else _sersic_spectrum(component, kx, ky))
    return spectrum


def _sersic_spectrum(profile: Sersic, kx: np.ndarray, ky: np.ndarray) -> np.ndarray:
    """Flux times F(r_half |(k_u / sqrt(q), k_v sqrt(q))|) of a centred profile; u is the major axis, r_half / sqrt(q) long."""
    cos, sin, root = np.cos(profile.angle), np.sin(profile.angle), np.sqrt(profile.axis_ratio)
    along = (kx * cos + ky[:, None] * sin) / root
    across = (ky[:, None] * cos - kx * sin) * root
    return profile.flux * lookup(_sersic_table(profile.index), np.hypot(along, across) * profile.half_light_radius)


def _render_profiles(scene: Scene, size: int, scale: float, fwhm: float) -> np.ndarray | float:
    """Sersic profiles and stars by one FFT on a grid fine enough for the Gaussian and wide enough for the wings."""
    profiles = [c for c in scene.components if isinstance(c, Sersic | Star)]
    if not profiles:
        return 0.0
    largest = max((c.half_light_radius for c in profiles if isinstance(c, Sersic)), default=0.0)
    box = (2 if largest < 0.8 else 4) * size * scale
    grid = FourierGrid.covering(size, scale, step=0.34 * fwhm, box=box)
    transfer = gaussian_transfer(fwhm * raster.FWHM_TO_SIGMA, grid.kx, grid.ky)
    return grid.sample(_profiles_spectrum(scene, grid.kx, grid.ky) * transfer, size, scale)


def _discs_on_fine_grid(scene: Scene) -> np.ndarray | None:
    """Surface brightness of the patterned discs on the fine raster, not convolved; None without discs."""
    fine = raster.coordinates(_FINE_SIZE, _FINE_SCALE)
    discs = [raster.render_disc(c, fine) for c in scene.components if isinstance(c, PatternedDisc)]
    return sum(discs) if discs else None


def _segmented(scene: Scene, population: Population) -> np.ndarray:
    """A scene at HST resolution with noise, cut at its isophote, on the fine raster: flux per fine pixel."""
    image = render(scene, population, _FINE_SIZE, _FINE_SCALE, _DETECTION_FWHM)
    return raster.segmented(image, scene.segmentation, _FINE_SCALE)


def _render_stamp(stamp: Stamp, population: Population, points: np.ndarray, sigma: float) -> np.ndarray:
    """A real galaxy with its PSF replaced by a Gaussian: (N, N) surface brightness on the points."""
    galaxy, psf = population.sample.stamps[stamp.number], population.sample.psfs[stamp.number]
    return raster.render_stamp(stamp, galaxy, psf, STAMP_SCALE, points, sigma)


@lru_cache(maxsize=8)
def _resampling(size: int, scale: float, sigma: float) -> sparse.csr_matrix:
    fine = raster.coordinates(_FINE_SIZE, _FINE_SCALE)
    return raster.gaussian_resampling(raster.coordinates(size, scale), fine, sigma)


@lru_cache(maxsize=1)
def _sharpening() -> np.ndarray:
    """Transfer from HST resolution to the target, on the FFT grid of the fine raster."""
    grid = FourierGrid(_FINE_SIZE, _FINE_SCALE)
    return gaussian_transfer(TRUTH_FWHM * raster.FWHM_TO_SIGMA, grid.kx, grid.ky) / _hst_transfer(grid.kx, grid.ky)


def _hst_transfer(kx: np.ndarray, ky: np.ndarray) -> np.ndarray:
    """Diffraction of HST at 0.8 micron, kept above the numerical floor."""
    hst = JitteredAiry(wavelength=800.0, diameter=2.4, obscuration=0.33, jitter=0.0, e1=0.0, e2=0.0)
    return np.maximum(_transfer(hst, kx, ky), _NUMERICAL_FLOOR)


def _transfer(psf: Psf, kx: np.ndarray, ky: np.ndarray) -> np.ndarray:
    """Transfer function of a PSF, F(S k) with S the shear: (len(ky), len(kx)) real, 1 at the origin."""
    distortion = psf.e1**2 + psf.e2**2
    g1, g2 = (e / (1 + np.sqrt(1 - distortion)) for e in (psf.e1, psf.e2))
    along, across = kx * (1 + g1) + ky[:, None] * g2, kx * g2 + ky[:, None] * (1 - g1)
    k = np.hypot(along, across) / np.sqrt(1 - g1**2 - g2**2)
    if isinstance(psf, Kolmogorov):
        return lookup(_kolmogorov_table(), k * psf.fwhm)
    if isinstance(psf, Moffat):
        return lookup(_moffat_table(psf.beta), k * psf.fwhm)
    diffraction = np.rad2deg(psf.wavelength * 1e-9 / psf.diameter) * 3600
    return lookup(_airy_table(psf.obscuration), k * diffraction) * np.exp(-0.5 * (psf.jitter * k) ** 2)


def _tabulated(profile: galsim.GSObject) -> Table:
    """Fourier transform of a round profile of unit flux against log k, k = 1e-3 .. 1e3 in units of its size."""
    logk = np.linspace(np.log(1e-3), np.log(1e3), 2500)
    return logk, np.array([profile.kValue(k, 0.0).real for k in np.exp(logk)])


@lru_cache(maxsize=64)
def _sersic_table(index: float) -> Table:
    return _tabulated(galsim.Sersic(index, half_light_radius=1.0))


@lru_cache(maxsize=1)
def _kolmogorov_table() -> Table:
    return _tabulated(galsim.Kolmogorov(fwhm=1.0))


@lru_cache(maxsize=512)
def _moffat_table(beta: float) -> Table:
    return _tabulated(galsim.Moffat(beta=beta, fwhm=1.0))


@lru_cache(maxsize=8)
def _airy_table(obscuration: float) -> Table:
    return _tabulated(galsim.Airy(lam_over_diam=1.0, obscuration=obscuration))
