"""Ranks of a truth among posterior draws, and what uniform ranks look like: simulation-based calibration.

If (x*, y) is a draw of prior × likelihood and x_1 … x_M are draws of p(x | y), the rank of t(x*) among t(x_1) … t(x_M) is
uniform on 0 … M for every summary t, ties broken at random. Two statistics of N ranks:

    χ² = Σ_b (n_b − E_b)²/E_b   over bins of ranks,
    γ  = 2 min_k min{P(C_k ≤ c_k), P(C_k ≥ c_k)},   c_k = #{rank < k},  C_k ~ Bin(N, k/(M + 1)),

the second the most surprising point of the ECDF, whose envelope holds at all k together. Their nulls are N uniform ranks,
simulated. Cannot catch: whatever leaves the ranks of these summaries uniform; a sampler that returns the prior has uniform
ranks of
*every* summary. See `diffinv.uncertainty.tarp` for one that is not blind to it.
References: Talts, Betancourt, Simpson, Vehtari & Gelman, *Validating Bayesian inference algorithms with simulation-based
calibration*, 2018, arXiv:1804.06788; Säilynoja, Bürkner & Vehtari, *Graphical test for discrete uniformity and its applications
in goodness of fit evaluation and multiple sample comparison*, 2022, arXiv:2103.10522.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from scipy.stats import binom
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.core.types import Image
from diffinv.uncertainty.finding import Finding
from diffinv.uncertainty.nulls import Outcome, integers, one_stream, paired, uniforms, upper_tail

NULL_STUDIES = 19999
_CHUNK = 1 << 22  # ranks of a null at once
Summary = Callable[[Image], Tensor]  # (B, C, H, W) → (B,)


def ranks(truth: Tensor, samples: Tensor, rng: Rng) -> Tensor:
    """#{x_m < x*} plus a uniform whole number up to #{x_m = x*}; NaN ranks below all numbers, and ties with itself.

    Arguments: truth: (N, …). samples: (N, M, …), same shape. rng: one stream, for the ties.
    Returns: (N, …) int64 in 0 … M. Raises: ShapeError if they do not fit.
    """
    values = torch.nan_to_num(paired(truth, samples), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    mine, others = values[:, :1], values[:, 1:]
    below, ties = (others < mine).sum(1), (others == mine).sum(1)
    step = uniforms(rng, tuple(ties.shape), ties.new_empty(0, dtype=torch.float64)) * (ties + 1)
    return below + torch.minimum(step.long(), ties)


@dataclass(frozen=True, eq=False)
class UniformRanks:
    """N ranks that are uniform on 0 … M: the nulls of χ² and of the ECDF, from K simulated studies.

    Arguments: objects: N. draws: M. bins: of the χ², at most M + 1. rng: one stream. studies: K.
    Raises: DiffinvError for fewer than two bins or more than M + 1.
    """

    objects: int
    draws: int
    bins: int
    rng: Rng
    studies: int = NULL_STUDIES
    _tails: Tensor = field(init=False, repr=False)
    _chi2: Tensor = field(init=False, repr=False)
    _gamma: Tensor = field(init=False, repr=False)
    _distance: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 2 <= self.bins <= self.draws + 1:
            raise DiffinvError(f"UniformRanks: {self.bins} bins of {self.draws + 1} ranks; take 2 to {self.draws + 1}.")
        object.__setattr__(self, "_tails", _binomial_tails(self.objects, self.draws))
        size = max(1, _CHUNK // self.objects)
        sizes = [min(size, self.studies - start) for start in range(0, self.studies, size)]
        null = (integers(self.rng, self.draws + 1, (rows, self.objects), self._tails) for rows in sizes)
        found = [(self._chi2_of(rank), self._gamma_of(rank), self._distance_of(rank)) for rank in null]
        for name, parts in zip(("_chi2", "_gamma", "_distance"), zip(*found, strict=True), strict=True):
            object.__setattr__(self, name, torch.cat(parts))

    def chi2(self, rank: Tensor) -> Outcome:
        """χ² of the histogram: (…, N) → (…,)."""
        return upper_tail(self._chi2_of(rank), self._chi2)

    def ecdf(self, rank: Tensor) -> Outcome:
        """−ln γ, large where the ECDF leaves the envelope: (…, N) → (…,)."""
        return upper_tail(-self._gamma_of(rank).log(), -self._gamma.log())

    def kolmogorov(self, rank: Tensor) -> Outcome:
        """max_k |c_k/N − k/(M + 1)|, the Kolmogorov–Smirnov distance of discrete ranks: (…, N) → (…,)."""
        return upper_tail(self._distance_of(rank), self._distance)

    def envelope(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Limits of c_k/N, k = 1 … M, that hold all of them together in this share of calibrated studies: two (M,)."""
        gamma = self._gamma.sort().values[round((1 - level) * (self.studies - 1))]
        inside = self._tails >= gamma
        counts = torch.arange(self.objects + 1, dtype=torch.float64) / self.objects
        low = torch.where(inside, counts, torch.inf).amin(1)
        return low, torch.where(inside, counts, -torch.inf).amax(1)

    def _chi2_of(self, rank: Tensor) -> Tensor:
        counts = histogram(rank * self.bins // (self.draws + 1), self.bins)
        share = torch.bincount(torch.arange(self.draws + 1) * self.bins // (self.draws + 1), minlength=self.bins)
        expected = self.objects * share.to(counts) / (self.draws + 1)
        return ((counts - expected) ** 2 / expected).sum(-1)

    def _cumulative(self, rank: Tensor) -> Tensor:
        """c_k, k = 1 … M: (…, M)."""
        return histogram(rank, self.draws + 1).cumsum(-1)[..., :-1]

    def _gamma_of(self, rank: Tensor) -> Tensor:
        count = self._cumulative(rank).long()
        tails = self._tails.to(rank.device).expand(*count.shape, self.objects + 1)
        return tails.gather(-1, count[..., None])[..., 0].amin(-1)

    def _distance_of(self, rank: Tensor) -> Tensor:
        level = torch.arange(1, self.draws + 1, dtype=torch.float64, device=rank.device) / (self.draws + 1)
        return (self._cumulative(rank) / self.objects - level).abs().amax(-1)


def histogram(values: Tensor, bins: int) -> Tensor:
    """How many of the last axis are 0 … bins − 1: (…, N) int64 → (…, bins) float64."""
    counts = torch.zeros(*values.shape[:-1], bins, dtype=torch.float64, device=values.device)
    return counts.scatter_add_(-1, values, torch.ones_like(values, dtype=torch.float64))


def _binomial_tails(objects: int, draws: int) -> Tensor:
    """2 min{P(C ≤ c), P(C ≥ c)} for C ~ Bin(N, k/(M + 1)): (M, N + 1), k = 1 … M, c = 0 … N."""
    count = torch.arange(objects + 1).numpy()[None]
    level = (torch.arange(1, draws + 1, dtype=torch.float64) / (draws + 1)).numpy()[:, None]
    below, above = binom.cdf(count, objects, level), binom.sf(count - 1, objects, level)
    return torch.from_numpy(2 * below).minimum(torch.from_numpy(2 * above))


@dataclass(frozen=True)
class RankFinding(Finding):
    """A finding about ranks, with what its plot needs.

    levels, ecdf, low, high: (M,) k/(M + 1), share of ranks below k, and the simultaneous 95 % envelope.
    """

    levels: tuple[float, ...] = ()
    ecdf: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


def rank_findings(rank: Tensor, draws: int, quantity: str, rng: Rng, *, bins: int | None = None) -> tuple[Finding, RankFinding]:
    """χ² and ECDF of the ranks of N objects.

    Arguments: rank: (N,) in 0 … draws. quantity: its name. rng: one stream, for the null. bins: None gives ten expected a bin.
    """
    objects = len(rank)
    null = UniformRanks(objects, draws, bins or max(2, min(draws + 1, objects // 10)), one_stream("rank_findings", rng))
    level = torch.arange(1, draws + 1, dtype=torch.float64) / (draws + 1)
    share = histogram(rank, draws + 1).cumsum(-1)[:-1] / objects
    curves = tuple(tuple(v.tolist()) for v in (level, share, *null.envelope()))
    chi2 = null.chi2(rank).finding("SBC χ²", quantity, objects, draws)
    return chi2, RankFinding("SBC ECDF", quantity, *null.ecdf(rank).numbers(), objects, draws, *curves)


def sbc(truth: Image, samples: Tensor, summaries: Mapping[str, Summary], rng: Rng) -> tuple[Finding, ...]:
    """Simulation-based calibration of named summaries, two findings a summary: χ² and ECDF.

    Catches bias, wrong width and wrong tails of a summary. Cannot catch a sampler that returns the prior, faults of summaries
    that are not asked for, nor errors of the prior itself unless truths come from elsewhere (then it tests prior and sampler
    together: say which). Many summaries are many tests: of K independent ones at 5 %, one in 20 fires.

    Arguments: truth: (N, C, H, W), from the prior that the sampler uses. samples: (N, M, C, H, W). rng: one stream.
    """
    draws = samples.shape[1]
    found = []
    for number, (name, summary) in enumerate(summaries.items()):
        stream = rng.spawn(number)
        values = summary(samples.flatten(0, 1)).unflatten(0, samples.shape[:2])
        found += rank_findings(ranks(summary(truth), values, stream), draws, name, stream.spawn(1))
    return tuple(found)
