"""What lies outside an image when a convolution asks for it: nothing (zero) or the image's mirror. Never a silent wrap-around.

A border extends an image by `margin` pixels a side (a linear map E) and folds back (its adjoint Eᵀ).
Invariant: ⟨E x, y⟩ = ⟨x, Eᵀ y⟩.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.registry import register


class Border(abc.ABC):
    """The rule for light outside the image; final classes are constants without tensors."""

    @abc.abstractmethod
    def reach(self, kernel: int, length: int) -> int:
        """How far the taps of a kernel of `kernel` pixels can bring light into an image of `length` pixels."""

    @abc.abstractmethod
    def margin(self, reach: int) -> int:
        """Pixels that must be added a side for a kernel that reaches `reach` pixels."""

    @abc.abstractmethod
    def extend(self, x: Tensor, margins: tuple[int, int]) -> Tensor:
        """E x: (…, H, W) → (…, H + 2 margins[0], W + 2 margins[1])."""

    @abc.abstractmethod
    def fold(self, y: Tensor, margins: tuple[int, int]) -> Tensor:
        """Eᵀ y: (…, H + 2 margins[0], W + 2 margins[1]) → (…, H, W)."""


@register("border", "zero")
@dataclass(frozen=True)
class ZeroBorder(Border):
    """Light outside the image is zero; light carried outside is lost (an output of the 'same' size)."""

    def reach(self, kernel: int, length: int) -> int:
        return min(kernel // 2, length - 1)

    def margin(self, reach: int) -> int:
        return 0

    def extend(self, x: Tensor, margins: tuple[int, int]) -> Tensor:
        return x

    def fold(self, y: Tensor, margins: tuple[int, int]) -> Tensor:
        return y


@register("border", "reflecting")
@dataclass(frozen=True)
class ReflectingBorder(Border):
    """The image is mirrored at the outer edge of its edge pixels (… b a | a b c | c b …): NumPy's 'symmetric' padding."""

    def reach(self, kernel: int, length: int) -> int:
        return kernel // 2

    def margin(self, reach: int) -> int:
        return reach

    def extend(self, x: Tensor, margins: tuple[int, int]) -> Tensor:
        for axis, pad in zip((-2, -1), margins, strict=True):
            x = x.index_select(axis, _mirror(x.shape[axis], pad, x.device))
        return x

    def fold(self, y: Tensor, margins: tuple[int, int]) -> Tensor:
        for axis, pad in zip((-2, -1), margins, strict=True):
            length = y.shape[axis] - 2 * pad
            shape = [*y.shape]
            shape[axis] = length
            y = y.new_zeros(shape).index_add(axis, _mirror(length, pad, y.device), y)
        return y


def _mirror(length: int, pad: int, device: torch.device) -> Tensor:
    """Source index of each of the length + 2 pad pixels; a triangle wave of period 2 length."""
    phase = torch.arange(-pad, length + pad, device=device) % (2 * length)
    return torch.minimum(phase, 2 * length - 1 - phase)
