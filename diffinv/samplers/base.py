"""Samplers: `init` and `step` kernels, and `sample`, the only loop in the package.

A sampler walks a decreasing grid of noise levels σ₀ > σ₁ > … > σ_N = 0 with a denoiser as target.
Invariant: a row's result depends on its own x, target and random stream alone, whatever the batch.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffinv.core.batched import Batched
from diffinv.core.checks import UnsupportedError
from diffinv.core.linalg import expand
from diffinv.core.rng import Rng
from diffinv.core.types import Image, Sigma
from diffinv.likelihood import Likelihood
from diffinv.posterior import Posterior
from diffinv.priors.base import Denoiser


@dataclass(frozen=True, eq=False)
class State(Batched):
    """Where a chain stands: x (B, *image) at the present noise level, and the last denoised image x₀ with its level (B,)."""

    x: Image
    x0: Image | None = None
    sigma0: Sigma | None = None


class Sampler(abc.ABC):
    """A rule to go from one noise level to the next.

    order: of its global error in the step size, or None if it does not integrate a differential equation.
    calibrated: whether it claims draws of the posterior with a few dozen levels and its own settings; the claim is measured in
    `benchmarks/gaussian_joint`. guided: whether it calls the
    target itself (any denoiser); if not, it reads the prior and the likelihood of a `Posterior` and ignores its guidance.
    """

    order: ClassVar[int | None]
    calibrated: ClassVar[bool] = True
    guided: ClassVar[bool] = True

    @property
    def cloud(self) -> int:
        """Consecutive rows that interact: a batch must hold whole clouds."""
        return 1

    def init(self, target: Denoiser, like: Image, sigma: Sigma, rng: Rng) -> State:
        """x = D(σ z₁, σ) + σ z₂: the state at the first level.

        At a level far above the spread of x₀ given the data, p(x_σ) is N(E[x₀], σ²), and D at pure noise tends to E[x₀].
        Without the mean a grid would have to start far higher for the same error. One denoiser call.
        """
        noise = expand(sigma, like)
        return State(target(noise * rng.normal(like), sigma) + noise * rng.normal(like))

    @abc.abstractmethod
    def step(self, target: Denoiser, state: State, sigma: Sigma, sigma_next: Sigma, rng: Rng) -> State:
        """From level σ to σ_next ≤ σ, both (B,) float64; σ_next = 0 is the last step."""


def parts_of(owner: str, target: Denoiser) -> tuple[Denoiser, Likelihood]:
    """Prior and likelihood of a posterior. Raises: UnsupportedError for any other denoiser: they cannot be told apart."""
    if not isinstance(target, Posterior):
        raise UnsupportedError(f"{owner} needs prior and likelihood apart, got {type(target).__name__}; give a Posterior.")
    return target.prior, target.likelihood


def sample(
    sampler: Sampler,
    target: Denoiser,
    sigmas: Tensor,
    like: Image,
    rng: Rng,
    *,
    progress: Callable[[int], None] | None = None,
) -> State:
    """Run a sampler down a grid of noise levels.

    Arguments:
        sigmas: (N + 1,) float64, decreasing, or (B, N + 1), a grid a row; the last may be 0.
        like: (B, *image) gives shape, dtype and device.
        rng: B streams. progress: called with the number of the step just done.
    Returns: the final state; its `x` are the draws.
    """
    levels = sigmas.to(device=like.device, dtype=torch.float64)
    level = lambda k: levels[..., k].expand(like.shape[0])
    with torch.no_grad():
        state = sampler.init(target, like, level(0), rng.spawn(0))
        for k in range(levels.shape[-1] - 1):
            state = sampler.step(target, state, level(k), level(k + 1), rng.spawn(k + 1))
            if progress is not None:
                progress(k + 1)
    return state
