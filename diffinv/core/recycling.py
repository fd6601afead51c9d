"""One linear system with right-hand sides that come one after the other: what a solve has learnt serves the next.

A batch's rows are systems of their own; a row that is solved adds no directions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffinv.core.types import LinearMap

_BLOCK = 24  # directions allocated at once


class RecycledResiduals:
    """Generalised conjugate residuals for A x = b that keep their directions: A square, fixed, not necessarily symmetric.

    Directions P with A P = Q R, QᵀQ = 1, R upper triangular, are kept. A right-hand side is first answered from them,
    x = P R⁻¹ Qᵀ b, the least residual in their span; then each further direction is the residual itself, at one product with A.

    Arguments: operator: A, (B, …) → (B, …). directions: new ones at most of the first call, one fewer at each call that
    follows, but one: what is known grows. tol: no new ones for a row at ‖r‖ ≤ tol ‖b‖.
    References: Eisenstat, Elman & Schultz, *Variational iterative methods for nonsymmetric systems of linear equations*, 1983,
    SIAM J. Numer. Anal. 20, 345; kept between systems: Parks et al., *Recycling Krylov subspaces for sequences of linear
    systems*, 2006, SIAM J. Sci. Comput. 28, 1651.
    """

    def __init__(self, operator: LinearMap, *, directions: int, tol: float) -> None:
        self.operator, self.directions, self.tol = operator, directions, tol
        self._kept: Tensor | None = None  # rows of Pᵀ and Qᵀ, (2, B, ≥ count, n)
        self._triangle: Tensor | None = None  # R, (B, ≥ count, ≥ count)
        self._count = 0

    def __call__(self, rhs: Tensor) -> Tensor:
        """x with ‖A x − b‖ as small as the directions allow: (B, …)."""
        b = rhs.flatten(1)
        self._make_room(b)
        target = self.tol**2 * torch.linalg.vecdot(b, b)
        with torch.autocast(rhs.device.type, enabled=False):
            residual, shares = self._project(b)
            for _ in range(self.directions):
                active = torch.linalg.vecdot(residual, residual) > target
                if not bool(active.any()):
                    break
                unit = self._add(active[:, None] * residual, rhs)
                share = torch.linalg.vecdot(unit, residual)[:, None]
                residual = torch.addcmul(residual, share, unit, value=-1)
                shares = torch.cat([shares, share], 1)
            self.directions = max(1, self.directions - 1)
            known = self._triangle[:, : self._count, : self._count]
            weights = torch.linalg.solve_triangular(known, shares[..., None], upper=True)
            return (weights.mT @ self._kept[0, :, : self._count])[:, 0].reshape(rhs.shape)

    def _make_room(self, b: Tensor) -> None:
        """Space for the directions of one call."""
        if self._kept is None:
            size = max(self.directions, _BLOCK)
            self._kept, self._triangle = b.new_empty(2, len(b), size, b.shape[1]), b.new_zeros(len(b), size, size)
        elif self._count + self.directions > self._kept.shape[2]:
            more = max(self.directions, _BLOCK)
            self._kept = torch.cat([self._kept, torch.empty_like(self._kept[:, :, :more])], 2)
            self._triangle = pad(self._triangle, (0, more, 0, more))

    def _add(self, p: Tensor, like: Tensor) -> Tensor:
        """Keep p and the part of A p that is orthogonal to those before, normalised: (B, n); zero where nothing new is left."""
        product = self.operator(p.reshape(like.shape)).flatten(1)
        rest, known = self._project(product)
        length, rounding = torch.linalg.vecdot(rest, rest), 16 * torch.finfo(p.dtype).eps
        fresh = length > rounding * torch.linalg.vecdot(product, product)
        unit = rest * (torch.where(fresh, length, 1.0).rsqrt() * fresh)[:, None]
        self._kept[0, :, self._count], self._kept[1, :, self._count] = p, unit
        self._triangle[:, : self._count, self._count] = fresh[:, None] * known
        self._triangle[:, self._count, self._count] = torch.where(fresh, length.sqrt(), 1.0)
        self._count += 1
        return unit

    def _project(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """v less its share in Q, and the shares: (B, n), (B, count)."""
        known = self._kept[1, :, : self._count]
        shares = v[:, None] @ known.mT  # ten times faster than a matrix times a column
        return torch.baddbmm(v[:, None], shares, known, alpha=-1)[:, 0], shares[:, 0]
