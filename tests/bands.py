"""Small bands as a reader makes them: a square source on white noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from diffinv.data.layouts import InputOptions, RawBand
from diffinv.data.observation import Band, check_bands
from diffinv.data.psf import gaussian_stamp

SHAPE = (32, 36)
PSF = gaussian_stamp(3.5, 25)
CARDS = {"BUNIT": "nJy", "PIXSCALE": 0.2, "BAND": "i"}


def source(seed: int = 0, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    image = np.random.default_rng(seed).normal(size=shape)
    image[shape[0] // 2 - 3 : shape[0] // 2 + 3, shape[1] // 2 - 3 : shape[1] // 2 + 3] += 30
    return image


def raw_band(**changes) -> RawBand:
    base = RawBand("i", source(), CARDS, np.ones(SHAPE), psf=PSF, psf_header={"PSFNORM": 1.0})
    return replace(base, **changes)


def checked_band(**changes) -> Band:
    return check_bands([raw_band(**changes)], InputOptions())[0]
