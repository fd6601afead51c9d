"""Blur and detector pixels in one: a convolution whose output is summed over blocks, done on the spectrum.

    y(i, j) = Σ_{u,v < f} (k * x)(f i + u, f j + v)

Summing over blocks multiplies the blurred image's spectrum by that of a block, and keeping each f-th row adds up the
spectrum's aliases, so that the transform back has f times fewer rows. `SumPool @ Convolution` is the same map, slower.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffinv.core.checks import ShapeError, check_shape
from diffinv.core.registry import register
from diffinv.core.types import Shape
from diffinv.operators.base import LinearOperator
from diffinv.operators.border import Border
from diffinv.operators.canvas import Canvas, check_kernel, current, fixed


@register("operator", "pooled_convolution")
@dataclass(frozen=True, eq=False)
class PooledConvolution(LinearOperator):
    """y = S_f (k * x): a point-spread function at the image's pixels, data in pixels f times larger, flux per pixel.

    Arguments:
        kernel, channels, size, border: as in `Convolution`. factor: f; H and W are multiples of it.
    Raises: ShapeError if they are not, or if the kernel has another rank or another number of channels.
    """

    kernel: Tensor
    channels: int
    size: tuple[int, int]
    border: Border
    factor: int
    _canvas: Canvas = field(init=False, repr=False)
    _transfer: Tensor | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_kernel("PooledConvolution", self.kernel, 4, self.channels)
        if self.factor < 1 or any(n % self.factor for n in self.size):
            raise ShapeError(
                f"PooledConvolution: {tuple(self.size)} is not a multiple of factor {self.factor}; crop the image first."
            )
        canvas = Canvas(tuple(self.size), tuple(self.kernel.shape[-2:]), self.border, self.factor)
        object.__setattr__(self, "_canvas", canvas)
        object.__setattr__(self, "_transfer", fixed(self.kernel, self._blocks))

    @property
    def in_shape(self) -> Shape:
        return (self.channels, *self.size)

    @property
    def out_shape(self) -> Shape:
        return (self.channels, *(n // self.factor for n in self.size))

    def _blocks(self, kernel: Tensor) -> Tensor:
        """The kernel's transform times that of the sum over the block that starts at the image's corner."""
        (top, left), f = self._canvas.margins, self.factor
        block = kernel.new_zeros(self._canvas.shape)
        block[top : top + f, left : left + f] = 1
        return self._canvas.transfer(kernel) * torch.fft.rfft2(block).conj()

    @property
    def _spectrum(self) -> Tensor:
        return current(self.kernel, self._transfer, self._blocks)

    def apply(self, x: Tensor) -> Tensor:
        check_shape("PooledConvolution", x, self.in_shape)
        rows, columns = self._canvas.shape
        kept_rows = rows // self.factor
        aliases = (self._spectrum * self._canvas.forward(x)).split(kept_rows, -2)
        kept = torch.fft.irfft2(sum(aliases[1:], aliases[0]), s=(kept_rows, columns))
        return kept[..., : self.out_shape[1], : self.size[1] : self.factor] / self.factor

    def adjoint(self, y: Tensor) -> Tensor:
        rows, columns = self._canvas.shape
        apart = pad(y[..., None], (0, self.factor - 1)).flatten(-2)
        period = torch.fft.rfft2(apart, s=(rows // self.factor, columns))
        return self._canvas.forward_adjoint(self._spectrum.conj() * torch.cat([period] * self.factor, -2))
