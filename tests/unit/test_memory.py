"""Rows that fit into memory: measured on one pass, bounded by what is free, and without influence on the draws."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.engine import memory
from diffinv.engine.draws import Method
from diffinv.engine.reconstruct import reconstruct
from diffinv.guidance.base import ConjugateGradients
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.guidance.pseudo_inverse import PseudoInverse
from diffinv.likelihood import Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Identity
from diffinv.priors.base import Denoiser
from diffinv.samplers.smc import TwistedSmc
from diffinv.schedules import LogUniform

CPU, SHAPE = torch.device("cpu"), (1, 8, 8)


class Squares(Denoiser):
    """x³ keeps x and x² for the backward pass: two images; its weights are not a row's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1, 1, 8, 8), 0.5))
        self.batches: list[int] = []

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.batches.append(len(x))
        return self.weight * x / (1 + x**2)


def test_kept_bytes_are_those_of_a_row_whatever_the_batch() -> None:
    image = 4 * 64
    one, eight = (memory.kept_bytes(Squares(), SHAPE, CPU, rows=n) for n in (1, 8))
    assert one == eight
    assert 2 * image <= one <= 6 * image


class Sigmoid(Denoiser):
    """A node that keeps its own output, which is a circle."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return torch.sigmoid(x) * torch.exp(x)


def test_nothing_is_left_of_the_pass_that_measures() -> None:
    network = Sigmoid()
    tensors = lambda: sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    memory.kept_bytes(network, SHAPE, CPU)
    before = tensors()
    for _ in range(5):
        assert memory.kept_bytes(network, SHAPE, CPU) >= 2 * 4 * 64
    gc.collect()
    assert tensors() == before


@pytest.mark.parametrize(("free", "rows"), [(1, 1), (2**21, 30), (2**40, memory.MOST_ROWS)])
def test_half_of_the_free_memory_is_taken(free: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    found = memory.rows_that_fit(Squares(), SHAPE, CPU)
    assert found == pytest.approx(rows, rel=0.1)


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    assert memory._container_bytes(tmp_path) == 2**62
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 50\n")
    assert memory._container_bytes(tmp_path) == 650
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container_bytes(tmp_path) == 2**62
    assert 0 < memory.free_bytes(CPU) < 2**62


def test_a_cloud_is_kept_whole_whatever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    data = Observation(torch.ones(1, *SHAPE), Identity(SHAPE), Gaussian(torch.tensor([0.3])))
    guidance = MomentMatching(ConjugateGradients(2, 0.0))
    method = Method(TwistedSmc(8, rank=2), guidance, steps=2, schedule=LogUniform(0.1, 10.0))
    assert reconstruct(data, Squares(), draws=8, method=method).samples.shape[:2] == (1, 8)
    with pytest.raises(DiffinvError, match="max_batch 0"):
        reconstruct(data, Squares(), draws=8, method=method, max_batch=0)


def test_reconstruct_finds_its_batch_and_the_draws_do_not_depend_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Observation(torch.ones(2, *SHAPE), Identity(SHAPE), Gaussian(torch.tensor([0.3])))
    method = Method(guidance=PseudoInverse(1.0), steps=4, schedule=LogUniform(0.1, 10.0))
    whole = reconstruct(data, Squares(), draws=4, method=method)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**17)
    prior = Squares()
    parts = reconstruct(data, prior, draws=4, method=method)
    assert max(prior.batches) < 8
    torch.testing.assert_close(parts.samples, whole.samples, rtol=1e-5, atol=1e-5)
