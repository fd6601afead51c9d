"""Features that only the prior has seen: `PRIOR_DRIVEN`.

A feature is a connected set of pixels where the high-passed posterior mean h = x̄ − G_s x̄ (G_s a Gaussian of s pixels) stands out,
|h| > t σ. With the template t_R = h on R and 0 elsewhere, and high-passed draws h_m:

    S/N       = ⟨t, h⟩/std_m⟨t, h_m⟩                 matched filter, with the draws' own covariance
    null      = ⟨t, N h⟩/⟨t, h⟩                      share of it that lies in the null space
    shift     = ⟨t, h − h'⟩/std_m⟨t, h_m⟩            move of the mean under the second prior, in σ

It is flagged if S/N > 3, null > ½ and |shift| > 3. Cannot catch a feature that both priors make, nor one that is spread over
the field.
References: Bhadra, Kelkar, Brooks & Anastasio, *On Hallucinations in Tomographic Image Reconstruction*, 2021, arXiv:2012.00646.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy import ndimage
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.core.types import Image
from diffinv.uncertainty.finding import Record


@dataclass(frozen=True)
class Feature(Record):
    """A feature of one band: its label in the map, brightest pixel, number of pixels, and the three numbers of the rule."""

    label: int
    row: int
    column: int
    pixels: int
    signal_to_noise: float
    null_share: float
    shift: float
    prior_driven: bool

    def __str__(self) -> str:
        flag = "PRIOR_DRIVEN" if self.prior_driven else "not flagged"
        return (
            f"feature {self.label} at ({self.row}, {self.column}), {self.pixels} pixels: S/N {self.signal_to_noise:.2f}, "
            f"{self.null_share:.0%} in the null space, moves by {self.shift:.2f} σ under the other prior: {flag}"
        )


@dataclass(frozen=True)
class Rule:
    """Thresholds. smooth: s in pixels. pixel: t, |h|/σ of a feature's pixels. The others: as in the module."""

    smooth: float
    pixel: float = 1.0
    signal_to_noise: float = 3.0
    null_share: float = 0.5
    shift: float = 3.0


def high_pass(image: Tensor, smooth: float) -> Tensor:
    """x − G_s x on the torus, s in pixels: (…, H, W)."""
    rows, columns = (torch.fft.fftfreq(n, dtype=image.dtype, device=image.device) for n in image.shape[-2:])
    gain = 1 - torch.exp(-2 * (math.pi * smooth) ** 2 * (rows[:, None] ** 2 + columns**2))
    return torch.fft.ifft2(gain * torch.fft.fft2(image)).real


def prior_driven(
    samples: Tensor, swapped: Image, null: Callable[[Image], Image], rule: Rule
) -> tuple[Tensor, tuple[Feature, ...]]:
    """Features of one band and whether the rule flags them.

    Arguments: samples: (M, H, W), draws of the posterior, in the image's unit. swapped: (H, W), the posterior mean under the
        second prior. null: the part of an image in the operator's null space, (…, H, W) → (…, H, W), as
        `hallucination.null_part` with its gain. rule.
    Returns: labels (H, W) int64, 0 outside features, and the features, brightest S/N first.
    Raises: DiffinvError for fewer than three draws.
    """
    if len(samples) < 3:
        raise DiffinvError(f"prior_driven: {len(samples)} draws have no useful spread; give at least three.")
    draws = high_pass(samples.double(), rule.smooth)
    mean, std = draws.mean(0), draws.std(0)
    other = high_pass(swapped.double(), rule.smooth)
    labels = _components(mean, rule.pixel * std)
    count = int(labels.max())
    if count == 0:
        return labels, ()
    masks = (labels.flatten() == torch.arange(1, count + 1)[:, None]).double()
    template = masks * mean.flatten()
    power = (template * mean.flatten()).sum(1)
    spread = (template @ draws.flatten(1).T).std(1)
    unseen = template @ high_pass(null(samples.double().mean(0)), rule.smooth).flatten()
    moved = template @ (mean - other).flatten()
    found = [
        _feature(number + 1, template[number], masks[number], values, mean.shape[-1], rule)
        for number, values in enumerate(zip(power / spread, unseen / power, moved / spread, strict=True))
    ]
    return labels, tuple(sorted(found, key=lambda feature: -feature.signal_to_noise))


def _components(mean: Tensor, threshold: Tensor) -> Tensor:
    """Connected sets, pixels touching at edges or corners, of bright and of dark pixels: (H, W) int64."""
    touching = torch.ones(3, 3, dtype=torch.int64).numpy()
    bright, count = ndimage.label((mean > threshold).cpu().numpy(), touching)
    dark, _ = ndimage.label((mean < -threshold).cpu().numpy(), touching)
    bright, dark = torch.from_numpy(bright).long(), torch.from_numpy(dark).long()
    return torch.where(dark > 0, dark + count, bright)


def _feature(label: int, template: Tensor, mask: Tensor, values: tuple[Tensor, ...], width: int, rule: Rule) -> Feature:
    signal, null, shift = (float(v) for v in values)
    flagged = signal > rule.signal_to_noise and null > rule.null_share and abs(shift) > rule.shift
    peak = int(template.abs().argmax())
    return Feature(label, peak // width, peak % width, int(mask.sum()), signal, null, shift, flagged)
