"""Groups of transforms T_g under which a set of images is expected to be unchanged; a draw is one element a row.

    T_g x = op(x),   T_gᵀ = op.adjoint,   op = group.draw(rng, shape, like)

A group is what equivariant imaging knows of the images beside the data: if T_g x is as likely an image as x, then A T_g x
is data that the instrument could have taken. Shifts on the torus, turns, flips and orders of bands are exact permutations
(TᵀT = I). Open shifts, rotations and dilations lose light at the border, and the last two interpolate: they are groups of
the sky, not of the pixel grid. Which group adds information depends on the operator: `losses.identifiability` measures it.
Invariant: an element depends on its row's stream alone, and is the same for every dtype.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import ConfigError, ShapeError
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Shape
from diffinv.operators.algebra import Compose, Identity, Scaled, compose
from diffinv.operators.base import LinearOperator
from diffinv.operators.geometry import Dilation, Rotation
from diffinv.operators.interpolation import Filter
from diffinv.operators.permutation import BandPermutation, PixelPermutation
from diffinv.operators.sampling import Mask


class Group(abc.ABC):
    """Random transforms of images. Final classes are frozen dataclasses of constants."""

    @abc.abstractmethod
    def draw(self, rng: Rng, shape: Shape, like: Tensor) -> LinearOperator:
        """One random element a row of `rng`, image → image.

        Arguments: rng: B streams. shape: (C, H, W) of the images. like: a tensor of the dtype and device wanted.
        Returns: T_g with B rows. Raises: ShapeError if the group does not act on images of this shape.
        """


@register("group", "shifts")
@dataclass(frozen=True)
class Shifts(Group):
    """Whole-pixel shifts on the torus, (T x)(p) = x(p − d): what leaves at one edge comes back at the other.

    Arguments: reach: pixels; each of d's two components is uniform on −reach … reach, and on the whole axis, each shift
        once, where 2 reach + 1 is its length or more.
    """

    reach: int

    def __post_init__(self) -> None:
        _check_reach(type(self).__name__, self.reach)

    def draw(self, rng: Rng, shape: Shape, like: Tensor) -> PixelPermutation:
        shift = _steps(rng, self.reach, shape, like)
        rows, columns = (_moved(d, n) % n for d, n in zip(shift.unbind(1), shape[-2:], strict=True))
        return PixelPermutation(_flat(rows, columns, shape[-1]), tuple(shape))


@register("group", "open_shifts")
@dataclass(frozen=True)
class OpenShifts(Group):
    """Whole-pixel shifts with an empty sky outside, (T x)(p) = x(p − d), 0 where p − d is outside: light at the edge is lost.

    Arguments: reach: pixels, as in `Shifts`. Not a group of the pixel grid: TᵀT is a mask.
    """

    reach: int

    def __post_init__(self) -> None:
        _check_reach(type(self).__name__, self.reach)

    def draw(self, rng: Rng, shape: Shape, like: Tensor) -> LinearOperator:
        shift = _steps(rng, self.reach, shape, like)
        rows, columns = (_moved(d, n) for d, n in zip(shift.unbind(1), shape[-2:], strict=True))
        inside = _within(rows, shape[-2])[:, :, None] & _within(columns, shape[-1])[:, None]
        wrapped = _flat(rows % shape[-2], columns % shape[-1], shape[-1])
        mask = inside[:, None].expand(-1, *shape)
        return compose(Mask(mask), PixelPermutation(wrapped, tuple(shape)))


@register("group", "quarter_turns")
@dataclass(frozen=True)
class QuarterTurns(Group):
    """Turns by 0, 90, 180 or 270 degrees of square images, in the sense of `torch.rot90`, each with probability ¼."""

    def draw(self, rng: Rng, shape: Shape, like: Tensor) -> PixelPermutation:
        if shape[-2] != shape[-1]:
            raise ShapeError(f"QuarterTurns: images of {tuple(shape[-2:])} pixels do not turn onto themselves; crop to a square.")
        grid = _grid(shape, like)
        table = torch.stack([torch.rot90(grid, k).flatten() for k in range(4)])
        return PixelPermutation(table[_whole(rng, 4, 1, like)[:, 0]], tuple(shape))


@register("group", "flips")
@dataclass(frozen=True)
class Flips(Group):
    """Mirrors of rows and of columns, each with probability ½."""

    def draw(self, rng: Rng, shape: Shape, like: Tensor) -> PixelPermutation:
        grid = _grid(shape, like)
        table = torch.stack([grid.flip(axes).flatten() for axes in ((), (0,), (1,), (0, 1))])
        return PixelPermutation(table[_whole(rng, 4, 1, like)[:, 0]], tuple(shape))


@register("group", "rotations")
@dataclass(frozen=True)
class Rotations(Group):
    """Rotations about the centre by any angle, uniform on (0, 360) degrees; corners leave the image.

    Arguments: filter: the interpolation, see `operators.geometry`.
    """

    filter: Filter

    def draw(self, rng: Rng, shape: Shape, like: Tensor) -> Rotation:
        return Rotation((360 * _unit(rng, 1, like)[:, 0]).to(like.dtype), tuple(shape), self.filter)


@register("group", "dilations")
@dataclass(frozen=True)
class Dilations(Group):
    """Dilations about the centre by a factor that is uniform in its logarithm: objects may be nearer or farther.

    Arguments:
        lowest, highest: range of the factor, dimensionless, 0 < lowest ≤ highest; above 1 objects grow and detail becomes
            coarse, which is what a blur can see. filter: the interpolation.
        conserve_flux: True for flux per pixel, False for surface brightness, see `operators.geometry.Dilation`.
    Raises: ConfigError if the range is empty or reaches 0.
    """

    lowest: float
    highest: float
    filter: Filter
    conserve_flux: bool

    def __post_init__(self) -> None:
        if not 0 < self.lowest <= self.highest < math.inf:
            raise ConfigError(f"Dilations: need 0 < lowest ≤ highest, got {self.lowest} and {self.highest}; try ½ and 2.")

    def draw(self, rng: Rng, shape: Shape, like: Tensor) -> Dilation:
        factor = self.lowest * (self.highest / self.lowest) ** _unit(rng, 1, like)[:, 0]
        return Dilation(factor.to(like.dtype), tuple(shape), self.filter, self.conserve_flux)


@register("group", "band_permutations")
@dataclass(frozen=True)
class BandPermutations(Group):
    """Every order of the bands, with the same probability."""

    def draw(self, rng: Rng, shape: Shape, like: Tensor) -> BandPermutation:
        return BandPermutation(_unit(rng, shape[0], like).argsort(1), tuple(shape[-2:]))


@register("group", "amplitudes")
@dataclass(frozen=True)
class Amplitudes(Group):
    """T x = e^(spread · z) x, z ~ N(0, 1): objects may be brighter or fainter.

    Arguments: spread: standard deviation of the logarithm of the factor, dimensionless, ≥ 0. Its median is 1.
    Raises: ConfigError if it is negative or not finite.
    """

    spread: float

    def __post_init__(self) -> None:
        if not 0 <= self.spread < math.inf:
            raise ConfigError(f"Amplitudes: spread must be finite and ≥ 0, got {self.spread}; 0.2 is about 20 % in brightness.")

    def draw(self, rng: Rng, shape: Shape, like: Tensor) -> Scaled:
        normal = rng.normal(like.new_empty(len(rng), 1, dtype=torch.float64))[:, 0]
        return Scaled((self.spread * normal).exp().to(like.dtype), Identity(tuple(shape)))


@register("group", "product")
@dataclass(frozen=True)
class Product(Group):
    """T = T₁ T₂ … Tₙ, each from a group of its own, the last applied first.

    Arguments: groups: one or more. `Product((QuarterTurns(), Flips()))` is the dihedral group, each element with the same
        probability. Raises: ConfigError if there are none.
    """

    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        if not self.groups:
            raise ConfigError("Product: no groups given; name at least one.")

    def draw(self, rng: Rng, shape: Shape, like: Tensor) -> Compose:
        return Compose(tuple(group.draw(rng, shape, like) for group in self.groups))


def _unit(rng: Rng, count: int, like: Tensor) -> Tensor:
    """Uniform on (0, 1): (B, count), float64 so that every dtype meets the same element."""
    return rng.uniform(like.new_empty(len(rng), count, dtype=torch.float64))


def _whole(rng: Rng, number: int, count: int, like: Tensor) -> Tensor:
    """Uniform on 0 … number − 1: (B, count), int64."""
    return (number * _unit(rng, count, like)).long().clamp_max(number - 1)


def _steps(rng: Rng, reach: int, shape: Shape, like: Tensor) -> Tensor:
    """Shifts (rows, columns) in pixels: (B, 2), int64."""
    ranges = like.new_tensor([min(2 * reach + 1, n) for n in shape[-2:]], dtype=torch.int64)
    return (ranges * _unit(rng, 2, like)).long().minimum(ranges - 1) - ranges // 2


def _moved(shift: Tensor, length: int) -> Tensor:
    """p − d of every pixel p of an axis: (B,) → (B, length)."""
    return torch.arange(length, device=shift.device) - shift[:, None]


def _within(position: Tensor, length: int) -> Tensor:
    return (position >= 0) & (position < length)


def _flat(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Flat pixels of a grid of rows (B, H) and columns (B, W): (B, H·W)."""
    return (rows[:, :, None] * width + columns[:, None]).flatten(1)


def _grid(shape: Shape, like: Tensor) -> Tensor:
    return torch.arange(shape[-2] * shape[-1], device=like.device).reshape(tuple(shape[-2:]))


def _check_reach(owner: str, reach: int) -> None:
    if reach < 0 or reach != int(reach):
        raise ConfigError(f"{owner}: reach must be a whole number of pixels ≥ 0, got {reach}.")
