"""Stationary correlated Gaussian noise: y = mean + σ ⊙ n, where n is a stamp of a stationary field on a torus.

Cov = D R T Rᵀ D with D = diag σ, T = F⁻¹ diag(spectrum) F circulant on the torus, and R the restriction of the torus to
the data's grid. A torus of the data's own size is periodic noise, and its inverse is one FFT pair. On a larger torus
(circulant embedding) the stamp is not periodic, and under a mask it has holes: then the precision is a solve,
P R T Rᵀ P u = P v by conjugate gradients preconditioned with the torus's own inverse, P the projection on good pixels.
Invariant: no approximation but the tolerance of that solve: relative residual 1e-10 for float64 data, 1e-6 for float32.

References: Dietrich & Newsam, *Fast and exact simulation of stationary Gaussian processes through circulant embedding of the
covariance matrix*, SIAM J. Sci. Comput. 18, 1997.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError, check_positive
from diffinv.core.linalg import cg, dot
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Shape
from diffinv.noise.base import Noise
from diffinv.noise.independent import check_share, good_values, over
from diffinv.operators.base import LinearOperator

DENSE_LIMIT = 4096
ITERATIONS, ROUNDS = 16, 20


@register("noise", "gaussian_correlated")
@dataclass(frozen=True, eq=False)
class CorrelatedGaussian(Noise):
    """Stationary correlated Gaussian noise, modulated by σ a pixel; channels are independent.

    Arguments:
        std: σ in the data's unit; leading axes are those of the data: (1|B,), (1|B, C) or (1|B, 1|C, 1|H, 1|W).
        spectrum: eigenvalues of the correlation on the torus, (1|B, 1|C, H', W') > 0, without unit; mean 1 makes σ the
            standard deviation of a pixel. H' = H and W' = W: periodic noise; larger: not periodic.
        mask: (1|B, C, H, W), True where a pixel is good, or None if all are.
    Raises: DiffinvError if σ in a good pixel or the spectrum is not finite and positive.
    `log_prob` is normalised if the noise is periodic and unmasked, or if a channel has at most 4096 good pixels (a dense
    Cholesky factor, kept with the object); else it lacks a constant that does not depend on the mean.
    """

    std: Tensor
    spectrum: Tensor
    mask: Tensor | None = None
    quadratic = True

    def __post_init__(self) -> None:
        check_positive("CorrelatedGaussian", "std", good_values(self.std, self.mask), "mask the pixel, or give its noise level.")
        remedy = "add a white part to the correlation: noise that vanishes at a frequency has infinite precision there."
        check_positive("CorrelatedGaussian", "spectrum", self.spectrum, remedy)
        if not torch.allclose(self.spectrum, self.spectrum.flip(-2, -1).roll((1, 1), (-2, -1)), rtol=1e-3):
            raise DiffinvError("CorrelatedGaussian: the spectrum must be even, S(k) = S(-k); average it with its mirror image.")

    @classmethod
    def from_correlation(
        cls, std: Tensor, correlation: Tensor, shape: tuple[int, int], *, white: float, mask: Tensor | None = None
    ) -> CorrelatedGaussian:
        """Noise that is not periodic, from its correlation function on a stamp of lags.

        Arguments:
            std: σ of a pixel, in the data's unit. shape: (H, W) of the data.
            correlation: (1|B, 1|C, 2K + 1, 2L + 1), centred, 1 at lag 0, even, and zero beyond the stamp.
            white: fraction of the variance that is white, 0 ≤ white < 1; > 0 where the correlation's spectrum touches 0.
        Raises: DiffinvError if the correlation is not 1 at lag 0 (to 0.1 %), not even, or not positive definite.
        """
        rows, columns = correlation.shape[-2:]
        if rows % 2 == 0 or columns % 2 == 0:
            raise ShapeError(f"CorrelatedGaussian: the correlation needs odd sides, lag 0 at the centre; got {rows}×{columns}.")
        if not 0 <= white < 1:
            raise DiffinvError(f"CorrelatedGaussian: white must lie in [0, 1), got {white}; it is a fraction of the variance.")
        _check_correlation(correlation)
        torus = torch.zeros(*correlation.shape[:-2], shape[0] + rows - 1, shape[1] + columns - 1).to(correlation)
        torus[..., :rows, :columns] = correlation
        centred = torus.roll((-(rows // 2), -(columns // 2)), (-2, -1))
        spectrum = torch.fft.fft2(centred).real
        lowest = float(spectrum.min())
        if white + (1 - white) * lowest <= 0:
            raise DiffinvError(
                f"CorrelatedGaussian: the correlation is not positive definite (its spectrum falls to {lowest:.3g}); "
                f"taper it to 0 at the edge of the stamp, or give white > {-lowest / (1 - lowest):.3g}."
            )
        return cls(std, white + (1 - white) * spectrum, mask)

    def _std(self, like: Tensor) -> Tensor:
        return good_values(over(self.std, like), self.mask)

    def _good(self, v: Tensor) -> Tensor:
        return v if self.mask is None else torch.where(self.mask, v, torch.zeros_like(v))

    def _direct(self, shape: Shape) -> bool:
        """Whether the precision is one FFT pair."""
        torus = tuple(self.spectrum.shape[-2:])
        if torus[0] < shape[-2] or torus[1] < shape[-1]:
            raise ShapeError(
                f"CorrelatedGaussian: the spectrum is {torus} but the data {tuple(shape[-2:])}; it must not be smaller."
            )
        return self.mask is None and torus == tuple(shape[-2:])

    def _filter(self, v: Tensor, power: float) -> Tensor:
        """R T^power Rᵀ v."""
        size = tuple(self.spectrum.shape[-2:])
        factor = self.spectrum.to(v.dtype) ** power
        field = torch.fft.ifft2(factor * torch.fft.fft2(v, s=size)).real
        return field[..., : v.shape[-2], : v.shape[-1]]

    def _covariance(self, v: Tensor) -> Tensor:
        """P R T Rᵀ P v: the correlation of the good pixels."""
        return self._good(self._filter(self._good(v), 1.0))

    def _precondition(self, v: Tensor) -> Tensor:
        return self._good(self._filter(self._good(v), -1.0))

    def _field(self, like: Tensor, rng: Rng) -> Tensor:
        """A draw of N(0, R T Rᵀ), the shape of `like`."""
        self._direct(like.shape)
        torus = like.new_empty(*like.shape[:-2], *self.spectrum.shape[-2:])
        return self._filter(rng.normal(torus), 0.5)[..., : like.shape[-2], : like.shape[-1]]

    def whiten(self, v: Tensor) -> Tensor:
        """(P R T Rᵀ P)⁺ v: zero off the good pixels; v (B, C, H, W) without unit.

        Raises: DiffinvError if the solve does not reach its tolerance.
        """
        v = self._good(v)
        if self._direct(v.shape):
            return self._filter(v, -1.0)
        tol = 1e-10 if v.dtype == torch.float64 else 1e-6
        return self._solve(v.double(), tol).to(v.dtype)

    def _solve(self, v: Tensor, tol: float) -> Tensor:
        """CG in rounds, each restarted from the true residual, in float64: float32 stalls where the noise is smooth."""
        scale = dot(v, v)
        solution, residual = torch.zeros_like(v), v
        for _ in range(ROUNDS):
            step = cg(self._covariance, residual, iterations=ITERATIONS, tol=tol / 10, preconditioner=self._precondition)
            solution = solution + step.solution
            residual = v - self._covariance(solution)
            if bool((dot(residual, residual) <= tol**2 * scale).all()):
                return solution
        worst = (dot(residual, residual) / scale.clamp_min(torch.finfo(scale.dtype).tiny)).max().sqrt().item()
        raise DiffinvError(
            f"CorrelatedGaussian: the solve stopped at a residual of {worst:.1e}, not {tol:.0e}; add a white part."
        )

    def sample(self, mean: Tensor, rng: Rng) -> Tensor:
        return mean + self._good(self._std(mean) * self._field(mean, rng))

    def _whitened(self, y: Tensor, mean: Tensor) -> Tensor:
        """P (y − mean)/σ."""
        readable = y if self.mask is None else torch.where(self.mask, y, mean.detach())
        return (readable - mean) / self._std(mean)

    def log_prob(self, y: Tensor, mean: Tensor) -> Tensor:
        """log p(y | mean): (B,), float64.

        With u = K⁻¹r held fixed, −rᵀK⁻¹r/2 = −uᵀr + uᵀKu/2 in value and in first derivatives (towards r and towards K
        alike), so that no gradient passes through the solve.
        """
        r = self._good(self._whitened(y, mean))
        u = self.whiten(r.detach()).detach()
        quadratic = dot(u, self._covariance(u)) / 2 - dot(u, r)
        constants = self._good((self._std(mean).log() + math.log(2 * math.pi) / 2).expand(mean.shape)).double().flatten(1).sum(1)
        return quadratic - constants - self._log_det(mean) / 2

    def score(self, y: Tensor, mean: Tensor) -> Tensor:
        return self.whiten(self._whitened(y, mean)) / self._std(mean)

    def precision(self, mean: Tensor) -> LinearOperator:
        return CorrelatedPrecision(self, tuple(mean.shape[1:]))

    def perturb(self, mean: Tensor, rng: Rng) -> Tensor:
        if self._direct(mean.shape):
            return self._filter(rng.normal(mean), -0.5) / self._std(mean)
        return self.whiten(self._field(mean, rng)) / self._std(mean)

    def variance(self, mean: Tensor) -> Tensor:
        variance = (self._std(mean) ** 2 * self.spectrum.to(mean.dtype).mean((-2, -1), keepdim=True)).expand(mean.shape)
        return variance if self.mask is None else torch.where(self.mask, variance, torch.full_like(variance, torch.inf))

    def split(
        self, y: Tensor, rng: Rng, *, share: float = 0.5
    ) -> tuple[tuple[Tensor, CorrelatedGaussian], tuple[Tensor, CorrelatedGaussian]]:
        """As `Gaussian.split`, with ω ~ N(0, Cov)."""
        check_share("CorrelatedGaussian", share)
        tau = math.sqrt((1 - share) / share)
        omega = self._std(y) * self._field(y, rng)
        first, second = (replace(self, std=self.std / math.sqrt(part)) for part in (share, 1 - share))
        return (y + tau * omega, first), (y - omega / tau, second)

    @cached_property
    def _log_dets(self) -> dict[tuple, Tensor]:
        return {}

    def _log_det(self, mean: Tensor) -> Tensor:
        """log det of the good pixels' correlation: (1|B,), float64; 0 where it is left out."""
        key = (tuple(mean.shape), mean.device)
        if self.spectrum.requires_grad or key not in self._log_dets:
            self._log_dets[key] = self._compute_log_det(mean)
        return self._log_dets[key]

    def _compute_log_det(self, mean: Tensor) -> Tensor:
        spectrum = self.spectrum.double()
        if self._direct(mean.shape):
            return spectrum.expand(-1, mean.shape[1], -1, -1).log().flatten(1).sum(1)
        mask = torch.ones_like(mean[:1], dtype=torch.bool) if self.mask is None else self.mask
        if int(mask.flatten(2).sum(2).max()) > DENSE_LIMIT:
            return spectrum.new_zeros(1)
        correlation = torch.fft.ifft2(spectrum).real
        correlation = correlation.expand(-1, mean.shape[1], -1, -1)
        known: dict[tuple, Tensor] = {}
        return torch.stack([sum(_channel_log_dets(*row, known)) for row in _rows(correlation, mask)])


def _rows(correlation: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The rows of two (1|B, …) tensors, paired."""
    batch = max(correlation.shape[0], mask.shape[0])
    return [(correlation[b % correlation.shape[0]], mask[b % mask.shape[0]]) for b in range(batch)]


def _channel_log_dets(correlations: Tensor, masks: Tensor, known: dict[tuple, Tensor]) -> list[Tensor]:
    """log det of every channel; a pair of the same correlation in memory and the same mask is computed once."""
    found = []
    for correlation, mask in zip(correlations, masks, strict=True):
        key = (correlation.data_ptr(), mask.cpu().numpy().tobytes())
        if key not in known:
            known[key] = _channel_log_det(correlation, mask)
        found.append(known[key])
    return found


def _channel_log_det(correlation: Tensor, mask: Tensor) -> Tensor:
    """log det of T[i − j] over the good pixels of one channel; correlation (H', W') by lag, mask (H, W)."""
    row, column = mask.nonzero(as_tuple=True)
    lag_row = (row[:, None] - row[None]) % correlation.shape[0]
    lag_column = (column[:, None] - column[None]) % correlation.shape[1]
    return 2 * torch.linalg.cholesky(correlation[lag_row, lag_column]).diagonal().log().sum()


@dataclass(frozen=True, eq=False)
class CorrelatedPrecision(LinearOperator):
    """Cov⁻¹ of a `CorrelatedGaussian` on its good pixels, zero elsewhere."""

    noise: CorrelatedGaussian
    in_shape: Shape

    @property
    def out_shape(self) -> Shape:
        return self.in_shape

    def apply(self, x: Tensor) -> Tensor:
        std = self.noise._std(x)
        return self.noise.whiten(x / std) / std

    def adjoint(self, y: Tensor) -> Tensor:
        return self.apply(y)


def _check_correlation(correlation: Tensor) -> None:
    """1 at lag 0, and the same at opposite lags, to 0.1 %."""
    rows, columns = correlation.shape[-2:]
    centre = correlation[..., rows // 2, columns // 2]
    if not bool(((centre - 1).abs() <= 1e-3).all()):
        worst = float(centre.flatten()[(centre - 1).abs().argmax()])
        raise DiffinvError(f"CorrelatedGaussian: the correlation is {worst:.4g} at lag 0, not 1; divide it by that.")
    if not bool(((correlation - correlation.flip((-2, -1))).abs() <= 1e-3).all()):
        raise DiffinvError(
            "CorrelatedGaussian: the correlation differs between opposite lags, which that of no noise does; average the two."
        )
