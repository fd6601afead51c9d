"""Non-linear detectors, pixel by pixel, each with slope 1 at zero and its Jacobian in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import check_positive
from diffinv.core.linalg import expand
from diffinv.core.registry import register
from diffinv.core.types import Shape
from diffinv.operators.algebra import Diagonal
from diffinv.operators.base import Operator


@register("operator", "arcsinh")
@dataclass(frozen=True, eq=False)
class Arcsinh(Operator):
    """y = s asinh(x / s): linear below s, logarithmic above.

    Arguments: in_shape: shape of the image. scale: s, (1|B,), > 0, in the image's unit.
    Raises: DiffinvError if the scale is not positive.
    """

    in_shape: Shape
    scale: Tensor

    def __post_init__(self) -> None:
        check_positive("Arcsinh", "scale", self.scale.detach(), "give the flux at which the response turns logarithmic.")

    @property
    def out_shape(self) -> Shape:
        return self.in_shape

    def apply(self, x: Tensor) -> Tensor:
        scale = expand(self.scale, x)
        return scale * torch.asinh(x / scale)

    def linearize(self, x: Tensor) -> Diagonal:
        return Diagonal(1 / torch.sqrt(1 + (x / expand(self.scale, x)) ** 2))


@register("operator", "saturation")
@dataclass(frozen=True, eq=False)
class Saturation(Operator):
    """y = L tanh(x / L): linear for faint pixels, never above the full well L.

    Arguments: in_shape: shape of the image. level: L, (1|B,), > 0, in the image's unit.
    Raises: DiffinvError if the level is not positive.
    """

    in_shape: Shape
    level: Tensor

    def __post_init__(self) -> None:
        check_positive("Saturation", "level", self.level.detach(), "give the full well in the image's unit.")

    @property
    def out_shape(self) -> Shape:
        return self.in_shape

    def apply(self, x: Tensor) -> Tensor:
        level = expand(self.level, x)
        return level * torch.tanh(x / level)

    def linearize(self, x: Tensor) -> Diagonal:
        return Diagonal(1 - torch.tanh(x / expand(self.level, x)) ** 2)
