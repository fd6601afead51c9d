"""Data taken in Fourier space: a masked orthonormal transform (k-space) and visibilities at arbitrary (u, v).

Complex data travel as a trailing real pair (real, imaginary); inner products are real, so that adjoint(y) = Re(Fᴴ y).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import ShapeError
from diffinv.core.registry import register
from diffinv.core.types import Shape
from diffinv.operators.base import LinearOperator


@register("operator", "masked_fourier")
@dataclass(frozen=True, eq=False)
class MaskedFourier(LinearOperator):
    """y = m F x: the orthonormal FFT of a real image (origin at pixel [0, 0], zero frequency at [0, 0]) where m is True.

    Arguments: mask: (1|B, H, W), bool, True where a frequency is measured. channels: C.
        In: (C, H, W). Out: (C, H, W, 2), in the image's unit.
    """

    mask: Tensor
    channels: int

    @property
    def in_shape(self) -> Shape:
        return (self.channels, *self.mask.shape[-2:])

    @property
    def out_shape(self) -> Shape:
        return (*self.in_shape, 2)

    def _keep(self, y: Tensor) -> Tensor:
        return torch.where(self.mask[:, None, :, :, None], y, torch.zeros_like(y))

    def apply(self, x: Tensor) -> Tensor:
        return self._keep(torch.view_as_real(torch.fft.fft2(x, norm="ortho")))

    def adjoint(self, y: Tensor) -> Tensor:
        kept = self._keep(y)
        return torch.fft.ifft2(torch.complex(kept[..., 0], kept[..., 1]), norm="ortho").real


@register("operator", "visibilities")
@dataclass(frozen=True, eq=False)
class Visibilities(LinearOperator):
    """V(u, v) = Σ_p x(p) exp(−2πi (u l_p + v m_p)), by direct summation: exact at any (u, v).

    l = step_l (column − W // 2) and m = step_m (row − H // 2), in radians (small field, no w term).

    Arguments:
        uv: (1|B, M, 2), baselines (u, v) in wavelengths. size: (H, W) in pixels. channels: C, all seen at the same (u, v).
        step: (step_m, step_l), radians a pixel along rows and columns, signed: an image with East to the left has step_l < 0.
        In: (C, H, W), flux per pixel. Out: (C, M, 2), in the same unit; V(0, 0) is the total flux.
    Raises: ShapeError if uv is not (1|B, M, 2).
    """

    uv: Tensor
    size: tuple[int, int]
    channels: int
    step: tuple[float, float]

    def __post_init__(self) -> None:
        if self.uv.ndim != 3 or self.uv.shape[2] != 2:
            raise ShapeError(
                f"Visibilities: uv must be (1|B, M, 2) in wavelengths, got {tuple(self.uv.shape)}; stack u and v last."
            )

    @property
    def in_shape(self) -> Shape:
        return (self.channels, *self.size)

    @property
    def out_shape(self) -> Shape:
        return (self.channels, self.uv.shape[1], 2)

    def _phasor(self, axis: int) -> Tensor:
        """exp(−2πi v m) for axis 0 and exp(−2πi u l) for axis 1: (1|B, M, H or W), complex."""
        length = self.size[axis]
        angle = (torch.arange(length, dtype=self.uv.dtype, device=self.uv.device) - length // 2) * self.step[axis]
        phase = -2 * math.pi * self.uv[:, :, 1 - axis, None] * angle
        return torch.complex(torch.cos(phase), torch.sin(phase))

    def apply(self, x: Tensor) -> Tensor:
        rows, columns = self._phasor(0), self._phasor(1)[:, None]
        along = torch.complex(x @ columns.real.mT, x @ columns.imag.mT)
        return torch.view_as_real((rows[:, None].mT * along).sum(-2))

    def adjoint(self, y: Tensor) -> Tensor:
        rows, columns = self._phasor(0)[:, None], self._phasor(1)[:, None]
        along = rows.conj().mT * torch.complex(y[..., 0], y[..., 1])[..., None, :]
        return along.real @ columns.real + along.imag @ columns.imag
