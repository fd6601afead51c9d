"""Trained reconstructors keep their images on disk and in any unit, and whatever else is in a file is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import ConfigError, DiffinvError, InputError, UnsupportedError
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.noise.base import Noise
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.noise.gamma import Gamma
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.photon import HeteroscedasticGaussian, PoissonGaussian
from diffinv.noise.poisson import Poisson
from diffinv.noise.units import in_units
from diffinv.noise.unknown import UnknownLevel
from diffinv.operators.algebra import Identity
from diffinv.operators.groups import Flips, Product, QuarterTurns
from diffinv.operators.sampling import Mask
from diffinv.reconstructors.designs import (
    BackProjectedDesign,
    BlindSpotDesign,
    BottleneckDesign,
    Design,
    ScoreDesign,
    UnrolledDesign,
    initialise,
)
from diffinv.reconstructors.units import InUnits, observation_in_units
from diffinv.training.store import (
    ReconstructorCard,
    UseLeaveOut,
    UseRecorrupted,
    UseSplitting,
    load_reconstructor,
    save_reconstructor,
)

SHAPE = (1, 8, 8)
DESIGNS: dict[str, Design] = {
    "backprojected": BackProjectedDesign((8, 8), (1, 1), residual=True),
    "least squares": BackProjectedDesign((8,), (1,), residual=False, iterations=3, damping=0.1),
    "filled gaps": BackProjectedDesign((8,), (1,), residual=True, filling=1.0),
    "unrolled": UnrolledDesign(2, (8,), (1,), shared=True),
    "unrolled, networks of their own": UnrolledDesign(2, (8,), (1,), shared=False),
    "blind spot": BlindSpotDesign(8, 2),
    "score": ScoreDesign((8,), (1,)),
    "bottleneck": BottleneckDesign(3, (8, 8)),
}
USES = {
    "as it is": None,
    "recorrupted": UseRecorrupted(0.8, 3, 1),
    "splitting": UseSplitting(0.8, 0, 3, 1),
    "left out": UseLeaveOut(3, 1),
    "left out, virtual": UseLeaveOut(3, 1, Product((QuarterTurns(), Flips()))),
    "virtual": UseSplitting(0.8, 0, 2, 1, Product((QuarterTurns(), Flips()))),
}
one = lambda *values: torch.tensor(values)


def observation(scale: float = 1.0) -> Observation:
    y = scale * (1 + 0.1 * Rng(range(3)).normal(torch.zeros(3, *SHAPE)))
    return Observation(y, Identity(SHAPE), Gaussian(one(0.1 * scale)))


def trained(design: Design) -> torch.nn.Module:
    """Built and moved away from its start, where some layers are 0."""
    model = design.build(SHAPE)
    initialise(model, 3)
    for k, parameter in enumerate(model.parameters()):
        parameter.data += 0.05 * Rng([k]).normal(parameter.data[None])[0]
    return model.eval().requires_grad_(False)


def card(design: Design, **changes: object) -> ReconstructorCard:
    return replace(ReconstructorCard("tiny", design, None, SHAPE, 2.0, "nJy", {"seed": 3}), **changes)


WHOLE = ("blind spot", "score")  # trained on whole data of A = I: used as they are


@pytest.mark.parametrize(("name", "use"), [(n, u) for n in DESIGNS for u in USES if n not in WHOLE or USES[u] is None])
def test_a_file_gives_the_same_images(name: str, use: str, tmp_path: Path) -> None:
    model, made = trained(DESIGNS[name]), card(DESIGNS[name], use=USES[use])
    save_reconstructor(tmp_path / "a.safetensors", model, made)
    loaded = load_reconstructor(tmp_path / "a.safetensors")
    assert loaded.card == made
    expected = InUnits(model if made.use is None else made.use.wrap(model), 2.0)(observation())
    assert torch.equal(loaded(observation()), expected)
    assert not torch.allclose(expected, observation().y)


@pytest.mark.parametrize("name", DESIGNS)
def test_a_reconstructor_follows_the_unit_of_the_data(name: str) -> None:
    model = trained(DESIGNS[name])
    here, there = InUnits(model, 2.0)(observation()), InUnits(model, 2e-12)(observation(1e-12))
    assert torch.allclose(here, there * 1e12, rtol=1e-3, atol=1e-4)


def test_the_start_depends_on_the_seed_alone() -> None:
    def weights(seed: int) -> list[Tensor]:
        model = BackProjectedDesign((8, 16), (1, 1), residual=True).build(SHAPE)
        initialise(model, seed)
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))
    model = BackProjectedDesign((8, 16), (1, 1), residual=True).build(SHAPE)
    initialise(model, 1)
    assert torch.allclose(model(observation()), InUnits(model, 1.0)(observation()))
    assert not model.network.network.head.weight.any()


NOISES: dict[str, Noise] = {
    "white": Gaussian(one(0.3)),
    "per channel": Gaussian(torch.full((1, 1), 0.3)),
    "per row": Gaussian(one(0.3, 0.2, 0.1)),
    "correlated": CorrelatedGaussian(one(0.3), 1 + 0.5 * torch.cos(torch.arange(8) * torch.pi / 4)[:, None].expand(1, 1, 8, 8)),
    "poisson": Poisson(one(20.0), one(0.1)),
    "electrons": PoissonGaussian(one(20.0), one(2.0), one(0.1)),
    "approximate electrons": HeteroscedasticGaussian(one(20.0), one(2.0), one(0.1)),
    "speckle": Gamma(one(4.0), one(1e-3)),
}


@pytest.mark.parametrize("name", NOISES)
def test_a_draw_in_another_unit_is_the_draw_divided_by_it(name: str) -> None:
    noise, scale = NOISES[name], torch.tensor([4.0])
    mean = 1 + torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    changed = in_units(noise, scale)
    assert torch.allclose(changed.sample(mean / 4, Rng(range(3))), noise.sample(mean, Rng(range(3))) / 4, rtol=1e-5, atol=1e-6)
    assert torch.allclose(changed.variance(mean / 4), noise.variance(mean) / 16, rtol=1e-5)


def test_noise_of_unknown_level_says_which_data_are_good_and_nothing_else() -> None:
    mask = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)) < 0.5
    noise, y, rng = UnknownLevel(mask), torch.ones(3, *SHAPE), Rng(range(3))
    assert torch.equal(noise.variance(y).isfinite(), mask)
    assert in_units(noise, torch.tensor([2.0])) is noise
    for ask in (
        lambda: noise.sample(y, rng),
        lambda: noise.log_prob(y, y),
        lambda: noise.score(y, y),
        lambda: noise.precision(y),
        lambda: noise.perturb(y, rng),
        lambda: noise.split(y, rng),
    ):
        with pytest.raises(UnsupportedError, match="noise of unknown level has no"):
            ask()


def test_only_linear_problems_have_units() -> None:
    with pytest.raises(UnsupportedError, match="not linear"):
        observation_in_units(replace(observation(), operator=_Square(SHAPE)), torch.tensor([2.0]))
    with pytest.raises(DiffinvError, match="scale must be finite and > 0"):
        InUnits(trained(DESIGNS["unrolled"]), 0.0)
    masked = Observation(observation().y, Mask(torch.ones(1, *SHAPE, dtype=torch.bool)), observation().noise)
    assert torch.equal(observation_in_units(masked, torch.tensor([2.0])).y, masked.y / 2)


class _Square:
    """A stand-in that is no LinearOperator."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.in_shape = self.out_shape = shape


@pytest.mark.parametrize(
    ("design", "shape", "reason"),
    [
        (BackProjectedDesign((8, 8, 8), (1, 1, 1), residual=True), (1, 8, 12), "sides divide by 8"),
        (BackProjectedDesign((8, 8), (1,), residual=True), SHAPE, "2 widths but 1 blocks"),
        (BackProjectedDesign((8,), (1,), residual=True, iterations=3), SHAPE, "go together"),
        (BottleneckDesign(3, (8,)), (1, 8, 4), "wants square images"),
    ],
)
def test_designs_that_do_not_fit_the_images_are_refused(design: Design, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        design.build(shape)


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weights": [1.0]}))


def _other_width(path: Path) -> None:
    content = path.read_bytes()
    changed = content.replace(b'\\"widths\\": [8, 8]', b'\\"widths\\": [8,16]')
    assert changed != content
    path.write_bytes(changed)


def _other_kind(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"backprojected", b"backprojectes"))


def _no_design(path: Path) -> None:
    content = path.read_bytes()
    start, end = content.index(b'\\"design\\": {'), content.index(b', \\"name\\": \\"tiny')
    path.write_bytes(content[:start] + (b'\\"design\\": 3').ljust(end - start) + content[end:])


def _not_a_number(path: Path) -> None:
    model = trained(DESIGNS["backprojected"])
    next(model.parameters()).data.view(-1)[-1] = torch.nan
    save_reconstructor(path, model, card(DESIGNS["backprojected"]))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_pickled, "not a readable safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "not a readable safetensors file"),
        (_other_width, "do not fit the design on its card"),
        (_other_kind, "did you mean backprojected"),
        (_no_design, "its design is of another kind"),
        (_not_a_number, r"the weights '.*' hold NaN or infinite values"),
        (Path.unlink, "no such file"),
    ],
)
def test_a_file_that_is_no_reconstructor_is_one_line(tmp_path: Path, damage: Callable[[Path], object], reason: str) -> None:
    path = tmp_path / "a.safetensors"
    save_reconstructor(path, trained(DESIGNS["backprojected"]), card(DESIGNS["backprojected"]))
    damage(path)
    with pytest.raises(InputError, match=reason) as caught:
        load_reconstructor(path)
    assert "\n" not in str(caught.value)


def test_a_prior_is_no_reconstructor(tmp_path: Path) -> None:
    from tests.small import write_prior

    with pytest.raises(InputError, match="is not a reconstructor"):
        load_reconstructor(write_prior(tmp_path / "prior.safetensors"))
    (tmp_path / "a.pt").write_bytes(b"x")
    with pytest.raises(InputError, match=r"must be a \.safetensors file"):
        load_reconstructor(tmp_path / "a.pt")
