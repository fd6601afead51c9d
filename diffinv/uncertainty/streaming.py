"""Mean, variance and covariance of draws that are never held together.

Of a batch and of what came before, with counts a and b, means and sums of squares (Chan's form of Welford's update):

    δ = mean_b − mean_a,   mean = mean_a + δ b/(a + b),   S = S_a + S_b + δδᵀ ab/(a + b).

Nothing cancels: S is a sum of positive terms in float64, so that it equals the two-pass result to rounding in whatever order
batches come. Invariant: the state of draws in any batches and order is the state of all of them at once, to rounding.
References: Chan, Golub & LeVeque, *Algorithms for computing the sample variance: analysis and recommendations*, 1983.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError


def _check(owner: str, given: Tensor, expected: tuple[int, ...]) -> None:
    if given.ndim < 2 or given.shape[:1] + given.shape[2:] != expected or given.shape[1] == 0:
        want = (expected[0], "M", *expected[1:])
        raise ShapeError(f"{owner}: draws {tuple(given.shape)}, expected {want} with M ≥ 1, axis 1 the draws.")


@dataclass(frozen=True, eq=False)
class RunningMoments:
    """Mean and variance a pixel of `count` draws. mean, squares: (B, …) float64, squares is Σ (x − mean)²."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], device: torch.device | str = "cpu") -> RunningMoments:
        """Of no draws of (B, …) images."""
        return cls(
            0, torch.zeros(shape, dtype=torch.float64, device=device), torch.zeros(shape, dtype=torch.float64, device=device)
        )

    def update(self, samples: Tensor) -> RunningMoments:
        """With more draws (B, M, …)."""
        _check("RunningMoments", samples, tuple(self.mean.shape))
        mean = samples.double().mean(1)
        return self.merge(RunningMoments(samples.shape[1], mean, (samples.double() - mean[:, None]).pow(2).sum(1)))

    def merge(self, other: RunningMoments) -> RunningMoments:
        """Of the draws of both."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        share = other.count / count
        return RunningMoments(count, self.mean + delta * share, self.squares + other.squares + delta**2 * (self.count * share))

    @property
    def variance(self) -> Tensor:
        """Σ (x − mean)²/(M − 1): (B, …), squared unit of the draws. Raises: DiffinvError for fewer than two draws."""
        if self.count < 2:
            raise DiffinvError(f"RunningMoments: {self.count} draws have no variance; give at least two.")
        return self.squares / (self.count - 1)

    @property
    def std(self) -> Tensor:
        """Standard deviation: (B, …)."""
        return self.variance.sqrt()


@dataclass(frozen=True, eq=False)
class RunningCovariance:
    """Covariance of d summaries of `count` draws. mean: (B, d), products: (B, d, d) float64, Σ (t − mean)(t − mean)ᵀ."""

    count: int
    mean: Tensor
    products: Tensor

    @classmethod
    def empty(cls, objects: int, summaries: int) -> RunningCovariance:
        """Of no draws of B objects with d summaries."""
        zeros = torch.zeros(objects, summaries, dtype=torch.float64)
        return cls(0, zeros, torch.zeros(objects, summaries, summaries, dtype=torch.float64))

    def update(self, values: Tensor) -> RunningCovariance:
        """With the summaries of more draws, (B, M, d)."""
        _check("RunningCovariance", values, tuple(self.mean.shape))
        mean = values.double().mean(1)
        centred = values.double() - mean[:, None]
        return self.merge(RunningCovariance(values.shape[1], mean, centred.mT @ centred))

    def merge(self, other: RunningCovariance) -> RunningCovariance:
        """Of the draws of both."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        share = other.count / count
        outer = delta[:, :, None] * delta[:, None, :]
        return RunningCovariance(count, self.mean + delta * share, self.products + other.products + outer * (self.count * share))

    @property
    def covariance(self) -> Tensor:
        """(B, d, d). Raises: DiffinvError for fewer than two draws."""
        if self.count < 2:
            raise DiffinvError(f"RunningCovariance: {self.count} draws have no covariance; give at least two.")
        return self.products / (self.count - 1)
