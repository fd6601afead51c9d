"""The same noise for data in another unit: y → y/s.

Standard deviations, backgrounds and floors divide by s; gains, counts per unit, multiply by it; looks have no unit.
Invariant: a draw of the noise in the new unit is a draw of the old one, divided by s.
"""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch

from torch import Tensor

from diffinv.core.checks import UnsupportedError
from diffinv.core.linalg import expand
from diffinv.noise.base import Noise
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.noise.gamma import Gamma
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.photon import HeteroscedasticGaussian, PoissonGaussian
from diffinv.noise.poisson import Poisson
from diffinv.noise.unknown import UnknownLevel


@singledispatch
def in_units(noise: Noise, scale: Tensor) -> Noise:
    """The noise of y/s.

    Arguments: scale: s (1|B,) > 0, in the data's unit.
    Raises: UnsupportedError for noise of an unknown class.
    """
    raise UnsupportedError(f"in_units: {type(noise).__name__} has no rule for another unit; register one.")


def _over(field: Tensor, scale: Tensor) -> Tensor:
    return field / expand(scale.to(field), field)


@in_units.register
def _(noise: Gaussian, scale: Tensor) -> Gaussian:
    return replace(noise, std=_over(noise.std, scale))


@in_units.register
def _(noise: CorrelatedGaussian, scale: Tensor) -> CorrelatedGaussian:
    return replace(noise, std=_over(noise.std, scale))


@in_units.register
def _(noise: Poisson, scale: Tensor) -> Poisson:
    return replace(noise, gain=_over(noise.gain, 1 / scale), background=_over(noise.background, scale))


def _in_units_of_electrons(noise: PoissonGaussian | HeteroscedasticGaussian, scale: Tensor):
    return replace(noise, gain=_over(noise.gain, 1 / scale), sky=_over(noise.sky, scale))


in_units.register(PoissonGaussian, _in_units_of_electrons)
in_units.register(HeteroscedasticGaussian, _in_units_of_electrons)


@in_units.register
def _(noise: Gamma, scale: Tensor) -> Gamma:
    return replace(noise, floor=_over(noise.floor, scale))


@in_units.register
def _(noise: UnknownLevel, scale: Tensor) -> UnknownLevel:
    return noise
