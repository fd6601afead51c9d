"""One tiny loss a registered name, with the noises and operators that it supports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffinv.losses.ambient import Ambient, AmbientSure, BelowNoise, Consistency
from diffinv.losses.base import Loss, Total
from diffinv.losses.denoisers import Neighbor2Neighbor, Noise2Score
from diffinv.losses.denoising import DenoisingScoreMatching
from diffinv.losses.derivative import ForwardMode
from diffinv.losses.equivariant import EquivariantImaging, MeasurementConsistency, MultiOperatorImaging
from diffinv.losses.incomplete import Fill, MaskedAmbient, SpectralAmbient
from diffinv.losses.recorrupted import Recorrupted
from diffinv.losses.splitting import Noise2Void, RandomHiding, Splitting
from diffinv.losses.supervised import Noise2Noise, Supervised
from diffinv.losses.sure import FirstOrderSure, ShiftedSure, Sure
from diffinv.losses.unsure import Unsure, White
from diffinv.losses.virtual import VirtualOperators
from diffinv.operators.groups import Flips
from diffinv.schedules import LogNormal, LogUniform

GAUSSIAN = ("gaussian", "gaussian_correlated")
COUNTING = ("poisson", "poisson_gaussian")
EVERY = (*GAUSSIAN, *COUNTING, "heteroscedastic_gaussian", "gamma")
SPLITS = (*GAUSSIAN, "poisson", "gamma")
WEIGHT = torch.linspace(0.5, 2, 24, dtype=torch.float64).reshape(1, 2, 3, 4)
INDEPENDENT = tuple(name for name in EVERY if name != "gaussian_correlated")

LEVELS = LogUniform(0.05, 20.0)
NOISY_IMAGES = ("ambient", "ambient_sure", "below_noise", "consistency")
DENOISERS = ("denoising_score_matching", *NOISY_IMAGES, "masked_ambient", "spectral_ambient")


def fill() -> Fill:
    """For images (2, 3, 4): a spectrum, and variances of four rows of which one sees the lowest frequencies alone."""
    one = torch.ones(1, 2, 3, 4, dtype=torch.float64)
    lowest = one.clone()
    lowest[..., 1:, :] = torch.inf
    return Fill(0.3 * one, 0.7 * one, torch.cat([0.2 * one, 0.5 * one, 0.9 * one, lowest]))


@dataclass(frozen=True)
class LossCase:
    """loss; noises: registered names that it is unbiased for (all others are refused); rows for a z-test."""

    loss: Loss
    noises: tuple[str, ...] = ()
    rows: int = 16000


CASES: dict[str, Callable[[], LossCase]] = {
    "supervised": lambda: LossCase(Supervised(), EVERY),
    "noise2noise": lambda: LossCase(Noise2Noise(), EVERY),
    "recorrupted": lambda: LossCase(Recorrupted(0.7), SPLITS),
    "sure": lambda: LossCase(Sure(), GAUSSIAN),
    "shifted_sure": lambda: LossCase(ShiftedSure(6), (*COUNTING, "gamma"), rows=12000),
    "first_order_sure": lambda: LossCase(FirstOrderSure()),
    "unsure": lambda: LossCase(Unsure(White().start(0.25), White())),
    "splitting": lambda: LossCase(Splitting(RandomHiding(0.6)), INDEPENDENT),
    "virtual_operators": lambda: LossCase(VirtualOperators(Splitting(RandomHiding(0.6)), Flips()), INDEPENDENT),
    "total": lambda: LossCase(Total(((0.5, Sure()), (2.0, Recorrupted(0.5)))), GAUSSIAN),
    "measurement_consistency": lambda: LossCase(MeasurementConsistency()),
    "equivariant_imaging": lambda: LossCase(EquivariantImaging(Flips(), noisy=True)),
    "multi_operator_imaging": lambda: LossCase(MultiOperatorImaging(noisy=False)),
    "noise2void": lambda: LossCase(Noise2Void(0.2, 1)),
    "neighbor2neighbor": lambda: LossCase(Neighbor2Neighbor(1.0)),
    "noise2score": lambda: LossCase(Noise2Score(0.05)),
    "denoising_score_matching": lambda: LossCase(DenoisingScoreMatching(LogNormal(-0.7, 1.7), 1.0)),
    "ambient": lambda: LossCase(Ambient(LEVELS, 1.0), GAUSSIAN),
    "ambient_sure": lambda: LossCase(AmbientSure(LEVELS, 1.0, ForwardMode()), GAUSSIAN),
    "below_noise": lambda: LossCase(BelowNoise(LEVELS, 1.0)),
    "consistency": lambda: LossCase(Consistency(LEVELS, 1.0)),
    "masked_ambient": lambda: LossCase(MaskedAmbient(LEVELS, 1.0, 0.7), ("gaussian",)),
    "spectral_ambient": lambda: LossCase(SpectralAmbient(LEVELS, 1.0, fill()), GAUSSIAN),
}

VARIANTS: dict[str, Callable[[], LossCase]] = {
    "recorrupted, little seen": lambda: LossCase(Recorrupted(0.3), SPLITS),
    "sure, forward mode": lambda: LossCase(Sure(ForwardMode()), GAUSSIAN),
    "sure, weighted": lambda: LossCase(
        Sure(weight=torch.linspace(0.5, 2, 24, dtype=torch.float64).reshape(1, 2, 3, 4)), GAUSSIAN
    ),
    "splitting, SURE on what is kept": lambda: LossCase(Splitting(RandomHiding(0.6), Sure()), ("gaussian",)),
    "splitting, R2R on what is kept": lambda: LossCase(
        Splitting(RandomHiding(0.6), Recorrupted(0.6)), ("gaussian", "poisson", "gamma")
    ),
}
