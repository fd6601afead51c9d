"""Langevin samplers of the posterior under the smoothed prior, π_σ(x) ∝ p_σ(x) p(y | x), p_σ = p ∗ N(0, σ²).

Tweedie's formula makes its score `b(x) = s(x) + (D(x, σ) − x)/σ²`. Since ∂D/∂x is a covariance over σ², it is PSD, and the
curvature of −log π_σ is at most L + 1/σ² with L the largest eigenvalue of the likelihood's Fisher information: one bound that
sets every step. It holds everywhere only if the likelihood is quadratic, so others are refused.
Invariant: the step of a row depends on its own likelihood and σ alone.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, replace

from torch import Tensor

from diffinv.core.checks import DiffinvError, UnsupportedError
from diffinv.core.linalg import expand, power_iteration
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Image, LinearMap, Sigma
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import State, parts_of
from diffinv.samplers.split import Split


@dataclass(frozen=True, eq=False)
class LangevinState(State):
    """bound: L (B,), the largest eigenvalue of the likelihood's Fisher information, in the inverse square of the image's unit."""

    bound: Tensor | None = None


class Langevin(Split, abc.ABC):
    """Steps of dx = b(x) dt + √2 dW, `repeats` of them at each positive level of the grid; x is the draw, not denoised.

    calibrated is False although the chain's limit is known: from one starting point, with steps of 1/(L + 1/σ²), a grid's
    number of levels is far from mixing wherever the data are much better than the prior.
    """

    calibrated = False
    repeats: int
    step_size: float

    def __post_init__(self) -> None:
        if self.repeats < 1 or not 0 < self.step_size < self.largest:
            raise DiffinvError(
                f"{type(self).__name__}: repeats {self.repeats} must be at least 1 and step_size {self.step_size} between 0 and "
                f"{self.largest:.3g}, where the chain becomes unstable."
            )

    @property
    @abc.abstractmethod
    def largest(self) -> float:
        """The largest stable `step_size`."""

    @property
    def unit(self) -> float:
        """Step δ at `step_size` 1, in units of 1/(L + 1/σ²)."""
        return 1.0

    def init(self, target: Denoiser, like: Image, sigma: Sigma, rng: Rng) -> LangevinState:
        """x = D(σ z, σ), about the prior's mean, and L by the power method from one fixed image. One denoiser call."""
        name = type(self).__name__
        prior, likelihood = parts_of(name, target)
        if not likelihood.quadratic:
            raise UnsupportedError(
                f"{name} needs one bound on the data's curvature everywhere, which only Gaussian noise and a linear operator "
                "have; use split_gibbs, or a guided sampler."
            )
        start = Rng.for_draws(0, [0] * like.shape[0], 1).normal(like)
        bound = power_iteration(likelihood.fisher(like).apply, start)
        return LangevinState(prior(expand(sigma, like) * rng.normal(like), sigma), bound=bound)

    def step(self, target: Denoiser, state: LangevinState, sigma: Sigma, sigma_next: Sigma, rng: Rng) -> LangevinState:
        prior, likelihood = parts_of(type(self).__name__, target)
        delta = self.step_size * self.unit / (state.bound + sigma.double() ** -2)
        precision = expand(sigma.double() ** -2, state.x)
        score = lambda x: likelihood.score(x) + precision * (prior(x, sigma) - x)
        x = state.x
        for _ in range(self.repeats):
            x = self.move(x, score, expand(delta, x), rng)
        return replace(state, x=x)

    @abc.abstractmethod
    def move(self, x: Image, score: LinearMap, delta: Tensor, rng: Rng) -> Image:
        """One step of size δ, broadcastable to x, with the posterior's score b."""


@register("sampler", "pnp_ula")
@dataclass(frozen=True)
class PnpUla(Langevin):
    """`x ← x + δ s(x) + δ/σ² (D(x, σ) − x) + √(2δ) z`, δ = step_size/(L + 1/σ²).

    The unadjusted Langevin algorithm on π_σ: one or more steps at each level, the last of them at the grid's smallest σ. For a
    Gaussian prior N(m, C) with precision of the posterior H = F + (C + σ²)⁻¹ its limit is N(H⁻¹h, H⁻¹ (1 − δH/2)⁻¹): the mean is
    right, and a variance is too large by the factor 1/(1 − δH/2), at most 6/5 at a step_size of ⅓. The tail term (Π_C(x) − x)/λ
    of the paper, which proves convergence and is inactive inside its box, is left out; the annealing of σ is not in the paper.
    Exact for nothing at finite δ and σ. Cost a step: one denoiser call.

    Arguments: step_size: δ (L + 1/σ²), below 2; the paper's bound is ⅓. repeats: steps a level.
    Raises: DiffinvError for an unstable step; UnsupportedError for a likelihood that is not quadratic.
    References: Laumont, De Bortoli, Almansa, Delon, Durmus & Pereyra, *Bayesian Imaging Using Plug & Play Priors: When Langevin
    Meets Tweedie*, 2022, arXiv:2103.04715, algorithm 1 (there ε = σ², α = 1).
    """

    step_size: float = 1 / 3
    repeats: int = 1
    largest = 2.0

    def move(self, x: Image, score: LinearMap, delta: Tensor, rng: Rng) -> Image:
        return x + delta * score(x) + (2 * delta).sqrt() * rng.normal(x)


@register("sampler", "skrock")
@dataclass(frozen=True)
class SkRock(Langevin):
    """`K₁ = x + μ₁ δ b(x + ν₁ Q) + κ₁ Q`, `Kⱼ = μⱼ δ b(Kⱼ₋₁) + νⱼ Kⱼ₋₁ + κⱼ Kⱼ₋₂`, x ← K_s, Q = √(2δ) z: SK-ROCK.

    T_j are the Chebyshev polynomials, all at ω₀ = 1 + η/s²; ω₁ = T_s/T_s', μ₁ = ω₁/ω₀, ν₁ = sω₁/2, κ₁ = sω₁/ω₀,
    μⱼ = 2ω₁ T_{j−1}/T_j, νⱼ = 2ω₀ T_{j−1}/T_j, κⱼ = 1 − νⱼ. In a direction of curvature h, with p = −δh, one step is
    `x ← T_s(ω₀ + ω₁p)/T_s(ω₀) x + U_{s−1}(ω₀ + ω₁p)/U_{s−1}(ω₀) (1 + ω₁p/2) Q`, stable up to δh = ℓ_s = (1 + ω₀)/ω₁, about
    (2 − 4η/3) s²: s² times the step of the unadjusted algorithm for s times its calls. δ = step_size · ℓ_s/(L + 1/σ²).
    s = 1 is that algorithm with the score taken at x + ν₁Q. Weak order 1 in δ: fast directions are biased. As for PnP-ULA
    the target is π_σ. Cost a step: s denoiser calls.

    Arguments: stages: s. eta: η of the damping, 0.05 in both papers. step_size: δ over its limit, below 1; 0.7 is about 0.8
    of the second paper's more careful limit (s − ½)²(2 − 4η/3) − 3/2 at s = 10. repeats: steps a level.
    Raises: DiffinvError for an unstable step or stages < 1; UnsupportedError for a likelihood that is not quadratic.
    References: Abdulle, Almuslimani & Vilmart, *Optimal Explicit Stabilized Integrator of Weak Order One for Stiff and Ergodic
    Stochastic Differential Equations*, 2018, arXiv:1708.08145; Pereyra, Vargas Mieles & Zygalakis, *Accelerating Proximal Markov
    Chain Monte Carlo by Using an Explicit Stabilised Method*, 2020, arXiv:1908.08845, algorithm 1.
    """

    stages: int = 10
    step_size: float = 0.7
    repeats: int = 1
    eta: float = 0.05
    largest = 1.0

    def __post_init__(self) -> None:
        if self.stages < 1 or not self.eta > 0:
            raise DiffinvError(f"SkRock: stages {self.stages} must be at least 1 and eta {self.eta} > 0; 10 and 0.05 are common.")
        super().__post_init__()

    @property
    def unit(self) -> float:
        omega0, omega1, _ = self._constants()
        return (1 + omega0) / omega1

    def _constants(self) -> tuple[float, float, list[float]]:
        """ω₀, ω₁ and T₀(ω₀), …, T_s(ω₀)."""
        omega0 = 1 + self.eta / self.stages**2
        angle = math.acosh(omega0)
        values = [math.cosh(j * angle) for j in range(self.stages + 1)]
        slope = self.stages * math.sinh(self.stages * angle) / math.sinh(angle)
        return omega0, values[-1] / slope, values

    def move(self, x: Image, score: LinearMap, delta: Tensor, rng: Rng) -> Image:
        omega0, omega1, chebyshev = self._constants()
        noise = (2 * delta).sqrt() * rng.normal(x)
        shifted = x + self.stages * omega1 / 2 * noise
        before, now = x, x + omega1 / omega0 * (delta * score(shifted) + self.stages * noise)
        for j in range(2, self.stages + 1):
            share = 2 * chebyshev[j - 1] / chebyshev[j]
            nu = omega0 * share
            before, now = now, omega1 * share * delta * score(now) + nu * now + (1 - nu) * before
        return now
