"""Galaxies with truth for the benchmarks: the 32 mocks, and freshly simulated ones that nobody tuned on.

Both are seen through y = sumpool₂(K ∗ x) + n with the LSST i-band difference kernels K of the mocks; truth 64² at 0.1″ with a
Gaussian PSF of 0.20″, data 32² at 0.2″, nJy. To learn from there are also galaxies seen by VIS, y = K ∗ x + n, 64² at 0.1″.

Fresh galaxies are drawn from the (deliberately broad) population that the prior was trained on, with another seed and with the
main object near the centre. Left out are re-observed real stamps, for training has seen all there are, and what is fainter than
any of the mocks (S/N < 30 in 10 years) or too large for the field (adaptive size > 0.8″). An object's kernel is that of one of
the mocks, turned by a random multiple of 90° and mirrored at random.
Invariant: object i of a set does not depend on how many objects are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from training_truths import population

from diffinv.data.forward import estimate_scale
from diffinv.data.galaxies import Population
from diffinv.data.surveys import EUCLID_VIS, LSST, LSST_YEAR_1, Survey, flux_per_electron
from diffinv.likelihood import Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.base import LinearOperator
from diffinv.operators.border import ZeroBorder
from diffinv.operators.convolution import Convolution
from diffinv.operators.pooled import PooledConvolution
from diffinv.uncertainty.metrics import adaptive_moments

SIZE, FACTOR, PIXEL = 64, 2, 0.1
TRACKS: dict[str, tuple[str, Survey]] = {"T1": ("lsst", LSST), "T2": ("lsst_y1", LSST_YEAR_1)}
FRESH_SEED = 77_001
I_BAND = 2
_VIS = 100  # a stream of a number, and the next one
FAINTEST, LARGEST = 30.0, 8.0  # S/N of the 10-year data, adaptive size of the truth in pixels


@dataclass(frozen=True)
class GalaxySet:
    """N objects.

    truth: (N, 1, 64, 64) nJy. data, variance: (N, 1, n, n) nJy, nJy². kernel: (N, 1, 63, 63). gain: nJy of one photo-electron.
    factor: pixels of the truth in one of the data, a side, 64/n.
    """

    name: str
    ids: tuple[str, ...]
    truth: Tensor
    data: Tensor
    variance: Tensor
    kernel: Tensor
    gain: float
    factor: int = FACTOR

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: slice) -> GalaxySet:
        """The objects of a slice."""
        parts = {name: getattr(self, name)[rows] for name in ("ids", "truth", "data", "variance", "kernel")}
        return replace(self, **parts)

    def operator(self) -> LinearOperator:
        """A, of all objects."""
        return _operator(self.kernel, self.factor)

    def likelihood(self) -> Observation:
        """p(y | x), of all objects."""
        return Observation(self.data, self.operator(), Gaussian(self.variance.sqrt()))

    def scale(self) -> Tensor:
        """A first guess of the rms of every image from its data: (N,)."""
        every = np.ones(self.data.shape[-2:], dtype=bool)
        pairs = zip(self.data[:, 0].double().numpy(), self.variance[:, 0].double().numpy(), strict=True)
        return torch.tensor([estimate_scale(y, v, every, area_ratio=self.factor**2) for y, v in pairs])

    @property
    def sky(self) -> Tensor:
        """Sky variance over gain: the constant that makes data Poisson-like, (N, 1, 1, 1) nJy."""
        return self.variance.amin((1, 2, 3), keepdim=True) / self.gain

    @property
    def signal_to_noise(self) -> Tensor:
        """√Σ mean²/var of the noiseless data: (N,)."""
        return (self.operator()(self.truth) ** 2 / self.variance).sum((1, 2, 3)).sqrt()


def _operator(kernel: Tensor, factor: int) -> LinearOperator:
    if factor == 1:
        return Convolution(kernel, 1, (SIZE, SIZE), ZeroBorder())
    return PooledConvolution(kernel, 1, (SIZE, SIZE), ZeroBorder(), factor)


def data_folder(given: Path | None) -> Path:
    """The folder of the real and simulated data: given, or $DIFFINV_DATA, or ../shared/data beside the checkout."""
    folder = given or Path(os.environ.get("DIFFINV_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        raise SystemExit(f"{folder}: no such folder; give --data or set DIFFINV_DATA.")
    return folder


def mocks(folder: Path, track: str) -> GalaxySet:
    """The 32 mock galaxies of `mocks/galaxies_val32.npz`."""
    key, survey = TRACKS[track]
    with np.load(folder / "mocks" / "galaxies_val32.npz") as archive:
        band = lambda name: torch.from_numpy(archive[name][:, I_BAND : I_BAND + 1])
        ids = tuple(str(name) for name in archive["meta_ids"])
        gain = flux_per_electron(survey.band("i"))
        return GalaxySet("val32", ids, band("truth"), band(key), band(f"{key}_var"), band("lsst_kernel"), gain)


def fresh(folder: Path, track: str, number: int, seed: int = FRESH_SEED) -> GalaxySet:
    """The first `number` galaxies of this seed that pass the cuts, with Poisson noise of source and sky."""
    survey = TRACKS[track][1]
    with np.load(folder / "mocks" / "galaxies_val32.npz") as archive:
        kernels = archive["lsst_kernel"][:, I_BAND]
    chosen = islice(_candidates(_population(folder), kernels, seed), number)
    numbers, truths, turned = zip(*chosen, strict=True)
    kernel = torch.cat(turned)
    return _observed(survey, "i", seed, numbers, torch.cat(truths), kernel, FACTOR, 3 + list(TRACKS).index(track))


def by_vis(folder: Path, number: int, seed: int) -> GalaxySet:
    """The first `number` galaxies of this seed that pass the cuts, which are those of LSST's depth, as VIS sees them."""
    with np.load(folder / "mocks" / "galaxies_val32.npz") as archive:
        kernels, of_vis = archive["lsst_kernel"][:, I_BAND], archive["vis_kernel"]
    chosen = islice(_candidates(_population(folder), kernels, seed), number)
    numbers, truths, _ = zip(*chosen, strict=True)
    kernel = torch.from_numpy(np.stack([_turned(of_vis, _rng(seed, i, _VIS)) for i in numbers]))[:, None]
    return _observed(EUCLID_VIS, "IE", seed, numbers, torch.cat(truths), kernel, 1, _VIS + 1)


def _observed(
    survey: Survey, name: str, seed: int, numbers: Sequence[int], truth: Tensor, kernel: Tensor, factor: int, noise_key: int
) -> GalaxySet:
    band = survey.band(name)
    mean = _operator(kernel, factor)(truth).numpy()
    data = np.stack([survey.observe(m, band, _rng(seed, i, noise_key)) for i, m in zip(numbers, mean, strict=True)])
    planes = (torch.from_numpy(a.astype(np.float32)) for a in (data, survey.variance(mean, band)))
    ids = tuple(f"fresh_{seed}_{i:04d}" for i in numbers)
    return GalaxySet("fresh", ids, truth, *planes, kernel, flux_per_electron(band), factor)


def _candidates(population: Population, kernels: np.ndarray, seed: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number, truth and kernel, both (1, 1, H, W), of the galaxies that are bright and small enough: an endless stream."""
    from diffinv.data.simulate import render_truth, scene_of

    for number in count():
        truth = torch.from_numpy(render_truth(scene_of(population, seed, number), population).astype(np.float32))[None, None]
        kernel = torch.from_numpy(_turned(kernels, _rng(seed, number, 2)))[None, None]
        mean = _operator(kernel, FACTOR)(truth)
        variance = torch.from_numpy(LSST.variance(mean.numpy(), LSST.band("i")))
        bright = float((mean**2 / variance).sum().sqrt()) >= FAINTEST
        if bright and float(adaptive_moments(truth[0]).size[0]) <= LARGEST:
            yield number, truth, kernel


def _rng(seed: int, number: int, key: int) -> np.random.Generator:
    """The stream `key` of object `number`; `render_truths` uses the one without a key."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number, key)))


def _population(folder: Path) -> Population:
    """The training's population without real stamps, main object centred; galaxies of the mocks are left out, as in training."""
    return replace(population(folder).without_stamps(), centred_fraction=1.0)


def _turned(kernels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    kernel = np.rot90(kernels[rng.integers(len(kernels))], rng.integers(4))
    return np.ascontiguousarray(kernel[::-1] if rng.random() < 0.5 else kernel)
