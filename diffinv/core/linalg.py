"""Matrix-free linear algebra on batches: every row is its own system, and a converged row is frozen.

Scalars of a recurrence are float64 and real; complex data travel as a trailing real pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.core.types import LinearMap


def dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ a row, in float64: (B, …), (B, …) → (B,)."""
    return (a.double() * b.double()).flatten(1).sum(1)


def expand(scale: Tensor, like: Tensor) -> Tensor:
    """(B,) → (B, 1, …, 1) in the dtype of `like`, to multiply it row by row."""
    return scale.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Solve:
    """What a Krylov solver returns.

    solution: (B, …). residual: (B,) final ‖r‖/‖r₀‖ in the solver's own norm. iterations: (B,) used by the row.
    indefinite: (B,) whether a negative curvature was met (the operator is then not positive definite).
    """

    solution: Tensor
    residual: Tensor
    iterations: Tensor
    indefinite: Tensor


def cg(operator: LinearMap, rhs: Tensor, *, iterations: int, tol: float, preconditioner: LinearMap | None = None) -> Solve:
    """Preconditioned conjugate gradients for A x = b, A symmetric positive definite (Hestenes & Stiefel 1952).

    Arguments:
        operator: A, (B, …) → (B, …). rhs: b. iterations: at most. tol: stop a row at √(rᵀMr / r₀ᵀMr₀) ≤ tol.
        preconditioner: M ≈ A⁻¹, symmetric positive definite.
    """
    apply_m = preconditioner if preconditioner is not None else (lambda v: v)
    x, r = torch.zeros_like(rhs), rhs
    z = apply_m(r)
    p, rz = z, dot(r, z)
    state = _Progress.start(rz, tol)
    for _ in range(iterations):
        q = operator(p)
        curvature = dot(p, q)
        state = state.curvature(curvature)
        alpha = state.masked(rz / curvature)
        x, r = x + expand(alpha, x) * p, r - expand(alpha, r) * q
        z = apply_m(r)
        rz_next = dot(r, z)
        beta = state.masked(rz_next / rz)
        p, rz = z + expand(beta, z) * p, torch.where(state.active, rz_next, rz)
        state = state.advance(rz)
        if not bool(state.active.any()):
            break
    return state.finish(x)


def information_solve(covariance: LinearMap, fisher: LinearMap, score: Tensor, *, iterations: int, tol: float) -> Solve:
    """Solve (C⁻¹ + F) d = s by CG preconditioned with C; needs products with C and F only, one each an iteration.

    Arguments:
        covariance: C, symmetric PSD. fisher: F, symmetric PSD. score: s (B, …).
        iterations: at most. tol: stop a row at √(rᵀCr / sᵀCs) ≤ tol.
    The iterates stay in the range of C, where C⁻¹ p is carried along instead of computed: with z = C r and
    p = z + βp, C⁻¹p = r + β C⁻¹p. `indefinite` marks rows where pᵀKp ≤ 0 or rᵀCr < 0 showed that C is not PSD.
    """
    d, r = torch.zeros_like(score), score
    z = covariance(r)
    p, c_inv_p, rz = z, r, dot(r, z)
    state = _Progress.start(rz, tol)
    for _ in range(iterations):
        q = c_inv_p + fisher(p)
        curvature = dot(p, q)
        state = state.curvature(curvature)
        alpha = state.masked(rz / curvature)
        d, r = d + expand(alpha, d) * p, r - expand(alpha, r) * q
        z = covariance(r)
        rz_next = dot(r, z)
        beta = state.masked(rz_next / rz)
        p, c_inv_p = z + expand(beta, z) * p, r + expand(beta, r) * c_inv_p
        rz = torch.where(state.active, rz_next, rz)
        state = state.advance(rz)
        if not bool(state.active.any()):
            break
    return state.finish(d)


@dataclass(frozen=True)
class _Progress:
    """Which rows still iterate."""

    start_norm: Tensor
    norm: Tensor
    tol: float
    active: Tensor
    indefinite: Tensor
    iterations: Tensor

    @classmethod
    def start(cls, rz: Tensor, tol: float) -> _Progress:
        zero = torch.zeros_like(rz, dtype=torch.int64)
        return cls(rz, rz, tol, rz > 0, rz < 0, zero)

    def curvature(self, value: Tensor) -> _Progress:
        bad = self.active & ~(value > 0)
        return _Progress(self.start_norm, self.norm, self.tol, self.active & ~bad, self.indefinite | bad, self.iterations)

    def masked(self, ratio: Tensor) -> Tensor:
        return torch.where(self.active, ratio, torch.zeros_like(ratio))

    def advance(self, rz: Tensor) -> _Progress:
        iterations = self.iterations + self.active
        indefinite = self.indefinite | (self.active & (rz < 0))
        active = self.active & (rz > self.tol**2 * self.start_norm)
        return _Progress(self.start_norm, rz, self.tol, active, indefinite, iterations)

    def finish(self, solution: Tensor) -> Solve:
        tiny = torch.finfo(self.norm.dtype).tiny
        residual = (self.norm.clamp_min(0) / self.start_norm.abs().clamp_min(tiny)).sqrt()
        return Solve(solution, residual, self.iterations, self.indefinite)


def gmres(operator: LinearMap, rhs: Tensor, *, iterations: int, tol: float) -> Solve:
    """GMRES without restart for A x = b, A square and not necessarily symmetric (Saad & Schultz 1986).

    Arguments: operator: A. rhs: b (B, …). iterations: size of the Krylov space at most. tol: stop a row at ‖r‖ ≤ tol ‖b‖;
    below the rounding of b's dtype a residual means nothing, so that is where tol = 0 stops.
    """
    return _arnoldi(lambda v: (v, operator(v)), rhs, iterations=iterations, tol=tol)


def information_gmres(
    covariance: LinearMap,
    fisher: LinearMap,
    score: Tensor,
    *,
    iterations: int,
    tol: float,
    preconditioner: LinearMap | None = None,
) -> Solve:
    """Solve (C⁻¹ + F) d = s by flexible GMRES on (I + F C) u = s, d = C u, for a C that need not be symmetric.

    Arguments:
        covariance, fisher: products with C and F, one each an iteration. score: s (B, …). iterations: at most.
        tol: stop a row at ‖s − (I + F C) u‖ ≤ tol ‖s‖. preconditioner: M ≈ (I + F C)⁻¹, which may change from call to call.
    References: Saad, *A flexible inner-outer preconditioned GMRES algorithm*, 1993, SIAM J. Sci. Comput. 14, 461.
    """

    def expanded(v: Tensor) -> tuple[Tensor, Tensor]:
        u = v if preconditioner is None else preconditioner(v)
        d = covariance(u)
        return d, u + fisher(d)

    return _arnoldi(expanded, score, iterations=iterations, tol=tol)


_BLOCK = 16  # basis vectors allocated at once


def _arnoldi(expanded: Callable[[Tensor], tuple[Tensor, Tensor]], rhs: Tensor, *, iterations: int, tol: float) -> Solve:
    """GMRES whose solution is built from p of (p, w) = expanded(v), where w is the operator's product with p.

    Arnoldi with Gram–Schmidt twice, which is as orthogonal as rounding allows; the least-squares problem is kept triangular
    by Givens rotations in float64. A row that is solved, or whose Krylov space is exhausted (the new direction is rounding),
    gets zero basis vectors from there on.
    """
    norm, shape = dot(rhs, rhs).sqrt(), rhs.shape
    basis = rhs.new_zeros(len(rhs), min(iterations, _BLOCK) + 1, rhs[0].numel())
    basis[:, 0] = (rhs / expand(_nonzero(norm), rhs)).flatten(1)
    triangle, eps = _Triangle.start(norm, iterations), torch.finfo(rhs.dtype).eps
    target, parts = max(tol, eps) * norm, []
    used, active = torch.zeros_like(norm, dtype=torch.int64), norm > target
    for k in range(iterations):
        if k + 1 == basis.shape[1]:
            basis = torch.cat([basis, torch.zeros_like(basis[:, :_BLOCK])], 1)
        part, product = expanded(basis[:, k].reshape(shape))
        parts.append(part)
        w, known = product.flatten(1), basis[:, : k + 1]
        size, column = dot(w, w).sqrt(), 0.0
        with torch.autocast(rhs.device.type, enabled=False):
            for _ in range(2):
                overlap = (w[:, None] @ known.mT)[:, 0]
                w, column = w - (overlap[:, None] @ known)[:, 0], column + overlap
        length = dot(w, w).sqrt()
        fresh = active & (length > 4 * eps * size)
        triangle.append(torch.cat([column.double(), length[:, None]], 1), 4 * eps)
        used, active = used + active, fresh & (triangle.residual > target)
        if not bool(active.any()):
            break
        basis[:, k + 1] = expand(active, w) * w / expand(_nonzero(length), w)
    x = sum((expand(c, rhs) * p for c, p in zip(triangle.solve().unbind(1), parts, strict=False)), torch.zeros_like(rhs))
    return Solve(x, triangle.residual / _nonzero(norm), used, torch.zeros_like(active))


def _nonzero(norm: Tensor) -> Tensor:
    return torch.where(norm == 0, 1.0, norm)


class _Triangle:
    """min ‖H y − ‖b‖ e₁‖ of a growing Hessenberg H, one a row of the batch; a zero column gets y = 0 and costs nothing."""

    def __init__(self, upper: Tensor, target: Tensor, residual: Tensor) -> None:
        self.upper, self.target, self.residual = upper, target, residual
        self.rotations: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def start(cls, norm: Tensor, size: int) -> _Triangle:
        target = norm.new_zeros(len(norm), size + 1)
        target[:, 0] = norm
        return cls(norm.new_zeros(len(norm), size, size), target, norm)

    def append(self, column: Tensor, rounding: float) -> None:
        """Rotate a column (B, k + 2) of H to upper triangular form, and the right-hand side with it; rounding counts as zero."""
        k = len(self.rotations)
        parts = list(column.unbind(1))
        for j, (c, s) in enumerate(self.rotations):
            parts[j], parts[j + 1] = c * parts[j] + s * parts[j + 1], c * parts[j + 1] - s * parts[j]
        radius = torch.hypot(parts[k], parts[k + 1])
        empty = radius <= rounding * column.abs().amax(1)
        c = torch.where(empty, 1.0, parts[k] / _nonzero(radius))
        s = torch.where(empty, 0.0, parts[k + 1] / _nonzero(radius))
        self.rotations.append((c, s))
        self.upper[:, : k + 1, k] = torch.stack([*parts[:k], torch.where(empty, 0.0, radius)], 1)
        last = self.target[:, k].clone()
        self.target[:, k], self.target[:, k + 1] = c * last, -s * last
        self.residual = torch.where(empty, self.residual, self.target[:, k + 1].abs())

    def solve(self) -> Tensor:
        """y (B, size) by back substitution."""
        y = torch.zeros_like(self.target[:, 1:])
        for k in reversed(range(len(self.rotations))):
            pivot = self.upper[:, k, k]
            rest = self.target[:, k] - (self.upper[:, k] * y).sum(1)
            y[:, k] = torch.where(pivot == 0, 0.0, rest / _nonzero(pivot))
        return y


def power_iteration(operator: LinearMap, start: Tensor, *, iterations: int = 50) -> Tensor:
    """Largest eigenvalue a row of a symmetric PSD operator, by the power method: (B,)."""
    v = start
    for _ in range(iterations):
        w = operator(v)
        v = w / expand(_nonzero(dot(w, w).sqrt()), w)
    return dot(v, operator(v))


def leading_eigenvectors(operator: LinearMap, probes: Tensor) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs of a symmetric PSD operator by one step of randomised subspace iteration.

    Arguments: operator: (B, k, n) → (B, k, n), acting on each of the k vectors. probes: k random vectors, (B, k, n).
    Returns: eigenvalues (B, k), decreasing, and orthonormal eigenvectors (B, k, n); exact if the rank is at most k.
    References: Halko, Martinsson & Tropp, *Finding structure with randomness*, 2011, arXiv:0909.4061, algorithms 4.4 and 5.3.
    """
    basis = probes.double()
    for _ in range(2):
        basis = torch.linalg.qr(operator(basis.to(probes.dtype)).double().mT)[0].mT
    inner = torch.einsum("bin,bjn->bij", basis, operator(basis.to(probes.dtype)).double())
    values, mix = torch.linalg.eigh((inner + inner.mT) / 2)
    vectors = torch.einsum("bij,bin->bjn", mix.flip(-1), basis)
    return values.flip(-1).clamp_min(0).to(probes.dtype), vectors.to(probes.dtype)


def hutchinson_trace(operator: LinearMap, like: Tensor, rng: Rng, *, probes: int) -> Tensor:
    """Unbiased estimate of tr A a row: mean of bᵀA b over ±1 probes b (Hutchinson 1989): (B,)."""
    total = torch.zeros(like.shape[0], dtype=torch.float64, device=like.device)
    for _ in range(probes):
        b = rng.rademacher(like)
        total = total + dot(b, operator(b))
    return total / probes


def dense(operator: LinearMap, like: Tensor) -> Tensor:
    """The matrix of a linear map on one row: (B = 1 input (1, *shape)) → (rows, columns), by its columns."""
    size = like[0].numel()
    eye = torch.eye(size, dtype=like.dtype, device=like.device).reshape(size, *like.shape[1:])
    return operator(eye).flatten(1).T
