"""Noisy images of galaxies without truth, and what their own sky says of their noise.

* `euclid_like`: 100 galaxies of 41² pixels. σ of each from its own sky (more than 18 pixels from the centre).
* `hst`: the middle 32² pixels of the real F814W stamps that have as many. σ of each from the catalogue, checked on the frame of
  4 pixels around the whole stamp; the correlation of the coadd's noise from its file, checked on the same frames.

Images are in units of their σ, so that the noise of all is one object of variance 1 and a risk is in σ².
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffinv.core.checks import UnsupportedError
from diffinv.core.rng import Rng
from diffinv.data.fits import read_images, read_table
from diffinv.likelihood import Observation
from diffinv.losses.base import MeasuredBatch
from diffinv.noise.base import Noise
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Identity
from diffinv.operators.groups import Group
from diffinv.training.sources import Source

FRAME, HST_SIZE, REACH = 4, 32, 3  # pixels; lags of the correlation that are kept
WHITE = Gaussian(torch.ones(1))


@dataclass(frozen=True)
class Stamps:
    """N images y/σ (N, 1, H, W) with noise of variance 1. sky, aperture: (H, W) masks. facts: about the noise, in words."""

    name: str
    y: Tensor
    noise: Noise
    sky: Tensor
    aperture: Tensor
    facts: tuple[str, ...]

    @property
    def source(self) -> Tensor:
        """Where light is plain: data smoothed over 3 × 3 pixels above 4 of their own σ, the sky left out: (N, 1, H, W)."""
        mean = lambda v: torch.nn.functional.avg_pool2d(v, 3, 1, padding=1)
        draws = self.noise.sample(torch.zeros(256, *self.y.shape[1:]), Rng.for_draws(5, range(256), 1))
        return (mean(self.y) > 4 * mean(draws)[..., 1:-1, 1:-1].std()) & ~self.sky

    def observation(self, noise: Noise | None = None) -> Observation:
        return Observation(self.y, Identity(tuple(self.y.shape[1:])), self.noise if noise is None else noise)


@dataclass(frozen=True, eq=False)
class Moved(Source):
    """Measured images moved by random elements of groups of pixel permutations, T y = T x + T n.

    T n must be distributed as n: any permutation of white noise; of correlated noise the turns and flips, if its correlation
    has that symmetry, but not shifts on a torus, which make a seam.

    Arguments: data: images of A = I with noise that is the same for all. groups: applied one after the other.
    """

    data: Observation
    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.data.operator, Identity) or max(t.shape[0] for t in self.data.noise.tensors()) > 1:
            raise UnsupportedError("Moved: for A = I and one noise of all images; other data do not move with the image.")

    def __len__(self) -> int:
        return self.data.y.shape[0]

    def batch(self, index: Tensor, rng: Rng) -> MeasuredBatch:
        y = self.data.y[index].to(rng.keys.device)
        for number, group in enumerate(self.groups):
            y = group.draw(rng.spawn(100 + number), tuple(y.shape[1:]), y)(y)
        return MeasuredBatch(replace(self.data, y=y))


def radius(shape: tuple[int, int]) -> Tensor:
    """Distance from the middle in pixels."""
    rows, columns = (torch.arange(n) - (n - 1) / 2 for n in shape)
    return torch.hypot(rows[:, None], columns)


def lag_products(images: list[np.ndarray], masks: list[np.ndarray], lags: list[tuple[int, int]]) -> list[tuple[float, float]]:
    """Mean of z(p) z(p + lag) over pairs of pixels in the masks, and its standard error over images."""
    found = []
    for dy, dx in lags:
        products = []
        for image, mask in zip(images, masks, strict=True):
            near = (slice(0, image.shape[0] - dy), slice(max(0, -dx), image.shape[1] - max(0, dx)))
            far = (slice(dy, None), slice(max(0, dx), image.shape[1] + min(0, dx)))
            both = mask[near] & mask[far]
            products.append((image[near] * image[far])[both].mean())
        found.append((float(np.mean(products)), float(np.std(products) / len(products) ** 0.5)))
    return found


LAGS = [(0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0)]


def _listed(values: list[tuple[float, float]]) -> str:
    return ", ".join(f"{lag[0]},{lag[1]}: {v:+.3f} ± {e:.3f}" for lag, (v, e) in zip(LAGS, values, strict=True))


def euclid(data: Path) -> Stamps:
    y = np.load(data / "euclid_like" / "example_image_stack.npy").astype(np.float64)
    r = radius(y.shape[1:])
    far = (r > 18).numpy()
    sigma = y[:, far].std(1)
    z = (y - y[:, far].mean(1)[:, None, None]) / sigma[:, None, None]
    count, kurtosis = int(far.sum()), (z[:, far] ** 4).mean(1)
    facts = (
        f"σ of an image from {count} sky pixels (each to {100 / (2 * count) ** 0.5:.1f} %): {sigma.min():.2e} to "
        f"{sigma.max():.2e}, a scatter of {100 * sigma.std() / sigma.mean():.0f} % that is real",
        f"correlation of the sky at lag (pixels) {_listed(lag_products(list(z), [far] * len(z), LAGS))}: white",
        f"kurtosis of the sky: mean over images {kurtosis.mean():.2f}, median {np.median(kurtosis):.2f} (normal: 2.99)",
    )
    scaled = torch.from_numpy(y / sigma[:, None, None]).float()[:, None]
    return Stamps("Euclid-like galaxies", scaled, WHITE, r > 16, r <= 10, facts)


def symmetric(correlation: np.ndarray) -> np.ndarray:
    """The mean over the eight symmetries of the square."""
    turns = [np.rot90(correlation, k) for k in range(4)]
    return np.mean([*turns, *(t.T for t in turns)], 0)


def hst(data: Path) -> Stamps:
    folder = data / "cosmos"
    stamps = [np.asarray(image, dtype=np.float64) for image in read_images(folder / "hst_f814w_stamps.fits")]
    sigma = np.sqrt(read_table(folder / "hst_f814w_catalog.fits")["NOISE_VARIANCE"])
    (stored,) = read_images(folder / "hst_noise_correlation.fits")
    middle = stored.shape[0] // 2
    near = slice(middle - REACH, middle + REACH + 1)
    correlation = symmetric(stored[near, near] / stored[middle, middle])
    whole = [(image / s, _frame(image.shape)) for image, s in zip(stamps, sigma, strict=True) if min(image.shape) >= HST_SIZE]
    ratio = np.array([image[mask].std() for image, mask in whole])
    frames = [image - image[mask].mean() for image, mask in whole]
    measured = lag_products([f / s for f, s in zip(frames, ratio, strict=True)], [mask for _, mask in whole], LAGS)
    noise = CorrelatedGaussian.from_correlation(
        torch.ones(1), torch.from_numpy(correlation).float()[None, None], (HST_SIZE, HST_SIZE), white=0.0
    )
    facts = (
        f"σ of the stamp's frame over that of the catalogue: {ratio.mean():.3f} ± {ratio.std() / len(ratio) ** 0.5:.3f} (mean, "
        f"its error), scatter {ratio.std():.3f}",
        f"correlation of the frames at lag (pixels) {_listed(measured)}",
        "that of the file there "
        + ", ".join(f"{stored[middle + a, middle + b] / stored[middle, middle]:.3f}" for a, b in LAGS)
        + f"; it is used to lag {REACH} and made symmetric, and is positive so",
    )
    y = torch.from_numpy(np.stack([_middle(image) for image, _ in whole])).float()[:, None]
    r = radius((HST_SIZE, HST_SIZE))
    return Stamps("HST stamps", y, noise, r > 13.5, r <= 8, facts)


def _frame(shape: tuple[int, int]) -> np.ndarray:
    mask = np.ones(shape, dtype=bool)
    mask[FRAME:-FRAME, FRAME:-FRAME] = False
    return mask


def _middle(image: np.ndarray) -> np.ndarray:
    rows, columns = ((n - HST_SIZE) // 2 for n in image.shape)
    return image[rows : rows + HST_SIZE, columns : columns + HST_SIZE]
