"""Operators and noise models from their sections, as functions of some rows of a data set."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffinv.config import Section
from diffinv.core.checks import ConfigError, InputError
from diffinv.data.fits import read_images
from diffinv.noise.base import Noise
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.noise.gamma import Gamma
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.photon import PoissonGaussian
from diffinv.noise.poisson import Poisson
from diffinv.noise.unknown import UnknownLevel
from diffinv.operators.algebra import Identity
from diffinv.operators.base import LinearOperator
from diffinv.operators.border import ReflectingBorder, ZeroBorder
from diffinv.operators.convolution import Convolution
from diffinv.operators.fourier import MaskedFourier, Visibilities
from diffinv.operators.pooled import PooledConvolution
from diffinv.operators.sampling import Mask, SumPool
from diffinv.operators.tomography import Radon
from diffinv.sections import train as s
from diffinv.training.measured import Fields, check_kernels

Instrument = Callable[[Fields], LinearOperator]
NoiseModel = Callable[[Fields], Noise]


def read_stamp(path: Path) -> np.ndarray:
    """A stamp (kh, kw), or one a channel (C, kh, kw), from .npy or the first image of a FITS file. Raises InputError."""
    if path.suffix.lower() != ".npy":
        return read_images(path)[0].astype(np.float64)
    try:
        stamp = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())[:160]}); write it with numpy.save.") from error
    return np.asarray(stamp, np.float64)


@singledispatch
def instrument(section: Section) -> Instrument:
    """The operator of some rows, by its section."""
    raise ConfigError(f"operator: {type(section).__name__} has no builder.")


@instrument.register
def _(section: s.IdentityOperator) -> Instrument:
    return lambda f: Identity(f.shape)


@instrument.register
def _(section: s.MaskOperator) -> Instrument:
    return lambda f: Mask(torch.ones_like(f.y, dtype=torch.bool) if f.good is None else f.good)


@instrument.register
def _(section: s.ConvolutionOperator) -> Instrument:
    border = ZeroBorder() if section.border == "zero" else ReflectingBorder()
    given: Tensor | None = None
    if section.psf is not None:
        stamp = read_stamp(section.psf)
        check_kernels(str(section.psf), stamp)
        given = torch.from_numpy(stamp.astype(np.float32))[(None,) * (4 - stamp.ndim)]

    def blur(f: Fields) -> LinearOperator:
        kernel = f.psf if given is None else given
        channels, size = f.shape[0], tuple(section.factor * n for n in f.shape[-2:])
        if section.factor == 1:
            return Convolution(kernel, channels, size, border)
        return PooledConvolution(kernel, channels, size, border, section.factor)

    return blur


@instrument.register
def _(section: s.SumPoolOperator) -> Instrument:
    return lambda f: SumPool((f.shape[0], *(section.factor * n for n in f.shape[-2:])), section.factor)


@instrument.register
def _(section: s.FourierOperator) -> Instrument:
    return lambda f: MaskedFourier(f.mask[:, 0, :, :, 0], f.shape[0])


@instrument.register
def _(section: s.VisibilitiesOperator) -> Instrument:
    return lambda f: Visibilities(f.uv, section.size, f.shape[0], section.step)


@instrument.register
def _(section: s.RadonOperator) -> Instrument:
    angles = torch.tensor([section.angles])
    return lambda f: Radon(angles, (f.shape[0], *section.size), f.shape[-1])


@singledispatch
def noise_model(section: Section) -> NoiseModel:
    """The noise of some rows, by its section."""
    raise ConfigError(f"noise: {type(section).__name__} has no builder.")


def white(std: Tensor) -> NoiseModel:
    """One σ, or one a channel."""
    std = std.float()

    def model(f: Fields) -> Noise:
        if len(std) not in (1, f.shape[0]):
            raise ConfigError(f"noise.std: {len(std)} levels for data of {f.shape[0]} channels; give one, or one a channel.")
        return Gaussian(std if len(std) == 1 else std[None], f.good)

    return model


@noise_model.register
def _(section: s.GaussianNoise) -> NoiseModel:
    if section.std == "data":
        return lambda f: Gaussian(f.variance.sqrt().float(), f.good)
    return white(torch.tensor(section.std if isinstance(section.std, tuple) else [section.std]))


@noise_model.register
def _(section: s.CorrelatedNoise) -> NoiseModel:
    given = section.correlation
    lags = torch.from_numpy(read_stamp(given)) if isinstance(given, Path) else torch.tensor(given, dtype=torch.float64)
    lags = lags[(None,) * (4 - lags.ndim)]
    std = torch.tensor([section.std], dtype=torch.float64)
    known: dict[tuple[int, ...], CorrelatedGaussian] = {}

    def model(f: Fields) -> Noise:
        size = f.shape[-2:]
        if size not in known:
            known[size] = CorrelatedGaussian.from_correlation(std, lags, size, white=section.white)
        return CorrelatedGaussian(known[size].std.float(), known[size].spectrum.float(), f.good)

    return model


def _one(value: float) -> Tensor:
    return torch.tensor([value])


@noise_model.register
def _(section: s.PoissonNoise) -> NoiseModel:
    return lambda f: Poisson(_one(section.gain), _one(section.background), f.good)


@noise_model.register
def _(section: s.PoissonGaussianNoise) -> NoiseModel:
    return lambda f: PoissonGaussian(_one(section.gain), _one(section.read_noise), _one(section.background), f.good)


@noise_model.register
def _(section: s.GammaNoise) -> NoiseModel:
    return lambda f: Gamma(_one(section.looks), _one(section.floor), f.good)


@noise_model.register
def _(section: s.UnknownNoise) -> NoiseModel:
    return lambda f: UnknownLevel(f.good)
