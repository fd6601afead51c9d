"""Held-out data: split y into independent y₁ and y₂, sample x | y₁, and ask where y₂ falls among its predictions A x_m + n₂.

Given y₁, the true x and calibrated draws are exchangeable, hence so are y₂ and the M replicates y₂ᵐ = A x_m + n₂. Of each of
these M + 1 data sets the PIT u of every pixel is its rank among the others; two numbers say how far they are from uniform,

    W = 1/(12 m) + Σ_i (u_(i) − (2i − 1)/2m)²      shape: Cramér–von Mises over the m good pixels, large for a shift,
    Z = (1/m) Σ_i Φ⁻¹(u_i)²                         width: large where predictions are too narrow, small where too wide.

Pixels are dependent given y₁ (they share x), so neither has a textbook null: the replicates are it, object by object.
Catches: wrong noise, draws that are too wide, too narrow or biased in what the data see; without truth. Cannot catch: the null
space of the operator; a fault that y₁ and y₂ share (an error in both exposures; a wrong σ with which one exposure is split
leaves them correlated and hides part of itself); a sampler that does not look at y₁ and returns the prior, for y₂ is then one
more draw
of the prior predictive: `diffinv.uncertainty.predictive` catches that one.
References: Gelman, Meng & Stern, *Posterior predictive assessment of model fitness via realized discrepancies*, 1996; Dawid,
*Statistical theory: the prequential approach*, 1984; Pang, Zheng, Quan & Ji, *Recorrupted-to-Recorrupted*, 2021 (splitting one
exposure).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffinv.core.checks import UnsupportedError
from diffinv.core.rng import Rng
from diffinv.likelihood import Joint, Likelihood, Observation
from diffinv.uncertainty.coverage import item_ranks
from diffinv.uncertainty.finding import Finding
from diffinv.uncertainty.nulls import (
    REPLICATES,
    Outcome,
    exchange_test,
    findings,
    paired,
    relabelled,
    streams,
    two_sided,
    upper_tail,
)


def split_observation(observation: Observation, rng: Rng, *, share: float) -> tuple[Observation, Observation]:
    """Two independent observations of the same image: the one to sample from, and the one to hold out.

    Arguments: rng: B streams. share: of the information that the first keeps.
    Raises: UnsupportedError where the noise cannot be split.
    """
    (y1, noise1), (y2, noise2) = observation.noise.split(observation.y, rng, share=share)
    return replace(observation, y=y1, noise=noise1), replace(observation, y=y2, noise=noise2)


def split_likelihood(likelihood: Likelihood, rng: Rng, *, share: float) -> tuple[Likelihood, Likelihood]:
    """`split_observation` of every part of one. Raises: UnsupportedError for noise that cannot be split, or without data."""
    if isinstance(likelihood, Observation):
        return split_observation(likelihood, rng, share=share)
    if isinstance(likelihood, Joint):
        pairs = [split_likelihood(part, rng.spawn(k), share=share) for k, part in enumerate(likelihood.parts)]
        return Joint(tuple(p[0] for p in pairs)), Joint(tuple(p[1] for p in pairs))
    raise UnsupportedError(f"split_likelihood: {type(likelihood).__name__} has no data to hold out.")


def likelihood_tables(held: Likelihood, samples: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
    """`held_out_tables`, the mean over the parts of a joint likelihood: two (N, M + 1)."""
    if isinstance(held, Joint):
        tables = [likelihood_tables(part, samples, rng.spawn(k)) for k, part in enumerate(held.parts)]
        return tuple(torch.stack(each).mean(0) for each in zip(*tables, strict=True))
    return held_out_tables(held, samples, rng)


def predictions(held: Observation, samples: Tensor, rng: Rng) -> Tensor:
    """A x_m + n₂ of every draw: (N, M, *data). samples: (N, M, *image), drawn without y₂. rng: one stream."""
    objects, draws = samples.shape[:2]
    mean = held.operator.repeat(draws)(samples.flatten(0, 1))
    return held.noise.repeat(draws).sample(mean, streams(rng, objects * draws)).unflatten(0, (objects, draws))


def held_out_tables(held: Observation, samples: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
    """W and Z of y₂ (label 0) and of its replicates among each other: two (N, M + 1).

    Arguments: held: the observation that no draw has seen. samples: (N, M, *image). rng: one stream.
    """
    items = paired(held.y.expand(samples.shape[0], *held.y.shape[1:]), predictions(held, samples, rng.spawn(0)))
    good = held.noise.variance(items[:, 0]).isfinite().flatten(1)[:, None].expand(-1, items.shape[1], -1)
    rank = item_ranks(items, rng.spawn(1))
    pit = (rank.flatten(2).double() + 0.5) / items.shape[1]
    score = torch.where(good, torch.special.ndtri(pit), 0.0)
    return _cramer_von_mises(torch.where(good, pit, torch.inf), good.sum(2)), score.pow(2).sum(2) / good.sum(2)


def _cramer_von_mises(pit: Tensor, count: Tensor) -> Tensor:
    """W of the finite values of the last axis, `count` of them: (…, m), (…,) → (…,)."""
    number = torch.arange(1, pit.shape[-1] + 1, dtype=pit.dtype, device=pit.device)
    total = count[..., None].to(pit.dtype)
    gaps = (pit.sort(-1).values - (2 * number - 1) / (2 * total)) ** 2
    return torch.where(number <= total, gaps, 0.0).sum(-1) + 1 / (12 * count)


def held_out_tests(tables: tuple[Tensor, Tensor], rng: Rng, *, replicates: int = REPLICATES) -> tuple[Outcome, Outcome]:
    """Means over objects against random labels: W is tested for being large, Z on both sides. Tables (…, N, M + 1) → (…,)."""
    shape, width = tables
    return upper_tail(*relabelled(shape, rng.spawn(0), replicates)), exchange_test(width, rng.spawn(1), replicates)


def held_out_pit(held: Observation, samples: Tensor, rng: Rng) -> tuple[Finding, ...]:
    """Shape and width of the PIT, a finding of each an object (p ≥ 1/(M + 1)) and, for more than one, of their means at the end.

    Arguments: as `held_out_tables`.
    """
    objects, draws = samples.shape[:2]
    tables = held_out_tables(held, samples, rng)
    shape, width = tables
    found = findings(upper_tail(shape[:, 0], shape[:, 1:]), "held-out PIT, shape", "object", draws)
    found += findings(two_sided(width[:, 0], width[:, 1:]), "held-out PIT, width", "object", draws)
    if objects > 1:
        for name, outcome in zip(("shape", "width"), held_out_tests(tables, rng.spawn(2)), strict=True):
            found += (outcome.finding(f"held-out PIT, {name}", "mean of objects", objects, draws),)
    return found
