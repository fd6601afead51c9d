"""Continua: power law, black body and thermal bremsstrahlung, photons a bin at unit amplitude.

The power law is integrated over the bin exactly, the black body by Gauss–Legendre with three nodes, and bremsstrahlung is
its value at the middle of the bin times the width (bins of 10 eV: 1e-5 relative at 1 keV), which is part of its definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.spectral.base import Grid, Parameter, SpectralModel, check_energies

GAMMA = Parameter("Gamma", "", 1.0, 4.0)
TEMPERATURE = Parameter("kT", "keV", 0.6, 5.0)
REDSHIFT = Parameter("z", "", -0.033, 0.033)
_NODES = ((-math.sqrt(0.6), 5 / 18), (0.0, 8 / 18), (math.sqrt(0.6), 5 / 18))  # Gauss–Legendre on a bin of unit width
_BLACK_BODY = 8.0525  # as XSPEC's bbody: 1e39 erg/s at 10 kpc to 0.3 %


class _BesselK0e(torch.autograd.Function):
    """k₀(x) = eˣ K₀(x) with k₀' = k₀ − k₁, which torch does not differentiate."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.special.scaled_modified_bessel_k0(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        x, k0 = ctx.saved_tensors
        return grad * (k0 - torch.special.scaled_modified_bessel_k1(x))

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        x, k0 = ctx.saved_tensors
        return tangent * (k0 - torch.special.scaled_modified_bessel_k1(x))


def gaunt_bremsstrahlung(x: Tensor) -> Tensor:
    """Gaunt factor in Born approximation, g_B = (√3/π) e^{x/2} K₀(x/2), x = E/kT."""
    return math.sqrt(3) / math.pi * _BesselK0e.apply(x / 2)


def bremsstrahlung(grid: Grid, kT: Tensor, z: Tensor) -> Tensor:
    """3.6 kT^(−1/2) g_B(x) e^(−x)/e · ΔE (1 + z), e = E (1 + z), x = e/kT: (B, E) of kT, z (B,)."""
    kT, z = kT[:, None], z[:, None]
    e = grid.middle * (1 + z)
    x = e / kT
    return 3.6 * kT.rsqrt() * gaunt_bremsstrahlung(x) * torch.exp(-x) / e * grid.width * (1 + z)


@dataclass(frozen=True, eq=False)
class Bremsstrahlung(SpectralModel):
    """Thermal bremsstrahlung, θ = (kT, z): see `bremsstrahlung`. Amplitude 1 is 1e15 of the unit of METHODS' 3.6e-15.

    References: Radiative processes in astrophysics, Rybicki & Lightman, 1979, chapter 5.
    """

    grid: Grid

    def __post_init__(self) -> None:
        check_energies("Bremsstrahlung", self.grid)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (TEMPERATURE, REDSHIFT)

    def evaluate(self, theta: Tensor) -> Tensor:
        return bremsstrahlung(self.grid, *theta.unbind(1))


@dataclass(frozen=True, eq=False)
class PowerLaw(SpectralModel):
    """E^(−Γ), 1 photon cm⁻² s⁻¹ keV⁻¹ at 1 keV, θ = (Γ,); integrated over the bin, exact at Γ = 1 too.

    ∫ E^(−Γ) dE = lo^t L · (e^{tL} − 1)/(tL),  t = 1 − Γ,  L = ln(hi/lo).
    """

    grid: Grid
    photon_index: Parameter = GAMMA

    def __post_init__(self) -> None:
        check_energies("PowerLaw", self.grid)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (self.photon_index,)

    def evaluate(self, theta: Tensor) -> Tensor:
        t, log_low = 1 - theta, self.grid.low.log()
        length = self.grid.high.log() - log_low
        u = t * length
        small = u.abs() < 1e-5
        safe = torch.where(small, torch.ones_like(u), u)
        ratio = torch.where(small, 1 + u / 2 + u * u / 6, torch.expm1(safe) / safe)
        return torch.exp(t * log_low) * length * ratio


@dataclass(frozen=True, eq=False)
class BlackBody(SpectralModel):
    """8.0525 E² / (kT⁴ (e^{E/kT} − 1)) photons keV⁻¹, θ = (kT,); amplitude 1 is 1e39 erg/s at 10 kpc to 0.3 %, as XSPEC's."""

    grid: Grid
    temperature: Parameter

    def __post_init__(self) -> None:
        check_energies("BlackBody", self.grid)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (self.temperature,)

    def evaluate(self, theta: Tensor) -> Tensor:
        total = 0.0
        for node, weight in _NODES:
            energy = self.grid.middle + 0.5 * node * self.grid.width
            total = total + weight * energy**2 / torch.expm1(energy / theta)
        return _BLACK_BODY / theta**4 * total * self.grid.width
