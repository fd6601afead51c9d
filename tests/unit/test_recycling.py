"""Conjugate residuals that keep their directions, against dense solutions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffinv.core.recycling import RecycledResiduals
from diffinv.core.rng import Rng

B, N = 3, 12
F64 = torch.float64


def matrices(dtype: torch.dtype = F64) -> Tensor:
    """Non-symmetric, definite."""
    a = Rng.for_draws(1, range(B), 1).normal(torch.empty(B, N, N, dtype=F64))
    return (torch.eye(N, dtype=F64) + 0.15 * a).to(dtype)


def vectors(seed: int, dtype: torch.dtype = F64) -> Tensor:
    return Rng.for_draws(seed, range(B), 1).normal(torch.empty(B, 3, 4, dtype=dtype))


class Counted:
    """A product with a matrix a row, counted."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.products = matrix, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.products += 1
        return (self.matrix @ v.flatten(1)[..., None])[..., 0].reshape(v.shape)


def residual(matrix: Tensor, x: Tensor, b: Tensor) -> Tensor:
    return (Counted(matrix)(x) - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)


def test_enough_directions_give_the_dense_solution() -> None:
    matrix, b = matrices(), vectors(2)
    x = RecycledResiduals(Counted(matrix), directions=N, tol=0.0)(b)
    dense = torch.linalg.solve(matrix, b.flatten(1))
    torch.testing.assert_close(x.flatten(1), dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("directions", [1, 3, 5])
def test_the_first_solve_has_the_least_residual_in_its_krylov_space(directions: int) -> None:
    matrix, b = matrices(), vectors(2)
    x = RecycledResiduals(Counted(matrix), directions=directions, tol=0.0)(b)
    column, columns = b.flatten(1)[..., None], []
    for _ in range(directions):
        column = matrix @ column
        columns.append(column)
    images = torch.cat(columns, 2)
    coefficients = torch.linalg.lstsq(images, b.flatten(1)[..., None]).solution
    least = (images @ coefficients - b.flatten(1)[..., None])[..., 0].norm(dim=1) / b.flatten(1).norm(dim=1)
    torch.testing.assert_close(residual(matrix, x, b), least, rtol=1e-8, atol=1e-12)


def test_a_right_hand_side_in_the_span_of_what_is_known_costs_nothing() -> None:
    operator = Counted(matrices())
    solve = RecycledResiduals(operator, directions=4, tol=1e-9)
    first, second = solve(vectors(2)), solve(vectors(3))
    spent, b = operator.products, Counted(operator.matrix)(2 * first - 5 * second)
    x = solve(b)
    assert operator.products == spent
    torch.testing.assert_close(x, 2 * first - 5 * second, rtol=1e-8, atol=1e-10)


def test_many_systems_in_turn_become_exact_when_the_space_is_spanned() -> None:
    operator = Counted(matrices())
    solve = RecycledResiduals(operator, directions=2, tol=0.0)
    errors = [residual(operator.matrix, solve(b), b) for b in (vectors(seed) for seed in range(10, 30))]
    assert bool((errors[0] > 1e-3).all())
    assert bool((torch.stack(errors[N - 1 :]) < 1e-9).all())


@pytest.mark.parametrize("directions", [23, 24, 25, 40])
def test_there_is_room_for_any_number_of_directions(directions: int) -> None:
    size, rows = 200, 2
    spread = Rng.for_draws(1, range(rows), 1).normal(torch.empty(rows, size, size, dtype=F64))
    operator = Counted(torch.eye(size, dtype=F64) + 0.05 * spread)
    solve = RecycledResiduals(operator, directions=directions, tol=0.0)
    for seed in range(4):
        b = Rng.for_draws(seed, range(rows), 1).normal(torch.empty(rows, size, dtype=F64))
        assert float(residual(operator.matrix, solve(b), b).max()) < 1
    assert operator.products == 4 * directions - 6


def test_each_call_adds_one_direction_fewer_but_one() -> None:
    operator, spent = Counted(matrices()), []
    solve = RecycledResiduals(operator, directions=3, tol=0.0)
    for seed in range(5):
        solve(vectors(seed))
        spent.append(operator.products)
    assert spent == [3, 5, 6, 7, 8]


def test_a_solved_row_adds_no_directions_and_a_row_alone_is_answered_the_same() -> None:
    matrix, rhs = matrices(), [vectors(seed) for seed in (5, 6)]
    matrix[0] = torch.eye(N, dtype=F64)
    together = RecycledResiduals(Counted(matrix), directions=3, tol=1e-6)
    answers = [together(b) for b in rhs]
    torch.testing.assert_close(answers[1][0], rhs[1][0], rtol=1e-12, atol=1e-12)
    alone = RecycledResiduals(Counted(matrix[1:2]), directions=3, tol=1e-6)
    for b, answer in zip(rhs, answers, strict=True):
        torch.testing.assert_close(alone(b[1:2]), answer[1:2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_unit_of_the_right_hand_side_does_not_matter(dtype: torch.dtype, scale: float) -> None:
    matrix, b = matrices(dtype), vectors(2, dtype)
    x = RecycledResiduals(Counted(matrix), directions=4, tol=1e-3)(b)
    scaled = RecycledResiduals(Counted(matrix), directions=4, tol=1e-3)(scale * b) / scale
    torch.testing.assert_close(scaled, x, rtol=1e-4, atol=1e-5)


def test_zeros_and_an_exhausted_space_give_no_nan() -> None:
    matrix, b = matrices(), vectors(2)
    b[1] = 0
    solve = RecycledResiduals(Counted(matrix), directions=N + 8, tol=0.0)
    x = solve(b)
    assert bool(x.isfinite().all()) and not bool(x[1].any())
    assert float(residual(matrix, x, b)[[0, 2]].max()) < 1e-9
