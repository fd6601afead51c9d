"""Mixtures in which a pixel's total is free and the ratios of its components are parameters, with maps of their own.

    A_c = A f_c,   f = softmax(0, ρ_2, …, ρ_C),   ρ_c = log(A_c/A_1).

Spectra that look alike leave the amplitudes of one pixel undetermined: what is free to be anything in every pixel widens, and
bends, all else. How bright a remnant is changes from pixel to pixel; what it is made of changes as its other parameters do. With
components that are normalised to 1, A is the number of counts and knows nothing of the ratios.
Invariant: amplitudes are positive, whatever ρ; parameters of the components come first, as in the mixture within.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.spectral.base import Grid, Parameter, SpectralModel
from diffinv.unmixing.mixture import Component, Mixture, SpectralData
from diffinv.unmixing.pipeline import Unmixed, UnmixingPlan, pool_factor, pooled_start, unmix_from
from diffinv.unmixing.pixels import PixelPlan, pool_index, quadratic
from diffinv.unmixing.posterior_maps import Posterior, flags

RATIOS = (0.01, 100.0)  # the box of A_c/A_1, on a logarithmic axis


@dataclass(frozen=True, eq=False)
class Blend(SpectralModel):
    """Σ f_c S_c as one spectrum. Parameters: those of the mixture within, then "component.ratio" of each but the first."""

    within: Mixture

    @property
    def grid(self) -> Grid:
        return self.within.components[0].model.grid

    @property
    def log(self) -> tuple[str, ...]:
        """Parameters on a logarithmic axis."""
        return (*self.within.coordinates.log, *(p.name for p in self._ratios))

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (*self.within.coordinates.parameters, *self._ratios)

    @property
    def _ratios(self) -> tuple[Parameter, ...]:
        return tuple(Parameter(f"{c.name}.ratio", "", *RATIOS) for c in self.within.components[1:])

    def evaluate(self, theta: Tensor) -> Tensor:
        own, ratios = theta.split([len(self.within.names), len(self.within.components) - 1], 1)
        spectra = torch.stack(self.within.shapes(self.within.coordinates.unit(own)), 1)
        parts = torch.cat([torch.ones_like(ratios[:, :1]), ratios], 1)
        return (parts[:, None] @ spectra)[:, 0] / parts.sum(1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Shares(Mixture):
    """A mixture of one component, the blend of others: amplitude (N, 1), u (N, P + C − 1). Made by `of`."""

    @classmethod
    def of(cls, mixture: Mixture) -> Shares:
        """Raises: DiffinvError if there are fewer than two components."""
        if len(mixture.components) < 2:
            raise DiffinvError("shares: one component has no ratio to another; leave them out.")
        blend = Blend(mixture)
        return cls((Component("blend", blend, blend.log),))

    @property
    def within(self) -> Mixture:
        """The mixture whose amplitudes are free."""
        return self.components[0].model.within

    def fractions(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """f (N, C), Σ f = 1, and ∂f/∂u (N, C, P + C − 1)."""
        own = len(self.within.names)
        low, high = torch.tensor(RATIOS, dtype=u.dtype, device=u.device).log()
        rho = torch.cat([torch.zeros_like(u[:, :1]), low + (high - low) * u[:, own:]], 1)
        f = torch.softmax(rho, 1)
        bend = torch.diag_embed(f) - f[:, :, None] * f[:, None]
        return f, torch.cat([u.new_zeros(len(u), f.shape[1], own), (high - low) * bend[:, :, 1:]], 2)

    def linearise(self, amplitude: Tensor, u: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
        """As of `Mixture`, by the chain rule: the blend costs no more than its components."""
        self._check(u)
        f, bend = self.fractions(u)
        own = len(self.within.names)
        mean, slopes = self.within.linearise(amplitude * f, u[:, :own], background)
        spectra, rest = slopes.split([f.shape[1], own], 2)
        total = amplitude[:, :, None] * (spectra @ bend)
        return mean, torch.cat([spectra @ f[..., None], total[..., :own] + rest, total[..., own:]], 2)

    def start(self, data: SpectralData, shape: tuple[int, int], factor: int, plan: PixelPlan) -> tuple[Tensor, Tensor]:
        """Amplitude (N, 1) and u of each pixel, from blocks of factor × factor whose amplitudes are free: see `pooled_start`."""
        amplitude, u = pooled_start(self.within, data, shape, factor, plan)
        index = pool_index(shape, factor)
        blocks = torch.zeros_like(amplitude[: int(index.max()) + 1]).index_add(0, index, amplitude)[index]
        low, high = (math.log(end) for end in RATIOS)
        rho = (blocks[:, 1:].clamp_min(1e-300) / blocks[:, :1].clamp_min(1e-300)).log().clamp(low, high)
        return amplitude.sum(1, keepdim=True), torch.cat([u, (rho - low) / (high - low)], 1)

    def unblended(self, data: SpectralData, found: Posterior) -> Posterior:
        """The posterior of the mixture within: its parameters and the amplitudes of its components."""
        own = len(self.within.names)
        mean, std = self.amplitudes(data, found)
        return Posterior(found.u[:, :own], found.covariance[:, :own, :own], mean, std, found.field, found.moved)

    def amplitudes(self, data: SpectralData, found: Posterior) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of A_c (N, C), to first order about the posterior's mean."""
        step = quadratic(self, data, found.amplitude, found.inside)
        f, bend = self.fractions(found.inside)
        gradient = found.amplitude[:, :, None] * bend - f[..., None] * step.slope
        variance = ((gradient @ found.covariance) * gradient).sum(2) + f**2 * step.covariance[:, 0]
        return found.amplitude * f, variance.clamp_min(0).sqrt()


def unmix_shares(mixture: Mixture, data: SpectralData, shape: tuple[int, int], plan: UnmixingPlan) -> Unmixed:
    """As `unmix`, with maps of the ratios: the posterior is of `mixture`; the sparse map and the field are of the blend.

    Arguments: mixture: of components that are normalised to 1.
    Raises: DiffinvError if there are fewer than two components.
    """
    model = Shares.of(mixture)
    found = unmix_from(model, data, shape, model.start(data, shape, pool_factor(data), plan.pixels), plan)
    posterior = model.unblended(data, found.posterior)
    return replace(found, posterior=posterior, flags=flags(posterior, found.flags, found.misfit))
