"""Noise levels: the grid that a sampler walks down, and the distribution that a denoiser is trained on.

A grid is float64, strictly decreasing and ends in 0; its unit is the image's. σ_max must exceed the spread of the images
(or a sampler starts from the wrong distribution), and σ_min is where the denoiser counts as exact: neither has a default.
Invariant: `draw` never leaves the range that `grid` spans (`LogNormal`: the whole positive axis).
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.core.registry import register
from diffinv.core.rng import Rng

_BISECTIONS = 60  # to the rounding of float64
_NUDGE = 1e-6
_SHARE = 1e-12  # of levels: less is rounding
_LAST = 1 - 2**-53  # the last u before 1, where levels without a least one are 0


class Schedule(abc.ABC):
    """A way through the noise levels, given by a decreasing map from [0, 1] to σ."""

    @abc.abstractmethod
    def level(self, u: Tensor) -> Tensor:
        """σ(u), float64, decreasing in u."""

    def fractions(self, steps: int) -> Tensor:
        """The u of the grid's positive levels: from 0 to 1 inclusive."""
        return torch.linspace(0, 1, steps, dtype=torch.float64)

    def grid(self, steps: int) -> Tensor:
        """σ₀ > σ₁ > … > σ_steps = 0: (steps + 1,) float64."""
        if steps < 1:
            raise DiffinvError(f"{type(self).__name__}.grid: steps must be at least 1, got {steps}; 32 is a common choice.")
        return torch.cat([self.level(self.fractions(steps)), torch.zeros(1, dtype=torch.float64)])

    def draw(self, rng: Rng, batch: int) -> Tensor:
        """Training levels σ(u), u uniform on (0, 1), one a row, on the device of the streams: (B,) float64."""
        return self.level(rng.uniform(torch.empty(batch, 1, dtype=torch.float64, device=rng.keys.device))[:, 0])

    def above(self, sigma: Tensor) -> Tensor:
        """The share of training levels above σ, the u with σ(u) = σ: (B,) → (B,) float64, by bisection."""
        low = torch.zeros_like(sigma, dtype=torch.float64)
        high = torch.ones_like(low)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            higher = self.level(middle) > sigma
            low, high = torch.where(higher, middle, low), torch.where(higher, high, middle)
        return low

    def draw_above(self, rng: Rng, floor: Tensor) -> tuple[Tensor, Tensor]:
        """Training levels given that they lie above a floor, one a row, and the share of levels that do.

        A mean over these levels, times the share, is the mean over all levels of what counts only above the floor.
        Arguments: floor: (B,) float64. Returns: σ > floor (B,), by a part in 10⁶ at least, and the share (B,), both float64.
        """
        share = self.above(floor)
        u = rng.uniform(torch.empty(floor.shape[0], 1, dtype=torch.float64, device=floor.device))[:, 0]
        return torch.maximum(self.level(share * u), floor * (1 + _NUDGE)), share

    def draw_below(self, rng: Rng, ceiling: Tensor) -> tuple[Tensor, Tensor]:
        """Training levels given that they lie below a ceiling, one a row, and the share of levels that do.

        Arguments: ceiling: > 0, (B,) float64. Returns: σ (B,) in (0, ceiling] and the share (B,), both float64; the share
        is 0 where no level lies below.
        """
        share = self.above(ceiling)
        u = rng.uniform(torch.empty_like(share)[:, None])[:, 0]
        level = torch.minimum(self.level((share + (1 - share) * u).clamp_max(_LAST)), ceiling)
        return level, torch.where(1 - share > _SHARE, 1 - share, 0.0)

    def draw_lifted(self, rng: Rng, floor: Tensor) -> tuple[Tensor, Tensor]:
        """Training levels, one a row, those below a floor lifted to it, and which were.

        Arguments: floor: (B,) float64. Returns: σ (B,) float64, above the floor by a part in 10⁶ at least, and (B,) bool.
        """
        level, least = self.draw(rng, floor.shape[0]), floor * (1 + _NUDGE)
        return torch.maximum(level, least), level < least


def _check_range(owner: str, sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise DiffinvError(
            f"{owner}: need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}; "
            "both are in the image's unit, sigma_max well above the images' spread."
        )


@register("schedule", "karras")
@dataclass(frozen=True)
class Karras(Schedule):
    """σ(u) = (σ_max^(1/ρ) + u (σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ, eq. 5; short steps at low noise.

    Arguments: sigma_min, sigma_max: in the image's unit. rho: ρ > 0; larger puts more steps at low noise.
    Raises: DiffinvError for an empty or negative range.
    References: Karras, Aittala, Aila, Laine, *Elucidating the Design Space of Diffusion-Based Generative Models*, 2022,
        arXiv:2206.00364.
    """

    sigma_min: float
    sigma_max: float
    rho: float = 7.0

    def __post_init__(self) -> None:
        _check_range("Karras", self.sigma_min, self.sigma_max)
        if not self.rho > 0:
            raise DiffinvError(f"Karras: rho must be > 0, got {self.rho}; the paper uses 7.")

    def level(self, u: Tensor) -> Tensor:
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return (high + u * (low - high)) ** self.rho


@register("schedule", "log_uniform")
@dataclass(frozen=True)
class LogUniform(Schedule):
    """σ(u) = σ_max (σ_min/σ_max)^u: a geometric grid, and log-uniform training levels.

    Arguments: sigma_min, sigma_max: in the image's unit.
    Raises: DiffinvError for an empty or negative range.
    """

    sigma_min: float
    sigma_max: float

    def __post_init__(self) -> None:
        _check_range("LogUniform", self.sigma_min, self.sigma_max)

    def level(self, u: Tensor) -> Tensor:
        return self.sigma_max * (self.sigma_min / self.sigma_max) ** u


@register("schedule", "log_normal")
@dataclass(frozen=True)
class LogNormal(Schedule):
    """log σ ~ N(mean, std²): the training distribution of EDM; its grid holds equally probable levels.

    Arguments: mean: of log σ, σ in the image's unit. std: of log σ, > 0.
    Raises: DiffinvError if std is not positive.
    References: Karras, Aittala, Aila, Laine, *Elucidating the Design Space of Diffusion-Based Generative Models*, 2022,
        arXiv:2206.00364, table 1.
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise DiffinvError(f"LogNormal: std of log sigma must be > 0, got {self.std}; EDM uses 1.2.")

    def level(self, u: Tensor) -> Tensor:
        return torch.exp(self.mean + self.std * torch.special.ndtri(1 - u))

    def fractions(self, steps: int) -> Tensor:
        """Midpoints (i + ½)/steps, for u = 0 and 1 are infinite and zero noise."""
        return (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
