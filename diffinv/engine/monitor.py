"""What a run costs and where its inner solves fail, seen from outside: the prior and the solver are wrapped, never changed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffinv.core.linalg import Solve
from diffinv.core.types import Image, LinearMap, Sigma
from diffinv.guidance.base import Guidance, InformationSolver
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.priors.base import Denoiser


class Counting(Denoiser):
    """A prior that counts rows × forward and backward passes."""

    def __init__(self, prior: Denoiser) -> None:
        super().__init__()
        self.prior, self.rows = prior, 0

    def forward(self, x: Image, sigma: Sigma) -> Image:
        self.rows += x.shape[0]
        return _CountBackward.apply(self.prior(x, sigma), self)


class _CountBackward(torch.autograd.Function):
    """Identity whose vjp adds its rows to a counter."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, counter: Counting) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.counter = inputs[1]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.counter.rows += gradient.shape[0]
        return gradient, None


class RecordingSolver(InformationSolver):
    """A solver that keeps the residual of every solve, and whether it met negative curvature.

    A learned Jacobian need not be symmetric PSD: where CG meets negative curvature it keeps what it has, at the first
    iteration nothing, and the data then count for less than they should. `indefinite` says how often.
    """

    def __init__(self, solver: InformationSolver) -> None:
        self.solver = solver
        self._residuals: list[Tensor] = []
        self._indefinite: list[Tensor] = []

    @property
    def products(self) -> int:
        return self.solver.products

    def __call__(self, covariance: LinearMap, fisher: LinearMap, score: Tensor) -> Solve:
        solved = self.solver(covariance, fisher, score)
        self._residuals.append(solved.residual.mean())
        self._indefinite.append(solved.indefinite.double().mean())
        return solved

    @property
    def residual(self) -> float:
        """Mean relative residual of the solves; 0 if there were none."""
        return float(torch.stack(self._residuals).mean()) if self._residuals else 0.0

    @property
    def indefinite(self) -> float:
        """Share of the solves that met negative curvature; 0 if there were none."""
        return float(torch.stack(self._indefinite).mean()) if self._indefinite else 0.0


def recorded(guidance: Guidance) -> tuple[Guidance, RecordingSolver | None]:
    """The guidance with a recording solver around its own; a guidance without network products in its solve is left alone."""
    if not isinstance(guidance, MomentMatching):
        return guidance, None
    recorder = RecordingSolver(guidance.solver)
    return replace(guidance, solver=recorder), recorder
