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
        self._kept: Tensor | None = None  # rows (p, q), (B, ≥ count, 2n)
        self._count = 0

    def __call__(self, rhs: Tensor) -> Tensor:
        """x with ‖A x − b‖ as small as the directions allow: (B, …)."""
        b = rhs.flatten(1)
        size, target = b.shape[1], self.tol**2 * torch.linalg.vecdot(b, b)
        if self._kept is None:
            self._kept = b.new_empty(len(b), _BLOCK, 2 * size)
        answer = torch.cat([torch.zeros_like(b), -b], 1)  # (x, A x − b)
        with torch.autocast(rhs.device.type, enabled=False):
            answer = answer + self._share(b)
            for _ in range(self.directions):
                residual = -answer[:, size:]
                active = torch.linalg.vecdot(residual, residual) > target
                if not bool(active.any()):
                    break
                new = self._direction(active[:, None] * residual, rhs)
                answer = answer + torch.linalg.vecdot(new[:, size:], residual)[:, None] * new
                self._keep(new)
        return answer[:, :size].reshape(rhs.shape)

    def _direction(self, p: Tensor, like: Tensor) -> Tensor:
        """(p, A p), its second half orthogonal to those before and normalised; zero where nothing new is left: (B, 2n)."""
        q = self.operator(p.reshape(like.shape)).flatten(1)
        new = torch.cat([p, q], 1) - self._share(q)
        rest = new[:, p.shape[1] :]
        length, rounding = torch.linalg.vecdot(rest, rest), 16 * torch.finfo(q.dtype).eps
        fresh = length > rounding * torch.linalg.vecdot(q, q)
        return torch.where(fresh, length, 1.0).rsqrt()[:, None] * fresh[:, None] * new

    def _share(self, target: Tensor) -> Tensor:
        """(P Qᵀ t, Q Qᵀ t): (B, n) → (B, 2n)."""
        known = self._kept[:, : self._count]
        weights = known[:, :, target.shape[1] :] @ target[:, :, None]
        return (weights.mT @ known)[:, 0]

    def _keep(self, new: Tensor) -> None:
        if self._count == self._kept.shape[1]:
            self._kept = torch.cat([self._kept, torch.empty_like(self._kept[:, :_BLOCK])], 1)
        self._kept[:, self._count] = new
        self._count += 1
