"""The same posteriors by long NUTS chains: the model of `poisson_toys` written a second time, in JAX, in float64.

x = L z with L Lᵀ = C, so that the prior is Σ_k w_k N(z; L⁻¹ m_k, I), one component if it is Gaussian. The log-likelihood is
written from the noise's formulas, the tangent below the floor included; the Poisson–Gaussian series is summed over a fixed
window about the electrons read, wide enough for every rate above the floor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
import numpyro
import torch
from jax.scipy.special import gammaln, logsumexp
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.distributions import ImproperUniform
from numpyro.distributions.constraints import real_matrix
from numpyro.infer import MCMC, NUTS
from poisson_toys import Problem, blur
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.noise.photon import PoissonGaussian
from diffinv.priors.analytic import MixturePrior

jax.config.update("jax_enable_x64", True)


@dataclass(frozen=True)
class Constants:
    """Means (K, n), log-weights (K,) and Cholesky root of the prior, matrix, gain, sky or background, read noise (0: none)."""

    means: np.ndarray
    log_weights: np.ndarray
    root: np.ndarray
    matrix: np.ndarray
    gain: float
    sky: float
    read: float
    floor: float


def constants(problem: Problem) -> Constants:
    """The numbers of a problem, read from its objects."""
    prior, noise = problem.prior, problem.noise
    photon, mixture = isinstance(noise, PoissonGaussian), isinstance(prior, MixturePrior)
    covariance = (prior.eigenvectors * prior.eigenvalues) @ prior.eigenvectors.mT
    return Constants(
        (prior.means if mixture else prior.mean).flatten(1).numpy(),
        prior.weights.log().numpy() if mixture else np.zeros(1),
        torch.linalg.cholesky(covariance).numpy(),
        blur().mix[0].numpy(),
        float(noise.gain),
        float(noise.sky if photon else noise.background),
        float(noise.read_noise) if photon else 0.0,
        noise.floor,
    )


def log_prior(c: Constants, x: jax.Array) -> jax.Array:
    """log p(x): (N, n) → (N,)."""
    z = jsp.linalg.solve_triangular(c.root, (x[:, None] - c.means).reshape(-1, x.shape[-1]).T, lower=True).T
    size = (z.reshape(len(x), -1, x.shape[-1]) ** 2 + math.log(2 * math.pi)).sum(-1)
    return logsumexp(c.log_weights - size / 2, -1) - np.log(np.diag(c.root)).sum()


def log_likelihood(c: Constants, x: jax.Array, y: jax.Array) -> jax.Array:
    """log p(y | x) summed over the last axis: (…, n), (…, n) → (…)."""
    raw, electrons = c.gain * (x @ c.matrix.T + c.sky), c.gain * (y + c.sky)
    rate = jnp.maximum(raw, c.floor)
    if c.read == 0:
        terms = electrons * jnp.log(rate) - rate - gammaln(electrons + 1)
        return (terms + (raw - rate) * (electrons / rate - 1)).sum(-1)
    half = math.ceil(12 * c.read + 10 * c.read**2)
    k = jnp.maximum(jnp.floor(electrons)[..., None] - half, 0) + jnp.arange(2 * half + 2)
    poisson = k * jnp.log(rate[..., None]) - rate[..., None] - gammaln(k + 1)
    series = poisson - ((electrons[..., None] - k) / c.read) ** 2 / 2 - math.log(c.read) - math.log(2 * math.pi) / 2
    total = logsumexp(series, -1)
    count = (jnp.exp(series - total[..., None]) * k).sum(-1)
    return (total + (raw - rate) * (count / rate - 1) + math.log(c.gain)).sum(-1)


def agreement(problem: Problem, data: Observation, rng: Rng) -> float:
    """Largest |difference| of log p(x) and of log p(y | x) between this file and diffinv, over max(1, size), at random images.

    The images are the prior's draws plus white noise of 0.5, so that some rates are negative.
    """
    c, like = constants(problem), torch.zeros(len(rng), *data.image_shape, dtype=torch.float64)
    x = problem.prior.sample(like, rng) + 0.5 * rng.normal(like)
    flat, y = jnp.asarray(x.flatten(1).numpy()), jnp.asarray(data.y.flatten(1).numpy())
    ours = torch.stack([problem.prior.log_prob(x, torch.zeros(len(rng), dtype=torch.float64)), data.log_prob(x)]).numpy()
    theirs = np.stack([log_prior(c, flat), log_likelihood(c, flat, y)])
    return float((np.abs(ours - theirs) / np.maximum(1, np.abs(ours))).max())


@dataclass(frozen=True)
class Truth:
    """mean, std: (N, n) of N data sets. rhat: the largest. error: of the worst mean, in posterior σ, from the ESS."""

    mean: Tensor
    std: Tensor
    rhat: float
    error: float


def nuts(problem: Problem, data: Observation, *, chains: int = 4, samples: int = 2500, warmup: int = 1000) -> Truth:
    """Mean and std of p(x | y) of every row of the data; the rows are independent and share a chain's state."""
    c, y = constants(problem), data.y.flatten(1).numpy()

    def model() -> None:
        z = numpyro.sample("z", ImproperUniform(real_matrix, (), y.shape))
        x = numpyro.deterministic("x", z @ c.root.T)
        numpyro.factor("density", (log_prior(c, x) + log_likelihood(c, x, y)).sum())

    kernel = NUTS(model)
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=samples, num_chains=chains, chain_method="vectorized", progress_bar=False)
    start = np.linalg.solve(c.root, (0.3 + np.maximum(y, 0)).T).T
    mcmc.run(jax.random.PRNGKey(0), init_params={"z": jnp.broadcast_to(start, (chains, *y.shape))})
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])
    rhat, size = split_gelman_rubin(draws), effective_sample_size(draws)
    return Truth(torch.tensor(draws.mean((0, 1))), torch.tensor(draws.std((0, 1))), float(rhat.max()), float(size.min()) ** -0.5)
