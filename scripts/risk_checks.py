"""What can be said of a denoised image whose truth nobody knows. Images are in units of the noise, risks in σ² a pixel.

* SURE: the risk from the data and the divergence, for noise of known covariance.
* Half: the risk at y₁ of (y₁, y₂) = split(y), from y₂ and without a divergence. SURE at y₁ must agree with it.
* Residual y − f: its variance and its correlation at a lag of one pixel in the sky and on sources.
* Sky: the mean of f − y there. Flux: Σ (f − y) in an aperture, in units of the data's noise of that sum.
Each is a number an image; means and errors are over images, none of which the method has learnt from.
"""

from __future__ import annotations

import torch
from real_stamps import Stamps
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import MeasuredBatch
from diffinv.losses.sure import Sure
from diffinv.reconstructors.base import Reconstructor
from diffinv.training.adapt import unseen_risk

PROBES, SPLITS, SHARE = 24, 24, 0.8


@torch.no_grad()
def sure(model: Reconstructor, data: Observation, rows: Tensor, probes: int, seed: int) -> Tensor:
    """SURE of each image, mean over probes, in streams of the images' numbers `rows`: (N,)."""
    return torch.stack([Sure()(model, MeasuredBatch(data), Rng.for_draws(seed + k, rows, 1)) for k in range(probes)]).mean(0)


@torch.no_grad()
def halves(model: Reconstructor, data: Observation, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The risk of f(y₁) from y₂, and from SURE at y₁, means over splits, in streams of the images' numbers: two (N,)."""
    found, expected = [], []
    for k in range(SPLITS):
        rng = Rng.for_draws(900 + k, rows, 1)
        (y, noise), (y2, noise2) = data.noise.split(data.y, rng, share=SHARE)
        seen = Observation(y, data.operator, noise)
        found.append(unseen_risk(model, MeasuredBatch(seen, second=Observation(y2, data.operator, noise2))))
        expected.append(sure(model, seen, rows, 1, 7000 + k))
    return torch.stack(found).mean(0), torch.stack(expected).mean(0)


def lag_one(residual: Tensor, mask: Tensor) -> Tensor:
    """Correlation at a lag of one pixel along both axes inside a mask (N, 1, H, W): (N,), NaN where that has no pairs."""
    square = (residual**2 * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)
    down, right = mask[..., 1:, :] & mask[..., :-1, :], mask[..., 1:] & mask[..., :-1]
    total = (residual[..., 1:, :] * residual[..., :-1, :] * down).flatten(1).sum(1)
    total = total + (residual[..., 1:] * residual[..., :-1] * right).flatten(1).sum(1)
    return total / (down.flatten(1).sum(1) + right.flatten(1).sum(1)) / square


def image_checks(model: Reconstructor, stamps: Stamps, rows: Tensor) -> dict[str, Tensor]:
    """All numbers of the images `rows`, (n,) each, and the denoised images, (n, H, W)."""
    data = stamps.observation().select(rows)
    with torch.no_grad():
        f = model(data)
    half, expected = halves(model, data, rows)
    residual, source = data.y - f, stamps.source[rows]
    sky = stamps.sky.expand_as(source)
    noise = stamps.noise.sample(torch.zeros(4096, *f.shape[1:]), Rng.for_draws(41, range(4096), 1))
    flux_error = noise[..., stamps.aperture].sum(-1).std()
    inside = lambda v, mask: (v * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)
    return {
        "image": f[:, 0],
        "sure": sure(model, data, rows, PROBES, 300),
        "half": half,
        "sure of half": expected,
        "residual variance, sky": inside(residual**2, sky),
        "residual variance, source": inside(residual**2, source),
        "residual mean, sky": inside(residual, sky),
        "lag one, sky": lag_one(residual, sky),
        "lag one, source": lag_one(residual, source),
        "f scatter, sky": (inside(f**2, sky) - inside(f, sky) ** 2).clamp_min(0).sqrt(),
        "flux": -residual[..., stamps.aperture].sum(-1)[:, 0] / flux_error,
        "relative flux": -(residual[..., stamps.aperture].sum(-1) / data.y[..., stamps.aperture].sum(-1))[:, 0],
    }


def spread(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error over images, NaN left out; NaN where fewer than two are left."""
    good = values[values.isfinite()].double()
    if len(good) < 2:
        return float("nan"), float("nan")
    return float(good.mean()), float(good.std() / len(good) ** 0.5)
