"""How near samples are to images that nobody trained on, and two clouds of points to each other."""

from __future__ import annotations

import torch
from gmm_problems import sliced_wasserstein
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from diffinv.uncertainty.metrics import adaptive_moments, aperture_flux

_RINGS = 8
OF_GALAXIES = ("size W1", "ellipticity W1", "flux W1")


def ring_power(x: Tensor) -> Tensor:
    """Mean power in rings of spatial frequency up to Nyquist: (N, C, H, W) → (8,)."""
    rows, columns = torch.fft.fftfreq(x.shape[-2]), torch.fft.fftfreq(x.shape[-1])
    ring = (2 * _RINGS * torch.hypot(rows[:, None], columns)).long()
    power = torch.fft.fft2(x.double(), norm="ortho").abs().square().mean((0, 1))
    return torch.stack([power[ring == k].mean() for k in range(_RINGS)])


def wasserstein(a: Tensor, b: Tensor) -> float:
    """W₁ of two samples of a number over the spread of the second, NaN left out."""
    a, b = (v[v.isfinite()].double() for v in (a, b))
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    return float((a.quantile(u) - b.quantile(u)).abs().mean() / b.std()) if len(a) > 1 else float("nan")


def quality(samples: Tensor, images: Tensor) -> dict[str, float]:
    """Samples of a prior against as many held-out images, (N, 1, H, W) each. 0 is perfect, but for what N images differ by."""
    shape, true = (adaptive_moments(x[:, 0]) for x in (samples, images))
    ellipticity = lambda m: torch.hypot(m.e1, m.e2)
    flux = lambda x: aperture_flux(x[:, 0], x.shape[-1] / 3)
    pairs = ((shape.size, true.size), (ellipticity(shape), ellipticity(true)), (flux(samples), flux(images)))
    of_galaxies = [wasserstein(*pair) for pair in pairs]
    return {
        "sliced W1": sliced_wasserstein(samples.flatten(1).double(), images.flatten(1).double()),
        "power, worst ring, dB": float((10 * (ring_power(samples) / ring_power(images)).log10()).abs().max()),
    } | dict(zip(OF_GALAXIES, of_galaxies, strict=True))


def transport_cost(a: Tensor, b: Tensor) -> float:
    """½ W₂², the mean of ½|x − y|² over the best pairing of two clouds of as many points: (N, d), (N, d), in float64.

    The Sinkhorn divergence of no entropy, exact: along a curve, iterations at a small entropy do not converge (1,000 of them left
    the entropic cost of two clouds of 1,024 points an eighth low at an entropy of 10⁻³), and pairing is faster by far.
    References: Crouse, *On implementing 2D rectangular assignment algorithms*, 2016, doi:10.1109/TAES.2016.140952; Feydy et al.,
    *Interpolating between Optimal Transport and MMD using Sinkhorn Divergences*, 2019, arXiv:1810.08278, for the limit.
    """
    if len(a) != len(b):
        raise ValueError(f"transport_cost: clouds of {len(a)} and {len(b)} points; give as many.")
    cost = (torch.cdist(a.double(), b.double()).square() / 2).numpy()
    return float(cost[linear_sum_assignment(cost)].mean())
