"""RED-diff: the posterior as a point, found by stochastic descent with the denoiser's residual as regulariser."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.core.linalg import expand, information_solve
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Image, Sigma
from diffinv.likelihood import Likelihood
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import Sampler, State, parts_of


@dataclass(frozen=True, eq=False)
class Descent(State):
    """μ (as x), and Adam's running means of the gradient and of its square after `count` steps."""

    first: Tensor | None = None
    second: Tensor | None = None
    count: int = 0


def adam(state: Descent, gradient: Tensor, *, lr: float, betas: tuple[float, float]) -> Descent:
    """One step of Adam, element by element, without its ε: the step does not change with the unit of the loss.

    References: Kingma & Ba, *Adam: A Method for Stochastic Optimization*, 2014, arXiv:1412.6980, algorithm 1.
    """
    count = state.count + 1
    first = betas[0] * state.first + (1 - betas[0]) * gradient
    second = betas[1] * state.second + (1 - betas[1]) * gradient**2
    size = (second / (1 - betas[1] ** count)).sqrt()
    move = first / (1 - betas[0] ** count) / torch.where(size == 0, 1.0, size)
    return Descent(state.x - lr * move, state.x0, first=first, second=second, count=count)


@register("sampler", "red_diff")
@dataclass(frozen=True)
class RedDiff(Sampler):
    """`μ ← Adam(μ, −∇log p(y | μ) + λ (μ − D(μ + σ z, σ)))`, once a level, σ falling; μ is the answer.

    The paper's loss for q(x₀ | y) = N(μ, → 0): `‖y − A μ‖² + λ_t ⟨ε_θ − z, μ⟩`, the second factor not differentiated, with
    λ_t = λ' σ_t/α_t, the inverse of its signal-to-noise ratio. Divided by α_t its x_t is our μ + σ z with σ = σ_t/α_t, and
    σ (ε_θ − z) = μ − D. White noise σ_n: λ = λ'/(2 σ_n²), or λ'/σ_n² with the λ' of the paper's code, whose data term is half
    as large; λ' = 0.25 there. At one level, the minimiser for a Gaussian prior N(m, C) and linear Gaussian data solves
    `Aᵀ(y − A μ)/σ_n² = λ σ² (C + σ²)⁻¹ (μ − m)`: a mode under a smoothed prior, not a posterior mean. Exact only for a white
    prior far below σ, λ = 1/σ_d². The draws are restarts, `μ₀ = u + (λ + F)⁻¹ s(u)`, u = D(σ z₁, σ) + τ z₂ at the first level
    (the paper starts at A⁺y): their spread says how much the start decides, not how sure the answer is.
    One forward a step and one at the start, no vjp. It ignores a posterior's guidance.

    Arguments: lam: λ > 0, in the unit of x to the power −2. lr: Adam's step > 0, in the unit of x (0.5 in the example of the
        paper's code, for images on [−1, 1]). spread: τ ≥ 0 of the restarts, in the unit of x. betas: Adam's memories, those of
        the paper's code.
    Raises: DiffinvError for values out of range; UnsupportedError for a target that is not a Posterior.
    References: Mardani, Song, Kautz & Vahdat, *A Variational Perspective on Solving Inverse Problems with Diffusion Models*,
    2023, arXiv:2305.04391, algorithm 1.
    """

    lam: float
    lr: float
    spread: float
    betas: tuple[float, float] = (0.9, 0.99)
    order = None
    calibrated = False
    guided = False

    def __post_init__(self) -> None:
        if not (self.lam > 0 and self.lr > 0 and self.spread >= 0):
            raise DiffinvError(
                f"RedDiff: lam and lr must be > 0 and spread >= 0, got {self.lam}, {self.lr}, {self.spread}; see its docstring."
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise DiffinvError(f"RedDiff: betas must lie in [0, 1), got {self.betas}; the paper's code has (0.9, 0.99).")

    def init(self, target: Denoiser, like: Image, sigma: Sigma, rng: Rng) -> Descent:
        prior, likelihood = parts_of("RedDiff", target)
        start = prior(expand(sigma, like) * rng.normal(like), sigma) + self.spread * rng.normal(like)
        zero = torch.zeros_like(like)
        return Descent(start + self._pull(likelihood, start), first=zero, second=zero)

    def _pull(self, likelihood: Likelihood, x: Image) -> Image:
        """(λ + F)⁻¹ s at x."""
        fisher, score = likelihood.fisher(x), likelihood.score(x)
        return information_solve(lambda v: v / self.lam, fisher.apply, score, iterations=100, tol=1e-12).solution

    def step(self, target: Denoiser, state: Descent, sigma: Sigma, sigma_next: Sigma, rng: Rng) -> Descent:
        prior, likelihood = parts_of("RedDiff", target)
        mu = state.x
        x0 = prior(mu + expand(sigma, mu) * rng.normal(mu), sigma)
        return adam(state, self.lam * (mu - x0) - likelihood.score(mu), lr=self.lr, betas=self.betas)
