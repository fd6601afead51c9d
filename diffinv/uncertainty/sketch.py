"""Quantiles a pixel of draws that are never held together, in bounded memory and with a guaranteed rank error.

Buffers of k sorted values, each standing for 2^ℓ draws. Two buffers of level ℓ are merged, sorted, and every second value is
kept, at the odd or at the even places: one buffer of level ℓ + 1. All pixels share this structure, so a buffer is one (B, k, …)
tensor and a merge one sort.

Error. Let R(v) be the number of draws ≤ v and R̂(v) the sum of weights of stored values ≤ v. If r of 2k merged values are ≤ v,
keeping odd places counts 2⌈r/2⌉ and keeping even places 2⌊r/2⌋ of them: a merge at level ℓ adds at most 2^ℓ to R̂, or takes at
most 2^ℓ away, at any v and in any order of the draws. With U and D the sums of 2^ℓ over the merges of each kind

    −D ≤ R̂(v) − R(v) ≤ U,

and the place that keeps max(U, D) smaller is taken. So the value read at rank r lies between the order statistics r − U and r +
D of all draws: `rank_error`, the larger of the two, is a proof and not an estimate. With M = k 2^L draws it is about L M/(4k),
and memory k(L + 2). As long as nothing was merged (M < 2k) quantiles are those of `diffinv.uncertainty.quantiles`, and do not
depend on the order of draws; after that only the bound is independent of the order.
References: Munro & Paterson, *Selection and sorting with limited storage*, 1980; Manku, Rajagopalan & Lindsay, *Approximate
medians and other quantiles in one pass and with limited memory*, 1998; Karnin, Lang & Liberty, *Optimal Quantile Approximation
in Streams*, 2016, arXiv:1603.05346.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError
from diffinv.uncertainty.quantiles import fewest_draws


@dataclass(frozen=True, eq=False)
class QuantileSketch:
    """What is kept of `count` draws.

    size: k, values a buffer. loose: (B, j, …), j < k draws that fill no buffer. levels: for each ℓ a buffer (B, k, …) ascending
    along axis 1, or None. over, under: U and D.
    """

    size: int
    count: int
    loose: Tensor
    levels: tuple[Tensor | None, ...] = ()
    over: int = 0
    under: int = 0

    @classmethod
    def empty(cls, shape: tuple[int, ...], size: int, like: Tensor | None = None) -> QuantileSketch:
        """Of no draws of (B, …) images. size: k ≥ 2, even. like: gives dtype and device, float32 on the CPU without it.

        Raises: DiffinvError for another size.
        """
        if size < 2 or size % 2:
            raise DiffinvError(f"QuantileSketch: size must be even and at least 2, got {size}; 64 is a good one.")
        base = torch.empty(0) if like is None else like
        return cls(size, 0, base.new_empty((shape[0], 0, *shape[1:])))

    @property
    def rank_error(self) -> int:
        """max(U, D): how many ranks a quantile may be off, 0 while it is exact."""
        return max(self.over, self.under)

    @property
    def stored(self) -> int:
        """Values kept a pixel."""
        return self.loose.shape[1] + self.size * sum(level is not None for level in self.levels)

    def update(self, samples: Tensor) -> QuantileSketch:
        """With more draws (B, M, …). Raises: ShapeError for other images, DiffinvError for values that are not finite."""
        if samples.shape[:1] + samples.shape[2:] != self.loose.shape[:1] + self.loose.shape[2:]:
            raise ShapeError(
                f"QuantileSketch: draws {tuple(samples.shape)} do not fit {tuple(self.loose.shape)}, axis 1 the draws."
            )
        if not bool(samples.isfinite().all()):
            raise DiffinvError("QuantileSketch: a draw is not finite; a quantile of it has no meaning.")
        found = replace(self, count=self.count + samples.shape[1])
        rows = torch.cat([self.loose, samples.to(self.loose.dtype)], 1)
        full = rows.shape[1] // self.size
        for part in rows[:, : full * self.size].split(self.size, 1):
            if part.shape[1]:
                found = found._placed(part.sort(1).values, 0)
        return replace(found, loose=rows[:, full * self.size :].clone())

    def merge(self, other: QuantileSketch) -> QuantileSketch:
        """Of the draws of both; the bounds add. Raises: DiffinvError for another size."""
        if self.size != other.size:
            raise DiffinvError(f"QuantileSketch: sizes {self.size} and {other.size} differ; make both with one size.")
        found = replace(self, count=self.count + other.count, over=self.over + other.over, under=self.under + other.under)
        for level, buffer in enumerate(other.levels):
            if buffer is not None:
                found = found._placed(buffer, level)
        count = found.count
        return replace(found.update(other.loose), count=count)

    def _placed(self, buffer: Tensor, level: int) -> QuantileSketch:
        """With one more buffer, carried upwards as in binary addition."""
        levels, over, under = list(self.levels), self.over, self.under
        while True:
            levels += [None] * (level + 1 - len(levels))
            held = levels[level]
            if held is None:
                levels[level] = buffer
                return replace(self, levels=tuple(levels), over=over, under=under)
            both = torch.cat([held, buffer], 1).sort(1).values
            odd = over <= under
            over, under = (over + 2**level, under) if odd else (over, under + 2**level)
            levels[level], buffer, level = None, both[:, 0 if odd else 1 :: 2], level + 1

    def quantile(self, p: float) -> Tensor:
        """The p-quantile at position (M + 1)p, linear between ranks: (B, …), exact to `rank_error` ranks.

        Raises: DiffinvError if p is outside (0, 1) or M draws cannot give it.
        """
        if not 0 < p < 1:
            raise DiffinvError(f"QuantileSketch: p must be inside (0, 1), got {p}.")
        if self.count < fewest_draws(p):
            raise DiffinvError(
                f"QuantileSketch: {self.count} draws cannot give p = {p:g}; at least {fewest_draws(p)} are needed."
            )
        position = min(max((self.count + 1) * p, 1.0), float(self.count))
        low = min(math.floor(position + 1e-9), max(self.count - 1, 1))
        lower, upper = self.order_statistics((low, min(low + 1, self.count)))
        return torch.lerp(lower, upper, position - low)

    def order_statistics(self, ranks: tuple[int, ...]) -> tuple[Tensor, ...]:
        """For each rank 1 … M the smallest stored v with R̂(v) ≥ rank: between the true order statistics rank − U and rank + D."""
        held = [(self.loose, 1)] + [(v, 2**level) for level, v in enumerate(self.levels) if v is not None]
        values, order = torch.cat([v for v, _ in held], 1).sort(1)
        weight = torch.cat([torch.full((v.shape[1],), w, device=values.device) for v, w in held])
        mass = weight[order].cumsum(1)
        last = values.shape[1] - 1
        return tuple(values.gather(1, (mass < rank).sum(1, keepdim=True).clamp_max(last))[:, 0] for rank in ranks)
