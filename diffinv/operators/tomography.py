"""Parallel-beam tomography: line integrals of an image by rotation and summation.

    y(θ, s) = Σ_t x(c + s n_θ + t d_θ),   n_θ = (−sin θ, cos θ), d_θ = (cos θ, sin θ) in (row, column)

with bilinear interpolation and unit steps t, so that data have the image's unit times pixels. At θ = 0 rays run along the
rows' axis and y is the sum over rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.registry import register
from diffinv.core.types import Shape
from diffinv.operators.base import LinearOperator
from diffinv.operators.interpolation import Linear, gather, scatter


@register("operator", "radon")
@dataclass(frozen=True, eq=False)
class Radon(LinearOperator):
    """Parallel-beam projections.

    Arguments:
        angles: (1|B, A), degrees. in_shape: (C, H, W). detectors: number of unit-width detector pixels, centred on the
        image's centre; ⌈√(H² + W²)⌉ of them see every ray. Out: (C, A, detectors).
    """

    angles: Tensor
    in_shape: Shape
    detectors: int

    @property
    def out_shape(self) -> Shape:
        return (self.in_shape[0], self.angles.shape[1], self.detectors)

    @property
    def _steps(self) -> int:
        return math.ceil(math.hypot(*self.in_shape[-2:])) + 1

    @property
    def _points(self) -> Tensor:
        """(row, column) of every sample: (1|B, A · detectors · steps, 2)."""
        theta = torch.deg2rad(self.angles)[:, :, None, None]
        detector = self._centred(self.detectors)[:, None]
        step = self._centred(self._steps)
        row = (self.in_shape[-2] - 1) / 2 - detector * torch.sin(theta) + step * torch.cos(theta)
        column = (self.in_shape[-1] - 1) / 2 + detector * torch.cos(theta) + step * torch.sin(theta)
        return torch.stack([row, column], -1).flatten(1, 3)

    def _centred(self, length: int) -> Tensor:
        return torch.arange(length, dtype=self.angles.dtype, device=self.angles.device) - (length - 1) / 2

    def apply(self, x: Tensor) -> Tensor:
        samples = gather(x, self._points, Linear())
        return samples.unflatten(2, (self.angles.shape[1], self.detectors, self._steps)).sum(-1)

    def adjoint(self, y: Tensor) -> Tensor:
        samples = y[..., None].expand(*y.shape, self._steps).flatten(2)
        return scatter(samples, self._points, tuple(self.in_shape[-2:]), Linear())
