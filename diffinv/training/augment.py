"""What one stored galaxy becomes in training: turned, flipped, shifted, rescaled.

The scale is jittered because in inference the flux scale of an object is only estimated; a tail towards faint views
covers tiles of a field that hold a faint neighbour of a bright galaxy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.linalg import expand
from diffinv.core.rng import Rng
from diffinv.operators.groups import Group


@dataclass(frozen=True)
class AsTheyAre:
    """x."""

    def __call__(self, x: Tensor, rng: Rng) -> Tensor:
        return x


@dataclass(frozen=True)
class GroupViews:
    """T_g x, g random: images that are as likely as x. In expectation maximisation, equivariant imaging for a prior."""

    group: Group

    def __call__(self, x: Tensor, rng: Rng) -> Tensor:
        return self.group.draw(rng, tuple(x.shape[1:]), x)(x)


@dataclass(frozen=True)
class GalaxyViews:
    """x ↦ s · shift(turn(x))/rms(x).

    Arguments: scale_jitter: standard deviation of ln s. faint: fraction of views with s log-uniform on
    [faint_scale, 1] on top. shift: largest shift in pixels (zero fill), for half of the views.
    """

    scale_jitter: float = 0.4
    faint: float = 0.15
    faint_scale: float = 0.05
    shift: int = 8

    def __call__(self, x: Tensor, rng: Rng) -> Tensor:
        u = rng.uniform(x.new_zeros(x.shape[0], 6))
        x = x / x.pow(2).flatten(1).mean(1).sqrt().clamp_min(1e-12)[:, None, None, None]
        x = self._turn(x, u[:, 0])
        x = self._shift(x, u[:, 1:3], u[:, 5] < 0.5)
        faint = torch.where(u[:, 3] < self.faint, self.faint_scale ** u[:, 4], torch.ones_like(u[:, 4]))
        jitter = (self.scale_jitter * rng.normal(x.new_zeros(x.shape[0], 1))[:, 0]).exp()
        return expand(faint * jitter, x) * x

    @staticmethod
    def _turn(x: Tensor, u: Tensor) -> Tensor:
        """One of the eight symmetries of the square a row."""
        which = (8 * u).long()
        x = torch.where(expand(which % 2, x).bool(), x.transpose(-1, -2), x)
        x = torch.where(expand(which // 2 % 2, x).bool(), x.flip(-1), x)
        return torch.where(expand(which // 4, x).bool(), x.flip(-2), x)

    def _shift(self, x: Tensor, u: Tensor, moved: Tensor) -> Tensor:
        """A whole-pixel shift with zero fill, as a gather from a padded copy."""
        size_y, size_x, reach = x.shape[-2], x.shape[-1], self.shift
        offset = torch.where(moved[:, None], ((2 * reach + 1) * u).long(), reach)
        padded = torch.nn.functional.pad(x, (reach, reach, reach, reach))
        rows = offset[:, 0, None] + torch.arange(size_y, device=x.device)
        columns = offset[:, 1, None] + torch.arange(size_x, device=x.device)
        batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
        return padded.movedim(1, -1)[batch, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
