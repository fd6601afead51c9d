"""Krylov solvers against dense linear algebra, row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffinv.core.linalg import (
    cg,
    dense,
    dot,
    expand,
    gmres,
    hutchinson_trace,
    information_gmres,
    information_solve,
    power_iteration,
)
from diffinv.core.rng import Rng
from diffinv.core.types import LinearMap

F64 = torch.float64
N = 12


def draw(*shape: int, seed: int = 0) -> Tensor:
    return Rng.for_draws(seed, range(shape[0]), 1).normal(torch.zeros(shape, dtype=F64))


def spectrum(values: list[float] | Tensor, *, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues, (1, n, n)."""
    values = torch.as_tensor(values, dtype=F64)
    q = torch.linalg.qr(draw(1, len(values), len(values), seed=seed)[0])[0]
    return (q * values @ q.T)[None]


def times(matrix: Tensor) -> LinearMap:
    return lambda v: (matrix @ v[..., None])[..., 0]


def psd(*, seed: int = 0, floor: float = 0.3) -> Tensor:
    root = draw(2, N, N, seed=seed)
    return root @ root.mT / N + floor * torch.eye(N, dtype=F64)


def solved(matrix: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(matrix, b)


def test_inner_products_of_float32_are_summed_in_float64():
    a = torch.cat([torch.tensor([[2.0**24]]), torch.ones(1, 1000)], 1)
    assert float(dot(a, torch.ones_like(a))[0]) == 2**24 + 1000
    assert expand(torch.ones(2, dtype=F64), torch.zeros(2, 3, 4, 5)).shape == (2, 1, 1, 1)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_cg_equals_the_dense_solution(preconditioned):
    matrix, b = psd(), draw(2, N, seed=1)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    solve = cg(times(matrix), b, iterations=60, tol=1e-13, preconditioner=(lambda v: v / diagonal) if preconditioned else None)
    assert torch.allclose(solve.solution, solved(matrix, b), rtol=1e-10, atol=1e-11)
    assert not bool(solve.indefinite.any()) and float(solve.residual.max()) < 1e-12


def test_cg_ends_after_as_many_iterations_as_distinct_eigenvalues():
    matrix = spectrum([1.0] * 5 + [3.0] * 4 + [10.0] * 3)
    solve = cg(times(matrix), draw(1, N), iterations=20, tol=1e-12)
    assert int(solve.iterations[0]) == 3


def test_cg_is_the_error_reducer_that_chebyshev_promises():
    kappa, steps = 50.0, 12
    matrix, b = spectrum(torch.linspace(1, kappa, N, dtype=F64)), draw(1, N, seed=2)
    exact = solved(matrix, b)
    error = cg(times(matrix), b, iterations=steps // 2, tol=0.0).solution - exact
    energy = (dot(error, times(matrix)(error)) / dot(exact, b)).sqrt()
    rate = (kappa**0.5 - 1) / (kappa**0.5 + 1)
    assert float(energy[0]) <= 2 * rate ** (steps // 2)


def test_a_converged_row_is_frozen_and_equals_the_row_alone():
    matrix = torch.cat([torch.eye(N, dtype=F64)[None], spectrum(torch.logspace(0, 3, N, dtype=F64))])
    b = draw(2, N, seed=3)
    both = cg(times(matrix), b, iterations=40, tol=1e-10)
    assert int(both.iterations[0]) == 1 and int(both.iterations[1]) > 8
    for row in range(2):
        alone = cg(times(matrix[row : row + 1]), b[row : row + 1], iterations=40, tol=1e-10)
        assert torch.allclose(both.solution[row], alone.solution[0], rtol=1e-9, atol=1e-12)
    assert torch.equal(both.solution[0], b[0])


@pytest.mark.parametrize("solver", ["cg", "information", "gmres"])
def test_a_zero_right_hand_side_gives_zero_and_no_nan(solver):
    matrix, b = psd(), torch.cat([torch.zeros(1, N, dtype=F64), draw(1, N)])
    identity = torch.eye(N, dtype=F64).expand(2, N, N)
    solve = {
        "cg": lambda: cg(times(matrix), b, iterations=40, tol=1e-12),
        "information": lambda: information_solve(times(identity), times(matrix - identity), b, iterations=40, tol=1e-12),
        "gmres": lambda: gmres(times(matrix), b, iterations=N, tol=1e-12),
    }[solver]()
    assert float(solve.solution[0].abs().max()) == 0
    assert torch.allclose(solve.solution[1], solved(matrix, b)[1], rtol=1e-8, atol=1e-9)
    assert bool(solve.residual.isfinite().all())


def test_cg_flags_an_indefinite_row_only():
    matrix = torch.cat([spectrum([-1.0] + [1.0 + k for k in range(N - 1)]), psd()[:1]])
    solve = cg(times(matrix), draw(2, N), iterations=40, tol=1e-12)
    assert solve.indefinite.tolist() == [True, False]
    assert bool(solve.solution.isfinite().all())
    assert torch.allclose(solve.solution[1], solved(matrix, draw(2, N))[1], rtol=1e-8)


def test_information_solve_equals_the_dense_solution():
    covariance, fisher, score = psd(), 30 * psd(seed=5, floor=0.0), draw(2, N, seed=1)
    solve = information_solve(times(covariance), times(fisher), score, iterations=60, tol=1e-13)
    expected = solved(torch.linalg.inv(covariance) + fisher, score)
    assert torch.allclose(solve.solution, expected, rtol=1e-9, atol=1e-11)
    assert not bool(solve.indefinite.any())


def test_information_solve_stays_in_the_range_of_a_singular_covariance():
    root, fisher, score = draw(2, N, 3), psd(seed=5), draw(2, N, seed=1)
    solve = information_solve(times(root @ root.mT), times(fisher), score, iterations=30, tol=1e-12)
    inner = torch.linalg.solve(torch.eye(3, dtype=F64) + root.mT @ fisher @ root, root.mT @ score[..., None])
    assert torch.allclose(solve.solution, (root @ inner)[..., 0], rtol=1e-8, atol=1e-10)


def test_information_solve_without_data_returns_the_covariance_times_the_score():
    covariance, score = psd(), draw(2, N)
    solve = information_solve(times(covariance), torch.zeros_like, score, iterations=5, tol=1e-12)
    assert torch.allclose(solve.solution, times(covariance)(score), rtol=1e-12)
    assert solve.iterations.tolist() == [1, 1]


def test_information_solve_flags_a_covariance_that_is_not_psd():
    covariance = torch.cat([spectrum([-0.5] + [1.0 + k for k in range(N - 1)]), psd()[:1]])
    solve = information_solve(times(covariance), times(psd(seed=5)), draw(2, N), iterations=40, tol=1e-12)
    assert solve.indefinite.tolist() == [True, False]
    assert bool(solve.solution.isfinite().all())


@pytest.mark.parametrize("skew", [0.0, 1.0, 5.0])
def test_gmres_equals_the_dense_solution_of_a_non_symmetric_system(skew):
    lower = draw(2, N, N, seed=4)
    matrix, b = psd() + skew * (lower - lower.mT) / N, draw(2, N, seed=1)
    solve = gmres(times(matrix), b, iterations=N, tol=1e-12)
    assert torch.allclose(solve.solution, solved(matrix, b), rtol=1e-8, atol=1e-9)
    residual = (times(matrix)(solve.solution) - b).norm(dim=1) / b.norm(dim=1)
    assert float(residual.max()) < 1e-10


def test_gmres_solves_an_indefinite_system_on_which_cg_stops():
    matrix, b = spectrum([-2.0, -1.0] + [1.0 + k for k in range(N - 2)]), draw(1, N, seed=1)
    assert bool(cg(times(matrix), b, iterations=60, tol=1e-12).indefinite[0])
    assert torch.allclose(gmres(times(matrix), b, iterations=N, tol=1e-12).solution, solved(matrix, b), rtol=1e-8, atol=1e-9)


def test_gmres_reports_its_true_residual_before_convergence_and_minimises_it():
    matrix, b = psd() + draw(2, N, N, seed=4) / N, draw(2, N, seed=1)
    residuals = []
    for iterations in (1, 3, 6):
        solve = gmres(times(matrix), b, iterations=iterations, tol=1e-12)
        true = (times(matrix)(solve.solution) - b).norm(dim=1) / b.norm(dim=1)
        assert torch.allclose(solve.residual, true, rtol=1e-9)
        residuals.append(true)
    assert bool((residuals[1] < residuals[0]).all() and (residuals[2] < residuals[1]).all())


def lopsided(*, skew: float = 0.3) -> Tensor:
    """A covariance that is not symmetric, (2, N, N)."""
    lower = draw(2, N, N, seed=4)
    return psd() + skew * (lower - lower.mT) / N


def test_information_gmres_equals_the_dense_solution_without_a_symmetric_covariance():
    covariance, fisher, score = lopsided(), 30 * psd(seed=5, floor=0.0), draw(2, N, seed=1)
    solve = information_gmres(times(covariance), times(fisher), score, iterations=N, tol=1e-13)
    assert torch.allclose(solve.solution, solved(torch.linalg.inv(covariance) + fisher, score), rtol=1e-8, atol=1e-10)


def test_a_preconditioner_may_change_from_call_to_call_and_the_exact_one_needs_one_iteration():
    covariance, fisher, score = lopsided(), 30 * psd(seed=5, floor=0.0), draw(2, N, seed=1)
    system = torch.eye(N, dtype=F64) + fisher @ covariance
    exact = solved(torch.linalg.inv(covariance) + fisher, score)
    run = lambda model, iterations: information_gmres(
        times(covariance), times(fisher), score, iterations=iterations, tol=1e-13, preconditioner=model
    )
    assert torch.allclose(run(lambda v: solved(system, v), 1).solution, exact, rtol=1e-8, atol=1e-10)
    calls = []

    def moody(v: Tensor) -> Tensor:
        calls.append(v)
        return solved(system + len(calls) * torch.eye(N, dtype=F64), v)

    solve = run(moody, N)
    assert torch.allclose(solve.solution, exact, rtol=1e-8, atol=1e-10) and len(calls) > 2
    true = (score - (system @ torch.linalg.solve(covariance, solve.solution[..., None]))[..., 0]).norm(dim=1)
    assert float((true / score.norm(dim=1)).max()) < 1e-10


def test_gmres_survives_a_krylov_space_that_is_exhausted():
    matrix = spectrum([1.0] * 6 + [4.0] * 6)
    b = draw(1, N)
    solve = gmres(times(matrix), b, iterations=8, tol=1e-12)
    assert torch.allclose(solve.solution, solved(matrix, b), rtol=1e-9, atol=1e-10)


def test_solvers_keep_image_shapes_and_float32():
    b = draw(2, 1, 3, 4).float()
    for solve in (
        cg(lambda v: 2 * v, b, iterations=3, tol=1e-6),
        information_solve(lambda v: v, lambda v: v, b, iterations=3, tol=1e-6),
        gmres(lambda v: 2 * v, b, iterations=2, tol=1e-6),
    ):
        assert solve.solution.dtype == torch.float32
        assert torch.allclose(solve.solution, b / 2, rtol=1e-6)


def test_power_iteration_finds_the_largest_eigenvalue():
    matrix = torch.cat([spectrum([7.0, *[1.0] * (N - 1)]), spectrum([3.0, *[0.1] * (N - 1)])])
    assert torch.allclose(power_iteration(times(matrix), draw(2, N)), torch.tensor([7.0, 3.0], dtype=F64), rtol=1e-12)


def test_hutchinson_is_unbiased_with_its_variance():
    matrix, probes = psd(), 4000
    estimate = hutchinson_trace(times(matrix), torch.zeros(2, N, dtype=F64), Rng.for_draws(0, [0, 1], 1), probes=probes)
    off = matrix - torch.diag_embed(matrix.diagonal(dim1=1, dim2=2))
    sigma = (2 * off.square().sum((1, 2)) / probes).sqrt()
    z = (estimate - matrix.diagonal(dim1=1, dim2=2).sum(1)) / sigma
    assert float(z.abs().max()) < 4.5
    biased = (1.1 * estimate - matrix.diagonal(dim1=1, dim2=2).sum(1)) / sigma
    assert float(biased.abs().min()) > 4.5


def test_dense_gives_the_matrix_of_a_map():
    matrix = draw(1, 5, 6)[0]
    assert torch.equal(dense(lambda v: v.flatten(1) @ matrix.T, torch.zeros(1, 2, 3, dtype=F64)), matrix)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("scale", [1e-17, 1.0, 1e17])
def test_gmres_does_not_depend_on_the_unit_of_the_right_hand_side(scale: float, dtype: torch.dtype):
    matrix, b = (psd() + draw(2, N, N, seed=4) / N).to(dtype), draw(2, N, seed=1).to(dtype)
    one = gmres(times(matrix), b, iterations=N, tol=1e-5)
    other = gmres(times(matrix), scale * b, iterations=N, tol=1e-5)
    assert float(one.residual.max()) < 1e-5
    assert torch.allclose(other.solution / scale, one.solution, rtol=1e-3, atol=1e-4)


def test_gmres_stops_each_row_at_its_tolerance_and_the_row_alone_agrees():
    matrix = torch.cat([spectrum([1.0] * 6 + [4.0] * 6), spectrum(torch.linspace(1, 4, N, dtype=F64))])
    calls, b = [], draw(2, N, seed=3)
    both = gmres(lambda v: (calls.append(1), times(matrix)(v))[1], b, iterations=N, tol=1e-3)
    assert both.iterations.tolist()[0] == 2 < int(both.iterations[1]) < N
    assert len(calls) == int(both.iterations[1])
    assert float(both.residual.max()) <= 1e-3
    for row in range(2):
        alone = gmres(times(matrix[row : row + 1]), b[row : row + 1], iterations=N, tol=1e-3)
        assert torch.allclose(both.solution[row], alone.solution[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("solver", ["cg", "information", "gmres"])
def test_a_right_hand_side_that_is_not_a_number_is_never_solved_by_zero(solver):
    b = draw(2, N, seed=1)
    b[0, 3] = torch.nan
    solve = {
        "cg": lambda: cg(times(psd()), b, iterations=5, tol=1e-2),
        "information": lambda: information_solve(times(psd()), times(psd(seed=5)), b, iterations=5, tol=1e-2),
        "gmres": lambda: gmres(times(psd()), b, iterations=5, tol=1e-2),
    }[solver]()
    assert bool(solve.solution[0].isnan().any()) and bool(solve.solution[1].isfinite().all())


def test_the_power_method_gives_zero_for_a_zero_operator_in_float32():
    assert power_iteration(torch.zeros_like, draw(2, N).float()).tolist() == [0, 0]
