"""Groups of transforms: exact where they are permutations, adjoints everywhere, every row its own element."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffinv.core import registry
from diffinv.core.checks import ConfigError, ShapeError
from diffinv.core.rng import Rng
from diffinv.core.types import Shape
from diffinv.operators.algebra import Compose
from diffinv.operators.base import LinearOperator
from diffinv.operators.geometry import Affine, Dilation
from diffinv.operators.groups import (
    Amplitudes,
    BandPermutations,
    Dilations,
    Flips,
    Group,
    OpenShifts,
    Product,
    QuarterTurns,
    Rotations,
    Shifts,
)
from diffinv.operators.interpolation import Cubic, Linear
from diffinv.operators.permutation import BandPermutation, PixelPermutation
from tests.cases import registered
from tests.cases.groups import CASES
from tests.cases.operators import draw
from tests.contracts import checks

SHAPE = (2, 5, 5)
LIKE = torch.zeros(1, dtype=torch.float64)
PERMUTATIONS = ("shifts", "quarter_turns", "flips", "band_permutations")


def streams(count: int, seed: int = 0) -> Rng:
    return Rng.for_draws(seed, range(count), 1)


def elements(group: Group, count: int, shape: Shape = SHAPE, seed: int = 0) -> LinearOperator:
    return group.draw(streams(count, seed), shape, LIKE)


def is_orthogonal(group: Group) -> None:
    """TᵀT x = x = T Tᵀ x, bit by bit."""
    x, element = draw(8, *SHAPE, seed=4), elements(group, 8)
    assert torch.equal(element.adjoint(element(x)), x)
    assert torch.equal(element(element.adjoint(x)), x)


def rows_are_their_own(group: Group) -> None:
    """A row drawn alone is the row in the batch, and rows differ."""
    x = draw(1, *SHAPE, seed=4).expand(6, *SHAPE)
    whole = elements(group, 6)(x)
    for row in range(6):
        alone = group.draw(streams(6).select(slice(row, row + 1)), SHAPE, LIKE)
        assert torch.equal(alone(x[:1]), whole[row : row + 1])
    assert len({tuple(row.flatten().tolist()) for row in whole}) > 1


def test_every_registered_group_has_a_case() -> None:
    assert sorted(CASES) == registered("group", "diffinv.operators")


@pytest.mark.parametrize("name", CASES)
def test_a_group_survives_the_dictionary(name: str) -> None:
    group = CASES[name]()
    assert group.registry_key == ("group", name)
    assert registry.from_dict(registry.to_dict(group)) == group


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "check", [checks.adjoint_is_exact, checks.is_linear, checks.equals_its_matrix, checks.row_alone_is_row_in_batch]
)
def test_every_element_keeps_the_operators_contract(name: str, check) -> None:
    element = elements(CASES[name](), 2)
    assert tuple(element.in_shape) == tuple(element.out_shape) == SHAPE
    check(element)


class NoArea(Dilation):
    """Mutant: forgets the flux factor on the way back."""

    def adjoint(self, y: Tensor) -> Tensor:
        whole = self.affine
        return Affine(whole.matrix, whole.in_shape, whole.size, whole.filter, False).adjoint(y)


def test_a_dilation_with_a_broken_adjoint_fails_the_contract() -> None:
    good = elements(Dilations(0.5, 2.0, Cubic(), True), 2)
    with pytest.raises(AssertionError):
        checks.adjoint_is_exact(NoArea(good.factor, good.in_shape, good.filter, good.conserve_flux))


@pytest.mark.parametrize("name", CASES)
def test_a_row_draws_its_own_element(name: str) -> None:
    rows_are_their_own(CASES[name]())


@dataclass(frozen=True)
class OneForAll(Group):
    """Mutant: every row gets the element of the first."""

    def draw(self, rng: Rng, shape: Shape, like: Tensor) -> LinearOperator:
        return Shifts(2).draw(rng, shape, like).select(slice(0, 1))


@dataclass(frozen=True)
class BatchOrder(Group):
    """Mutant: the element depends on the place in the batch."""

    def draw(self, rng: Rng, shape: Shape, like: Tensor) -> LinearOperator:
        pixels = torch.arange(shape[1] * shape[2])
        return PixelPermutation((pixels + torch.arange(len(rng))[:, None]) % len(pixels), shape)


@pytest.mark.parametrize("mutant", [OneForAll(), BatchOrder()])
def test_a_group_that_shares_rows_fails_the_contract(mutant: Group) -> None:
    with pytest.raises(AssertionError):
        rows_are_their_own(mutant)


@pytest.mark.parametrize("name", PERMUTATIONS)
def test_permutations_are_orthogonal_to_the_bit(name: str) -> None:
    is_orthogonal(CASES[name]())


@pytest.mark.parametrize("group", [OpenShifts(2), Rotations(Linear()), Dilations(0.5, 2.0, Cubic(), False), Amplitudes(0.3)])
def test_lossy_and_interpolated_groups_are_not_orthogonal(group: Group) -> None:
    with pytest.raises(AssertionError):
        is_orthogonal(group)


@pytest.mark.parametrize("name", CASES)
def test_the_element_is_the_same_for_every_dtype(name: str) -> None:
    x = draw(3, *SHAPE)
    single = CASES[name]().draw(streams(3), SHAPE, LIKE.float())(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), elements(CASES[name](), 3)(x), rtol=1e-5, atol=1e-5)


def shift_of(row: Tensor, x: Tensor) -> tuple[int, int]:
    """The periodic shift that makes `row` of x."""
    (height, width), found = x.shape[-2:], []
    for d in itertools.product(range(-(height // 2), height - height // 2), range(-(width // 2), width - width // 2)):
        if torch.equal(row, x.roll(d, (-2, -1))):
            found.append(d)
    assert len(found) == 1
    return found[0]


def test_shifts_are_rolls_within_reach() -> None:
    x = draw(1, 1, 5, 6).expand(60, 1, 5, 6)
    shifts = {shift_of(row, x[0]) for row in elements(Shifts(1), 60, (1, 5, 6))(x)}
    assert shifts == set(itertools.product((-1, 0, 1), repeat=2))


def test_open_shifts_bring_in_an_empty_sky() -> None:
    x = draw(1, 1, 4, 4)
    padded = torch.nn.functional.pad(x[0], (2, 2, 2, 2))
    expected = {
        tuple(padded[:, 2 - r : 6 - r, 2 - c : 6 - c].flatten().tolist()) for r, c in itertools.product((-1, 0, 1), repeat=2)
    }
    moved = elements(OpenShifts(1), 60, (1, 4, 4))(x.expand(60, 1, 4, 4))
    assert {tuple(row.flatten().tolist()) for row in moved} == expected


def uniform(group: Group, shape: Shape, expected: set[tuple[float, ...]]) -> None:
    """Every expected image of one x is drawn, equally often: all counts within 4.5 standard deviations, N = 6000."""
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(1, *shape)
    count = Counter(tuple(row.flatten().tolist()) for row in elements(group, 6000, shape)(x.expand(6000, *shape)))
    assert set(count) == expected
    p = 1 / len(expected)
    assert max(abs(n - 6000 * p) for n in count.values()) <= 4.5 * (6000 * p * (1 - p)) ** 0.5


def turned(shape: Shape) -> tuple[set[tuple[float, ...]], set[tuple[float, ...]]]:
    """The four turns of an image, and its eight turns and mirrors."""
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    turns = [torch.rot90(x, k, (-2, -1)) for k in range(4)]
    four = {tuple(t.flatten().tolist()) for t in turns}
    return four, four | {tuple(t.flip(-1).flatten().tolist()) for t in turns}


def test_quarter_turns_are_the_four_turns_equally_often() -> None:
    uniform(QuarterTurns(), (1, 4, 4), turned((1, 4, 4))[0])


def test_turns_and_flips_are_the_dihedral_group_equally_often() -> None:
    uniform(Product((QuarterTurns(), Flips())), (1, 3, 3), turned((1, 3, 3))[1])


def test_a_mutant_that_prefers_the_identity_is_not_uniform() -> None:
    with pytest.raises(AssertionError):
        uniform(Product((QuarterTurns(), Shifts(0), QuarterTurns())), (1, 4, 4), turned((1, 4, 4))[1])


def test_shifts_of_full_reach_take_every_shift_of_the_torus_equally_often() -> None:
    x = torch.arange(12, dtype=torch.float64).reshape(1, 4, 3)
    rolls = {tuple(x.roll(d, (1, 2)).flatten().tolist()) for d in itertools.product(range(4), range(3))}
    uniform(Shifts(9), (1, 4, 3), rolls)


def test_every_order_of_three_bands_is_drawn_equally_often() -> None:
    x = torch.arange(6, dtype=torch.float64).reshape(3, 1, 2)
    orders = {tuple(x[list(p)].flatten().tolist()) for p in itertools.permutations(range(3))}
    uniform(BandPermutations(), (3, 1, 2), orders)


def test_an_amplitude_is_log_normal() -> None:
    logs = elements(Amplitudes(0.3), 4000).scale.log()
    assert abs(float(logs.mean())) <= 4.5 * 0.3 / 4000**0.5
    assert abs(float(logs.std()) - 0.3) <= 4.5 * 0.3 / 8000**0.5


def test_a_dilation_factor_is_uniform_in_its_logarithm() -> None:
    factor = elements(Dilations(0.5, 4.0, Linear(), False), 4000).factor
    assert 0.5 < float(factor.min()) < 0.51 and 3.9 < float(factor.max()) < 4.0
    assert abs(float((factor < 2**0.5).double().mean()) - 0.5) <= 4.5 * 0.5 / 4000**0.5


def test_dilations_of_factor_one_and_flux_conservation() -> None:
    x = draw(2, *SHAPE)
    torch.testing.assert_close(elements(Dilations(1.0, 1.0, Cubic(), True), 2)(x), x, rtol=0, atol=1e-12)
    kept, fainter = (elements(Dilations(2.0, 2.0, Cubic(), flux), 2)(x) for flux in (False, True))
    torch.testing.assert_close(fainter, kept / 4)


def test_a_product_applies_its_last_group_first() -> None:
    x, rng, again = draw(3, *SHAPE), streams(3), streams(3)
    element = Product((OpenShifts(2), QuarterTurns())).draw(rng, SHAPE, LIKE)
    outer, inner = OpenShifts(2).draw(again, SHAPE, LIKE), QuarterTurns().draw(again, SHAPE, LIKE)
    assert isinstance(element, Compose)
    assert torch.equal(element(x), outer(inner(x)))
    assert not torch.equal(element(x), inner(outer(x)))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: QuarterTurns().draw(streams(1), (1, 4, 5), LIKE), "crop to a square"),
        (lambda: PixelPermutation(torch.tensor([[0, 0, 1, 2]]), (1, 2, 2)), "once a row"),
        (lambda: PixelPermutation(torch.tensor([[0, 1, 2]]), (1, 2, 2)), "flat ind"),
        (lambda: BandPermutation(torch.tensor([[0.0, 1.0]]), (2, 2)), "int64"),
    ],
)
def test_what_is_not_a_rearrangement_is_refused(make, word: str) -> None:
    with pytest.raises(ShapeError, match=word):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Shifts(-1),
        lambda: OpenShifts(1.5),
        lambda: Dilations(0.0, 1.0, Linear(), True),
        lambda: Dilations(2.0, 1.0, Linear(), True),
        lambda: Amplitudes(float("inf")),
        lambda: Product(()),
    ],
)
def test_a_group_that_is_empty_or_absurd_is_refused(make) -> None:
    with pytest.raises(ConfigError):
        make()
