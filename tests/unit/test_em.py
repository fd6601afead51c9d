"""Expectation maximisation of a prior: right for Gaussians, resumable after kill −9 in both steps, the same in two processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffinv.core.checks import ConfigError, DiffinvError
from diffinv.core.linalg import expand
from diffinv.core.rng import Rng
from diffinv.guidance.base import ConjugateGradients
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.likelihood import Observation
from diffinv.losses.ambient import AmbientSure, BelowNoise
from diffinv.losses.base import MeasuredBatch
from diffinv.losses.denoising import DenoisingScoreMatching
from diffinv.losses.derivative import ForwardMode
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Identity
from diffinv.operators.groups import Shifts
from diffinv.operators.sampling import Mask, SumPool
from diffinv.priors.analytic import FourierGaussianPrior
from diffinv.priors.base import Denoiser
from diffinv.samplers.sde import StochasticMultistep
from diffinv.schedules import LogUniform
from diffinv.training.augment import AsTheyAre, GroupViews
from diffinv.training.em import EmPlan, ExpectationMaximisation, Score
from diffinv.training.expectation import EStep, GuidedDraw, PosteriorMean, ReverseFromData
from diffinv.training.plan import TrainingPlan
from diffinv.training.sources import Drawn, Measured, Surveys
from tests.trainings import reset_accelerate

SHAPE = (1, 4, 4)
LEVELS = LogUniform(0.02, 10.0)
SIGMA = 0.5
PLAN = TrainingPlan(6, 8, 1e-2, warmup=1, ema_decay=0.9, save_every=2, log_every=3)
EXACT = ReverseFromData(StochasticMultistep(), 24, 0.02)


@pytest.fixture(autouse=True)
def alone() -> None:
    reset_accelerate()
    yield
    reset_accelerate()


class Spectral(Denoiser):
    """The denoiser of a stationary Gaussian with a learnt spectrum e^s: the family of the closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.log_power = nn.Parameter(torch.zeros(1, 4, 4))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        mirror = self.log_power.flip(-2, -1).roll((1, 1), (-2, -1))
        power = ((self.log_power + mirror) / 2).exp()
        gain = power / (power + expand(sigma, x) ** 2)
        return torch.fft.ifft2(gain * torch.fft.fft2(x)).real


def spectrum() -> Tensor:
    k = torch.fft.fftfreq(4)
    return (3 * torch.exp(-8 * (k[:, None] ** 2 + k**2)) + 0.1)[None, None]


def images(count: int, seed: int = 0) -> Tensor:
    prior = FourierGaussianPrior(torch.zeros(1, *SHAPE), spectrum())
    return prior.sample(torch.zeros(count, *SHAPE), Rng.for_draws(seed, range(count), 1))


def noisy(count: int, seed: int = 0) -> Measured:
    noise = Gaussian(torch.full((1,), SIGMA))
    y = noise.sample(images(count, seed), Rng.for_draws(seed + 99, range(count), 1))
    return Measured(MeasuredBatch(Observation(y, Identity(SHAPE), noise)))


def masked(count: int) -> Measured:
    noise = Gaussian(torch.full((1,), 0.2))
    mask = Rng.for_draws(5, range(count), 1).uniform(torch.zeros(count, *SHAPE)) < 0.6
    y = noise.sample(images(count), Rng.for_draws(6, range(count), 1))
    return Measured(MeasuredBatch(Observation(y.where(mask, 0.0), Mask(mask), Gaussian(noise.std, mask))))


def em(folder: Path, **changes) -> ExpectationMaximisation:
    settings = {
        "model": Spectral(),
        "source": noisy(40),
        "held_out": noisy(24, seed=1),
        "start": FourierGaussianPrior(torch.zeros(1, *SHAPE), torch.ones(1, *SHAPE)),
        "expect": (EXACT,),
        "loss": DenoisingScoreMatching(LEVELS, 1.0),
        "views": AsTheyAre(),
        "plan": PLAN,
        "em": EmPlan(laps=2, chunk=16, replay=1),
        "watch": AmbientSure(LEVELS, 1.0, ForwardMode()),
        "say": lambda line: None,
    }
    return ExpectationMaximisation(folder=folder, **{**settings, **changes})


def weights(model: Denoiser) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def truth() -> FourierGaussianPrior:
    return FourierGaussianPrior(torch.zeros(1, *SHAPE), spectrum())


def covariance_of_draws(step: EStep, source: Measured, prior: Denoiser) -> tuple[Tensor, Tensor]:
    """Mean power of draws over the images, in the truth's own units, and its standard error: (H, W)."""
    count = len(source)
    x = step.draw(prior, source.data.observation, Rng.for_draws(8, range(count), 1))
    power = torch.fft.fft2(x, norm="ortho").abs().square() / spectrum()
    return power.mean(0)[0], power.std(0)[0] / count**0.5


@pytest.mark.parametrize("name", ["reverse from data", "guided, noise", "guided, masks"])
def test_draws_under_the_true_prior_have_the_distribution_of_the_images(name: str) -> None:
    """The marginal of p(x | y) over p(y) is p(x): the power at every frequency, 4.5σ of the images."""
    guided = GuidedDraw(StochasticMultistep(), MomentMatching(ConjugateGradients(16, 1e-4)), LEVELS, 24, 16)
    step, source = {
        "reverse from data": (ReverseFromData(StochasticMultistep(), 24, 0.02), noisy(3000)),
        "guided, noise": (guided, noisy(1500)),
        "guided, masks": (guided, masked(1500)),
    }[name]
    mean, error = covariance_of_draws(step, source, truth())
    assert float(((mean - 1) / error).abs().max()) <= 4.5


def test_the_mean_of_the_data_is_smoother_than_a_draw_by_the_wiener_gain() -> None:
    mean, error = covariance_of_draws(PosteriorMean(), noisy(3000), truth())
    gain = spectrum()[0, 0] / (spectrum()[0, 0] + SIGMA**2)
    assert float(((mean - gain) / error).abs().max()) <= 4.5


def test_rows_of_any_noise_start_at_their_own_level_and_certain_rows_stay() -> None:
    x = images(600)
    std = torch.tensor([1e-7, 0.2, 1.0]).repeat_interleave(200)
    y = Gaussian(std).sample(x, Rng.for_draws(1, range(600), 1))
    found = EXACT.draw(truth(), Observation(y, Identity(SHAPE), Gaussian(std)), Rng.for_draws(2, range(600), 1))
    torch.testing.assert_close(found[:200], y[:200], rtol=0, atol=0)
    errors = (found - x).flatten(1).square().mean(1)
    assert 0 < float(errors[200:400].mean()) < float(errors[400:].mean())
    alone = EXACT.draw(truth(), Observation(y[300:301], Identity(SHAPE), Gaussian(std[300:301])), Rng.for_draws(2, [300], 1))
    torch.testing.assert_close(alone, found[300:301], rtol=1e-5, atol=1e-6)


def test_laps_climb_to_the_prior_of_the_images(tmp_path: Path) -> None:
    """From white: the spectrum of 1,500 noisy images. The data allow errors of 5 to 11 % there (Cramér–Rao); 30 % is 3σ of the
    worst. χ² tells the true prior from wrong ones, and climbs to 1."""
    plan = replace(PLAN, steps=60, batch_size=128, learning_rate=0.1, save_every=60)
    run = em(tmp_path, source=noisy(1500), held_out=noisy(600, 1), plan=plan, em=EmPlan(laps=3, chunk=750))
    found = run.run().log_power.exp().detach()
    bright = spectrum()[0] > 0.5
    assert float((found / spectrum()[0] - 1)[bright].abs().max()) <= 0.3
    assert float((found / spectrum()[0]).log()[bright].mean().abs()) <= 0.1
    first, last = run.scores()[0], run.scores()[-1]
    assert last.risk < first.risk
    assert abs(last.chi2 - 1) < abs(first.chi2 - 1)
    true = run._score(0, truth())
    assert abs(true.chi2 - 1) <= 4.5 * true.chi2_error
    flat = lambda level: FourierGaussianPrior(torch.zeros(1, *SHAPE), torch.full((1, *SHAPE), level))
    narrow = run._score(0, flat(0.01))
    assert narrow.chi2 > 1 + 4.5 * narrow.chi2_error
    assert run._score(0, flat(1.0)).risk > true.risk + 0.02  # too rough here, too smooth there: χ² is 0.99, the risk is not


class Halves(Denoiser):
    """A spectrum for the levels from the noise up, and one for those below."""

    def __init__(self) -> None:
        super().__init__()
        self.above, self.below = Spectral(), Spectral()

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(expand(sigma, x) > SIGMA * (1 - 1e-6), self.above(x, sigma), self.below(x, sigma))


@dataclass(frozen=True)
class Truths(EStep):
    """Draws under the true prior."""

    passes = 24.0

    def draw(self, prior: Denoiser, data: Observation, rng: Rng) -> Tensor:
        return EXACT.draw(truth(), data, rng)


SURE, BELOW = AmbientSure(LEVELS, 1.0, ForwardMode()), BelowNoise(LEVELS, 1.0)


TEACHERS = {"both": (SURE + BELOW, True, True), "data": (SURE, True, False), "draws": (BELOW, False, True)}


@pytest.mark.parametrize("teacher", TEACHERS)
def test_data_teach_what_is_above_their_noise_and_draws_what_is_below(tmp_path: Path, teacher: str) -> None:
    """One lap from white: the spectrum of each half to 15 % on average, unless its teacher is missing."""
    loss, above, below = TEACHERS[teacher]
    plan = replace(PLAN, steps=80, batch_size=128, learning_rate=0.1, save_every=80)
    many = {"source": noisy(1500), "plan": plan, "em": EmPlan(laps=1, chunk=750), "watch": None, "beside": True}
    found = em(tmp_path, model=Halves(), expect=(Truths(),), loss=loss, **many).run()
    bright = spectrum()[0] > 0.5
    for half, taught in ((found.above, above), (found.below, below)):
        error = (half.log_power.exp().detach() / spectrum()[0]).log()[bright].mean().abs()
        assert (float(error) <= 0.15) == taught


def test_draws_of_several_laps_keep_their_data() -> None:
    source, images = noisy(5), torch.arange(10.0)[:, None, None, None].expand(10, *SHAPE)
    drawn = Drawn(source, images, AsTheyAre())
    rows = torch.tensor([0, 4, 5, 9])
    batch = drawn.batch(rows, Rng.for_draws(0, rows, 1))
    assert len(drawn) == 10
    assert batch.x[:, 0, 0, 0].tolist() == [0, 4, 5, 9]
    torch.testing.assert_close(batch.observation.y, source.data.observation.y[[0, 4, 0, 4]])


@dataclass(frozen=True)
class Mortal(EStep):
    """Dies in the E-step of the second lap, once the first chunk is written."""

    step: EStep
    passes = 1.0

    def draw(self, prior: Denoiser, data: Observation, rng: Rng) -> Tensor:
        found = self.step.draw(prior, data, rng)
        if isinstance(prior, Spectral) and (FOLDER[0] / "lap-01" / "draws-00000.npy").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    def __repr__(self) -> str:
        return repr(self.step)


class MortalLoss(DenoisingScoreMatching):
    """Dies in the third step after the checkpoint of the second lap's M-step."""

    def __call__(self, model, batch, rng):
        if (FOLDER[0] / "lap-01" / "checkpoint.safetensors").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(model, batch, rng)

    def __repr__(self) -> str:
        return repr(DenoisingScoreMatching(self.schedule, self.sigma_data))


FOLDER: list[Path] = []


def _run(folder: Path, mortal: str) -> None:
    FOLDER[:] = [folder]
    changes = {"expect": (Mortal(EXACT),)} if mortal == "E" else {"loss": MortalLoss(LEVELS, 1.0)}
    em(folder, **changes).run()


@pytest.mark.parametrize("mortal", ["E", "M"])
def test_a_run_killed_in_either_step_resumes_to_the_same_bits(tmp_path: Path, mortal: str) -> None:
    whole = weights(em(tmp_path / "whole").run())
    reset_accelerate()
    child = multiprocessing.get_context("fork").Process(target=_run, args=(tmp_path / "killed", mortal))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    killed = tmp_path / "killed"
    assert (killed / "lap-01" / "draws-00000.npy").exists()
    assert (killed / "lap-01" / "draws-00002.npy").exists() == (mortal == "M")
    assert not (killed / "lap-01" / "average.safetensors").exists()
    with pytest.raises(ConfigError, match="resume it"):
        em(killed).run()
    with pytest.raises(ConfigError, match="another run .*chunk: 16 → 8"):
        em(killed, em=EmPlan(laps=2, chunk=8, replay=1)).run(resume=True)
    resumed = em(killed)
    assert torch.equal(weights(resumed.run(resume=True)), whole)
    assert resumed.scores() == em(tmp_path / "whole").scores()


def _rank(folder: Path, rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    em(folder, plan=replace(PLAN, batch_size=4)).run()


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    """Half the batch each; draws equal to the bit in the first lap, weights to float tolerance."""
    one = em(tmp_path / "one").run()
    reset_accelerate()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_rank, args=(tmp_path / "two", rank, port)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    for name in ("draws-00000.npy", "draws-00001.npy", "draws-00002.npy"):
        assert (tmp_path / "one/lap-00" / name).read_bytes() == (tmp_path / "two/lap-00" / name).read_bytes()
    with pytest.raises(ConfigError, match="images an update: 8 → 4"):
        em(tmp_path / "two", plan=replace(PLAN, batch_size=4)).run(resume=True)
    two = em(tmp_path / "two").run(resume=True)
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-4, atol=1e-5)


def test_a_lap_tells_its_cost_before_it_starts_and_its_score_after(tmp_path: Path) -> None:
    lines: list[str] = []
    em(tmp_path, say=lines.append, em=EmPlan(laps=1, chunk=16)).run()
    assert lines[0].startswith("lap 0: 40 draws of 24 passes, 6 steps of 8 images: about ")
    assert lines[1].startswith("lap 0: held-out χ² of draws ")
    assert Score(**json.loads((tmp_path / "lap-00" / "score.json").read_text())).chi2 > 0


def test_surveys_of_other_instruments_teach_one_prior(tmp_path: Path) -> None:
    """Pixels that are missing, and sums of 2 × 2: of the rows of the first survey the draws are those it has alone, and under the
    true prior χ² of all is 1."""
    pooled = SumPool(SHAPE, 2)
    noise = Gaussian(torch.full((1,), SIGMA))
    y = noise.sample(pooled(images(500, 3)), Rng.for_draws(7, range(500), 1))
    sums = Measured(MeasuredBatch(Observation(y, pooled, noise)))
    guided = (GuidedDraw(StochasticMultistep(), MomentMatching(ConjugateGradients(8, 1e-5)), LEVELS, 24, 8),)
    settings = {"expect": guided, "watch": None, "em": EmPlan(laps=1, chunk=16)}
    both = em(tmp_path / "both", source=Surveys((masked(24), sums)), held_out=Surveys((masked(500), sums)), **settings)
    alone = em(tmp_path / "alone", source=masked(24), **settings)
    both.run()
    alone.run()
    assert both.draws(0).shape == (524, *SHAPE)
    assert torch.equal(both.draws(0)[:24], alone.draws(0))
    score = both._score(0, truth())
    assert abs(score.chi2 - 1) <= 4.5 * score.chi2_error
    swapped = em(tmp_path / "both", source=Surveys((sums, masked(24))), held_out=masked(4), **settings)
    with pytest.raises(ConfigError, match="surveys"):
        swapped.run(resume=True)
    with pytest.raises(DiffinvError, match="`watch` is a risk of one survey"):
        em(tmp_path / "c", held_out=Surveys((sums, masked(4))))
    with pytest.raises(DiffinvError, match="`beside` is for images of one survey"):
        em(tmp_path / "c", source=Surveys((sums, masked(4))), beside=True)


def test_replay_and_views_enter_the_m_step(tmp_path: Path) -> None:
    runs = {
        "plain": em(tmp_path / "a", em=EmPlan(laps=2, chunk=16)),
        "replayed": em(tmp_path / "b"),
        "shifted": em(tmp_path / "c", em=EmPlan(laps=2, chunk=16), views=GroupViews(Shifts(4))),
    }
    found = [weights(run.run()) for run in runs.values()]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_group_views_are_transformed_images() -> None:
    x = images(6)
    moved = GroupViews(Shifts(4))(x, Rng.for_draws(0, range(6), 1))
    assert not torch.equal(moved, x)
    torch.testing.assert_close(moved.flatten(1).sort(1).values, x.flatten(1).sort(1).values)


class Broken(EStep):
    passes = 1.0

    def draw(self, prior: Denoiser, data: Observation, rng: Rng) -> Tensor:
        return torch.where(torch.arange(len(data.y))[:, None, None, None] == 3, torch.nan, data.y)


def test_a_draw_that_is_not_finite_is_named(tmp_path: Path) -> None:
    with pytest.raises(DiffinvError, match="row 3 in lap 0 is not finite"):
        em(tmp_path, expect=(Broken(),)).run()
    assert not list((tmp_path / "lap-00").glob("draws-*"))
    with pytest.raises(DiffinvError, match="chunk is 0"):
        EmPlan(laps=1, chunk=0)
