"""The posterior of 3C 273 by NUTS chains: absorbed power law, folding and W statistic written a second time, in JAX.

p(θ | data) ∝ exp(−W(θ)/2) under a flat prior in θ = (Γ, n_H, ln norm), the background of each channel at its own maximum.
Chains run in w, θ = θ̂ + L w with L Lᵀ the covariance of the maximum of the likelihood, n_H free; the draws with n_H ≥ 0 are
those of the posterior with that bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS
from quasar_spectrum import quasar_parts

from diffinv.spectral.statistics import Maximum

jax.config.update("jax_enable_x64", True)
CHAINS, WARMUP, SAMPLES = 4, 200, 750


@dataclass(frozen=True)
class Chains:
    """draws of θ, (N, 3). error: of their mean, by Monte Carlo. rhat: the worst split R̂. statistic: W at the start, by JAX."""

    draws: np.ndarray
    error: np.ndarray
    rhat: float
    statistic: float


def _log_ratio(k: jax.Array, mean: jax.Array) -> jax.Array:
    """k log(k/m), 0 where nothing is counted, with a derivative of 0 there."""
    counted = k > 0
    return k * jnp.log(jnp.where(counted, k, 1.0) / jnp.where(counted, mean, 1.0))


def chains(folder: Path, start: Maximum, *, seed: int = 0) -> Chains:
    """Arguments: start: the maximum of the likelihood.

    Raises: RuntimeError if the chains do not move or do not agree.
    """
    parts = quasar_parts(folder)
    edges, sigma, matrix = (jnp.asarray(t.numpy()) for t in (parts.edges, parts.cross_section, parts.matrix))
    counts, others, ratio = (jnp.asarray(np.asarray(t)) for t in (parts.counts, parts.background, parts.ratio))

    def statistic(theta: jax.Array) -> jax.Array:
        t = 1 - theta[0]
        photons = (edges[1:] ** t - edges[:-1] ** t) / t * jnp.exp(theta[2] - theta[1] * sigma)
        mean = parts.exposure * photons @ matrix
        half = counts + others - (1 + ratio) * mean
        b = (half + jnp.sqrt(half**2 + 4 * (1 + ratio) * others * mean)) / (2 * (1 + ratio))
        own = mean + b - counts + _log_ratio(counts, mean + b)
        return 2 * (own + ratio * b - others + _log_ratio(others, ratio * b)).sum()

    centre, root = jnp.asarray(start.theta.numpy()), jnp.asarray(np.linalg.cholesky(start.covariance.numpy()))

    kernel = NUTS(potential_fn=lambda w: statistic(centre + root @ w) / 2)
    chain = MCMC(kernel, num_warmup=WARMUP, num_samples=SAMPLES, num_chains=CHAINS,
                 chain_method="vectorized", progress_bar=False)  # fmt: skip
    chain.run(jax.random.PRNGKey(seed), init_params=jnp.zeros((CHAINS, 3)))
    theta = np.asarray(centre) + np.asarray(chain.get_samples(group_by_chain=True)) @ np.asarray(root).T
    draws, rhat = theta.reshape(-1, 3), float(split_gelman_rubin(theta).max())
    if not draws.std(0).all() or not rhat < 1.02:
        raise RuntimeError(f"the chains do not move or do not agree: σ {draws.std(0)}, R̂ {rhat:.3f}")
    error = draws.std(0) / np.sqrt(effective_sample_size(theta))
    return Chains(draws, error, rhat, float(statistic(centre)))
