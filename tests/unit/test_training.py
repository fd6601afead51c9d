"""The training loop on clean images: exact resume, a stop that keeps the last good state, what is refused, the average."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch import Tensor, nn

from diffinv.core.checks import DiffinvError, UnsupportedError
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import CleanBatch, Loss, MeasuredBatch
from diffinv.losses.denoising import DenoisingScoreMatching
from diffinv.losses.sure import Sure
from diffinv.noise.poisson import Poisson
from diffinv.operators.algebra import Identity
from diffinv.priors.precondition import Preconditioned
from diffinv.priors.unet import UNet
from diffinv.schedules import LogNormal
from diffinv.training.augment import GalaxyViews
from diffinv.training.ema import ExponentialMovingAverage
from diffinv.training.loop import Trainer
from diffinv.training.plan import TrainingPlan
from diffinv.training.sources import CleanImages, Measured
from tests.trainings import Filter, reset_accelerate, same

PLAN = TrainingPlan(6, 4, 1e-2, warmup=2, ema_decay=0.9, seed=3, save_every=2, log_every=2)
LOSS = DenoisingScoreMatching(LogNormal(-0.7, 1.7), 1.0)
Views = Callable[[Tensor, Rng], Tensor]


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    reset_accelerate()


def model() -> Preconditioned:
    network = UNet(1, 1, widths=(8,), blocks=(1,))
    for number, parameter in enumerate(network.parameters()):
        parameter.data.copy_(0.1 * Rng([number]).normal(torch.zeros(1, *parameter.shape))[0])
    return Preconditioned(network, sigma_data=1.0)


def galaxies(count: int = 16) -> Tensor:
    return Rng.for_draws(0, range(count), 1).uniform(torch.zeros(count, 1, 8, 8))


def trainer(folder: Path, views: Views | None = None, plan: TrainingPlan = PLAN, loss: Loss = LOSS) -> Trainer:
    return Trainer(model(), loss, CleanImages(galaxies(), views or GalaxyViews(shift=1)), plan, folder)


class Stops:
    """Views that fail at one step, as a kill would, or poison the batch there; their first call is the check at start-up."""

    def __init__(self, at: int, *, poison: bool = False) -> None:
        self.at, self.poison, self.calls, self.views = at, poison, -1, GalaxyViews(shift=1)

    def __call__(self, x: Tensor, rng: Rng) -> Tensor:
        self.calls += 1
        if self.calls == self.at + 1:
            if self.poison:
                return torch.full_like(x, torch.nan)
            raise KeyboardInterrupt
        return self.views(x, rng)


def log(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


@pytest.mark.parametrize("killed_at", [3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path: Path, killed_at: int) -> None:
    whole = trainer(tmp_path / "whole")
    average = whole.run()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "killed", Stops(killed_at)).run()
    resumed = trainer(tmp_path / "killed")
    resumed_average = resumed.run(resume=True)
    assert same(resumed_average, average)
    assert same(resumed.model, whole.model)
    assert log(tmp_path / "killed") == log(tmp_path / "whole")
    assert not same(average, whole.model)
    assert not same(average, ExponentialMovingAverage(model(), 0.9).model)


def test_a_run_without_resume_starts_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, Stops(4)).run()
    assert same(trainer(tmp_path).run(), trainer(tmp_path / "other").run())


class InDouble(Loss):
    """Rounding is then far below what Adam takes for a gradient."""

    def __call__(self, model: nn.Module, batch: CleanBatch, rng: Rng) -> Tensor:
        return LOSS(model, CleanBatch(batch.x.double()), rng)


def in_double(folder: Path, plan: TrainingPlan) -> nn.Module:
    reset_accelerate()
    return Trainer(model().double(), InDouble(), CleanImages(galaxies(), GalaxyViews(shift=1)), plan, folder).run()


def close(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.allclose(ours[key], theirs[key], rtol=1e-6, atol=1e-8) for key in ours)


def test_a_batch_in_parts_learns_the_same_as_a_whole_one(tmp_path: Path) -> None:
    learnt = in_double(tmp_path / "parts", replace(PLAN, parts=2))
    assert close(learnt, in_double(tmp_path / "whole", PLAN))
    assert [loss for _, loss in log(tmp_path / "parts")] == pytest.approx([loss for _, loss in log(tmp_path / "whole")], rel=1e-9)
    with pytest.raises(DiffinvError, match="parts is 3, which does not divide batch_size 4"):
        replace(PLAN, parts=3)


def test_a_compiled_network_learns_the_same(tmp_path: Path) -> None:
    learnt = in_double(tmp_path / "compiled", replace(PLAN, compiler="aot_eager"))
    assert close(learnt, in_double(tmp_path / "plain", PLAN))


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    other = TrainingPlan(6, 4, 1e-2, warmup=2, ema_decay=0.9, seed=4, save_every=2, log_every=2)
    assert not same(trainer(tmp_path / "a").run(), trainer(tmp_path / "b", plan=other).run())


def test_the_batch_of_a_step_is_the_same_whatever_came_before(tmp_path: Path) -> None:
    device = torch.device("cpu")
    subject = trainer(tmp_path)
    late, _ = subject.batch(5, 0, 1, device)
    for step in range(5):
        subject.batch(step, 0, 1, device)
    again, _ = subject.batch(5, 0, 1, device)
    assert torch.equal(late.x, again.x)
    assert not torch.equal(late.x, subject.batch(4, 0, 1, device)[0].x)
    assert not torch.equal(subject.batch(5, 0, 2, device)[0].x, subject.batch(5, 1, 2, device)[0].x)


def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DiffinvError, match="the loss is nan at step 4") as error:
        trainer(tmp_path, Stops(4, poison=True)).run()
    assert "\n" not in str(error.value)
    assert same(trainer(tmp_path).run(resume=True), trainer(tmp_path / "whole").run())


class InfiniteSlope(Loss):
    """A finite loss whose gradient is infinite: the square root at zero."""

    def __call__(self, model: nn.Module, batch: CleanBatch, rng: Rng) -> Tensor:
        return (0 * model(batch.x, torch.ones(len(batch.x)))).pow(2).flatten(1).sum(1).sqrt()


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(tmp_path: Path) -> None:
    subject = trainer(tmp_path, loss=InfiniteSlope())
    with pytest.raises(DiffinvError, match="the gradient is nan at step 0"):
        subject.run()
    assert same(subject.model, model())


def test_the_average_follows_its_formula_and_copies_buffers() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    average = ExponentialMovingAverage(network, 0.5)
    expected = [p.detach().clone() for p in network.parameters()]
    for k in range(12):
        for number, parameter in enumerate(network.parameters()):
            parameter.data.copy_(Rng([100 * k + number]).normal(torch.zeros(1, *parameter.shape, dtype=torch.float64))[0])
        network[1].running_mean.fill_(k)
        average.update(network)
        beta = min(0.5, (1 + k) / (10 + k))
        expected = [beta * e + (1 - beta) * p.detach() for e, p in zip(expected, network.parameters(), strict=True)]
    assert min(0.5, (1 + 11) / (10 + 11)) == 0.5 > 1 / 10  # the warm-up and the long run are both met
    for ours, theirs in zip(average.model.parameters(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        assert not ours.requires_grad
    assert average.model[1].running_mean.tolist() == [11, 11]
    assert not average.model.training


def test_the_learning_rate_warms_up_and_falls_to_its_final_share() -> None:
    plan = TrainingPlan(1000, 1, 0.4, warmup=10, final_rate=0.1)
    assert plan.rate(0, 0.0) == pytest.approx(0.04)
    assert plan.rate(500, 0.0) == pytest.approx(0.4 * 0.55)
    assert plan.rate(1000, 0.0) == pytest.approx(0.04)
    hurried = TrainingPlan(1000, 1, 0.4, warmup=1, final_rate=0.1, deadline=100.0)
    assert hurried.rate(0, 50.0) == pytest.approx(0.4 * 0.55)


BEYOND: dict[str, tuple[float | str, ...]] = {
    **dict.fromkeys(("steps", "batch_size", "warmup", "save_every", "log_every", "validate_every", "patience", "parts"), (0, -1)),
    **dict.fromkeys(("learning_rate", "clip", "deadline", "multiplier_rate"), (0.0, -1.0, math.nan)),
    **dict.fromkeys(("ema_decay", "multiplier_momentum"), (1.0, -0.1, math.nan)),
    "final_rate": (1.1, -0.1, math.nan),
    "precision": ("fp8",),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BEYOND.items() for value in values])
def test_a_plan_that_cannot_be_followed_is_refused(name: str, value: float | str) -> None:
    with pytest.raises(DiffinvError, match=f"TrainingPlan: {name} "):
        replace(PLAN, **{name: value})


def test_a_deadline_ends_the_run_early(tmp_path: Path) -> None:
    subject = trainer(tmp_path, plan=TrainingPlan(10**6, 4, 1e-2, deadline=0.5))
    subject.run()
    assert not same(subject.model, model())


class FreesItsGraphs(Loss):
    """A loss that finds, at each call, that nobody holds the graphs of the calls before: each has a hook that goes with it."""

    def __init__(self) -> None:
        self.hooks: list[weakref.ref] = []

    def __call__(self, model: nn.Module, batch: CleanBatch, rng: Rng) -> Tensor:
        gc.collect()
        assert not [hook for hook in self.hooks if hook() is not None]
        value = LOSS(model, batch, rng)
        hook = lambda slope: None
        self.hooks.append(weakref.ref(hook))
        value.register_hook(hook)
        return value


def test_no_graph_outlives_its_step(tmp_path: Path) -> None:
    loss = FreesItsGraphs()
    trainer(tmp_path, loss=loss).run()
    assert len(loss.hooks) == PLAN.steps


def test_a_pair_that_has_no_meaning_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    counts = Observation(torch.ones(4, 1, 8, 8), Identity((1, 8, 8)), Poisson(torch.ones(1), torch.zeros(1)))
    subject = Trainer(Filter(), Sure(), Measured(MeasuredBatch(counts)), PLAN, tmp_path / "run")
    with pytest.raises(UnsupportedError, match="Poisson"):
        subject.run()
    assert not (tmp_path / "run").exists()


def test_bf16_changes_the_steps_a_little_keeps_the_weights_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    exact = trainer(tmp_path / "exact").run()
    reset_accelerate()
    rounded = trainer(tmp_path / "bf16", plan=replace(PLAN, precision="bf16"))
    average = rounded.run()
    assert not same(average, exact)
    for ours, theirs in zip(average.parameters(), exact.parameters(), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=PLAN.steps * PLAN.learning_rate)
    x = galaxies(2)
    copy = model()
    copy.load_state_dict(rounded.model.state_dict())
    assert torch.equal(rounded.model(x, torch.ones(2)), copy(x, torch.ones(2)))


def test_fp16_without_a_gpu_is_refused(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DiffinvError, match="fp16 wants a GPU"):
        trainer(tmp_path, plan=replace(PLAN, precision="fp16")).run()


class Notes(GeneralTracker):
    """A tracker that remembers."""

    name, requires_logging_directory = "notes", False

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, float]] = []

    @property
    def tracker(self) -> list:
        return self.seen

    def store_init_configuration(self, values: dict) -> None:
        self.seed = values["seed"]

    def log(self, values: dict, step: int | None = None, **kwargs: object) -> None:
        self.seen.append((step, round(values["loss"], 4)))


def test_a_tracker_sees_what_the_log_says(tmp_path: Path) -> None:
    notes = Notes()
    trainer(tmp_path, plan=replace(PLAN, trackers=(notes,))).run()
    assert notes.seen == [(step, round(loss, 4)) for step, loss in log(tmp_path)]
    assert notes.seed == PLAN.seed


def test_a_tracker_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffinvError, match="Unsupported logging capability"):
        trainer(tmp_path, plan=replace(PLAN, trackers=("abacus",))).run()


def test_the_log_of_a_resumed_run_has_every_step_once_whatever_the_kill_left(tmp_path: Path) -> None:
    uneven = replace(PLAN, save_every=3, log_every=2)
    trainer(tmp_path / "whole", plan=uneven).run()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "killed", Stops(4), plan=uneven).run()
    with open(tmp_path / "killed" / "log.jsonl", "a") as handle:
        handle.write('{"step": 5, "lo')
    trainer(tmp_path / "killed", plan=uneven).run(resume=True)
    assert log(tmp_path / "killed") == log(tmp_path / "whole")
