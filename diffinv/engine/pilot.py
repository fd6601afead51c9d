"""Pilot draws: a few cheap ones that find the flux scale of each image and where its noise levels should begin."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.engine.draws import Method, draw_rows
from diffinv.likelihood import Likelihood
from diffinv.priors.base import Denoiser
from diffinv.priors.store import PriorCard
from diffinv.schedules import LogUniform

DRAWS, ROUNDS = 2, 2
REACH = 2.0  # spreads of the posterior above which a Gaussian's draws do not depend on the first level (to 0.4 %)


def pilot_method(method: Method) -> Method:
    """A quarter of the steps over the whole range of the card, or the schedule that was asked for; the default sampler
    instead of one that is not guided or moves in clouds."""
    usual = method.sampler.guided and method.sampler.cloud == 1
    return replace(method if usual else Method(schedule=method.schedule), steps=max(8, method.steps // 4))


def refine_scale(
    likelihood: Likelihood, prior: Denoiser, scale: Tensor, rng: Rng, *, card: PriorCard, method: Method, max_batch: int
) -> tuple[Tensor, Tensor]:
    """The rms of each image over the prior's field (B,), and the spread of its posterior in that unit (B,).

    scale: a first guess. The rms is that of two draws under the guess, twice: the norm of blurred data underestimates that of
    the image by a factor that depends on the image; the prior itself, trained with jittered scales, knows it better. The
    spread is ‖x₁ − x₂‖/√2 of the last two draws: the standard deviations of all directions together, more than the largest.
    """
    pilot, pixels = pilot_method(method), len(card.bands) * card.size**2
    schedule = method.schedule or LogUniform(card.sigma_min, card.sigma_max)
    sigmas = schedule.grid(pilot.steps).expand(len(scale), -1)
    for number in range(ROUNDS):
        rows = draw_rows(likelihood.scaled(scale), prior, sigmas, rng.spawn(number), method=pilot, max_batch=max_batch)
        draws = rows.double().unflatten(0, (-1, DRAWS)).flatten(2)
        rms = (draws**2).sum(2).div(pixels).sqrt().mean(1).clamp(0.1, 10)
        scale = scale * rms.to(scale.dtype)
    return scale, (draws[:, 0] - draws[:, 1]).norm(dim=1) / (2**0.5 * rms)


def levels(method: Method, spread: Tensor | None, card: PriorCard | None, images: int) -> Tensor:
    """Noise levels of each image, (B, steps + 1): the method's schedule, or, without one, uniform in ln σ from `REACH` × the
    spread of the image's posterior (B,) down to the smallest level of the card."""
    if method.schedule is not None:
        return method.schedule.grid(method.steps).expand(images, -1)
    if spread is None or card is None:
        raise DiffinvError(
            "reconstruct: a prior without a card needs Method(schedule=...) with sigma_min and sigma_max in its unit."
        )
    start = (REACH * spread).clamp(10 * card.sigma_min, card.sigma_max).tolist()
    return torch.stack([LogUniform(card.sigma_min, first).grid(method.steps) for first in start])
