"""Whether a group commutes with the instrument is seen from its action, with the border and the interpolation left out."""

from __future__ import annotations

import pytest
import torch

from diffinv.core.checks import UnsupportedError
from diffinv.core.rng import Rng
from diffinv.engine.commute import TOLERANCE, check_moves, commutator
from diffinv.likelihood import Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Identity
from diffinv.operators.base import LinearOperator
from diffinv.operators.border import ReflectingBorder, ZeroBorder
from diffinv.operators.convolution import Convolution
from diffinv.operators.groups import Amplitudes, Dilations, Flips, Group, OpenShifts, Product, QuarterTurns, Rotations, Shifts
from diffinv.operators.interpolation import Cubic
from diffinv.operators.pooled import PooledConvolution
from diffinv.operators.sampling import Mask, SumPool
from tests.learning import round_psf

SIZE = (24, 24)


def blur(sigma: float = 1.5, ratio: float = 1.0, border=ZeroBorder()) -> LinearOperator:
    return Convolution(torch.from_numpy(round_psf(sigma, ratio))[None, None], 1, SIZE, border)


def pooled(sigma: float) -> LinearOperator:
    return PooledConvolution(torch.from_numpy(round_psf(sigma))[None, None], 1, SIZE, ZeroBorder(), 2)


def half() -> LinearOperator:
    return Mask(Rng([0]).uniform(torch.zeros(1, 1, *SIZE)) < 0.5)


def seen(operator: LinearOperator, mask: torch.Tensor | None = None) -> Observation:
    return Observation(torch.zeros(1, *operator.out_shape), operator, Gaussian(torch.tensor([0.1]), mask))


COMMUTING: dict[str, tuple[LinearOperator, Group]] = {
    "shifts, blur": (blur(), Shifts(12)),
    "open shifts, mirrored blur": (blur(border=ReflectingBorder()), OpenShifts(4)),
    "turns, round": (blur(0.8), QuarterTurns()),
    "any angle, round": (blur(0.8), Rotations(Cubic())),
    "any angle and shifts, round": (blur(), Product((Rotations(Cubic()), Shifts(5)))),
    "flips, along the axes": (blur(1.0, 2.0), Flips()),
    "amplitudes": (half(), Amplitudes(0.3)),
    "anything, all seen": (Identity((1, *SIZE)), Shifts(3)),
    "shifts, well sampled pixels": (pooled(1.5), Shifts(3)),
}
MOVING: dict[str, tuple[LinearOperator, Group]] = {
    "turns, elongated by a tenth": (blur(1.5, 0.9), QuarterTurns()),
    "any angle, elongated by a tenth": (blur(1.5, 0.9), Rotations(Cubic())),
    "dilations, blur": (blur(), Dilations(0.8, 1.25, Cubic(), False)),
    "shifts, mask": (half(), Shifts(3)),
    "turns, mask": (half(), QuarterTurns()),
    "shifts, large pixels": (SumPool((1, *SIZE), 2), Shifts(3)),
    "shifts, undersampled pixels": (pooled(0.6), Shifts(3)),
}


@pytest.mark.parametrize("name", COMMUTING)
def test_a_pair_that_commutes_is_refused(name: str) -> None:
    operator, group = COMMUTING[name]
    with pytest.raises(UnsupportedError, match="border apart"):
        check_moves(seen(operator), group)


@pytest.mark.parametrize("name", MOVING)
def test_a_pair_that_does_not_is_accepted(name: str) -> None:
    operator, group = MOVING[name]
    check_moves(seen(operator), group)
    assert commutator(seen(operator), group) > 3 * TOLERANCE


def test_data_that_are_missing_count_as_a_mask() -> None:
    good = half().mask
    assert commutator(seen(Identity((1, *SIZE)), good), Shifts(3)) == pytest.approx(commutator(seen(half()), Shifts(3)))


def test_one_row_of_another_instrument_is_enough_to_move_something() -> None:
    kernels = torch.stack([torch.from_numpy(round_psf(1.5, ratio)) for ratio in (1.0, 0.8)])[:, None]
    both = Observation(torch.zeros(2, 1, *SIZE), Convolution(kernels, 1, SIZE, ZeroBorder()), Gaussian(torch.tensor([0.1])))
    check_moves(both, QuarterTurns())
    with pytest.raises(UnsupportedError, match="border apart"):
        check_moves(both.select([0]), QuarterTurns())
