"""The training loop: exact resume, a stop that keeps the last good state, atomic checkpoints, the average and the views."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn

from diffinv.core.checks import DiffinvError, InputError
from diffinv.core.rng import Rng
from diffinv.losses.base import CleanBatch, Loss
from diffinv.losses.denoising import DenoisingScoreMatching
from diffinv.priors.precondition import Preconditioned
from diffinv.priors.unet import UNet
from diffinv.schedules import LogNormal
from diffinv.training import checkpoint
from diffinv.training.augment import GalaxyViews
from diffinv.training.checkpoint import load_checkpoint, save_checkpoint
from diffinv.training.ema import ExponentialMovingAverage
from diffinv.training.loop import Trainer, TrainingPlan

PLAN = TrainingPlan(6, 4, 1e-2, warmup=2, ema_decay=0.9, seed=3, save_every=2, log_every=2)
LOSS = DenoisingScoreMatching(LogNormal(-0.7, 1.7), 1.0)
Views = Callable[[Tensor, Rng], Tensor]


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its state in the process; every test starts and leaves without it."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def model() -> Preconditioned:
    network = UNet(1, 1, widths=(8,), blocks=(1,))
    for number, parameter in enumerate(network.parameters()):
        parameter.data.copy_(0.1 * Rng([number]).normal(torch.zeros(1, *parameter.shape))[0])
    return Preconditioned(network, sigma_data=1.0)


def galaxies(count: int = 16) -> Tensor:
    return Rng.for_draws(0, range(count), 1).uniform(torch.zeros(count, 1, 8, 8))


def trainer(folder: Path, views: Views | None = None, plan: TrainingPlan = PLAN, loss: Loss = LOSS) -> Trainer:
    return Trainer(model(), loss, galaxies(), views or GalaxyViews(shift=1), plan, folder)


class Stops:
    """Views that fail at one call, as a kill would, or poison the batch there."""

    def __init__(self, at: int, *, poison: bool = False) -> None:
        self.at, self.poison, self.calls, self.views = at, poison, 0, GalaxyViews(shift=1)

    def __call__(self, x: Tensor, rng: Rng) -> Tensor:
        self.calls += 1
        if self.calls == self.at + 1:
            if self.poison:
                return torch.full_like(x, torch.nan)
            raise KeyboardInterrupt
        return self.views(x, rng)


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


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


def state_of(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, ExponentialMovingAverage]:
    network = nn.Linear(3, 2)
    for number, parameter in enumerate(network.parameters()):
        parameter.data.copy_(Rng([seed + number]).normal(torch.zeros(1, *parameter.shape))[0])
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    ema = ExponentialMovingAverage(network, 0.9)
    for _ in range(3):
        network(torch.ones(1, 3)).pow(2).sum().backward()
        optimizer.step()
        ema.update(network)
    return network, optimizer, ema


def _fail(*args: object, **kwargs: object) -> None:
    raise OSError("disk full")


def _write_half(tensors: object, path: Path, metadata: object) -> None:
    Path(path).write_bytes(b"half a checkpoint")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("owner", "name", "failure", "kind"),
    [
        (checkpoint, "save_file", _write_half, KeyboardInterrupt),
        (checkpoint.os, "fsync", _fail, OSError),
        (checkpoint.os, "replace", _fail, OSError),
    ],
)
def test_a_crash_while_saving_keeps_the_old_checkpoint_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, failure: Callable, kind: type[BaseException]
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, *state_of(0), step=7)
    before = path.read_bytes()
    monkeypatch.setattr(owner, name, failure)
    with pytest.raises(kind):
        save_checkpoint(path, *state_of(50), step=8)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert load_checkpoint(path, *state_of(50)) == 7


def test_a_checkpoint_restores_model_average_and_optimizer(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    first, second = state_of(0), state_of(50)
    save_checkpoint(path, *first, step=11)
    assert not same(first[0], second[0])
    assert load_checkpoint(path, *second) == 11
    assert same(first[0], second[0]) and same(first[2].model, second[2].model) and first[2].updates == second[2].updates
    moments = [optimizer.state_dict()["state"] for _, optimizer, _ in (first, second)]
    for index, state in moments[0].items():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, moments[1][index][key]) for key, value in state.items())


@pytest.mark.parametrize("content", [b"", b"<html>", "half", "another model"])
def test_a_bad_checkpoint_is_one_line_that_names_the_file(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, *state_of(0), step=1)
    if content == "another model":
        network = nn.Linear(4, 4)
        save_checkpoint(path, network, torch.optim.AdamW(network.parameters()), ExponentialMovingAverage(network, 0.9), step=1)
    else:
        path.write_bytes(path.read_bytes()[:-20] if content == "half" else content)
    with pytest.raises(InputError) as error:
        load_checkpoint(path, *state_of(0))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


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


def test_a_deadline_ends_the_run_early(tmp_path: Path) -> None:
    subject = trainer(tmp_path, plan=TrainingPlan(10**6, 4, 1e-2, deadline=0.5))
    subject.run()
    assert not same(subject.model, model())


def streams(count: int, seed: int = 0) -> Rng:
    return Rng.for_draws(seed, range(count), 1)


def test_views_have_unit_rms_before_the_scale_and_any_brightness_gives_the_same() -> None:
    views, x = GalaxyViews(scale_jitter=0, faint=0, shift=0), galaxies()
    seen = views(x, streams(16))
    torch.testing.assert_close(seen.pow(2).flatten(1).mean(1).sqrt(), torch.ones(16), rtol=1e-5, atol=0)
    torch.testing.assert_close(views(1e6 * x, streams(16)), seen, rtol=1e-5, atol=0)
    assert bool((views(torch.zeros(2, 1, 8, 8), streams(2)) == 0).all())


def test_scales_have_the_declared_jitter_and_share_of_faint_views() -> None:
    count = 4000
    x = galaxies(1).expand(count, -1, -1, -1)
    logs = GalaxyViews(faint=0, shift=0)(x, streams(count)).pow(2).flatten(1).mean(1).sqrt().log()
    assert abs(float(logs.mean())) <= 4.5 * 0.4 / count**0.5
    assert abs(float(logs.var()) - 0.16) <= 4.5 * 0.16 * (2 / count) ** 0.5
    faint = GalaxyViews(scale_jitter=0, shift=0)(x, streams(count, 1)).pow(2).flatten(1).mean(1).sqrt()
    share = float((faint < 0.999).float().mean())
    assert abs(share - 0.15) <= 4.5 * (0.15 * 0.85 / count) ** 0.5
    assert float(faint.min()) >= 0.05 * (1 - 1e-5)
    middle = float((faint < 0.05**0.5).float().mean())
    assert abs(middle - 0.075) <= 4.5 * (0.075 * 0.925 / count) ** 0.5


def symmetries(x: Tensor) -> list[Tensor]:
    turned = [torch.rot90(x, k, (-2, -1)) for k in range(4)]
    return turned + [t.flip(-1) for t in turned]


def test_views_are_the_eight_symmetries_of_the_square_equally_often() -> None:
    count = 4000
    x = galaxies(1)
    seen = GalaxyViews(scale_jitter=0, faint=0, shift=0)(x.expand(count, -1, -1, -1), streams(count))
    rms = x.pow(2).mean().sqrt()
    matches = torch.stack([(seen - s / rms).abs().flatten(1).amax(1) < 1e-5 for s in symmetries(x)])
    assert bool((matches.sum(0) == 1).all())
    shares = matches.float().mean(1)
    assert float((shares - 1 / 8).abs().max()) <= 4.5 * (1 / 8 * 7 / 8 / count) ** 0.5


def test_shifts_are_whole_pixels_with_zero_fill_for_half_of_the_views() -> None:
    count, reach = 2000, 2
    x = torch.zeros(1, 1, 9, 9)
    x[..., 4, 4], x[..., 0, 0] = 1.0, 1e-3
    seen = GalaxyViews(scale_jitter=0, faint=0, shift=reach)(x.expand(count, -1, -1, -1), streams(count))
    peak = seen.flatten(1).argmax(1)
    offsets = torch.stack([peak // 9 - 4, peak % 9 - 4], 1)
    assert int(offsets.abs().max()) == reach
    still = float((offsets == 0).all(1).float().mean())
    expected = 0.5 + 0.5 / (2 * reach + 1) ** 2
    assert abs(still - expected) <= 4.5 * (expected * (1 - expected) / count) ** 0.5
    assert len(offsets.unique(dim=0)) == (2 * reach + 1) ** 2
    lost = (seen > 0).flatten(1).sum(1) == 1  # the faint corner pixel left the field and nothing came in
    assert bool(lost.any()) and int((seen > 0).flatten(1).sum(1).max()) == 2


def test_a_view_is_a_function_of_its_stream_alone() -> None:
    x = galaxies()
    whole = GalaxyViews()(x, streams(16))
    assert torch.equal(whole, GalaxyViews()(x, streams(16)))
    assert torch.equal(whole[5:6], GalaxyViews()(x[5:6], streams(16).select(slice(5, 6))))
    assert not torch.equal(whole, GalaxyViews()(x, streams(16, 1)))
