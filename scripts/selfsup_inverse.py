"""The problems of the self-supervised benchmark with data that are incomplete: masks, frequencies, views, baselines, blur.

Each names, beside its losses, the group or the operators that could show what one operator hides; the benchmark prints what
the identifiability test says of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from selfsup_problems import DRAWS, FOLDS, HIDING, KEPT, SHAPE, SIZE, Problem, Recipe, Size, fixed, number, seen
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.core.types import Image
from diffinv.likelihood import Observation
from diffinv.losses.base import Loss
from diffinv.losses.equivariant import EquivariantImaging, MeasurementConsistency, MultiOperatorImaging
from diffinv.losses.splitting import RandomHiding, Splitting
from diffinv.losses.supervised import Supervised
from diffinv.losses.sure import FirstOrderSure, Sure
from diffinv.losses.virtual import VirtualOperators
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.photon import PoissonGaussian
from diffinv.operators.algebra import Scaled, compose
from diffinv.operators.base import LinearOperator
from diffinv.operators.border import ReflectingBorder
from diffinv.operators.convolution import Convolution, PeriodicConvolution
from diffinv.operators.fourier import MaskedFourier, Visibilities
from diffinv.operators.groups import Dilations, Flips, Group, Product, QuarterTurns, Rotations, Shifts
from diffinv.operators.interpolation import Cubic
from diffinv.operators.matrix import DenseMatrix
from diffinv.operators.sampling import Mask, SumPool
from diffinv.operators.tomography import Radon
from diffinv.reconstructors.averaging import EquivariantAverage, LeaveOut, SplittingAverage
from diffinv.reconstructors.backprojected import BackProjected, BackProjection, LinearInverse, NormalisedConvolution
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.observed import clean_data

SHIFTS, TURNS, ROTATIONS = Shifts(SIZE), Product((QuarterTurns(), Flips())), Rotations(Cubic())
DILATIONS = Dilations(0.5, 2.0, Cubic(), conserve_flux=False)


@dataclass(frozen=True, eq=False)
class Tabulated(LinearInverse):
    """x₀ = (AᵀA + δ λ I)⁻¹ Aᵀ y of one operator for all rows, as a table: (n, m)."""

    table: Tensor

    @classmethod
    def of(cls, operator: DenseMatrix, damping: float) -> Tabulated:
        a = operator.matrix[0].double()
        normal = a.mT @ a
        strongest = torch.linalg.eigvalsh(normal)[-1]
        eye = torch.eye(len(normal), dtype=a.dtype)
        return cls(torch.linalg.solve(normal + damping * strongest * eye, a.mT).float())

    def __call__(self, observation: Observation) -> Image:
        return (clean_data(observation).flatten(1) @ self.table.mT).unflatten(1, SHAPE)


def through(inverse: LinearInverse) -> Callable[[Size], Reconstructor]:
    return lambda size: BackProjected(size.unet(), inverse=inverse, residual=True)


def rows(
    model: Callable[[Size], Reconstructor], losses: dict[str, Loss], uses: dict[str, Callable] | None = None
) -> dict[str, Recipe]:
    """The twin, the losses and measurement consistency, all with one network; uses: of those that are not used as they are."""
    every = {"supervised": Supervised()} | losses | {"measurement consistency": MeasurementConsistency()}
    return {name: Recipe(fixed(loss), model, (uses or {}).get(name, lambda m: m)) for name, loss in every.items()}


def equivariant(data: Loss, group: Group, weight: float = 1.0) -> Loss:
    return data + weight * EquivariantImaging(group, noisy=True)


def gain(operator: DenseMatrix) -> float:
    """Squared error of a datum over that of a pixel for an error that is white in the image: tr(AᵀA)/m."""
    return float(operator.matrix[0].square().sum() / len(operator.matrix[0]))


def masks(kept: float) -> Callable[[Tensor, Rng], LinearOperator]:
    return lambda x, rng: Mask(rng.uniform(x) < kept)


def one_mask(kept: float) -> Mask:
    return Mask(Rng.for_draws(99, [0], 1).uniform(torch.zeros(1, *SHAPE)) < kept)


def columns(central: int, others: int) -> Tensor:
    """Columns of the Fourier plane, the lowest ones and some at random: (1, H, W)."""
    frequency = torch.fft.fftfreq(SIZE, 1 / SIZE).abs()
    order = Rng.for_draws(98, [0], 1).uniform(torch.zeros(1, SIZE))[0]
    lowest = frequency.argsort()[:central]
    order[lowest] = 2.0
    kept = torch.zeros(SIZE, dtype=torch.bool)
    kept[lowest] = kept[order.argsort()[:others]] = True
    return kept.expand(1, SIZE, SIZE).contiguous()


def tracks(stations: int, times: int) -> Tensor:
    """(u, v) of all pairs of stations while the Earth turns by 90°, a source at declination 30°: (1, M, 2), |u| ≤ 1."""
    unit = Rng.for_draws(97, [0], 1).uniform(torch.zeros(1, stations, 2, dtype=torch.float64))[0]
    angle, radius = 2 * math.pi * unit[:, 0], unit[:, 1].sqrt()
    place = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    first, second = torch.triu_indices(stations, stations, 1)
    base = (place[first] - place[second]) / 2
    hour = torch.linspace(-math.pi / 4, math.pi / 4, times, dtype=torch.float64)[:, None]
    u = hour.cos() * base[:, 0] - hour.sin() * base[:, 1]
    v = math.sin(math.pi / 6) * (hour.sin() * base[:, 0] + hour.cos() * base[:, 1])
    return torch.stack([u.flatten(), v.flatten()], 1)[None].float()


def gaussian(width: float) -> Tensor:
    """A round kernel of a full width at half maximum in pixels: (1, 1, 15, 15)."""
    axis = torch.arange(-7, 8) / (width / 2.3548)
    kernel = torch.exp(-0.5 * (axis[:, None] ** 2 + axis**2))
    return (kernel / kernel.sum())[None, None]


def tabulated(operator: LinearOperator) -> DenseMatrix:
    return DenseMatrix.of(operator, torch.zeros(1))


def linear_problem(title: str, operator: DenseMatrix, noise, damping: float, losses: dict[str, Loss], *groups: Group) -> Problem:
    """One operator for all images, the network behind its regularised inverse."""
    model = through(Tabulated.of(operator, damping))
    return Problem(title, seen(noise, lambda x, rng: operator), rows(model, losses), groups)


MASKED, FREQUENCY = through(NormalisedConvolution(1.0)), through(BackProjection(1.0))
SPLIT = Splitting(HIDING)
PAIRED = RandomHiding(KEPT, together=1)
ONE = one_mask(0.5)
KSPACE = columns(4, 6)
FREQUENCIES = KSPACE[:, None, :, :, None].expand(-1, *SHAPE, 2)
VIEWS = tabulated(Radon(torch.arange(0, 180, 18.0)[None], SHAPE, 46))
BASELINES = tabulated(Visibilities(tracks(8, 12), (SIZE, SIZE), 1, (0.4, 0.4)))
BLURRED = tabulated(PeriodicConvolution(gaussian(4.0), 1, (SIZE, SIZE)))  # on the torus it commutes with shifts exactly
COARSE = tabulated(
    compose(Scaled(torch.tensor([0.25]), SumPool(SHAPE, 2)), Convolution(gaussian(2.0), 1, (SIZE, SIZE), ReflectingBorder()))
)


def left_out(group: Group | None) -> dict[str, Callable[[Reconstructor], Reconstructor]]:
    """How models that learnt from hidden pixels are used on masked images."""
    return {
        "splitting": lambda m: LeaveOut(m, folds=FOLDS, seed=1),
        "equivariant splitting": lambda m: LeaveOut(m, folds=FOLDS, seed=1, group=group),
        "splitting + SURE": lambda m: SplittingAverage(m, hide=HIDING, draws=DRAWS, seed=1),
    }


def averaged(hiding: RandomHiding, group: Group) -> dict[str, Callable[[Reconstructor], Reconstructor]]:
    """The same where a datum is not a pixel."""
    inner = lambda m: SplittingAverage(m, hide=hiding, draws=DRAWS, seed=1)
    return {"splitting": inner, "equivariant splitting": lambda m: EquivariantAverage(inner(m), group=group, draws=DRAWS, seed=2)}


PROBLEMS: dict[str, Problem] = {
    "masks": Problem(
        "half of the pixels, another half an image, σ = 0.02",
        seen(Gaussian(number(0.02)), masks(0.5)),
        rows(
            MASKED,
            {
                "SURE + MOI": Sure() + MultiOperatorImaging(noisy=True),
                "splitting": SPLIT,
                "splitting + SURE": Splitting(HIDING, Sure()),
                "ENSURE": Sure(weight=torch.full((1, *SHAPE), 2.0)),
                "SURE": Sure(),
            },
            left_out(None),
        ),
        (None,),
    ),
    "one_mask": Problem(
        "half of the pixels, the same in every image, σ = 0.02",
        seen(Gaussian(number(0.02)), lambda x, rng: ONE),
        rows(
            MASKED,
            {
                "SURE + EI, shifts": equivariant(Sure(), SHIFTS),
                "equivariant splitting": VirtualOperators(SPLIT, SHIFTS),
                "splitting": SPLIT,
                "SURE": Sure(),
            },
            left_out(SHIFTS),
        ),
        (SHIFTS,),
    ),
    "fourier": Problem(
        "10 of 32 columns of the Fourier plane, the same in every image, σ = 0.01",
        seen(Gaussian(number(0.01), mask=FREQUENCIES), lambda x, rng: MaskedFourier(KSPACE, 1)),
        rows(
            FREQUENCY,
            {
                "SURE + EI, turns and flips": equivariant(Sure(), TURNS),
                "SURE + EI, shifts": equivariant(Sure(), SHIFTS),
                "equivariant splitting": VirtualOperators(Splitting(PAIRED), TURNS),
                "splitting": Splitting(PAIRED),
                "SURE": Sure(),
            },
            averaged(PAIRED, TURNS),
        ),
        (TURNS, SHIFTS),
    ),
    "tomography": linear_problem(
        "10 views of 46 rays, Poisson–Gaussian: 1000 electrons at 1, 3 electrons read noise",
        VIEWS,
        PoissonGaussian(number(1000.0), number(3.0), number(0.1)),
        0.01,
        {
            "SURE, first order + EI, rotations": equivariant(FirstOrderSure(), ROTATIONS, gain(VIEWS)),
            "SURE, first order": FirstOrderSure(),
        },
        ROTATIONS,
    ),
    "radio": linear_problem(
        "336 visibilities of 8 stations, σ = 0.05",
        BASELINES,
        Gaussian(number(0.05)),
        0.01,
        {
            "SURE + EI, rotations": equivariant(Sure(), ROTATIONS, gain(BASELINES)),
            "SURE + EI, shifts": equivariant(Sure(), SHIFTS, gain(BASELINES)),
            "SURE": Sure(),
        },
        ROTATIONS,
        SHIFTS,
    ),
    "deblurring": linear_problem(
        "round blur of 4 pixels (FWHM) on the torus, σ = 0.002",
        BLURRED,
        Gaussian(number(0.002)),
        0.0003,
        {
            "SURE + EI, dilations": equivariant(Sure(), DILATIONS, gain(BLURRED)),
            "SURE + EI, shifts": equivariant(Sure(), SHIFTS, gain(BLURRED)),
            "SURE": Sure(),
        },
        DILATIONS,
        SHIFTS,
    ),
    "super_resolution": linear_problem(
        "round blur of 2 pixels, pixels twice as large, σ = 0.002",
        COARSE,
        Gaussian(number(0.002)),
        0.0003,
        {
            "SURE + EI, dilations": equivariant(Sure(), DILATIONS, gain(COARSE)),
            "SURE + EI, shifts": equivariant(Sure(), SHIFTS, gain(COARSE)),
            "SURE": Sure(),
        },
        DILATIONS,
        SHIFTS,
    ),
}
