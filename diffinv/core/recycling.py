"""One linear system with right-hand sides that come one after the other: what a solve has learnt serves the next.

A batch's rows are systems of their own; a row that is solved adds no directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffinv.core.types import LinearMap

_BLOCK = 16  # directions allocated at once


class RecycledResiduals:
    """Generalised conjugate residuals for A x = b that keep their directions: A square, fixed, not necessarily symmetric.

    Directions P with A P = Q, QᵀQ = 1, are kept. A right-hand side is first answered from them, x = P Qᵀ b, the least residual
    in their span; then each further direction is the residual itself, orthogonalised, at one product with A.

    Arguments: operator: A, (B, …) → (B, …). directions: new ones at most a call. tol: no new ones for a row at ‖r‖ ≤ tol ‖b‖.
    References: Eisenstat, Elman & Schultz, *Variational iterative methods for nonsymmetric systems of linear equations*, 1983,
    SIAM J. Numer. Anal. 20, 345; kept between systems: Parks et al., *Recycling Krylov subspaces for sequences of linear
    systems*, 2006, SIAM J. Sci. Comput. 28, 1651.
    """

    def __init__(self, operator: LinearMap, *, directions: int, tol: float) -> None:
        self.operator, self.directions, self.tol = operator, directions, tol
        self._kept: Tensor | None = None  # rows (p, −q), (B, ≥ count, 2n)
        self._count = 0

    def __call__(self, rhs: Tensor) -> Tensor:
        """x with ‖A x − b‖ as small as the directions allow: (B, …)."""
        b = rhs.flatten(1)
        size, target = b.shape[1], self.tol**2 * torch.linalg.vecdot(b, b)
        if self._kept is None:
            self._kept = b.new_empty(len(b), _BLOCK, 2 * size)
        with torch.autocast(rhs.device.type, enabled=False):
            state = self._orthogonal(torch.cat([torch.zeros_like(b), b], 1))  # (x, b − A x)
            for _ in range(self.directions):
                residual = state[:, size:]
                active = torch.linalg.vecdot(residual, residual) > target
                if not bool(active.any()):
                    break
                direction = self._add(active[:, None] * residual, rhs)
                share = torch.linalg.vecdot(direction[:, size:], residual)
                state = torch.addcmul(state, share[:, None], direction, value=-1)
        return state[:, :size].reshape(rhs.shape)

    def _add(self, p: Tensor, like: Tensor) -> Tensor:
        """Keep (p, −A p), its second half orthogonal to those before and normalised; zero where nothing new is left: (B, 2n)."""
        product = self.operator(p.reshape(like.shape)).flatten(1)
        new = self._orthogonal(torch.cat([p, -product], 1))
        rest = new[:, p.shape[1] :]
        length, rounding = torch.linalg.vecdot(rest, rest), 16 * torch.finfo(p.dtype).eps
        fresh = length > rounding * torch.linalg.vecdot(product, product)
        if self._count == self._kept.shape[1]:
            self._kept = torch.cat([self._kept, torch.empty_like(self._kept[:, :_BLOCK])], 1)
        scale = torch.where(fresh, length, 1.0).rsqrt() * fresh
        self._kept[:, self._count] = new.mul_(scale[:, None])
        self._count += 1
        return new

    def _orthogonal(self, pair: Tensor) -> Tensor:
        """(s, t) less the kept directions' share in t, in both halves: (B, 2n) → (B, 2n)."""
        known, half = self._kept[:, : self._count], pair.shape[1] // 2
        weights = pair[:, None, half:] @ known[:, :, half:].mT  # ten times faster than a matrix times a column
        return torch.baddbmm(pair[:, None], weights, known, alpha=-1)[:, 0]
