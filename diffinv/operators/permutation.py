"""Exact rearrangements: of the pixels of every band, and of the bands. Nothing is interpolated, so TᵀT = I to the bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import ShapeError
from diffinv.core.registry import register
from diffinv.core.types import Shape
from diffinv.operators.base import LinearOperator


@register("operator", "pixel_permutation")
@dataclass(frozen=True, eq=False)
class PixelPermutation(LinearOperator):
    """y_c(p) = x_c(source(p)), the same for every band: periodic shifts, quarter turns, flips.

    Arguments:
        source: (1|B, H·W), int64, the flat pixel (row · W + column) that each flat output pixel is taken from; every pixel once.
        in_shape: (C, H, W).
    Raises: ShapeError if a row of `source` is not a permutation of the H·W pixels.
    """

    source: Tensor
    in_shape: Shape

    def __post_init__(self) -> None:
        _check_permutation("PixelPermutation: source", self.source, self.in_shape[-2] * self.in_shape[-1])

    @property
    def out_shape(self) -> Shape:
        return self.in_shape

    def apply(self, x: Tensor) -> Tensor:
        return _take(x.flatten(2), self.source, 2).reshape(x.shape)

    def adjoint(self, y: Tensor) -> Tensor:
        return _take(y.flatten(2), self.source.argsort(1), 2).reshape(y.shape)


@register("operator", "band_permutation")
@dataclass(frozen=True, eq=False)
class BandPermutation(LinearOperator):
    """y_c = x_source(c): the bands in another order.

    Arguments: source: (1|B, C), int64, every band once. size: (H, W) in pixels.
    Raises: ShapeError if a row of `source` is not a permutation of the C bands.
    """

    source: Tensor
    size: tuple[int, int]

    def __post_init__(self) -> None:
        _check_permutation("BandPermutation: source", self.source, self.source.shape[-1])

    @property
    def in_shape(self) -> Shape:
        return (self.source.shape[1], *self.size)

    @property
    def out_shape(self) -> Shape:
        return self.in_shape

    def apply(self, x: Tensor) -> Tensor:
        return _take(x, self.source, 1)

    def adjoint(self, y: Tensor) -> Tensor:
        return _take(y, self.source.argsort(1), 1)


def _take(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """x with `index` (1|B, n) along `axis`."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = index.shape
    return x.gather(axis, index.reshape(shape).expand(x.shape))


def _check_permutation(name: str, index: Tensor, length: int) -> None:
    if index.ndim != 2 or index.shape[1] != length or index.dtype != torch.int64:
        raise ShapeError(f"{name} must be int64 (1|B, {length}), got {index.dtype} {tuple(index.shape)}; give flat indices.")
    if not index.is_meta and not bool((index.sort(1)[0] == torch.arange(length, device=index.device)).all()):
        raise ShapeError(f"{name} must hold each of 0 … {length - 1} once a row; use Mask or Affine for maps that lose pixels.")
