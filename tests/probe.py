"""Noise probing: the exact mean and covariance of a sampler's output, from one batched run and without Monte Carlo.

With an affine denoiser a sampler is affine in all its normals z, `x = a + Σ_j B_j z_j`. A run whose row 0 has z = 0 and
whose other rows have one element of one z_j at 1 yields a and every column of every B_j; the covariance is Σ_j B_j B_jᵀ.
A truncated inner solve is not linear in its right-hand side: probe with converged ones only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from diffinv.priors.base import Denoiser
from diffinv.samplers.base import Sampler, sample

Slot = tuple[int, ...]  # the keys of `spawn`, then the number of the call


class ProbeRng:
    """Stands in for `Rng`: its normals are 0 while it records which are asked for, then unit vectors, one a row.

    Arguments: slots: sizes of the normals, in order; filled while `recording`. As with `Rng`, the same spawn key gives the same
    numbers. Any other distribution is an AttributeError: it has no probe.
    """

    def __init__(self, slots: dict[Slot, int], *, recording: bool, path: Slot = ()) -> None:
        self.slots, self.recording, self.path = slots, recording, path
        self._count = 0

    def spawn(self, key: int) -> ProbeRng:
        return ProbeRng(self.slots, recording=self.recording, path=(*self.path, key))

    def normal(self, like: Tensor) -> Tensor:
        slot, z = (*self.path, self._count), torch.zeros_like(like)
        self._count += 1
        if not self.recording:
            earlier = itertools.takewhile(lambda other: other != slot, self.slots)
            first, size = 1 + sum(self.slots[other] for other in earlier), self.slots[slot]
            z[first : first + size] = torch.eye(size, dtype=like.dtype).reshape(size, *like.shape[1:])
        else:
            self.slots[slot] = like[0].numel()
        return z


def probe(run: Callable[[Tensor, ProbeRng], Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean (n,) and covariance (n, n) of run(like, rng) → images (B, *shape), affine in the normals of `rng`."""
    slots: dict[Slot, int] = {}
    run(torch.zeros(1, *shape, dtype=torch.float64), ProbeRng(slots, recording=True))
    rows = 1 + sum(slots.values())
    out = run(torch.zeros(rows, *shape, dtype=torch.float64), ProbeRng(slots, recording=False)).flatten(1)
    columns = out[1:] - out[0]
    return out[0], columns.mT @ columns


def probe_sampler(sampler: Sampler, target: Denoiser, sigmas: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Exact mean (n,) and covariance (n, n) of the draws of a sampler; the target must be affine and serve any batch."""
    return probe(lambda like, rng: sample(sampler, target, sigmas, like, rng).x, shape)


def relative(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖, Frobenius."""
    return float((found - exact).norm() / exact.norm())
