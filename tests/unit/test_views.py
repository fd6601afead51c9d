"""What a stored galaxy becomes in training: turned, flipped, shifted, rescaled, by its own stream."""

from __future__ import annotations

import torch
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.training.augment import GalaxyViews


def galaxies(count: int = 16) -> Tensor:
    return Rng.for_draws(0, range(count), 1).uniform(torch.zeros(count, 1, 8, 8))


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
