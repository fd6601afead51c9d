"""The half-step of split samplers: a draw of p(z) ∝ N(z; c, ρ² I) p(y | z), which needs no network.

With F, s the likelihood's Fisher information and score and P = F + I/ρ², a quadratic likelihood makes p(z) the Gaussian
N(c + P⁻¹ s(c), P⁻¹), drawn by perturbing and solving: η ~ N(0, P) is `perturb + ε/ρ`, and P⁻¹ η ~ N(0, P⁻¹). Any other
likelihood gets a Metropolis-adjusted Langevin chain whose proposals are exact for that Gaussian.
Invariant: only draws of N(0, F) and products with F are needed, never a square root or an inverse of a covariance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.core.linalg import Solve, dot, expand, information_solve
from diffinv.core.rng import Rng
from diffinv.core.types import Image, Sigma
from diffinv.likelihood import Likelihood

_HALVINGS, _MARGIN = 4, 4.0


@dataclass(frozen=True)
class Drawn:
    """image: the draw, (B, *image). residual: (B,) of its last solve. accepted: (B,) share of the proposals, 1 if exact."""

    image: Image
    residual: Tensor
    accepted: Tensor


@dataclass(frozen=True)
class HalfStep:
    """A draw of p(z) ∝ N(z; c, ρ² I) p(y | z).

    Quadratic likelihood: `z = c + P⁻¹ (s(c) + perturb + ε/ρ)`, P = F + I/ρ², exact to the tolerance of one solve by CG. Its
    condition number is 1 + ρ²‖F‖: at a ρ far above what the data resolve, `iterations` may end it first, and the directions
    that are not resolved yet keep too little noise; a sampler that ends at a small ρ forgets that.

    Any other: from the mode z* of p (Fisher scoring with halved steps) a draw of N(z*, P⁻¹), P = F(z*) + I/ρ² held constant,
    then K steps `z' = z + a P⁻¹ g(z) + √(a(2 − a)) P⁻¹η`, accepted with probability min(1, e^Δ),
    `Δ = log p(z')/p(z) − [⟨z' − z, g + g'⟩ + a/2 (⟨g', P⁻¹g'⟩ − ⟨g, P⁻¹g⟩)]/(2 − a)`. g is ∇log p, shortened where
    √⟨g, P⁻¹g⟩ exceeds √n + 4, n pixels (it is about √n where p has its mass): a start behind a wall of p, as at negative
    photon rates, else never leaves it. This is MALA, truncated, with the noise of an exact step for N(z*, P⁻¹), so that Δ = 0
    for a Gaussian p at any a and rejects only what is not Gaussian; √(2a) would be the usual noise.
    a = min(1, step · n^(−1/3)) (the optimal scaling of MALA). Exact as K → ∞; at K = 0 it is the Laplace approximation. The
    chain is slow where the Fisher information is not the curvature (photon counts of zero at a rate near the noise's floor).
    A pixel without counts and background pulls z down by g ρ², g the gain, through zero: with counting noise, start at a ρ of
    the images' own size.

    Cost: no network call; a solve (F products), and with K steps 2 + 2K of them more beside those of `newton`.
    Arguments: iterations, tol: of each CG, `√(rᵀr/ηᵀη) ≤ tol`. langevin: K. step: of the chain, in units of its scaling.
    newton: steps to the mode.
    Raises: DiffinvError for a negative number of steps.
    References: Papandreou & Yuille, *Gaussian Sampling by Local Perturbations*, NeurIPS 2010; Roberts & Tweedie, *Exponential
    Convergence of Langevin Distributions and Their Discrete Approximations*, 1996; Cotter, Roberts, Stuart & White, *MCMC
    Methods for Functions*, 2013, arXiv:1202.0709 (proposals that are exact for a Gaussian).
    """

    iterations: int = 100
    tol: float = 1e-6
    langevin: int = 10
    step: float = 1.0
    newton: int = 8

    def __post_init__(self) -> None:
        if min(self.iterations, self.langevin + 1, self.newton) < 1 or not self.step > 0:
            raise DiffinvError(
                f"HalfStep: iterations {self.iterations}, newton {self.newton} and step {self.step} must be > 0, "
                f"langevin {self.langevin} at least 0; 100, 8, 1 and 10 are the defaults."
            )

    def __call__(self, likelihood: Likelihood, centre: Image, rho: Sigma, rng: Rng) -> Drawn:
        """A draw. Arguments: centre: c (B, *image). rho: ρ (B,) > 0, in the unit of the image."""
        if likelihood.quadratic:
            target = _Target(self, likelihood, centre, rho, centre)
            solved = target.solve(likelihood.score(centre) + target.perturb(rng))
            return Drawn(centre + solved.solution, solved.residual, torch.ones_like(solved.residual))
        return self._metropolis(_Target(self, likelihood, centre, rho, self._mode(likelihood, centre, rho)), rng)

    def _mode(self, likelihood: Likelihood, centre: Image, rho: Sigma) -> Image:
        """z ← z + t P(z)⁻¹ ∇log p(z), with the best t of 1, ½, ¼, … and 0 in each row."""
        z = centre
        for _ in range(self.newton):
            target = _Target(self, likelihood, centre, rho, z)
            best = target.log_prob(z)
            move = target.solve(target.gradient(z)).solution
            chosen = torch.zeros_like(best)
            for t in [0.5**k for k in range(_HALVINGS)]:
                value = target.log_prob(z + t * move)
                better = value > best
                best, chosen = torch.where(better, value, best), torch.where(better, t, chosen)
            z = z + expand(chosen, z) * move
        return z

    def _metropolis(self, target: _Target, rng: Rng) -> Drawn:
        first = target.solve(target.perturb(rng))
        point = target.point(target.anchor + first.solution)
        accepted, residual = torch.zeros_like(point.log_prob), first.residual
        a = min(1.0, self.step * target.anchor[0].numel() ** (-1 / 3))
        for _ in range(self.langevin):
            noise = target.solve(target.perturb(rng))
            other = target.point(point.z + a * point.drift + (a * (2 - a)) ** 0.5 * noise.solution)
            curvature = a / 2 * (dot(other.gradient, other.drift) - dot(point.gradient, point.drift))
            log_ratio = dot(other.z - point.z, point.gradient + other.gradient) + curvature
            log_ratio = other.log_prob - point.log_prob - log_ratio / (2 - a)
            uniform = rng.uniform(point.log_prob[:, None])[:, 0]
            accept = uniform.log() < log_ratio
            point = other.where(accept, point)
            accepted, residual = accepted + accept, noise.residual
        return Drawn(point.z, residual, accepted / max(1, self.langevin))


@dataclass(frozen=True)
class _Point:
    """A state z of the chain with log p (B,), its shortened gradient g and drift P⁻¹ g."""

    z: Image
    log_prob: Tensor
    gradient: Image
    drift: Image

    def where(self, keep: Tensor, other: _Point) -> _Point:
        choose = lambda a, b: torch.where(keep.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        names = ("z", "log_prob", "gradient", "drift")
        return replace(self, **{name: choose(getattr(self, name), getattr(other, name)) for name in names})


class _Target:
    """p(z) ∝ N(z; c, ρ²) p(y | z), and P = F(anchor) + I/ρ²."""

    def __init__(self, settings: HalfStep, likelihood: Likelihood, centre: Image, rho: Sigma, anchor: Image) -> None:
        self.settings, self.likelihood, self.centre, self.rho, self.anchor = settings, likelihood, centre, rho, anchor
        self.fisher = likelihood.fisher(anchor)

    def log_prob(self, z: Image) -> Tensor:
        away = (z - self.centre) / expand(self.rho, z)
        return self.likelihood.log_prob(z).double() - dot(away, away) / 2

    def gradient(self, z: Image) -> Image:
        return self.likelihood.score(z) - (z - self.centre) / expand(self.rho**2, z)

    def perturb(self, rng: Rng) -> Image:
        """A draw of N(0, P)."""
        return self.likelihood.perturb(self.anchor, rng) + rng.normal(self.anchor) / expand(self.rho, self.anchor)

    def solve(self, v: Tensor) -> Solve:
        """P⁻¹ v."""
        variance = expand(self.rho.double() ** 2, v)
        iterations, tol = self.settings.iterations, self.settings.tol
        return information_solve(lambda w: variance * w, self.fisher.apply, v, iterations=iterations, tol=tol)

    def point(self, z: Image) -> _Point:
        gradient = self.gradient(z)
        drift = self.solve(gradient).solution
        size, limit = dot(gradient, drift).clamp_min(0).sqrt(), z[0].numel() ** 0.5 + _MARGIN
        shorter = expand(limit / size.clamp_min(limit), z)
        return _Point(z, self.log_prob(z), shorter * gradient, shorter * drift)
