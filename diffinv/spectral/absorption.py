"""Photoelectric absorption by the gas on the way: T(E) = exp(−n_H σ(E)), a factor, not redshifted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.spectral.base import Grid, Parameter, SpectralModel, check_energies

COLUMN = Parameter("n_H", "1e22 cm-2", 0.0, 10.0)


@dataclass(frozen=True, eq=False)
class Absorption(SpectralModel):
    """exp(−n_H σ(E)) at the middle of the bin, θ = (n_H,) in 1e22 cm⁻².

    Arguments: grid, in keV. cross_section: σ at the middle of each bin in 1e-22 cm² a hydrogen atom, (E,).
    """

    grid: Grid
    cross_section: Tensor
    column: Parameter = COLUMN

    def __post_init__(self) -> None:
        check_energies("Absorption", self.grid)

    @classmethod
    def tabulated(cls, grid: Grid, energy: Tensor, sigma: Tensor, column: Parameter = COLUMN) -> Absorption:
        """σ interpolated, linearly in log σ and log E.

        Arguments: grid. energy: keV, (N,), increasing. sigma: cm² a hydrogen atom, (N,), > 0.
        Raises: DiffinvError if the table does not cover the grid.
        """
        middle = grid.middle
        if not bool(middle[0] >= energy[0]) or not bool(middle[-1] <= energy[-1]):
            raise DiffinvError(
                f"Absorption: cross-sections of {float(energy[0]):.5g}–{float(energy[-1]):.5g} keV do not cover the model's "
                f"{grid.describe()}; cut the grid or give a longer table."
            )
        place = torch.searchsorted(energy, middle).clamp(1, len(energy) - 1)
        x, y = energy.to(middle).log(), sigma.to(middle).log()
        share = (middle.log() - x[place - 1]) / (x[place] - x[place - 1])
        return cls(grid, torch.exp(y[place - 1] + share * (y[place] - y[place - 1])) * 1e22, column)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (self.column,)

    def evaluate(self, theta: Tensor) -> Tensor:
        return torch.exp(-theta * self.cross_section)
