"""The Chandra spectrum of 3C 273 as a problem: an absorbed power law, counts with their background, 0.5–7 keV.

θ = (Γ, n_H in 1e22 cm⁻², ln norm in photons cm⁻² s⁻¹ keV⁻¹ at 1 keV); −2 log p is the W statistic of ungrouped channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffinv.data.ogip import background_ratio, check_channels, read_spectrum
from diffinv.data.remnants import CROSS_SECTION_UNIT
from diffinv.data.response_files import join, read_absorption, read_arf, read_rmf
from diffinv.spectral.combine import Product
from diffinv.spectral.continuum import PowerLaw
from diffinv.spectral.response import Binning, Folded
from diffinv.spectral.statistics import Maximum, maximum_likelihood, w_statistic

NAMES = ("Gamma", "n_H", "ln norm")
ENERGIES = (0.5, 7.0)
START = (2.0, 0.05, -8.5)


@dataclass(frozen=True, eq=False)
class Parts:
    """What W(θ) is made of. edges: keV, (E + 1,). cross_section: 1e-22 cm², (E,). matrix: cm², (E, K). exposure: s.
    counts, background: (K,). ratio: expected background counts per one in the source's region."""

    model: Folded
    edges: Tensor
    cross_section: Tensor
    matrix: Tensor
    exposure: float
    counts: Tensor
    background: Tensor
    ratio: Tensor


def quasar_parts(folder: Path) -> Parts:
    """Read from the files of 3C 273."""
    source = read_spectrum(folder / "3c273.pi")
    background, rmf = read_spectrum(source.background), read_rmf(source.rmf)
    check_channels(source, rmf)
    binning = Binning.window(rmf.low, rmf.high, *ENERGIES)
    response = join(rmf, read_arf(source.arf), binning)
    absorption = read_absorption(folder / "xsect_tbabs_wilm.fits", response.grid, unit=CROSS_SECTION_UNIT)
    model = Folded(Product((PowerLaw(response.grid), absorption)), response, source.exposure)
    counts, others = (torch.from_numpy(binning.sum(s.counts)) for s in (source, background))
    ratio = torch.tensor(background_ratio(source, background)[0])
    grid = response.grid.edges
    return Parts(model, grid, absorption.cross_section, response.matrix, source.exposure, counts, others, ratio)


def quasar_statistic(folder: Path) -> tuple[Callable[[Tensor], Tensor], int]:
    """W(θ) of θ (3,) in float64, and the number of channels."""
    parts = quasar_parts(folder)

    def statistic(theta: Tensor) -> Tensor:
        mean = torch.exp(theta[2]) * parts.model(theta[None, :2])[0]
        return w_statistic(parts.counts, parts.background, parts.ratio, mean)

    return statistic, len(parts.counts)


def quasar_fit(folder: Path) -> tuple[Maximum, int]:
    """The maximum of the likelihood, and the number of channels."""
    statistic, channels = quasar_statistic(folder)
    return maximum_likelihood(statistic, torch.tensor(START, dtype=torch.float64)), channels
