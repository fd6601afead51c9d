"""Synthetic supernova remnants: maps of physical parameters, and the X-ray cubes that an instrument counts of them.

A pixel is A_T S_T(E; kT, z) + A_S S_S(E; Γ), absorbed by one n_H, folded with a real response. The maps are a smooth random
field with sharp clumps and a filament on it, so that a method that only smooths is seen to fail at the edges, and one that
does not smooth is seen to fail elsewhere. The spectra are an order-of-magnitude simulator, no plasma code: for benchmarks.
Invariant: a scene is a function of its seed, and counts are a function of the scene, the median and the seed of the noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.data.response_files import join, read_absorption, read_arf, read_lines, read_rmf
from diffinv.spectral.combine import Fixed, Product
from diffinv.spectral.continuum import PowerLaw
from diffinv.spectral.lines import Thermal
from diffinv.spectral.response import Binning, Folded, Response

KT, Z, GAMMA = (0.6, 5.0), (-0.033, 0.033), (1.8, 3.2)
TURBULENCE, COLUMN = 1000.0, 0.7  # km/s, 1e22 cm⁻²
ABUNDANCES = {"Ne": 1.0, "Mg": 1.0, "Si": 3.0, "S": 3.0, "Ar": 3.0, "Ca": 3.0, "Fe": 1.0}
ENERGIES, CHANNELS_A_BIN = (1.02, 6.98), 2  # keV
EXPOSURE = 75141.0  # s
CROSS_SECTION_UNIT = 1e-22  # cm², of the table
SLOPE = 6.0  # of the maps' power spectra: 2×2 binning then errs as in the benchmark's table (3.5 %, 490 km/s at 852 counts)
_EDGE = 0.02  # of a map's range that a field keeps away from its ends


@dataclass(frozen=True, eq=False)
class Remnant:
    """The two spectra of the benchmark as counts a channel. thermal: θ = (kT, z). synchrotron: θ = (Gamma,)."""

    thermal: Folded
    synchrotron: Folded

    @property
    def response(self) -> Response:
        return self.thermal.response


def remnant_binning(low: np.ndarray, high: np.ndarray) -> Binning:
    """The benchmark's channels: 1.02–6.98 keV, two a bin (205 bins for ACIS)."""
    return Binning.window(low, high, *ENERGIES, CHANNELS_A_BIN)


def read_remnant(folder: Path, *, binned: bool = True) -> Remnant:
    """The spectra behind the response of observation 9774.

    Arguments: folder: of the X-ray data (9774.rmf, 9774.arf, snr_lines.csv, xsect_tbabs_wilm.fits). binned: the benchmark's
        channels, else all of the detector.
    Raises: InputError if a file is missing or damaged.
    """
    rmf, arf = read_rmf(folder / "9774.rmf"), read_arf(folder / "9774.arf")
    response = join(rmf, arf, remnant_binning(rmf.low, rmf.high) if binned else None)
    absorption = read_absorption(folder / "xsect_tbabs_wilm.fits", response.grid, unit=CROSS_SECTION_UNIT)
    plasma = Product((Thermal(response.grid, read_lines(folder / "snr_lines.csv")), absorption))
    held = {"v_turb": TURBULENCE, "n_H": COLUMN, **ABUNDANCES}
    power = Fixed(Product((PowerLaw(response.grid), absorption)), (("n_H", COLUMN),))
    return Remnant(Folded(Fixed(plasma, tuple(held.items())), response, EXPOSURE), Folded(power, response, EXPOSURE))


@dataclass(frozen=True, eq=False)
class Scene:
    """Maps (H, W) of one remnant. kT: keV. z. gamma. brightness: relative. share: of the counts that is synchrotron, [0, 1)."""

    kT: np.ndarray
    z: np.ndarray
    gamma: np.ndarray
    brightness: np.ndarray
    share: np.ndarray


def draw_scene(seed: int, size: int = 64, *, components: int = 1) -> Scene:
    """A remnant.

    Arguments: seed. size: H = W, pixels. components: 1 (thermal alone) or 2 (with synchrotron).
    Raises: DiffinvError if components is neither.
    """
    if components not in (1, 2):
        raise DiffinvError(f"draw_scene: {components} components; give 1 (thermal) or 2 (with synchrotron).")
    rng = np.random.default_rng([seed, 6])
    clumps, filament = _clumps(rng, size), _filament(rng, size)

    def between(ends: tuple[float, float], slope: float, *, on_filament: float, contrast: float = 0.35) -> np.ndarray:
        """A field from end to end: random, shifted within clumps (each its own way), drawn to a value on the filament."""
        field = _uniform_field(rng, size, slope)
        for clump in clumps:
            field = np.where(clump, field + contrast * rng.choice([-1.0, 1.0]), field)
        field = (1 - filament) * np.clip(field, _EDGE, 1 - _EDGE) + filament * on_filament
        return ends[0] + (ends[1] - ends[0]) * field

    kT = np.exp(between((np.log(KT[0]), np.log(KT[1])), SLOPE, on_filament=0.85))
    z = between(Z, SLOPE, on_filament=0.9)
    inside = np.any(clumps, axis=0)
    brightness = np.exp(1.2 * (_uniform_field(rng, size, 2.5) - 0.5)) * (1 + 0.8 * inside + 0.8 * filament)
    gamma = between(GAMMA, SLOPE, on_filament=0.3, contrast=0.2)
    share = between((0.15, 0.75), SLOPE, on_filament=1.0) if components == 2 else np.zeros((size, size))
    return Scene(kT, z, gamma, brightness, share)


@dataclass(frozen=True, eq=False)
class MockCube:
    """Counts of a scene. counts, expected: (K, H, W). thermal, synchrotron: amplitudes of the two spectra, (H, W)."""

    scene: Scene
    counts: np.ndarray
    expected: np.ndarray
    thermal: np.ndarray
    synchrotron: np.ndarray


def observe(scene: Scene, remnant: Remnant, *, median: float, seed: int) -> MockCube:
    """Poisson counts of a scene, brightened until the median pixel expects `median` counts.

    Arguments: scene. remnant: spectra in the channels of the cube. median: counts a pixel. seed: of the noise.
    """
    hot, power = _spectra(remnant, scene)
    total = scene.brightness * median / np.median(scene.brightness)
    thermal, synchrotron = total * (1 - scene.share) / hot.sum(0), total * scene.share / power.sum(0)
    expected = thermal * hot + synchrotron * power
    return MockCube(scene, np.random.default_rng([seed, 7]).poisson(expected), expected, thermal, synchrotron)


def expected_counts(cube: MockCube, remnant: Remnant) -> np.ndarray:
    """What the same remnant gives in other channels, those of `remnant`: (K, H, W)."""
    hot, power = _spectra(remnant, cube.scene)
    return cube.thermal * hot + cube.synchrotron * power


def _spectra(remnant: Remnant, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Counts of both spectra at amplitude 1, (K, H, W) each."""
    thermal, synchrotron = np.stack([scene.kT, scene.z], -1), scene.gamma[..., None]
    return _map(remnant.thermal, thermal), _map(remnant.synchrotron, synchrotron)


def _map(model: Folded, theta: np.ndarray) -> np.ndarray:
    """(K, H, W) of maps (H, W, P)."""
    rows: Tensor = torch.from_numpy(rearrange(theta, "h w p -> (h w) p"))
    values = torch.cat([model(part) for part in rows.split(1024)]).numpy()
    return rearrange(values, "(h w) k -> k h w", h=len(theta))


def _uniform_field(rng: np.random.Generator, size: int, slope: float) -> np.ndarray:
    """A periodic Gaussian field of power spectrum k^−slope, its ranks spread evenly over (0, 1): (size, size)."""
    k = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    k[0, 0] = np.inf
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) * k ** (-slope / 2), s=(size, size))
    ranks = np.empty(size * size)
    ranks[np.argsort(field, axis=None)] = np.arange(size * size)
    return ((ranks + 0.5) / size**2).reshape(size, size)


def _clumps(rng: np.random.Generator, size: int, count: int = 5) -> list[np.ndarray]:
    """Discs with sharp edges, radius 1/20 to 1/9 of the field: masks (size, size)."""
    y, x = np.mgrid[:size, :size]
    centres, radii = rng.uniform(0.12, 0.88, (count, 2)) * size, rng.uniform(0.05, 0.11, count) * size
    return [np.hypot(y - cy, x - cx) < r for (cy, cx), r in zip(centres, radii, strict=True)]


def _filament(rng: np.random.Generator, size: int) -> np.ndarray:
    """A bent ridge across the field, Gaussian of σ = size/50 pixels: weight in [0, 1], (size, size)."""
    y, x = np.mgrid[:size, :size] / size
    angle, phase, offset = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi), rng.uniform(-0.15, 0.15)
    along = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
    across = (y - 0.5) * np.cos(angle) - (x - 0.5) * np.sin(angle)
    return np.exp(-0.5 * ((across - offset - 0.12 * np.sin(5 * along + phase)) * 50) ** 2)
