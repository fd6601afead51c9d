"""What is on the sky in one field: the components that a scene is made of, as plain parameters.

Lengths are in arcsec, angles in radians (from x to y), fluxes in nJy, positions relative to the centre of the field.

Invariant: a scene is immutable and contains no image. Random fields are stored as integer seeds, so that a scene is the
same function of the sky on every grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ZERO_POINT_AB = 31.4  # AB magnitude of 1 nJy


@dataclass(frozen=True)
class Sersic:
    """Elliptical profile I(r) ~ exp(-b (r / r_half)^(1 / index)); r_half is the circularised half-light radius."""

    flux: float
    index: float
    half_light_radius: float
    axis_ratio: float
    angle: float
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True)
class Star:
    """An unresolved source."""

    flux: float
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True, eq=False)
class Knots:
    """Round Gaussian clumps: offsets `dx`, `dy` and `width` (standard deviation) in arcsec, `share` of the flux, all (K,)."""

    flux: float
    dx: np.ndarray
    dy: np.ndarray
    width: np.ndarray
    share: np.ndarray
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True)
class Texture:
    """Multiplicative lognormal field exp(amplitude f), f of power spectrum k^-slope above `length` arcsec."""

    amplitude: float
    slope: float
    length: float
    seed: int


@dataclass(frozen=True)
class PatternedDisc:
    """A disc I ~ exp(-(r / h)^(1 / index)) times spiral arms, plus bar and ring, times dust, lopsidedness and texture.

    Lengths named `*_radius`, `*_width`, `bar_length`, `dust_offset` are in units of the scale length h = `scale`.
    """

    flux: float
    scale: float
    index: float
    axis_ratio: float
    angle: float
    arms: int
    pitch: float
    phase: float
    contrast: float
    sharpness: float
    bar_strength: float
    bar_length: float
    bar_ratio: float
    bar_angle: float
    ring_strength: float
    ring_radius: float
    ring_width: float
    dust_depth: float
    dust_offset: float
    dust_width: float
    lopsidedness: float
    lopsided_angle: float
    bend: float
    texture: Texture
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True)
class Stamp:
    """A real stamp of the sample, cut at `threshold` times its smoothed noise, turned, mirrored and dilated."""

    flux: float
    number: int
    threshold: float
    angle: float
    mirrored: bool
    dilation: float
    x: float = 0.0
    y: float = 0.0


Component = Sersic | Star | Knots | PatternedDisc | Stamp


@dataclass(frozen=True)
class Segmentation:
    """The look of a real stamp: correlated noise, exactly zero outside an irregular isophote.

    `noise` is in units of the peak, `threshold` in units of the smoothed noise, `correlation` a FWHM in arcsec.
    """

    noise: float
    threshold: float
    correlation: float
    seed: int


@dataclass(frozen=True)
class Scene:
    """What is on the sky in one field."""

    components: tuple[Component, ...]
    segmentation: Segmentation | None = None
