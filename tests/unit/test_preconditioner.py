"""The row-sum preconditioner of GMRES: fewer products with the prior's covariance where a source stands on an empty sky."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffinv.core.types import LinearMap
from diffinv.guidance.base import Gmres

N, WIDTH = 96, 3.0
PLACE = torch.arange(N, dtype=torch.float64)


def source() -> Tensor:
    """Covariance of a smooth source in the middle of an empty field, (N, N): amplitudes² from 1 down to 1e-4."""
    amplitude = 1e-2 + torch.exp(-((PLACE - N / 2) ** 2) / 200)
    return amplitude[:, None] * torch.exp(-((PLACE[:, None] - PLACE) ** 2) / 8) * amplitude


def fisher() -> Tensor:
    """Fᵢⱼ of a Gaussian blur seen at a signal to noise ratio of 100, (N, N)."""
    blur = torch.exp(-((PLACE[:, None] - PLACE) ** 2) / (2 * WIDTH**2))
    blur = blur / blur.sum(1, keepdim=True)
    return 1e4 * blur.mT @ blur


def times(matrix: Tensor) -> LinearMap:
    return lambda v: v @ matrix.mT


def error(solver: Gmres) -> float:
    """‖d − exact‖/‖exact‖ for s = F x of a draw x."""
    torch.manual_seed(0)
    covariance, information = source(), fisher()
    score = information @ torch.linalg.cholesky(covariance + 1e-9 * torch.eye(N)) @ torch.randn(N, dtype=torch.float64)
    exact = covariance @ torch.linalg.solve(torch.eye(N) + information @ covariance, score)
    found = solver(times(covariance), times(information), score[None]).solution[0]
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("iterations", [3, 4, 6])
def test_half_the_products_give_a_third_of_the_error(iterations: int) -> None:
    assert error(Gmres(iterations, 0.0, inner=16)) < error(Gmres(2 * iterations, 0.0)) / 3


def test_without_inner_iterations_there_is_no_product_with_ones() -> None:
    seen = []

    def covariance(v: Tensor) -> Tensor:
        seen.append(v)
        return times(source())(v)

    for inner, count in ((0, 5), (3, 6)):
        seen.clear()
        Gmres(5, 0.0, inner)(covariance, times(fisher()), torch.ones(1, N, dtype=torch.float64) * PLACE)
        assert len(seen) == count


def test_negative_row_sums_leave_a_pixel_without_preconditioner() -> None:
    """C = −1 somewhere: not a covariance, but a learned Jacobian can be so; the solve must stay finite and exact."""
    covariance = source() - 2 * torch.diag(torch.where(PLACE < 5, 1.0, 0.0).double())
    score = (fisher() @ torch.sin(PLACE))[None]
    found = Gmres(N, 1e-13, inner=16)(times(covariance), times(fisher()), score).solution
    exact = covariance @ torch.linalg.solve(torch.eye(N) + fisher() @ covariance, score[0])
    torch.testing.assert_close(found[0], exact, rtol=1e-6, atol=1e-8)
