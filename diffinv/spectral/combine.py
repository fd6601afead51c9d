"""Spectral models made of others: products, fixed parameters, and a user's own function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError
from diffinv.spectral.base import Grid, Parameter, SpectralModel


@dataclass(frozen=True, eq=False)
class Product(SpectralModel):
    """A source times its factors: S(E; θ₁) T(E; θ₂) …, θ = (θ₁, θ₂, …).

    Arguments: parts: two or more models on one grid whose parameters have different names.
    Raises: DiffinvError if grids or names clash.
    """

    parts: tuple[SpectralModel, ...]

    def __post_init__(self) -> None:
        names = [p.name for p in self.parameters]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise DiffinvError(f"Product: more than one part has a parameter {', '.join(twice)}; fix or rename one of them.")
        first = self.parts[0]
        for part in self.parts[1:]:
            first.grid.check_equal(part.grid, type(first).__name__, type(part).__name__)

    @property
    def grid(self) -> Grid:
        return self.parts[0].grid

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return tuple(p for part in self.parts for p in part.parameters)

    def evaluate(self, theta: Tensor) -> Tensor:
        pieces = theta.split([len(part.parameters) for part in self.parts], dim=1)
        values = self.parts[0].evaluate(pieces[0])
        for part, piece in zip(self.parts[1:], pieces[1:], strict=True):
            values = values * part.evaluate(piece)
        return values


@dataclass(frozen=True, eq=False)
class Fixed(SpectralModel):
    """A model with some parameters held.

    Arguments: model. values: (name, value) of each held parameter, in the parameter's unit.
    Raises: DiffinvError if a name is not one of the model's.
    """

    model: SpectralModel
    values: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        unknown = [name for name, _ in self.values if name not in self.model.names]
        if unknown:
            raise DiffinvError(f"Fixed: no parameter {', '.join(unknown)}; the model has {', '.join(self.model.names)}.")

    @property
    def grid(self) -> Grid:
        return self.model.grid

    @cached_property
    def _held(self) -> dict[str, float]:
        return dict(self.values)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return tuple(p for p in self.model.parameters if p.name not in self._held)

    def evaluate(self, theta: Tensor) -> Tensor:
        free = iter(theta.unbind(1))
        ones = theta.new_ones(len(theta))
        columns = [ones * self._held[n] if n in self._held else next(free) for n in self.model.names]
        return self.model.evaluate(torch.stack(columns, 1))


@dataclass(frozen=True, eq=False)
class UserModel(SpectralModel):
    """A user's function θ (B, P) → (B, E), written with torch, so that it can be differentiated.

    Arguments: grid. own: its parameters. function.
    Raises: ShapeError when the function returns another shape.
    """

    grid: Grid
    own: tuple[Parameter, ...]
    function: Callable[[Tensor], Tensor]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self.own

    def evaluate(self, theta: Tensor) -> Tensor:
        values = self.function(theta)
        if tuple(values.shape) != (len(theta), len(self.grid)):
            raise ShapeError(
                f"UserModel: the function gave {tuple(values.shape)} for θ {tuple(theta.shape)} on {self.grid.describe()}; "
                f"give ({len(theta)}, {len(self.grid)})."
            )
        return values
