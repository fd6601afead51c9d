"""The engine's parts around the sampler: one grid for all bands, the target's resolution, costs, names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffinv.core.checks import ConfigError
from diffinv.data.catalog import find_objects, object_name
from diffinv.data.fits import Plane, encode_fits
from diffinv.data.forward import Field, build_field
from diffinv.data.grids import SkyGrid, output_grid
from diffinv.data.layouts import InputOptions
from diffinv.data.observation import SkyObservation, read_observation
from diffinv.engine.channels import build_channels, default_margin
from diffinv.engine.draws import INNER, Method
from diffinv.engine.inspect import count_evaluations, most_passes
from diffinv.engine.methods import Choice, build_method, describe_method
from diffinv.engine.mocks import sky_cards
from diffinv.engine.objects import answer_channels, find_truth, smooth_to
from diffinv.engine.reconstruct import reconstruct
from diffinv.guidance.base import ConjugateGradients, Gmres
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.guidance.pseudo_inverse import PseudoInverse
from diffinv.likelihood import Likelihood
from diffinv.priors.store import Prior, load_prior
from diffinv.samplers.ode import Euler, Heun
from diffinv.schedules import Karras
from tests.bands import checked_band, source
from tests.small import blob, card, write_prior

DITHER = 5  # native pixels


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Prior:
    return load_prior(str(write_prior(tmp_path_factory.mktemp("engine") / "tiny.safetensors")))


def star(name: str, shift: int, size: int, extver: int) -> list[Plane]:
    """A point source on the reference point of the sky, `shift` pixels to the left of the centre of the array."""
    place = (size - 1) // 2
    offset = [np.arange(size) - place, np.arange(size) - (place - shift)]
    image = 1000 * np.exp(-4 * np.log(2) * (offset[0][:, None] ** 2 + offset[1] ** 2) / 3.0**2)
    cards = {**sky_cards((size, size), 0.2), "CRPIX1": place - shift + 1.0, "CRPIX2": place + 1.0, "BAND": name, "BUNIT": "nJy"}
    return [
        Plane("SCI", image.astype(np.float32), cards, extver),
        Plane("VAR", np.full((size, size), 1.0, np.float32), cards, extver),
        Plane("PSF", blob(15, 3.0).astype(np.float32), {"BAND": name, "PSFNORM": 1.0}, extver),
    ]


def dithered(path: Path, sizes: tuple[int, int]) -> SkyObservation:
    parts = [*star("g", 0, sizes[0], 1), *star("i", DITHER, sizes[1], 2)]
    path.write_bytes(encode_fits([Plane("PRIMARY", None, {}), *parts]))
    return read_observation(path, InputOptions())


@pytest.mark.parametrize("sizes", [(15, 15), (15, 17)])
def test_dithered_bands_of_a_grey_prior_are_answered_on_one_grid(tmp_path: Path, prior: Prior, sizes: tuple[int, int]) -> None:
    observation = dithered(tmp_path / "a.fits", sizes)
    channels = build_channels(observation, prior, margin=None)
    assert [c.field.canvas.shape for c in channels] == [channels[0].field.canvas.shape] * 2
    assert [c.field.grid.cards for c in channels] == [channels[0].field.grid.cards] * 2
    answers = answer_channels(channels, prior, Method(steps=4), draws=2, seeds=[0] * len(channels), target_fwhm=0.6, max_batch=8)
    planes = torch.cat([a.samples for a in answers], 1).mean(0)
    peaks = [np.unravel_index(int(plane.argmax()), plane.shape) for plane in planes]
    expected = channels[0].field.grid.world_to_pixel(150.0, 2.0)
    for peak in peaks:
        assert np.abs(np.subtract(peak, expected)).max() <= 1
    row, column = (round(float(p)) for p in expected)
    first, second = planes[:, row - 5 : row + 6, column - 5 : column + 6]
    assert float((first - second).abs().max()) < 0.1 * float(first.max())


def test_the_margin_reaches_over_every_data_pixel_of_all_bands(tmp_path: Path, prior: Prior) -> None:
    observation = dithered(tmp_path / "a.fits", (15, 15))
    for channel in build_channels(observation, prior, margin=None):
        for band in observation.bands:
            affine = band.grid.affine_to(channel.field.canvas)
            corners = np.array([[0, 0], [14, 14]]) @ affine.matrix.T + affine.offset
            assert (corners > -0.501).all() and (corners < np.array(channel.field.canvas.shape) - 0.499).all()


@pytest.mark.parametrize(("size", "shape", "margin"), [(1.5, (32, 32), 0), (8.0, (32, 32), 8), (1.5, (40, 32), 7)])
def test_the_margin_is_for_large_fields_and_for_light_at_the_edges(size: float, shape: tuple[int, int], margin: int) -> None:
    """A PSF of 3.5 pixels of 0.2″ is 7 of the output's; 32 of them fill the field of a prior of 64, which sees 80 in one pass."""
    radius = np.hypot(*(np.indices(shape) - np.array(shape)[:, None, None] / 2))
    image = 50 * np.exp(-radius / size) + np.random.default_rng(1).normal(size=shape)
    band = checked_band(image=image, variance=np.ones(shape))
    prior = replace(card(), size=64, widths=(8, 8, 8))
    assert default_margin([band], output_grid(band.grid, 0.1), prior) == margin
    assert default_margin([band], output_grid(band.grid, 0.1), replace(prior, size=96)) == (7 if size == 8 else 0)


def test_an_odd_field_is_seen_in_one_pass() -> None:
    """67 pixels and a margin of 6 make 80 with one row more, not 79."""
    image = source(shape=(67, 67))
    band = checked_band(image=image, variance=np.ones_like(image))
    prior = replace(card(), size=64, widths=(8, 8, 8), pixel_scale=0.2)
    margin = default_margin([band], output_grid(band.grid, 0.2), prior)
    field = build_field([band], pixel_scale=0.2, target_fwhm=0.4, margin=margin)
    assert field.canvas.shape == (80, 80)
    assert prior.sees(field.canvas.shape)


def field(fwhm: float) -> Field:
    grid = SkyGrid.linear((64, 64), 0.1)
    return Field(Likelihood, grid, grid, 0, fwhm, 1.0, ())


@pytest.mark.parametrize("target", [0.2001, 0.21, 0.23, 0.4, 0.8])
def test_smoothing_gives_the_target_however_little_it_is_wider(target: float) -> None:
    """A Gaussian of FWHM 0.4″, well sampled, under the prior's 0.2″ becomes √(0.4² + target² − 0.2²)″ to 1e-4 of its peak."""
    image = torch.from_numpy(blob(64, 4.0)).float()[None, None]
    smooth = smooth_to(image, field(0.2), target)[0, 0].numpy()
    expected = blob(64, 10 * np.sqrt(0.4**2 + target**2 - 0.2**2))
    assert np.abs(smooth - expected).max() < 1e-4 * expected.max()
    if target == 0.21:
        assert np.abs(image[0, 0].numpy() - expected).max() > 1e-2 * expected.max()


def test_smoothing_does_not_wrap_light_around() -> None:
    image = torch.zeros(1, 1, 64, 64)
    image[..., 0, 0] = 1.0
    smooth = smooth_to(image, field(0.2), 1.0)
    assert float(smooth[..., 32:, :].abs().max()) < 1e-6 and float(smooth[..., :, 32:].abs().max()) < 1e-6


@pytest.mark.parametrize("target", [0.0, 0.199])
def test_a_sharper_target_is_a_configuration_error(target: float) -> None:
    with pytest.raises(ConfigError, match="is sharper"):
        smooth_to(torch.zeros(1, 1, 64, 64), field(0.2), target)


@pytest.mark.parametrize(
    ("card_fwhm", "answer", "attached"), [(None, 0.2, True), (None, 0.4, False), (0.2, 0.2, True), (0.3, 0.2, False)]
)
def test_a_truth_of_another_resolution_is_not_attached(card_fwhm: float | None, answer: float, attached: bool) -> None:
    cards = {**sky_cards((16, 16), 0.1), "BAND": "i"} | ({} if card_fwhm is None else {"TPSFFWHM": card_fwhm})
    planes = [Plane("TRUTH", np.ones((16, 16), np.float32), cards)]
    truth = find_truth(planes, ("i",), SkyGrid.from_header(cards, (16, 16)), answer, 0.2)
    assert (truth is not None) == attached


@pytest.mark.parametrize(
    "method",
    [
        Method(Euler(), MomentMatching(ConjugateGradients(3, 1e-9)), 9),
        Method(Heun(), MomentMatching(Gmres(3, 1e-9)), 9),
        Method(Heun(), PseudoInverse(1.0), 33),
        Method(Heun(), MomentMatching(ConjugateGradients(3, 1e-9)), 9, Karras(0.1, 5.0)),
    ],
)
def test_the_foreseen_network_passes_bound_and_nearly_meet_the_real_ones(tmp_path: Path, prior: Prior, method: Method) -> None:
    observation = dithered(tmp_path / "a.fits", (8, 8))
    channel = build_channels(replace(observation, bands=observation.bands[:1]), prior, margin=0)[0]
    scale = torch.tensor([channel.field.scale])
    real = reconstruct(channel.field.likelihood, prior, draws=3, method=method, scale=scale).network_calls
    assert real <= most_passes(method, 3) + 1e-9
    assert real > 0.8 * most_passes(method, 3)


def test_heun_asks_twice_a_step_but_once_in_the_last_and_once_at_the_start() -> None:
    assert count_evaluations(Method(Heun(), steps=10)) == 1 + 2 * 10 - 1
    assert count_evaluations(Method(Euler(), steps=10)) == 1 + 10


@pytest.mark.parametrize("guidance", [None, "moment_matching_cg", "pseudo_inverse"])
def test_a_method_is_described_with_its_solver_and_fits_a_card(guidance: str | None) -> None:
    texts = set()
    for iterations, tol in ((5, 1e-3), (6, 1e-3), (5, 1e-6)):
        text = describe_method(build_method(Choice(guidance=guidance, iterations=iterations, tol=tol), card()))
        assert len(text) <= 68
        inner = f" + {INNER}" if guidance is None else ""
        assert f" {iterations}{inner}, {tol:g})" in text
        texts.add(text)
    assert len(texts) == 3
    cg = build_method(Choice(guidance="moment_matching_cg"), card())
    assert describe_method(cg) != describe_method(Method(guidance=MomentMatching(Gmres(12, 1e-3))))


@pytest.mark.parametrize(
    ("file", "name"),
    [("a.fits", "a"), ("a.b.FITS.GZ", "a.b"), ("a.fts", "a"), ("a.Fit.fz", "a"), (".fits", ".fits"), ("a.gz", "a.gz")],
)
def test_an_object_has_one_name_wherever_it_is_read(tmp_path: Path, file: str, name: str) -> None:
    assert object_name(Path(file)) == name
    path = tmp_path / file
    path.write_bytes(encode_fits([Plane("PRIMARY", None, {}), *star("i", 0, 9, 1)]))
    assert find_objects(path)[0].object_id == name
    assert read_observation(path, InputOptions()).object_id == name
