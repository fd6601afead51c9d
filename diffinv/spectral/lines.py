"""Emission lines, each a Gaussian integrated over the bins.

    photons in bin = f · ½ [erf((hi − c)/√2 σ) − erf((lo − c)/√2 σ)]

A plasma's lines lie at c = E₀/(1 + z) with σ/c = σ_v/c_light, σ_v² = v_turb² + kT/m_Z (turbulent and thermal widths).
Invariant: a line that lies within the grid has all its photons in it, however it falls on the bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError
from diffinv.spectral.base import BAND, LIGHT_SPEED, Grid, Parameter, SpectralModel, check_energies
from diffinv.spectral.continuum import REDSHIFT, TEMPERATURE, bremsstrahlung

TURBULENCE = Parameter("v_turb", "km/s", 100.0, 3000.0)
_REACH = 8
_KEV_A_UNIT = 931494.10242  # rest energy of one atomic mass unit
ATOMIC_MASS = {"C": 12.011, "N": 14.007, "O": 15.999, "Ne": 20.180, "Mg": 24.305, "Al": 26.982, "Si": 28.085, "S": 32.06}
ATOMIC_MASS |= {"Ar": 39.95, "Ca": 40.078, "Cr": 51.996, "Mn": 54.938, "Fe": 55.845, "Ni": 58.693}


def gaussian_in_bins(edges: Tensor, centre: Tensor, sigma: Tensor) -> Tensor:
    """Share of a Gaussian in each bin: (B, E) of edges (E + 1,), centre and sigma (B,)."""
    return 0.5 * torch.erf((edges - centre[:, None]) / (math.sqrt(2) * sigma[:, None])).diff(dim=1)


def add_line(total: Tensor, grid: Grid, photons: Tensor, centre: Tensor, sigma: Tensor) -> None:
    """Add `photons` of a Gaussian line to the bins that it reaches; what lies beyond 8σ, 1e-15, is left out.

    Arguments: total: (B, E), added to in place. grid. photons, centre, sigma: (B,).
    """
    ends = torch.stack([(centre - _REACH * sigma).min(), (centre + _REACH * sigma).max()]).detach()
    first, last = torch.searchsorted(grid.edges, ends).tolist()
    first = max(first - 1, 0)
    if last > first:
        total[:, first:last] += photons[:, None] * gaussian_in_bins(grid.edges[first : last + 1], centre, sigma)


@dataclass(frozen=True, eq=False)
class LineTable:
    """Lines of a plasma.

    Arguments:
        energy: at rest, keV, (L,). element: symbol of each. strength: in the table's unit, (L,).
        peak: temperature kT_peak of largest emissivity, keV, (L,). spread: s, its width in log₁₀ kT, (L,).
    Raises: DiffinvError if an element is unknown or a number is not positive; ShapeError if lengths differ.
    """

    energy: Tensor
    element: tuple[str, ...]
    strength: Tensor
    peak: Tensor
    spread: Tensor

    def __post_init__(self) -> None:
        columns = (self.energy, self.strength, self.peak, self.spread)
        if any(tuple(c.shape) != (len(self.element),) for c in columns):
            raise ShapeError(f"LineTable: columns of {[tuple(c.shape) for c in columns]} for {len(self.element)} elements.")
        unknown = sorted(set(self.element) - set(ATOMIC_MASS))
        if unknown:
            raise DiffinvError(f"LineTable: unknown elements {', '.join(unknown)}; known are {', '.join(ATOMIC_MASS)}.")
        if not all(bool((c > 0).all()) for c in columns):
            raise DiffinvError("LineTable: energies, strengths, peaks and spreads must be > 0.")

    @property
    def elements(self) -> tuple[str, ...]:
        """Each element once, in the order of the table."""
        return tuple(dict.fromkeys(self.element))


@dataclass(frozen=True, eq=False)
class ThermalLines(SpectralModel):
    """Lines of a hot plasma, θ = (kT, z, v_turb, A_Z of each element in solar units).

    Photons of a line: 0.017 (0.030 above 6 keV) · strength · A_Z · exp(−(log₁₀ kT/kT_peak)²/2s²), in the unit of
    `Bremsstrahlung`.
    Arguments: grid, in keV. lines.
    """

    grid: Grid
    lines: LineTable

    def __post_init__(self) -> None:
        check_energies("ThermalLines", self.grid)

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        abundances = (Parameter(element, "solar", 0.0, 10.0) for element in self.lines.elements)
        return (TEMPERATURE, REDSHIFT, TURBULENCE, *abundances)

    def evaluate(self, theta: Tensor) -> Tensor:
        kT, z, turbulence = theta[:, 0], theta[:, 1], theta[:, 2]
        photons = self._photons(kT, theta[:, 3:])
        total = theta.new_zeros(len(theta), len(self.grid))
        for number, element in enumerate(self.lines.element):
            centre = self.lines.energy[number] / (1 + z)
            thermal = kT / (ATOMIC_MASS[element] * _KEV_A_UNIT)
            sigma = centre * torch.sqrt((turbulence / LIGHT_SPEED) ** 2 + thermal)
            add_line(total, self.grid, photons[:, number], centre, sigma)
        return total

    def _photons(self, kT: Tensor, abundance: Tensor) -> Tensor:
        """(B, L)."""
        lines = self.lines
        scale = (0.017 + 0.013 * (lines.energy > 6).to(lines.strength)) * lines.strength
        distance = torch.log10(kT[:, None] / lines.peak) / lines.spread
        which = [lines.elements.index(element) for element in lines.element]
        return scale * abundance[:, which] * torch.exp(-0.5 * distance**2)


@dataclass(frozen=True, eq=False)
class Thermal(SpectralModel):
    """A hot plasma: bremsstrahlung and lines of one temperature and redshift, θ as `ThermalLines`.

    Arguments: grid, in keV. lines.
    """

    grid: Grid
    lines: LineTable

    @cached_property
    def _lines(self) -> ThermalLines:
        return ThermalLines(self.grid, self.lines)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self._lines.parameters

    def evaluate(self, theta: Tensor) -> Tensor:
        return bremsstrahlung(self.grid, theta[:, 0], theta[:, 1]) + self._lines.evaluate(theta)


@dataclass(frozen=True, eq=False)
class GaussianLines(SpectralModel):
    """Lines that move together, θ = (velocity, width), both km/s; velocity is positive away from us.

    A line at c₀ is seen at c₀/(1 + v/c) in keV, c₀ (1 + v/c) in Angstrom, with standard deviation c · width/c_light.
    Arguments:
        grid: keV or Angstrom. centres: c₀ in the grid's unit, (L,). strengths: flux of each line at amplitude 1, (L,).
        velocity, width: the two parameters.
    Raises: DiffinvError if the grid has no wavelengths.
    """

    grid: Grid
    centres: Tensor
    strengths: Tensor
    velocity: Parameter
    width: Parameter

    def __post_init__(self) -> None:
        if self.grid.unit == BAND:
            raise DiffinvError("GaussianLines: the channels have no wavelengths, only numbers; give their axis.")

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (self.velocity, self.width)

    @cached_property
    def _shift(self) -> Callable[[Tensor], Tensor]:
        return torch.reciprocal if self.grid.unit == "keV" else torch.clone

    def evaluate(self, theta: Tensor) -> Tensor:
        factor = self._shift(1 + theta[:, 0] / LIGHT_SPEED)
        total = theta.new_zeros(len(theta), len(self.grid))
        for centre, strength in zip(self.centres, self.strengths, strict=True):
            seen = centre * factor
            add_line(total, self.grid, strength.expand(len(theta)), seen, seen * theta[:, 1] / LIGHT_SPEED)
        return total
