"""A whole job in seconds: a prior of 16² pixels with random weights, and observations of a few pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from diffinv.data.fits import Plane, encode_fits
from diffinv.engine.mocks import sky_cards
from diffinv.priors.store import PriorCard, build_denoiser, save_prior

FAST = ("--samples", "4", "--set", "sampler.steps=4", "--set", "sampler.guidance.iterations=2")


def card(bands: tuple[str, ...] = ("grey",)) -> PriorCard:
    return PriorCard("tiny", bands, 16, 0.1, 0.2, 1.0, 0.01, 20.0, (8, 16), (1, 1), "random weights, for tests")


def write_prior(path: Path, bands: tuple[str, ...] = ("grey",)) -> Path:
    """A prior file whose network answers nothing new: its last layer is zero, as in every untrained denoiser."""
    tiny = card(bands)
    save_prior(path, build_denoiser(tiny), tiny, variance=torch.ones(1, len(bands), 16, 16))
    return path


def blob(size: int, fwhm: float, flux: float = 1.0) -> np.ndarray:
    """A round Gaussian at the centre."""
    offset = np.arange(size) - (size - 1) / 2
    image = np.exp(-4 * np.log(2) * (offset[:, None] ** 2 + offset**2) / fwhm**2)
    return flux * image / image.sum()


def band_planes(name: str, extver: int, rng: np.random.Generator) -> list[Plane]:
    """A galaxy of 100 nJy on 8 × 8 pixels of 0.2″ with noise 1 nJy, PSF FWHM 0.6″."""
    data = blob(8, 4.0, 100.0) + rng.standard_normal((8, 8))
    cards = {**sky_cards((8, 8), 0.2), "BAND": name, "BUNIT": "nJy"}
    psf = {"BAND": name, "PSFNORM": 1.0}
    return [
        Plane("SCI", data.astype(np.float32), cards, extver),
        Plane("VAR", np.ones((8, 8), np.float32), cards, extver),
        Plane("PSF", blob(15, 3.0).astype(np.float32), psf, extver),
    ]


def write_observation(path: Path, *, bands: Sequence[str] = ("i",), seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    planes = [Plane("PRIMARY", None, {})]
    for extver, name in enumerate(bands, start=1):
        planes += band_planes(name, extver, rng)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_fits(planes))
    return path
