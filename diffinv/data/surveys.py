"""Surveys as plain numbers: pixel scale, depth, seeing and optics, and the PSFs drawn from them.

With g = 10^(-0.4 (zp - 31.4)) / t the nJy that one photo-electron stands for (zp: AB magnitude of one electron a second,
t: total exposure in seconds), sky level S = 10^(-0.4 (mu - zp)) t p^2 electrons on a pixel of side p, and R^2 the summed
variance of the read-outs, an image of mean m nJy has the variance

    v = g^2 (S + R^2) + g max(m, 0)      [nJy^2].

Numbers: galcheat (LSST.yaml, HSC.yaml, Euclid_VIS.yaml; LSE overview arXiv:0805.2366, HSC arXiv:2108.13045, Euclid
arXiv:1608.08603). Seeing medians, read noise and the jitter of VIS are those of the validation mocks.

Invariant: numpy only; a PSF model says what the atmosphere and optics do and never contains the pixel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from diffinv.data.scenes import ZERO_POINT_AB

_REFERENCE_WAVELENGTH = 756.469  # nm, LSST i


@dataclass(frozen=True)
class Kolmogorov:
    """Long-exposure atmosphere of this FWHM in arcsec, sheared by (e1, e2), e = (1 - q^2) / (1 + q^2)."""

    fwhm: float
    e1: float
    e2: float

    @property
    def sampling(self) -> float:
        """Step in arcsec beyond whose Nyquist wave number the transfer function is below 1e-4."""
        return self.fwhm / 5


@dataclass(frozen=True)
class Moffat:
    """I(r) ~ (1 + (r / r0)^2)^(-beta) of this FWHM in arcsec, sheared by (e1, e2)."""

    fwhm: float
    beta: float
    e1: float
    e2: float

    @property
    def sampling(self) -> float:
        """Step in arcsec beyond whose Nyquist wave number the transfer function is below 1e-4."""
        return self.fwhm / 5


@dataclass(frozen=True)
class JitteredAiry:
    """An obscured aperture (`wavelength` nm, `diameter` m, linear `obscuration`) and Gaussian `jitter` in arcsec, sheared."""

    wavelength: float
    diameter: float
    obscuration: float
    jitter: float
    e1: float
    e2: float

    @property
    def sampling(self) -> float:
        """Step in arcsec beyond whose Nyquist wave number the transfer function is nil: 0.95 lambda / (2 D), for the shear."""
        return 0.95 * np.rad2deg(self.wavelength * 1e-9 / self.diameter) * 3600 / 2


Psf = Kolmogorov | Moffat | JitteredAiry


@dataclass(frozen=True)
class Atmosphere:
    """Seeing FWHM, lognormal about `median_fwhm` at 756 nm, proportional to wavelength^-0.3; Moffat or Kolmogorov.

    Arguments:
        median_fwhm: arcsec, without the pixel.
        scatter: standard deviation of the logarithm.
        ellipticity: standard deviation of each component.
        moffat_fraction: probability of a Moffat profile.
        beta_range: of the Moffat profile.
    """

    median_fwhm: float
    scatter: float
    ellipticity: float
    moffat_fraction: float = 0.5
    beta_range: tuple[float, float] = (2.5, 4.5)

    def draw(self, wavelength: float, rng: np.random.Generator) -> Psf:
        """A PSF at this wavelength in nm."""
        colour = (wavelength / _REFERENCE_WAVELENGTH) ** -0.3
        fwhm = float(self.median_fwhm * colour * np.exp(self.scatter * rng.normal()))
        e1, e2 = (float(e) for e in rng.normal(0, self.ellipticity, 2))
        beta = float(np.round(rng.uniform(*self.beta_range), 1))  # a coarse grid: each is tabulated once
        return Moffat(fwhm, beta, e1, e2) if rng.random() < self.moffat_fraction else Kolmogorov(fwhm, e1, e2)


@dataclass(frozen=True)
class Telescope:
    """Diffraction of an obscured aperture with Gaussian jitter.

    Arguments:
        diameter: metres.
        obscuration: linear, the diameter of the hole over that of the mirror.
        jitter: standard deviation in arcsec, median.
        scatter: standard deviation of the logarithm of the jitter.
        ellipticity: standard deviation of each component.
    """

    diameter: float
    obscuration: float
    jitter: float
    scatter: float
    ellipticity: float

    def draw(self, wavelength: float, rng: np.random.Generator) -> Psf:
        """A PSF at this wavelength in nm."""
        jitter = float(self.jitter * np.exp(self.scatter * rng.normal()))
        e1, e2 = (float(e) for e in rng.normal(0, self.ellipticity, 2))
        return JitteredAiry(wavelength, self.diameter, self.obscuration, jitter, e1, e2)


@dataclass(frozen=True)
class Band:
    """One filter: AB magnitude of one electron a second, sky in mag / arcsec^2, total exposure in s, wavelength in nm."""

    name: str
    zero_point: float
    sky_brightness: float
    exposure_time: float
    wavelength: float


@dataclass(frozen=True)
class Survey:
    """A survey.

    Arguments:
        name: for messages.
        pixel_scale: arcsec.
        bands: its filters.
        optics: what PSFs are drawn from.
        read_variance: electrons^2 a pixel, summed over all read-outs.
    """

    name: str
    pixel_scale: float
    bands: tuple[Band, ...]
    optics: Atmosphere | Telescope
    read_variance: float = 0.0

    def band(self, name: str) -> Band:
        """The band of this name.

        Raises:
            ValueError: if the survey has no such band.
        """
        for band in self.bands:
            if band.name == name:
                return band
        raise ValueError(f"{self.name} has no band {name!r}; it has {', '.join(band.name for band in self.bands)}.")

    def sky_electrons(self, band: Band) -> float:
        """Mean number of sky electrons on a pixel, S = 10^(-0.4 (mu - zp)) t p^2."""
        return 10 ** (-0.4 * (band.sky_brightness - band.zero_point)) * band.exposure_time * self.pixel_scale**2

    def sky_variance(self, band: Band) -> float:
        """Variance of an empty pixel in nJy^2: g^2 (S + R^2)."""
        return flux_per_electron(band) ** 2 * (self.sky_electrons(band) + self.read_variance)

    def variance(self, mean: np.ndarray, band: Band) -> np.ndarray:
        """Variance plane in nJy^2 of an image of this mean in nJy (sky subtracted), any shape."""
        return self.sky_variance(band) + flux_per_electron(band) * np.maximum(mean, 0.0)

    def observe(self, mean: np.ndarray, band: Band, rng: np.random.Generator) -> np.ndarray:
        """A noisy, sky-subtracted image: Poisson electrons of source and sky, Gaussian read noise.

        Arguments:
            mean: any shape, nJy, may be slightly negative (real stamps are).
            band: the filter.
            rng: source of randomness.

        Returns:
            The shape of `mean`, nJy, with that mean and the variance of `variance`.
        """
        gain, sky = flux_per_electron(band), self.sky_electrons(band)
        electrons = rng.poisson(np.maximum(sky + mean / gain, 0.0)) - sky
        return gain * (electrons + np.sqrt(self.read_variance) * rng.standard_normal(mean.shape))

    def shortened(self, factor: float, name: str) -> Survey:
        """The same survey with all exposures (and read-outs) multiplied by `factor`."""
        bands = tuple(replace(band, exposure_time=band.exposure_time * factor) for band in self.bands)
        return replace(self, name=name, bands=bands, read_variance=self.read_variance * factor)


def flux_per_electron(band: Band) -> float:
    """nJy that one electron stands for: 10^(-0.4 (zp - 31.4)) / t."""
    return 10 ** (-0.4 * (band.zero_point - ZERO_POINT_AB)) / band.exposure_time


LSST = Survey(
    "LSST 10 years",
    0.2,
    (
        Band("u", 26.40, 22.99, 1680, 368.141),
        Band("g", 28.26, 22.26, 2400, 486.412),
        Band("r", 28.10, 21.20, 5520, 624.976),
        Band("i", 27.78, 20.48, 5520, 756.469),
        Band("z", 27.39, 19.60, 4800, 870.164),
        Band("y", 26.56, 18.61, 4800, 972.202),
    ),
    Atmosphere(median_fwhm=0.69, scatter=0.10, ellipticity=0.02),
)
LSST_YEAR_1 = LSST.shortened(0.1, "LSST 1 year")
HSC_WIDE = Survey(
    "HSC wide",
    0.168,
    (
        Band("g", 28.90, 21.4, 600, 484.370),
        Band("r", 28.86, 20.6, 600, 625.889),
        Band("i", 28.61, 19.7, 1200, 773.009),
        Band("z", 27.68, 18.3, 1200, 891.239),
        Band("y", 27.33, 17.9, 1200, 978.695),
    ),
    Atmosphere(median_fwhm=0.60, scatter=0.08, ellipticity=0.02),
)
EUCLID_VIS = Survey(
    "Euclid VIS",
    0.1,
    (Band("IE", 25.91, 22.3203, 4 * 565, 750.637),),
    Telescope(diameter=1.2, obscuration=0.36, jitter=0.06, scatter=0.02, ellipticity=0.005),
    read_variance=4 * 3.6**2,
)
