"""Mock observations: galaxies of the simulated population as a survey sees them, one observation file each, with the truth.

Without the COSMOS tables, the shapes of the population are drawn from plain distributions: lognormal half-light radii
(median 0.4″), Sérsic indices about 1.2 and magnitudes 20.5–24.5. Invariant: object i of a set depends on (seed, i) only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffinv.core.checks import ConfigError
from diffinv.data.atomic import write_atomically
from diffinv.data.fits import Cards, Plane, encode_fits, read_images, read_table
from diffinv.data.galaxies import CosmosSample, Population, cosmos_sample
from diffinv.data.simulate import TRUTH_FWHM, SimulatedObservation, scene_of, simulate_observation
from diffinv.data.surveys import EUCLID_VIS, HSC_WIDE, LSST, LSST_YEAR_1, Survey

SURVEYS: dict[str, Survey] = {"lsst": LSST, "lsst_year_1": LSST_YEAR_1, "hsc_wide": HSC_WIDE, "euclid_vis": EUCLID_VIS}
ANALYTIC_SHAPES = 400


@dataclass(frozen=True)
class Mocks:
    """A set of mock observations.

    survey: a name of `SURVEYS`. bands: of the survey. count, seed: object i depends on (seed, i). psf_size: pixels a side.
    flux_ratios: flux in each band over the first's scene, None for 1. cosmos: folder of the COSMOS tables and stamps, or None.
    """

    survey: str
    bands: tuple[str, ...]
    count: int
    seed: int
    psf_size: int
    flux_ratios: tuple[float, ...] | None
    cosmos: Path | None

    def __post_init__(self) -> None:
        known = [band.name for band in SURVEYS[self.survey].bands]
        for name in self.bands:
            if name not in known:
                raise ConfigError(f"simulate.bands: {self.survey} has no band {name!r}; it has {', '.join(known)}.")
        if self.flux_ratios is not None and len(self.flux_ratios) != len(self.bands):
            raise ConfigError(
                f"simulate.flux_ratios: {len(self.flux_ratios)} values for {len(self.bands)} bands; give one a band."
            )

    def write(self, out: Path) -> Iterator[Path]:
        """Write `out/mock-<seed>-<number>.fits`, one after the other, and say where."""
        population = self.population()
        for number in range(self.count):
            path = out / f"mock-{self.seed}-{number:04d}.fits"
            write_atomically(path, encode_fits(self.planes(population, number)))
            yield path

    def population(self) -> Population:
        """The COSMOS population, or the analytic one without real stamps."""
        if self.cosmos is None:
            return Population(analytic_sample(np.random.default_rng(0))).without_stamps()
        try:
            table = read_table(self.cosmos / "parametric_fits.fits")
            stamps, psfs = (read_images(self.cosmos / f"hst_f814w_{what}.fits") for what in ("stamps", "psfs"))
            return Population(cosmos_sample(table, stamps, psfs))
        except (ValueError, IndexError) as error:  # an unreadable file; columns that are missing or of another shape
            raise ConfigError(
                f"simulate.cosmos: {self.cosmos} has no usable tables and stamps ({error}); leave it out to do without."
            ) from error

    def planes(self, population: Population, number: int) -> list[Plane]:
        """The HDUs of one observation file: SCI, VAR, PSF and TRUTH a band."""
        survey, scene = SURVEYS[self.survey], scene_of(population, self.seed, number)
        ratios = self.flux_ratios or (1.0,) * len(self.bands)
        parts = [Plane("PRIMARY", None, {"OBJECT": f"mock-{self.seed}-{number:04d}", "ORIGIN": "diffinv simulate"})]
        for extver, (name, ratio) in enumerate(zip(self.bands, ratios), start=1):
            observed = simulate_observation(
                scene,
                population,
                survey,
                survey.band(name),
                np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(number, extver))),
                psf_size=self.psf_size,
                psf_oversampling=1,
                flux_scale=ratio,
            )
            parts += band_planes(observed, name, survey.name, extver)
        return parts


def band_planes(observed: SimulatedObservation, band: str, instrument: str, extver: int) -> list[Plane]:
    """One band as the HDUs of an observation file, in nJy on pixels centred on (RA, Dec) = (150°, 2°)."""
    data = sky_cards(observed.image.shape, observed.pixel_scale)
    truth = sky_cards(observed.truth.shape, observed.truth_scale)
    common = {"BAND": band, "INSTRUME": instrument, "ZEROPNT": 31.4}
    norm = float(observed.psf.sum(dtype=np.float64))
    return [
        Plane("SCI", observed.image, {**data, **common, "BUNIT": "nJy"}, extver),
        Plane("VAR", observed.variance, {**data, **common, "BUNIT": "nJy2"}, extver),
        Plane("PSF", observed.psf, {"BAND": band, "OVERSAMP": 1, "PSFKIND": "effective", "PSFNORM": norm}, extver),
        Plane("TRUTH", observed.truth, {**truth, **common, "BUNIT": "nJy", "TPSFFWHM": TRUTH_FWHM}, extver),
    ]


def sky_cards(shape: tuple[int, int], pixel_scale: float) -> Cards:
    """A tangential WCS, north up and east left, whose centre is that of the image."""
    cards = {"WCSAXES": 2, "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CUNIT1": "deg", "CUNIT2": "deg", "RADESYS": "ICRS"}
    cards |= {"CRPIX1": (shape[1] + 1) / 2, "CRPIX2": (shape[0] + 1) / 2, "CRVAL1": 150.0, "CRVAL2": 2.0}
    return {**cards, "CDELT1": -pixel_scale / 3600, "CDELT2": pixel_scale / 3600}


def analytic_sample(rng: np.random.Generator) -> CosmosSample:
    """Shapes from plain distributions in the place of measured ones, and no stamps."""
    n = ANALYTIC_SHAPES
    radius = np.exp(np.log(0.4) + 0.6 * rng.standard_normal(n)).clip(0.08, 2.0)
    index = np.exp(np.log(1.2) + 0.5 * rng.standard_normal(n)).clip(0.5, 5.0)
    singles = np.stack([index, radius, rng.uniform(0.2, 1.0, n)], 1)
    bulge = radius * rng.uniform(0.15, 0.6, n)
    pairs = np.stack([radius, rng.uniform(0.2, 1.0, n), bulge, rng.uniform(0.5, 1.0, n), rng.beta(1.5, 3.0, n)], 1)
    return CosmosSample(singles, pairs, rng.uniform(20.5, 24.5, n), (), (), np.zeros(0))
