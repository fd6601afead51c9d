"""The canvas of a convolution: FFTs on a grid large enough that nothing wraps into the image.

A kernel's transform is made once an object, and afresh whenever the kernel carries gradients (`fixed`, `current`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffinv.core.checks import ShapeError
from diffinv.operators.border import Border


def fast_length(minimum: int) -> int:
    """The smallest even 2ᵃ 3ᵇ 5ᶜ 7ᵈ that is ≥ `minimum`: a length that FFTs like."""
    length = minimum + minimum % 2
    while not _is_smooth(length):
        length += 2
    return length


def _is_smooth(number: int) -> bool:
    for prime in (2, 3, 5, 7):
        while number % prime == 0:
            number //= prime
    return number == 1


def transfer(kernel: Tensor, canvas: tuple[int, int]) -> Tensor:
    """rfft2 of a centred kernel (…, kh, kw) moved to the origin of a canvas at least as large: (…, P, Q // 2 + 1), complex."""
    rows, columns = kernel.shape[-2:]
    embedded = pad(kernel, (0, canvas[1] - columns, 0, canvas[0] - rows))
    return torch.fft.rfft2(embedded.roll((-(rows // 2), -(columns // 2)), (-2, -1)))


@dataclass(frozen=True)
class Canvas:
    """The geometry of one convolution without wrap-around: the part of the kernel that matters, the margins, the FFT size.

    Arguments: size: (H, W) of the image. kernel: (kh, kw). border: outside the image. step: divides the sides of the canvas.
    """

    size: tuple[int, int]
    kernel: tuple[int, int]
    border: Border
    step: int = 1

    @cached_property
    def reach(self) -> tuple[int, int]:
        return tuple(self.border.reach(k, n) for k, n in zip(self.kernel, self.size, strict=True))

    @cached_property
    def margins(self) -> tuple[int, int]:
        return tuple(self.border.margin(r) for r in self.reach)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """P ≥ H + 2 margin, and ≥ H + reach, so that what wraps lands outside the image."""
        sizes = zip(self.size, self.margins, self.reach, strict=True)
        return tuple(self.step * fast_length(-(-(n + max(2 * m, r)) // self.step)) for n, m, r in sizes)

    def transfer(self, kernel: Tensor) -> Tensor:
        for axis, reach in zip((-2, -1), self.reach, strict=True):
            centre = kernel.shape[axis] // 2
            stop = min(kernel.shape[axis], centre + reach + 1)
            kernel = kernel.narrow(axis, centre - reach, stop - centre + reach)
        return transfer(kernel, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Transform of the extended image on the canvas."""
        return torch.fft.rfft2(self.border.extend(x, self.margins), s=self.shape)

    def take(self, spectrum: Tensor) -> Tensor:
        """The image's own pixels of the inverse transform."""
        (top, left), (height, width) = self.margins, self.size
        return torch.fft.irfft2(spectrum, s=self.shape)[..., top : top + height, left : left + width]

    def take_adjoint(self, y: Tensor) -> Tensor:
        """Transform of the data put back at their place on the canvas."""
        top, left = self.margins
        return torch.fft.rfft2(pad(y, (left, 0, top, 0)), s=self.shape)

    def forward_adjoint(self, spectrum: Tensor) -> Tensor:
        """Folded pixels of the inverse transform."""
        (top, left), (height, width) = self.margins, self.size
        extended = torch.fft.irfft2(spectrum, s=self.shape)[..., : height + 2 * top, : width + 2 * left]
        return self.border.fold(extended, self.margins)


def fixed(kernel: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The transform that an object keeps: none of a kernel with gradients, whose values an optimiser may change."""
    return None if kernel.requires_grad else transform(kernel)


def current(kernel: Tensor, kept: Tensor | None, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """The kept transform, or a fresh one where the kernel carries gradients now."""
    return transform(kernel) if kept is None or kernel.requires_grad else kept


def check_kernel(owner: str, kernel: Tensor, rank: int, channels: int) -> None:
    """Raise ShapeError unless the kernel is of the rank and the channels that `owner` wants."""
    if kernel.ndim != rank or kernel.shape[-3] not in (1, channels):
        middle = "1|C" if rank == 4 else "K, 1|C"
        raise ShapeError(
            f"{owner}: the kernel must be (1|B, {middle}, kh, kw) with C = {channels}; got {tuple(kernel.shape)}; "
            "add the missing axes or set channels."
        )
