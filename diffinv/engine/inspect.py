"""What a file holds and what sampling it would cost, before anything is sampled.

Time and memory are measured on one tile: the time of a forward and a backward pass, and the bytes that the forward pass
keeps for the backward one. A step of the sampler makes one evaluation of the guidance or two, its start one more; an
evaluation makes at most `iterations + 2` passes, forward or backward; pilot draws find the flux scale.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffinv.core.checks import InputError
from diffinv.core.duration import duration
from diffinv.core.linalg import dot
from diffinv.core.rng import Rng
from diffinv.core.types import Image, Sigma
from diffinv.data.catalog import Entry
from diffinv.data.layouts import InputOptions
from diffinv.data.observation import Band, observe, read_observation
from diffinv.engine import pilot
from diffinv.engine.channels import Channel, build_channels
from diffinv.engine.draws import Method
from diffinv.engine.memory import kept_bytes
from diffinv.engine.methods import describe_method
from diffinv.engine.monitor import Counting
from diffinv.engine.objects import check_target, rows_of
from diffinv.engine.run import Run
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.likelihood import Flat
from diffinv.posterior import Posterior
from diffinv.priors.base import Denoiser
from diffinv.priors.store import Prior, PriorCard
from diffinv.priors.tiled import tile_starts
from diffinv.samplers.base import sample
from diffinv.schedules import Karras

_LOOKED_AT = 20  # objects, for one that can be read


def describe(
    path: Path,
    options: InputOptions,
    prior: Prior,
    method: Method,
    *,
    draws: int,
    max_batch: int | None,
    margin: int | None,
    target_fwhm: float | None,
) -> str:
    """What `diffinv sample` would do with a file, in lines of text.

    Arguments: path, options: of the input. prior, method, draws, max_batch, margin: of the sampling. target_fwhm: arcsec, None
        for the prior's.
    Raises: InputError if the file cannot be used, ConfigError if the target is sharper than the prior's images.
    """
    check_target(target_fwhm, prior.card.target_fwhm)
    observation = read_observation(path, options)
    channels = build_channels(observation, prior, margin=margin, mixing=options.mixing)
    lines = [f"object     {observation.object_id}", f"file       {observation.path} (sha256 {observation.sha256[:16]}…)"]
    lines += [line for band in observation.bands for line in _band_lines(band)]
    lines += [line for channel in channels for line in _channel_lines(channel, prior, target_fwhm)]
    lines.append(
        f"prior      {prior.card.name}: bands {', '.join(prior.card.bands)}, {prior.card.size}² at {prior.card.pixel_scale:g}″"
    )
    lines.append(f"sampling   {describe_method(method)}, {draws} draws a band")
    return "\n".join([*lines, *_cost_lines(channels, prior, method, draws, max_batch)])


def _band_lines(band: Band) -> list[str]:
    scale, psf = band.grid.pixel_scale, band.psf
    noise = float(torch.from_numpy(band.variance[band.good].astype(float)).sqrt().median())
    source = "estimated from the sky" if band.noise_estimated else "from the file or configuration"
    sky = "sky WCS" if band.grid.celestial else "no sky WCS"
    lines = [
        f"band       {band.name} {band.instrument}".rstrip()
        + f": {_size(band.image.shape)} pixels of {scale:.4g}″ ({sky}), unit {band.unit or 'unknown'}",
        f"  PSF      FWHM {psf.fwhm * scale:.3g}″, {psf.kind.value}, stamp {_size(psf.stamp.shape)}, "
        f"oversampled {psf.oversample:g}×, encircled energy {psf.norm:.4g}",
        f"  noise    median std {noise:.4g} a pixel, {source}{', correlated' if band.noise_correlation is not None else ''}",
        f"  bad      {1 - band.good.mean():.2%} of the pixels",
    ]
    return lines + [f"  note     {note}" for note in band.notes]


def _channel_lines(channel: Channel, prior: Prior, target_fwhm: float | None) -> list[str]:
    field = channel.field
    fwhm = field.target_fwhm if target_fwhm is None else target_fwhm
    tiles = _tiles(channel, prior.card)
    passes = f"{tiles} tiles" if tiles > 1 else "one pass"
    return [
        f"output     {'+'.join(channel.names)}: {_size(field.grid.shape)} pixels of {field.grid.pixel_scale:g}″, "
        f"PSF {fwhm:g}″ FWHM",
        f"  canvas   {_size(field.canvas.shape)} in {passes}; flux scale about {field.scale:.4g}",
        *(f"  mixture  {text}" for text in channel.mixtures()),
    ]


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} × {shape[1]}"


@dataclass(frozen=True)
class Cost:
    """Of one object. seconds: of sampling, at most. memory: bytes, of one process. rows: at once. passes: of the network, a draw
    and tile's area. device: a type of torch's."""

    seconds: float
    memory: float
    rows: int
    passes: float
    device: str


def _cost_lines(channels: tuple[Channel, ...], prior: Prior, method: Method, draws: int, max_batch: int | None) -> list[str]:
    cost = foresee_cost(channels, prior, method, draws, max_batch)
    passes = f"at most {cost.passes:.0f} network passes a draw and tile"
    return [
        f"time       about {duration(cost.seconds)} on this {cost.device} ({passes})",
        f"memory     about {cost.memory / 2**30:.2g} GiB at {cost.rows} rows at once (sampler.max_batch)",
    ]


def foresee_cost(
    channels: Sequence[Channel],
    prior: Prior,
    method: Method,
    draws: int,
    max_batch: int | None,
    processes: int = 1,
    objects: int = 1,
) -> Cost:
    """What an object would cost, from passes measured on one tile. processes: that share the memory. objects: together."""
    seconds, kept = measure_pass(prior)
    areas = [_area(c, prior.card) for c in channels]
    passes = most_passes(method, draws)
    rows = min(max_batch or rows_of(channels, prior, processes), draws * len(channels) * objects)
    weights = sum(p.numel() * p.element_size() for p in prior.parameters())
    device = next(prior.parameters()).device.type
    return Cost(passes * draws * sum(areas) * seconds, weights + rows * max(areas) * kept, rows, passes, device)


def foresee_run(run: Run, entries: Sequence[Entry], processes: int) -> str:
    """What a run would cost, on one line: as much for every object as for the first that can be read.

    Arguments: entries: what is to be done. processes: at once, on this machine.
    """
    plan = run.plan
    for entry in entries[:_LOOKED_AT]:
        try:
            channels = build_channels(observe(entry, plan.options), run.prior, margin=plan.margin, mixing=plan.options.mixing)
        except InputError:
            continue
        cost = foresee_cost(channels, run.prior, plan.method, plan.draws, plan.max_batch, processes, run.together)
        total, memory = math.ceil(len(entries) / processes) * cost.seconds, processes * cost.memory / 2**30
        return (
            f"{len(entries)} to do, about {duration(total)} with {processes} at once on this {cost.device} "
            f"({duration(cost.seconds)} each), and {memory:.2g} GiB of memory at {cost.rows} rows a process"
        )
    return f"{len(entries)} to do; none of the first {min(len(entries), _LOOKED_AT)} can be read"


def most_passes(method: Method, draws: int) -> float:
    """Network passes a draw and tile if no inner solve stops early, the pilot draws for the flux scale included.

    Arguments: draws: of an image, which share its pilots.
    """
    pilots = pilot.ROUNDS * pilot.DRAWS / draws
    return _passes(method) + _passes(pilot.pilot_method(method)) * pilots


def _passes(method: Method) -> float:
    """Network passes a draw, of the sampler alone."""
    if method.sampler.guided and isinstance(method.guidance, MomentMatching):
        return (1 + method.guidance.solver.products) * count_evaluations(method)
    rows = method.sampler.cloud
    counting, like = Counting(_Tally()), torch.zeros(rows, 1, 1, 1)
    target = Posterior(counting, Flat((1, 1, 1)), method.guidance)
    sample(method.sampler, target, _levels(method), like, Rng.for_draws(0, [0], rows))
    return counting.rows / rows


class _Tally(Denoiser):
    """The denoiser of the image 0, counting how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Image, sigma: Sigma) -> Image:
        self.calls += 1
        return 0 * x


def _levels(method: Method) -> torch.Tensor:
    return (method.schedule or Karras(0.01, 10.0)).grid(method.steps)


def count_evaluations(method: Method) -> int:
    """How often a guided sampler asks for the posterior's denoiser, from its start to σ = 0: counted on one pixel."""
    tally = _Tally()
    sample(method.sampler, tally, _levels(method), torch.zeros(1, 1, 1, 1), Rng.for_draws(0, [0], 1))
    return tally.calls


def _tiles(channel: Channel, card: PriorCard) -> int:
    shape = channel.field.canvas.shape
    return 1 if card.sees(shape) else math.prod(len(tile_starts(n, card.size, card.size // 4)) for n in shape)


def _area(channel: Channel, card: PriorCard) -> float:
    """What the network sees in a pass over the canvas, in tiles."""
    shape = channel.field.canvas.shape
    return math.prod(shape) / card.size**2 if card.sees(shape) else _tiles(channel, card)


def measure_pass(prior: Prior, *, rows: int = 4) -> tuple[float, int]:
    """Seconds of one network pass a tile, and bytes that it keeps for the backward pass, both a row.

    Arguments: rows: tiles in the measured batch.
    """
    device, card = next(prior.parameters()).device, prior.card
    shape = (rows, len(card.bands), card.size, card.size)
    x = torch.linspace(-1, 1, math.prod(shape), device=device).reshape(shape).requires_grad_()
    sigma = torch.full((rows,), card.sigma_data, dtype=torch.float64, device=device)
    seconds = min(_time_passes(prior, x, sigma) for _ in range(3))
    return seconds / (2 * rows), kept_bytes(prior, shape[1:], device)


def _time_passes(prior: Prior, x: torch.Tensor, sigma: torch.Tensor) -> float:
    """Seconds of a forward and a backward pass of the batch."""
    start = time.perf_counter()
    output = prior(x, sigma)
    float(torch.autograd.grad(dot(output, output).sum(), x)[0].sum())  # waits for the device
    return time.perf_counter() - start
