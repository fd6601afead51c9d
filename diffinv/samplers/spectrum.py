"""Bases in which the Fisher information of quadratic data is diagonal: F = V diag(f) Vᵀ.

In such a basis the data are one number a coefficient, ȳ = Vᵀ score(0)/f, with standard deviation 1/√f: what a singular value
decomposition of Σ_y^(-1/2) A gives (f = s²/σ_y²), in image space. Invariant: V is orthonormal, so that white noise stays white.
Decompositions are made in float64 and kept in the dtype of the images.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.batched import Batched
from diffinv.core.checks import UnsupportedError
from diffinv.core.rng import Rng
from diffinv.core.types import Image, LinearMap, Shape
from diffinv.likelihood import Likelihood

DENSE_LIMIT = 4096
CHUNK = 256
TOLERANCE = 1e-6  # of the probe's norm; the solves of correlated noise leave 1e-10


@dataclass(frozen=True, eq=False)
class Spectrum(Batched, abc.ABC):
    """The data in a basis. information: f (1|B, *basis) ≥ 0, 0 where nothing is seen. datum: ȳ (B, *basis), 0 there."""

    information: Tensor
    datum: Tensor

    @abc.abstractmethod
    def analyse(self, x: Image) -> Tensor:
        """Vᵀ x: (B, *image) → (B, *basis)."""

    @abc.abstractmethod
    def synthesise(self, u: Tensor) -> Image:
        """V u: (B, *basis) → (B, *image)."""


class Basis(abc.ABC):
    """How to find the spectrum of quadratic data."""

    @abc.abstractmethod
    def decompose(self, likelihood: Likelihood, like: Image) -> Spectrum:
        """F = V diag(f) Vᵀ and ȳ of a quadratic likelihood; `like` (B, *image) gives shape, dtype and device."""


def _observed(information: Tensor) -> Tensor:
    """f without what is rounding: 0 below n ε times the largest of its row."""
    flat = information.flatten(1)
    floor = flat.shape[1] * torch.finfo(information.dtype).eps * flat.amax(1)
    return torch.where(information > floor.reshape(-1, *[1] * (information.ndim - 1)), information, 0.0)


def _datum(score: Tensor, information: Tensor) -> Tensor:
    return torch.where(information > 0, score / torch.where(information > 0, information, 1.0), 0.0)


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Each row times its matrix: (B, n), (1|B, n, n) → (B, n). One matrix for all is one product, not B that read it anew."""
    return rows @ matrix[0] if len(matrix) == 1 else (rows[:, None] @ matrix)[:, 0]


@dataclass(frozen=True, eq=False)
class DenseSpectrum(Spectrum):
    """V as a matrix. vectors: (1|B, n, n), its columns. image_shape: of the images."""

    vectors: Tensor
    image_shape: Shape

    def analyse(self, x: Image) -> Tensor:
        return _times(x.flatten(1), self.vectors)

    def synthesise(self, u: Tensor) -> Image:
        return _times(u, self.vectors.mT).reshape(-1, *self.image_shape)


@dataclass(frozen=True)
class DenseBasis(Basis):
    """Eigenvectors of F, one dense decomposition for each different F of the batch: any quadratic likelihood, n ≤ 4096.

    Memory: n² numbers if all rows share F, n² a row otherwise. Cost: n products with F and O(n³), once.
    Raises: UnsupportedError for more than 4096 pixels.
    """

    def decompose(self, likelihood: Likelihood, like: Image) -> Spectrum:
        size = like[0].numel()
        if size > DENSE_LIMIT:
            raise UnsupportedError(
                f"DenseBasis: an image of {size} pixels needs a matrix of {size}²; at most {DENSE_LIMIT} pixels, or FourierBasis."
            )
        zero = torch.zeros_like(like, dtype=torch.float64)
        precise = likelihood.to(torch.float64)
        values, vectors = _eigen(precise, zero)
        information = _observed(values.clamp_min(0))
        score = _times(precise.score(zero).flatten(1), vectors)
        found = DenseSpectrum(information, _datum(score, information), vectors, tuple(like.shape[1:]))
        return found.to(like.dtype)


def _eigen(likelihood: Likelihood, zero: Image) -> tuple[Tensor, Tensor]:
    """Eigenvalues (1|B, n) and eigenvectors (1|B, n, n) of F; rows on which F acts alike share a decomposition."""
    probe = Rng.for_draws(0, [0], 1).normal(torch.zeros_like(zero[:1]).cpu()).to(zero.device)
    response = likelihood.fisher(zero).apply(probe.expand_as(zero)).flatten(1)
    first = [next((i for i in range(k) if torch.equal(response[i], response[k])), k) for k in range(len(response))]
    pairs = {k: torch.linalg.eigh(_matrix(likelihood.select([k]), zero[:1])) for k in sorted(set(first))}
    rows = first if len(pairs) > 1 else first[:1]
    return torch.stack([pairs[k][0] for k in rows]), torch.stack([pairs[k][1] for k in rows])


def _matrix(likelihood: Likelihood, zero: Image) -> Tensor:
    """F of one row, (n, n), symmetrised."""
    fisher, size = likelihood.fisher(zero), zero[0].numel()
    eye = torch.eye(size, dtype=zero.dtype, device=zero.device).reshape(size, *zero.shape[1:])
    matrix = torch.cat([fisher.apply(columns).flatten(1) for columns in eye.split(CHUNK)])
    return (matrix + matrix.mT) / 2


@dataclass(frozen=True, eq=False)
class FourierSpectrum(Spectrum):
    """V the orthonormal 2-D DFT of each channel; coefficients are complex, information (1|B, C, H, W) is real."""

    def analyse(self, x: Image) -> Tensor:
        return torch.fft.fft2(x, norm="ortho")

    def synthesise(self, u: Tensor) -> Image:
        return torch.fft.ifft2(u, norm="ortho").real


@dataclass(frozen=True)
class FourierBasis(Basis):
    """The DFT of each channel, where F is diagonal in it: periodic convolutions under periodic stationary noise, no mask.

    Cost: one product with F a channel, and one more to verify.
    Raises: UnsupportedError if F of any row is not diagonal in the DFT, found by a random probe.
    """

    def decompose(self, likelihood: Likelihood, like: Image) -> Spectrum:
        zero = torch.zeros_like(like, dtype=torch.float64)
        precise = likelihood.to(torch.float64)
        fisher = precise.fisher(zero).apply
        information = torch.stack([_transfer(fisher, zero, channel) for channel in range(like.shape[1])], 1)
        _check_diagonal(fisher, zero, information)
        information = _observed(information.clamp_min(0))
        datum = _datum(torch.fft.fft2(precise.score(zero), norm="ortho"), information)
        return FourierSpectrum(information.to(like.dtype), datum.to(like.dtype.to_complex()))


def _transfer(fisher: LinearMap, zero: Image, channel: int) -> Tensor:
    """The eigenvalues of one channel, the DFT of F's answer to a point: (B, H, W)."""
    point = zero.clone()
    point[:, channel, 0, 0] = 1
    return torch.fft.fft2(fisher(point)[:, channel]).real


def _check_diagonal(fisher: LinearMap, zero: Image, information: Tensor) -> None:
    probe = Rng.for_draws(0, [0], 1).normal(torch.zeros_like(zero[:1]).cpu()).to(zero.device).expand_as(zero)
    answer = fisher(probe)
    difference = answer - torch.fft.ifft2(information * torch.fft.fft2(probe)).real
    error = difference.flatten(1).norm(dim=1) / answer.flatten(1).norm(dim=1).clamp_min(torch.finfo(zero.dtype).tiny)
    if not bool((error <= TOLERANCE).all()):
        raise UnsupportedError(
            f"FourierBasis: the Fisher information is not diagonal in the DFT (off by {float(error.max()):.1e} of a random "
            "image): borders, masks or noise are not periodic, or channels mix; use DenseBasis."
        )
