"""Images × draws → posterior: the one function between a likelihood, a prior and a `Result`.

Rows of a chunk are (image, draw) pairs; a row's random stream is keyed by (seed, image id, draw), so that the result does
not depend on how rows are chunked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError, check_positive
from diffinv.core.rng import Rng
from diffinv.core.types import Image
from diffinv.engine import pilot as pilots
from diffinv.engine.draws import Method, device_of, draw_rows
from diffinv.engine.memory import rows_that_fit
from diffinv.engine.monitor import Counting, recorded
from diffinv.likelihood import Likelihood
from diffinv.priors.base import Denoiser
from diffinv.priors.store import Prior
from diffinv.priors.tiled import Tiled
from diffinv.uncertainty.hallucination import informativeness
from diffinv.uncertainty.predictive import reduced_chi2
from diffinv.uncertainty.quantiles import quantile

_PILOT_STREAM = 0x5CA1E


@dataclass(frozen=True)
class Result:
    """Posterior draws and what follows from them.

    samples: (B, M, C, H, W) float32, in the image's unit. scale: (B,) flux scale used. method: how it was sampled.
    chi2: (B,) whitened χ² a good datum, of the posterior mean. chi2_draws: (B, M), of each draw.
    network_calls: denoiser evaluations a draw, vjps and the pilots for the scale included. prior_variance: (1, C, H, W) of
    an image of unit scale, or None for a prior without a card. solver_residual: mean relative residual of the guidance's
    solves. indefinite: share of them that met negative curvature, where GMRES is the remedy.
    """

    samples: Tensor
    scale: Tensor
    method: Method
    chi2: Tensor
    chi2_draws: Tensor
    network_calls: float
    prior_variance: Tensor | None
    solver_residual: float = 0.0
    indefinite: float = 0.0

    @property
    def mean(self) -> Image:
        """Posterior mean: (B, C, H, W)."""
        return self.samples.mean(1)

    @property
    def std(self) -> Image:
        """Posterior standard deviation: (B, C, H, W)."""
        return self.samples.std(1)

    def quantile(self, p: float) -> Image:
        """Posterior p-quantile a pixel, at position (M + 1)p: (B, C, H, W)."""
        return quantile(self.samples, p)

    @property
    def information(self) -> Image | None:
        """Data-informativeness `½ ln(Var_prior/Var_posterior)` in nats a pixel, (B, C, H, W): about 0 where the prior speaks."""
        if self.prior_variance is None:
            return None
        prior = self.prior_variance * self.scale.reshape(-1, 1, 1, 1) ** 2
        return informativeness(prior, self.samples.var(1))

    @property
    def calibrated(self) -> bool:
        """Whether the method claims calibrated draws."""
        return self.method.calibrated


def field_prior(prior: Denoiser, shape: Sequence[int]) -> Denoiser:
    """The prior for images (C, H, W): itself where it sees the field whole, otherwise in overlapping tiles."""
    if not isinstance(prior, Prior):
        return prior
    card = prior.card
    if shape[0] != len(card.bands):
        raise ShapeError(
            f"prior {card.name} has bands {card.bands} but the image has {shape[0]}; a grey prior runs band by band."
        )
    if min(shape[-2:]) < card.size:
        raise ShapeError(f"prior {card.name}: the field {tuple(shape[-2:])} is smaller than {card.size}; pad the output grid.")
    return prior if card.sees(shape) else _in_tiles(prior, shape)


def _in_tiles(prior: Prior, shape: Sequence[int]) -> Tiled:
    size = prior.card.size
    return Tiled(prior, size=size, field=(shape[-2], shape[-1]), overlap=size // 4)


def reconstruct(
    likelihood: Likelihood,
    prior: Denoiser,
    *,
    draws: int = 32,
    seed: int | Sequence[int] = 0,
    method: Method = Method(),
    scale: Tensor | None = None,
    image_ids: Sequence[int] | None = None,
    max_batch: int | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Draw from p(x | y) for every image of the batch.

    Arguments: likelihood: p(y | x) of B images, x in the image's own unit. prior: a denoiser, or a `Prior` with a card. draws: M.
        seed: of the run, or one an image. scale: (B,) first guess of each image's rms over the prior's field, in the image's
        unit; needed for a `Prior` with a card (see `diffinv.engine.pilot`), and must be None for another denoiser. image_ids: one
        integer an image, its random streams; default 0 … B − 1. max_batch: rows (images × draws) at once; None: what fits into
        half of the free memory. device: where to run, moving the prior there; None: where the prior is. progress: called with
        (row-steps done, row-steps in all).
    Returns: the posterior draws on the CPU.
    Raises: DiffinvError if a draw is not finite (naming image and draw), ShapeError if prior and image do not fit.
    """
    batch = likelihood.batch
    ids = list(range(batch)) if image_ids is None else list(image_ids)
    device = torch.device(device) if device is not None else device_of(prior)
    likelihood = likelihood.to(device)
    target = field_prior(prior, likelihood.image_shape).to(device)
    if max_batch is None:
        max_batch = max(method.sampler.cloud, rows_that_fit(target, likelihood.image_shape, device))
    counting, (guidance, solves) = Counting(target), recorded(method.guidance)
    watched = replace(method, guidance=guidance)
    unit, spread, streams = torch.ones(batch, device=device), None, Rng.for_draws(seed, ids, draws)
    if not isinstance(prior, Prior) and scale is not None:
        raise DiffinvError("reconstruct: scale= belongs to a prior with a card; this one has its own unit, give the data in it.")
    if isinstance(prior, Prior):
        guess = _check_scale(scale, batch).to(device, torch.float32)
        pilot = Rng.for_draws(seed, ids, pilots.DRAWS).spawn(_PILOT_STREAM)
        unit, spread = pilots.refine_scale(
            likelihood, counting, guess, pilot, card=prior.card, method=method, max_batch=max_batch
        )
    sigmas = pilots.levels(method, spread, prior.card if isinstance(prior, Prior) else None, batch)
    rows = draw_rows(likelihood.scaled(unit), counting, sigmas, streams, method=watched, max_batch=max_batch, progress=progress)
    samples = (rows * unit.repeat_interleave(draws).reshape(-1, 1, 1, 1)).unflatten(0, (batch, draws))
    _check_finite(samples)
    chi2 = reduced_chi2(likelihood, samples.mean(1))
    chi2_draws = torch.stack([reduced_chi2(likelihood, samples[:, m]) for m in range(draws)], 1)
    return Result(
        samples=samples.cpu(),
        scale=unit.cpu(),
        method=method,
        chi2=chi2.cpu(),
        chi2_draws=chi2_draws.cpu(),
        network_calls=counting.rows / (batch * draws),
        prior_variance=_prior_variance(prior, likelihood.image_shape),
        solver_residual=solves.residual if solves else 0.0,
        indefinite=solves.indefinite if solves else 0.0,
    )


def _check_scale(scale: Tensor | None, batch: int) -> Tensor:
    """The first guess of the images' rms, (B,)."""
    if scale is None:
        raise DiffinvError("reconstruct: a prior with a card needs scale=, a first guess of each image's rms (B,).")
    if tuple(scale.shape) != (batch,):
        raise ShapeError(f"reconstruct: scale has shape {tuple(scale.shape)}; give one rms an image, ({batch},).")
    check_positive("reconstruct", "scale", scale, "give the rms of the image over the prior's field, in the image's unit.")
    return scale


def _prior_variance(prior: Denoiser, shape: Sequence[int]) -> Tensor | None:
    """Variance of an image of unit scale, (1, C, H, W), blended of tiles where the field is larger than the card's."""
    if not isinstance(prior, Prior):
        return None
    tiles = _in_tiles(prior, shape).to(prior.variance.device)
    return tiles.blend(prior.variance[:, None].expand(-1, len(tiles.corners), -1, -1, -1)).cpu()


def _check_finite(samples: Tensor) -> None:
    bad = ~samples.isfinite().flatten(2).all(2)
    if bool(bad.any()):
        image, draw = (int(v) for v in bad.nonzero()[0])
        raise DiffinvError(
            f"reconstruct: draw {draw} of image {image} is not finite: the guidance diverged; "
            "use more steps, more solver iterations, or GMRES."
        )
