"""Sources: a row is a function of its number (and, for views, of its stream); an image has one noise and one operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import CleanBatch, MeasuredBatch
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Diagonal, Identity
from diffinv.training.augment import GalaxyViews
from diffinv.training.sources import CleanImages, Measured, Simulated, Source, Subset, Surveys, split
from tests.trainings import SIGMA, fields, observe

COUNT = 12
NOISE = Gaussian(torch.full((1,), SIGMA))


def dimmed(x: Tensor, rng: Rng) -> MeasuredBatch:
    """Measurements by an operator of its own for each image."""
    operator = Diagonal(0.5 + rng.uniform(x))
    return MeasuredBatch(Observation(operator(x) + SIGMA * rng.normal(x), operator, NOISE), x)


def measured() -> Measured:
    x = fields(COUNT)
    data = dimmed(x, Rng.for_draws(0, range(COUNT), 1))
    second = observe(x, Rng.for_draws(1, range(COUNT), 1)).observation
    return Measured(MeasuredBatch(data.observation, x, second))


SOURCES: dict[str, Source] = {
    "clean": CleanImages(fields(COUNT), GalaxyViews(shift=1)),
    "measured": measured(),
    "simulated": Simulated(fields(COUNT), dimmed, seed=3),
    "subset": Subset(Simulated(fields(COUNT + 5), dimmed, seed=3), torch.arange(5, COUNT + 5)),
}


def streams(count: int, seed: int = 0) -> Rng:
    return Rng.for_draws(seed, range(count), 1)


def contents(batch: CleanBatch | MeasuredBatch) -> list[Tensor]:
    return batch.tensors()


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_a_row_does_not_depend_on_its_batch_mates(source: Source) -> None:
    assert len(source) == COUNT
    index = torch.tensor([7, 2, 11, 2, 0])
    whole = source.batch(index, streams(5))
    assert whole.batch == 5
    for k in range(5):
        alone = source.batch(index[k : k + 1], streams(5).select(slice(k, k + 1)))
        for ours, theirs in zip(contents(whole.select([k])), contents(alone), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["measured", "simulated", "subset"])
def test_measurements_are_the_same_whatever_the_streams_of_the_training(name: str) -> None:
    index = torch.tensor([3, 1, 3])
    first, again = (SOURCES[name].batch(index, streams(3, seed)) for seed in (0, 1))
    for ours, theirs in zip(contents(first), contents(again), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(first.observation.y[0], first.observation.y[2])
    assert not torch.equal(first.observation.y[0], first.observation.y[1])


def test_clean_images_have_new_views_at_each_look() -> None:
    first, again = (SOURCES["clean"].batch(torch.arange(3), streams(3, seed)).x for seed in (0, 1))
    assert not torch.equal(first, again)


def test_an_image_has_one_noise_realisation_over_the_epochs_and_another_survey_another() -> None:
    x = fields(1).expand(COUNT, -1, -1, -1)
    one, other = (Simulated(x, observe, seed) for seed in (0, 1))
    order = Rng.for_draws(8, [0], 1)
    seen: dict[int, Tensor] = {}
    for epoch in range(5):
        index = order.uniform(torch.zeros(1, COUNT)).argsort()[0]
        batch = one.batch(index, streams(COUNT, epoch))
        for number, y in zip(index.tolist(), batch.observation.y, strict=True):
            assert torch.equal(seen.setdefault(number, y), y)
    noise = torch.stack(list(seen.values())) - x[0]
    size = noise.numel()
    assert abs(float(noise.square().mean()) / SIGMA**2 - 1) <= 4.5 * (2 / size) ** 0.5
    assert len({tuple(n.flatten().tolist()) for n in noise}) == COUNT  # every image its own
    assert not torch.equal(other.batch(torch.tensor([0]), streams(1)).observation.y[0], seen[0])


def test_what_rows_share_stays_shared() -> None:
    batch = SOURCES["measured"].batch(torch.tensor([4, 5]), streams(2))
    assert batch.observation.noise.std.shape[0] == 1
    assert batch.observation.operator.d.shape[0] == batch.observation.y.shape[0] == batch.x.shape[0] == 2
    assert batch.second.y.shape[0] == 2


def test_one_measurement_serves_a_batch_of_any_size() -> None:
    x = fields(1)
    batch = Measured(MeasuredBatch(Observation(x, Identity((1, 8, 8)), NOISE), x)).batch(torch.zeros(3).long(), streams(3))
    assert batch.observation.y.shape == batch.x.shape == (3, 1, 8, 8)


def test_stored_half_precision_and_integers_become_float32() -> None:
    x = fields(2).half()
    for source in (CleanImages(x, lambda x, rng: x), Simulated(x, dimmed, 0)):
        assert source.batch(torch.arange(2), streams(2)).x.dtype == torch.float32


def test_a_split_has_every_row_once_in_the_share_asked_for_and_keeps_it_when_the_source_grows() -> None:
    count = 4000
    train, out = split(CleanImages(torch.zeros(count, 1, 1, 1), GalaxyViews()), 0.25)
    assert torch.equal(torch.cat([train.rows, out.rows]).sort().values, torch.arange(count))
    assert abs(len(out) / count - 0.25) <= 4.5 * (0.25 * 0.75 / count) ** 0.5
    _, fewer = split(CleanImages(torch.zeros(count // 2, 1, 1, 1), GalaxyViews()), 0.25)
    assert torch.equal(fewer.rows, out.rows[out.rows < count // 2])


def test_a_split_keeps_the_measurements() -> None:
    source = SOURCES["simulated"]
    for part in split(source, 0.3):
        rows = torch.arange(len(part))
        ours, theirs = part.batch(rows, streams(len(part))), source.batch(part.rows, streams(len(part)))
        assert torch.equal(ours.observation.y, theirs.observation.y)


@pytest.mark.parametrize(("share", "reason"), [(0.0, "held_out is 0"), (1.0, "held_out is 1"), (1e-6, "leaves a part empty")])
def test_a_split_that_leaves_nothing_is_refused(share: float, reason: str) -> None:
    with pytest.raises(DiffinvError, match=reason):
        split(SOURCES["clean"], share)


def test_surveys_come_in_chunks_of_one_survey_each_in_order() -> None:
    parts = (measured(), Measured(observe(fields(5), Rng.for_draws(8, range(5), 1))))
    both = Surveys(parts)
    assert len(both) == COUNT + 5
    chunks = both.chunks(8)
    assert [c.tolist() for c in chunks] == [list(range(8)), list(range(8, COUNT)), list(range(COUNT, COUNT + 5))]
    found = torch.cat([both.batch(c, streams(len(c))).observation.y for c in chunks])
    expected = [part.batch(torch.arange(len(part)), streams(len(part))).observation.y for part in parts]
    assert torch.equal(found, torch.cat(expected))
    kept, rest = split(both, 0.4)
    for part in (kept, rest):
        numbers = [part.rows[c].tolist() for c in part.chunks(4)]
        assert sorted(sum(numbers, [])) == part.rows.tolist()
        assert all(max(n) < COUNT or min(n) >= COUNT for n in numbers)
        assert len(part.batch(part.chunks(4)[-1], streams(len(numbers[-1]))).observation.y) == len(numbers[-1])
    with pytest.raises(DiffinvError, match="rows 11 to 12 are of several surveys"):
        both.batch(torch.tensor([11, 12]), streams(2))
    with pytest.raises(DiffinvError, match="no parts"):
        Surveys(())
