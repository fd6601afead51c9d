"""Table models: spectra on a grid of parameters, interpolated between its nodes, on any grid of energies.

Each parameter is interpolated linearly in its value or in its logarithm, jointly over the 2^P corners of a cell; beyond the
nodes the last cell's weights go on, and `outside` says so. Energies are rebinned through the cumulative spectrum, which keeps
photons: a table bin is flat within. With a redshift the source's energies are E (1 + z), and its photons come 1 + z times slower.
Invariant: at a node, on the table's own energies, the model is the table.

References: The file format for XSPEC table models, Arnaud, 1995 (OGIP/92-009).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError
from diffinv.spectral.base import Grid, Parameter, SpectralModel


@dataclass(frozen=True, eq=False)
class Axis:
    """A parameter of a table. nodes: its values, increasing, (n,). logarithmic: how weights run between them."""

    parameter: Parameter
    nodes: Tensor
    logarithmic: bool

    def __post_init__(self) -> None:
        if len(self.nodes) < 2 or not bool((self.nodes.diff() > 0).all()) or (self.logarithmic and not bool(self.nodes[0] > 0)):
            raise DiffinvError(
                f"table parameter {self.parameter.name}: nodes {self.nodes.tolist()[:6]} must increase, be two at least, and be "
                "positive on a logarithmic axis."
            )

    def place(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Number of the node below and weight of the one above, (B,) each."""
        below = (torch.searchsorted(self.nodes, value.detach().contiguous(), right=True) - 1).clamp(0, len(self.nodes) - 2)
        low, high = self.nodes[below], self.nodes[below + 1]
        if self.logarithmic:
            return below, (value / low).log() / (high / low).log()
        return below, (value - low) / (high - low)


@dataclass(frozen=True, eq=False)
class SpectralTable:
    """What a table file holds.

    Arguments:
        grid: energies of the table, E bins. axes: the P parameters. additive: photons cm⁻² s⁻¹ a bin, else a factor a bin.
        spectra: (1 + K, n₁, …, n_P, E): the spectrum, and what each of the K `added` parameters adds a unit of it.
        added: parameters that only scale their own spectrum. redshift: its box if the model has one, else None.
    Raises: ShapeError if spectra do not fit the axes.
    """

    grid: Grid
    axes: tuple[Axis, ...]
    spectra: Tensor
    additive: bool
    added: tuple[Parameter, ...] = ()
    redshift: Parameter | None = None

    def __post_init__(self) -> None:
        wanted = (1 + len(self.added), *(len(a.nodes) for a in self.axes), len(self.grid))
        if tuple(self.spectra.shape) != wanted:
            raise ShapeError(f"SpectralTable: spectra {tuple(self.spectra.shape)}, but axes and energies ask for {wanted}.")

    @cached_property
    def cumulative(self) -> Tensor:
        """∫ from the lower end of the table to each edge, (1 + K, cells, E + 1)."""
        content = self.spectra if self.additive else self.spectra * self.grid.width
        flat = content.flatten(1, -2)
        return torch.cat([flat.new_zeros(*flat.shape[:2], 1), flat.cumsum(-1)], -1)


@dataclass(frozen=True, eq=False)
class TableModel(SpectralModel):
    """A table on a grid of energies, θ = (axes, added, z if the table has a redshift).

    Arguments: grid, within the table's energies at every redshift of its box. table.
    Raises: DiffinvError if the table does not cover the grid.
    """

    grid: Grid
    table: SpectralTable

    def __post_init__(self) -> None:
        shift = self.table.redshift
        ends = (1 + shift.low, 1 + shift.high) if shift else (1.0, 1.0)
        edges, own = self.grid.edges, self.table.grid.edges
        slack = 1e-6 * edges[[0, -1]]
        covered = bool(edges[0] * ends[0] >= own[0] - slack[0]) and bool(edges[-1] * ends[1] <= own[-1] + slack[1])
        if self.grid.unit != self.table.grid.unit or not covered:
            at = f" at z = {shift.low:g} to {shift.high:g}" if shift else ""
            raise DiffinvError(
                f"TableModel: the table has {self.table.grid.describe()}, which does not cover the model's {self.grid.describe()}"
                f"{at}; cut the grid or the range of z."
            )

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        shift = () if self.table.redshift is None else (self.table.redshift,)
        return (*(a.parameter for a in self.table.axes), *self.table.added, *shift)

    def evaluate(self, theta: Tensor) -> Tensor:
        table, count = self.table, len(self.table.axes)
        stretch = torch.ones_like(theta[:, 0]) if table.redshift is None else 1 + theta[:, -1]
        corners = self._corners(theta[:, :count])
        scales = [torch.ones_like(stretch), *theta[:, count : count + len(table.added)].unbind(1)]
        cumulative = sum(s[:, None] * self._mixed(part, corners) for s, part in zip(scales, table.cumulative, strict=True))
        edges = self.grid.edges * stretch[:, None]
        below = (torch.searchsorted(table.grid.edges, edges.detach(), right=True) - 1).clamp(0, len(table.grid) - 1)
        low, high = table.grid.edges[below], table.grid.edges[below + 1]
        start, stop = cumulative.gather(1, below), cumulative.gather(1, below + 1)
        content = (start + (edges - low) / (high - low) * (stop - start)).diff(dim=1)
        return content / stretch[:, None] / (1 if table.additive else self.grid.width)

    def _corners(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Flat cell number and weight of each corner, (B,) each."""
        places = [axis.place(column) for axis, column in zip(self.table.axes, theta.unbind(1), strict=True)]
        sizes = [len(axis.nodes) for axis in self.table.axes]
        strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
        corners = []
        for ends in itertools.product((0, 1), repeat=len(sizes)):
            number, weight = torch.zeros_like(theta[:, 0], dtype=torch.int64), torch.ones_like(theta[:, 0])
            for end, stride, (below, share) in zip(ends, strides, places, strict=True):
                number, weight = number + stride * (below + end), weight * (share if end else 1 - share)
            corners.append((number, weight))
        return corners

    @staticmethod
    def _mixed(cells: Tensor, corners: list[tuple[Tensor, Tensor]]) -> Tensor:
        return sum(weight[:, None] * cells[number] for number, weight in corners)
