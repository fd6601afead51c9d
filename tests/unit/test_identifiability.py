"""Identifiability: what a group adds is read from the spectrum, against the noise, whatever the operator is called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, UnsupportedError
from diffinv.core.rng import Rng
from diffinv.likelihood import Flat, Joint, Observation
from diffinv.losses.identifiability import Identifiability, Spectrum, check_group_helps, identifiability, require_identifiable
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.poisson import Poisson
from diffinv.operators.algebra import Diagonal, Identity
from diffinv.operators.base import LinearOperator
from diffinv.operators.convolution import PeriodicConvolution
from diffinv.operators.detector import Arcsinh
from diffinv.operators.groups import Amplitudes, Dilations, Flips, Group, Product, QuarterTurns, Rotations, Shifts
from diffinv.operators.interpolation import Cubic, KaiserSinc, Linear
from diffinv.operators.sampling import Mask, Mosaic, SumPool
from tests.cases.operators import draw

SIZE = 8
SHAPE = (1, SIZE, SIZE)


def blur(rows: float, columns: float | None = None, size: int = SIZE) -> PeriodicConvolution:
    """A Gaussian PSF of these widths in pixels, round if only one is given."""
    r = torch.arange(size - 1 + size % 2, dtype=torch.float64) - (size - 1) // 2
    kernel = torch.exp(-(r[:, None] ** 2) / (2 * rows**2) - r**2 / (2 * (columns or rows) ** 2))
    return PeriodicConvolution((kernel / kernel.sum())[None, None], 1, (size, size))


def low_pass(radius: float, size: int) -> PeriodicConvolution:
    """Keeps the frequencies within `radius` cycles a pixel, exactly."""
    f = torch.fft.fftfreq(size, dtype=torch.float64)
    kernel = torch.fft.ifft2((f[:, None] ** 2 + f**2 <= radius**2).to(torch.complex128)).real
    return PeriodicConvolution(kernel.roll((size // 2, size // 2), (0, 1))[None, None], 1, (size, size))


def masks(rows: int, share: float, seed: int = 0) -> Mask:
    """Independent masks that keep this share of the pixels."""
    return Mask(Rng.for_draws(seed, range(rows), 1).uniform(torch.zeros(rows, *SHAPE, dtype=torch.float64)) < share)


def examine(source: LinearOperator, group: Group | None, noise: float = 0.05, **options: int) -> Identifiability:
    return identifiability(source, group, rng=Rng([3]), signal=1.0, noise_level=noise, **options)


def rank(found: Identifiability) -> float:
    """Share of eigenvalues that are not rounding: what exact arithmetic would call the rank."""
    return float(found.spectrum.weights[found.spectrum.values > 1e-10 * found.spectrum.values[0]].sum())


NOTHING: dict[str, tuple[Callable[[], LinearOperator], Group]] = {
    "shifts, blur": (lambda: blur(1.0), Shifts(SIZE)),
    "shifts, elongated blur": (lambda: blur(1.5, 0.5), Shifts(SIZE)),
    "turns, round blur": (lambda: blur(1.0), QuarterTurns()),
    "turns, flips and shifts, round blur": (lambda: blur(1.0), Product((QuarterTurns(), Flips(), Shifts(3)))),
    "flips, elongated blur": (lambda: blur(1.5, 0.5), Flips()),
    "shifts, product of blurs by another name": (lambda: blur(1.0, 0.5).H @ blur(0.5), Shifts(SIZE)),
}
SOMETHING: dict[str, tuple[Callable[[], LinearOperator], Group]] = {
    "shifts, pool of blur": (lambda: SumPool(SHAPE, 2) @ blur(0.6), Shifts(SIZE)),
    "shifts, blur of a quadrant": (lambda: blur(1.0) @ masks(1, 0.5), Shifts(SIZE)),
    "shifts, mask": (lambda: masks(1, 0.4), Shifts(SIZE)),
    "turns, mask": (lambda: masks(1, 0.4), QuarterTurns()),
    "turns, elongated blur": (lambda: blur(1.5, 0.5), QuarterTurns()),
    "dilations, round blur": (lambda: blur(1.0, size=12), Dilations(1.0, 2.0, KaiserSinc(3, 5.0), False)),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_group_that_commutes_with_the_operator_adds_nothing(name: str) -> None:
    make, group = NOTHING[name]
    found = examine(make(), group, elements=16)
    assert found.seen == found.without < 1
    assert found.moved <= 1e-13
    with pytest.raises(UnsupportedError, match="leave AᵀPA as it is") as refused:
        check_group_helps(found)
    assert "\n" not in str(refused.value) and f"{100 * found.seen:.1f}" in str(refused.value)


@pytest.mark.parametrize("name", SOMETHING)
def test_a_group_that_moves_the_unseen_part_adds_to_what_is_seen(name: str) -> None:
    make, group = SOMETHING[name]
    found = examine(make(), group, elements=32)
    assert found.seen > found.without + 0.1
    assert found.moved > 0.1
    check_group_helps(found)


@pytest.mark.parametrize("size", [8, 9])
def test_whether_turns_help_is_the_shape_of_the_psf_not_the_type_of_the_operator(size: int) -> None:
    round_one, long_one = (examine(operator, QuarterTurns()) for operator in (blur(0.9, size=size), blur(1.5, 0.5, size)))
    assert round_one.seen == round_one.without and long_one.seen > long_one.without + 0.1


def test_the_seen_share_of_a_blur_is_the_count_of_its_transfer_above_the_noise() -> None:
    operator = blur(1.0)
    for noise in (0.3, 0.05, 0.001):
        expected = float((operator.power > noise**2).double().mean())
        found = examine(operator, None, noise)
        assert found.seen == pytest.approx(expected, abs=1e-12)
        spectrum = (operator.power / noise**2).flatten().sort(descending=True)[0]
        torch.testing.assert_close(found.spectrum.values, spectrum, rtol=1e-9, atol=1e-9 * float(spectrum[0]))


def test_signal_and_noise_count_as_their_ratio() -> None:
    operator = blur(1.0)
    one = identifiability(operator, None, rng=Rng([3]), signal=1.0, noise_level=0.05)
    two = identifiability(operator, None, rng=Rng([3]), signal=20.0, noise_level=1.0)
    torch.testing.assert_close(one.spectrum.values, two.spectrum.values)
    assert identifiability(operator, None, rng=Rng([3]), signal=5.0, noise_level=1.0).seen < one.seen


def test_masks_that_jointly_cover_the_image_reach_full_rank() -> None:
    cover = torch.arange(64).reshape(1, 1, 8, 8) % 4 == torch.arange(4).reshape(4, 1, 1, 1)
    found = examine(Mask(cover), None)
    assert (found.without, found.seen, found.elements) == (0.25, 1.0, 4)
    assert float(found.map.max()) == 0
    torch.testing.assert_close(found.spectrum.values, torch.full((64,), 100.0, dtype=torch.float64))
    require_identifiable(found, least_seen=1.0)


def test_the_map_of_masks_is_what_none_of_them_sees() -> None:
    operator = masks(3, 0.3)
    unseen = ~operator.mask.any(0)
    found = examine(operator, None)
    torch.testing.assert_close(found.map, unseen.double(), rtol=0, atol=1e-12)
    assert found.seen == pytest.approx(1 - float(unseen.double().mean()), abs=1e-12)
    assert found.without == pytest.approx(float(operator.mask.double().mean()), abs=1e-12)


def test_the_map_is_the_diagonal_of_a_projector_on_the_unseen_space() -> None:
    found = examine(SumPool(SHAPE, 2), None)
    torch.testing.assert_close(found.map, torch.full(SHAPE, 0.75, dtype=torch.float64), rtol=0, atol=1e-12)
    blurred = examine(SumPool(SHAPE, 2) @ blur(0.6), Shifts(SIZE))
    assert float(blurred.map.mean()) == pytest.approx(1 - blurred.seen, abs=1e-12)


def test_dilations_bring_a_sharp_low_pass_above_the_noise() -> None:
    found = examine(low_pass(0.2, 12), Dilations(1.0, 2.0, Cubic(), False), 0.5, elements=32)
    assert found.without == pytest.approx(21 / 144)
    assert found.seen > found.without + 0.05
    check_group_helps(found)


@pytest.mark.parametrize("filter", [Linear(), Cubic(), KaiserSinc(3, 5.0)])
def test_interpolation_raises_the_rank_of_a_round_psf_but_not_what_is_seen(filter) -> None:
    """Turning by any angle spills into the null space: full rank in exact arithmetic, nothing above a noise that lets
    dilations through (the test above)."""
    found = examine(low_pass(0.2, 12), Rotations(filter), 0.5, elements=32)
    assert rank(examine(low_pass(0.2, 12), None)) == pytest.approx(21 / 144)
    assert rank(found) > 0.9
    assert found.seen <= found.without
    with pytest.raises(UnsupportedError, match="nothing unseen above the noise"):
        check_group_helps(found)


def test_counting_against_too_low_a_noise_is_fooled() -> None:
    """The mutant of the claim above: with σ a thousand times too small the spill counts as seen."""
    assert examine(low_pass(0.2, 12), Rotations(Linear()), 4e-4, elements=32).seen > 0.9


def test_amplitudes_move_the_information_and_add_nothing() -> None:
    found = examine(masks(1, 0.5), Amplitudes(0.5))
    assert found.moved > 0.1 and found.seen == found.without
    with pytest.raises(UnsupportedError, match="nothing unseen"):
        check_group_helps(found)


def test_bands_that_a_mosaic_leaves_out_are_unseen() -> None:
    pattern = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]]]).double()
    found = examine(Mosaic(pattern, (4, 4)), Shifts(4))
    assert found.without == pytest.approx(1 / 3)
    assert found.seen == 1.0 and tuple(found.map.shape) == (3, 4, 4)


def test_an_observation_is_counted_with_its_own_noise_and_masks() -> None:
    std = torch.full((1, *SHAPE), 0.5, dtype=torch.float64)
    std[..., :4] = 2.0
    mask = torch.ones(1, *SHAPE, dtype=torch.bool)
    mask[..., 0, :] = False
    observation = Observation(draw(1, *SHAPE), Identity(SHAPE), Gaussian(std, mask))
    found = identifiability(observation, None, rng=Rng([3]), signal=1.0)
    expected = 1 - (mask[0] & (std[0] < 1)).double()
    torch.testing.assert_close(found.map, expected, rtol=0, atol=1e-12)
    assert identifiability(observation, None, rng=Rng([3]), signal=3.0).seen == pytest.approx(7 / 8)
    both = Joint((observation, Observation(draw(1, *SHAPE), Identity(SHAPE), Gaussian(std.flip(-1)))))
    assert identifiability(both, None, rng=Rng([3]), signal=1.0).seen == pytest.approx(60 / 64)


def test_rows_and_group_count_together() -> None:
    operator = masks(2, 0.2)
    alone, together = examine(operator, None), examine(operator, QuarterTurns(), elements=25)
    assert together.elements == 26
    assert together.without == alone.seen < together.seen


def estimates_agree(exact: Identifiability, estimate: Identifiability, probes: int) -> None:
    """Shares within five standard errors (and a pixel), the map within five times its bound ½/√p."""
    assert abs(estimate.seen - exact.seen) <= 5 * estimate.error + 1 / exact.map.numel()
    assert abs(estimate.without - exact.without) <= 5 * estimate.error + 1 / exact.map.numel()
    assert float((estimate.map - exact.map).abs().max()) <= 2.5 / probes**0.5


@pytest.mark.parametrize("source", [lambda: SumPool(SHAPE, 2) @ blur(0.6), lambda: masks(1, 0.4)])
def test_the_matrix_free_estimate_agrees_with_the_dense_one(source: Callable[[], LinearOperator]) -> None:
    exact = examine(source(), Shifts(SIZE), 0.2, elements=8)
    estimate = examine(source(), Shifts(SIZE), 0.2, elements=8, dense_up_to=0, probes=64)
    assert exact.error == 0 <= estimate.error < 0.02
    estimates_agree(exact, estimate, 64)
    assert float(estimate.spectrum.weights.sum()) == pytest.approx(1)
    other = examine(source(), Shifts(SIZE), 0.2, elements=8, dense_up_to=0, probes=64, steps=2)
    with pytest.raises(AssertionError):
        estimates_agree(examine(blur(0.6), None, 0.2), other, 64)


def test_the_matrix_free_estimate_refuses_a_commuting_group_too() -> None:
    found = examine(blur(2.0, size=40), Shifts(40), elements=2, probes=4)
    assert found.error > 0 and found.seen == pytest.approx(found.without, abs=1e-3)
    with pytest.raises(UnsupportedError, match="leave AᵀPA as it is"):
        check_group_helps(found)
    expected = float((blur(2.0, size=40).power > 0.05**2).double().mean())
    assert abs(found.seen - expected) <= 5 * found.error + 0.005


def test_the_same_streams_give_the_same_answer_and_are_not_used_up() -> None:
    rng = Rng([3])
    one, two = (identifiability(masks(1, 0.4), Shifts(2), rng=rng, signal=1.0, noise_level=0.1, elements=3) for _ in range(2))
    assert torch.equal(one.spectrum.values, two.spectrum.values)
    other = identifiability(masks(1, 0.4), Shifts(2), rng=Rng([4]), signal=1.0, noise_level=0.1, elements=3)
    assert not torch.equal(one.spectrum.values, other.spectrum.values)


def test_training_on_what_is_unseen_is_refused_unless_asked_for_by_name() -> None:
    found = examine(SumPool(SHAPE, 2), None)
    with pytest.raises(UnsupportedError, match="25.0 % of image space.*allow_unidentifiable") as refused:
        require_identifiable(found, least_seen=0.9)
    assert "\n" not in str(refused.value)
    require_identifiable(found, least_seen=0.9, allow_unidentifiable=True)
    require_identifiable(found, least_seen=0.25)


def test_a_group_is_not_needed_where_everything_is_seen_and_must_be_given_to_be_judged() -> None:
    with pytest.raises(UnsupportedError, match="sees everything"):
        check_group_helps(examine(Identity(SHAPE), Shifts(2)))
    with pytest.raises(UnsupportedError, match="no group was tested"):
        check_group_helps(examine(Identity(SHAPE), None))


def test_the_line_to_print_has_the_figures() -> None:
    text = str(examine(SumPool(SHAPE, 2) @ blur(0.6), Shifts(SIZE)))
    assert "\n" not in text
    assert all(part in text for part in ("76.6 %", "25.0 % without Shifts", "64 elements", "64 unknowns"))
    assert "by one row alone; 3 rows" in str(examine(masks(3, 0.3), None))
    assert "±" in str(examine(blur(0.6), None, dense_up_to=0))


def test_no_data_see_nothing() -> None:
    assert identifiability(Flat(SHAPE), None, rng=Rng([3]), signal=1.0).seen == 0


def poisson(y: Tensor) -> Observation:
    one = torch.ones(1, dtype=torch.float64)
    return Observation(y, Identity(SHAPE), Poisson(one, one))


@pytest.mark.parametrize(
    ("source", "options", "error", "word"),
    [
        (Arcsinh(SHAPE, torch.ones(1)), {"signal": 1.0, "noise_level": 1.0}, UnsupportedError, "not linear"),
        (poisson(torch.ones(1, *SHAPE)), {"signal": 1.0}, UnsupportedError, "depends on the image"),
        (Identity(SHAPE), {"signal": 1.0}, DiffinvError, "noise_level must be"),
        (Identity(SHAPE), {"signal": 0.0, "noise_level": 1.0}, DiffinvError, "signal must be"),
        (Flat(SHAPE), {"signal": 1.0, "noise_level": 1.0}, DiffinvError, "its own noise"),
    ],
)
def test_what_has_no_spectrum_is_refused(source, options: dict[str, float], error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        identifiability(source, None, rng=Rng([3]), **options)


def test_single_precision_operators_are_tested_in_double() -> None:
    found = examine(Diagonal(torch.full((1, *SHAPE), 0.5)), None)
    assert found.spectrum.values.dtype == torch.float64 and found.seen == 1


def test_a_gain_within_two_standard_errors_is_none() -> None:
    share = lambda seen: Spectrum(torch.tensor([2.0, 0.5]), torch.tensor([seen, 1 - seen]))
    found = lambda error: Identifiability(share(0.54), share(0.5), torch.zeros(1, 4, 4), 0.3, error, "Flips", 4)
    check_group_helps(found(0.01))
    with pytest.raises(UnsupportedError, match="bring nothing unseen above the noise"):
        check_group_helps(found(0.03))
