"""Null distributions by simulation: the p-value of a statistic among replicates of it that obey the hypothesis.

Rank among K replicates: p = (1 + #{replicates ≥ t})/(K + 1) is valid at any K: P(p ≤ α) ≤ α, with equality for continuous t
where α (K + 1) is whole.

Relabelling: given the data, the truth and the M draws of a calibrated posterior are exchangeable, M + 1 draws of one
distribution. Whatever is computed of one of them among the others is therefore as likely for each label: a table s(i, j), "what
the statistic of object i would be if draw j were its truth", gives the null of Σ_i s(i, 0) as Σ_i s(i, J_i) with independent
uniform labels J. Pixels of an object keep their dependence, for a label moves them together: no pixel is counted as independent.
A statistic that is not a number has no p-value: NaN, which never fires.
Invariant: all functions act on leading axes (many studies at once) as on one.
References: Besag & Clifford, *Generalized Monte Carlo significance tests*, 1989; Phipson & Smyth, *Permutation p-values should
never be zero*, 2010, arXiv:1603.05766.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError
from diffinv.core.rng import Rng
from diffinv.uncertainty.finding import Finding

REPLICATES = 999
_CHUNK = 1 << 24  # elements of a null at once


@dataclass(frozen=True)
class Outcome:
    """A statistic, the central 95 % of its null and its p-value, each (…,): one a study."""

    statistic: Tensor
    low: Tensor
    high: Tensor
    p_value: Tensor

    def finding(self, diagnostic: str, quantity: str, objects: int, draws: int) -> Finding:
        """The record of a single study."""
        return Finding(diagnostic, quantity, *self.numbers(), objects, draws)

    def numbers(self) -> tuple[float, tuple[float, float], float]:
        """statistic, band and p-value of a single study."""
        return float(self.statistic), (float(self.low), float(self.high)), float(self.p_value)


def findings(each: Outcome, diagnostic: str, quantity: str, draws: int) -> tuple[Finding, ...]:
    """A record an object of an outcome of N objects, named "quantity 0", "quantity 1", …"""
    rows = enumerate(zip(each.statistic, each.low, each.high, each.p_value, strict=True))
    return tuple(Outcome(*values).finding(diagnostic, f"{quantity} {number}", 1, draws) for number, values in rows)


def one_stream(owner: str, rng: Rng) -> Rng:
    """The same stream. Raises: ShapeError unless it is a single one."""
    if len(rng) != 1:
        raise ShapeError(f"{owner}: rng has {len(rng)} streams; a diagnostic uses one, as Rng.for_draws(seed, [0], 1) makes it.")
    return rng


def uniforms(rng: Rng, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uniform numbers of one stream in a shape of one's own, in the dtype and on the device of `like`."""
    return one_stream("uniforms", rng).uniform(like.new_empty((1, *shape)))[0]


def integers(rng: Rng, below: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Whole numbers 0 … below − 1, each as likely, int64."""
    drawn = uniforms(rng, shape, like.new_empty(0, dtype=torch.float64))
    return (drawn * below).long().clamp_max(below - 1)


def upper_tail(statistic: Tensor, null: Tensor) -> Outcome:
    """p = (1 + #{null ≥ t})/(K + 1), small where t is large.

    Arguments: statistic: (…,). null: (…, K) or (K,), replicates of it.
    """
    above = (null >= statistic[..., None]).sum(-1)
    return _outcome(statistic, null, (1 + above).double() / (null.shape[-1] + 1))


def chance(level: float, replicates: int, *, sides: int) -> float:
    """P(p ≤ level) of a continuous statistic among K replicates: sides ⌊level (K + 1)/sides⌋/(K + 1); 0 where K is too small.

    Arguments: sides: 1 of `upper_tail`, 2 of `two_sided`.
    """
    return sides * math.floor(level * (replicates + 1) / sides + 1e-9) / (replicates + 1)


def two_sided(statistic: Tensor, null: Tensor) -> Outcome:
    """p = min(1, 2 min(p_upper, p_lower)), small where t is large or small."""
    replicates = null.shape[-1] + 1
    above = 1 + (null >= statistic[..., None]).sum(-1)
    below = 1 + (null <= statistic[..., None]).sum(-1)
    return _outcome(statistic, null, (2 * torch.minimum(above, below).double() / replicates).clamp_max(1))


def _outcome(statistic: Tensor, null: Tensor, p_value: Tensor) -> Outcome:
    ordered = null.sort(-1).values
    last = null.shape[-1] - 1
    low, high = ordered[..., round(0.025 * last)], ordered[..., round(0.975 * last)]
    unknown = statistic.isnan() | null.isnan().any(-1)
    return Outcome(statistic, low.expand(statistic.shape), high.expand(statistic.shape), torch.where(unknown, torch.nan, p_value))


def relabelled(table: Tensor, rng: Rng, replicates: int = REPLICATES) -> tuple[Tensor, Tensor]:
    """The mean over objects of the true labels, and of random labels.

    Arguments: table: s (…, N, M + 1), label 0 is the truth; objects whose row is NaN are left out. rng: one stream.
    Returns: (…,) and (…, K), float64.
    Raises: DiffinvError if no object has a value.
    """
    values = table.double()
    valid = values.isfinite().all(-1)
    if not bool(valid.any(-1).all()):
        raise DiffinvError("relabelled: no object has a finite statistic; look at the mask and at the draws.")
    values = torch.where(valid[..., None], values, 0.0)
    objects, labels = values.shape[-2:]
    drawn = integers(rng, labels, (replicates, objects), values)
    flat = values.reshape(-1, objects, labels)
    rows = torch.arange(objects, device=values.device)
    size = max(1, _CHUNK // (replicates * objects))
    null = torch.cat([part[:, rows, drawn].sum(-1) for part in flat.split(size)]).reshape(*table.shape[:-2], replicates)
    count = valid.sum(-1)
    return values[..., 0].sum(-1) / count, null / count[..., None]


def exchange_test(table: Tensor, rng: Rng, replicates: int = REPLICATES) -> Outcome:
    """Two-sided relabelling test of the mean of s(i, 0) over objects: table (…, N, M + 1) → (…,)."""
    return two_sided(*relabelled(table, rng, replicates))


def paired(truth: Tensor, samples: Tensor) -> Tensor:
    """Truth and draws as M + 1 labels, label 0 the truth: (N, …), (N, M, …) → (N, M + 1, …).

    Raises: ShapeError if they do not fit.
    """
    if samples.ndim != truth.ndim + 1 or samples.shape[:1] + samples.shape[2:] != truth.shape:
        raise ShapeError(
            f"truth {tuple(truth.shape)} and draws {tuple(samples.shape)} do not fit; give (N, …) and (N, M, …) of one shape."
        )
    return torch.cat([truth[:, None], samples.to(truth.dtype)], 1)


def streams(rng: Rng, rows: int) -> Rng:
    """As many independent streams as rows, from one."""
    return Rng.for_draws(int(one_stream("streams", rng).keys[0]), range(rows), 1)
