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
from diffinv.engine.monitor import Counting, recorded
from diffinv.guidance.base import Gmres, Guidance
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.likelihood import Likelihood
from diffinv.posterior import Posterior
from diffinv.priors.base import Denoiser
from diffinv.priors.store import Prior
from diffinv.priors.tiled import Tiled
from diffinv.samplers.base import Sampler, sample
from diffinv.samplers.sde import StochasticMultistep
from diffinv.schedules import Karras, Schedule
from diffinv.uncertainty.quantiles import quantile

PILOT_DRAWS, PILOT_ROUNDS = 2, 2
_PILOT_STREAM = 0x5CA1E


@dataclass(frozen=True)
class Method:
    """How to sample.

    sampler, guidance: objects. steps: noise levels. schedule: None takes the range of the prior's card.
    """

    sampler: Sampler = StochasticMultistep()
    guidance: Guidance = MomentMatching(Gmres(iterations=12, tol=1e-3))
    steps: int = 24
    schedule: Schedule | None = None

    @property
    def calibrated(self) -> bool:
        """Whether sampler and, if it is used, guidance claim draws of the posterior."""
        return self.sampler.calibrated and (self.guidance.calibrated or not self.sampler.guided)


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
        return 0.5 * torch.log(prior / self.samples.var(1).clamp_min(torch.finfo(torch.float32).tiny))

    @property
    def calibrated(self) -> bool:
        """Whether the method claims calibrated draws."""
        return self.method.calibrated


def field_prior(prior: Denoiser, shape: Sequence[int]) -> Denoiser:
    """The prior for images (C, H, W): itself, or tiled with overlapping tiles where the field is larger than the card's."""
    if not isinstance(prior, Prior):
        return prior
    card = prior.card
    if shape[0] != len(card.bands):
        raise ShapeError(
            f"prior {card.name} has bands {card.bands} but the image has {shape[0]}; a grey prior runs band by band."
        )
    if min(shape[-2:]) < card.size:
        raise ShapeError(f"prior {card.name}: the field {tuple(shape[-2:])} is smaller than {card.size}; pad the output grid.")
    if tuple(shape[-2:]) == (card.size, card.size):
        return prior
    return Tiled(prior, size=card.size, field=(shape[-2], shape[-1]), overlap=card.size // 4)


def reconstruct(
    likelihood: Likelihood,
    prior: Denoiser,
    *,
    draws: int = 32,
    seed: int = 0,
    method: Method = Method(),
    scale: Tensor | None = None,
    image_ids: Sequence[int] | None = None,
    max_batch: int = 64,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Draw from p(x | y) for every image of the batch.

    Arguments:
        likelihood: p(y | x) of B images, x in the image's own unit. prior: a denoiser, or a `Prior` with a card.
        draws: M. seed: of the run. scale: (B,) first guess of each image's rms over the prior's field, in the image's
        unit; needed for a `Prior` with a card (see `refine_scale`), and must be None for another denoiser.
        image_ids: one integer an image, its random streams; default 0 … B − 1. max_batch: rows (images × draws) at once.
        device: where to run, moving the prior there; None: where the
        prior is. progress: called with (row-steps done, row-steps in all).
    Returns: the posterior draws on the CPU.
    Raises: DiffinvError if a draw is not finite (naming image and draw), ShapeError if prior and image do not fit.
    """
    batch = likelihood.batch
    ids = list(range(batch)) if image_ids is None else list(image_ids)
    device = torch.device(device) if device is not None else _device_of(prior)
    likelihood = likelihood.to(device)
    target = field_prior(prior, likelihood.image_shape).to(device)
    method = replace(method, schedule=method.schedule or _card_schedule(prior))
    counting = Counting(target)
    guidance, solves = recorded(method.guidance)
    watched = replace(method, guidance=guidance)
    unit = torch.ones(batch, device=device)
    if not isinstance(prior, Prior) and scale is not None:
        raise DiffinvError("reconstruct: scale= belongs to a prior with a card; this one has its own unit, give the data in it.")
    if isinstance(prior, Prior):
        guess = _check_scale(scale, batch).to(device, torch.float32)
        pilot = Rng.for_draws(seed, ids, PILOT_DRAWS).spawn(_PILOT_STREAM)
        pixels = prior.variance[0].numel()
        unit = refine_scale(likelihood, counting, guess, pilot, pixels=pixels, method=method, max_batch=max_batch)
    rows = _run(likelihood.scaled(unit), counting, Rng.for_draws(seed, ids, draws), draws, watched, max_batch, progress)
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
        prior_variance=_prior_variance(target),
        solver_residual=solves.residual if solves else 0.0,
        indefinite=solves.indefinite if solves else 0.0,
    )


def pilot_method(method: Method) -> Method:
    """A quarter of the steps; the default sampler instead of one that is not guided or moves in clouds."""
    usual = method.sampler.guided and method.sampler.cloud == 1
    return replace(method if usual else Method(schedule=method.schedule), steps=max(8, method.steps // 4))


def refine_scale(
    likelihood: Likelihood, prior: Denoiser, scale: Tensor, rng: Rng, *, pixels: int, method: Method, max_batch: int
) -> Tensor:
    """The rms of each image over the prior's field of `pixels`, (B,): that of two cheap posterior draws under the guess, twice.

    The norm of blurred data underestimates that of the image by a factor that depends on the image; the prior itself,
    trained with jittered scales, knows it better.
    """
    pilot = pilot_method(method)
    for number in range(PILOT_ROUNDS):
        rows = _run(likelihood.scaled(scale), prior, rng.spawn(number), PILOT_DRAWS, pilot, max_batch, None)
        rms = (rows.double() ** 2).flatten(1).sum(1).div(pixels).sqrt().unflatten(0, (-1, PILOT_DRAWS)).mean(1)
        scale = scale * rms.to(scale.dtype).clamp(0.1, 10)
    return scale


def reduced_chi2(likelihood: Likelihood, x: Image) -> Tensor:
    """Σ whitened residual² / number of good data: (B,), about 1 for the truth; 0 without data."""
    residuals = likelihood.residuals(x)
    if not residuals:
        return torch.zeros(x.shape[0], device=x.device)
    return sum(r.double().pow(2).flatten(1).sum(1) for r in residuals) / sum(n.double() for n in likelihood.good())


def _device_of(prior: Denoiser) -> torch.device:
    tensors = [*prior.parameters(), *prior.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _check_scale(scale: Tensor | None, batch: int) -> Tensor:
    """The first guess of the images' rms, (B,)."""
    if scale is None:
        raise DiffinvError("reconstruct: a prior with a card needs scale=, a first guess of each image's rms (B,).")
    if tuple(scale.shape) != (batch,):
        raise ShapeError(f"reconstruct: scale has shape {tuple(scale.shape)}; give one rms an image, ({batch},).")
    check_positive("reconstruct", "scale", scale, "give the rms of the image over the prior's field, in the image's unit.")
    return scale


def _prior_variance(target: Denoiser) -> Tensor | None:
    """Variance of an image of unit scale, (1, C, H, W), tiled like the prior itself."""
    if isinstance(target, Tiled):
        inner = _prior_variance(target.prior)
        return None if inner is None else target.blend(inner[:, None].expand(-1, len(target.corners), -1, -1, -1)).cpu()
    return target.variance.cpu() if isinstance(target, Prior) else None


def _card_schedule(prior: Denoiser) -> Schedule:
    if not isinstance(prior, Prior):
        raise DiffinvError(
            "reconstruct: a prior without a card needs Method(schedule=...) with sigma_min and sigma_max in its unit."
        )
    return Karras(prior.card.sigma_min, prior.card.sigma_max)


def _run(likelihood, prior, streams, draws, method, max_batch, progress) -> Tensor:
    """(B · draws, *image) draws in the unit of the likelihood's argument; `streams` has B · draws rows."""
    row_image = torch.arange(len(streams) // draws).repeat_interleave(draws)
    sigmas = method.schedule.grid(method.steps)
    device = _device_of(prior)
    size = _chunk_rows(method.sampler, draws, max_batch)
    done = []
    for start in range(0, len(row_image), size):
        rows = slice(start, min(start + size, len(row_image)))
        part = likelihood.select(row_image[rows].to(device))
        like = torch.zeros(rows.stop - rows.start, *likelihood.image_shape, device=device)
        target = Posterior(prior, part, method.guidance)
        report = _progress(progress, rows, len(row_image), method.steps)
        done.append(sample(method.sampler, target, sigmas, like, streams.select(rows).to(device), progress=report).x)
    return torch.cat(done)


def _chunk_rows(sampler: Sampler, draws: int, max_batch: int) -> int:
    """Rows at once: whole clouds, as many as fit."""
    if draws % sampler.cloud:
        raise DiffinvError(f"reconstruct: {draws} draws are no multiple of the sampler's cloud of {sampler.cloud}; ask for one.")
    if max_batch < sampler.cloud:
        raise DiffinvError(
            f"reconstruct: max_batch {max_batch} is less than a cloud of {sampler.cloud}, which cannot be split; raise it."
        )
    return max_batch // sampler.cloud * sampler.cloud


def _progress(progress, rows: slice, total: int, steps: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    return lambda step: progress(rows.start * steps + step * (rows.stop - rows.start), total * steps)


def _check_finite(samples: Tensor) -> None:
    bad = ~samples.isfinite().flatten(2).all(2)
    if bool(bad.any()):
        image, draw = (int(v) for v in bad.nonzero()[0])
        raise DiffinvError(
            f"reconstruct: draw {draw} of image {image} is not finite: the guidance diverged; "
            "use more steps, more solver iterations, or GMRES."
        )
