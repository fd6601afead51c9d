"""Kernel Stein discrepancy: whether draws agree with a *score*, without truth and without a second sampler.

With the score s(x) = ∇ log p(x | y) = ∇ log p(x) + ∇ log p(y | x) and the inverse multiquadric kernel
k = (1 + r²/ℓ²)^−½, r = ‖x − x'‖,

    h(x, x') = sᵀs' k + sᵀ∇'k + s'ᵀ∇k + tr ∇∇'k,   KSD² = (1/M(M − 1)) Σ_{m≠m'} h(x_m, x_m'),   E h = 0 for draws of p.

The null of this degenerate U-statistic for independent draws is the wild bootstrap Σ w_m w_m' h(x_m, x_m')/(M(M − 1)), w = ±1.
Catches: draws that are not of the density whose score is given: wrong width, bias, the prior in place of the posterior. Cannot
catch: an error of the score itself (a wrong prior, blur or noise: sampler and test believe the same), nor wrong weights of well
separated modes. Draws of one sampler run each are independent; the states of one chain are not, and fire.
References: Liu, Lee & Jordan, *A Kernelized Stein Discrepancy for Goodness-of-fit Tests*, 2016, arXiv:1602.03253; Chwialkowski,
Strathmann & Gretton, *A Kernel Test of Goodness of Fit*, 2016, arXiv:1602.02964; Gorham & Mackey, *Measuring Sample Quality with
Kernels*, 2017, arXiv:1703.01717 (the kernel).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffinv.core.checks import ShapeError
from diffinv.core.rng import Rng
from diffinv.core.types import Image, Sigma
from diffinv.likelihood import Likelihood
from diffinv.priors.base import Denoiser
from diffinv.uncertainty.finding import Finding
from diffinv.uncertainty.nulls import REPLICATES, Outcome, one_stream, upper_tail


def posterior_score(prior: Denoiser, likelihood: Likelihood, x: Image, sigma: Sigma) -> Image:
    """(D(x, σ) − x)/σ² + ∇ log p(y | x), the score of the posterior at a small noise level of the prior: (B, *image).

    Arguments: x: (B, *image). sigma: (B,), as small as the prior's card allows; the score is that of the prior blurred with it.
    """
    level = sigma.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return (prior(x, sigma) - x) / level**2 + likelihood.score(x)


def stein_kernel(x: Tensor, score: Tensor) -> Tensor:
    """h of all pairs, ℓ the median distance, zero on the diagonal: (…, M, n), (…, M, n) → (…, M, M).

    Raises: ShapeError unless both have one shape.
    """
    if x.shape != score.shape:
        raise ShapeError(f"stein_kernel: draws {tuple(x.shape)} and scores {tuple(score.shape)} differ; give one score a draw.")
    x, score = x.double(), score.double()
    x = x - x.mean(-2, keepdim=True)
    draws, size = x.shape[-2:]
    off = ~torch.eye(draws, dtype=torch.bool, device=x.device)
    gram = x @ x.mT
    norm = gram.diagonal(dim1=-2, dim2=-1)
    square = (norm[..., :, None] + norm[..., None, :] - 2 * gram).clamp_min(0)
    length = square[..., off].median(-1).values[..., None, None]
    q = 1 + square / length
    cross = score @ x.mT
    along = (score * x).sum(-1)
    pull = along[..., :, None] + along[..., None, :] - cross - cross.mT
    h = (score @ score.mT) * q**-0.5 + pull / length * q**-1.5 + size / length * q**-1.5 - 3 * square / length**2 * q**-2.5
    return torch.where(off, h, 0.0)


def stein_test(x: Tensor, score: Tensor, rng: Rng, *, replicates: int = REPLICATES) -> Outcome:
    """KSD² of draws against its wild bootstrap, small p where draws and score disagree.

    Arguments: x: (…, M, n) independent draws of one posterior, in coordinates of about one unit of spread where possible (for u
        = L⁻¹x the score is Lᵀs). score: (…, M, n). rng: one stream, its signs shared by the leading axes.
    Returns: (…,).
    """
    kernel = stein_kernel(x, score)
    draws = kernel.shape[-1]
    like = torch.empty(1, replicates, draws, dtype=kernel.dtype, device=kernel.device)
    signs = one_stream("stein_test", rng).rademacher(like)[0]
    null = ((signs @ kernel) * signs).sum(-1)
    scale = draws * (draws - 1)
    return upper_tail(kernel.sum((-2, -1)) / scale, null / scale)


def stein(x: Tensor, score: Tensor, rng: Rng, *, quantity: str = "image") -> Finding:
    """`stein_test` of the draws of one object: (M, *image), (M, *image)."""
    return stein_test(x.flatten(1), score.flatten(1), rng).finding("kernel Stein", quantity, 1, x.shape[0])
