"""The slope of a reconstruction along a direction of the data, J ω with J = ∂(A f(y, A))/∂y, which divergences are made of.

`E[ωᵀ J ω] = tr(Σ J)` for E[ωωᵀ] = Σ: one product is an unbiased estimate (Hutchinson 1989; Ramani, Blu & Unser 2008).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffinv.core.checks import UnsupportedError
from diffinv.core.linalg import expand
from diffinv.core.registry import register
from diffinv.likelihood import Observation
from diffinv.losses.base import twice


class Slope(abc.ABC):
    """How J ω is found."""

    @abc.abstractmethod
    def __call__(self, model: nn.Module, data: Observation, omega: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """u = A f(y, A) and J ω, both (B, *data).

        Arguments: data: without bad values. omega: ω (B, *data). noise: (B,), typical of a datum, in the data's unit.
        """


@register("slope", "forward_mode")
@dataclass(frozen=True)
class ForwardMode(Slope):
    """Exact, by forward-mode differentiation; its kernels in torch are not fused, so that a step takes 3.5 times a plain one."""

    def __call__(self, model: nn.Module, data: Observation, omega: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        def mean(y: Tensor) -> Tensor:
            return data.operator(model(replace(data, y=y)))

        return torch.func.jvp(mean, (data.y,), (omega,))


@register("slope", "finite_difference")
@dataclass(frozen=True)
class FiniteDifference(Slope):
    """`[u(y + h ω) − u(y)]/h`, h ω of the size `step · noise`: a pass of twice the rows, twice the cost of a plain step.

    The error of first order in h is odd in ω and vanishes on average. The step follows the noise, not the brightness of the
    image, and is at least what float arithmetic can tell apart (64 rounding errors of the data's rms).

    Arguments: step: dimensionless; 0.05 leaves an error of a few 1e-4 for networks that are smooth over the noise.
    Raises: UnsupportedError for a network with active dropout, whose two passes would be of two networks. It cannot see
    reduced precision inside the network, with which differences are noise; `Trainer` refuses the pair.
    """

    step: float

    def __call__(self, model: nn.Module, data: Observation, omega: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        if any(isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0 for part in model.modules()):
            raise UnsupportedError(
                "FiniteDifference: the network has active dropout, so that two passes are of two networks; use ForwardMode."
            )
        h = expand(self._step(data.y, omega, noise), omega)
        here, there = (data.operator(x) for x in twice(model, data, data.y + h * omega))
        return here, (there - here) / h

    def _step(self, y: Tensor, omega: Tensor, noise: Tensor) -> Tensor:
        """h (B,)."""
        rms = lambda v: v.flatten(1).square().mean(1).sqrt()
        size = torch.maximum(self.step * noise.to(y), 64 * torch.finfo(y.dtype).eps * rms(y))
        reach = rms(omega)
        return torch.where((size > 0) & (reach > 0), size / reach.where(reach > 0, 1.0), self.step)
