"""Training on measurements: multipliers that climb, validation under fixed streams, early stopping, all resumed exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from scipy.linalg import hadamard
from torch import Tensor, nn

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.losses.base import Loss, MeasuredBatch
from diffinv.losses.derivative import ForwardMode
from diffinv.losses.supervised import Supervised
from diffinv.losses.sure import Sure
from diffinv.losses.unsure import Unsure, White
from diffinv.training.loop import Trainer
from diffinv.training.sources import Simulated, Source, Subset
from diffinv.training.validation import EarlyStopping, evaluate
from tests.trainings import PLAN, Filter, fields, observe, reset_accelerate, rows, same, sources, trainer, unsure


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    reset_accelerate()


def state_of(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """All that a checkpoint holds."""
    with safe_open(folder / "checkpoint.safetensors", "pt") as handle:
        return handle.metadata(), {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


class Dies(Source):
    """A source that fails at one call, as a kill would; the first is the check at start-up."""

    def __init__(self, source: Source, at: int) -> None:
        self.source, self.left = source, at + 1

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, index: Tensor, rng: Rng) -> MeasuredBatch:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return self.source.batch(index, rng)


class Level(Loss):
    """`(Σ w − mean x)²`: the sum of the filter learns the level of the images."""

    def __call__(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        return (model.conv.weight.sum() - batch.x.flatten(1).mean(1)) ** 2


def levels(level: float) -> Source:
    return Simulated(level + 0.01 * fields(), observe, seed=5)


def predicted_from_neighbours() -> float:
    """Mean squared error of the best linear prediction of a training datum from its eight neighbours."""
    train, _ = sources()
    y = train.batch(torch.arange(len(train)), Rng.for_draws(0, range(len(train)), 1)).observation.y
    patches = nn.functional.unfold(y.double(), 3, padding=1).movedim(1, -1).flatten(0, 1)
    centre, others = patches[:, 4:5], patches[:, [0, 1, 2, 3, 5, 6, 7, 8]]
    return float((centre - others @ torch.linalg.lstsq(others, centre).solution).square().mean())


def test_a_multiplier_climbs_to_the_saddle_where_the_divergence_vanishes(tmp_path: Path) -> None:
    """For filters with centre w₀ the divergence is w₀; at w₀ = 0 stationarity in w₀ gives η = E[(y − f) y] = E[(y − f)²]."""
    plan = replace(PLAN, steps=300, batch_size=24, learning_rate=1e-2, multiplier_rate=3e-3, multiplier_momentum=0.0)
    subject = trainer(tmp_path, unsure(), replace(plan, save_every=300, log_every=10), validated=False)
    average = subject.run()
    path = [row["multipliers"][0][0] for row in rows(tmp_path)]
    assert path[0] > 0
    assert path[-1] == pytest.approx(subject.loss.eta.item(), rel=1e-5)
    assert abs(float(average.conv.weight[0, 0, 1, 1])) < 0.02
    assert subject.loss.eta.item() == pytest.approx(predicted_from_neighbours(), rel=0.05)


def test_the_multipliers_gradient_is_not_clipped(tmp_path: Path) -> None:
    """After one step from 0 with f the identity: rate · 2, whatever the clip of the weights."""
    subject = trainer(tmp_path, unsure(), replace(PLAN, steps=1, clip=1e-6), validated=False)
    subject.run()
    assert subject.loss.eta.item() == pytest.approx(2 * PLAN.multiplier_rate, rel=1e-5)


def test_multipliers_without_a_rate_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffinvError, match="multiplier_rate"):
        trainer(tmp_path, unsure(), replace(PLAN, multiplier_rate=None)).run()


@pytest.mark.parametrize("killed_at", [3, 4, 7])
@pytest.mark.parametrize("loss", [unsure, Sure], ids=["unsure", "sure"])
def test_a_resumed_run_equals_an_uninterrupted_one_with_multipliers_and_validation(
    tmp_path: Path, loss: type[Loss], killed_at: int
) -> None:
    whole = trainer(tmp_path / "whole", loss())
    average = whole.run()
    first = trainer(tmp_path / "killed", loss())
    with pytest.raises(KeyboardInterrupt):
        replace(first, source=Dies(first.source, killed_at)).run()
    resumed = trainer(tmp_path / "killed", loss())
    assert same(resumed.run(resume=True), average) and same(resumed.model, whole.model)
    assert [m.tolist() for m in resumed.loss.multipliers] == [m.tolist() for m in whole.loss.multipliers]
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    ours, theirs = (state_of(tmp_path / name) for name in ("killed", "whole"))
    assert ours[0] == theirs[0] and set(ours[1]) == set(theirs[1])
    assert all(torch.equal(tensor, theirs[1][name]) for name, tensor in ours[1].items())


def blur() -> nn.Module:
    """A filter whose divergence along a random direction is random."""
    model = Filter().requires_grad_(False)
    model.conv.weight.fill_(1 / 9)
    return model


def test_validation_has_the_same_numbers_each_time_in_any_chunks_and_parts() -> None:
    _, held_out = sources()

    def look(**changes: object) -> Tensor:
        return evaluate(blur(), Sure(), held_out, **{"seed": 1, "batch_size": 100, "device": torch.device("cpu"), **changes})

    whole = look()
    assert whole.dtype == torch.float64 and len(whole) == len(held_out)
    assert torch.equal(look(), whole)
    torch.testing.assert_close(look(batch_size=2), whole, rtol=1e-4, atol=1e-5)
    parts = [look(batch_size=2, part=slice(k, None, 2)) for k in (0, 1)]
    assert torch.equal(parts[0] + parts[1], look(batch_size=2))
    assert all(bool((part == 0).any()) for part in parts)
    assert float((look(seed=2) - whole).abs().min()) > 1e-3


def test_the_log_has_mean_and_standard_error_of_the_average_and_the_best_step(tmp_path: Path) -> None:
    subject = trainer(tmp_path, Supervised())
    average = subject.run()
    looks = [row for row in rows(tmp_path) if "validation" in row]
    assert [row["step"] for row in looks] == [2, 4, 6, 8]
    best = min(looks, key=lambda row: row["validation"])
    values = evaluate(average, Supervised(), subject.validation, seed=0, batch_size=4, device=torch.device("cpu"))
    assert best["validation"] == pytest.approx(float(values.mean()), rel=1e-5)
    assert best["error"] == pytest.approx(float(values.std()) / math.sqrt(len(values)), rel=1e-5)
    assert looks[-1]["best"] == best["step"]


def test_training_stops_when_progress_ends_and_returns_the_best_average(tmp_path: Path) -> None:
    """The sum of the filter falls from 1 to the level 0 of the training images, past the level 0.6 of the held-out ones."""
    plan = replace(PLAN, steps=400, learning_rate=1e-3, validate_every=5, patience=3)
    subject = Trainer(Filter(), Level(), levels(0.0), plan, tmp_path, levels(0.6))
    average = subject.run()
    looks = [row for row in rows(tmp_path) if "validation" in row]
    best, last = looks[-1]["best"], looks[-1]["step"]
    assert best == min(looks, key=lambda row: row["validation"])["step"]
    assert best < last == best + 15 < 400
    assert abs(float(average.conv.weight.sum()) - 0.6) < 0.02 < abs(float(subject.model.conv.weight.detach().sum()) - 0.6)
    again = replace(subject, model=Filter())
    assert same(again.run(resume=True), average)  # a run that had stopped stays stopped
    assert rows(tmp_path)[-1]["step"] == last


def test_slow_progress_adds_up_and_the_lowest_mean_is_kept() -> None:
    """Two looks differ by 0.12 standard errors of 16 rows, by orthogonal patterns; what they have in common is far larger."""
    watch, model = EarlyStopping(3), nn.Linear(1, 1)
    patterns = 0.12 * 7.5**0.5 * torch.from_numpy(hadamard(16)).double()[1:]
    common = torch.linspace(-9, 9, 16, dtype=torch.float64)
    for step, mean in enumerate([1.0, 0.95, 0.9, 0.85, 0.8, 0.82, 0.79, 0.81]):
        model.weight.data.fill_(step)
        watch.observe(step, mean + common + patterns[step], model)
        assert watch.stopped == (step > 5)
    assert watch.best_step == 6 and abs(watch.best_mean - 0.79) < 1e-12
    assert watch.weights["weight"].item() == 6


def test_with_multipliers_validation_is_a_number_in_the_log_and_neither_stops_nor_chooses(tmp_path: Path) -> None:
    eager = replace(PLAN, validate_every=1, patience=1)
    with_validation = trainer(tmp_path / "with", unsure(), eager).run()
    assert same(with_validation, trainer(tmp_path / "without", unsure(), eager, validated=False).run())
    looks = [row for row in rows(tmp_path / "with") if "validation" in row]
    assert len(looks) == eager.steps and all("best" not in row for row in looks)


def test_validation_does_not_change_the_training(tmp_path: Path) -> None:
    subjects = [trainer(tmp_path / str(validated), Sure(), validated=validated) for validated in (True, False)]
    for subject in subjects:
        subject.run()
    assert same(subjects[0].model, subjects[1].model)


def test_finite_differences_under_reduced_precision_are_refused_and_forward_mode_is_not(tmp_path: Path) -> None:
    plan = replace(PLAN, precision="bf16", steps=1)
    with pytest.raises(DiffinvError, match=r"finite differences.*ForwardMode"):
        trainer(tmp_path / "differences", Sure(), plan).run()
    trainer(tmp_path / "exact", Sure(ForwardMode()), plan).run()


def test_one_held_out_row_is_refused(tmp_path: Path) -> None:
    subject = trainer(tmp_path, Sure())
    with pytest.raises(DiffinvError, match="validation wants 2 or more"):
        replace(subject, validation=Subset(subject.validation, torch.tensor([0]))).run()


def test_a_held_out_row_without_a_finite_loss_is_named(tmp_path: Path) -> None:
    model = blur()
    model.conv.weight.fill_(torch.nan)
    held_out = sources()[1]
    first = int(held_out.rows[0])
    assert first > 0  # named by its number in all data
    with pytest.raises(DiffinvError, match=f"held-out row {first} is nan"):
        evaluate(model, Sure(), held_out, seed=0, batch_size=4, device=torch.device("cpu"))


class Watched(Unsure):
    """Counts the nodes of the graph that each step goes back through, and keeps them in `sizes`."""

    sizes: ClassVar[list[int]] = []

    def __call__(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        value = super().__call__(model, batch, rng)
        if value.requires_grad:
            self.sizes.append(len(nodes(value.grad_fn)))
        return value


def nodes(root: object) -> set:
    found, open_ends = set(), [root]
    while open_ends:
        node = open_ends.pop()
        if node is not None and node not in found:
            found.add(node)
            open_ends += [parent for parent, _ in node.next_functions]
    return found


def test_a_step_of_unsure_does_not_grow_with_the_steps_before(tmp_path: Path) -> None:
    """The multiplier's past is not part of the graph."""
    Watched.sizes.clear()
    trainer(tmp_path, Watched(White().start(0.1), White()), replace(PLAN, steps=12), validated=False).run()
    assert len(Watched.sizes) == 12 and len(set(Watched.sizes)) == 1


class Streams(Loss):
    """The streams that it is given."""

    def __call__(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        return rng.keys.double()


def test_validation_draws_other_numbers_than_training() -> None:
    held = sources()[1]
    found = evaluate(Filter(), Streams(), held, seed=3, batch_size=4, device=torch.device("cpu"))
    trained = Rng.for_draws(3, range(10 * len(held)), 1).keys.double()
    assert len(set(found.tolist())) == len(held)
    assert not set(found.tolist()) & set(trained.tolist())
