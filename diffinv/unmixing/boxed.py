"""A spectral model whose parameters are kept in another box than its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.spectral.base import Grid, Parameter, SpectralModel


@dataclass(frozen=True, eq=False)
class Boxed(SpectralModel):
    """The model with other boxes. boxes: (name, low, high), in the parameter's unit.

    Raises: DiffinvError if a name is not one of the model's, or a box is empty.
    """

    model: SpectralModel
    boxes: tuple[tuple[str, float, float], ...]

    def __post_init__(self) -> None:
        unknown = [name for name, _, _ in self.boxes if name not in self.model.names]
        if unknown:
            raise DiffinvError(f"box: no parameter {', '.join(unknown)}; the model has {', '.join(self.model.names)}.")
        _ = self.parameters

    @property
    def grid(self) -> Grid:
        return self.model.grid

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        ends = {name: (low, high) for name, low, high in self.boxes}
        return tuple(Parameter(p.name, p.unit, *ends.get(p.name, (p.low, p.high))) for p in self.model.parameters)

    def evaluate(self, theta: Tensor) -> Tensor:
        return self.model.evaluate(theta)
