"""Operators and noise in the Fourier basis of the image: eigenvalues, and the data as coefficients with a variance each.

Exact for the torus and for k-space; a blur on an empty sky is taken for one on the torus.
Invariant: coefficients are those of real images, c(−k) = c(k)*.
"""

from __future__ import annotations

import math
from functools import singledispatch

import torch
from einops import reduce
from torch import Tensor

from diffinv.core.checks import UnsupportedError
from diffinv.likelihood import Observation
from diffinv.noise.base import Noise
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.independent import over
from diffinv.operators.algebra import Compose, Identity, Scaled
from diffinv.operators.base import Operator
from diffinv.operators.convolution import Convolution, PeriodicConvolution
from diffinv.operators.fourier import MaskedFourier
from diffinv.reconstructors.observed import clean_data


@singledispatch
def transfer_of(operator: Operator) -> Tensor:
    """Eigenvalues on the Fourier plane of fft2: (1|B, 1|C, H, W), complex128.

    Raises: UnsupportedError for an operator that is no convolution.
    """
    raise UnsupportedError(
        f"spectrum: {type(operator).__name__} is not diagonal in the DFT; use low_rank_em for masks, or start the expectation "
        "maximisation from a prior of your own."
    )


@transfer_of.register
def _(operator: Identity) -> Tensor:
    return torch.ones(1, 1, *operator.in_shape[-2:], dtype=torch.complex128)


@transfer_of.register
def _(operator: PeriodicConvolution) -> Tensor:
    return torch.view_as_complex(operator.spectrum.double())


@transfer_of.register
def _(operator: Convolution) -> Tensor:
    return _on_torus(operator.kernel.double(), operator.size)


@transfer_of.register
def _(operator: Scaled) -> Tensor:
    return operator.scale.double().reshape(-1, 1, 1, 1) * transfer_of(operator.base)


@transfer_of.register
def _(operator: Compose) -> Tensor:
    found = transfer_of(operator.operators[0])
    for part in operator.operators[1:]:
        found = found * transfer_of(part)
    return found


def _on_torus(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """fft2 of a centred kernel, folded where it is larger than the torus."""
    rows, columns = kernel.shape[-2:]
    tiles = [math.ceil(k / n) for k, n in zip((rows, columns), size, strict=True)]
    canvas = kernel.new_zeros(*kernel.shape[:-2], tiles[0] * size[0], tiles[1] * size[1])
    canvas[..., :rows, :columns] = kernel
    canvas = canvas.roll((-(rows // 2), -(columns // 2)), (-2, -1))
    folded = reduce(canvas, "... (tr r) (tc c) -> ... r c", "sum", r=size[0], c=size[1])
    return torch.fft.fft2(folded)


@singledispatch
def noise_spectrum(noise: Noise, shape: tuple[int, ...]) -> Tensor:
    """Variance a coefficient of the orthonormal fft2 of data (C, H, W): (1|B, 1|C, 1|H, 1|W), float64; ∞ for a channel of a row
    that is masked altogether.

    Raises: UnsupportedError for noise that is not stationary Gaussian, and for masks of some of a channel's pixels.
    """
    raise UnsupportedError(f"spectrum: {type(noise).__name__} is not stationary Gaussian noise; give Gaussian noise.")


@noise_spectrum.register
def _(noise: Gaussian, shape: tuple[int, ...]) -> Tensor:
    std = over(noise.std, torch.empty(1, *shape, dtype=torch.float64))
    std = std if noise.mask is None else torch.where(noise.mask, std, torch.inf)
    if not bool((std == std[..., :1, :1]).all()):
        raise UnsupportedError("spectrum: the noise differs between pixels, or some are masked; use low_rank_em.")
    return std[..., :1, :1] ** 2


@noise_spectrum.register
def _(noise: CorrelatedGaussian, shape: tuple[int, ...]) -> Tensor:
    if tuple(noise.spectrum.shape[-2:]) != tuple(shape[-2:]):
        raise UnsupportedError("spectrum: the correlated noise is not periodic; estimate its spectrum on the data's own grid.")
    flat = noise_spectrum(Gaussian(noise.std, noise.mask), shape)
    return flat * noise.spectrum.double()


_SEEN = 1e-6  # of the largest eigenvalue: below, a frequency counts as unseen


def coefficients(owner: str, data: Observation) -> tuple[Tensor, Tensor]:
    """ȳ = ŷ/ĥ, 0 where unseen, and its variance v, ∞ there: (B, C, H, W), complex128 and float64.

    v is E|ȳ − x̂|² for the orthonormal fft2: σ² for white noise of σ on the image.
    Raises: UnsupportedError for other operators than convolutions and `MaskedFourier`, and noise that is not stationary.
    """
    if isinstance(data.operator, MaskedFourier):
        return _k_space(owner, data)
    flat = noise_spectrum(data.noise, tuple(data.y.shape[1:])).to(data.y.device)
    y = torch.fft.fft2(clean_data(data).double(), norm="ortho")
    h = transfer_of(data.operator).to(y.device).expand(y.shape)
    seen = (h.abs() > _SEEN * h.abs().amax((-2, -1), keepdim=True)) & flat.isfinite()
    safe = torch.where(seen, h, torch.ones_like(h))
    variance = flat / safe.abs() ** 2
    return torch.where(seen, y / safe, torch.zeros_like(y)), torch.where(seen, variance, torch.inf)


def _k_space(owner: str, data: Observation) -> tuple[Tensor, Tensor]:
    """Each frequency with its mirror image, which is the same number of a real image measured again.

    Real and imaginary part have the variance σ² each; a frequency that is its own mirror image has no imaginary part.
    """
    noise = data.noise
    if not isinstance(noise, Gaussian) or noise.std[0].numel() != 1:
        raise UnsupportedError(f"{owner}: k-space data want white Gaussian noise, one σ a row.")
    y = torch.view_as_complex(data.y.double().contiguous())
    seen = data.operator.mask[:, None].expand(y.shape)
    mirror = lambda v: v.flip(-2, -1).roll((1, 1), (-2, -1))
    kept = torch.where(seen, y, torch.zeros_like(y))
    count = seen.double() + mirror(seen).double()
    variance = 2 * over(noise.std, y.real).double() ** 2 / count  # of count measurements of variance 2 σ²
    itself = torch.zeros(y.shape[-2:], dtype=torch.bool, device=y.device)
    rows = [n for n in (0, y.shape[-2] / 2) if n == int(n)]
    columns = [n for n in (0, y.shape[-1] / 2) if n == int(n)]
    for row in rows:
        for column in columns:
            itself[int(row), int(column)] = True
    single = over(noise.std, y.real).double() ** 2
    mean = (kept + mirror(kept).conj()) / count.clamp_min(1)
    return mean, torch.where(count > 0, torch.where(itself, single, variance), torch.inf).expand(y.shape)
