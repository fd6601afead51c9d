"""Convolution with a point-spread function: one for all images, one an image, one a channel, or one that varies over the field.

    y(p) = Σ_q k(q) x(p − q),   q counted from the kernel's centre pixel (kh // 2, kw // 2)

The sums are done with FFTs on a canvas large enough that nothing wraps into the image; what lies outside is said by a
`Border`. `PeriodicConvolution` is the torus, by its own name: it is diagonal in Fourier space and serves closed forms.
The kernel is used as given: a PSF that is to conserve flux sums to one. Kernels are correlated with nothing and
flipped nowhere, so a PSF image can be passed as it was measured.
Invariant: the kernel's transform is computed once an object (a kernel is not to be changed in place), and afresh
whenever the kernel carries gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffinv.core.checks import ShapeError
from diffinv.core.registry import register
from diffinv.core.types import Shape
from diffinv.operators.base import LinearOperator
from diffinv.operators.border import Border
from diffinv.operators.canvas import Canvas, check_kernel, current, fixed, transfer


@register("operator", "convolution")
@dataclass(frozen=True, eq=False)
class Convolution(LinearOperator):
    """y = k * x on an image with a stated border; output of the input's size.

    Arguments:
        kernel: (1|B, 1|C, kh, kw), real, dimensionless, centre at (kh // 2, kw // 2), any size.
        channels: C. size: (H, W) in pixels. border: `ZeroBorder()` or `ReflectingBorder()`.
    Raises: ShapeError if the kernel has another rank or another number of channels.
    """

    kernel: Tensor
    channels: int
    size: tuple[int, int]
    border: Border
    _canvas: Canvas = field(init=False, repr=False)
    _transfer: Tensor | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_kernel("Convolution", self.kernel, 4, self.channels)
        object.__setattr__(self, "_canvas", Canvas(tuple(self.size), tuple(self.kernel.shape[-2:]), self.border))
        object.__setattr__(self, "_transfer", fixed(self.kernel, self._canvas.transfer))

    @property
    def in_shape(self) -> Shape:
        return (self.channels, *self.size)

    @property
    def out_shape(self) -> Shape:
        return (self.channels, *self.size)

    @property
    def _spectrum(self) -> Tensor:
        return current(self.kernel, self._transfer, self._canvas.transfer)

    def apply(self, x: Tensor) -> Tensor:
        return self._canvas.take(self._spectrum * self._canvas.forward(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self._canvas.forward_adjoint(self._spectrum.conj() * self._canvas.take_adjoint(y))


@register("operator", "varying_convolution")
@dataclass(frozen=True, eq=False)
class VaryingConvolution(LinearOperator):
    """y = Σ_k kernel_k * (w_k x): a PSF that varies over the field, interpolated between K basis kernels.

    A source at p is seen with the PSF Σ_k w_k(p) kernel_k, exactly: weights act before the blur, at the source.

    Arguments:
        kernels: (1|B, K, 1|C, kh, kw), real, centred as in `Convolution`.
        weights: (1|B, K, H, W), dimensionless; weights that sum to 1 over K keep the flux of unit kernels.
        channels: C. border: outside the image.
    Raises: ShapeError if the ranks, K or C do not agree.
    """

    kernels: Tensor
    weights: Tensor
    channels: int
    border: Border
    _canvas: Canvas = field(init=False, repr=False)
    _transfer: Tensor | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_kernel("VaryingConvolution", self.kernels, 5, self.channels)
        if self.weights.ndim != 4 or self.weights.shape[1] != self.kernels.shape[1]:
            raise ShapeError(
                f"VaryingConvolution: weights must be (1|B, K={self.kernels.shape[1]}, H, W), one map a kernel; "
                f"got {tuple(self.weights.shape)}."
            )
        size = tuple(self.weights.shape[-2:])
        object.__setattr__(self, "_canvas", Canvas(size, tuple(self.kernels.shape[-2:]), self.border))
        object.__setattr__(self, "_transfer", fixed(self.kernels, self._canvas.transfer))

    @property
    def in_shape(self) -> Shape:
        return (self.channels, *self.weights.shape[-2:])

    @property
    def out_shape(self) -> Shape:
        return self.in_shape

    @property
    def _spectrum(self) -> Tensor:
        return current(self.kernels, self._transfer, self._canvas.transfer)

    def apply(self, x: Tensor) -> Tensor:
        spectra = self._canvas.forward(self.weights[:, :, None] * x[:, None])
        return self._canvas.take((self._spectrum * spectra).sum(1))

    def adjoint(self, y: Tensor) -> Tensor:
        spectra = self._spectrum.conj() * self._canvas.take_adjoint(y)[:, None]
        return (self.weights[:, :, None] * self._canvas.forward_adjoint(spectra)).sum(1)


@register("operator", "periodic_convolution")
@dataclass(frozen=True, eq=False)
class PeriodicConvolution(LinearOperator):
    """y = k ⊛ x on the torus: light that leaves at one edge comes back at the other. Diagonal in Fourier space.

    For closed forms and tests; a telescope's image wants `Convolution`.

    Arguments: kernel: (1|B, 1|C, kh, kw), real, no larger than the image. channels: C. size: (H, W) in pixels.
    Raises: ShapeError if the kernel is larger than the image, or has another number of channels.
    """

    kernel: Tensor
    channels: int
    size: tuple[int, int]
    _transfer: Tensor | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_kernel("PeriodicConvolution", self.kernel, 4, self.channels)
        if any(k > n for k, n in zip(self.kernel.shape[-2:], self.size, strict=True)):
            raise ShapeError(
                f"PeriodicConvolution: the kernel {tuple(self.kernel.shape[-2:])} is larger than the image {tuple(self.size)}; "
                "cut the kernel to the image."
            )
        object.__setattr__(self, "_transfer", fixed(self.kernel, self._move))

    @property
    def in_shape(self) -> Shape:
        return (self.channels, *self.size)

    @property
    def out_shape(self) -> Shape:
        return (self.channels, *self.size)

    def _move(self, kernel: Tensor) -> Tensor:
        return transfer(kernel, self.size)

    @property
    def _spectrum(self) -> Tensor:
        return current(self.kernel, self._transfer, self._move)

    @property
    def spectrum(self) -> Tensor:
        """Eigenvalues on the whole Fourier plane (that of fft2, DC at [0, 0]) as a trailing real pair: (1|B, 1|C, H, W, 2)."""
        rows, columns = self.kernel.shape[-2:]
        embedded = pad(self.kernel, (0, self.size[1] - columns, 0, self.size[0] - rows))
        return torch.view_as_real(torch.fft.fft2(embedded.roll((-(rows // 2), -(columns // 2)), (-2, -1))))

    @property
    def power(self) -> Tensor:
        """|eigenvalue|², the spectrum of AᴴA: (1|B, 1|C, H, W)."""
        return self.spectrum.square().sum(-1)

    @property
    def H(self) -> PeriodicConvolution:
        """Convolution with the point-reflected kernel."""
        full = self._spectrum.conj()
        centre = (self.size[0] // 2, self.size[1] // 2)
        return PeriodicConvolution(torch.fft.irfft2(full, s=self.size).roll(centre, (-2, -1)), self.channels, self.size)

    def apply(self, x: Tensor) -> Tensor:
        return torch.fft.irfft2(self._spectrum * torch.fft.rfft2(x), s=self.size)

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.fft.irfft2(self._spectrum.conj() * torch.fft.rfft2(y), s=self.size)
