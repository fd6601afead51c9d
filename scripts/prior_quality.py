"""How near samples are to images that nobody trained on, and the divergence of two clouds of points."""

from __future__ import annotations

import torch
from gmm_problems import sliced_wasserstein
from torch import Tensor

from diffinv.uncertainty.metrics import adaptive_moments, aperture_flux

_RINGS = 8


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
    return {
        "sliced W1": sliced_wasserstein(samples.flatten(1).double(), images.flatten(1).double()),
        "power, worst ring, dB": float((10 * (ring_power(samples) / ring_power(images)).log10()).abs().max()),
        "size W1": wasserstein(shape.size, true.size),
        "ellipticity W1": wasserstein(ellipticity(shape), ellipticity(true)),
        "flux W1": wasserstein(flux(samples), flux(images)),
    }


def sinkhorn_divergence(a: Tensor, b: Tensor, *, blur: float, iterations: int = 200) -> float:
    """S(a, b) = OT(a, b) − ½ OT(a, a) − ½ OT(b, b), cost ½|x − y|² and entropy `blur`: (N, d), (M, d) in float64.

    The entropy falls geometrically to `blur` over the first half of the iterations.
    References: Feydy et al., *Interpolating between Optimal Transport and MMD using Sinkhorn Divergences*, 2019,
    arXiv:1810.08278.
    """
    return _transport(a, b, blur, iterations) - (_transport(a, a, blur, iterations) + _transport(b, b, blur, iterations)) / 2


def _transport(a: Tensor, b: Tensor, blur: float, iterations: int) -> float:
    """The dual value of entropic transport between uniform weights, by symmetric log-domain updates."""
    cost = torch.cdist(a.double(), b.double()) ** 2 / 2
    f, g = cost.new_zeros(len(a)), cost.new_zeros(len(b))
    log_n, log_m = torch.tensor(float(len(a))).log(), torch.tensor(float(len(b))).log()
    start = float(cost.max())
    for k in range(iterations):
        entropy = max(blur, start * (blur / start) ** min(1.0, 2 * k / iterations))
        f_new = -entropy * (torch.logsumexp((g - cost) / entropy, 1) - log_m)
        g_new = -entropy * (torch.logsumexp((f[:, None] - cost) / entropy, 0) - log_n)
        f, g = (f + f_new) / 2, (g + g_new) / 2
    return float(f.mean() + g.mean())
