"""What in an image the data speak of, and what the prior put there.

* Soft projector: with blur ĥ, prior spectrum S and white noise σ_n the Wiener gain g = |ĥ|²S/(|ĥ|²S + σ_n²) is the share of a
  frequency that the data tell. Range part F⁻¹ g F x, null part F⁻¹ (1 − g) F x; they add to x.
* Data-informativeness ½ ln(Var_prior/Var_post), nats a pixel: 0 where the data say nothing.
* Hallucination index: Hellinger distance of Gaussians fitted to summaries of two sets of images,

    H² = 1 − |Σ₁|^¼ |Σ₂|^¼ |Σ̄|^−½ exp(−⅛ Δᵀ Σ̄⁻¹ Δ),   Σ̄ = (Σ₁ + Σ₂)/2, Δ the difference of means.

* Prior swap: how far the mean moves, in posterior σ, under a second prior and the same data.
The last two have a permutation null: if both sets are draws of one distribution, membership is exchangeable. They catch what
the data cannot see, but only if the second prior does not share it.
References: Bhadra, Kelkar, Brooks & Anastasio, *On Hallucinations in Tomographic Image Reconstruction*, 2021, arXiv:2012.00646;
Tivnan et al.,
*Hallucination Index: An Image Quality Metric for Generative Reconstruction Models*, 2024, arXiv:2407.12780.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffinv.core.checks import ShapeError, check_positive
from diffinv.core.rng import Rng
from diffinv.core.types import Image
from diffinv.uncertainty.finding import Finding
from diffinv.uncertainty.nulls import REPLICATES, Outcome, uniforms, upper_tail


def wiener_gain(transfer: Tensor, spectrum: Tensor, noise_variance: Tensor) -> Tensor:
    """g = |ĥ|²S/(|ĥ|²S + σ_n²), 0 … 1, on the plane of fft2.

    Arguments: transfer: ĥ, complex or real, (…, H, W). spectrum: S = E|F x|², F orthonormal, (…, H, W), image's unit squared.
        noise_variance: σ_n², broadcastable, data's unit squared.
    Raises: DiffinvError unless σ_n² > 0.
    """
    check_positive("wiener_gain", "noise_variance", noise_variance, "give the variance of the data's noise.")
    signal = transfer.abs().square() * spectrum
    return signal / (signal + noise_variance)


def range_part(image: Image, gain: Tensor) -> Image:
    """F⁻¹ g F x: what the data tell of an image: (…, H, W)."""
    return torch.fft.ifft2(gain * torch.fft.fft2(image)).real.to(image.dtype)


def null_part(image: Image, gain: Tensor) -> Image:
    """x − F⁻¹ g F x: what only the prior can tell: (…, H, W)."""
    return image - range_part(image, gain)


def informativeness(prior_variance: Tensor, posterior_variance: Tensor) -> Tensor:
    """½ ln(Var_prior/Var_post) in nats, elementwise; a posterior variance of 0 counts as the smallest float32."""
    return 0.5 * torch.log(prior_variance / posterior_variance.clamp_min(torch.finfo(torch.float32).tiny))


def hellinger(first: Tensor, second: Tensor) -> Tensor:
    """Hellinger distance, 0 … 1, of Gaussians fitted to two sets of summaries: (…, M, d), (…, M', d) → (…,).

    Raises: ShapeError if a set has fewer than d + 1 members: its covariance is singular.
    """
    if min(first.shape[-2], second.shape[-2]) <= first.shape[-1]:
        raise ShapeError(
            f"hellinger: {first.shape[-2]} and {second.shape[-2]} members for {first.shape[-1]} summaries; give more."
        )
    (m1, c1), (m2, c2) = _gaussian(first), _gaussian(second)
    middle = (c1 + c2) / 2
    delta = (m1 - m2)[..., None]
    distance = (delta.mT @ torch.linalg.solve(middle, delta))[..., 0, 0]
    logs = torch.logdet(c1) / 4 + torch.logdet(c2) / 4 - torch.logdet(middle) / 2
    return (1 - torch.exp(logs - distance / 8)).clamp_min(0).sqrt()


def _gaussian(values: Tensor) -> tuple[Tensor, Tensor]:
    mean = values.double().mean(-2)
    centred = values.double() - mean[..., None, :]
    return mean, centred.mT @ centred / (values.shape[-2] - 1)


def hallucination_index(first: Tensor, second: Tensor, rng: Rng, *, replicates: int = REPLICATES) -> Outcome:
    """`hellinger` against sets with their members exchanged at random: (…, M, d), (…, M', d) → (…,).

    A distance of two finite sets is positive even if they have one distribution: read it beside its band. Cannot catch what the
    summaries do not see.
    """
    pooled, size = torch.cat([first, second], -2), first.shape[-2]
    order = _orders(rng, replicates, pooled.shape[-2])
    null = torch.stack([hellinger(pooled[..., o[:size], :], pooled[..., o[size:], :]) for o in order], -1)
    return upper_tail(hellinger(first, second), null)


def _orders(rng: Rng, replicates: int, members: int) -> Tensor:
    """Random orders: (K, members) int64."""
    return uniforms(rng, (replicates, members), torch.empty(0, dtype=torch.float64)).argsort(1)


def swap_shift(first: Tensor, second: Tensor) -> Image:
    """(x̄₁ − x̄₂)/σ₁ a pixel, in posterior σ of the first prior: (M, *image), (M', *image) → (*image)."""
    return (first.mean(-4) - second.mean(-4)) / first.std(-4)


def prior_swap(first: Tensor, second: Tensor, rng: Rng, *, replicates: int = REPLICATES) -> Outcome:
    """Largest |x̄₁ − x̄₂| over pixels in units of the pooled σ, against members exchanged at random.

    Small p: the two priors give different means, more than so few draws differ by chance. That is no fault by itself: it says
    that the answer there is the prior's. Cannot catch what both priors believe.

    Arguments: first: (…, M, C, H, W), draws under one prior. second: (…, M', C, H, W), same data. rng: one stream.
    """
    pooled, size = torch.cat([first, second], -4), first.shape[-4]
    scale = pooled.std(-4).flatten(-3)
    items = torch.where(scale[..., None, :] > 0, pooled.flatten(-3) / scale[..., None, :], 0.0)  # alike in all draws: no move
    weight = torch.full((replicates + 1, pooled.shape[-4]), -1 / second.shape[-4], dtype=items.dtype)
    weight[0, :size] = 1 / size
    weight[1:].scatter_(1, _orders(rng, replicates, pooled.shape[-4])[:, :size], 1 / size)
    values = (weight.to(items.device) @ items).abs().amax(-1)
    return upper_tail(values[..., 0], values[..., 1:])


def prior_swap_finding(first: Tensor, second: Tensor, rng: Rng) -> Finding:
    """`prior_swap` of one object: (M, C, H, W), (M', C, H, W)."""
    return prior_swap(first, second, rng).finding("prior swap", "posterior mean", 1, first.shape[0])
