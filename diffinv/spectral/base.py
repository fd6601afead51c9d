"""A spectral model is a function of a few named parameters with values in the bins of a grid.

    model(θ) → (B, E),   θ (B, P)

Sources give photons cm⁻² s⁻¹ a bin at unit amplitude (amplitudes multiply a model from outside), factors such as
absorption give a number a bin, and a model that is folded with an instrument gives expected counts a channel. All are
`SpectralModel`; `Product` and `Fixed` make new ones of them, and none of them draws or stores anything.
Layer: beside `noise`, above `core` and `operators`; it knows neither files nor likelihoods.
Invariant: row i of the result depends on row i of θ alone, and a model is differentiable in θ.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError

LIGHT_SPEED = 299792.458  # km/s
BAND = "band"  # the unit of channels that have only numbers


@dataclass(frozen=True, eq=False)
class Grid:
    """Bins that touch: edges (E + 1,), increasing and positive, in `unit` ("keV", "Angstrom", or "band" for their numbers).

    Raises: DiffinvError if the edges do not increase from a positive number or the unit is another.
    """

    edges: Tensor
    unit: str

    def __post_init__(self) -> None:
        if self.unit not in ("keV", "Angstrom", BAND):
            raise DiffinvError(f"Grid: the unit is {self.unit!r}; give edges in keV or Angstrom.")
        edges = self.edges
        if edges.ndim != 1 or len(edges) < 2 or not bool(edges.isfinite().all() & (edges.diff() > 0).all() & (edges[0] > 0)):
            raise DiffinvError(f"Grid: edges must be (E + 1,), positive and increasing; got {self.describe()}.")

    @classmethod
    def of(cls, edges: Sequence[float], unit: str = "keV") -> Grid:
        """A grid in float64."""
        return cls(torch.as_tensor(edges, dtype=torch.float64), unit)

    def __len__(self) -> int:
        return len(self.edges) - 1

    @property
    def low(self) -> Tensor:
        return self.edges[:-1]

    @property
    def high(self) -> Tensor:
        return self.edges[1:]

    @cached_property
    def middle(self) -> Tensor:
        return 0.5 * (self.low + self.high)

    @cached_property
    def width(self) -> Tensor:
        return self.edges.diff()

    def describe(self) -> str:
        """`1078 bins of 0.22–11 keV`."""
        if self.edges.ndim != 1 or len(self.edges) < 2:
            return f"edges of shape {tuple(self.edges.shape)}"
        return f"{len(self)} bins of {float(self.edges[0]):.6g}–{float(self.edges[-1]):.6g} {self.unit}"

    def check_equal(self, other: Grid, own_name: str, other_name: str, tolerance: float = 1e-5) -> None:
        """Raise DiffinvError unless the edges agree to `tolerance` (relative; files keep them in single precision)."""
        remedy = "give both on one grid"
        if self.unit != other.unit or len(self) != len(other):
            raise DiffinvError(f"{own_name} has {self.describe()}, {other_name} {other.describe()}; {remedy}.")
        apart = (self.edges - other.edges).abs() > tolerance * self.edges
        if bool(apart.any()):
            place = int(apart.nonzero()[0])
            own, theirs = f"{own_name} ({self.describe()})", f"{other_name} ({other.describe()})"
            values = f"{float(self.edges[place]):.7g} and {float(other.edges[place]):.7g} {self.unit}"
            raise DiffinvError(f"{own} and {theirs} differ at edge {place}: {values}; {remedy}.")


@dataclass(frozen=True)
class Parameter:
    """A parameter and the box in which its model is meant to be used. unit: "" for a pure number."""

    name: str
    unit: str
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise DiffinvError(f"Parameter {self.name}: the box [{self.low}, {self.high}] is empty; give low < high.")


class SpectralModel(abc.ABC):
    """Values in the bins of `grid` as a function of `parameters`."""

    grid: Grid

    @property
    @abc.abstractmethod
    def parameters(self) -> tuple[Parameter, ...]:
        """The P parameters in the order of the columns of θ."""

    @abc.abstractmethod
    def evaluate(self, theta: Tensor) -> Tensor:
        """(B, P) in the grid's dtype → (B, E)."""

    def __call__(self, theta: Tensor) -> Tensor:
        """Values in the bins.

        Arguments: theta: (B, P), a parameter a column, in the units of `parameters`.
        Returns: (B, E) in the dtype of the grid.
        Raises: ShapeError if theta is not (B, P).
        """
        names = ", ".join(self.names)
        if theta.ndim != 2 or theta.shape[1] != len(self.parameters):
            raise ShapeError(f"{type(self).__name__} expects θ (B, {len(self.parameters)}): {names}; got {tuple(theta.shape)}.")
        return self.evaluate(theta.to(self.grid.edges))

    def jacobian(self, theta: Tensor) -> Tensor:
        """∂ model / ∂θ, (B, E, P) of θ (B, P), by one forward derivative a parameter."""
        theta = theta.to(self.grid.edges)
        directions = torch.eye(theta.shape[1], dtype=theta.dtype)[:, None].expand(-1, len(theta), -1)
        return torch.stack([torch.func.jvp(self.__call__, (theta,), (d.contiguous(),))[1] for d in directions], -1)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters)

    @property
    def box(self) -> Tensor:
        """(2, P): lower and upper ends."""
        return torch.tensor([[p.low for p in self.parameters], [p.high for p in self.parameters]], dtype=self.grid.edges.dtype)

    def outside(self, theta: Tensor) -> Tensor:
        """(B, P), True where a parameter has left its box (or is not a number)."""
        low, high = self.box.to(theta)
        return ~((theta >= low) & (theta <= high))


def check_energies(owner: str, grid: Grid) -> None:
    """Raise DiffinvError unless the grid is of photon energies."""
    if grid.unit != "keV":
        raise DiffinvError(f"{owner} is a model of photon energies; got {grid.describe()}, give a grid in keV.")
