"""`reconstruct`: a result depends on seed, image and draw, never on how rows are batched; scales and errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError
from diffinv.core.rng import Rng
from diffinv.engine.draws import Method
from diffinv.engine.pilot import DRAWS as PILOT_DRAWS
from diffinv.engine.pilot import levels, refine_scale
from diffinv.engine.reconstruct import Result, field_prior, reconstruct
from diffinv.guidance.base import ConjugateGradients, Gmres
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.guidance.pseudo_inverse import PseudoInverse
from diffinv.likelihood import Flat, Joint, Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Identity
from diffinv.priors.analytic import GaussianPrior
from diffinv.priors.base import Denoiser
from diffinv.priors.store import Prior, PriorCard, build_denoiser, load_prior, save_prior
from diffinv.priors.tiled import Tiled
from diffinv.samplers.ode import Euler, Heun, Multistep
from diffinv.samplers.sde import Ancestral
from diffinv.schedules import LogUniform
from diffinv.uncertainty.predictive import reduced_chi2
from diffinv.uncertainty.quantiles import quantile
from tests.cases.guidance import DATA, SHAPE, smooth_prior

IMAGES, FIELD = 2, 8
METHOD = Method(Ancestral(), MomentMatching(ConjugateGradients(20, 1e-5)), 8, LogUniform(1e-2, 30.0))
CARD = PriorCard(
    name="tiny",
    bands=("grey",),
    size=FIELD,
    pixel_scale=0.1,
    target_fwhm=0.2,
    sigma_data=1.0,
    sigma_min=0.01,
    sigma_max=30.0,
    widths=(8,),
    blocks=(1,),
    training="none: random weights",
)
QUICK = replace(METHOD, schedule=None, guidance=MomentMatching(Gmres(6, 1e-4)))


def prior() -> GaussianPrior:
    return smooth_prior().to(torch.float32)


def data() -> Observation:
    return DATA["blur"]().likelihood.to(torch.float32)


def run(**options) -> Result:
    return reconstruct(data(), prior(), **{"draws": 5, "seed": 1, "method": METHOD, **options})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Prior:
    """An untrained U-Net with random weights of every layer, saved and loaded."""
    denoiser = build_denoiser(CARD)
    rng = Rng([5])
    with torch.no_grad():
        for number, parameter in enumerate(denoiser.parameters()):
            parameter.add_(0.05 * rng.spawn(number).normal(parameter[None])[0])
    path = Path(tmp_path_factory.mktemp("prior")) / "tiny.safetensors"
    save_prior(path, denoiser, CARD, variance=torch.full((1, 1, FIELD, FIELD), 0.5), precision=torch.float32)
    return load_prior(path)


def field(unit: float = 1.0, *, size: tuple[int, int] = (FIELD, FIELD)) -> Observation:
    """Two noisy images of rms 1 and 4, in a unit: `unit` = 2 doubles the numbers."""
    y = Rng([1, 2]).normal(torch.zeros(2, 1, *size)) * torch.tensor([1.0, 4.0]).reshape(2, 1, 1, 1)
    return Observation(unit * y, Identity((1, *size)), Gaussian(unit * torch.tensor([0.3, 0.5])))


def test_chunks_of_rows_do_not_change_the_draws() -> None:
    """10 rows at once, in threes, and one by one: float32 rounding through 8 steps."""
    whole = run(max_batch=64)
    for size in (3, 1):
        torch.testing.assert_close(run(max_batch=size).samples, whole.samples, rtol=1e-4, atol=1e-4)


def test_an_image_alone_gives_what_it_gives_in_the_batch() -> None:
    both = run(image_ids=[40, 7])
    for row, image in enumerate((40, 7)):
        alone = reconstruct(data().select([row]), prior(), draws=5, seed=1, method=METHOD, image_ids=[image])
        torch.testing.assert_close(alone.samples[0], both.samples[row], rtol=1e-4, atol=1e-4)


def test_more_draws_keep_the_first_ones() -> None:
    torch.testing.assert_close(run(draws=7).samples[:, :5], run().samples, rtol=1e-4, atol=1e-4)


def test_the_same_seed_repeats_and_another_seed_does_not() -> None:
    first = run().samples
    assert torch.equal(first, run().samples)
    assert float((first - run(seed=2).samples).abs().median()) > 0.01


def test_draws_and_images_have_their_own_noise() -> None:
    """The same data twice: two images with different ids get different draws."""
    twice = data().select([0, 0])
    rows = reconstruct(twice, prior(), draws=3, method=METHOD).samples.flatten(0, 1).flatten(1)
    distance = torch.cdist(rows, rows) + 1e9 * torch.eye(6)
    assert float(distance.min()) > 0.01


def test_draws_have_the_exact_posterior_mean_and_spread() -> None:
    """800 Heun draws of one image: |z| < 5 over 16 means, variances to 5 standard errors plus 2 % of the sampler."""
    draws, case, exact_prior = 800, DATA["blur"](), smooth_prior()
    precision, pull = case.information(0)
    inverse = torch.linalg.inv(exact_prior.covariance)
    covariance = torch.linalg.inv(inverse + precision)
    mean = covariance @ (inverse @ exact_prior.mean.flatten() + pull)
    method = replace(METHOD, sampler=Heun(), steps=48)
    result = reconstruct(data().select([0]), prior(), draws=draws, method=method, max_batch=draws)
    variance = covariance.diagonal()
    z = (result.mean[0].flatten() - mean) / (variance / draws).sqrt()
    assert float(z.abs().max()) < 5
    ratio = result.std[0].flatten().double() ** 2 / variance
    assert float((ratio - 1).abs().max()) < 5 * (2 / draws) ** 0.5 + 0.02


def test_a_result_holds_what_follows_from_its_draws() -> None:
    result = run(draws=20)
    assert result.samples.shape == (IMAGES, 20, *SHAPE) and result.samples.dtype == torch.float32
    assert torch.equal(result.mean, result.samples.mean(1))
    assert torch.equal(result.std, result.samples.std(1))
    assert torch.equal(result.quantile(0.9), quantile(result.samples, 0.9))
    assert torch.equal(result.scale, torch.ones(IMAGES))
    assert result.method == METHOD and not result.calibrated  # ancestral
    assert result.chi2.shape == (IMAGES,) and result.chi2_draws.shape == (IMAGES, 20)
    torch.testing.assert_close(result.chi2_draws[:, 3], reduced_chi2(data(), result.samples[:, 3]))
    assert result.information is None
    with pytest.raises(DiffinvError, match="at least 39"):
        result.quantile(0.975)


def test_a_pseudo_inverse_result_is_not_calibrated() -> None:
    assert run(method=replace(METHOD, sampler=Multistep())).calibrated
    assert not run(method=replace(METHOD, sampler=Multistep(), guidance=PseudoInverse(1.0))).calibrated


def test_chi_squared_is_one_a_datum_for_the_truth_and_adds_up_over_data_sets() -> None:
    """4,096 data: 1 ± 5 √(2/4096)."""
    truth = torch.zeros(1, 1, 64, 64)
    noise = Gaussian(torch.tensor([0.3]))
    one = Observation(noise.sample(truth, Rng([3])), Identity((1, 64, 64)), noise)
    assert abs(float(reduced_chi2(one, truth)) - 1) < 5 * (2 / 4096) ** 0.5
    far = replace(one, y=one.y + 0.3)
    expected = (reduced_chi2(one, truth) + reduced_chi2(far, truth)) / 2
    torch.testing.assert_close(reduced_chi2(Joint((one, far)), truth), expected)
    assert reduced_chi2(Flat((1, 4, 4)), torch.zeros(2, 1, 4, 4)).tolist() == [0, 0]


def test_progress_counts_row_steps_up_to_all_of_them() -> None:
    seen: list[tuple[int, int]] = []
    run(max_batch=4, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == 3 * METHOD.steps
    assert {total for _, total in seen} == {10 * METHOD.steps}
    counts = [done for done, _ in seen]
    assert counts == sorted(set(counts)) and counts[0] == 4 and counts[-1] == 10 * METHOD.steps


@pytest.mark.parametrize(
    ("sampler", "guidance", "calls"),
    [
        (Euler(), MomentMatching(ConjugateGradients(3, 0.0)), 5 * (1 + 4)),
        (Heun(), MomentMatching(Gmres(2, 0.0)), 8 * (1 + 2)),
        (Heun(), MomentMatching(Gmres(2, 0.0, inner=4)), 8 * (1 + 1 + 2)),
        (Ancestral(), PseudoInverse(1.0), 5 * (1 + 1)),
    ],
)
def test_network_calls_are_forward_passes_plus_vjps(sampler, guidance, calls: int) -> None:
    assert run(method=Method(sampler, guidance, 4, LogUniform(0.3, 30.0)), max_batch=3).network_calls == calls


class NotANumber(Denoiser):
    """NaN where the last pixel of the noisy image is positive."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(x[:, :, -1:, -1:] > 0, torch.nan, x) * 0.5


def test_a_draw_that_is_not_finite_names_image_and_draw() -> None:
    method = replace(METHOD, sampler=Euler())
    start = Rng.for_draws(1, [0, 1], 5).spawn(0).normal(torch.zeros(10, *SHAPE))
    first = int((start[:, 0, -1, -1] > 0).nonzero()[0])
    with pytest.raises(DiffinvError, match=f"draw {first % 5} of image {first // 5} is not finite") as error:
        reconstruct(data(), NotANumber(), draws=5, seed=1, method=method)
    assert "\n" not in str(error.value)


def test_a_datum_that_is_not_a_number_stops_the_run() -> None:
    y = data().y.clone()
    y[1, 0, 2, 2] = torch.nan
    with pytest.raises(DiffinvError, match="image 1 is not finite"):
        reconstruct(replace(data(), y=y), prior(), draws=2, method=METHOD)


def test_a_prior_without_card_needs_a_schedule() -> None:
    with pytest.raises(DiffinvError, match="schedule"):
        run(method=replace(METHOD, schedule=None))


def test_a_prior_with_card_needs_a_first_scale(tiny: Prior) -> None:
    with pytest.raises(DiffinvError, match="scale="):
        reconstruct(field(), tiny, draws=2, method=QUICK)


def test_noise_levels_begin_above_the_spread_of_each_posterior_and_end_at_the_cards(tiny: Prior) -> None:
    grid = levels(Method(steps=5), torch.tensor([0.5, 1e-6, 1e6]), CARD, 3)
    assert grid.shape == (3, 6) and grid.dtype == torch.float64
    torch.testing.assert_close(grid[:, 0], torch.tensor([1.0, 10 * CARD.sigma_min, CARD.sigma_max], dtype=torch.float64))
    torch.testing.assert_close(grid[:, -2], torch.full((3,), CARD.sigma_min, dtype=torch.float64))
    ratios = grid[:, 1:-1] / grid[:, :-2]
    torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios))


def test_the_variance_comes_from_the_card(tiny: Prior) -> None:
    result = reconstruct(field(), tiny, draws=2, method=QUICK, scale=torch.tensor([1.0, 4.0]))
    assert result.method.schedule is None
    assert result.samples.shape == (2, 2, 1, FIELD, FIELD)
    variance = 0.5 * result.scale.reshape(2, 1, 1, 1) ** 2
    torch.testing.assert_close(result.information, 0.5 * torch.log(variance / result.samples.var(1)))


def test_draws_carry_the_unit_of_the_data(tiny: Prior) -> None:
    """A thousand times brighter data, noise and first scale give a thousand times brighter draws."""
    scale = torch.tensor([1.0, 4.0])
    one, bright = (reconstruct(field(k), tiny, draws=2, method=QUICK, scale=k * scale) for k in (1.0, 1024.0))
    torch.testing.assert_close(bright.samples, 1024 * one.samples, rtol=1e-3, atol=1.0)
    torch.testing.assert_close(bright.scale, 1024 * one.scale, rtol=1e-3, atol=0)
    assert float(one.samples.abs().amax()) > 1


class Shrinkage(Denoiser):
    """The exact denoiser of white noise of variance 1."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1 + sigma.to(x.dtype).reshape(-1, 1, 1, 1) ** 2)


def test_refining_finds_the_scale_that_the_data_show() -> None:
    """White images of rms 1 and 4 in little noise, first guesses wrong by 2 either way: within 10 % (64 pixels, 4 draws)."""
    observed = replace(field(), noise=Gaussian(torch.tensor([0.05, 0.05])))
    method = replace(QUICK, schedule=LogUniform(1e-2, 30.0), steps=64)
    truth = observed.y.square().mean((1, 2, 3)).sqrt()
    guess, rng = truth * torch.tensor([0.5, 2.0]), Rng.for_draws(0, [0, 1], PILOT_DRAWS)
    found, spread = refine_scale(observed, Shrinkage(), guess, rng, card=CARD, method=method, max_batch=64)
    assert float((found / truth - 1).abs().max()) < 0.1
    # White noise of standard deviation 0.05/rms in every pixel: √n of them together; χ of 64 pixels scatters by 9 %.
    expected = 0.05 * FIELD / truth
    assert float((spread / expected - 1).abs().max()) < 0.4


def test_a_field_a_little_larger_than_the_card_is_seen_whole(tiny: Prior) -> None:
    """Up to a quarter, in even numbers of pixels; the prior's variance still covers it."""
    assert field_prior(tiny, (1, 10, FIELD)) is tiny
    assert all(isinstance(field_prior(tiny, (1, *shape)), Tiled) for shape in ((9, 10), (10, 12)))
    result = reconstruct(field(size=(10, 10)), tiny, draws=2, method=QUICK, scale=torch.tensor([1.0, 4.0]))
    assert result.samples.shape == (2, 2, 1, 10, 10)
    torch.testing.assert_close(result.prior_variance, torch.full((1, 1, 10, 10), 0.5))


def test_a_field_larger_than_the_card_is_tiled_and_smaller_or_other_bands_are_refused(tiny: Prior) -> None:
    assert field_prior(tiny, (1, FIELD, FIELD)) is tiny
    tiled = field_prior(tiny, (1, 10, 14))
    assert isinstance(tiled, Tiled) and tiled.field == (10, 14)
    with pytest.raises(ShapeError, match="smaller"):
        field_prior(tiny, (1, FIELD, FIELD - 2))
    with pytest.raises(ShapeError, match="bands"):
        field_prior(tiny, (3, FIELD, FIELD))
    large = field(size=(10, 14))
    result = reconstruct(large, tiny, draws=2, method=QUICK, scale=torch.tensor([1.0, 4.0]))
    assert result.samples.shape == (2, 2, 1, 10, 14) and result.information.shape == (2, 1, 10, 14)


def test_a_scale_is_checked_at_the_door(tiny: Prior) -> None:
    for scale, expected in ((torch.tensor([1.0]), "shape"), (torch.tensor([1.0, float("nan")]), "finite")):
        with pytest.raises(DiffinvError, match=expected):
            reconstruct(field(), tiny, draws=1, method=QUICK, scale=scale)
    with pytest.raises(DiffinvError, match="own unit"):
        run(scale=torch.ones(2))


class Backwards(Denoiser):
    """A denoiser whose Jacobian is negative: no covariance at all."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return -0.1 * x


def test_solves_that_meet_negative_curvature_are_counted() -> None:
    assert run().indefinite == 0 and 0 < run().solver_residual < 0.1
    assert reconstruct(data(), Backwards(), draws=2, method=METHOD).indefinite == 1
