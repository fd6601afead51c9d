"""Coverage of pixel intervals by order statistics, with errors that know that pixels of an object are one.

The k-th to the (M + 1 − k)-th of M draws hold the truth with probability 1 − 2k/(M + 1), whatever the distribution. By ranks: the
truth's rank r among the draws of its pixel has k ≤ r ≤ M − k. Coverage over pixels has the mean of that probability, but not the
variance of independent pixels: the null moves whole objects (`diffinv.uncertainty.nulls`), and errors are those of N objects,

    Var[Σ_i h_i/Σ_i n_i] ≈ Σ_i (h_i − p̂ n_i)²/(Σ n_i)²,   h_i hits among n_i pixels of object i.

Pixels are grouped by what is known without the truth: by S/N of the data, on and off a source that is found in the data. Groups
made from the truth, or from the mean of the same draws, have another coverage than the nominal one even for exact draws.
References: Wilks, *Determination of sample sizes for setting tolerance limits*, 1941; Liang & Zeger, *Longitudinal data
analysis using generalized linear models*, 1986 (clustered errors).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.uncertainty.finding import Finding
from diffinv.uncertainty.nulls import exchange_test, paired, uniforms


def order(draws: int, level: float) -> int:
    """k of the widest-spaced pair that covers at least `level`: ⌊(1 − level)(M + 1)/2⌋.

    Raises: DiffinvError if M draws cannot give it: 19 are needed for 90 %, 39 for 95 %.
    """
    if not 0 < level < 1:
        raise DiffinvError(f"coverage: level must be inside (0, 1), got {level}.")
    position = (1 - level) * (draws + 1) / 2
    if position < 1 - 1e-9:
        fewest = math.ceil(2 / (1 - level) - 1e-9) - 1
        raise DiffinvError(f"coverage: {draws} draws cannot give an interval of {level:.3g}; at least {fewest} are needed.")
    return math.floor(position + 1e-9)


def item_ranks(items: Tensor, rng: Rng) -> Tensor:
    """Rank of each of M + 1 labels among the others, pixel by pixel: (N, M + 1, …) → int64 in 0 … M.

    Ties go by an order of the labels that is drawn for each object, so that no label is favoured. rng: one stream.
    """
    order = uniforms(rng, tuple(items.shape[:2]), items.new_empty(0, dtype=torch.float64)).argsort(1)
    rows = torch.arange(len(items), device=items.device)[:, None]
    place = items[rows, order].argsort(dim=1, stable=True)
    number = torch.arange(items.shape[1], device=items.device).reshape(-1, *[1] * (items.ndim - 2)).expand(items.shape[1:])
    rank = torch.empty_like(place).scatter_(1, place, number.expand_as(place))
    return torch.empty_like(rank).index_put_((rows, order), rank)


def hit_table(truth: Tensor, samples: Tensor, k: int, rng: Rng, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How many of an object's pixels are inside the interval if label j were its truth, and the number of its pixels.

    Arguments: truth: (N, …). samples: (N, M, …). k: from `order`. rng: one stream, for ties. mask: (N, …) bool,
        pixels that count; None is all.
    Returns: hits (N, M + 1), number of pixels, and count (N,).
    """
    rank = item_ranks(paired(truth, samples), rng)
    inside = ((rank >= k) & (rank <= samples.shape[1] - k)).flatten(2)
    good = torch.ones_like(truth, dtype=torch.bool) if mask is None else mask
    hits = (inside & good.flatten(1)[:, None]).double().sum(2)
    return hits, good.flatten(1).double().sum(1)


@dataclass(frozen=True)
class CoverageFinding(Finding):
    """Coverage of one group of pixels.

    statistic: the coverage. nominal: 1 − 2k/(M + 1). error: clustered by object. pixels: how many.
    """

    nominal: float = 0.0
    error: float = 0.0
    pixels: int = 0

    def extra(self) -> str:
        return f", nominal {self.nominal:.4g}, error {self.error:.2g}, {self.pixels} pixels"


def coverage(
    truth: Tensor, samples: Tensor, level: float, rng: Rng, *, mask: Tensor | None = None, quantity: str = "pixels"
) -> CoverageFinding:
    """How often intervals between order statistics hold the truth, with a relabelling null.

    Catches intervals that are too narrow or too wide on average over the group. Cannot catch errors that balance within it, nor,
    in groups that do not depend on the data, a sampler that returns the prior.

    Arguments: truth: (N, …). samples: (N, M, …). level: wanted; the nominal one is at least it. rng: one stream. mask: (N, …)
        bool, the group, from the data alone. quantity: its name.
    Raises: DiffinvError for too few draws or an empty group.
    """
    objects, draws = samples.shape[:2]
    k = order(draws, level)
    hits, pixels = hit_table(truth, samples, k, rng.spawn(0), mask)
    total = pixels.sum()
    if total == 0:
        raise DiffinvError(f"coverage: no pixel belongs to '{quantity}'; drop the group.")
    share = hits[:, 0].sum() / total
    error = (hits[:, 0] - share * pixels).pow(2).sum().sqrt() / total
    unit = objects / total
    statistic, band, p_value = exchange_test(hits * unit, rng.spawn(1)).numbers()
    return CoverageFinding(
        "coverage", quantity, statistic, band, p_value, objects, draws, 1 - 2 * k / (draws + 1), float(error), int(total)
    )


def signal_to_noise_bins(signal_to_noise: Tensor, edges: tuple[float, ...]) -> dict[str, Tensor]:
    """Masks of pixels by S/N: {"S/N < 1": …, "S/N 1 – 3": …, …}.

    Arguments: signal_to_noise: (N, …), of the data or of a first fit, never of the truth. edges: ascending.
    """
    limits = (-math.inf, *edges, math.inf)
    names = [
        f"S/N < {edges[0]:g}",
        *(f"S/N {a:g} – {b:g}" for a, b in zip(edges, edges[1:], strict=False)),
        f"S/N > {edges[-1]:g}",
    ]
    pairs = zip(limits, limits[1:], strict=False)
    return {name: (signal_to_noise >= a) & (signal_to_noise < b) for name, (a, b) in zip(names, pairs, strict=True)}


def coverage_by_group(
    truth: Tensor, samples: Tensor, level: float, masks: dict[str, Tensor], rng: Rng
) -> tuple[CoverageFinding, ...]:
    """`coverage` of every group that has pixels, a finding a group."""
    return tuple(
        coverage(truth, samples, level, rng.spawn(number), mask=mask, quantity=name)
        for number, (name, mask) in enumerate(masks.items())
        if bool(mask.any())
    )
