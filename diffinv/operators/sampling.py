"""Which pixels a detector keeps: masks, sums over larger pixels, colour mosaics, and windows of a larger field.

Every map here selects or adds pixels, so its adjoint puts them back where they came from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffinv.core.checks import ShapeError, check_shape
from diffinv.core.registry import register
from diffinv.core.types import Shape
from diffinv.operators.base import LinearOperator


@register("operator", "mask")
@dataclass(frozen=True, eq=False)
class Mask(LinearOperator):
    """y = m x: pixels that were not seen are zero, even where x is not finite.

    Arguments: mask: (1|B, *shape), bool, True where a pixel is seen.
    Raises: ShapeError if the mask is not boolean.
    """

    mask: Tensor

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool:
            raise ShapeError(
                f"Mask: the mask must be bool, True where seen, got {self.mask.dtype}; use Diagonal for real weights."
            )

    @property
    def in_shape(self) -> Shape:
        return tuple(self.mask.shape[1:])

    @property
    def out_shape(self) -> Shape:
        return tuple(self.mask.shape[1:])

    def apply(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, torch.zeros_like(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self.apply(y)


@register("operator", "sum_pool")
@dataclass(frozen=True, eq=False)
class SumPool(LinearOperator):
    """Sum over factor × factor blocks: a detector with larger pixels, in flux per pixel.

    Arguments: in_shape: (C, H, W). factor: block size in pixels; H and W are multiples of it.
    Raises: ShapeError if they are not.
    """

    in_shape: Shape
    factor: int

    def __post_init__(self) -> None:
        if self.factor < 1 or any(n % self.factor for n in self.in_shape[-2:]):
            raise ShapeError(f"SumPool: {tuple(self.in_shape)} is not a multiple of factor {self.factor}; crop the image first.")

    @property
    def out_shape(self) -> Shape:
        channels, height, width = self.in_shape
        return (channels, height // self.factor, width // self.factor)

    def apply(self, x: Tensor) -> Tensor:
        check_shape("SumPool", x, self.in_shape)
        rows = sum(x[..., start :: self.factor, :] for start in range(self.factor))
        return sum(rows[..., start :: self.factor] for start in range(self.factor))

    def adjoint(self, y: Tensor) -> Tensor:
        wide = torch.stack([y] * self.factor, -1).flatten(-2)
        return torch.stack([wide] * self.factor, -2).flatten(-3, -2)


@register("operator", "mosaic")
@dataclass(frozen=True, eq=False)
class Mosaic(LinearOperator):
    """y(i, j) = Σ_c f_c(i mod p, j mod q) x_c(i, j): a colour-filter or dither pattern in front of a grey detector.

    Arguments:
        pattern: (1|B, C, p, q), transmission of each band in a cell of the pattern (0 or 1 for a plain selection).
        size: (H, W) in pixels. Out: (1, H, W).
    """

    pattern: Tensor
    size: tuple[int, int]

    @property
    def in_shape(self) -> Shape:
        return (self.pattern.shape[1], *self.size)

    @property
    def out_shape(self) -> Shape:
        return (1, *self.size)

    @property
    def _filters(self) -> Tensor:
        (height, width), (rows, columns) = self.size, self.pattern.shape[-2:]
        tiled = self.pattern.repeat(1, 1, -(-height // rows), -(-width // columns))
        return tiled[..., :height, :width]

    def apply(self, x: Tensor) -> Tensor:
        return (self._filters * x).sum(1, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._filters * y


@register("operator", "crop")
@dataclass(frozen=True, eq=False)
class Crop(LinearOperator):
    """The window of `size` whose first pixel is `corner`.

    Arguments: in_shape: (C, H, W). corner: (row, column). size: (h, w), all in pixels.
    Raises: ShapeError if the window leaves the image.
    """

    in_shape: Shape
    corner: tuple[int, int]
    size: tuple[int, int]

    def __post_init__(self) -> None:
        _check_window("Crop", self.in_shape[-2:], self.corner, self.size)

    @property
    def out_shape(self) -> Shape:
        return (self.in_shape[0], *self.size)

    @property
    def H(self) -> Pad:
        return Pad(self.out_shape, self.corner, tuple(self.in_shape[-2:]))

    def apply(self, x: Tensor) -> Tensor:
        return _cut(x, self.corner, self.size)

    def adjoint(self, y: Tensor) -> Tensor:
        return _embed(y, self.corner, self.in_shape[-2:])


@register("operator", "pad")
@dataclass(frozen=True, eq=False)
class Pad(LinearOperator):
    """The image put at `corner` of an empty canvas of `size`: the adjoint of `Crop`.

    Arguments: in_shape: (C, h, w). corner: (row, column). size: (H, W), all in pixels.
    Raises: ShapeError if the image leaves the canvas.
    """

    in_shape: Shape
    corner: tuple[int, int]
    size: tuple[int, int]

    def __post_init__(self) -> None:
        _check_window("Pad", self.size, self.corner, self.in_shape[-2:])

    @property
    def out_shape(self) -> Shape:
        return (self.in_shape[0], *self.size)

    @property
    def H(self) -> Crop:
        return Crop(self.out_shape, self.corner, tuple(self.in_shape[-2:]))

    def apply(self, x: Tensor) -> Tensor:
        return _embed(x, self.corner, self.size)

    def adjoint(self, y: Tensor) -> Tensor:
        return _cut(y, self.corner, self.in_shape[-2:])


def _cut(x: Tensor, corner: tuple[int, int], size: Shape) -> Tensor:
    return x[..., corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]


def _embed(y: Tensor, corner: tuple[int, int], size: Shape) -> Tensor:
    (top, left), (height, width) = corner, y.shape[-2:]
    return pad(y, (left, size[1] - width - left, top, size[0] - height - top))


def _check_window(owner: str, canvas: Shape, corner: tuple[int, int], size: Shape) -> None:
    if any(c < 0 or s < 1 or c + s > n for n, c, s in zip(canvas, corner, size, strict=True)):
        raise ShapeError(
            f"{owner}: a window of {tuple(size)} at {tuple(corner)} does not fit in {tuple(canvas)}; move or shrink it."
        )
