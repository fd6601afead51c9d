"""Rows of draws in chunks: how to sample, and the loop over what fits in memory at once.

Invariant: a row's result does not depend on how rows are chunked, nor on the other images of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.guidance.base import Gmres, Guidance
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.likelihood import Likelihood
from diffinv.posterior import Posterior
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import Sampler, sample
from diffinv.samplers.sde import StochasticMultistep
from diffinv.schedules import Schedule

INNER = 7  # products of the preconditioner at the first iteration; they call no network


@dataclass(frozen=True)
class Method:
    """How to sample.

    sampler, guidance: objects. steps: noise levels. schedule: None is uniform in ln σ, from twice the spread of each image's
    posterior, as pilot draws find it, down to the smallest level of the prior's card.
    """

    sampler: Sampler = StochasticMultistep()
    guidance: Guidance = MomentMatching(Gmres(iterations=8, tol=1e-3, inner=INNER))
    steps: int = 20
    schedule: Schedule | None = None

    @property
    def calibrated(self) -> bool:
        """Whether sampler and, if it is used, guidance claim draws of the posterior."""
        return self.sampler.calibrated and (self.guidance.calibrated or not self.sampler.guided)


def draw_rows(
    likelihood: Likelihood,
    prior: Denoiser,
    sigmas: Tensor,
    streams: Rng,
    *,
    method: Method,
    max_batch: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draws in the unit of the likelihood's argument, the draws of an image in consecutive rows: (B · draws, *image).

    Arguments: sigmas: (B, N + 1), the levels of each image. streams: one a row, so B · draws of them.
    """
    images = len(sigmas)
    row_image = torch.arange(images).repeat_interleave(len(streams) // images)
    device = device_of(prior)
    size = _chunk_rows(method.sampler, len(streams) // images, max_batch)
    done = []
    for start in range(0, len(row_image), size):
        rows = slice(start, min(start + size, len(row_image)))
        part = likelihood.select(row_image[rows].to(device))
        like = torch.zeros(rows.stop - rows.start, *likelihood.image_shape, device=device)
        target = Posterior(prior, part, method.guidance)
        report = _progress(progress, rows, len(row_image), sigmas.shape[1] - 1)
        levels, rng = sigmas[row_image[rows].to(sigmas.device)], streams.select(rows).to(device)
        done.append(sample(method.sampler, target, levels, like, rng, progress=report).x)
    return torch.cat(done)


def device_of(prior: Denoiser) -> torch.device:
    """Where a prior lives; the CPU if it has no tensors."""
    tensors = [*prior.parameters(), *prior.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _chunk_rows(sampler: Sampler, draws: int, max_batch: int) -> int:
    """Rows at once: whole clouds, as many as fit."""
    if draws % sampler.cloud:
        raise DiffinvError(f"reconstruct: {draws} draws are no multiple of the sampler's cloud of {sampler.cloud}; ask for one.")
    if max_batch < max(1, sampler.cloud):
        raise DiffinvError(
            f"reconstruct: max_batch {max_batch} is less than a cloud of {sampler.cloud}, which cannot be split; raise it."
        )
    return max_batch // sampler.cloud * sampler.cloud


def _progress(progress, rows: slice, total: int, steps: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    return lambda step: progress(rows.start * steps + step * (rows.stop - rows.start), total * steps)
