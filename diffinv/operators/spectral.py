"""Mixing of bands: what a broad filter sees of narrower bands, or a detector's response to a spectrum."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffinv.core.checks import ShapeError
from diffinv.core.registry import register
from diffinv.core.types import Shape
from diffinv.operators.base import LinearOperator


@register("operator", "band_mixing")
@dataclass(frozen=True, eq=False)
class BandMixing(LinearOperator):
    """y_k = Σ_c M_kc x_c, pixel by pixel.

    Arguments: mix: M, (1|B, K, C), data's band a row, image's band a column. size: (H, W) in pixels.
    Raises: ShapeError if mix is not (1|B, K, C).
    """

    mix: Tensor
    size: tuple[int, int]

    def __post_init__(self) -> None:
        if self.mix.ndim != 3:
            raise ShapeError(f"BandMixing: mix must be (1|B, K, C), got {tuple(self.mix.shape)}; add the batch axis.")

    @property
    def in_shape(self) -> Shape:
        return (self.mix.shape[2], *self.size)

    @property
    def out_shape(self) -> Shape:
        return (self.mix.shape[1], *self.size)

    def apply(self, x: Tensor) -> Tensor:
        return (self.mix @ x.flatten(2)).unflatten(2, tuple(self.size))

    def adjoint(self, y: Tensor) -> Tensor:
        return (self.mix.mT @ y.flatten(2)).unflatten(2, tuple(self.size))
