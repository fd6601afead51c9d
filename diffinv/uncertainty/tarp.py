"""TARP: how much of the posterior lies nearer to a reference point than the truth does.

    f = rank of ‖x* − θ_r‖ among ‖x_m − θ_r‖;   under a calibrated posterior f is uniform on 0 … M,

for any reference θ_r that is fixed once y is known. One number for whole images, with the fault of every rank test if references
do not depend on y: a sampler that ignores y and returns the prior passes. References must therefore be near what the data say,
`θ_r = x̂(y) + δ`, with x̂ from y alone or from draws that are not those tested: with the mean of the same draws a perfect sampler
fails, because its truth is farther from that mean than its draws are.
Sharpness, the root-mean-square distance of draws to their mean, stands beside the test: of two calibrated samplers the sharper
knows more.
References: Lemos, Coogan, Hezaveh & Perreault-Levasseur, *Sampling-Based Accuracy Testing of Posterior Estimators for General
Inference*, 2023, arXiv:2302.03026 (that the test is also sufficient needs references that depend on y).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import ShapeError
from diffinv.core.rng import Rng
from diffinv.core.types import Image
from diffinv.uncertainty.nulls import integers, one_stream, paired
from diffinv.uncertainty.ranks import RankFinding, UniformRanks, histogram, ranks

BOOTSTRAPS = 1000


def distance_ranks(truth: Image, samples: Tensor, references: Image, rng: Rng) -> Tensor:
    """Rank of the truth's distance to the reference among those of the draws: (N,) in 0 … M.

    Arguments: truth: (N, *image). samples: (N, M, *image). references: (N, *image), a function of y. rng: one stream.
    Raises: ShapeError if they do not fit.
    """
    if references.shape != truth.shape:
        raise ShapeError(f"distance_ranks: references {tuple(references.shape)}, one an object is needed: {tuple(truth.shape)}.")
    distance = (paired(truth, samples) - references[:, None]).flatten(2).norm(dim=2)
    return ranks(distance[:, 0], distance[:, 1:], rng)


def references_near(estimate: Image, radius: Tensor, rng: Rng) -> Image:
    """θ_r = x̂(y) + radius · white noise of unit length an image.

    Arguments: estimate: x̂ (N, *image), from y alone, never from the draws under test. radius: (N,) or (1,), in the image's
        unit; the distance from truth to estimate is a good one. rng: one stream.
    """
    drawn = one_stream("references_near", rng).normal(torch.empty_like(estimate)[None])[0].flatten(1)
    step = radius[:, None] * drawn / drawn.norm(dim=1, keepdim=True)
    return estimate + step.reshape(estimate.shape)


def sharpness(samples: Tensor) -> Tensor:
    """√ mean squared deviation of draws from their mean, per pixel: (N, M, *image) → (N,)."""
    return samples.double().var(1).flatten(1).mean(1).sqrt()


@dataclass(frozen=True)
class TarpFinding(RankFinding):
    """Expected coverage probability of TARP regions.

    levels, ecdf: credibility k/(M + 1) and how often it holds. low, high: 95 % of what uniform ranks give, at all levels
    together. bootstrap_low, bootstrap_high: 95 % a level when objects are drawn again. sharpness: mean over objects, in the
    image's unit.
    """

    bootstrap_low: tuple[float, ...] = ()
    bootstrap_high: tuple[float, ...] = ()
    sharpness: float = 0.0

    def extra(self) -> str:
        return f", sharpness {self.sharpness:.4g}"


def tarp(truth: Image, samples: Tensor, references: Image, rng: Rng, *, quantity: str = "image") -> TarpFinding:
    """Kolmogorov–Smirnov distance of TARP coverage to the diagonal, with its simulated null.

    Catches bias, wrong width and, with references near x̂(y), a sampler that does not look at y. Cannot catch faults in
    directions that add little to the distance between images (single small features).

    Arguments: truth: (N, *image). samples: (N, M, *image). references: (N, *image), from `references_near`. rng: one stream.
    Raises: ShapeError if shapes do not fit.
    """
    objects, draws = samples.shape[:2]
    rank = distance_ranks(truth, samples, references, rng.spawn(0))
    null = UniformRanks(objects, draws, 2, rng.spawn(1))
    again = rank[integers(rng.spawn(2), objects, (BOOTSTRAPS, objects), rank)]
    curves = histogram(again, draws + 1).cumsum(-1)[:, :-1] / objects
    limits = curves.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    level = torch.arange(1, draws + 1, dtype=torch.float64) / (draws + 1)
    share = histogram(rank, draws + 1).cumsum(-1)[:-1] / objects
    tuples = [tuple(v.tolist()) for v in (level, share, *null.envelope(), *limits)]
    return TarpFinding(
        "TARP", quantity, *null.kolmogorov(rank).numbers(), objects, draws, *tuples, float(sharpness(samples).mean())
    )
