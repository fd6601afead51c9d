"""Priors from images with three quarters of their pixels missing: the rows of the third table of `bench_priors`.

All rows have the same network, which is told which pixels it sees, from the same start, and the same number of network updates,
laps of EM counted. Another mask hides each image; what is shown has a little noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from prior_blobs import plan_of
from prior_quality import quality, ring_power
from selfsup_images import galaxies, natural
from torch import Tensor

from diffinv.core.linalg import expand
from diffinv.core.rng import Rng
from diffinv.guidance.base import Gmres
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.likelihood import Observation
from diffinv.losses.base import MeasuredBatch
from diffinv.losses.denoising import DenoisingScoreMatching
from diffinv.losses.incomplete import MaskedAmbient
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.sampling import Mask
from diffinv.priors.base import Denoiser
from diffinv.priors.masked import MaskAware
from diffinv.priors.unet import UNet
from diffinv.reconstructors.designs import initialise
from diffinv.samplers.base import sample
from diffinv.samplers.sde import StochasticMultistep
from diffinv.schedules import LogNormal, LogUniform
from diffinv.training.augment import AsTheyAre
from diffinv.training.em import EmPlan, ExpectationMaximisation
from diffinv.training.expectation import GuidedDraw
from diffinv.training.gaussian import low_rank_em
from diffinv.training.loop import Trainer
from diffinv.training.sources import CleanImages, Measured

SETS = ("galaxies", "natural")
METHODS = ("supervised", "masked ambient", "low-rank Gaussian", "EM")
SHOWN, SIGMA_N, RMS, SIGMA_MIN, SIGMA_MAX = 0.25, 0.02, 0.5, 0.01, 20.0
LEVELS = (0.05, 0.1, 0.2, 0.5)
NOISES = LogNormal(-1.2, 1.2)
KEPT, RANK, START_LAPS = 0.9, 64, 20
SEED_MASKS, SEED_NOISE = 91, 92
_CHUNK = 64


@dataclass(frozen=True)
class Size:
    """Numbers of images, updates, images an update, levels of a draw and products of its guidance, and the network."""

    training: int = 2048
    held_out: int = 64
    steps: int = 2000
    laps: int = 4
    batch: int = 64
    levels: int = 16
    products: int = 4
    widths: tuple[int, ...] = (32, 64, 104)
    blocks: tuple[int, ...] = (1, 1, 2)
    draws: int = 8


def images(name: str, folders: dict[str, Path], cache: Path, size: Size) -> tuple[Tensor, Tensor]:
    """Images to learn from and held-out ones, of rms 0.5 over the first: galaxies in their unit, photographs about their mean."""
    found = (galaxies if name == "galaxies" else natural)(folders[name], cache / f"{name}.npy")
    if name == "natural":
        found = found - found.mean()
    found = found * (RMS / found.square().mean().sqrt())
    return found[: size.training], found[-size.held_out :]


def masked(x: Tensor, seed: int) -> MeasuredBatch:
    rows = range(len(x))
    shown = Rng.for_draws(SEED_MASKS + seed, rows, 1).uniform(x) < SHOWN
    noise = Gaussian(torch.full((1,), SIGMA_N).expand(x.shape), shown)
    y = noise.sample(x, Rng.for_draws(SEED_NOISE + seed, rows, 1)).where(shown, 0.0)
    return MeasuredBatch(Observation(y, Mask(shown), noise))


def network(size: Size, seed: int) -> MaskAware:
    model = MaskAware(UNet(2, 1, widths=size.widths, blocks=size.blocks), sigma_data=RMS)
    initialise(model, seed)
    return model


def guided(size: Size) -> GuidedDraw:
    """The default of `diffinv sample` with fewer levels and products, and without the preconditioner, of no use for masks."""
    guidance = MomentMatching(Gmres(size.products, 1e-3))
    return GuidedDraw(StochasticMultistep(), guidance, LogUniform(SIGMA_MIN, SIGMA_MAX), size.levels, size.products)


def trained(method: str, x: Tensor, size: Size, seed: int, folder: Path) -> Denoiser:
    """The average of a run of one method on images x, of which EM holds some out; goes on with what the folder holds."""
    learn, held = x[: -size.held_out], x[-size.held_out :]
    model, plan, batch = network(size, seed), plan_of(size, size.steps, seed), masked(learn, 0)
    clean = DenoisingScoreMatching(NOISES, RMS)
    if method == "supervised":
        return Trainer(model, clean, CleanImages(learn, AsTheyAre()), plan, folder).run(resume=True)
    if method == "masked ambient":
        return Trainer(model, MaskedAmbient(NOISES, RMS, KEPT), Measured(batch), plan, folder).run(resume=True)
    rank = min(RANK, len(learn) - 1)
    start = low_rank_em([batch.observation], rank=rank, laps=START_LAPS).prior
    if method == "low-rank Gaussian":
        return start
    return ExpectationMaximisation(
        model=model,
        source=Measured(batch),
        held_out=Measured(masked(held, 1)),
        start=start,
        expect=(guided(size),),
        loss=clean,
        views=AsTheyAre(),
        plan=plan_of(size, size.steps // size.laps, seed),
        em=EmPlan(size.laps, _CHUNK),
        folder=folder / "em",
    ).run(resume=True)


def measured(model: Denoiser, x: Tensor, size: Size, seed: int, *, told: bool) -> dict[str, float]:
    """Everything the table says of a model, on held-out images x. told: whether it was trained to be told of masks."""
    found = {f"S/N at {sigma}, dB": _signal_to_noise(model, x, sigma) for sigma in LEVELS}
    data = masked(x, 2).observation
    rows = range(len(x))
    with torch.no_grad():
        draws = _draws(model, data, size, Rng.for_draws(seed, rows, size.draws))
        grid = LogUniform(SIGMA_MIN, SIGMA_MAX).grid(40)
        samples = sample(StochasticMultistep(), model, grid, torch.zeros_like(x), Rng.for_draws(seed + 1, rows, 1)).x
    draws = draws.unflatten(0, (len(x), size.draws))
    mean, gaps = draws.mean(1), data.y == 0
    skill, spread = (mean - x).square()[gaps].mean(), draws.var(1)[gaps].mean()
    found["gaps filled by the posterior mean, dB"] = _decibel(x[gaps].square().mean(), skill)
    found["spread-skill in gaps"] = float(((1 + 1 / size.draws) * spread / skill).sqrt())
    found["gaps filled by the network that is told of them, dB"] = float("nan")
    if told:
        shown, level = data.y != 0, torch.full((len(x),), SIGMA_N)
        with torch.no_grad():
            told = model(data.y, level, shown)
        found["gaps filled by the network that is told of them, dB"] = _decibel(
            x[gaps].square().mean(), (told - x).square()[gaps].mean()
        )
    power = (10 * (ring_power(draws[:, 0]) / ring_power(x)).log10()).abs().max()
    return found | {"power of draws, worst ring, dB": float(power)} | quality(samples, x)


def _draws(model: Denoiser, data: Observation, size: Size, rng: Rng) -> Tensor:
    many, step = data.repeat(size.draws), guided(size)
    parts = [slice(k, k + _CHUNK) for k in range(0, many.y.shape[0], _CHUNK)]
    return torch.cat([step.draw(model, many.select(part), rng.select(part)) for part in parts])


def _signal_to_noise(model: Denoiser, x: Tensor, sigma: float) -> float:
    level = torch.full((len(x),), sigma)
    seen = x + expand(level, x) * Rng.for_draws(5, range(len(x)), 1).normal(x)
    with torch.no_grad():
        return _decibel(x.square().mean(), (model(seen, level) - x).square().mean())


def _decibel(signal: Tensor, error: Tensor) -> float:
    return float(10 * (signal / error).log10())
