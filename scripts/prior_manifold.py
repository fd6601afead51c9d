"""A curve in R⁵ seen through two random directions a point: EM with converged guidance, and with one CG iteration.

The problem of Rozet, Andry, Lanusse & Louppe 2024 (arXiv:2405.13712, section 5.1), with a curve of our own: 65,536 points, unit
rows, σ_y = 0.01, and the divergence of samples of each lap's prior from points of the curve: Sinkhorn's of no entropy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from prior_quality import transport_cost
from torch import Tensor, nn

from diffinv.core.rng import Rng
from diffinv.guidance.base import ConjugateGradients
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.likelihood import Observation
from diffinv.losses.base import MeasuredBatch
from diffinv.losses.denoising import DenoisingScoreMatching
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.matrix import DenseMatrix
from diffinv.priors.analytic import GaussianPrior
from diffinv.priors.base import Denoiser
from diffinv.priors.precondition import Preconditioned
from diffinv.priors.unet import NoiseEmbedding
from diffinv.reconstructors.designs import initialise
from diffinv.samplers.base import sample
from diffinv.samplers.sde import StochasticMultistep
from diffinv.schedules import LogNormal, LogUniform
from diffinv.training.augment import AsTheyAre
from diffinv.training.em import EmPlan, ExpectationMaximisation
from diffinv.training.expectation import GuidedDraw
from diffinv.training.plan import TrainingPlan
from diffinv.training.sources import Measured

DIM, ROWS, SIGMA_Y = 5, 2, 1e-2
LEVELS = LogUniform(2e-3, 10.0)
SOLVERS = {"converged CG": 5, "one CG iteration": 1}


@dataclass(frozen=True)
class Size:
    """Points, laps, updates a lap, points an update, levels of the sampler, points compared, width of the network."""

    points: int = 65536
    laps: int = 8
    steps: int = 2000
    batch: int = 1024
    levels: int = 32
    compared: int = 8192
    width: int = 256


class Perceptron(nn.Module):
    """Three hidden layers with the noise level, (B, 5), (B,) → (B, 5)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = NoiseEmbedding(64)
        sizes = [DIM + 64, width, width, width]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.hidden)
        self.out = nn.Linear(width, DIM)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        h = torch.cat([x, self.embedding(noise)], 1)
        for layer, norm in zip(self.hidden, self.norms, strict=True):
            h = norm(nn.functional.silu(layer(h)))
        return self.out(h)


def curve(count: int, seed: int) -> Tensor:
    """Points of a smooth closed curve, uniform in its parameter: (count, 5), of about unit spread along each axis."""
    k = torch.arange(1, 5)
    shape = Rng.for_draws(2024, [0], 1)
    amplitude = shape.normal(torch.zeros(1, DIM, 4))[0] / k
    phase = shape.uniform(torch.zeros(1, DIM, 4))[0]
    angle = Rng.for_draws(seed, range(count), 1).uniform(torch.zeros(count, 1, 1))
    x = (amplitude * torch.sin(2 * torch.pi * (k * angle + phase))).sum(-1)
    return x / (amplitude.square().sum(1) / 2).sqrt()


def seen(count: int, seed: int) -> Measured:
    x, rng = curve(count, seed), Rng.for_draws(seed + 1, range(count), 1)
    matrix = rng.normal(torch.zeros(count, ROWS, DIM))
    operator = DenseMatrix(matrix / matrix.norm(dim=2, keepdim=True), (DIM,), (ROWS,))
    noise = Gaussian(torch.full((1,), SIGMA_Y))
    return Measured(MeasuredBatch(Observation(noise.sample(operator(x), rng), operator, noise)))


def gaussian(data: Observation, laps: int = 30) -> GaussianPrior:
    """The Gaussian of largest likelihood, by EM with the exact posterior of each point, which five dimensions allow."""
    a, y = data.operator.matrix.double(), data.y.double()
    information = a.mT @ a / SIGMA_Y**2
    score = (a.mT @ y[..., None])[..., 0] / SIGMA_Y**2
    mean, covariance = torch.zeros(DIM, dtype=torch.float64), torch.eye(DIM, dtype=torch.float64)
    for _ in range(laps):
        prior = torch.linalg.inv(covariance)
        spread = torch.linalg.inv(prior + information)
        centre = (spread @ (score + prior @ mean)[..., None])[..., 0]
        mean = centre.mean(0)
        gap = centre - mean
        covariance = (gap[:, :, None] * gap[:, None] + spread).mean(0)
    return GaussianPrior(mean[None].float(), covariance.float())


def divergence(prior: Denoiser, size: Size, seed: int) -> float:
    """Of samples of a prior from points of the curve."""
    like = torch.zeros(size.compared, DIM)
    x = sample(StochasticMultistep(), prior, LEVELS.grid(4 * size.levels), like, Rng.for_draws(seed, range(len(like)), 1)).x
    return _from_curve(x, size)


def floor(size: Size) -> float:
    """Of other points of the curve: what as many samples differ by."""
    return _from_curve(curve(size.compared, 998), size)


def _from_curve(x: Tensor, size: Size) -> float:
    return transport_cost(x, curve(size.compared, 999))


def laps(solver: str, size: Size, seed: int, folder: Path) -> list[dict[str, str | float]]:
    """Divergence and score of every lap; goes on with what the folder holds."""
    source, held, products = seen(size.points, 10), seen(max(256, size.points // 32), 20), SOLVERS[solver]
    model = Preconditioned(Perceptron(size.width), sigma_data=1.0)
    initialise(model, seed)
    start = gaussian(source.data.observation)
    every = max(1, size.steps // 4)
    rows = [{"lap": "start", "divergence": divergence(start, size, seed)}]
    guidance = MomentMatching(ConjugateGradients(products, 1e-4))
    for lap in range(size.laps):  # one at a time, so that each is looked at
        em = ExpectationMaximisation(
            model=model,
            source=source,
            held_out=held,
            start=start,
            expect=(GuidedDraw(StochasticMultistep(), guidance, LEVELS, size.levels, products),),
            loss=DenoisingScoreMatching(LogNormal(-1.5, 1.8), 1.0),
            views=AsTheyAre(),
            plan=TrainingPlan(size.steps, size.batch, 1e-3, warmup=20, ema_decay=0.99, seed=seed, save_every=every),
            em=EmPlan(lap + 1, 4096),
            folder=folder,
        )
        kept = folder / f"lap-{lap:02d}" / "divergence.json"
        prior = em.run(resume=True)
        if not kept.exists():
            kept.write_text(json.dumps(divergence(prior, size, seed)))
        rows.append({"lap": f"lap {lap}", "divergence": json.loads(kept.read_text()), "chi2": em.scores()[-1].chi2})
    return rows
