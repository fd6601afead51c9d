"""Geometry: shift, rotate, dilate, and resample between two pixel grids.

An affine map M, (2, 3), takes the centre of an output pixel to input pixel coordinates: (row, column)_in =
M[:, :2] (row, column)_out + M[:, 2]. Pixel (i, j) covers [i − ½, i + ½] × [j − ½, j + ½].

Two units of an image are told apart by `conserve_flux`: a surface brightness is carried as it is (False); flux per pixel
is multiplied by the area ratio |det M|, input pixels an output pixel (True): for a band-limited image, whose point samples
times the pixel area are its pixel fluxes when the kernel before it holds the pixel's own response, the sum is kept.
There is no anti-alias filter: blur first when the output grid is coarser than the image's detail.
Invariant: adjoints are exact transposes of the interpolation used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import ShapeError, UnsupportedError
from diffinv.core.registry import register
from diffinv.core.types import Shape
from diffinv.operators.base import LinearOperator
from diffinv.operators.interpolation import Filter, gather, matrix, scatter


@register("operator", "shift")
@dataclass(frozen=True, eq=False)
class Shift(LinearOperator):
    """y(p) = x(p − d) by sinc interpolation: exact for band-limited images; light outside is zero, nothing wraps.

    Arguments: shift: (1|B, 2), d = (rows, columns) in pixels; positive moves the image to larger indices.
        in_shape: (C, H, W).
    """

    shift: Tensor
    in_shape: Shape

    @property
    def out_shape(self) -> Shape:
        return self.in_shape

    def _matrix(self, axis: int) -> Tensor:
        pixel = torch.arange(self.in_shape[1 + axis], dtype=self.shift.dtype, device=self.shift.device)
        return torch.sinc(pixel[:, None] - pixel - self.shift[:, axis, None, None])[:, None]

    def apply(self, x: Tensor) -> Tensor:
        return self._matrix(0) @ x @ self._matrix(1).mT

    def adjoint(self, y: Tensor) -> Tensor:
        return self._matrix(0).mT @ y @ self._matrix(1)


@register("operator", "affine")
@dataclass(frozen=True, eq=False)
class Affine(LinearOperator):
    """y(p) = a x(M p), a = |det M| if flux is conserved, else 1, with x interpolated by `filter`.

    Arguments:
        matrix: M, (1|B, 2, 3), output pixel → input pixel, rows (row, column), in pixels.
        in_shape: (C, H, W). size: (h, w) of the output. filter: the interpolation.
        conserve_flux: True for flux per pixel, False for surface brightness.
    Raises: ShapeError if M is not (1|B, 2, 3).
    """

    matrix: Tensor
    in_shape: Shape
    size: tuple[int, int]
    filter: Filter
    conserve_flux: bool

    def __post_init__(self) -> None:
        _check_matrix("Affine", self.matrix)

    @property
    def out_shape(self) -> Shape:
        return (self.in_shape[0], *self.size)

    @property
    def _points(self) -> Tensor:
        return affine_points(self.matrix, self.size)

    def _times_area(self, v: Tensor) -> Tensor:
        return v * area_ratio(self.matrix)[:, None, None, None] if self.conserve_flux else v

    def apply(self, x: Tensor) -> Tensor:
        return self._times_area(gather(x, self._points, self.filter).unflatten(2, tuple(self.size)))

    def adjoint(self, y: Tensor) -> Tensor:
        return scatter(self._times_area(y).flatten(2), self._points, tuple(self.in_shape[-2:]), self.filter)


@register("operator", "rotation")
@dataclass(frozen=True, eq=False)
class Rotation(LinearOperator):
    """Rotation about the centre ((H − 1)/2, (W − 1)/2), in the sense of `torch.rot90` (rows downwards: counter-clockwise).

    Arguments: angle: (1|B,), degrees. in_shape: (C, H, W). filter: the interpolation. Area is kept, so flux is too.
    """

    angle: Tensor
    in_shape: Shape
    filter: Filter

    @property
    def out_shape(self) -> Shape:
        return self.in_shape

    @property
    def affine(self) -> Affine:
        """The same map as an `Affine`."""
        cos, sin = torch.cos(torch.deg2rad(self.angle)), torch.sin(torch.deg2rad(self.angle))
        linear = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
        size = tuple(self.in_shape[-2:])
        return Affine(_about_centre(linear, size), self.in_shape, size, self.filter, False)

    def apply(self, x: Tensor) -> Tensor:
        return self.affine.apply(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.affine.adjoint(y)


@register("operator", "dilation")
@dataclass(frozen=True, eq=False)
class Dilation(LinearOperator):
    """y(p) = x(c + (p − c)/f) about the centre c: a factor f > 1 makes objects larger.

    Arguments:
        factor: f, (1|B,), > 0, dimensionless. in_shape: (C, H, W). filter: the interpolation.
        conserve_flux: True divides by f², so that a larger object is fainter a pixel; False keeps the surface brightness.
    """

    factor: Tensor
    in_shape: Shape
    filter: Filter
    conserve_flux: bool

    @property
    def out_shape(self) -> Shape:
        return self.in_shape

    @property
    def affine(self) -> Affine:
        """The same map as an `Affine`."""
        size = tuple(self.in_shape[-2:])
        eye = torch.eye(2, dtype=self.factor.dtype, device=self.factor.device)
        linear = eye / self.factor[:, None, None]
        return Affine(_about_centre(linear, size), self.in_shape, size, self.filter, self.conserve_flux)

    def apply(self, x: Tensor) -> Tensor:
        return self.affine.apply(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.affine.adjoint(y)


@register("operator", "separable_resample")
@dataclass(frozen=True, eq=False)
class SeparableResample(LinearOperator):
    """y = R x Cᵀ: two dense interpolation matrices, for grids whose axes are parallel.

    Arguments: rows: R, (1|B, h, H). columns: C, (1|B, w, W), dimensionless. channels: number of bands.
    """

    rows: Tensor
    columns: Tensor
    channels: int

    @classmethod
    def between(
        cls,
        affine: Tensor,
        in_shape: Shape,
        size: tuple[int, int],
        filter: Filter,
        *,
        conserve_flux: bool,
        tolerance: float = 1e-6,
    ) -> SeparableResample:
        """The matrices of an axis-aligned affine map (1|B, 2, 3).

        Arguments: as in `Affine`. tolerance: pixels by which a neglected rotation or shear may move an output pixel.
        Raises: UnsupportedError if the map rotates or shears by more; use `Affine`, or `resample`, which chooses.
        """
        _check_matrix("SeparableResample", affine)
        if not _axis_aligned(affine, size, tolerance):
            raise UnsupportedError(
                "SeparableResample: the map rotates or shears, so it has no separable matrices; use resample()."
            )
        area = area_ratio(affine)[:, None, None] if conserve_flux else 1
        positions = [
            affine[:, k, k, None] * torch.arange(size[k], dtype=affine.dtype, device=affine.device) + affine[:, k, 2, None]
            for k in (0, 1)
        ]
        return cls(area * matrix(positions[0], in_shape[1], filter), matrix(positions[1], in_shape[2], filter), in_shape[0])

    @property
    def in_shape(self) -> Shape:
        return (self.channels, self.rows.shape[2], self.columns.shape[2])

    @property
    def out_shape(self) -> Shape:
        return (self.channels, self.rows.shape[1], self.columns.shape[1])

    def apply(self, x: Tensor) -> Tensor:
        return self.rows[:, None] @ x @ self.columns[:, None].mT

    def adjoint(self, y: Tensor) -> Tensor:
        return self.rows[:, None].mT @ y @ self.columns[:, None]


def resample(
    affine: Tensor,
    in_shape: Shape,
    size: tuple[int, int],
    filter: Filter,
    *,
    conserve_flux: bool,
    tolerance: float = 1e-6,
) -> LinearOperator:
    """Resampling between two grids: two small matrices where the axes are parallel, a gather where they are not.

    Arguments: as in `Affine`; filter: `KaiserSinc(8, 8)` for well-sampled images. tolerance: pixels; axes count as
        parallel when what is neglected moves no pixel of the output by more.
    """
    if _axis_aligned(affine, size, tolerance):
        return SeparableResample.between(affine, in_shape, size, filter, conserve_flux=conserve_flux, tolerance=tolerance)
    return Affine(affine, in_shape, size, filter, conserve_flux)


def affine_points(affine: Tensor, size: tuple[int, int]) -> Tensor:
    """Input coordinates of the output pixel centres: (1|B, 2, 3) → (1|B, h·w, 2)."""
    axes = [torch.arange(n, dtype=affine.dtype, device=affine.device) for n in size]
    pixels = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    return pixels @ affine[..., :2].mT + affine[:, None, :, 2]


def area_ratio(affine: Tensor) -> Tensor:
    """|det M|, the area of an output pixel in input pixels: (1|B,)."""
    return (affine[:, 0, 0] * affine[:, 1, 1] - affine[:, 0, 1] * affine[:, 1, 0]).abs()


def _axis_aligned(affine: Tensor, size: tuple[int, int], tolerance: float) -> bool:
    skew = torch.stack([affine[:, 0, 1] * size[1], affine[:, 1, 0] * size[0]])
    return bool((skew.abs() <= tolerance).all())


def _about_centre(linear: Tensor, size: tuple[int, int]) -> Tensor:
    """(1|B, 2, 2) → (1|B, 2, 3) with the image's centre fixed."""
    centre = torch.tensor([(n - 1) / 2 for n in size], dtype=linear.dtype, device=linear.device)
    return torch.cat([linear, (centre - linear @ centre)[..., None]], -1)


def _check_matrix(owner: str, affine: Tensor) -> None:
    if affine.ndim != 3 or tuple(affine.shape[1:]) != (2, 3):
        raise ShapeError(f"{owner}: the affine map must be (1|B, 2, 3), got {tuple(affine.shape)}; give output → input pixels.")
