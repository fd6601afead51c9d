"""Pixel grids on the sky: shape, world coordinates, and the maps from one grid to another.

Pixel (row i, column j) has its centre at x = j, y = i counted from 0, FITS pixel (j + 1, i + 1), and covers ± ½. A grid
with pixels s times smaller that starts at the same edge has

    CRPIX' = (CRPIX − ½) s + ½,   CDELT' = CDELT / s.

That is the whole change of a WCS without distortion (SIP, TPV). The grid of an output has none (`undistorted`): it is the tangent
plane at the field's centre, with pixels that follow the distorted ones to first order.
Grids without celestial coordinates are linear, in arcsec from the centre of the field.
Invariant: `rescaled` and `padded` keep the sky position of everything, `undistorted` to 0.05 pixels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from diffinv.core.checks import InputError
from diffinv.data.fits import Cards, Value, celestial_cards, icrs_to_pixel, pixel_axes, pixel_to_icrs

_DISTORTION = re.compile(r"[AB]P?_(ORDER|\d_\d)|PV\d_\d+")


@dataclass(frozen=True)
class Affine:
    """p_other = matrix p_self + offset in (row, column) pixels; `error`: largest deviation of the true map, pixels of other."""

    matrix: np.ndarray
    offset: np.ndarray
    error: float


@dataclass(frozen=True, eq=False)
class SkyGrid:
    """A pixel grid.

    Arguments:
        shape: (H, W). cards: its WCS in normal form. celestial: whether these are sky coordinates or arcsec from a centre.
    """

    shape: tuple[int, int]
    cards: Cards
    celestial: bool

    @classmethod
    def from_header(cls, header: Cards, shape: tuple[int, int], *, pixel_scale: float | None = None) -> SkyGrid:
        """The grid of an image.

        Arguments: header: its cards (celestial WCS, or one of ours in arcsec, or PIXSCALE in arcsec). shape: (H, W).
            pixel_scale: arcsec, if the header has none.
        Raises: InputError if neither says how large a pixel is, or if both do and differ by more than 1 %.
        """
        cards = celestial_cards(header)
        if pixel_scale is None and isinstance(header.get("PIXSCALE"), (int, float)):
            pixel_scale = float(header["PIXSCALE"])
        if cards is None:
            if header.get("CTYPE1") == "LINEAR" and header.get("CUNIT1") == "arcsec":
                return cls(tuple(shape), {key: header[key] for key in cls.linear(shape, 1.0).cards if key in header}, False)
            if pixel_scale is None:
                raise InputError("no celestial WCS and no PIXSCALE; give input.pixel_scale in arcsec.")
            return cls.linear(shape, pixel_scale)
        grid = cls(tuple(shape), cards, True)
        grid._check_square()
        if pixel_scale is not None and abs(pixel_scale / grid.pixel_scale - 1) > 0.01:
            raise InputError(
                f"pixel scale mismatch: the WCS says {grid.pixel_scale:.5g}″ but {pixel_scale:.5g}″ was given; correct one."
            )
        return grid

    @classmethod
    def linear(cls, shape: tuple[int, int], pixel_scale: float) -> SkyGrid:
        """A grid in arcsec from the centre of the field, x to the right and y up."""
        if not (np.isfinite(pixel_scale) and pixel_scale > 0):
            raise InputError(
                f"the pixel scale must be finite and > 0 arcsec, got {pixel_scale}; correct PIXSCALE or input.pixel_scale."
            )
        cards: dict[str, Value] = {"WCSAXES": 2}
        for axis, length in ((1, shape[1]), (2, shape[0])):
            cards |= {f"CRPIX{axis}": (length + 1) / 2, f"CRVAL{axis}": 0.0, f"CDELT{axis}": float(pixel_scale)}
            cards |= {f"CTYPE{axis}": "LINEAR", f"CUNIT{axis}": "arcsec"}
        return cls(tuple(shape), cards, False)

    def _check_square(self) -> None:
        axes = pixel_axes(self.cards) * 3600
        scales = np.hypot(*axes)
        skew = abs(axes[:, 0] @ axes[:, 1]) / (scales[0] * scales[1])
        if abs(scales[0] / scales[1] - 1) > 0.01 or skew > 0.01:
            raise InputError(
                f"pixels are {scales[0]:.4g}″ × {scales[1]:.4g}″ (skew {skew:.2g}), not square; resample the image first."
            )

    @cached_property
    def pixel_scale(self) -> float:
        """Side of a pixel at the reference point, arcsec."""
        if not self.celestial:
            return float(self.cards["CDELT1"])
        return float(np.sqrt(abs(np.linalg.det(pixel_axes(self.cards)))) * 3600)

    def pixel_to_world(self, row: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Two world coordinates at pixel positions: RA and Dec in ICRS degrees, or x and y in arcsec."""
        if self.celestial:
            return pixel_to_icrs(self.cards, np.asarray(column), np.asarray(row))
        return tuple((np.asarray(p) + 1 - self.cards[f"CRPIX{k}"]) * self.cards[f"CDELT{k}"] for k, p in ((1, column), (2, row)))

    def world_to_pixel(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of world coordinates (RA and Dec in ICRS degrees, or x and y in arcsec)."""
        if self.celestial:
            column, row = icrs_to_pixel(self.cards, np.asarray(first), np.asarray(second))
            return row, column
        x, y = (np.asarray(w) / self.cards[f"CDELT{k}"] + self.cards[f"CRPIX{k}"] - 1 for k, w in ((1, first), (2, second)))
        return y, x

    @property
    def distorted(self) -> bool:
        """Whether its WCS has terms beyond a projection and a matrix."""
        return any(_DISTORTION.fullmatch(key) for key in self.cards)

    def undistorted(self) -> SkyGrid:
        """The same pixels in the tangent plane (TAN, ICRS) at the centre of the field, by the best linear map; this if it is one.

        Raises: InputError if the field bends by more than 0.05 pixels, or its pixels are not square on the sky.
        """
        if not self.distorted:
            return self
        middle = np.array([(n - 1) / 2 for n in self.shape])
        ra, dec = (float(v) for v in self.pixel_to_world(*middle))
        side = self.pixel_scale / 3600
        cards: dict[str, Value] = {"WCSAXES": 2, "RADESYS": "ICRS"}
        for axis, name, value in ((1, "RA---TAN", ra), (2, "DEC--TAN", dec)):
            cards |= {f"CTYPE{axis}": name, f"CUNIT{axis}": "deg", f"CRVAL{axis}": value, f"CDELT{axis}": side}
        plane = replace(self, cards={**cards, "CRPIX1": 1.0, "CRPIX2": 1.0})
        affine = self.affine_to(plane)
        row, column = np.linalg.solve(affine.matrix, -affine.offset)
        cards |= {"CRPIX1": float(column) + 1, "CRPIX2": float(row) + 1}
        (by_row_y, by_column_y), (by_row_x, by_column_x) = affine.matrix.tolist()
        cards |= {"PC1_1": by_column_x, "PC1_2": by_row_x, "PC2_1": by_column_y, "PC2_2": by_row_y}
        flat = replace(self, cards=cards)
        flat._check_square()
        return flat

    def rescaled(self, factor: float, shape: tuple[int, int]) -> SkyGrid:
        """Pixels `factor` times smaller, from the same lower left edge, in an array of `shape`; of a grid without distortion."""
        if self.distorted:
            raise InputError("a WCS with distortion (SIP, TPV) cannot be rescaled; take its `undistorted` grid.")
        cards = dict(self.cards)
        for axis in (1, 2):
            cards[f"CRPIX{axis}"] = (float(self.cards.get(f"CRPIX{axis}", 0.0)) - 0.5) * factor + 0.5
            cards[f"CDELT{axis}"] = float(self.cards.get(f"CDELT{axis}", 1.0)) / factor
        return replace(self, cards=cards, shape=tuple(shape))

    def padded(self, margin: int) -> SkyGrid:
        """The same pixels with `margin` more on every side (fewer, if negative)."""
        moved = {f"CRPIX{k}": float(self.cards.get(f"CRPIX{k}", 0.0)) + margin for k in (1, 2)}
        return replace(self, cards={**self.cards, **moved}, shape=tuple(n + 2 * margin for n in self.shape))

    def even(self) -> SkyGrid:
        """With one row more above, and one column more to the right, where there is an odd number of them."""
        return replace(self, shape=tuple(n + n % 2 for n in self.shape))

    def affine_to(self, other: SkyGrid, *, tolerance: float = 0.05) -> Affine:
        """Least-squares linear map from pixels of this grid to pixels of `other`, over this grid's footprint.

        Arguments: tolerance: largest deviation allowed, in pixels of `other`.
        Raises: InputError if the grids have no common coordinates, or the map is not linear to `tolerance`.
        """
        if self.celestial != other.celestial:
            raise InputError("one image has sky coordinates and the other only a pixel scale; give both a WCS.")
        row, column = (a.ravel() for a in np.meshgrid(*(np.linspace(-0.5, n - 0.5, 9) for n in self.shape), indexing="ij"))
        target = np.stack(other.world_to_pixel(*self.pixel_to_world(row, column)), 1)
        if not np.isfinite(target).all():
            raise InputError("the grids do not meet on the sky (a position has no pixel); check the WCS of both.")
        design = np.stack([row, column, np.ones_like(row)], 1)
        solution = np.linalg.lstsq(design, target, rcond=None)[0]
        error = float(np.abs(design @ solution - target).max())
        if error > tolerance:
            raise InputError(
                f"the map between the grids bends by {error:.3g} pixels over the field (> {tolerance}); cut a smaller field."
            )
        return Affine(solution[:2].T.copy(), solution[2].copy(), error)

    def image_cards(self, extra_axes: tuple[str, ...] = ()) -> dict[str, Value]:
        """The WCS cards of an image on this grid; further axes (planes, draws) count from 1."""
        cards = {**self.cards, "WCSAXES": 2 + len(extra_axes)}
        for axis, name in enumerate(extra_axes, start=3):
            cards |= {f"CTYPE{axis}": name, f"CRPIX{axis}": 1.0, f"CRVAL{axis}": 1.0, f"CDELT{axis}": 1.0}
        return {"WCSAXES": cards.pop("WCSAXES"), **cards}


def output_grid(grid: SkyGrid, scale: float) -> SkyGrid:
    """Pixels of `scale` arcsec whose lower left edge is that of `grid`, and that cover it all, without distortion.

    A last row or column that would cover less than a hundredth of an output pixel is left away.
    """
    grid = grid.undistorted()
    factor = grid.pixel_scale / scale
    return grid.rescaled(factor, tuple(int(np.ceil(n * factor - 0.01)) for n in grid.shape))
