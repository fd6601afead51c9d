"""diffinv's side of scripts/bench_peers: the same network, operator and data as the peers, in the same precision."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from exact_gaussian import GaussianNetwork, Problem
from peers_worker import Run
from sampler_rows import Row

from diffinv.core.rng import Rng
from diffinv.core.types import Image, Sigma
from diffinv.likelihood import Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.adapters import FromPhysics
from diffinv.posterior import Posterior
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import sample
from diffinv.schedules import LogUniform


class _Prior(Denoiser):
    """The benchmark's network as a prior."""

    def __init__(self, network: GaussianNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Image, sigma: Sigma) -> Image:
        return self.network(x, sigma)


def run(path: Path, row: Row, schedule: LogUniform, *, draws: int, seed: int) -> Run:
    """`draws` draws for each observation of a problem, the draws of one observation next to each other."""
    problem = Problem.load(path)
    streams = Rng.for_draws(seed, range(len(problem.y)), draws)
    repeated = problem.repeated(draws)
    start = time.process_time()
    operator = FromPhysics(problem.operator, problem.operator.in_shape, problem.operator.out_shape)
    noise = Gaussian(torch.full((1, *[1] * len(problem.operator.out_shape)), problem.sigma_y))
    target = Posterior(_Prior(problem.network), Observation(repeated.y, operator, noise), row.guidance)
    like = torch.zeros(len(repeated.y), *problem.operator.in_shape)
    state = sample(row.sampler, target, schedule.grid(row.steps), like, streams)
    seconds = time.process_time() - start
    return Run(state.x.double(), seconds, (problem.tally.forward + problem.tally.vjp) / len(like))
