"""The problems of the self-supervised benchmark: how images are seen, and what may be learnt from that.

Images are 32² with values of about 0 … 1; every image has one measurement for the whole training. A problem names its rows:
a loss, the network that it trains, and how the trained network is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import Loss, MeasuredBatch
from diffinv.losses.denoisers import Neighbor2Neighbor, Noise2Score
from diffinv.losses.equivariant import EquivariantImaging, MeasurementConsistency, MultiOperatorImaging
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
from diffinv.operators.groups import Shifts
from diffinv.operators.sampling import Mask
from diffinv.reconstructors.averaging import RecorruptedAverage, SplittingAverage
from diffinv.reconstructors.backprojected import BackProjected, plain_unet
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.blind_spot import BlindSpot, BlindSpotNetwork
from diffinv.reconstructors.tweedie import ScoreReconstructor

SIZE, DRAWS, SHARE, KEPT = 32, 8, 0.8, 0.85
SHAPE = (1, SIZE, SIZE)


def network() -> nn.Module:
    return plain_unet(1, (32, 64, 96), (1, 1, 2))


def reconstructor() -> Reconstructor:
    return BackProjected(network(), residual=True)


@dataclass(frozen=True)
class Recipe:
    """loss: made afresh for every run, from the training's measurements y. model: before training. use: of the trained one.

    rate: of the multipliers over their start, or None.
    """

    loss: Callable[[Tensor], Loss]
    model: Callable[[], Reconstructor] = reconstructor
    use: Callable[[Reconstructor], Reconstructor] = lambda model: model
    rate: float | None = None


@dataclass(frozen=True)
class Problem:
    """observe: (x, rng) → measurements, with a second exposure. recipes: by the name of the row."""

    title: str
    observe: Callable[[Tensor, Rng], MeasuredBatch]
    recipes: dict[str, Recipe] = field(default_factory=dict)


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


TWINS = {"supervised": Recipe(fixed(Supervised())), "Noise2Noise": Recipe(fixed(Noise2Noise()))}
R2R = Recipe(fixed(Recorrupted(SHARE)), use=lambda m: RecorruptedAverage(m, share=SHARE, draws=DRAWS, seed=1))
HIDING = RandomHiding(KEPT)
SPLITTING = Recipe(fixed(Splitting(HIDING)), use=lambda m: SplittingAverage(m, hide=HIDING, draws=DRAWS, seed=1))
CONSISTENCY = {"measurement consistency": Recipe(fixed(MeasurementConsistency()))}
UNSURE = Recipe(lambda y: Unsure(White().start(level(y)), White()), rate=0.015)
UNSURE_COUNTS = Recipe(lambda y: Unsure(SignalDependent().start(level(y)), SignalDependent()), rate=0.015)
BLIND = Recipe(fixed(MeasurementConsistency()), model=lambda: BlindSpot(BlindSpotNetwork(1, width=16, depth=6)))
VOID = Recipe(fixed(Noise2Void(0.1, 2)))

GAUSSIAN = {
    "SURE": Recipe(fixed(Sure())),
    "R2R": R2R,
    "UNSURE, σ unknown": UNSURE,
    "splitting": SPLITTING,
    "blind-spot network": BLIND,
    "Noise2Void": VOID,
    "Neighbor2Neighbor": Recipe(fixed(Neighbor2Neighbor(1.0))),
    "Noise2Score": Recipe(lambda y: Noise2Score(0.3 * level(y) ** 0.5), model=lambda: ScoreReconstructor(network())),
}


def correlated() -> CorrelatedGaussian:
    lag = torch.tensor([0.25, 1.0, 0.25])
    return CorrelatedGaussian.from_correlation(number(0.1), (lag[:, None] * lag)[None, None], (SIZE, SIZE), white=0.0)


def masks(kept: float) -> Callable[[Tensor, Rng], LinearOperator]:
    return lambda x, rng: Mask(rng.uniform(x) < kept)


def one_mask(kept: float) -> Callable[[Tensor, Rng], LinearOperator]:
    mask = Mask(Rng.for_draws(99, [0], 1).uniform(torch.zeros(1, *SHAPE)) < kept)
    return lambda x, rng: mask


def blank(loss: Loss) -> Recipe:
    return Recipe(fixed(loss))


PROBLEMS: dict[str, Problem] = {
    "gaussian": Problem("white noise, σ = 0.1", seen(Gaussian(number(0.1))), TWINS | GAUSSIAN | CONSISTENCY),
    "correlated": Problem(
        "noise correlated over neighbours (0.25), σ = 0.1",
        seen(correlated()),
        TWINS
        | {
            "SURE": Recipe(fixed(Sure())),
            "R2R": R2R,
            "UNSURE, 5 × 5 lags unknown": Recipe(lambda y: Unsure(Lags(2).start(level(y)), Lags(2)), rate=0.015),
            "UNSURE, told white": UNSURE,
        }
        | CONSISTENCY,
    ),
    "poisson": Problem(
        "Poisson, 50 counts at 1",
        seen(Poisson(number(50.0), number(0.1))),
        TWINS
        | {
            "GR2R": R2R,
            "SURE, first order": Recipe(fixed(FirstOrderSure())),
            "UNSURE, gain and σ unknown": UNSURE_COUNTS,
            "splitting": SPLITTING,
            "blind-spot network": BLIND,
        }
        | CONSISTENCY,
    ),
    "poisson_gaussian": Problem(
        "Poisson–Gaussian, 50 electrons at 1, 3 electrons read noise",
        seen(PoissonGaussian(number(50.0), number(3.0), number(0.1))),
        TWINS
        | {
            "SURE, first order": Recipe(fixed(FirstOrderSure())),
            "UNSURE, gain and σ unknown": UNSURE_COUNTS,
            "splitting": SPLITTING,
            "blind-spot network": BLIND,
        }
        | CONSISTENCY,
    ),
    "gamma": Problem(
        "speckle of 4 looks",
        seen(Gamma(number(4.0), number(1e-3))),
        TWINS
        | {
            "GR2R": R2R,
            "SURE, first order": Recipe(fixed(FirstOrderSure())),
            "splitting": SPLITTING,
            "blind-spot network": BLIND,
        }
        | CONSISTENCY,
    ),
    "masks": Problem(
        "half of the pixels, another half an image, σ = 0.02",
        seen(Gaussian(number(0.02)), masks(0.5)),
        {
            "supervised": TWINS["supervised"],
            "SURE + MOI": blank(Sure() + MultiOperatorImaging(noisy=True)),
            "splitting": SPLITTING,
            "splitting + SURE": Recipe(fixed(Splitting(HIDING, Sure())), use=SPLITTING.use),
            "SURE": blank(Sure()),
        }
        | CONSISTENCY,
    ),
    "one_mask": Problem(
        "half of the pixels, the same in every image, σ = 0.02",
        seen(Gaussian(number(0.02)), one_mask(0.5)),
        {
            "supervised": TWINS["supervised"],
            "SURE + EI, shifts": blank(Sure() + EquivariantImaging(Shifts(8), noisy=True)),
            "splitting": SPLITTING,
            "SURE": blank(Sure()),
        }
        | CONSISTENCY,
    ),
}
