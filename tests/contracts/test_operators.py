"""Every registered operator keeps the operator's contract; broken ones are shown to fail it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffinv.core.batched import Batched
from diffinv.operators.algebra import Diagonal, Scaled
from diffinv.operators.base import LinearOperator, Operator
from diffinv.operators.border import ZeroBorder
from diffinv.operators.convolution import Convolution
from diffinv.operators.detector import Arcsinh
from diffinv.operators.geometry import Affine
from diffinv.operators.interpolation import Cubic
from diffinv.operators.sampling import SumPool
from diffinv.operators.spectral import BandMixing
from tests.cases import registered
from tests.cases.operators import ADAPTERS, BORDERS, CASES, FILTERS, SHAPE, SIZE, VARIANTS, draw, positive
from tests.contracts import checks

EVERY = CASES | VARIANTS | ADAPTERS
LINEAR = {name: make for name, make in EVERY.items() if isinstance(make(), LinearOperator)}
BATCHED = CASES | VARIANTS


@pytest.mark.parametrize(("kind", "cases"), [("operator", CASES), ("border", BORDERS), ("filter", FILTERS)])
def test_every_registered_name_has_a_case(kind, cases):
    assert sorted(cases) == registered(kind, "diffinv.operators")


@pytest.mark.parametrize("name", CASES)
def test_case_is_of_its_registered_class(name):
    assert CASES[name]().registry_key == ("operator", name)


def test_cases_cover_both_kinds_of_operator():
    assert len(LINEAR) >= 30 and len(EVERY) - len(LINEAR) >= 4


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "check",
    [
        checks.declares_its_output_shape,
        checks.jacobian_is_the_derivative,
        checks.composes_with_torch_func,
        checks.row_alone_is_row_in_batch,
        checks.batch_maps_commute,
        checks.keeps_dtype,
        checks.refuses_a_wrong_shape,
    ],
)
def test_operator(name, check):
    check(EVERY[name]())


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("check", [checks.adjoint_is_exact, checks.is_linear, checks.equals_its_matrix])
def test_linear_operator(name, check):
    check(LINEAR[name]())


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize(
    "check",
    [
        checks.gradients_reach_fields,
        checks.gradients_reach_leaves,
        checks.keeps_device,
        checks.survives_the_dictionary,
        checks.refuses_a_wrong_batch,
    ],
)
def test_operator_with_fields(name, check):
    check(BATCHED[name]())


class TransposedKernel(Convolution):
    """Mutant: forgets to point-reflect the kernel in the adjoint."""

    def adjoint(self, y: Tensor) -> Tensor:
        return self.apply(y)


class MeanPoolAdjoint(SumPool):
    """Mutant: spreads a sum as if it were a mean."""

    def adjoint(self, y: Tensor) -> Tensor:
        return super().adjoint(y) / self.factor**2


class MissingArea(Affine):
    """Mutant: forgets the area ratio on the way back."""

    def adjoint(self, y: Tensor) -> Tensor:
        return Affine(self.matrix, self.in_shape, self.size, self.filter, False).adjoint(y)


class WrongSlope(Arcsinh):
    """Mutant: the Jacobian is off by the scale."""

    def linearize(self, x: Tensor) -> LinearOperator:
        return Scaled(self.scale, super().linearize(x))


class Affinity(Diagonal):
    """Mutant: an offset in a linear operator."""

    def apply(self, x: Tensor) -> Tensor:
        return self.d * x + 1e-6


class BatchMean(Diagonal):
    """Mutant: looks at its batch-mates."""

    def apply(self, x: Tensor) -> Tensor:
        return self.d * (x - x.mean(0))


class FirstRowOnly(Diagonal):
    """Mutant: serves every image with the first one's parameters."""

    def apply(self, x: Tensor) -> Tensor:
        return self.d[:1] * x


class Promotes(Diagonal):
    """Mutant: computes in float64 whatever it is given."""

    def apply(self, x: Tensor) -> Tensor:
        return (self.d * x).double()


class OnTheHost(Diagonal):
    """Mutant: makes a constant where it pleases."""

    def apply(self, x: Tensor) -> Tensor:
        return self.d * x + torch.zeros(x.shape[-1])


class Detached(Diagonal):
    """Mutant: cuts the gradient to its field."""

    def apply(self, x: Tensor) -> Tensor:
        return self.d.detach() * x


class WrongShape(BandMixing):
    """Mutant: claims the transposed output."""

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self.mix.shape[1], *reversed(self.size))


@dataclass(frozen=True, eq=False)
class Careless(Diagonal):
    """Mutant: checks nothing at the door."""

    def __call__(self, x: Tensor) -> Tensor:
        return x


MATRIX = torch.tensor([[[1.3, 0.2, -0.4], [-0.1, 1.2, 0.3]]], dtype=torch.float64)
D = positive(2, *SHAPE)
MUTANTS: list[tuple[Batched, object]] = [
    (TransposedKernel(positive(2, 1, 3, 3), 2, SIZE, ZeroBorder()), checks.adjoint_is_exact),
    (TransposedKernel(positive(2, 1, 3, 3), 2, SIZE, ZeroBorder()), checks.equals_its_matrix),
    (MeanPoolAdjoint((2, 4, 6), 2), checks.adjoint_is_exact),
    (MissingArea(MATRIX, SHAPE, (4, 3), Cubic(), True), checks.adjoint_is_exact),
    (WrongSlope(SHAPE, positive(2)), checks.jacobian_is_the_derivative),
    (WrongSlope(SHAPE, positive(2)), checks.composes_with_torch_func),
    (Affinity(D), checks.is_linear),
    (Affinity(D), checks.equals_its_matrix),
    (BatchMean(D), checks.row_alone_is_row_in_batch),
    (FirstRowOnly(D), checks.row_alone_is_row_in_batch),
    (FirstRowOnly(D), checks.batch_maps_commute),
    (Promotes(D), checks.keeps_dtype),
    (OnTheHost(D), checks.keeps_device),
    (Detached(D), checks.gradients_reach_fields),
    (WrongShape(draw(2, 3, 2), SIZE), checks.declares_its_output_shape),
    (Careless(D), checks.refuses_a_wrong_shape),
    (Careless(D), checks.refuses_a_wrong_batch),
]


@pytest.mark.parametrize(("mutant", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", type(v).__name__))
def test_broken_operator_fails_its_contract(mutant: Operator, check):
    with pytest.raises(AssertionError):
        check(mutant)
