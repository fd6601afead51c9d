"""Priors of sharp galaxies from LSST-like images, each with a PSF of its own: the rows of the fourth table of `bench_priors`.

The measurements are those of track T1 of benchmark B3, of other galaxies: 32² pixels of 0.2″, from which 64² of 0.1″ are to be
had. The two networks are the same from the same start, with the same number of updates, laps of EM counted; both see galaxies
turned and mirrored, and EM also stretched, by which it learns what no PSF passes; the twin has seen that, and sharp images of
one resolution are not the same stretched. The first lap of EM learns from positive images that fit the data. Each galaxy is in
units of its scale as its data tell it. All priors, and the classical rows of B3, are judged on the first of B3's own galaxies.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from galaxy_rows import classical, fidelity
from galaxy_sets import FACTOR, SIZE, GalaxySet, fresh
from torch import Tensor
from torch.nn.functional import pad

from diffinv.core.linalg import expand
from diffinv.core.rng import Rng
from diffinv.data.atomic import write_atomically
from diffinv.guidance.base import Gmres
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.likelihood import Observation
from diffinv.losses.base import MeasuredBatch
from diffinv.losses.denoising import DenoisingScoreMatching
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.operators.border import ZeroBorder
from diffinv.operators.convolution import Convolution
from diffinv.operators.groups import Dilations, Flips, Product, QuarterTurns
from diffinv.operators.interpolation import Cubic
from diffinv.priors.base import Denoiser
from diffinv.priors.precondition import HighDynamicRange, Preconditioned
from diffinv.priors.unet import UNet
from diffinv.reconstructors.designs import initialise
from diffinv.samplers.sde import StochasticMultistep
from diffinv.schedules import LogNormal, LogUniform
from diffinv.training.augment import GroupViews
from diffinv.training.em import EmPlan, ExpectationMaximisation
from diffinv.training.expectation import GuidedDraw, PositiveFit
from diffinv.training.gaussian import fourier_em
from diffinv.training.loop import Trainer
from diffinv.training.plan import TrainingPlan
from diffinv.training.sources import CleanImages, Measured

TRACK, SEED_LEARNT = "T1", 77_102
CLASSICAL, CLEAN, GAUSSIAN, EM = "classical", "clean twin", "Gaussian by Fourier EM", "EM"
METHODS = (CLASSICAL, CLEAN, GAUSSIAN, EM)
NOISES, SIGMA_MIN, SIGMA_MAX = LogNormal(-0.7, 1.7), 0.01, 40.0
TURNS = (QuarterTurns(), Flips())
VIEWS = {CLEAN: GroupViews(Product(TURNS)), EM: GroupViews(Product((*TURNS, Dilations(0.7, 1.4, Cubic(), conserve_flux=False))))}
FIRST = PositiveFit()  # the first E-step of EM
START_LAPS, _CHUNK, _UNSEEN = 20, 64, 1e4


@dataclass(frozen=True)
class Size:
    """Numbers of galaxies to learn from, held out by EM, and judged; updates, laps, images an update, levels of a draw and
    products of its guidance, and the network."""

    training: int = 1024
    held_out: int = 32
    judged: int = 64
    steps: int = 3000
    laps: int = 5
    batch: int = 32
    levels: int = 20
    products: int = 4
    widths: tuple[int, ...] = (32, 64, 104)
    blocks: tuple[int, ...] = (1, 1, 2)
    draws: int = 8


def learnt(data: Path, cache: Path, size: Size) -> GalaxySet:
    """The galaxies that are learnt from, and after them those that EM holds out."""
    count = size.training + size.held_out
    path = cache / f"blurred-{TRACK}-{SEED_LEARNT}-{count}.pt"
    if not path.exists():
        stream = io.BytesIO()
        torch.save(fresh(data, TRACK, count, seed=SEED_LEARNT).__dict__, stream)
        write_atomically(path, stream.getvalue())
    return GalaxySet(**torch.load(path, weights_only=True))


def in_units(galaxies: GalaxySet) -> Observation:
    """p(y | x), x in units of each galaxy's scale."""
    scaled = galaxies.likelihood().scaled(galaxies.scale().float())
    assert isinstance(scaled, Observation)
    return scaled


def interpolated(galaxies: GalaxySet, scale: Tensor) -> Observation:
    """The same data at the pixels of the image, by their Fourier series: what a Gaussian can start from.

    The PSF hides what is finer than the data's Nyquist frequency, so that the sums over 2 × 2 pixels, taken about each pixel and
    not about each second one, are the convolution of the image by the kernel's own; where the series ends, noise is put that
    drowns everything. One noise level a galaxy, its rms. In units of `scale` (N,).
    """
    scale = scale[:, None, None, None]
    half = SIZE // FACTOR
    plane = torch.fft.fftshift(torch.fft.fft2(galaxies.data / scale, norm="ortho"), dim=(-2, -1))
    border = (SIZE - half) // 2
    whole = torch.fft.ifftshift(pad(plane, (border,) * 4), dim=(-2, -1))
    y = FACTOR * torch.fft.ifft2(whole, norm="ortho").real
    wide = pad(galaxies.kernel, (1, 1, 1, 1))
    for axis in (-2, -1):
        wide = wide + wide.roll(-1, axis)
    level = galaxies.variance.mean((1, 2, 3)).sqrt() * FACTOR / scale[:, 0, 0, 0]
    index = torch.fft.fftfreq(SIZE).abs()
    seen = (index[:, None] < 0.5 / FACTOR) & (index < 0.5 / FACTOR)
    noise = CorrelatedGaussian(level, torch.where(seen, 1.0, _UNSEEN)[None, None])
    return Observation(y, Convolution(wide, 1, (SIZE, SIZE), ZeroBorder()), noise)


def network(size: Size, seed: int) -> Preconditioned:
    net = UNet(3, 2, widths=size.widths, blocks=size.blocks)
    model = Preconditioned(HighDynamicRange(net, sigma_data=1.0), sigma_data=1.0)
    initialise(model, seed)
    return model


def guided(size: Size) -> GuidedDraw:
    """The default of `diffinv sample` with fewer levels and products."""
    guidance = MomentMatching(Gmres(size.products, 1e-3, inner=7))
    return GuidedDraw(StochasticMultistep(), guidance, LogUniform(SIGMA_MIN, SIGMA_MAX), size.levels, size.products)


def plan_of(size: Size, steps: int, seed: int) -> TrainingPlan:
    every = max(1, steps // 5)
    return TrainingPlan(steps, size.batch, 6e-4, warmup=max(1, steps // 20), ema_decay=0.99, seed=seed, save_every=every)


def trained(method: str, galaxies: GalaxySet, size: Size, seed: int, folder: Path) -> Denoiser:
    """The average of a run of one method; goes on with what the folder holds."""
    learn, held = galaxies.select(slice(0, size.training)), galaxies.select(slice(size.training, None))
    model, clean = network(size, seed), DenoisingScoreMatching(NOISES, 1.0)
    if method == CLEAN:
        x = learn.truth / expand(learn.scale().float(), learn.truth)
        return Trainer(model, clean, CleanImages(x, VIEWS[CLEAN]), plan_of(size, size.steps, seed), folder).run(resume=True)
    start = fourier_em([interpolated(learn, learn.scale().float())], laps=START_LAPS, mean_image=True).prior
    if method == GAUSSIAN:
        return start
    return ExpectationMaximisation(
        model=model,
        source=Measured(MeasuredBatch(in_units(learn))),
        held_out=Measured(MeasuredBatch(in_units(held))),
        start=start,
        expect=(FIRST, guided(size)),
        loss=clean,
        views=VIEWS[EM],
        plan=plan_of(size, size.steps // size.laps, seed),
        em=EmPlan(size.laps, _CHUNK),
        folder=folder / "em",
    ).run(resume=True)


def measured(model: Denoiser, galaxies: GalaxySet, size: Size, seed: int) -> dict[str, float]:
    """Figures of merit of the posterior mean under a prior, and the spread of its draws over its errors on source."""
    data, step = in_units(galaxies), guided(size)
    many, rng = data.repeat(size.draws), Rng.for_draws(seed, range(len(galaxies)), size.draws)
    parts = [slice(k, k + _CHUNK) for k in range(0, many.y.shape[0], _CHUNK)]
    with torch.no_grad():
        rows = torch.cat([step.draw(model, many.select(part), rng.select(part)) for part in parts])
    draws = rows.unflatten(0, (len(galaxies), size.draws)) * galaxies.scale().float()[:, None, None, None, None]
    mean, truth = draws.mean(1), galaxies.truth
    bright = truth > 0.05 * truth.amax((1, 2, 3), keepdim=True)
    weight = bright / truth.amax((1, 2, 3), keepdim=True) ** 2
    spread = ((1 + 1 / size.draws) * draws.var(1) * weight).sum() / ((mean - truth) ** 2 * weight).sum()
    return figures(mean, truth) | {"spread-skill on source": float(spread.sqrt())}


def figures(images: Tensor, truth: Tensor) -> dict[str, float]:
    """Means of PSNR, SSIM and hf-xcorr and medians of the rest, as in B3."""
    found = fidelity(images, truth)
    means = ("PSNR", "SSIM", "hf-xcorr")
    return {key: float(values.mean() if key in means else values.nanmedian()) for key, values in found.items()}


def classical_rows(galaxies: GalaxySet) -> dict[str, dict[str, float]]:
    return {name: figures(images, galaxies.truth) for name, images in classical(TRACK, galaxies).items()}
