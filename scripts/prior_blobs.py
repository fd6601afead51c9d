"""Denoisers of blob galaxies from noisy images alone: the rows of the first table of `bench_priors`.

All rows have the same network from the same start and the same number of network updates, laps of EM counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from prior_quality import quality
from torch import Tensor

from diffinv.core.linalg import expand
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.ambient import Ambient, AmbientSure, BelowNoise
from diffinv.losses.base import MeasuredBatch
from diffinv.losses.denoising import DenoisingScoreMatching
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Identity
from diffinv.priors.base import Denoiser
from diffinv.priors.precondition import HighDynamicRange, Preconditioned
from diffinv.priors.unet import UNet
from diffinv.reconstructors.designs import initialise
from diffinv.samplers.base import sample
from diffinv.samplers.sde import StochasticMultistep
from diffinv.schedules import LogNormal, LogUniform
from diffinv.training.augment import AsTheyAre
from diffinv.training.em import EmPlan, ExpectationMaximisation
from diffinv.training.expectation import PosteriorMean, ReverseFromData
from diffinv.training.loop import Trainer
from diffinv.training.plan import TrainingPlan
from diffinv.training.sources import CleanImages, Measured

SIZE, SIGMA_N, RMS, SIGMA_MIN = 32, 0.2, 0.5, 0.01
LEVELS = (0.05, 0.1, 0.2, 0.3, 0.5)
NOISES = LogNormal(-1.2, 1.2)
EXACT = ReverseFromData(StochasticMultistep(), 32, SIGMA_MIN)
METHODS = ("supervised", "ambient", "GSURE", "GSURE + EM")
FIRST, LAPS = 0.5, 2  # share of the updates before EM, and the laps that share the rest
RATE = 3e-3  # of learning; of 1e-3, 3e-3 and 6e-3 the best for the supervised row at σ_n, seed 100
SEED_IMAGES, SEED_NOISE = 77, 78
_PEAK_1 = 0.1541  # rms over the set where the blob in the middle has a peak of 1


@dataclass(frozen=True)
class Size:
    """Numbers of images, updates, images an update, and the network."""

    training: int = 8192
    held_out: int = 512
    steps: int = 1000
    batch: int = 64
    widths: tuple[int, ...] = (32, 64, 104)
    blocks: tuple[int, ...] = (1, 1, 2)
    draws: int = 8


def blobs(count: int, seed: int = SEED_IMAGES) -> Tensor:
    """Galaxies of one to four elliptical Gaussians, the first in the middle: (count, 1, 32, 32), rms 0.5 over the set."""
    u = Rng.for_draws(seed, range(count), 1).uniform(torch.zeros(count, 4, 6))
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    first = torch.arange(4) == 0
    reach = torch.where(first, 1.5, 7.0)
    row, column = reach * (2 * u[..., 0] - 1), reach * (2 * u[..., 1] - 1)
    width = torch.where(first, 2.0, 0.9) * 2.2 ** u[..., 2]
    ratio, angle = 0.4 + 0.6 * u[..., 3], torch.pi * u[..., 4]
    there = torch.where(first, 1.0, (u[..., 5] < 0.55).float() * (0.2 + 0.6 * u[..., 5]))
    y, x = axis[:, None] - row[..., None, None], axis - column[..., None, None]
    c, s = angle.cos()[..., None, None], angle.sin()[..., None, None]
    along, across = c * x + s * y, c * y - s * x
    radius = (along**2 + (across / ratio[..., None, None]) ** 2) / width[..., None, None] ** 2
    images = (there[..., None, None] * torch.exp(-radius / 2)).sum(1, keepdim=True)
    return images * RMS / _PEAK_1


def network(size: Size, seed: int) -> Preconditioned:
    net = UNet(3, 2, widths=size.widths, blocks=size.blocks)
    model = Preconditioned(HighDynamicRange(net, sigma_data=RMS), sigma_data=RMS)
    initialise(model, seed)
    return model


def noisy(x: Tensor, sigma: float, seed: int) -> Measured:
    noise = Gaussian(torch.full((1,), sigma))
    y = noise.sample(x, Rng.for_draws(seed, range(len(x)), 1))
    return Measured(MeasuredBatch(Observation(y, Identity(tuple(x.shape[1:])), noise)))


def plan_of(size: Size, steps: int, seed: int, rate: float = 1e-3) -> TrainingPlan:
    every = max(1, steps // 5)
    return TrainingPlan(steps, size.batch, rate, warmup=max(1, steps // 20), ema_decay=0.99, seed=seed, save_every=every)


def trained(method: str, size: Size, seed: int, folder: Path) -> Denoiser:
    """The average of a run of one method; goes on with what the folder holds."""
    x = blobs(size.training + size.held_out)
    learn, held = x[: size.training], x[size.training :]
    source, model, plan = noisy(learn, SIGMA_N, SEED_NOISE), network(size, seed), plan_of(size, size.steps, seed, RATE)
    clean = DenoisingScoreMatching(NOISES, RMS)
    if method == "supervised":
        return Trainer(model, clean, CleanImages(learn, AsTheyAre()), plan, folder).run(resume=True)
    if method == "ambient":
        return Trainer(model, Ambient(NOISES, RMS), source, plan, folder).run(resume=True)
    sure = AmbientSure(NOISES, RMS)
    if method == "GSURE":
        return Trainer(model, sure, source, plan, folder).run(resume=True)
    first = round(FIRST * size.steps)
    start = Trainer(model, sure, source, plan_of(size, first, seed, RATE), folder / "start").run(resume=True, more=True)
    model.load_state_dict(start.state_dict())
    return ExpectationMaximisation(
        model=model,
        source=source,
        held_out=noisy(held, SIGMA_N, SEED_NOISE + 1),
        start=start,
        expect=(PosteriorMean(), EXACT),
        loss=sure + BelowNoise(NOISES, RMS),
        views=AsTheyAre(),
        plan=plan_of(size, (size.steps - first) // LAPS, seed, RATE),
        em=EmPlan(LAPS, 256),
        folder=folder / "em",
        watch=sure,
        beside=True,
    ).run(resume=True)


def measured(model: Denoiser, size: Size, seed: int) -> dict[str, float]:
    """Everything the table says of a model, on galaxies that neither the training nor the score of its laps has seen, and that
    nothing was chosen on."""
    x = blobs(size.training + 2 * size.held_out)[-size.held_out :]
    found = {f"S/N at {sigma}, dB": _signal_to_noise(model, x, sigma) for sigma in LEVELS}
    data = noisy(x, SIGMA_N, SEED_NOISE + 2).data.observation
    some = min(len(x), 128)
    part = data.select(slice(0, some)).repeat(size.draws)
    with torch.no_grad():
        draws = EXACT.draw(model, replace(part, y=part.y), Rng.for_draws(seed, range(some), size.draws))
        grid = LogUniform(SIGMA_MIN, 20.0).grid(40)
        like = torch.zeros(len(x), 1, SIZE, SIZE)
        samples = sample(StochasticMultistep(), model, grid, like, Rng.for_draws(seed + 1, range(len(x)), 1)).x
    draws = draws.unflatten(0, (some, size.draws))
    mean, spread = draws.mean(1), draws.var(1).mean()
    skill = (mean - x[:some]).square().mean()
    found["MSE of a draw"] = float((draws - x[:some, None]).square().mean())
    found["spread-skill"] = float(((1 + 1 / size.draws) * spread / skill).sqrt())
    found["power of draws above 0.25 cycles/px"] = _fine(draws.flatten(0, 1)) / _fine(x[:some])
    return found | quality(samples, x)


def _signal_to_noise(model: Denoiser, x: Tensor, sigma: float) -> float:
    level = torch.full((len(x),), sigma)
    seen = x + expand(level, x) * Rng.for_draws(5, range(len(x)), 1).normal(x)
    with torch.no_grad():
        error = torch.cat([model(part, level[: len(part)]) for part in seen.split(128)]) - x
    return float(10 * (x.square().mean() / error.square().mean()).log10())


def _fine(x: Tensor) -> float:
    """Mean power above half the Nyquist frequency."""
    frequency = torch.hypot(torch.fft.fftfreq(SIZE)[:, None], torch.fft.fftfreq(SIZE))
    return float(torch.fft.fft2(x, norm="ortho").abs().square()[..., frequency > 0.25].mean())
