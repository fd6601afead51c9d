"""The problems of the self-supervised benchmark: how images are seen, and what may be learnt from that.

Images are 32² with values of about 0 … 1; every image has one measurement for the whole training. A problem names its rows:
a loss, the network that it trains, and how the trained network is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import Loss, MeasuredBatch
from diffinv.losses.denoisers import Neighbor2Neighbor, Noise2Score
from diffinv.losses.equivariant import MeasurementConsistency
from diffinv.losses.recorrupted import Recorrupted
from diffinv.losses.splitting import Noise2Void, RandomHiding, Splitting
from diffinv.losses.supervised import Noise2Noise, Supervised
from diffinv.losses.sure import FirstOrderSure, Sure
from diffinv.losses.unsure import Lags, SignalDependent, Unsure, White
from diffinv.noise.base import Noise
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.noise.estimate import wavelet_mad
from diffinv.noise.gamma import Gamma
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.photon import PoissonGaussian
from diffinv.noise.poisson import Poisson
from diffinv.operators.algebra import Identity
from diffinv.operators.base import LinearOperator
from diffinv.operators.groups import Group
from diffinv.reconstructors.averaging import LeaveOut, RecorruptedAverage
from diffinv.reconstructors.backprojected import BackProjected, plain_unet
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.blind_spot import BlindSpot, BlindSpotNetwork
from diffinv.reconstructors.tweedie import ScoreReconstructor

SIZE, DRAWS, SHARE, FOLDS = 32, 8, 0.8, 7
KEPT = 1 - 1 / FOLDS
SHAPE = (1, SIZE, SIZE)


@dataclass(frozen=True)
class Size:
    """How large the networks are. widths, blocks: of the U-Net, a level. blind: width of the blind-spot network."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    blind: int

    def unet(self) -> nn.Module:
        return plain_unet(1, self.widths, self.blocks)

    def blind_spot(self) -> Reconstructor:
        return BlindSpot(BlindSpotNetwork(1, width=self.blind, depth=6))


TRAINED, USUAL = Size((16, 32), (1, 1), 8), Size((32, 64, 96), (1, 1, 2), 32)


def reconstructor(size: Size) -> Reconstructor:
    return BackProjected(size.unet(), residual=True)


def from_nothing(size: Size) -> Reconstructor:
    """Starts from an empty image: where noise is much larger than the image, the data are a bad start."""
    return BackProjected(size.unet())


@dataclass(frozen=True)
class Recipe:
    """loss: made afresh for every run, from the training's measurements y. model: before training. use: of the trained one.

    rate: of the multipliers over their start, or None.
    """

    loss: Callable[[Tensor], Loss]
    model: Callable[[Size], Reconstructor] = reconstructor
    use: Callable[[Reconstructor], Reconstructor] = lambda model: model
    rate: float | None = None


@dataclass(frozen=True)
class Problem:
    """observe: (x, rng) → measurements, with a second exposure. recipes: by the name of the row.

    groups: whose help the identifiability test is asked about; None stands for the operators of other images.
    """

    title: str
    observe: Callable[[Tensor, Rng], MeasuredBatch]
    recipes: dict[str, Recipe]
    groups: tuple[Group | None, ...] = ()


def seen(noise: Noise, operator: Callable[[Tensor, Rng], LinearOperator] = lambda x, rng: Identity(SHAPE)):
    """Two exposures of each image through an operator that may be drawn for it."""

    def observe(x: Tensor, rng: Rng) -> MeasuredBatch:
        a = operator(x, rng.spawn(0))
        mean = a(x)
        first, second = (Observation(noise.sample(mean, rng.spawn(k)), a, noise) for k in (1, 2))
        return MeasuredBatch(first, x, second)

    return observe


def number(value: float) -> Tensor:
    return torch.full((1,), value)


def level(y: Tensor) -> float:
    """A first guess of the noise variance: that of the finest detail."""
    return float(wavelet_mad(y).median()) ** 2


def fixed(loss: Loss) -> Callable[[Tensor], Loss]:
    return lambda y: loss


SUPERVISED = {"supervised": Recipe(fixed(Supervised()))}
EXPOSURES = {"Noise2Noise": Recipe(fixed(Noise2Noise()))}
R2R = Recipe(fixed(Recorrupted(SHARE)), use=lambda m: RecorruptedAverage(m, share=SHARE, draws=DRAWS, seed=1))
HIDING = RandomHiding(KEPT)
SPLITTING = Recipe(fixed(Splitting(HIDING)), use=lambda m: LeaveOut(m, folds=FOLDS, seed=1))
UNSURE = Recipe(lambda y: Unsure(White().start(level(y)), White()), rate=0.015)
UNSURE_COUNTS = Recipe(lambda y: Unsure(SignalDependent().start(level(y)), SignalDependent()), rate=0.015)
BLIND = Recipe(fixed(MeasurementConsistency()), model=Size.blind_spot)
COUNTS = {
    "SURE, first order": Recipe(fixed(FirstOrderSure())),
    "UNSURE, gain and σ unknown": UNSURE_COUNTS,
    "splitting": SPLITTING,
}
VOID = Recipe(fixed(Noise2Void(0.1, 2)))

GAUSSIAN = {
    "SURE": Recipe(fixed(Sure())),
    "R2R": R2R,
    "UNSURE, σ unknown": UNSURE,
    "splitting": SPLITTING,
    "blind-spot network": BLIND,
    "Noise2Void": VOID,
    "Neighbor2Neighbor": Recipe(fixed(Neighbor2Neighbor(1.0))),
    "Noise2Score": Recipe(lambda y: Noise2Score(0.3 * level(y) ** 0.5), model=lambda size: ScoreReconstructor(size.unet())),
}


def correlated() -> CorrelatedGaussian:
    lag = torch.tensor([0.25, 1.0, 0.25])
    return CorrelatedGaussian.from_correlation(number(0.1), (lag[:, None] * lag)[None, None], (SIZE, SIZE), white=0.0)


PROBLEMS: dict[str, Problem] = {
    "gaussian": Problem("white noise, σ = 0.1", seen(Gaussian(number(0.1))), SUPERVISED | EXPOSURES | GAUSSIAN),
    "correlated": Problem(
        "noise correlated over neighbours (0.25), σ = 0.1",
        seen(correlated()),
        SUPERVISED
        | {
            "SURE": Recipe(fixed(Sure())),
            "R2R": R2R,
            "UNSURE, 5 × 5 lags unknown": Recipe(lambda y: Unsure(Lags(2).start(level(y)), Lags(2)), rate=0.015),
            "UNSURE, told white": UNSURE,
        },
    ),
    "poisson": Problem(
        "Poisson, 50 counts at 1",
        seen(Poisson(number(50.0), number(0.1))),
        SUPERVISED | {"GR2R": R2R} | COUNTS,
    ),
    "poisson_gaussian": Problem(
        "Poisson–Gaussian, 50 electrons at 1, 3 electrons read noise",
        seen(PoissonGaussian(number(50.0), number(3.0), number(0.1))),
        SUPERVISED | COUNTS,
    ),
    "gamma": Problem(
        "speckle of 4 looks",
        seen(Gamma(number(4.0), number(1e-3))),
        SUPERVISED | {"GR2R": R2R, "SURE, first order": Recipe(fixed(FirstOrderSure())), "splitting": SPLITTING},
    ),
    "cryo": Problem(
        "Poisson–Gaussian at very low S/N, 1 electron at 1, 1 electron read noise",
        seen(PoissonGaussian(number(1.0), number(1.0), number(0.2))),
        {name: replace(recipe, model=from_nothing) for name, recipe in (SUPERVISED | EXPOSURES | COUNTS).items()},
    ),
}
