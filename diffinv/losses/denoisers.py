"""Denoising losses with a minimiser of their own: neighbouring pixels as two exposures, and the score of noisy data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffinv.core.checks import UnsupportedError
from diffinv.core.linalg import expand
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import Loss, MeasuredBatch
from diffinv.losses.splitting import check_denoising
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Identity


@register("loss", "neighbor2neighbor")
@dataclass(frozen=True)
class Neighbor2Neighbor(Loss):
    """`‖f(g₁y) − g₂y‖² + γ ‖f(g₁y) − g₂y − (g₁f(y) − g₂f(y))‖²` a pixel: two random neighbours of every 2 × 2 cell as images.

    Biased where an image changes within a cell; γ weighs that. No gradient flows through f(y).

    Arguments: gamma: γ, dimensionless.
    Raises: UnsupportedError for an operator other than the identity, or noise that is not white Gaussian.
    References: Huang et al., *Neighbor2Neighbor*, 2021, arXiv:2101.02824.
    """

    gamma: float

    def check(self, batch: MeasuredBatch) -> None:
        data = batch.observation
        check_denoising("Neighbor2Neighbor", data)
        white = isinstance(data.noise, Gaussian) and data.noise.mask is None and data.noise.std[0].numel() == 1
        if not white:
            raise UnsupportedError(
                "Neighbor2Neighbor: the two halves of an image must have the same noise, one σ a row without masks, got "
                f"{type(data.noise).__name__}; use SURE or R2R."
            )
        if data.y.ndim != 4 or any(n % 2 for n in data.y.shape[-2:]):
            raise UnsupportedError(f"Neighbor2Neighbor: images must have even sides, got {tuple(data.y.shape)}; crop them.")

    def __call__(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        self.check(batch)
        data = batch.data
        first, second = self._neighbours(data.y, rng)
        with torch.no_grad():
            whole = model(data)
        channels, height, width = data.y.shape[1:]
        small = Observation(self._pick(data.y, first), Identity((channels, height // 2, width // 2)), data.noise)
        difference = model(small) - self._pick(data.y, second)
        change = self._pick(whole, first) - self._pick(whole, second)
        return (difference**2 + self.gamma * (difference - change) ** 2).flatten(1).mean(1)

    @staticmethod
    def _neighbours(y: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """Numbers 0 … 3 of two pixels side by side in every cell: two (B, H/2, W/2)."""
        cells = y.new_zeros(y.shape[0], y.shape[-2] // 2, y.shape[-1] // 2)
        first = (4 * rng.uniform(cells)).long()
        along = (2 * rng.uniform(cells)).long() + 1  # flip the column (1) or the row (2) bit
        return first, first ^ along

    @staticmethod
    def _pick(x: Tensor, number: Tensor) -> Tensor:
        """The chosen pixel of each cell: (B, C, H, W) → (B, C, H/2, W/2)."""
        cells = torch.stack([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
        return cells.gather(-1, number[:, None, :, :, None].expand(*cells.shape[:-1], 1))[..., 0]


@register("loss", "noise2score")
@dataclass(frozen=True)
class Noise2Score(Loss):
    """`‖u + a s(y + a u)‖²` a datum, u ~ N(0, I), a = amplitude |z| a row: s learns ∇log of the noisy data's density.

    Its minimiser is the score of y + a u, averaged over a: biased by the amplitude. `ScoreReconstructor` turns s into an
    image by the noise's Tweedie formula, so that one s serves noise levels that are learnt later.

    Arguments: amplitude: standard deviation of a, in the data's unit: well below the noise where that is continuous, but about
    a count (0.5 to 1 over the gain) for counts, whose density is a comb with a score of no use below that.
    References: Kim & Ye, *Noise2Score: Tweedie's Approach to Self-Supervised Image Denoising without Clean Images*, 2021,
    arXiv:2106.07009; Lim et al., *AR-DAE*, 2020, arXiv:2006.05164.
    """

    amplitude: float

    def check(self, batch: MeasuredBatch) -> None:
        check_denoising("Noise2Score", batch.observation)

    def __call__(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        data = batch.data
        u = rng.normal(data.y)
        a = expand(self.amplitude * rng.normal(data.y.new_zeros(data.y.shape[0], 1))[:, 0].abs(), u)
        return (u + a * model.score(replace(data, y=data.y + a * u))).square().flatten(1).mean(1)
