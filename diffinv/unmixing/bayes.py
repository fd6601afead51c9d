"""Audit of posterior maps by Markov chains: NUTS on single pixels, with the emulators written a second time, in JAX.

A pixel's posterior in a map is its likelihood times what the rest of the map says about it (the cavity), both Gaussian in the
approximation that is reported. Here the cavity is kept and the likelihood is exact,

    p(u, A | y) ∝ p(y | Σ A_c S_c(u)) N(u; m₋, V₋),   V₋⁻¹ = V⁻¹ − F,   V₋⁻¹ m₋ = V⁻¹ m − (F u₀ + s),

so that what differs between the two is the linearisation. Amplitudes have a flat prior in log A. The decoder's weights are those
of the torch network; both agree to rounding.
The only file that imports jax and numpyro. Invariant: work is in float64 (the decoder's last layer has large weights of both
signs), and no global state of jax is changed for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange
from numpyro.diagnostics import split_gelman_rubin
from numpyro.infer import MCMC, NUTS
from torch import Tensor

from diffinv.core.checks import UnsupportedError
from diffinv.noise.poisson import Poisson
from diffinv.unmixing.emulator import Emulator, EmulatorNetwork, ResidualLayers
from diffinv.unmixing.mixture import Mixture, SpectralData

Spectrum = Callable[[jax.Array], jax.Array]


def _array(t: Tensor) -> jax.Array:
    return jnp.asarray(t.detach().numpy())


def _layers(layers: ResidualLayers) -> Callable[[jax.Array], jax.Array]:
    linear = lambda module: (_array(module.weight.mT), _array(module.bias))
    first, last = linear(layers.first), linear(layers.last)
    blocks = [(linear(up), linear(down)) for up, down in zip(layers.up, layers.down, strict=True)]

    def forward(x: jax.Array) -> jax.Array:
        h = x @ first[0] + first[1]
        for up, down in blocks:
            h = h + jax.nn.silu(h @ up[0] + up[1]) @ down[0] + down[1]
        return h @ last[0] + last[1]

    return forward


def jax_spectrum(network: EmulatorNetwork) -> Spectrum:
    """S(u) of an emulator's network, (N, P) → (N, K)."""
    decoder, latents = _layers(network.decoder), _array(network.encoder(network.anchors))
    corners = _array(network.corners.double()) > 0.5
    centre, scale, basis, spread = (_array(getattr(network, name)) for name in ("centre", "scale", "basis", "spread"))

    def spectrum(u: jax.Array) -> jax.Array:
        weights = jnp.where(corners, u[:, None], 1 - u[:, None]).prod(-1)
        components = decoder(weights @ latents)
        return jax.nn.softmax(centre + scale * ((components * spread) @ basis.T), -1)

    return spectrum


def decode(network: EmulatorNetwork, u: Tensor) -> Tensor:
    """S(u) by JAX, (N, P) → (N, K), for comparison with `network.spectrum`."""
    with jax.enable_x64(True):
        return torch.from_numpy(np.array(jax_spectrum(network)(_array(u))))


@dataclass(frozen=True)
class Cavity:
    """What the rest of a map says about pixels: mean (N, P) and covariance (N, P, P) in u."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor, about: Tensor, score: Tensor, fisher: Tensor) -> Cavity:
        """The posterior (mean, covariance) less the likelihood that was taken to second order about `about`."""
        precision = torch.linalg.inv(covariance)
        rest = torch.linalg.inv(precision - fisher)
        shift = (precision @ mean[..., None]) - (fisher @ about[..., None] + score[..., None])
        return cls((rest @ shift)[..., 0], (rest + rest.mT) / 2)


@dataclass(frozen=True)
class Audit:
    """Of each pixel: mean and std of u by NUTS, (N, P). rhat: the worst split R̂ of u."""

    mean: Tensor
    std: Tensor
    rhat: float


def audit(
    mixture: Mixture,
    data: SpectralData,
    start: tuple[Tensor, Tensor],
    cavity: Cavity,
    *,
    samples: int,
    warmup: int,
    chains: int = 2,
    seed: int = 0,
) -> Audit:
    """NUTS on a few pixels at once. Arguments: data: N spectra of counts. start: amplitude (N, C) and u (N, P).

    Raises: UnsupportedError unless every component is an emulator and the noise is Poisson.
    """
    if not isinstance(data.noise, Poisson) or not all(isinstance(c.model, Emulator) for c in mixture.components):
        raise UnsupportedError("audit: it is written for counts and for emulators; train emulators of the components first.")
    with jax.enable_x64(True):
        return _run(mixture, data, start, cavity, (warmup, samples, chains, seed))


def _run(
    mixture: Mixture, data: SpectralData, start: tuple[Tensor, Tensor], cavity: Cavity, lengths: tuple[int, int, int, int]
) -> Audit:
    warmup, samples, chains, seed = lengths
    spectra = [jax_spectrum(c.model.network) for c in mixture.components]
    y, good, background = _array(torch.where(data.good, data.y, 0.0)), _array(data.good), _array(data.background)
    centre, root = _array(cavity.mean), _array(torch.linalg.cholesky(cavity.covariance))
    log_start = jnp.log(_array(start[0].clamp_min(1e-3)))

    def potential(z: dict[str, jax.Array]) -> jax.Array:
        u = centre + (root @ z["w"][..., None])[..., 0]
        amplitude = jnp.exp(log_start + 0.1 * z["a"])
        parts = [a[:, None] * s(u[:, list(c)]) for a, s, c in zip(amplitude.T, spectra, mixture.columns, strict=True)]
        mean = background + sum(parts)
        return jnp.where(good, mean - y * jnp.log(mean), 0.0).sum() + 0.5 * (z["w"] ** 2).sum()

    away = jnp.linalg.solve(root, (_array(start[1]) - centre)[..., None])[..., 0]
    first = {"w": away, "a": jnp.zeros_like(log_start)}
    kernel = NUTS(potential_fn=potential)
    chain = MCMC(kernel, num_warmup=warmup, num_samples=samples, num_chains=chains, chain_method="vectorized", progress_bar=False)
    repeated = {name: jnp.broadcast_to(v, (chains, *v.shape)) if chains > 1 else v for name, v in first.items()}
    chain.run(jax.random.PRNGKey(seed), init_params=repeated)
    w = np.asarray(chain.get_samples(group_by_chain=True)["w"])
    u = np.asarray(centre) + np.einsum("npq,csnq->csnp", np.asarray(root), w)
    flat = torch.from_numpy(rearrange(u, "c s n p -> (c s) n p").astype(np.float64))
    return Audit(flat.mean(0), flat.std(0), float(np.max(split_gelman_rubin(u))))
