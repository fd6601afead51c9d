"""Arrays to PNG images. The only file that imports matplotlib (its colour maps; no window, no global figure) and Pillow.

One asinh stretch is shared by everything that is a brightness: `t(v) = asinh(v/s) / asinh(v_max/s)`, linear below the
softening s (the noise of the mean) and logarithmic above, so that sky noise and core are seen at once. Brightness is per
arcsec², which makes data and answer comparable although their pixels differ.
Invariant: a pixel without a value is drawn in grey, never as a value.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from PIL import Image

BRIGHTNESS, SPREAD, SIGNED = "gray", "magma", "RdBu_r"
_NO_VALUE = np.array([128, 128, 128, 255], dtype=np.uint8)


@dataclass(frozen=True)
class Stretch:
    """t(v) = (asinh(v/s) − asinh(lo/s)) / (asinh(hi/s) − asinh(lo/s)), clipped to [0, 1].

    Arguments: softening: s > 0. low, high: the values drawn black and white, low < high; all in the unit of the image.
    """

    softening: float
    low: float
    high: float

    def __call__(self, values: np.ndarray) -> np.ndarray:
        low, high = np.arcsinh(self.low / self.softening), np.arcsinh(self.high / self.softening)
        return np.clip((np.arcsinh(values / self.softening) - low) / (high - low), 0, 1)

    def value(self, fraction: float) -> float:
        """The value drawn at this fraction of the colour bar."""
        low, high = np.arcsinh(self.low / self.softening), np.arcsinh(self.high / self.softening)
        return float(self.softening * np.sinh(low + fraction * (high - low)))


@dataclass(frozen=True)
class Linear:
    """t(v) = (v − low)/(high − low), clipped to [0, 1]."""

    low: float
    high: float

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return np.clip((values - self.low) / (self.high - self.low), 0, 1)

    def value(self, fraction: float) -> float:
        """The value drawn at this fraction of the colour bar."""
        return self.low + fraction * (self.high - self.low)


Scale = Stretch | Linear


def shared_stretch(means: Sequence[np.ndarray], spreads: Sequence[np.ndarray]) -> Stretch:
    """The stretch of an object: softened at twice the median std, from −3 median std to the 99.8th percentile of the mean.

    Arguments: means, spreads: images of one unit, NaN where there is no value.
    """
    mean = np.concatenate([np.ravel(m[np.isfinite(m)]) for m in means])
    spread = np.concatenate([np.ravel(s[np.isfinite(s)]) for s in spreads])
    top = float(np.percentile(mean, 99.8)) if mean.size else 1.0
    floor = float(np.median(spread)) if spread.size else 0.0
    floor = floor if floor > 0 else max(abs(top) * 1e-3, 1e-30)
    return Stretch(2 * floor, -3 * floor, max(top, 6 * floor))


def spread_scale(spreads: Sequence[np.ndarray]) -> Linear:
    """From 0 to the 99.8th percentile of the posterior standard deviation."""
    values = np.concatenate([np.ravel(s[np.isfinite(s)]) for s in spreads])
    top = float(np.percentile(values, 99.8)) if values.size else 0.0
    return Linear(0.0, top if top > 0 else 1.0)


def colour(image: np.ndarray, scale: Scale, name: str) -> np.ndarray:
    """(H, W) → (H, W, 4) uint8 in a matplotlib colour map, first row at the bottom; grey where there is no value."""
    finite = np.isfinite(image)
    shown = colormaps[name](scale(np.where(finite, image, 0.0)), bytes=True)
    shown[~finite] = _NO_VALUE
    return shown[::-1]


def png(image: np.ndarray, scale: Scale, name: str) -> str:
    """A `data:` address of the image, one PNG pixel a pixel; the page enlarges it without smoothing."""
    return png_address(colour(image, scale, name))


def png_address(pixels: np.ndarray) -> str:
    """A `data:` address of opaque (H, W, 4) uint8."""
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode("ascii")


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG file of opaque (H, W, 4) uint8; a colour is one byte where 256 of them suffice."""
    height, width, _ = pixels.shape
    colours, index = np.unique(np.ascontiguousarray(pixels).view("<u4")[..., 0], return_inverse=True)
    if len(colours) <= 256:
        image = Image.fromarray(index.reshape(height, width).astype(np.uint8))
        image.putpalette(colours.view(np.uint8).reshape(-1, 4)[:, :3].tobytes())
    else:
        image = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def colour_bar(name: str) -> str:
    """A horizontal colour bar, 128 × 1."""
    ramp = colormaps[name](np.linspace(0, 1, 128)[None], bytes=True)
    return png_address(ramp)
