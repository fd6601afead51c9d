"""The classical methods of the benchmarks: closed forms, optimality, and adjoints of their transforms."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from diffinv.core.linalg import dense, dot, power_iteration
from diffinv.core.rng import Rng
from diffinv.operators.base import LinearOperator
from diffinv.operators.border import ZeroBorder
from diffinv.operators.convolution import Convolution
from diffinv.operators.sampling import SumPool

SIZE = 16


def _load(name: str) -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


baselines = _load("baselines")


def normal(seed: int, *shape: int) -> Tensor:
    return Rng.for_draws(seed, range(shape[0]), 1).normal(torch.zeros(shape, dtype=torch.float64))


def blur(width: float, batch: int = 1) -> LinearOperator:
    axis = torch.arange(-3, 4, dtype=torch.float64)
    widths = torch.linspace(width, 1.2 * width, batch, dtype=torch.float64).reshape(-1, 1, 1, 1)
    kernel = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * widths**2))
    kernel = kernel / kernel.sum((2, 3), keepdim=True)
    return SumPool((1, SIZE, SIZE), 2) @ Convolution(kernel, 1, (SIZE, SIZE), ZeroBorder())


def problem(batch: int = 1, noise: float = 0.05) -> tuple[Tensor, LinearOperator, Tensor, Tensor]:
    """Data, operator, variance and truth of a few blobs."""
    operator = blur(1.2, batch)
    row, column = torch.meshgrid(*[torch.arange(SIZE, dtype=torch.float64)] * 2, indexing="ij")
    blobs = [torch.exp(-((row - 6) ** 2 + (column - 8 - k) ** 2) / (2 + k)) for k in range(batch)]
    truth = torch.stack(blobs)[:, None]
    data = operator(truth)
    return data + noise * normal(1, *data.shape), operator, torch.full_like(data, noise**2), truth


def test_bicubic_keeps_surface_brightness_and_position() -> None:
    ramp = torch.arange(12, dtype=torch.float64).expand(1, 1, 12, 12)
    fine = baselines.bicubic(4 * ramp, 2)
    assert torch.allclose(fine[0, 0, 8, 6:-6], torch.arange(24, dtype=torch.float64)[6:-6] / 2 - 0.25, atol=1e-12)


@pytest.mark.parametrize("coarse", [True, False])
def test_starlet_adjoint_is_its_transpose_and_its_norm_is_as_stated(coarse: bool) -> None:
    transform = baselines.Starlet(3, coarse)
    x = normal(2, 2, 1, SIZE, SIZE)
    u = normal(3, *transform.forward(x).shape)
    assert torch.allclose(dot(transform.forward(x), u), dot(x, transform.adjoint(u)), rtol=1e-12)
    largest = power_iteration(lambda v: transform.adjoint(transform.forward(v)), x, iterations=100).max().sqrt()
    assert float(largest) <= transform.penalty.norm * (1 + 1e-12)


def test_starlet_scales_add_up_to_the_image() -> None:
    x = normal(2, 2, 1, SIZE, SIZE)
    assert torch.allclose(baselines.Starlet(3, coarse=True).forward(x).sum(1, keepdim=True), x, atol=1e-14)


def test_gradient_and_divergence_are_adjoint_with_norm_below_root_eight() -> None:
    penalty, x = baselines.TOTAL_VARIATION, normal(2, 2, 1, SIZE, SIZE)
    u = normal(4, *penalty.forward(x).shape)
    assert torch.allclose(dot(penalty.forward(x), u), dot(x, penalty.adjoint(u)), rtol=1e-12)
    largest = power_iteration(lambda v: penalty.adjoint(penalty.forward(v)), x, iterations=200).max().sqrt()
    assert 0.9 * penalty.norm < float(largest) <= penalty.norm


def test_spectral_norm_is_the_largest_singular_value() -> None:
    operator = blur(1.2)
    matrix = dense(operator.apply, torch.zeros(1, 1, SIZE, SIZE, dtype=torch.float64))
    found = baselines.spectral_norm(operator.apply, operator.adjoint, torch.zeros(1, 1, SIZE, SIZE, dtype=torch.float64))
    assert float(found) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-3)


def test_wiener_is_the_posterior_mean_of_its_gaussian_field() -> None:
    data, operator, variance, _ = problem()
    law, like = baselines.PowerLaw(0.1, 1.0, 1.5), torch.zeros(1, 1, SIZE, SIZE, dtype=torch.float64)
    power = law.spectrum((SIZE, SIZE))
    covariance = 4 * dense(lambda x: torch.fft.irfft2(power * torch.fft.rfft2(x), s=(SIZE, SIZE)), like)
    assert float(covariance.diagonal().mean()) == pytest.approx(4, rel=1e-9)
    a = dense(operator.apply, like)
    gain = covariance @ a.T @ torch.linalg.inv(a @ covariance @ a.T + torch.diag(variance.flatten()))
    found = baselines.wiener(data, operator, variance, torch.tensor([2.0], dtype=torch.float64), law, tol=1e-10)
    assert torch.allclose(found.flatten(), gain @ data.flatten(), atol=1e-6)


def test_richardson_lucy_raises_the_poisson_likelihood_at_every_step() -> None:
    data, operator, variance, _ = problem()
    sky, seen = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), []

    def record(step: int, x: Tensor) -> None:
        model = operator.apply(x) + sky
        seen.append(float(((data + sky) * model.log() - model).sum()))

    baselines.richardson_lucy(data, operator, sky, iterations=60, callback=record)
    rises = torch.tensor(seen).diff()
    assert len(seen) == 60
    assert bool((rises > 0).all())


def test_richardson_lucy_rests_on_positive_noiseless_truth() -> None:
    _, operator, _, truth = problem()
    sky = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    error = {}
    for iterations in (50, 800):
        found = baselines.richardson_lucy(operator(truth), operator, sky, iterations=iterations)
        error[iterations] = float((operator(found) - operator(truth)).norm() / operator(truth).norm())
    assert error[800] < 0.01 < error[50]


def test_total_variation_has_its_two_limits() -> None:
    data, operator, variance, truth = problem()
    start = truth.clone()
    flat = baselines.total_variation(data, operator, variance, strength=1e5, start=start, iterations=3000)
    one = operator(torch.ones_like(truth))
    level = float((one * data / variance).sum() / (one**2 / variance).sum())
    assert torch.allclose(flat, torch.full_like(flat, level), atol=0.02 * level)
    free = baselines.total_variation(data, operator, variance, strength=1e-9, start=start, iterations=3000)
    assert float(((operator(free) - data) ** 2 / variance).sum()) < 0.6 * data.numel()
    assert bool((free >= 0).all())


def objective(x: Tensor, data: Tensor, operator: LinearOperator, variance: Tensor, penalty: float) -> float:
    return float(((operator(x) - data) ** 2 / variance).sum() / 2) + penalty


def test_starlet_is_a_minimum_of_its_objective() -> None:
    data, operator, variance, truth = problem()
    strength = (3.0, 2.0, 1.0)
    transform = baselines.Starlet(3)
    weight = torch.tensor(strength, dtype=torch.float64).reshape(1, -1, 1, 1)
    cost = lambda x: objective(x, data, operator, variance, float((weight * transform.forward(x).abs()).sum()))
    solve = lambda n: baselines.starlet(
        data, operator, variance, strength=strength, reweightings=0, knee=1.0, start=torch.zeros_like(truth), iterations=n
    )
    best = solve(2000)
    tries = [(best + 0.01 * normal(k, 1, 1, SIZE, SIZE)).clamp_min(0) for k in range(20)]
    tries += [best * (1 + s) for s in (-0.02, 0.02)] + [truth]
    assert all(cost(x) > cost(best) for x in tries)
    assert cost(solve(20)) > cost(best) * 1.001


def test_reweighting_shrinks_a_bright_source_less() -> None:
    data, operator, variance, truth = problem(noise=0.2)
    flux = [
        float(
            baselines.starlet(
                data, operator, variance, strength=(5.0,) * 3, reweightings=n, knee=1.0, start=truth, iterations=300
            ).max()
        )
        for n in (0, 2)
    ]
    assert flux[0] < flux[1] <= float(truth.max()) * 1.2


def test_results_do_not_depend_on_batch_mates() -> None:
    data, operator, variance, _ = problem(batch=2)
    sky = torch.full((2, 1, 1, 1), 0.5, dtype=torch.float64)
    start = baselines.bicubic(data, 2).clamp_min(0)
    methods = [
        lambda d, a, v, s: baselines.richardson_lucy(d, a, sky[: len(d)], iterations=20),
        lambda d, a, v, s: baselines.total_variation(d, a, v, strength=1.0, start=s, iterations=20),
        lambda d, a, v, s: baselines.wiener(
            d, a, v, torch.ones(len(d), dtype=torch.float64), baselines.PowerLaw(0.1, 1.0, 1.5), iterations=10
        ),
    ]
    row = slice(1, 2)
    for method in methods:
        alone = method(data[row], operator.select(row), variance[row], start[row])
        assert torch.allclose(method(data, operator, variance, start)[row], alone, atol=1e-12)
