"""Priors from images behind one fixed blur that hides most of the Fourier plane: what a group of transforms gives back.

The transfer function falls to 0 on an ellipse of frequencies. In units of the cut-off, ρ = |(k₁/c₁, k₂/c₂)|, nothing beyond ρ = 1
is ever measured. Shifts show nothing new of it; turned, the long axis of the ellipse sees what the short one does not; stretched,
fine detail becomes coarse. All rows but the twin are expectation maximisation on the same data, from the same Gaussian start,
with the same network and number of updates. What of each band a measurement would show is said beforehand (`predicted`), and so
is what the group itself makes of the images (`transformed`): these galaxies lie at any angle, but in the middle, and are not as
many at any size, so that rotations are a symmetry of theirs, up to interpolation, and shifts and dilations roughly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from prior_blobs import network, plan_of
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.guidance.base import Gmres
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.likelihood import Observation
from diffinv.losses.base import MeasuredBatch
from diffinv.losses.denoising import DenoisingScoreMatching
from diffinv.losses.identifiability import identifiability
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Identity
from diffinv.operators.base import LinearOperator
from diffinv.operators.convolution import PeriodicConvolution
from diffinv.operators.groups import Dilations, Group, Rotations, Shifts
from diffinv.operators.interpolation import Cubic
from diffinv.priors.base import Denoiser
from diffinv.samplers.sde import StochasticMultistep
from diffinv.schedules import LogNormal, LogUniform
from diffinv.training.augment import AsTheyAre, GroupViews
from diffinv.training.em import EmPlan, ExpectationMaximisation
from diffinv.training.expectation import GuidedDraw
from diffinv.training.gaussian import fourier_em
from diffinv.training.loop import Trainer
from diffinv.training.sources import CleanImages, Measured

SIDE, RMS, SIGMA_N, SIGMA_MIN, SIGMA_MAX = 32, 0.5, 0.02, 0.01, 20.0
CUT = (0.30, 0.15)  # cycles a pixel, along rows and columns
EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0)  # of bands, in units of the cut-off
NOISES = LogNormal(-1.2, 1.2)
GROUPS: dict[str, Group | None] = {
    "no group": None,
    "shifts": Shifts(SIDE),
    "rotations": Rotations(Cubic()),
    "dilations": Dilations(0.5, 2.0, Cubic(), conserve_flux=False),
}
TWIN, START = "clean twin", "Gaussian start"
METHODS = (START, *(f"EM, {name}" for name in GROUPS), TWIN)
START_LAPS, _CHUNK, _ELEMENTS = 20, 64, 64
SEED_NOISE = 171


@dataclass(frozen=True)
class Size:
    """Numbers of images, updates, laps, images an update, levels of a draw and products of its guidance, and the network."""

    training: int = 1024
    held_out: int = 64
    steps: int = 2000
    laps: int = 4
    batch: int = 64
    levels: int = 16
    products: int = 4
    widths: tuple[int, ...] = (32, 64, 104)
    blocks: tuple[int, ...] = (1, 1, 2)
    draws: int = 8


def radius() -> Tensor:
    """ρ (32, 32)."""
    axis = torch.fft.fftfreq(SIDE, dtype=torch.float64)
    return torch.hypot(axis[:, None] / CUT[0], axis / CUT[1])


def blur() -> PeriodicConvolution:
    """Of the transfer function 1 − ρ, 0 beyond, but for the last row and column of its kernel."""
    kernel = torch.fft.fftshift(torch.fft.ifft2((1 - radius()).clamp_min(0)).real)[1:, 1:]
    return PeriodicConvolution((kernel / kernel.sum()).float()[None, None], 1, (SIDE, SIDE))


def blurred(x: Tensor, seed: int) -> Observation:
    operator, noise = blur(), Gaussian(torch.full((1,), SIGMA_N))
    return Observation(noise.sample(operator(x), Rng.for_draws(SEED_NOISE + seed, range(len(x)), 1)), operator, noise)


def bands(x: Tensor) -> Tensor:
    """The parts of images (N, 1, 32, 32) in each band: (bands, N, 1, 32, 32)."""
    plane, rho = torch.fft.fft2(x.double()), radius()
    masks = torch.stack([(low <= rho) & (rho < high) for low, high in zip(EDGES, EDGES[1:], strict=False)])
    return torch.fft.ifft2(plane * masks[:, None, None]).real.to(x)


def moved(x: Tensor, group: Group | None) -> LinearOperator:
    """An element of the group an image x."""
    shape = tuple(x.shape[1:])
    return Identity(shape) if group is None else group.draw(Rng.for_draws(3, range(len(x)), 1), shape, x)


def transformed(x: Tensor, group: Group | None) -> list[float]:
    """Power of T_g x over that of x, by band: what a prior that believes in the group tends to."""
    dot = lambda v: bands(v).double().square().flatten(1).sum(1)
    return (dot(moved(x, group)(x)) / dot(x)).tolist()


def predicted(x: Tensor, group: Group | None) -> list[float]:
    """S/N of each band of images x in a measurement of their transforms: rms of what is measured over that of noise in as many
    frequencies as the band has. Below 1 no single measurement shows it; far below, all of them together do not."""
    operator, found, move = blur(), [], moved(x, group)
    for part, low, high in zip(bands(x), EDGES, EDGES[1:], strict=False):
        share = ((low <= radius()) & (radius() < high)).double().mean()
        seen = operator(move(part))
        found.append(float((seen.square().mean() / (SIGMA_N**2 * share)).sqrt()))
    return found


def seen_share(x: Tensor, group: Group | None) -> str:
    """What the identifiability test says, before any training."""
    return str(identifiability(blur(), group, rng=Rng([8]), signal=float(x.std()), noise_level=SIGMA_N, elements=_ELEMENTS))


def guided(size: Size) -> GuidedDraw:
    guidance = MomentMatching(Gmres(size.products, 1e-3, inner=7))
    return GuidedDraw(StochasticMultistep(), guidance, LogUniform(SIGMA_MIN, SIGMA_MAX), size.levels, size.products)


def trained(method: str, x: Tensor, size: Size, seed: int, folder: Path) -> Denoiser:
    """The average of a run of one method on images x, of which EM holds some out; goes on with what the folder holds."""
    learn, held = x[: -size.held_out], x[-size.held_out :]
    model, clean = network(size, seed), DenoisingScoreMatching(NOISES, RMS)
    if method == TWIN:
        plan = plan_of(size, size.steps, seed)
        return Trainer(model, clean, CleanImages(learn, AsTheyAre()), plan, folder).run(resume=True)
    data = blurred(learn, 0)
    start = fourier_em([data], laps=START_LAPS, mean_image=True).prior
    if method == START:
        return start
    group = GROUPS[method.removeprefix("EM, ")]
    return ExpectationMaximisation(
        model=model,
        source=Measured(MeasuredBatch(data)),
        held_out=Measured(MeasuredBatch(blurred(held, 1))),
        start=start,
        expect=(guided(size),),
        loss=clean,
        views=AsTheyAre() if group is None else GroupViews(group),
        plan=plan_of(size, size.steps // size.laps, seed),
        em=EmPlan(size.laps, _CHUNK),
        folder=folder / "em",
    ).run(resume=True)


def measured(model: Denoiser, x: Tensor, centre: Tensor, size: Size, seed: int) -> dict[str, list[float]]:
    """By band, for held-out images x: correlation of the posterior mean with the truth, the mean image `centre` (1, 1, 32, 32)
    taken off both, and power of draws over that of the truth."""
    rng = Rng.for_draws(seed, range(len(x)), size.draws)
    many = blurred(x, 2).repeat(size.draws)
    parts = [slice(k, k + _CHUNK) for k in range(0, many.y.shape[0], _CHUNK)]
    with torch.no_grad():
        rows = torch.cat([guided(size).draw(model, many.select(part), rng.select(part)) for part in parts])
    draws = rows.unflatten(0, (len(x), size.draws))
    mean, true, single, whole = bands(draws.mean(1) - centre), bands(x - centre), bands(draws[:, 0]), bands(x)
    dot = lambda a, b: (a.double() * b.double()).flatten(1).sum(1)
    return {
        "correlation": (dot(mean, true) / (dot(mean, mean) * dot(true, true)).sqrt()).tolist(),
        "power": (dot(single, single) / dot(whole, whole)).tolist(),
    }
