"""One tiny operator per registered name, and more where a name has several behaviours: batch 2, float64, odd and even sizes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy.sparse.linalg import aslinearoperator
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.operators.adapters import CallableOperator, FromPhysics, FromScipy, LinearCallable
from diffinv.operators.algebra import (
    Adjoint,
    BlockDiagonal,
    Chain,
    Compose,
    Diagonal,
    Identity,
    Jacobian,
    Scaled,
    Stack,
    Sum,
    Zero,
)
from diffinv.operators.base import Operator
from diffinv.operators.border import Border, ReflectingBorder, ZeroBorder
from diffinv.operators.convolution import Convolution, PeriodicConvolution, VaryingConvolution
from diffinv.operators.detector import Arcsinh, Saturation
from diffinv.operators.fourier import MaskedFourier, Visibilities
from diffinv.operators.geometry import Affine, Dilation, Rotation, SeparableResample, Shift, resample
from diffinv.operators.interpolation import Cubic, Filter, KaiserSinc, Lanczos, Linear
from diffinv.operators.matrix import DenseMatrix
from diffinv.operators.permutation import BandPermutation, PixelPermutation
from diffinv.operators.pooled import PooledConvolution
from diffinv.operators.sampling import Crop, Mask, Mosaic, Pad, SumPool
from diffinv.operators.spectral import BandMixing
from diffinv.operators.tomography import Radon

SIZE = (5, 6)
SHAPE = (2, *SIZE)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normals, float64, row by row independent of the batch."""
    return Rng.for_draws(seed, range(shape[0]), 1).normal(torch.zeros(shape, dtype=torch.float64))


def positive(*shape: int, seed: int = 0) -> Tensor:
    """Uniform on (½, 1½)."""
    return 0.5 + Rng.for_draws(seed, range(shape[0]), 1).uniform(torch.zeros(shape, dtype=torch.float64))


def _blur(border: Border) -> Convolution:
    return Convolution(positive(2, 1, 4, 3), 2, SIZE, border)


def _diagonal(seed: int) -> Diagonal:
    return Diagonal(positive(2, *SHAPE, seed=seed))


def _affine(rotation: float) -> Tensor:
    rows = [[[1.3, rotation, -0.4], [-rotation, 1.2, 0.3]], [[1.1, -rotation, 0.2], [rotation, 1.4, -0.7]]]
    return torch.tensor(rows, dtype=torch.float64)


CASES: dict[str, Callable[[], Operator]] = {
    "adjoint": lambda: Adjoint(_blur(ZeroBorder())),
    "jacobian": lambda: Jacobian(Arcsinh(SHAPE, positive(2)), draw(2, *SHAPE, seed=3)),
    "compose": lambda: Compose((SumPool((2, 6, 6), 3), Pad(SHAPE, (1, 0), (6, 6)), _blur(ZeroBorder()))),
    "chain": lambda: Chain((_diagonal(1), Saturation(SHAPE, positive(2)), _blur(ZeroBorder()))),
    "sum": lambda: Sum((_diagonal(1), _blur(ZeroBorder()))),
    "scaled": lambda: Scaled(positive(2), _blur(ZeroBorder())),
    "diagonal": lambda: _diagonal(1),
    "identity": lambda: Identity(SHAPE),
    "zero": lambda: Zero(SHAPE, (3, 4)),
    "stack": lambda: Stack((_diagonal(1), Crop(SHAPE, (1, 2), (3, 2)))),
    "block_diagonal": lambda: BlockDiagonal((Diagonal(positive(2, 1, *SIZE)), BandMixing(draw(2, 2, 1), SIZE))),
    "convolution": lambda: _blur(ZeroBorder()),
    "varying_convolution": lambda: VaryingConvolution(positive(2, 3, 1, 3, 4), positive(2, 3, *SIZE, seed=1), 2, ZeroBorder()),
    "pooled_convolution": lambda: PooledConvolution(positive(2, 1, 4, 3), 2, (4, 6), ZeroBorder(), 2),
    "periodic_convolution": lambda: PeriodicConvolution(positive(2, 2, 4, 3), 2, SIZE),
    "mask": lambda: Mask(draw(2, *SHAPE) > 0),
    "sum_pool": lambda: SumPool((2, 4, 6), 2),
    "mosaic": lambda: Mosaic(positive(2, 2, 2, 4), SIZE),
    "crop": lambda: Crop(SHAPE, (1, 2), (3, 2)),
    "pad": lambda: Pad(SHAPE, (1, 2), (7, 9)),
    "shift": lambda: Shift(draw(2, 2), SHAPE),
    "affine": lambda: Affine(_affine(0.2), SHAPE, (4, 3), Cubic(), True),
    "rotation": lambda: Rotation(30 * positive(2), SHAPE, Linear()),
    "dilation": lambda: Dilation(positive(2), SHAPE, Cubic(), True),
    "separable_resample": lambda: SeparableResample(draw(2, 4, 5), draw(2, 3, 6, seed=1), 2),
    "masked_fourier": lambda: MaskedFourier(draw(2, *SIZE) > 0, 2),
    "visibilities": lambda: Visibilities(300 * draw(2, 7, 2), SIZE, 2, (1e-3, -2e-3)),
    "pixel_permutation": lambda: PixelPermutation(draw(2, 30).argsort(1), SHAPE),
    "band_permutation": lambda: BandPermutation(torch.tensor([[1, 0], [0, 1]]), SIZE),
    "radon": lambda: Radon(180 * positive(2, 3), SHAPE, 7),
    "band_mixing": lambda: BandMixing(draw(2, 3, 2), SIZE),
    "dense_matrix": lambda: DenseMatrix(draw(2, 6, math.prod(SHAPE)), SHAPE, (3, 2)),
    "arcsinh": lambda: Arcsinh(SHAPE, positive(2)),
    "saturation": lambda: Saturation(SHAPE, positive(2)),
}

VARIANTS: dict[str, Callable[[], Operator]] = {
    "dense matrix, shared": lambda: DenseMatrix(draw(1, 6, math.prod(SHAPE)), SHAPE, (3, 2)),
    "convolution, reflecting": lambda: _blur(ReflectingBorder()),
    "convolution, kernel larger than the image": lambda: Convolution(positive(2, 1, 14, 11), 2, SIZE, ZeroBorder()),
    "convolution, one kernel a channel": lambda: Convolution(positive(2, 2, 3, 3), 2, SIZE, ZeroBorder()),
    "convolution, shared": lambda: Convolution(positive(1, 1, 3, 3), 2, SIZE, ZeroBorder()),
    "varying convolution, reflecting": lambda: VaryingConvolution(
        positive(2, 2, 2, 3, 4), positive(1, 2, *SIZE, seed=1), 2, ReflectingBorder()
    ),
    "affine, surface brightness": lambda: Affine(_affine(0.2), SHAPE, (4, 3), Lanczos(3), False),
    "dilation, surface brightness": lambda: Dilation(positive(2), SHAPE, KaiserSinc(3, 5.0), False),
    "resample, parallel axes": lambda: resample(_affine(0), SHAPE, (4, 3), Lanczos(3), conserve_flux=True),
    "resample, rotated": lambda: resample(_affine(0.1), SHAPE, (4, 3), Lanczos(3), conserve_flux=True),
    "mask, shared": lambda: Mask(draw(1, *SHAPE) > 0),
}

BORDERS: dict[str, Callable[[], Border]] = {"zero": ZeroBorder, "reflecting": ReflectingBorder}

FILTERS: dict[str, Callable[[], Filter]] = {
    "linear": Linear,
    "cubic": Cubic,
    "lanczos": lambda: Lanczos(5),
    "kaiser_sinc": lambda: KaiserSinc(5, 7.0),
}


class _FlippedDouble:
    """A foreign linear physics: twice the image, flipped."""

    def A(self, x: Tensor) -> Tensor:
        return 2 * x.flip(-1)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return 2 * y.flip(-1)


ADAPTERS: dict[str, Callable[[], Operator]] = {
    "callable": lambda: CallableOperator(lambda x: (x**3 + x).flip(-2), SHAPE, SHAPE),
    "linear callable": lambda: LinearCallable(lambda x: x.cumsum(-1)[:, :, 1:], SHAPE, (2, 4, 6)),
    "physics": lambda: FromPhysics(_FlippedDouble(), SHAPE, SHAPE),
    "scipy": lambda: FromScipy(aslinearoperator(draw(7, 60).numpy()), SHAPE, (7,)),
}
