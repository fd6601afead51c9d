"""Hide some data, reconstruct from the others, and compare there: for noise that is independent between data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffinv.core.checks import UnsupportedError
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import Loss, MeasuredBatch, mean_good, truth
from diffinv.operators.algebra import Identity
from diffinv.reconstructors.observed import hidden


@register("hiding", "random")
@dataclass(frozen=True)
class RandomHiding:
    """Keeps each datum with probability `kept`; the last `together` axes of the data are kept or hidden as one.

    Arguments: kept: in (0, 1). together: 0 for pixels on their own; 1 for complex data as a trailing pair.
    Raises: UnsupportedError if kept is not in (0, 1).
    """

    kept: float
    together: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.kept < 1:
            raise UnsupportedError(f"RandomHiding: kept must lie between 0 and 1, got {self.kept}; 0.6 hides four data in ten.")

    def keep(self, observation: Observation, rng: Rng) -> Tensor:
        """True where a datum is kept: (B, *data)."""
        y = observation.y
        lead = y.shape[: y.ndim - self.together]
        chosen = rng.uniform(y.new_zeros(lead)) < self.kept
        return chosen.reshape(*lead, *[1] * self.together).expand(y.shape)

    def __call__(self, observation: Observation, rng: Rng) -> Observation:
        """The observation without what is hidden."""
        return hidden(observation, self.keep(observation, rng))


@register("loss", "splitting")
@dataclass(frozen=True)
class Splitting(Loss):
    """`‖(y − A f(y_{−J}, A_{−J}))_J‖²` a hidden datum, J random (Noise2Self, SSDU); with `kept`, that loss of y_{−J} on top.

    Oracle: `‖(A (f(y_{−J}) − x))_J‖²` a hidden datum. A trained model is used on several y_{−J} and averaged
    (`SplittingAverage`). Under noise the kept data teach too: `kept` = Sure or Recorrupted.

    Arguments: hiding: what is kept. kept: a loss of the observation that is left, or None.
    Raises: UnsupportedError for correlated noise, and where less than one datum a row is hidden.
    References: Batson & Royer, *Noise2Self*, 2019, arXiv:1901.11365; Yaman et al., *Self-supervised learning of physics-guided
    reconstruction neural networks without fully sampled reference data*, 2020, Magn. Reson. Med. 84, 3172.
    """

    hiding: RandomHiding
    kept: Loss | None = None

    @property
    def unbiased(self) -> bool:
        return self.kept is None or self.kept.unbiased

    @property
    def multipliers(self) -> tuple[nn.Parameter, ...]:
        return () if self.kept is None else self.kept.multipliers

    @property
    def differences(self) -> bool:
        return self.kept is not None and self.kept.differences

    def check(self, batch: MeasuredBatch) -> None:
        data = batch.data
        left = hidden(data, torch.ones_like(data.y, dtype=torch.bool))
        count = data.y[0].numel()
        if (1 - self.hiding.kept) * count < 1:
            raise UnsupportedError(
                f"Splitting: hides {(1 - self.hiding.kept) * count:.2g} of the {count} data of a row on average, so that most "
                "rows teach nothing; keep less."
            )
        if self.kept is not None:
            self.kept.check(replace(batch, observation=left))

    def __call__(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        return self._risk(model, batch, rng, batch.data.y, oracle=False)

    def oracle(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        return self._risk(model, batch, rng, batch.observation.operator(truth(batch, "Splitting")), oracle=True)

    def _risk(self, model: nn.Module, batch: MeasuredBatch, rng: Rng, target: Tensor, *, oracle: bool) -> Tensor:
        data = batch.data
        keep = self.hiding.keep(data, rng)
        left = hidden(data, keep)
        risk = mean_good((data.operator(model(left)) - target) ** 2, batch.good & ~keep)
        if self.kept is None:
            return risk
        inner = self.kept.oracle if oracle else self.kept
        return risk + inner(model, replace(batch, observation=left), rng.spawn(1))


@register("loss", "noise2void")
@dataclass(frozen=True)
class Noise2Void(Loss):
    """`‖(y − f(y with yᵢ → a neighbour's value))_J‖²` a pixel of J: denoising with a network that is not told where J is.

    Biased: the neighbour's value carries signal and noise of its own. The noise must be independent between pixels.

    Arguments: share: of the pixels in J. radius: of the neighbourhood, in pixels.
    Raises: UnsupportedError for an operator other than the identity, correlated noise, or masked data.
    References: Krull, Buchholz & Jug, *Noise2Void*, 2019, arXiv:1811.10980.
    """

    share: float
    radius: int

    def check(self, batch: MeasuredBatch) -> None:
        check_denoising("Noise2Void", batch.observation)
        hidden(batch.data, torch.ones_like(batch.data.y, dtype=torch.bool))
        if not bool(batch.good.all()) or batch.data.y.shape[-2:].numel() < 2:
            raise UnsupportedError(
                "Noise2Void: a masked pixel would stand in for its neighbours; use Splitting, which leaves masked data out."
            )

    def __call__(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        data, y = batch.data, batch.data.y
        chosen = rng.uniform(y) < self.share
        seen = y.where(~chosen, self._neighbours(y, rng))
        return mean_good((model(replace(data, y=seen)) - y) ** 2, batch.good & chosen)

    def _neighbours(self, y: Tensor, rng: Rng) -> Tensor:
        """For each pixel the value of a random other one at most `radius` away a way; the image is mirrored at its border."""
        height, width = y.shape[-2:]
        side = 2 * self.radius + 1
        step = (rng.uniform(y) * (side**2 - 1)).long()
        step = step + (step >= side**2 // 2)
        row = torch.arange(height, device=y.device)[:, None] + step // side - self.radius
        column = torch.arange(width, device=y.device) + step % side - self.radius
        row, column = _mirrored(row, height), _mirrored(column, width)
        itself = (row == torch.arange(height, device=y.device)[:, None]) & (column == torch.arange(width, device=y.device))
        index = (row * width + column + itself * torch.where(column + 1 < width, 1, -1)) % (height * width)
        return y.flatten(2).gather(2, index.flatten(2)).reshape(y.shape)


def _mirrored(index: Tensor, length: int) -> Tensor:
    """Pixel numbers beyond the border mirrored at the edge pixel, which is not doubled."""
    period = max(2 * length - 2, 1)
    index = index.remainder(period)
    return torch.minimum(index, period - index)


def check_denoising(owner: str, observation: Observation) -> None:
    """Raise UnsupportedError unless the operator is the identity."""
    if not isinstance(observation.operator, Identity):
        raise UnsupportedError(
            f"{owner}: for denoising alone (A = Identity), got {type(observation.operator).__name__}; use Splitting, SURE or R2R."
        )
