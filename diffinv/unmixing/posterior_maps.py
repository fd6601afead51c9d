"""From a smooth map to posterior maps: mean, standard deviation and quantiles of each parameter and amplitude, and a check.

A pixel's parameters are Gaussian in u (see `fields`); moments of what is monotone in u are taken by Gauss–Hermite quadrature
and quantiles by the transform itself. Amplitudes follow u linearly: A | u ~ N(A(u), C), see `pixels.Quadratic`. Data are taken to
second order within the box of the models, at its nearest point where the mean has left it, and so are the fitted spectra.
The posterior predictive check compares the likelihood of the data with that of data drawn at parameters drawn from the posterior.
Data without photons say nothing of the parameters there: what is returned is what their surroundings say.
Invariant: nothing is clipped; a parameter whose mean lies outside its box keeps its value and gets the flag EXTRAPOLATED.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.noise.poisson import Poisson
from diffinv.unmixing.field_fit import fit_field
from diffinv.unmixing.fields import (
    Field,
    FieldPlan,
    FieldPosterior,
    PseudoData,
    Sites,
    brightness,
    field_posterior,
    filled,
    roughness,
)
from diffinv.unmixing.maps import ParameterMap
from diffinv.unmixing.mixture import Coordinates, Mixture, SpectralData
from diffinv.unmixing.pixels import CHI2_BAD, EXTRAPOLATED, FAINT, NODATA, UNCONVERGED, Quadratic, quadratic

_FULL = 2  # rounds whose step is taken whole; later ones go half the way, so that none swings to and fro
_STILL = 0.5  # σ, a step in the last round that is still called convergence
_NEXT_TO_NONE = 1e-3  # of one count
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(15)


@dataclass(frozen=True, eq=False)
class Posterior:
    """The posterior of all pixels.

    u: (N, P) and its covariance (N, P, P). amplitude: mean (N, C) and std (N, C). field: the most probable one of the maps.
    moved: (N,) the largest step of a parameter in the last round, in its σ.
    """

    u: Tensor
    covariance: Tensor
    amplitude: Tensor
    amplitude_std: Tensor
    field: Field
    moved: Tensor

    @property
    def inside(self) -> Tensor:
        """u, or where it has left the box the nearest point of it: (N, P)."""
        return self.u.clamp(0, 1)

    @property
    def std(self) -> Tensor:
        """Of u, (N, P)."""
        return self.covariance.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()


def posterior(
    mixture: Mixture,
    data: SpectralData,
    shape: tuple[int, int],
    start: ParameterMap,
    plan: FieldPlan = FieldPlan(),
    *,
    rounds: int = 6,
) -> Posterior:
    """The Gaussian-field posterior about a smooth map.

    Arguments: rounds: of linearisation; the first about `start`, the second about the posterior mean of the first, later ones
        half way from the point before to the mean that it gave. Rounds are of the most probable field, the answer of all that
        the data leave likely.
    """
    amplitude, u, about = start.amplitude, start.u, start.u
    fitted, least = None, least_amplitude(mixture, data, start.u)
    known = data.good.any(1)
    rough = filled(roughness(start.u, shape), known & ~is_faint(amplitude, least), shape)
    sites = Sites.of(shape, rough, brightness(start.amplitude, known, shape))
    for number in range(rounds):
        held, before = torch.maximum(amplitude, least), u
        about = (u if number < _FULL else (u + about) / 2).clamp(0, 1)
        step = expanded(mixture, data, held, about, is_faint(amplitude, least))
        pseudo = PseudoData.of(about, step.score, step.fisher, sites, shape)
        fitted = fit_field(pseudo, plan) if fitted is None else fitted
        found = field_posterior(pseudo, fitted.best, plan)
        amplitude, u = _amplitudes(step, found, held, about)[0], found.mean
    found = fitted.posterior(pseudo, plan)
    mean, std = _amplitudes(step, found, held, about)
    width = found.covariance.diagonal(dim1=1, dim2=2).clamp_min(1e-300).sqrt()
    return Posterior(found.mean, found.covariance, mean, std, fitted.best, ((u - before).abs() / width).amax(1))


def least_amplitude(mixture: Mixture, data: SpectralData, u: Tensor) -> Tensor:
    """Amplitudes at which data are taken to second order at least, (N, C): 0, or for photons, where there are data, one count
    together.

    About less, a Gaussian in A is no picture of what few or no counts say; about one count without any, it is 0 ± 1.
    """
    if not isinstance(data.noise, Poisson):
        return u.new_zeros(len(u), len(mixture.components))
    parts = zip(u.clamp(0, 1).split(8192), data.good.to(u.dtype).split(8192), strict=True)
    seen = torch.cat([(torch.stack(mixture.shapes(some), 1) * good[:, None]).sum(2) for some, good in parts])
    return torch.where(seen > 0, 1 / (seen.shape[1] * seen.clamp_min(1e-300)), 0.0)


def is_faint(amplitude: Tensor, least: Tensor) -> Tensor:
    """Where all components together have less than one count, (N,); nowhere if `least` is 0."""
    return (least > 0).all(1) & (amplitude.clamp_min(0) / least.clamp_min(1e-300)).mean(1).lt(1)


def expanded(mixture: Mixture, data: SpectralData, amplitude: Tensor, u: Tensor, faint: Tensor) -> Quadratic:
    """The expansion about a map; of u, where it is faint, at the amplitude that the data have there, which may be next to none.

    Fisher information about u is that of so many counts. Pixels without any say nothing of u, and a few hundred of them must
    not say as much as a few hundred counts.
    """
    step = quadratic(mixture, data, amplitude, u)
    rows = faint.nonzero()[:, 0]
    if not len(rows):
        return step
    own = torch.maximum(amplitude + step.step, _NEXT_TO_NONE * amplitude)[rows]
    few = quadratic(mixture, data.select(rows), own, u[rows])
    score, fisher = step.score.index_copy(0, rows, few.score), step.fisher.index_copy(0, rows, few.fisher)
    return replace(step, score=score, fisher=fisher)


def _amplitudes(step: Quadratic, found: FieldPosterior, amplitude: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    mean = amplitude + step.step - (step.slope @ (found.mean - u)[..., None])[..., 0]
    covariance = step.covariance + step.slope @ found.covariance @ step.slope.mT
    return mean, covariance.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()


def physical_moments(coordinates: Coordinates, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of θ for u ~ N(mean, std²), both (N, P)."""
    nodes, weights = torch.tensor(_NODES).to(mean), torch.tensor(_WEIGHTS / _WEIGHTS.sum()).to(mean)
    theta = coordinates.physical(mean + nodes[:, None, None] * std)
    centre = (weights[:, None, None] * theta).sum(0)
    return centre, (weights[:, None, None] * (theta - centre) ** 2).sum(0).sqrt()


def physical_quantile(coordinates: Coordinates, mean: Tensor, std: Tensor, level: float) -> Tensor:
    """Quantile of θ, (N, P)."""
    return coordinates.physical(mean + NormalDist().inv_cdf(level) * std)


def given_flags(mixture: Mixture, data: SpectralData, found: Posterior) -> Tensor:
    """(N,) bits of what data there are: NODATA without a good one, FAINT with less than one count."""
    faint = is_faint(found.amplitude, least_amplitude(mixture, data, found.u))
    return torch.where(data.good.any(1), torch.where(faint, FAINT, 0), NODATA)


def flags(found: Posterior, given: Tensor, misfit: Tensor) -> Tensor:
    """(N,) bits: NODATA and FAINT as `given`, EXTRAPOLATED where the mean has left the box, UNCONVERGED where the last round
    moved it by more than σ/2, CHI2_BAD where the check finds |z| > 5."""
    outside = (found.u != found.inside).any(1)
    bits = (given & (NODATA | FAINT)) | torch.where(outside, EXTRAPOLATED, 0) | torch.where(found.moved > _STILL, UNCONVERGED, 0)
    return bits | torch.where(misfit.abs() > 5, CHI2_BAD, 0)


def predictive_check(mixture: Mixture, data: SpectralData, found: Posterior, rng: Rng, *, draws: int = 32) -> Tensor:
    """(T(y) − ⟨T(y_rep)⟩)/std T(y_rep), (N,), T(y) = −2 Σ_good log p(y | μ) at parameters drawn with y_rep: χ² but for a constant
    where noise is Gaussian, and without the long tail of (y − μ)²/μ where a channel has far less than one count.

    Arguments: rng: one stream a pixel.
    """
    least = least_amplitude(mixture, data, found.u)
    step = quadratic(mixture, data, torch.maximum(found.amplitude, least), found.inside)
    root, own = _root(found.covariance), _root(step.covariance)
    real, replicas = 0.0, []
    for _ in range(draws):
        u = (found.u + (root @ rng.normal(found.u)[..., None])[..., 0]).clamp(0, 1)
        amplitude = found.amplitude - (step.slope @ (u - found.inside)[..., None])[..., 0]
        amplitude = torch.maximum(amplitude + (own @ rng.normal(amplitude)[..., None])[..., 0], least)
        mean = mixture.mean(amplitude, u, data.background)
        real = real - 2 * data.noise.log_prob(data.y, mean) / draws
        replicas.append(-2 * data.noise.log_prob(data.noise.sample(mean, rng), mean))
    expected = torch.stack(replicas)
    return (real - expected.mean(0)) / expected.std(0).clamp_min(1e-12)


def _root(covariance: Tensor) -> Tensor:
    """A Cholesky factor of (N, D, D), also where rounding has made it singular."""
    trace = covariance.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    return torch.linalg.cholesky(covariance + 1e-10 * trace.clamp_min(1e-300) * torch.eye(covariance.shape[1]).to(covariance))
