"""A deconvolution whose posterior is a closed form, faults of samplers and of models, and every diagnostic on many studies at
once.

Images of S × S pixels on the torus, Gaussian prior of spectrum P(ν) ∝ (1 + (ν/ν₀)²)⁻², blur ĥ(ν) = exp(−2π²s²ν²), 0 beyond a
cut-off (those frequencies are the null space), white noise σ. In Fourier space the posterior has the gain ĥP/(ĥ²P + σ²) and the
spectrum Pσ²/(ĥ²P + σ²). A study is N objects with M draws each; studies are stacked along axis 0 of p-values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.convolution import PeriodicConvolution
from diffinv.uncertainty import coverage, held_out, predictive, ranks, scores, spread_skill, stein, summaries, tarp
from diffinv.uncertainty.hallucination import hallucination_index, null_part, prior_swap, range_part, wiener_gain
from diffinv.uncertainty.nulls import exchange_test, streams

CORRELATION, CUTOFF = 0.12, 0.45
OBJECTS, DRAWS, MANY_DRAWS = 40, 19, 60
DATA_REPLICATES, REPLICATES = 59, 199


@dataclass(frozen=True)
class Problem:
    """size: S. blur: s in pixels. std: σ, in units of the prior's standard deviation a pixel."""

    size: int = 8
    blur: float = 1.0
    std: float = 0.1

    @property
    def frequency(self) -> Tensor:
        line = torch.fft.fftfreq(self.size, dtype=torch.float64)
        return torch.hypot(line[:, None], line)

    @property
    def transfer(self) -> Tensor:
        return torch.exp(-2 * (math.pi * self.blur * self.frequency) ** 2) * (self.frequency < CUTOFF)

    @property
    def spectrum(self) -> Tensor:
        shape = (1 + (self.frequency / CORRELATION) ** 2) ** -2
        return shape / shape.mean()

    @property
    def posterior_spectrum(self) -> Tensor:
        return self.spectrum * self.std**2 / (self.transfer**2 * self.spectrum + self.std**2)

    @property
    def gain(self) -> Tensor:
        return wiener_gain(self.transfer, self.spectrum, torch.tensor(self.std**2))

    def filtered(self, x: Tensor, factor: Tensor) -> Tensor:
        """F⁻¹ factor F x, as a product with a matrix: (…, 1, S, S)."""
        eye = torch.eye(self.size**2, dtype=torch.float64).reshape(-1, self.size, self.size)
        matrix = torch.fft.ifft2(factor * torch.fft.fft2(eye)).real.flatten(1).to(x.dtype)
        return (x.flatten(-2) @ matrix).unflatten(-1, (self.size, self.size))

    def prior_draws(self, z: Tensor) -> Tensor:
        return self.filtered(z, self.spectrum.sqrt())

    def mean(self, y: Tensor) -> Tensor:
        return self.filtered(y, self.transfer * self.spectrum / (self.transfer**2 * self.spectrum + self.std**2))

    def draws(self, y: Tensor, z: Tensor) -> Tensor:
        """Exact posterior draws: y (B, 1, S, S), z (B, M, 1, S, S) white."""
        return self.mean(y)[:, None] + self.filtered(z, self.posterior_spectrum.sqrt())

    def observation(self, y: Tensor) -> Observation:
        kernel = torch.fft.fftshift(torch.fft.ifft2(self.transfer).real)[None, None].float()
        return Observation(y, PeriodicConvolution(kernel, 1, (self.size, self.size)), Gaussian(torch.tensor([self.std])))

    @property
    def rms(self) -> float:
        """Posterior standard deviation a pixel."""
        return float(self.posterior_spectrum.mean().sqrt())


@dataclass(frozen=True)
class Fault:
    """world: the problem that made the data. draws: (assumed problem, y, z white noise) → the sampler's draws."""

    world: Callable[[Problem], Problem] = lambda assumed: assumed
    draws: Callable[[Problem, Tensor, Tensor], Tensor] = lambda problem, y, z: problem.draws(y, z)


def painted(problem: Problem, part: Callable[[Tensor, Tensor], Tensor], width: float, sigmas: float) -> Tensor:
    """A round feature at the centre, its range or null part, whose peak is some posterior σ: (1, S, S)."""
    line = torch.arange(problem.size) - problem.size // 2
    shape = part(torch.exp(-(line[:, None] ** 2 + line**2) / (2 * width**2)), problem.gain)
    return (sigmas * problem.rms * shape / shape.abs().max())[None]


FAULTS: dict[str, Fault] = {
    "none": Fault(),
    "returns the prior": Fault(draws=lambda p, y, z: p.prior_draws(z)),
    "std × 0.7": Fault(draws=lambda p, y, z: p.draws(y, 0.7 * z)),
    "blur 6 % wider": Fault(world=lambda p: replace(p, blur=1.06 * p.blur)),
    "noise 20 % larger": Fault(world=lambda p: replace(p, std=1.2 * p.std)),
    "bias of 0.2 σ": Fault(draws=lambda p, y, z: p.draws(y, z) + 0.2 * p.rms),
    "feature in the range": Fault(draws=lambda p, y, z: p.draws(y, z) + painted(p, range_part, 1.5, 1.5)),
    "feature in the null space": Fault(draws=lambda p, y, z: p.draws(y, z) + painted(p, null_part, 0.5, 1.5)),
}


def white(rng: Rng, *shape: int) -> Tensor:
    return rng.normal(torch.empty(1, *shape))[0]


@dataclass(frozen=True)
class Studies:
    """R studies of N objects: truth, y (R·N, 1, S, S) and the sampler's draws (R·N, M, 1, S, S), with the means to make more."""

    problem: Problem
    fault: Fault
    count: int
    truth: Tensor
    y: Tensor
    samples: Tensor
    rng: Rng

    @classmethod
    def make(cls, problem: Problem, fault: Fault, count: int, rng: Rng) -> Studies:
        size = (1, problem.size, problem.size)
        world = fault.world(problem)
        truth = world.prior_draws(white(rng, count * OBJECTS, *size))
        y = world.filtered(truth, world.transfer) + world.std * white(rng, count * OBJECTS, *size)
        made = cls(problem, fault, count, truth, y, torch.empty(0), rng)
        return replace(made, samples=made.sampler(problem, y, DRAWS))

    def sampler(self, problem: Problem, y: Tensor, draws: int) -> Tensor:
        """Draws of the faulty sampler for these data, (B, M, 1, S, S), under an assumed problem."""
        return self.fault.draws(problem, y, white(self.rng, len(y), draws, *y.shape[1:]))

    def first(self, values: Tensor) -> Tensor:
        """The first object of every study."""
        return values.unflatten(0, (self.count, OBJECTS))[:, 0]

    def grouped(self, values: Tensor) -> Tensor:
        return values.unflatten(0, (self.count, -1))


PValues = Callable[[Studies, Rng], dict[str, Tensor]]


def summary_set(problem: Problem) -> dict[str, ranks.Summary]:
    direction = summaries.random_direction(torch.empty(1, 1, problem.size, problem.size), Rng([5]))
    centre = problem.size // 2
    return {
        "flux": summaries.flux,
        "half-light radius": summaries.half_light_radius,
        "peak row": summaries.peak_row,
        "power ν < 0.3": lambda x: summaries.band_power(x, 0.0, 0.3),
        "power ν > 0.45": lambda x: summaries.band_power(x, 0.45, 1.0),
        "central pixel": lambda x: summaries.pixel(x, 0, centre, centre),
        "projection": lambda x: summaries.projection(x, direction),
    }


def sbc(null: ranks.UniformRanks) -> PValues:
    def p_values(studies: Studies, rng: Rng) -> dict[str, Tensor]:
        found = {}
        for number, (name, summary) in enumerate(summary_set(studies.problem).items()):
            values = summary(studies.samples.flatten(0, 1)).unflatten(0, studies.samples.shape[:2])
            rank = studies.grouped(ranks.ranks(summary(studies.truth), values, rng.spawn(number)))
            found |= {f"SBC χ², {name}": null.chi2(rank).p_value, f"SBC ECDF, {name}": null.ecdf(rank).p_value}
        return found

    return p_values


def tarp_both(null: ranks.UniformRanks) -> PValues:
    def p_values(studies: Studies, rng: Rng) -> dict[str, Tensor]:
        problem, found = studies.problem, {}
        radius = torch.tensor([problem.rms * problem.size])
        near = tarp.references_near(problem.mean(studies.y), radius, rng.spawn(0))
        blind = problem.prior_draws(white(rng.spawn(1), *studies.truth.shape))
        for number, (name, references) in enumerate({"TARP, θ independent of y": blind, "TARP, θ near x̂(y)": near}.items()):
            rank = tarp.distance_ranks(studies.truth, studies.samples, references, rng.spawn(2 + number))
            found[name] = null.kolmogorov(studies.grouped(rank)).p_value
        return found

    return p_values


def exchanges(studies: Studies, rng: Rng) -> dict[str, Tensor]:
    truth, samples = studies.truth, studies.samples
    k = coverage.order(DRAWS, 0.9)
    bright = studies.y.abs() > 2 * studies.problem.std
    spread, error = spread_skill.spread_error_tables(truth, samples)
    tables = {
        "coverage 90 %": coverage.hit_table(truth, samples, k, rng.spawn(-1))[0],
        "coverage 90 %, S/N > 2": coverage.hit_table(truth, samples, k, rng.spawn(-1), bright)[0],
        "spread–skill": error - spread,
        "CRPS": scores.crps_table(truth, samples),
        "energy score": scores.energy_table(truth, samples),
    }
    return {
        name: exchange_test(studies.grouped(table), rng.spawn(number), REPLICATES).p_value
        for number, (name, table) in enumerate(tables.items())
    }


def without_truth(studies: Studies, rng: Rng) -> dict[str, Tensor]:
    data = studies.problem.observation(studies.y)
    few = torch.arange(studies.count * OBJECTS).unflatten(0, (-1, OBJECTS))[:, : OBJECTS // 3].flatten()
    table = predictive.predictive_table(data.select(few), studies.samples[few], rng.spawn(0), replicates=DATA_REPLICATES)
    seen, held = held_out.split_observation(data, streams(rng.spawn(1), len(studies.y)), share=0.5)
    half = replace(studies.problem, std=studies.problem.std * math.sqrt(2))
    tables = held_out.held_out_tables(held, studies.sampler(half, seen.y, DRAWS), rng.spawn(2))
    shape, width = held_out.held_out_tests(tuple(studies.grouped(t) for t in tables), rng.spawn(4), replicates=REPLICATES)
    return {
        "predictive χ²": exchange_test(studies.grouped(table), rng.spawn(3), REPLICATES).p_value,
        "held-out PIT, shape": shape.p_value,
        "held-out PIT, width": width.p_value,
    }


def one_object(studies: Studies, rng: Rng) -> dict[str, Tensor]:
    """Of the first object of every study: the score, and a second posterior of the same data, here the exact one.

    In coordinates u = V^−½(x − x̂), V the posterior's covariance, the score is −u.
    """
    problem, y = studies.problem, studies.first(studies.y)
    many = studies.sampler(problem, y, MANY_DRAWS)
    second = problem.draws(y, white(rng.spawn(0), len(y), MANY_DRAWS, *y.shape[1:]))
    numbers = summary_set(problem)
    chosen = [numbers[name] for name in ("flux", "power ν < 0.3", "power ν > 0.45", "central pixel")]
    sets = [torch.stack([t(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for t in chosen], -1) for x in (many, second)]
    whitened = problem.filtered(many - problem.mean(y)[:, None], problem.posterior_spectrum**-0.5).flatten(2)
    return {
        "kernel Stein": stein.stein_test(whitened, -whitened, rng.spawn(1), replicates=REPLICATES).p_value,
        "prior swap": prior_swap(many, second, rng.spawn(2), replicates=REPLICATES).p_value,
        "hallucination index": hallucination_index(*sets, rng.spawn(3), replicates=DATA_REPLICATES).p_value,
    }


def diagnostics(rng: Rng) -> tuple[PValues, ...]:
    """Every diagnostic as a function of studies; the nulls of ranks are simulated once."""
    null = ranks.UniformRanks(OBJECTS, DRAWS, 8, rng)
    return sbc(null), tarp_both(null), exchanges, without_truth, one_object


def p_values(problem: Problem, fault: Fault, studies: int, rng: Rng, *, chunk: int = 25) -> dict[str, Tensor]:
    """p-values of every diagnostic on so many studies with this fault: name → (studies,)."""
    tests, parts = diagnostics(rng.spawn(-1)), []
    for start in range(0, studies, chunk):
        stream = rng.spawn(start)
        made = Studies.make(problem, fault, min(chunk, studies - start), stream.spawn(0))
        parts.append({name: p for n, test in enumerate(tests) for name, p in test(made, stream.spawn(1 + n)).items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
